"""Layer norm, and layer norm times a SiLU gate, forward alone, on Hopper in CUDA C++. Owns device code and launches.

For inference: no statistics are kept and nothing is dropped. A warp has a row in registers, 16 bytes a lane at a time.
Rows are a few microseconds, of which starting is most: a launch starts before the kernel in front has ended, fetches
weight and bias, and waits for it only then (programmatic dependent launch), so that these must not be what that writes.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

import torch

from smbench_kernels import cuda_primitives, hstu_launches, lora_prefill_source, nvrtc, sm90_primitives
from smbench_kernels.hstu_linear_sm90_source import SILU, TANGENT
from smbench_kernels.launch import ceil_div

PIECE, MOST_PIECES = 256, 8
"""Elements that a warp loads at once, 16 bytes a lane; how many of them its registers hold."""
WARPS, WARP, ROW_ALIGNMENT_BYTES = 4, 32, 16
MANY_ROWS = 1024
"""From here on warps are enough for a card, whatever each does."""
NAME, FEATURES = "hstu_rows", "a"

PRIMITIVES = r"""
struct __align__(16) Eight {
    unsigned words[4];
};

/* of parameters, which all warps read: through the L1 */
__device__ inline Eight load_parameters(const element *from)
{
    Eight found;
    asm volatile("ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(found.words[0]), "=r"(found.words[1]), "=r"(found.words[2]), "=r"(found.words[3])
                 : "l"(from));
    return found;
}

/* past the L1: another kernel may have written it while this one already ran */
__device__ inline Eight load_eight(const element *from)
{
    Eight found;
    asm volatile("ld.global.cg.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(found.words[0]), "=r"(found.words[1]), "=r"(found.words[2]), "=r"(found.words[3])
                 : "l"(from)
                 : "memory");
    return found;
}

__device__ inline void store_eight(element *to, const Eight &eight)
{
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(eight.words[0]), "r"(eight.words[1]),
                 "r"(eight.words[2]), "r"(eight.words[3])
                 : "memory");
}

__device__ inline float inverse_root(float x)
{
    float found;
    asm("rsqrt.approx.f32 %0, %1;" : "=f"(found) : "f"(x));
    return found;
}
"""

KERNEL = r"""
/* over a warp, the same in all lanes */
__device__ inline float sum_of_lanes(float value)
{
#pragma unroll
    for (int d = 1; d < WARP; d *= 2)
        value += __shfl_xor_sync(~0u, value, d);
    return value;
}

/* grid (rows / WARPS / EACH), WARPS warps of EACH rows each: y = LayerNorm(x), with GATE times silu(u); rows of
   PIECES * 256 elements */
extern "C" __global__ void __launch_bounds__(WARPS *WARP)
hstu_rows(const element *x, const element *u, const element *weight, const element *bias, element *y,
          long long x_stride, long long u_stride, int rows, float eps)
{
    constexpr int WIDTH = PIECES * WARP * 8;
    const int first_row = (blockIdx.x * WARPS + threadIdx.x / WARP) * EACH, first = threadIdx.x % WARP * 8;
    Eight weights[PIECES], biases[PIECES], loaded[EACH][PIECES], gates[EACH][PIECES];
    let_next_start();
#pragma unroll
    for (int p = 0; p < PIECES; ++p) {
        weights[p] = load_parameters(weight + p * WARP * 8 + first);
        biases[p] = load_parameters(bias + p * WARP * 8 + first);
    }
    /* nothing before this line depends on the kernel in front */
    await_last();
    /* a row past the end is the last one again, and not stored */
#pragma unroll
    for (int r = 0; r < EACH; ++r)
#pragma unroll
        for (int p = 0; p < PIECES; ++p)
            loaded[r][p] = load_eight(x + min(first_row + r, rows - 1) * x_stride + p * WARP * 8 + first);
#if GATE
#pragma unroll
    for (int r = 0; r < EACH; ++r)
#pragma unroll
        for (int p = 0; p < PIECES; ++p)
            gates[r][p] = load_eight(u + min(first_row + r, rows - 1) * u_stride + p * WARP * 8 + first);
#endif
#pragma unroll
    for (int r = 0; r < EACH; ++r) {
        float values[PIECES * 8], total = 0.f, squares = 0.f;
#pragma unroll
        for (int i = 0; i < PIECES * 4; ++i) {
            unpacked(loaded[r][i / 4].words[i % 4], values[2 * i], values[2 * i + 1]);
            total += values[2 * i] + values[2 * i + 1];
        }
        const float mean = sum_of_lanes(total) * (1.f / WIDTH);
#pragma unroll
        for (int i = 0; i < PIECES * 8; ++i) {
            values[i] -= mean;
            squares = fmaf(values[i], values[i], squares);
        }
        const float scale = inverse_root(sum_of_lanes(squares) * (1.f / WIDTH) + eps);
#pragma unroll
        for (int p = 0; p < PIECES; ++p) {
            Eight made;
#pragma unroll
            for (int w = 0; w < 4; ++w) {
                float low, high, weight_low, weight_high;
                unpacked(biases[p].words[w], low, high);
                unpacked(weights[p].words[w], weight_low, weight_high);
                low = fmaf(values[p * 8 + 2 * w] * scale, weight_low, low);
                high = fmaf(values[p * 8 + 2 * w + 1] * scale, weight_high, high);
#if GATE
                float gate_low, gate_high;
                unpacked(gates[r][p].words[w], gate_low, gate_high);
                low *= silu(gate_low);
                high *= silu(gate_high);
#endif
                made.words[w] = packed(low, high);
            }
            if (first_row + r < rows)
                store_eight(y + static_cast<long long>(first_row + r) * WIDTH + p * WARP * 8 + first, made);
        }
    }
}
"""


def unsupported(x: torch.Tensor, u: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor) -> str | None:
    """Why the kernel does not take x, u [T, width] with weight and bias [width]; None where it does."""
    return hstu_launches.missing(x.device) or misfit(x, u, weight, bias)


def misfit(x: torch.Tensor, u: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor) -> str | None:
    """What of `unsupported` does not depend on the machine."""
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"takes bfloat16 and float16, not {x.dtype}"
    if x.shape[1] % PIECE or not 0 < x.shape[1] <= PIECE * MOST_PIECES:
        return f"takes rows of a multiple of {PIECE} elements up to {PIECE * MOST_PIECES}, not {x.shape[1]}"
    for name, tensor in (("x", x), ("u", u), ("weight", weight), ("bias", bias)):
        if tensor is not None and (
            tensor.stride(-1) != 1
            or (tensor.stride(0) * tensor.element_size() % ROW_ALIGNMENT_BYTES and tensor.dim() > 1)
            or tensor.data_ptr() % ROW_ALIGNMENT_BYTES
        ):
            return f"{name} needs rows of adjacent elements at multiples of 16 bytes, not strides {tensor.stride()}"
    return None


def forward(
    x: torch.Tensor, u: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    """LayerNorm of x [T, width], rows of any stride, times silu(u) where there is u [T, width]; contiguous."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel():
        key = (NAME, x.dtype, eps, *map(hstu_launches.place, (x, u, weight, bias, y)))
        hstu_launches.run(key, lambda: _launch(x, u, weight, bias, y, eps))
    return y


def rows_of_warp(rows: int, width: int) -> int:
    """As many as its registers hold, where there are enough rows: those of a warp share what it loads of parameters."""
    return 2 if rows >= MANY_ROWS and width <= PIECE * MOST_PIECES // 2 else 1


def macros(width: int, gate: bool, dtype: torch.dtype, rows: int = 1) -> dict[str, int]:
    """What the kernel is compiled with, for so many rows of a warp."""
    return {
        **{"PIECES": width // PIECE, "WARPS": WARPS, "GATE": int(gate), "EACH": rows},
        "BFLOAT16": int(dtype == torch.bfloat16),
    }


def arguments(
    x: torch.Tensor, u: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor, y: torch.Tensor, eps: float
) -> list[Any]:
    """What a launch passes: addresses alone, which keep no tensor alive."""
    addresses = (ctypes.c_uint64(0 if t is None else t.data_ptr()) for t in (x, u, weight, bias, y))
    strides = (ctypes.c_int64(0 if t is None else t.stride(0)) for t in (x, u))
    return [*addresses, *strides, x.shape[0], float(eps)]


def grid(rows: int, of_warp: int = 1) -> tuple[int, int, int]:
    """Thread blocks of a launch."""
    return ceil_div(rows, WARPS * of_warp), 1, 1


def source() -> str:
    """The whole CUDA C++."""
    shared = cuda_primitives.SOURCE + sm90_primitives.SOURCE + lora_prefill_source.PRIMITIVES
    return shared + TANGENT + PRIMITIVES + SILU + KERNEL


def _launch(
    x: torch.Tensor, u: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor, y: torch.Tensor, eps: float
) -> hstu_launches.Launch:
    of_warp = rows_of_warp(*x.shape)
    kernel = _loaded(x.shape[1], u is not None, x.dtype, of_warp, x.device)
    made: hstu_launches.Launch = kernel.launcher(
        grid(x.shape[0], of_warp), WARPS * WARP, 0, arguments(x, u, weight, bias, y, eps), dependent=True
    )
    return made


@lru_cache(maxsize=32)
def _loaded(width: int, gate: bool, dtype: torch.dtype, of_warp: int, device: torch.device) -> nvrtc.Kernel:
    return nvrtc.kernel(source(), NAME, macros(width, gate, dtype, of_warp), device, FEATURES)
