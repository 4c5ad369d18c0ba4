"""Remedies for Triton's interpreter (TRITON_INTERPRET=1), where kernels are verified without a GPU. Owns nothing else.

- A product of bfloat16 tiles multiplies the integers that hold the bits: widen both sides to float32 first.
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
    if getattr(builder.create_dot, "widens_bfloat16", False):
        return
    narrow_dot = builder.create_dot
    patch_tensor = interpreted._patch_lang_tensor

    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        return narrow_dot(self, widened(a), widened(b), d, input_precision, max_num_imprecise_acc)

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    vars(create_dot)["widens_bfloat16"] = True
    builder.create_dot = create_dot
    interpreted._patch_lang_tensor = patch_lang_tensor


def widened(handle: Any) -> Any:
    """A bfloat16 tile as float32; any other tile as it is. bfloat16 is the upper half of a float32."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    bits = handle.data.astype(np.uint32) << np.uint32(16)
    return interpreted.TensorHandle(bits.view(np.float32), tl.float32)
