"""Which pages of a cache belong to which user: growth, lookup, eviction of the oldest, exact accounting.

Owns numbers only: page ids, token counts, an order of use. Does not own memory, transfers or streams. The same table
serves pages on a device and chunks on a host. Tables keyed by user instead of by token prefix are what recommendation
inference needs, since a user's history only ever grows (NVIDIA recsys-examples, `HSTUGpuKVCacheManager`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Pages = npt.NDArray[np.int32]


class CacheFull(Exception):
    """The users of a step need more pages than can be freed. The message has the arithmetic; nothing was changed."""


@dataclass(slots=True)
class _Entry:
    """What a user has. `pages` has room to grow; the first `count` of it are the user's."""

    tokens: int = 0
    count: int = 0
    pages: Pages = field(default_factory=lambda: np.empty(8, np.int32))
    holds: int = 0
    evicted: bool = False


@dataclass(slots=True, eq=False)
class Hold:
    """A claim on a user's pages, by a step or a transfer: until it is released they go to nobody else."""

    user: int
    _entry: _Entry


class Placement(NamedTuple):
    """Where a user's tokens are, once a step has grown it."""

    user: int
    cached: int
    """Tokens that the user had before."""
    total: int
    """Tokens that the user has now."""
    pages: Pages
    """Ids of the pages of all these tokens, in order: token t is row t % page_size of pages[t // page_size]."""


class Growth(NamedTuple):
    """What a step did to the table."""

    placements: Sequence[Placement]
    evicted: Sequence[int]
    """Users that lost their pages for it, the oldest first."""


class PageTable:
    """Pages 0 … pages - 1, each of `page_size` tokens, shared out among users; who was used longest ago goes first."""

    def __init__(self, pages: int, page_size: int) -> None:
        if pages < 1 or page_size < 1:
            raise ValueError(f"a table of {pages} pages of {page_size} tokens holds nothing")
        self.pages, self.page_size = pages, page_size
        self._users: OrderedDict[int, _Entry] = OrderedDict()
        # a stack: what was freed last is handed out first, and may still lie in a cache
        self._free: Pages = np.arange(pages - 1, -1, -1, dtype=np.int32)
        self._free_count = pages
        self._leaving_count = 0

    def __len__(self) -> int:
        return len(self._users)

    def __contains__(self, user: int) -> bool:
        return user in self._users

    def __iter__(self) -> Iterator[int]:
        """Users, the one used longest ago first."""
        return iter(self._users)

    @property
    def free_pages(self) -> int:
        """Pages of nobody."""
        return self._free_count

    @property
    def leaving_pages(self) -> int:
        """Pages of evicted users that a hold still claims."""
        return self._leaving_count

    def tokens(self, user: int) -> int:
        """Tokens that a user has here; 0 for one that is not here."""
        entry = self._users.get(user)
        return entry.tokens if entry else 0

    def pages_of(self, user: int) -> Pages:
        """Ids of a user's pages in order, a copy. KeyError for one that is not here."""
        entry = self._users[user]
        return entry.pages[: entry.count].copy()

    def grow(self, users: Sequence[int], totals: Sequence[int]) -> Growth:
        """Give each user pages for `totals` tokens and make them the last used, in this order.

        Where pages are short, others are evicted, the one used longest ago first, but none that is held and none of
        this step. CacheFull where that does not suffice; ValueError for a user twice and for fewer tokens than a user
        has. Either leaves the table as it was.
        """
        needed = self._needed(users, totals)
        victims = self._victims(sum(needed) - self._free_count, users)
        for victim in victims:
            self.evict(victim)
        known = self._users
        placements = []
        for user, total, count in zip(users, totals, needed, strict=True):
            entry = known.get(user)
            if entry is None:
                entry = known[user] = _Entry()
            else:
                known.move_to_end(user)
            cached = entry.tokens
            if count:
                self._give(entry, count)
            entry.tokens = total
            placements.append(Placement(user, cached, total, entry.pages[: entry.count]))
        return Growth(placements, victims)

    def evict(self, user: int) -> None:
        """Take a user's pages back: at once, or when its last hold is released. KeyError for one that is not here."""
        entry = self._users.pop(user)
        entry.evicted = True
        if entry.holds:
            self._leaving_count += entry.count
        else:
            self._take(entry)

    def truncate(self, user: int, tokens: int) -> None:
        """Forget a user's last tokens and take the pages back that only they filled.

        For steps that came to nothing: grown again at once, it gets the same pages. KeyError for one that is not here;
        ValueError for more tokens than there are, and where a hold still claims the pages.
        """
        entry = self._users[user]
        kept = self._pages_for(tokens)
        if tokens > entry.tokens:
            raise ValueError(f"user {user} has {entry.tokens} tokens, not {tokens}")
        if entry.holds and kept < entry.count:
            raise ValueError(f"pages of user {user} are held: nothing of them can be forgotten")
        dropped = entry.count - kept
        self._free[self._free_count : self._free_count + dropped] = entry.pages[kept : entry.count]
        self._free_count += dropped
        entry.count, entry.tokens = kept, tokens

    def hold(self, user: int) -> Hold:
        """Claim a user's pages until `release`. KeyError for one that is not here."""
        entry = self._users[user]
        entry.holds += 1
        return Hold(user, entry)

    def release(self, hold: Hold) -> None:
        """Give a claim back. ValueError for one that was given back before."""
        entry = hold._entry
        if entry.holds < 1:
            raise ValueError(f"the hold on user {hold.user} was released before")
        entry.holds -= 1
        if entry.evicted and not entry.holds:
            self._leaving_count -= entry.count
            self._take(entry)

    def _needed(self, users: Sequence[int], totals: Sequence[int]) -> list[int]:
        """How many pages each user of a step lacks. ValueError as `grow`."""
        if len(set(users)) != len(users):
            raise ValueError(f"a user appears twice in one step: {list(users)}")
        known, size = self._users, self.page_size
        needed = []
        for user, total in zip(users, totals, strict=True):
            entry = known.get(user)
            tokens, count = (entry.tokens, entry.count) if entry is not None else (0, 0)
            if total < tokens:
                raise ValueError(f"user {user} has {tokens} tokens and cannot shrink to {total}")
            needed.append(-(-total // size) - count)
        return needed

    def _victims(self, short: int, kept: Collection[int]) -> list[int]:
        """Users to evict for `short` more pages, the oldest first; empty where none are short."""
        victims: list[int] = []
        found = 0
        if short > 0:
            for user, entry in self._users.items():
                if user in kept or entry.holds or not entry.count:
                    continue
                victims.append(user)
                found += entry.count
                if found >= short:
                    return victims
            raise CacheFull(
                f"{short} pages of {self.page_size} tokens are missing beyond the {self._free_count} free of "
                f"{self.pages}; evicting every user that no step or transfer holds would free {found}"
            )
        return victims

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def _give(self, entry: _Entry, count: int) -> None:
        wanted = entry.count + count
        if wanted > len(entry.pages):
            larger = np.empty(max(wanted, 2 * len(entry.pages)), np.int32)
            larger[: entry.count] = entry.pages[: entry.count]
            entry.pages = larger
        left = self._free_count - count
        entry.pages[entry.count : wanted] = self._free[left : self._free_count]
        entry.count, self._free_count = wanted, left

    def _take(self, entry: _Entry) -> None:
        self._free[self._free_count : self._free_count + entry.count] = entry.pages[: entry.count]
        self._free_count += entry.count
        entry.count = 0
