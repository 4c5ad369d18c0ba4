"""Numbers from a seed that are equal, bit by bit, on every device and under every torch.

torch's own generators differ between CPU and CUDA and may differ between releases, so a checkpoint drawn with them
would be another one on another machine. Here a number is a hash of its place, computed in integers. Owns the draws;
does not own what they become.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

LARGEST = 510
"""The sum of four bytes is this much above or below its mean at most."""
SPREAD = 147.79715829473807
"""Standard deviation of the sum of four independent uniform bytes: sqrt(4 * (256**2 - 1) / 12)."""


def bell(seed: int, name: str, places: range, device: torch.device) -> Tensor:
    """The numbers of some places in the sequence of a seed and a name, int32 [len(places)]; places are below 2**31.

    From -510 to 510, near to a normal distribution of deviation SPREAD: the four bytes of a hash, added up.
    """
    words = _hash(torch.arange(places.start, places.stop, dtype=torch.int32, device=device), _key(seed, name))
    total = words & 0xFF
    for shift in (8, 16, 24):
        total += (words >> shift) & 0xFF
    return total.sub_(LARGEST)


def _key(seed: int, name: str) -> tuple[int, int]:
    """Two signed 32-bit numbers that stand for seed and name."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:4], "little", signed=True), int.from_bytes(digest[4:8], "little", signed=True)


def _hash(places: Tensor, key: tuple[int, int]) -> Tensor:
    """A 32-bit hash of each place: Wellons' lowbias32, once for each half of the key. Works in the tensor itself."""
    for part in key:
        places.bitwise_xor_(part)
        # int32 multiplication wraps, and `>>` copies the sign, which the masks remove
        places.bitwise_xor_((places >> 16) & 0xFFFF).mul_(0x7FEB352D)
        places.bitwise_xor_((places >> 15) & 0x1FFFF).mul_(0x846CA68B - 2**32)
        places.bitwise_xor_((places >> 16) & 0xFFFF)
    return places
