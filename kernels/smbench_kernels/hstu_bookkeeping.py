"""The operation `hstu_bookkeeping`: what a cache costs the host in each step, whatever the model computes.

One call is `KVCache.begin`, the step's page table written to the device (`HostBatch.fill`) and `KVCache.finish`, for a
batch of users out of many that the table knows. Keys and values are one element a head, so that nothing else takes
time. `y` is what the step was told, written after the timed interval.
"""

from __future__ import annotations

import numpy as np
import torch

from smbench_kernels.hstu_graphs import HostBatch, PaddedShape, empty_batch
from smbench_kernels.kv_cache import KVCache, Step
from smbench_kernels.kv_store import Sizes
from smbench_kernels.launch import ceil_div
from smbench_kernels.op import Axis, Inputs, Op, Point, Prepared, Tolerance, Work

AXES = {
    "batch": Axis("users of a step"),
    "users": Axis("users that the table knows, a multiple of batch"),
    "total": Axis("tokens of each user's history, the new ones among them"),
    "new": Axis("tokens of history that a step adds, at most total"),
    "targets": Axis("candidates of each user", minimum=0),
    "page_size": Axis("tokens of a page"),
}
FACTS = ("cached", "total", "pages", "users")
"""Columns of `y`: tokens of a user that were found, tokens that it has now, pages of its own, users that are known."""


def make_inputs(point: Point, _seed: int, device: torch.device) -> Inputs:
    """`y` [batch, FACTS] NaN. ValueError for a point that cannot be."""
    if int(point["users"]) % int(point["batch"]) or int(point["new"]) > int(point["total"]):
        raise ValueError(
            f"users = {point['users']} in steps of {point['batch']}, {point['new']} of {point['total']} new"
        )
    return {"y": torch.full((int(point["batch"]), len(FACTS)), torch.nan, device=device)}


def reference(point: Point, inputs: Inputs) -> torch.Tensor:
    """Every user of a step is found with what it had, and nobody shares a page."""
    total, new = int(point["total"]), int(point["new"])
    pages = ceil_div(total, int(point["page_size"]))
    row = torch.tensor([total - new, total, pages, int(point["users"])], dtype=torch.float64, device=inputs["y"].device)
    return row.expand(int(point["batch"]), -1)


def work(point: Point, _inputs: Inputs) -> Work:
    """The page ids that a step hands to the device, once."""
    return Work(int(point["batch"]) * ceil_div(int(point["total"]), int(point["page_size"])) * 4, 0)


class _Steps:
    """A table full of users, who come batch by batch."""

    def __init__(self, point: Point, inputs: Inputs) -> None:
        self._inputs = inputs
        self.batch, self.users = int(point["batch"]), int(point["users"])
        self.total, self.new, self.targets = int(point["total"]), int(point["new"]), int(point["targets"])
        page_size, device = int(point["page_size"]), inputs["y"].device
        sizes = Sizes(layers=1, heads=1, head_dim=1, page_size=page_size, dtype=torch.float16)
        self.cache = KVCache(sizes, self.users * ceil_div(self.total, page_size), device)
        rows = self.new + self.targets
        self._shape = PaddedShape(self.batch, rows)
        self._on_device = empty_batch(self._shape, page_size, self.total + self.targets, device)
        self._offsets = np.arange(self.batch + 1, dtype=np.int32) * rows
        self._targets = np.full(self.batch, self.targets, np.int32)
        self._next = 0
        self._last: Step | None = None

    def begin(self) -> None:
        """Every user has all but the new tokens."""
        cached = self.total - self.new
        for user in range(self.users):
            self.cache.rewind(user, 0, 0)
        self.cache.table.grow(list(range(self.users)), [cached] * self.users)
        self._next = 0

    def run(self) -> None:
        """One step of the next users."""
        if self._next == self.users:
            # once in many steps, so that no median sees it
            self.begin()
        users = list(range(self._next, self._next + self.batch))
        self._next += self.batch
        step = self.cache.begin(users, [self.total] * self.batch)
        totals = np.array(step.totals, np.int32)
        HostBatch(self._offsets, self._targets, totals, step.page_offsets, step.page_ids).fill(self._on_device)
        self.cache.finish(step)
        self._last = step

    def finish(self) -> None:
        """Write what the last step was told."""
        step = self._last
        assert step is not None
        known = len(self.cache.table)
        owned = [step.page_ids[a:b] for a, b in zip(step.page_offsets[:-1], step.page_offsets[1:], strict=True)]
        others = [set(map(int, ids)) for ids in owned]
        shared = {page for i, ids in enumerate(others) for page in ids if any(page in o for o in others[:i])}
        rows = [
            [cached, total, len(ids - shared), known]
            for cached, total, ids in zip(step.cached, step.totals, others, strict=True)
        ]
        self._inputs["y"].copy_(torch.tensor(rows, dtype=torch.float32))


def cache(point: Point, inputs: Inputs) -> Prepared:
    """Our cache."""
    steps = _Steps(point, inputs)
    return Prepared(steps.run, {}, "default", begin=steps.begin, finish=steps.finish, capturable=False)


OP = Op(
    name="hstu_bookkeeping",
    doc="what a cache costs the host in each step: find, grow, write the page table, finish",
    axes=AXES,
    make_inputs=make_inputs,
    reference=reference,
    work=work,
    tolerance=lambda _point: Tolerance(relative=1e-6, elementwise=1e-6),
    providers={"cache": "smbench_kernels.hstu_bookkeeping:cache"},
    baseline="cache",
)
