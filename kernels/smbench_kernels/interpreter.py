"""Remedies for Triton's interpreter (TRITON_INTERPRET=1), where kernels are verified without a GPU. Owns nothing else.

- A product of bfloat16 tiles multiplies the integers that hold the bits: widen both sides to float32 first.
- float32 becomes bfloat16 by dropping bits, and zero becomes a tiny number: round to nearest, ties to even, as the
  hardware does.
- With Triton 3.6 and NumPy 2.4 or later, `range` over a tensor fails: a tensor of one element must act as an integer.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter as interpreted


def active() -> bool:
    """Whether kernels of this process are interpreted."""
    return bool(triton.knobs.runtime.interpret)


def apply() -> None:
    """Install the remedies in this process. A second call changes nothing."""
    builder: Any = interpreted.InterpreterBuilder
    if getattr(builder, "remedied", False):
        return
    plain_dot, plain_cast, patch_tensor = builder.create_dot, builder.cast_impl, interpreted._patch_lang_tensor

    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        return plain_dot(self, widened(a), widened(b), d, input_precision, max_num_imprecise_acc)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        types = (source.dtype.scalar, target.scalar)
        if types == (tl.float32, tl.bfloat16):
            return rounded(source)
        return widened(source) if types == (tl.bfloat16, tl.float32) else plain_cast(self, source, target)

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    builder.create_dot = create_dot
    builder.cast_impl = cast_impl
    builder.remedied = True
    interpreted._patch_lang_tensor = patch_lang_tensor


def widened(handle: Any) -> Any:
    """A bfloat16 tile as float32; any other tile as it is. bfloat16 is the upper half of a float32."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    bits = handle.data.astype(np.uint32) << np.uint32(16)
    return interpreted.TensorHandle(bits.view(np.float32), tl.float32)


def rounded(handle: Any) -> Any:
    """A float32 tile as bfloat16, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(handle.data).view(np.uint32)
    nearest = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    # adding to a NaN's bits could make it a number: keep its sign and make it quiet
    kept = np.where(np.isnan(handle.data), bits | np.uint32(0x400000), nearest)
    return interpreted.TensorHandle((kept >> np.uint32(16)).astype(np.uint16), tl.bfloat16)
