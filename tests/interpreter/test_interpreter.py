"""The interpreter treats bfloat16 as a GPU does."""

from __future__ import annotations

import torch
import triton.language as tl

from smbench_kernels.launch import jit


@jit()
def _multiply(a_ptr: tl.tensor, b_ptr: tl.tensor, y_ptr: tl.tensor, SIZE: tl.constexpr) -> None:
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(y_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at)))


@jit()
def _narrow(x_ptr: tl.tensor, y_ptr: tl.tensor, SIZE: tl.constexpr) -> None:
    at = tl.arange(0, SIZE)
    tl.store(y_ptr + at, tl.load(x_ptr + at).to(tl.bfloat16))


@jit()
def _count(y_ptr: tl.tensor, first: tl.tensor, step: tl.tensor) -> None:
    for at in range(tl.program_id(0) + first, 10, step):
        tl.store(y_ptr + at, 1)


def test_products_of_bfloat16_multiply_values() -> None:
    a, b = (torch.randn(16, 16).to(torch.bfloat16) for _ in range(2))
    y = torch.empty(16, 16)
    _multiply[(1,)](a, b, y, 16)
    torch.testing.assert_close(y, a.float() @ b.float())


def test_bfloat16_is_rounded_to_nearest() -> None:
    """The first values lie halfway between two neighbours, above and below an even one."""
    x = torch.cat([torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, float("nan"), float("inf"), -0.0]), torch.randn(123)])
    y = torch.empty(128, dtype=torch.bfloat16)
    _narrow[(1,)](x, y, 128)
    torch.testing.assert_close(y, x.to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)


def test_a_loop_may_run_over_values_that_the_kernel_computes() -> None:
    y = torch.zeros(10, dtype=torch.int32)
    _count[(1,)](y, 1, 3)
    assert y.tolist() == [0, 1, 0, 0, 1, 0, 0, 1, 0, 0]
