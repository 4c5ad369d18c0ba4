"""Keys and values of users on the host, in chunks of whole pages: the interface of a store, and one in pinned memory.

Owns host memory and what lies where in it. Does not own copies, streams or the device's pages (`kv_cache`). Another
backend (a database, a remote cache) is another class with the names of `HostStore`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from smbench_kernels.kv_pages import CacheFull, Hold, Pages, PageTable


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of a cache, the same on device and host."""

    layers: int
    heads: int
    head_dim: int
    page_size: int
    """Tokens of a page."""
    dtype: torch.dtype

    @property
    def page_shape(self) -> tuple[int, int, int, int]:
        """Of one page of one layer: keys and values, token, head, element (the layout that kernels call NHD)."""
        return (2, self.page_size, self.heads, self.head_dim)

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token in all layers."""
        return self.layers * 2 * self.heads * self.head_dim * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Lease:
    """Chunks of a user that stay where they are until the lease is given back."""

    user: int
    first: int
    """Index of the first of them among the user's chunks."""
    addresses: npt.NDArray[np.int64]
    """Where each begins: [layers, pages of a chunk, 2, page_size, heads, head_dim], contiguous, at a multiple of 16
    bytes, in memory that the device reads and writes under the same address."""
    holds: Sequence[Hold] = ()


class HostStore(Protocol):
    """What holds the chunks of users that a device has no room for."""

    chunk_tokens: int
    """Tokens of a chunk, whole pages."""

    def tokens(self, user: int) -> int:
        """Tokens of a user that are stored, from the first on: a multiple of `chunk_tokens`."""

    def room(self, user: int, chunks: int) -> Lease | None:
        """Memory for that many further chunks of a user, to be written before the lease is given back.

        None where the store has no room for them; it may drop other users that no lease protects.
        """

    def read(self, user: int) -> Lease:
        """All chunks of a user. KeyError for one that is not stored."""

    def give_back(self, lease: Lease) -> None:
        """The chunks were read, or written."""

    def truncate(self, user: int, tokens: int) -> None:
        """Forget a user's chunks beyond so many tokens, a multiple of `chunk_tokens`; all of them for 0."""


BLOCK_BYTES = 256 << 20
"""Most bytes locked at once. PyTorch rounds each block up to a power of two, and keeps it for the next store."""


class PinnedStore:
    """A store in page-locked host memory, so that copies to and from a device run beside everything else.

    `capacity` chunks, allocated from the beginning; who was used longest ago is dropped first.
    """

    def __init__(self, sizes: Sizes, capacity: int, chunk_tokens: int, pinned: bool) -> None:
        if chunk_tokens % sizes.page_size:
            raise ValueError(f"a chunk of {chunk_tokens} tokens is no whole number of pages of {sizes.page_size}")
        self.chunk_tokens = chunk_tokens
        self._table = PageTable(capacity, chunk_tokens)
        chunk_bytes = chunk_tokens * sizes.token_bytes
        each = max(1, BLOCK_BYTES // chunk_bytes)
        counts = [min(each, capacity - first) for first in range(0, capacity, each)]
        self._blocks = [torch.empty(count * chunk_bytes, dtype=torch.uint8, pin_memory=pinned) for count in counts]
        self._begins = np.concatenate(
            [
                block.data_ptr() + np.arange(count, dtype=np.int64) * chunk_bytes
                for block, count in zip(self._blocks, counts, strict=True)
            ]
        )

    @property
    def users(self) -> int:
        """Users that have something stored."""
        return len(self._table)

    def tokens(self, user: int) -> int:
        """As `HostStore`."""
        return self._table.tokens(user)

    def room(self, user: int, chunks: int) -> Lease | None:
        """As `HostStore`."""
        stored = self._table.tokens(user)
        try:
            growth = self._table.grow([user], [stored + chunks * self.chunk_tokens])
        except CacheFull:
            return None
        first = stored // self.chunk_tokens
        return self._lease(user, first, growth.pages[0][first:])

    def read(self, user: int) -> Lease:
        """As `HostStore`."""
        if user not in self._table:
            raise KeyError(f"user {user} has nothing stored")
        # reading is using
        return self._lease(user, 0, self._table.touch(user))

    def give_back(self, lease: Lease) -> None:
        """As `HostStore`."""
        for hold in lease.holds:
            self._table.release(hold)

    def truncate(self, user: int, tokens: int) -> None:
        """As `HostStore`. ValueError while a lease protects what is to be forgotten."""
        if user in self._table:
            self._table.truncate(user, tokens)
            if not tokens:
                self._table.evict(user)

    def _lease(self, user: int, first: int, chunks: Pages) -> Lease:
        return Lease(user, first, self._begins[chunks], [self._table.hold(user)])
