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

    def append(self, more: Pages) -> None:
        """Add pages at the end."""
        wanted = self.count + len(more)
        if wanted > len(self.pages):
            larger = np.empty(1 << (wanted - 1).bit_length(), np.int32)
            larger[: self.count] = self.pages[: self.count]
            self.pages = larger
        self.pages[self.count : wanted] = more
        self.count = wanted


@dataclass(slots=True, eq=False)
class Hold:
    """A claim on users' pages, by a step or a transfer: until it is released they go to nobody else."""

    users: Sequence[int]
    _entries: Sequence[_Entry]
    _held: bool = True


class Growth(NamedTuple):
    """What a step did to the table, user by user in the step's order."""

    cached: Sequence[int]
    """Tokens that each user had before."""
    pages: Sequence[Pages]
    """Ids of the pages of all tokens that each user has now: token t is row t % page_size of pages[t // page_size]."""
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
        this step. Pages that come together have neighbouring ids where the free ones do. CacheFull where evicting does
        not suffice; ValueError for a user twice and for fewer tokens than a user has. Either leaves the table as it
        was.
        """
        entries, cached, needed = self._needed(users, totals)
        victims = self._victims(sum(needed) - self._free_count, users)
        for victim in victims:
            self.evict(victim)
        known, pages = self._users, []
        left = self._free_count - sum(needed)
        # from the top of the stack down: ids that were freed together, and those never used, rise
        given, at = self._free[left : self._free_count][::-1], 0
        self._free_count = left
        for user, total, entry, count in zip(users, totals, entries, needed, strict=True):
            if entry is None:
                entry = known[user] = _Entry()
            else:
                known.move_to_end(user)
            if count:
                entry.append(given[at : at + count])
                at += count
            entry.tokens = total
            pages.append(entry.pages[: entry.count])
        return Growth(cached, pages, victims)

    def touch(self, user: int) -> Pages:
        """Make a user the last used; ids of its pages in order. KeyError for one that is not here."""
        self._users.move_to_end(user)
        entry = self._users[user]
        return entry.pages[: entry.count]

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
        self._put_back(entry.pages[kept : entry.count])
        entry.count, entry.tokens = kept, tokens

    def hold(self, *users: int) -> Hold:
        """Claim users' pages until `release`. KeyError for one that is not here."""
        entries = [self._users[user] for user in users]
        for entry in entries:
            entry.holds += 1
        return Hold(users, entries)

    def release(self, hold: Hold) -> None:
        """Give a claim back. ValueError for one that was given back before."""
        if not hold._held:
            raise ValueError(f"the hold on users {list(hold.users)} was released before")
        hold._held = False
        for entry in hold._entries:
            entry.holds -= 1
            if entry.evicted and not entry.holds:
                self._leaving_count -= entry.count
                self._take(entry)

    def _needed(self, users: Sequence[int], totals: Sequence[int]) -> tuple[list[_Entry | None], list[int], list[int]]:
        """Of each user of a step its entry, the tokens that it has, how many pages it lacks. ValueError as `grow`."""
        if len(set(users)) != len(users):
            raise ValueError(f"a user appears twice in one step: {list(users)}")
        entries, size = list(map(self._users.get, users)), self.page_size
        cached, needed = [], []
        for user, total, entry in zip(users, totals, entries, strict=True):
            tokens, count = (entry.tokens, entry.count) if entry is not None else (0, 0)
            if total < tokens:
                raise ValueError(f"user {user} has {tokens} tokens and cannot shrink to {total}")
            cached.append(tokens)
            needed.append(-(-total // size) - count)
        return entries, cached, needed

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

    def _take(self, entry: _Entry) -> None:
        self._put_back(entry.pages[: entry.count])
        entry.count = 0

    def _put_back(self, pages: Pages) -> None:
        """Onto the stack so that they are handed out again in the order that they had."""
        end = self._free_count + len(pages)
        self._free[self._free_count : end] = pages[::-1]
        self._free_count = end
