"""HSTU attention, forward and backward: the entry that everybody calls. Owns checks and the choice of a kernel.

out = (silu(alpha q k^T) / max_seqlen, masked) v for each head of each sequence of a jagged batch (`hstu`). Products are
of bfloat16 or float16 with float32 sums, each sum by one program in one order: no atomics, the same bits on every run.
Nothing waits for the device and what is allocated follows from shapes, so that calls fit into a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from types import ModuleType

import torch

from smbench_kernels import hstu_attention_configs as configurations
from smbench_kernels import hstu_attention_triton as launches
from smbench_kernels.hstu import Jagged
from smbench_kernels.launch import Call
from smbench_kernels.op import Config

DTYPES = (torch.bfloat16, torch.float16)
LARGEST_HEAD = 256
INTERPRETED_CAPABILITY = 80
"""What a processor's interpreter stands in for: its tiles are small."""


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    batch: Jagged,
    alpha: float,
    out: torch.Tensor | None = None,
    config: Config | None = None,
) -> torch.Tensor:
    """The attention's output [T, H, D] in the dtype of q, into `out` if given, by the fastest kernel at hand.

    q, k, v, out: [T, H, D], the last axis contiguous, any other strides; bfloat16 or float16, all alike; D from 1 to
    256. Rows of no sequence keep what they held. No sequence may be longer than `batch.max_seqlen`. `config` is one of
    `hstu_attention_configs` and asks for the portable kernel. ValueError where a tensor is not as stated.
    """
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    hopper = specialized({"q": q, "k": k, "v": v, "out": out}, batch, alpha) if config is None else None
    if hopper is not None:
        hopper.forward(q, k, v, batch, alpha, out)
        return out
    return portable_forward(q, k, v, batch, alpha, out, config)


def backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    batch: Jagged,
    alpha: float,
    dq: torch.Tensor | None = None,
    dk: torch.Tensor | None = None,
    dv: torch.Tensor | None = None,
    config: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients (dq, dk, dv), each into the tensor given or a new one, as `forward` does for `out`.

    Allocates a workspace that follows from `max_seqlen`, the number of sequences and the heads.
    """
    dq, dk, dv = allocated((dq, q), (dk, k), (dv, v))
    dout = readable(dout)
    tensors = {"q": q, "k": k, "v": v, "dout": dout, "dq": dq, "dk": dk, "dv": dv}
    hopper = specialized(tensors, batch, alpha) if config is None else None
    if hopper is not None:
        hopper.backward(dout, q, k, v, batch, alpha, dq, dk, dv)
        return dq, dk, dv
    return portable_backward(dout, q, k, v, batch, alpha, dq, dk, dv, config)


def portable_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    batch: Jagged,
    alpha: float,
    out: torch.Tensor | None = None,
    config: Config | None = None,
) -> torch.Tensor:
    """`forward` in Triton, on every architecture and under the interpreter."""
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    check({"q": q, "k": k, "v": v, "out": out}, batch)
    if q.shape[0] > 0:
        problem = launches.Problem(batch, q.shape[1], q.shape[2], alpha)
        chosen = config or configurations.default_forward(capability(q.device), q.shape[2])
        launch(launches.forward_call(problem, q, k, v, out, chosen))
    return out


def portable_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    batch: Jagged,
    alpha: float,
    dq: torch.Tensor | None = None,
    dk: torch.Tensor | None = None,
    dv: torch.Tensor | None = None,
    config: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`backward` in Triton, on every architecture and under the interpreter.

    The workspace is at most `hstu_attention_triton.KEPT_BYTES`. A configuration that keeps dS raises ValueError where
    one (sequence, head) needs more; the default makes it twice then.
    """
    dq, dk, dv = allocated((dq, q), (dk, k), (dv, v))
    dout = readable(dout)
    check({"q": q, "k": k, "v": v, "dout": dout, "dq": dq, "dk": dk, "dv": dv}, batch)
    if q.shape[0] > 0:
        problem = launches.Problem(batch, q.shape[1], q.shape[2], alpha)
        fits = launches.turn(problem, q.element_size()) > 0
        chosen = config or configurations.default_backward(capability(q.device), q.shape[2], fits)
        kept = launches.workspace(problem, q) if chosen["KEPT"] == configurations.KEPT else None
        for call in launches.backward_calls(problem, dout, q, k, v, dq, dk, dv, kept, chosen):
            launch(call)
    return dq, dk, dv


def specialized(tensors: Mapping[str, torch.Tensor], batch: Jagged, alpha: float) -> ModuleType | None:
    """The CUDA C++ kernels where they take these tensors, else None: faster at every length measured on an H200."""
    if not tensors["q"].is_cuda or alpha <= 0:
        return None
    from smbench_kernels import hstu_attention_sm90

    if any(hstu_attention_sm90.supports(x, batch) is not None for x in tensors.values()):
        return None
    check(tensors, batch)
    return hstu_attention_sm90


def allocated(*pairs: tuple[torch.Tensor | None, torch.Tensor]) -> Iterator[torch.Tensor]:
    """The first of each pair, or a new tensor like the second."""
    for given, like in pairs:
        yield torch.empty(like.shape, dtype=like.dtype, device=like.device) if given is None else given


def readable(dout: torch.Tensor) -> torch.Tensor:
    """An output gradient that kernels can read: autograd hands over expanded ones."""
    return dout if dout.stride(-1) == 1 and min(dout.stride()) > 0 else dout.contiguous()


def launch(call: Call) -> None:
    """Enqueue on the current stream."""
    call.kernel[call.grid](*call.arguments, **call.options)


def check(tensors: Mapping[str, torch.Tensor], batch: Jagged) -> None:
    """ValueError, naming the tensor, where shapes, dtypes, devices or strides are not as `forward` states."""
    q = tensors["q"]
    if q.dim() != 3 or not 1 <= q.shape[2] <= LARGEST_HEAD:
        raise ValueError(
            f"q has shape {tuple(q.shape)}; expected [tokens, heads, head_dim], head_dim 1 to {LARGEST_HEAD}"
        )
    if q.dtype not in DTYPES:
        raise ValueError(f"q is {q.dtype}; expected one of {', '.join(map(str, DTYPES))}")
    for name, x in tensors.items():
        if x.shape != q.shape or x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name} is {tuple(x.shape)} {x.dtype} on {x.device}; q is {tuple(q.shape)} {q.dtype} on {q.device}"
            )
        if x.numel() > 0 and x.stride(2) != 1:
            raise ValueError(f"{name} has strides {x.stride()}; the last axis must be contiguous")
        # offsets within a sequence are 32-bit
        if batch.max_seqlen * x.stride(0) >= 2**31:
            raise ValueError(f"{name}: {batch.max_seqlen} rows with stride {x.stride(0)} are beyond 2**31 elements")
    if q.shape[0] > 0 and batch.max_seqlen < 1:
        raise ValueError(f"max_seqlen is {batch.max_seqlen}, with {q.shape[0]} tokens")


@lru_cache(maxsize=64)
def capability(device: torch.device) -> int:
    """Compute capability of a CUDA device, 90 for sm_90."""
    if device.type != "cuda":
        return INTERPRETED_CAPABILITY
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor
