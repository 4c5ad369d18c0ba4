"""The page table under any sequence of operations: no page is leaked, shared or lost, and the oldest go first."""

from __future__ import annotations

import time

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from smbench_kernels.kv_pages import CacheFull, Hold, PageTable

PAGES, PAGE_SIZE = 12, 4
USERS = st.integers(0, 7)


class Accounting(RuleBasedStateMachine):
    """PageTable against a plain model: a dictionary of users to tokens in order of use, and lists of holds."""

    holds = Bundle("holds")

    def __init__(self) -> None:
        super().__init__()
        self.table = PageTable(PAGES, PAGE_SIZE)
        self.tokens: dict[int, int] = {}
        self.pages: dict[int, list[int]] = {}
        # every hold that is not given back, with the pages that its user had when it was evicted
        self.held: dict[int, list[Hold]] = {}
        self.leaving: list[tuple[list[Hold], list[int]]] = []

    def needs(self, user: int, total: int) -> int:
        return -(-total // PAGE_SIZE) - len(self.pages.get(user, []))

    def forget(self, user: int) -> None:
        del self.tokens[user]
        pages = self.pages.pop(user)
        if self.held.get(user):
            self.leaving.append((self.held.pop(user), pages))

    @rule(steps=st.lists(st.tuples(USERS, st.integers(0, 20)), min_size=1, max_size=4, unique_by=lambda step: step[0]))
    def grow(self, steps: list[tuple[int, int]]) -> None:
        users = [user for user, _ in steps]
        totals = [self.tokens.get(user, 0) + more for user, more in steps]
        free = PAGES - sum(map(len, self.pages.values())) - sum(len(pages) for _, pages in self.leaving)
        short = sum(self.needs(*step) for step in zip(users, totals, strict=True)) - free
        expected = []
        for user in list(self.tokens):
            if short > 0 and user not in users and not self.held.get(user) and self.pages[user]:
                expected.append(user)
                short -= len(self.pages[user])
        if short > 0:
            with pytest.raises(CacheFull, match="pages of 4 tokens are missing"):
                self.table.grow(users, totals)
            return
        before = {user: list(self.pages.get(user, [])) for user in users}
        growth = self.table.grow(users, totals)
        assert list(growth.evicted) == expected
        for user in expected:
            self.forget(user)
        for user, total, cached, pages in zip(users, totals, growth.cached, growth.pages, strict=True):
            assert cached == self.tokens.get(user, 0)
            # what was cached stays where it is
            assert list(pages)[: len(before[user])] == before[user]
            self.tokens.pop(user, None)
            self.tokens[user] = total
            self.pages[user] = list(map(int, pages))

    @rule(user=USERS)
    def touch(self, user: int) -> None:
        if user in self.tokens:
            assert list(self.table.touch(user)) == self.pages[user]
            self.tokens[user] = self.tokens.pop(user)
        else:
            with pytest.raises(KeyError):
                self.table.touch(user)

    @rule(user=USERS)
    def evict(self, user: int) -> None:
        if user in self.tokens:
            self.table.evict(user)
            self.forget(user)
        else:
            with pytest.raises(KeyError):
                self.table.evict(user)

    @rule(target=holds, users=st.lists(USERS, min_size=1, max_size=3, unique=True))
    def hold(self, users: list[int]) -> Hold | None:
        if not all(user in self.tokens for user in users):
            with pytest.raises(KeyError):
                self.table.hold(*users)
            return None
        hold = self.table.hold(*users)
        for user in users:
            self.held.setdefault(user, []).append(hold)
        return hold

    @rule(hold=consumes(holds))
    def release(self, hold: Hold | None) -> None:
        if hold is None:
            return
        self.table.release(hold)
        for claims in (*self.held.values(), *(claims for claims, _ in self.leaving)):
            claims[:] = [claim for claim in claims if claim is not hold]
        self.leaving = [(claims, pages) for claims, pages in self.leaving if claims]

    @invariant()
    def nothing_is_leaked_shared_or_lost(self) -> None:
        assert {user: self.table.tokens(user) for user in self.table} == self.tokens
        # also the order: who was used longest ago comes first
        assert list(self.table) == list(self.tokens)
        owned = [page for user in self.table for page in map(int, self.table.pages_of(user))]
        gone = [page for _, pages in self.leaving for page in pages]
        assert len(set(owned + gone)) == len(owned) + len(gone)
        assert all(0 <= page < PAGES for page in owned + gone)
        assert self.table.leaving_pages == len(gone)
        assert self.table.free_pages == PAGES - len(owned) - len(gone)
        for user, tokens in self.tokens.items():
            assert len(self.table.pages_of(user)) == -(-tokens // PAGE_SIZE)


TestAccounting = Accounting.TestCase
TestAccounting.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_a_full_table_says_what_is_missing_and_changes_nothing() -> None:
    table = PageTable(4, 32)
    table.grow([1], [96])
    claim = table.hold(1)
    with pytest.raises(CacheFull, match=r"1 pages of 32 tokens are missing beyond the 1 free of 4.*would free 0"):
        table.grow([2], [64])
    assert (table.tokens(1), table.tokens(2), table.free_pages) == (96, 0, 1)
    table.release(claim)
    assert table.grow([2], [64]).evicted == [1]


def test_pages_of_an_evicted_user_wait_for_the_transfer_that_reads_them() -> None:
    table = PageTable(2, 8)
    table.grow([1], [16])
    transfer = table.hold(1)
    table.evict(1)
    assert (1 in table, table.free_pages, table.leaving_pages) == (False, 0, 2)
    with pytest.raises(CacheFull):
        table.grow([2], [8])
    table.release(transfer)
    assert (table.free_pages, table.leaving_pages) == (2, 0)
    with pytest.raises(ValueError, match="was released before"):
        table.release(transfer)


def test_a_step_that_makes_no_sense_is_refused() -> None:
    table = PageTable(8, 8)
    table.grow([1], [16])
    with pytest.raises(ValueError, match="appears twice"):
        table.grow([2, 2], [8, 8])
    with pytest.raises(ValueError, match="has 16 tokens and cannot shrink to 15"):
        table.grow([2, 1], [8, 15])
    assert list(table) == [1]
    with pytest.raises(ValueError, match="holds nothing"):
        PageTable(0, 32)


def test_pages_that_come_together_lie_side_by_side() -> None:
    """Copies of neighbours are one copy: also of pages that another user gave back, or that were forgotten."""
    table = PageTable(12, 8)
    assert list(table.grow([1, 2], [32, 16]).pages[0]) == [0, 1, 2, 3]
    table.evict(1)
    assert list(table.grow([3], [32]).pages[0]) == [0, 1, 2, 3]
    table.truncate(3, 8)
    assert list(table.grow([3], [32]).pages[0]) == [0, 1, 2, 3]
    assert list(table.grow([2], [40]).pages[0]) == [4, 5, 6, 7, 8]


def test_bookkeeping_of_many_users_is_quick() -> None:
    """Ten thousand users, batches of eight that grow by 256 tokens, evictions included."""
    table = PageTable(20_000, 32)
    for user in range(0, 10_000, 8):
        table.grow(range(user, user + 8), [64] * 8)
    assert len(table) == 10_000
    times = []
    for user in range(0, 4_000, 8):
        began = time.perf_counter()
        table.grow(range(user, user + 8), [320] * 8)
        times.append(time.perf_counter() - began)
    assert sorted(times)[len(times) // 2] < 1e-3
