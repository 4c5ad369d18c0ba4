"""A point of any LoRA operation as the shape of a launch, for the spaces of other projects' kernels. Owns no kernel."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from smbench_kernels.launch import ceil_div, next_power_of_two
from smbench_kernels.lora import Sizes
from smbench_kernels.lora_linear import LinearSizes
from smbench_kernels.op import Point

MANY = 1024
"""From so many tokens on a batch counts as prefill: the field switches between 256 and 2048."""
SHARED_BYTES = 200 * 1024
"""Shared memory beyond which a configuration is not worth a compilation. The most that any supported card has is 227
KiB; what does not launch on smaller ones, the tuner sees."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What a shrink or an expand works on."""

    tokens: int
    hidden: int
    """Input of the shrink."""
    outputs: tuple[int, ...]
    """Outputs of the expand, of each slice."""
    rank: int
    loras: int
    dtype: torch.dtype
    used: int
    """LoRAs that are present."""

    @classmethod
    def of(cls, point: Point) -> Shape:
        """The shape of a point of `bgmv`, `sgmv` or `lora_linear`."""
        if "projection" in point:
            linear = LinearSizes.of(point)
            used = min(linear.loras, len(linear.lengths))
            return cls(linear.tokens, linear.hidden, linear.outputs, linear.rank, linear.loras, linear.dtype, used)
        sizes = Sizes.of(point)
        # an index is a token's in bgmv, a sequence's in sgmv
        used = min(sizes.loras, sizes.batch)
        return cls(sizes.tokens, sizes.hidden, (sizes.hidden,), sizes.rank, sizes.loras, sizes.dtype, used)

    @property
    def slices(self) -> int:
        return len(self.outputs)

    @property
    def padded_rank(self) -> int:
        """The least power of two from 16 on that holds the rank: a tensor core takes no less."""
        return max(16, next_power_of_two(self.rank))

    def groups(self, rows: int) -> int:
        """Blocks of at most so many tokens of one LoRA, were the tokens spread evenly."""
        return self.used * ceil_div(ceil_div(self.tokens, self.used), rows)
