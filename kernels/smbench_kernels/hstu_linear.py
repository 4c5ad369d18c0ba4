"""The HSTU layer's linear maps with what follows each: bias, SiLU, residual. Owns grids, launches and the choice.

Device code is in `hstu_linear_kernel`; for inference on Hopper there are kernels of another kind in `hstu_linear_sm90`.
Weights are [in, out] and may be a range of columns of a wider one. Products whose epilogue a library has (bias) are the
library's. For the two others, `SILU_ROUTES` and `RESIDUAL_ROUTES` say per compute capability what is fastest there; a
capability that is not in them takes the library with a pass of its own. The functions wait for nothing and can be
captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from triton.tools.tensor_descriptor import TensorDescriptor

from smbench_kernels import hstu_linear_sm90, hstu_norm
from smbench_kernels.hstu_linear_kernel import linear_persistent, linear_tiled, silu_backward, silu_forward
from smbench_kernels.launch import Call, ceil_div
from smbench_kernels.op import Config

ROUTES = ("library", "persistent", "tiled")
"""`library`: cuBLAS, then an elementwise kernel or after a copy; `persistent`, `tiled`: the kernels of those names."""
SILU_ROUTES: Mapping[int, str] = {90: "persistent"}
RESIDUAL_ROUTES: Mapping[int, str] = {90: "persistent"}
PERSISTENT: Config = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "GROUP": 8, "STAGES": 3, "WARPS": 8}
PERSISTENT_WAVES: tuple[tuple[Config, float], ...] = (
    (PERSISTENT, 16.3),
    ({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP": 8, "STAGES": 4, "WARPS": 8}, 9.1),
    ({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 128, "GROUP": 8, "STAGES": 3, "WARPS": 4}, 5.0),
)
"""Tiles of the persistent kernel, and how many microseconds one takes a multiprocessor of an H200 at a depth of 1024
(kernels/NOTES-hstu-inference.md)."""
TILED: Config = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32, "GROUP": 8, "STAGES": 3, "WARPS": 8}
TMA_ALIGNMENT_BYTES = 16
ELEMENTWISE_BLOCK, ELEMENTWISE_WARPS = 2048, 4
SLOPE_COLUMNS, SLOPE_ROWS, SLOPE_WARPS, SLOPE_STAGES, SLOPE_PROGRAMS_PER_SM = 256, 8, 4, 2, 6


def route(routes: Mapping[int, str], device: torch.device) -> str:
    """The row of a device in a table of routes; under Triton's interpreter the library, which is PyTorch there."""
    if device.type != "cuda":
        return "library"
    return routes.get(hstu_norm.card(device).capability, "library")


def biased(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """`x @ weight + bias`: x [T, in], weight [in, out], bias [out]; contiguous."""
    return torch.addmm(bias, x, weight)


def activated(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, keep_pre: bool, way: str | None = None
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """`silu(x @ weight + bias)`, and before it what SiLU was applied to, if kept: both contiguous, in the dtype of x.

    `way` is one of ROUTES; None: the fastest of the device.
    """
    way = _checked(way or route(SILU_ROUTES, x.device))
    if way == "library" or not describable(x, weight):
        pre = biased(x, weight, bias)
        return (pre, silu(pre)) if keep_pre else (None, silu(pre, out=pre))
    y = x.new_empty((x.shape[0], weight.shape[1]))
    kept = torch.empty_like(y) if keep_pre else None
    _launch_product(x, weight, bias, None, kept, y, True, way)
    return kept, y


def partly_activated(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    first: int,
    way: str | None = None,
    config: Config | None = None,
) -> torch.Tensor:
    """`x @ weight + bias`, SiLU applied to the columns from `first` on; contiguous. `way` as in `activated`.

    For inference: nothing is kept. Without `way` and `config` by the kernel for Hopper where it takes the tensors; that
    one reads weight and bias before the kernel in front has ended. Else few rows get tiles of their own (`for_rows`, or
    `config`).
    """
    if way is None and config is None and hstu_linear_sm90.unsupported(x, weight, bias, None, first) is None:
        return hstu_linear_sm90.partly_activated(x, weight, bias, first)
    way = _checked(way or route(SILU_ROUTES, x.device))
    if way == "library" or not describable(x, weight):
        y = biased(x, weight, bias)
        F.silu(y[:, first:], inplace=True)
        return y
    y = x.new_empty((x.shape[0], weight.shape[1]))
    _launch_product(x, weight, bias, None, None, y, True, way, config or for_rows(x, weight), first)
    return y


def added(
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor,
    way: str | None = None,
    config: Config | None = None,
) -> torch.Tensor:
    """`x @ weight + residual`: residual [T, out], rows of any stride; contiguous. `way` as in `activated`."""
    way = _checked(way or route(RESIDUAL_ROUTES, x.device))
    if way == "library" or not describable(x, weight, residual):
        return torch.addmm(residual, x, weight)
    y = x.new_empty((x.shape[0], weight.shape[1]))
    _launch_product(x, weight, None, residual, None, y, False, way, config or PERSISTENT)
    return y


def completed(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """What `added` returns, for inference: by the kernel for Hopper where it takes the tensors, else by `for_rows`.

    That kernel reads the weight before the kernel in front has ended.
    """
    if hstu_linear_sm90.unsupported(x, weight, None, residual) is None:
        return hstu_linear_sm90.added(x, weight, residual)
    return added(x, weight, residual, config=for_rows(x, weight))


def for_rows(x: torch.Tensor, weight: torch.Tensor) -> Config:
    """The persistent kernel's tiles that take x [T, in] by weight [in, out] through the multiprocessors soonest."""
    return soonest(x.shape[0], weight.shape[1], hstu_norm.card(x.device).sm_count)


def soonest(rows: int, columns: int, sm_count: int) -> Config:
    """Of PERSISTENT_WAVES the tiles with the least time, by how often each multiprocessor has one."""

    def seconds(entry: tuple[Config, float]) -> float:
        config, wave = entry
        return ceil_div(ceil_div(rows, config["BLOCK_M"]) * ceil_div(columns, config["BLOCK_N"]), sm_count) * wave

    return min(PERSISTENT_WAVES, key=seconds)[0]


def describable(*tensors: torch.Tensor) -> bool:
    """Whether the copy engine can read all of these matrices: not empty, rows contiguous and aligned to 16 bytes."""
    return all(
        x.numel() > 0
        and x.stride(1) == 1
        and x.data_ptr() % TMA_ALIGNMENT_BYTES == 0
        and x.stride(0) * x.element_size() % TMA_ALIGNMENT_BYTES == 0
        # an output is contiguous: its rows are as long as the columns
        and x.shape[1] * x.element_size() % TMA_ALIGNMENT_BYTES == 0
        for x in tensors
    )


def _checked(way: str) -> str:
    if way not in ROUTES:
        msg = f"unknown way {way!r} of a linear map; known: {', '.join(ROUTES)}"
        raise ValueError(msg)
    return way


def _launch_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    pre: torch.Tensor | None,
    y: torch.Tensor,
    silu: bool,
    way: str,
    config: Config = PERSISTENT,
    first: int = 0,
) -> None:
    if way == "persistent":
        sm_count = hstu_norm.card(x.device).sm_count
        hstu_norm.launch(persistent_call(x, weight, bias, residual, pre, y, silu, config, sm_count, first))
    else:
        hstu_norm.launch(tiled_call(x, weight, bias, residual, pre, y, silu, TILED, first))


def persistent_call(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    pre: torch.Tensor | None,
    y: torch.Tensor,
    silu: bool,
    config: Config,
    sm_count: int,
    first: int = 0,
) -> Call:
    """The launch of the kernel by descriptors. One program a multiprocessor: its tiles fill the shared memory.

    With `silu`, it is of the columns from `first` on.
    """
    (tokens, depth), columns = x.shape, weight.shape[1]
    block_m, block_n, block_k = config["BLOCK_M"], config["BLOCK_N"], config["BLOCK_K"]
    out = [block_m, block_n // 2]
    arguments = (
        *(_described(x, [block_m, block_k]), _described(weight, [block_k, block_n]), bias),
        *(_described(residual, out), _described(pre, out), _described(y, out), tokens, columns, depth),
        *(block_m, block_n, block_k, config["GROUP"], config["STAGES"]),
        *(bias is not None, residual is not None, silu, pre is not None, first),
    )
    tiles = ceil_div(tokens, block_m) * ceil_div(columns, block_n)
    options = {"num_warps": config["WARPS"], "num_stages": config["STAGES"]}
    return Call(linear_persistent, (max(1, min(tiles, sm_count)), 1, 1), arguments, options)


def tiled_call(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    pre: torch.Tensor | None,
    y: torch.Tensor,
    silu: bool,
    config: Config,
    first: int = 0,
) -> Call:
    """The launch of the kernel by pointers."""
    (tokens, depth), columns = x.shape, weight.shape[1]
    block_m, block_n = config["BLOCK_M"], config["BLOCK_N"]
    strides = (x.stride(0), weight.stride(0), 0 if residual is None else residual.stride(0))
    arguments = (
        *(x, weight, bias, residual, pre, y, tokens, columns, *strides, depth),
        *(block_m, block_n, config["BLOCK_K"], config["GROUP"], config["STAGES"]),
        *(bias is not None, residual is not None, silu, pre is not None, first),
    )
    tiles = ceil_div(tokens, block_m) * ceil_div(columns, block_n)
    options = {"num_warps": config["WARPS"], "num_stages": config["STAGES"]}
    return Call(linear_tiled, (max(1, tiles), 1, 1), arguments, options)


def _described(x: torch.Tensor | None, block: list[int]) -> Any:
    """A tensor descriptor of a matrix, None for None."""
    return None if x is None else TensorDescriptor(x, list(x.shape), list(x.stride()), block)


def silu(pre: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """SiLU of a contiguous tensor, to the bit what the products' epilogue computes; `out` may be `pre`."""
    out = torch.empty_like(pre) if out is None else out
    hstu_norm.launch(silu_call(pre, out))
    return out


def silu_call(pre: torch.Tensor, out: torch.Tensor) -> Call:
    """The launch of `silu`."""
    grid = (max(1, ceil_div(pre.numel(), ELEMENTWISE_BLOCK)), 1, 1)
    arguments = (pre, out, pre.numel(), ELEMENTWISE_BLOCK)
    return Call(silu_forward, grid, arguments, {"num_warps": ELEMENTWISE_WARPS})


def silu_gradients(d: torch.Tensor, pre: torch.Tensor, dbias: torch.Tensor) -> None:
    """d [T, n] (rows of any stride) becomes d * silu'(pre) in place, pre [T, n] contiguous; dbias [n] its sum."""
    partials = torch.empty((slope_splits(d), d.shape[1]), dtype=torch.float32, device=d.device)
    hstu_norm.launch(silu_gradients_call(d, pre, partials))
    hstu_norm.add_partials(partials, dbias)


def silu_gradients_call(d: torch.Tensor, pre: torch.Tensor, partials: torch.Tensor) -> Call:
    """The launch of `silu_gradients`' first stage."""
    tokens, columns = d.shape
    grid = (ceil_div(columns, SLOPE_COLUMNS), partials.shape[0], 1)
    arguments = (d, pre, partials, tokens, d.stride(0), columns, SLOPE_COLUMNS, SLOPE_ROWS, SLOPE_STAGES)
    return Call(silu_backward, grid, arguments, {"num_warps": SLOPE_WARPS})


def slope_splits(d: torch.Tensor) -> int:
    """How many programs share the rows of a block of columns."""
    resident = SLOPE_PROGRAMS_PER_SM * hstu_norm.card(d.device).sm_count // ceil_div(d.shape[1], SLOPE_COLUMNS)
    return max(1, min(ceil_div(d.shape[0], SLOPE_ROWS), resident))
