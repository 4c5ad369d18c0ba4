"""Layer norm, and layer norm times a SiLU gate with dropout, forward and backward. Owns grids and launches.

Device code is in `hstu_norm_kernel`. float16 and bfloat16 tensors, statistics and sums in float32. The functions take
preallocated outputs where a caller may reuse memory, read and write strided rows (the last stride is 1), start no work
but kernels and never wait for the device: they can be captured in a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from smbench_kernels import hardware, hstu_norm_sm90
from smbench_kernels.hardware import Hardware
from smbench_kernels.hstu_norm_kernel import (
    dropout_mask,
    gate_backward,
    gate_forward,
    norm_backward,
    norm_forward,
    sum_partials,
)
from smbench_kernels.launch import Call, ceil_div, next_power_of_two
from smbench_kernels.op import Config

# ELEMENTS of a tile where rows are short enough to share one, how many of them each THREAD has; for kernels that sum
# over rows also the threads that stay on a multiprocessor (in PROGRAMS of 128 of them) and the tiles in flight
FORWARD: Config = {"ELEMENTS": 2048, "THREAD": 16}
NORM_BACKWARD: Config = {"ELEMENTS": 2048, "THREAD": 16, "PROGRAMS": 4, "STAGES": 3}
GATE_BACKWARD: Config = {"ELEMENTS": 2048, "THREAD": 16, "PROGRAMS": 3, "STAGES": 3}
GATE_BACKWARD_AGAIN: Config = {"ELEMENTS": 1024, "THREAD": 8, "PROGRAMS": 4, "STAGES": 3}
WARPS = 4
"""Of those 128 threads."""
SUM_COLUMNS, SUM_ROWS = 16, 256


@dataclass(frozen=True, slots=True)
class Dropout:
    """Elements are dropped with a probability, by a mask that the seed decides."""

    probability: float
    """In [0, 1)."""
    seed: torch.Tensor
    """int64, one element, on the device: read when the kernels run, so that a CUDA graph draws anew if it changes."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.probability < 1.0:
            msg = f"a dropout probability is at least 0 and below 1, not {self.probability}"
            raise ValueError(msg)
        if self.seed.dtype != torch.int64 or self.seed.numel() != 1:
            msg = f"a dropout seed is a tensor of one int64, not {list(self.seed.shape)} of {self.seed.dtype}"
            raise ValueError(msg)


def launch(call: Call) -> None:
    """Run a call on the current stream."""
    call.kernel[call.grid](*call.arguments, **call.options)


def forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """LayerNorm over the last dimension of x [T, width], rows of any stride; contiguous, in the dtype of x.

    Second come the statistics [2, T], float32: each row's mean, and one over its standard deviation.
    """
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    stats = torch.empty((2, x.shape[0]), dtype=torch.float32, device=x.device)
    launch(forward_call(x, weight, bias, y, stats, eps, again=False))
    return y, stats


def normed(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """What `forward` returns first, for inference: by the kernel for Hopper where it takes the tensors, else Triton's.

    That kernel reads weight and bias before the kernel in front has ended.
    """
    if hstu_norm_sm90.unsupported(x, None, weight, bias) is None:
        return hstu_norm_sm90.forward(x, None, weight, bias, eps)
    return forward(x, weight, bias, eps)[0]


def gated(x: torch.Tensor, u: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """What `gate` returns first without dropout, for inference, as `normed`."""
    if hstu_norm_sm90.unsupported(x, u, weight, bias) is None:
        return hstu_norm_sm90.forward(x, u, weight, bias, eps)
    return gate(x, u, weight, bias, eps, None)[0]


def forward_again(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, stats: torch.Tensor, eps: float
) -> torch.Tensor:
    """What `forward` returned first, to the bit, from the statistics that it returned second."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch(forward_call(x, weight, bias, y, stats, eps, again=True))
    return y


def forward_call(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    y: torch.Tensor,
    stats: torch.Tensor,
    eps: float,
    again: bool,
) -> Call:
    """The launch of `forward` and `forward_again`."""
    tokens, width = x.shape
    rows, warps = tile(width, FORWARD)
    block = next_power_of_two(width)
    arguments = (x, weight, bias, y, *stats.unbind(), tokens, x.stride(0), eps, width, block, rows, again)
    return Call(norm_forward, (max(1, ceil_div(tokens, rows)), 1, 1), arguments, {"num_warps": warps})


def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor,
    stats: torch.Tensor,
    dx: torch.Tensor,
    dparams: torch.Tensor,
) -> None:
    """The gradient through `forward`, plus `residual` [T, width], into dx; of weight and bias into dparams [2 * width].

    dy and dx are contiguous; dx may be dy. `stats` as returned by `forward`.
    """
    partials = torch.empty((programs(dy, NORM_BACKWARD), 2 * x.shape[1]), dtype=torch.float32, device=x.device)
    launch(backward_call(dy, x, weight, residual, dx, partials, stats))
    add_partials(partials, dparams)


def backward_call(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor,
    dx: torch.Tensor,
    partials: torch.Tensor,
    stats: torch.Tensor,
) -> Call:
    """The launch of `backward`'s first stage."""
    tokens, width = x.shape
    rows, warps = tile(width, NORM_BACKWARD)
    strides = (x.stride(0), residual.stride(0))
    sizes = (width, next_power_of_two(width), rows, NORM_BACKWARD["STAGES"])
    arguments = (dy, x, weight, residual, dx, partials, *stats.unbind(), tokens, *strides, *sizes)
    return Call(norm_backward, (partials.shape[0], 1, 1), arguments, {"num_warps": warps})


def gate(
    x: torch.Tensor, u: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, dropout: Dropout | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """LayerNorm(x) * silu(u), dropped out: x, u [T, width], rows of any stride; contiguous, in the dtype of x.

    u is the gate before its SiLU, so that its backward pass is part of this one. Second come x's statistics [2, T].
    """
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    stats = torch.empty((2, x.shape[0]), dtype=torch.float32, device=x.device)
    launch(gate_call(x, u, weight, bias, y, stats, eps, dropout))
    return y, stats


def gate_call(
    x: torch.Tensor,
    u: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    y: torch.Tensor,
    stats: torch.Tensor,
    eps: float,
    dropout: Dropout | None,
) -> Call:
    """The launch of `gate`."""
    tokens, width = x.shape
    rows, warps = tile(width, FORWARD)
    sizes = (width, next_power_of_two(width), rows, dropout is not None)
    strides = (x.stride(0), u.stride(0))
    arguments = (x, u, weight, bias, y, *stats.unbind(), *_drawn(dropout), tokens, *strides, eps, *sizes)
    return Call(gate_forward, (max(1, ceil_div(tokens, rows)), 1, 1), arguments, {"num_warps": warps})


def gate_gradients(
    dy: torch.Tensor,
    x: torch.Tensor,
    u: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    stats: torch.Tensor,
    dropout: Dropout | None,
    dx: torch.Tensor,
    du: torch.Tensor,
    dparams: torch.Tensor,
    again: torch.Tensor | None = None,
) -> None:
    """The gradients through `gate`: into dx [T, width], du [T, width] (rows of any stride), dparams [3 * width].

    dparams holds the gradients of weight and bias, then the sum of du over the tokens, which is the gradient of a bias
    added to u. dy and dx are contiguous; dx may be dy. `again`, contiguous, receives what `gate` returned.
    """
    count = programs(dy, _gate_backward(again))
    partials = torch.empty((count, 3 * x.shape[1]), dtype=torch.float32, device=x.device)
    launch(gate_gradients_call(dy, x, u, weight, bias, dx, du, again, partials, stats, dropout))
    add_partials(partials, dparams)


def gate_gradients_call(
    dy: torch.Tensor,
    x: torch.Tensor,
    u: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    dx: torch.Tensor,
    du: torch.Tensor,
    again: torch.Tensor | None,
    partials: torch.Tensor,
    stats: torch.Tensor,
    dropout: Dropout | None,
) -> Call:
    """The launch of `gate_gradients`' first stage."""
    tokens, width = x.shape
    config = _gate_backward(again)
    rows, warps = tile(width, config)
    tensors = (dy, x, u, weight, bias, dx, du, again, partials, *stats.unbind())
    strides = (x.stride(0), u.stride(0), du.stride(0))
    sizes = (width, next_power_of_two(width), rows, config["STAGES"], dropout is not None, again is not None)
    arguments = (*tensors, *_drawn(dropout), tokens, *strides, *sizes)
    return Call(gate_backward, (partials.shape[0], 1, 1), arguments, {"num_warps": warps})


def mask(dropout: Dropout, tokens: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """The factors [tokens, width] of a dropout: 0, or 1 / (1 - probability)."""
    factors = torch.empty((tokens, width), dtype=dtype, device=dropout.seed.device)
    launch(mask_call(dropout, factors))
    return factors


def mask_call(dropout: Dropout, factors: torch.Tensor) -> Call:
    """The launch of `mask`."""
    tokens, width = factors.shape
    rows, warps = tile(width, FORWARD)
    arguments = (factors, *_drawn(dropout), tokens, width, next_power_of_two(width), rows)
    return Call(dropout_mask, (max(1, ceil_div(tokens, rows)), 1, 1), arguments, {"num_warps": warps})


def add_partials(partials: torch.Tensor, out: torch.Tensor) -> None:
    """out [n] = the sum of partials [count, n], float32 and contiguous, over its rows, rounded to the dtype of out."""
    launch(add_partials_call(partials, out))


def add_partials_call(partials: torch.Tensor, out: torch.Tensor) -> Call:
    """The launch of `add_partials`."""
    count, columns = partials.shape
    arguments = (partials, out, count, columns, SUM_COLUMNS, SUM_ROWS)
    return Call(sum_partials, (ceil_div(columns, SUM_COLUMNS), 1, 1), arguments, {"num_warps": 4})


def tile(width: int, config: Config) -> tuple[int, int]:
    """Rows of a program's tile and its warps, for rows of `width` elements."""
    block = next_power_of_two(width)
    rows = max(1, config["ELEMENTS"] // block)
    return rows, min(16, max(1, rows * block // (32 * config["THREAD"])))


def programs(tensor: torch.Tensor, config: Config) -> int:
    """How many programs share the rows of a tensor [T, width] in a kernel that sums over rows."""
    rows, warps = tile(tensor.shape[1], config)
    resident = max(1, config["PROGRAMS"] * WARPS // warps) * card(tensor.device).sm_count
    return max(1, min(ceil_div(tensor.shape[0], rows), resident))


@lru_cache(maxsize=64)
def card(device: torch.device) -> Hardware:
    """The facts of a device, asked once: a launch takes as long as asking."""
    return hardware.of(device)


def _gate_backward(again: torch.Tensor | None) -> Config:
    return GATE_BACKWARD if again is None else GATE_BACKWARD_AGAIN


def _drawn(dropout: Dropout | None) -> tuple[torch.Tensor | None, float]:
    return (None, 0.0) if dropout is None else (dropout.seed, dropout.probability)
