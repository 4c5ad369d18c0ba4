"""Verdicts on loads: the requests of a load differ by design, so only repeats of it say what is noise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import fake_frameworks_run as fake
from compared import side, timing
from smbench import compare, sides
from smbench.cell import Cell
from smbench.recipe import Profile
from smbench.result import Prompts, Result
from smbench.verdicts import Row


def load(concurrency: int) -> Cell:
    axes = {"model": "tiny", "max_concurrency": concurrency, "request_rate": "inf", "num_prompts": 200}
    return Cell(kind="engine", subject="online", provider="vllm", axes=axes, seed=0)


def requests(median_s: float, seed: int) -> list[float]:
    """Times to first token of one load: a wide spread, as queues make it."""
    return list(np.random.default_rng(seed).lognormal(np.log(median_s), 0.4, 200))


def rows(factor: float, repeats: int, measurement: str = "ttft") -> list[Row]:
    """Ten loads on two sides, the second slower by a factor; runs of one load differ by half a per cent."""
    sides = []
    for number, slower in enumerate((1.0, factor)):
        cells = []
        for concurrency in range(1, 11):
            drift = np.random.default_rng([number, concurrency]).normal(1, 0.005, repeats)
            runs = [requests(0.1 * concurrency * slower * drift[i], concurrency) for i in range(repeats)]
            if measurement == "duration":
                runs = [[run[0]] for run in runs]
            cells.append(
                (load(concurrency), {measurement: timing(*runs, method="wall", l2="none", metric=measurement)})
            )
        sides.append(side(cells))
    return list(compare.compare(sides[0], sides[1]).rows)


def test_repeats_tell_a_tenth_from_noise() -> None:
    assert {row.verdict for row in rows(1.1, repeats=4)} == {"slower"}
    assert "slower" not in {row.verdict for row in rows(1.0, repeats=4)}


def test_without_repeats_only_what_exceeds_the_spread_of_requests_is_told() -> None:
    assert {row.verdict for row in rows(1.1, repeats=1)} == {"unclear"}
    assert {row.verdict for row in rows(5.0, repeats=1)} == {"slower"}


@pytest.mark.parametrize(("repeats", "verdict"), [(1, "unclear"), (4, "slower")])
def test_a_duration_needs_a_repeat(repeats: int, verdict: str) -> None:
    """One number of one load has no interval, however large the difference."""
    found = rows(2.0, repeats, "duration")
    assert {row.verdict for row in found} == {verdict}
    assert all((row.ci_low is None) == (repeats == 1) for row in found)


def of_prompts(sha256: str) -> Callable[[Cell, Profile], Result | None]:
    """A machine whose cells all had the prompts of one file."""

    def respond(cell: Cell, profile: Profile) -> Result | None:
        result = fake.one_engine(cell, profile)
        if result is None or result.serving is None:
            return result
        prompts = Prompts(dataset="sharegpt", count=8, tokens=8192, sha256=sha256)
        return result.model_copy(update={"serving": result.serving.model_copy(update={"prompts": prompts})})

    return respond


@pytest.mark.parametrize(("other", "compared"), [("a" * 64, True), ("b" * 64, False)])
def test_loads_of_other_prompts_are_not_compared(tmp_path: Path, other: str, compared: bool) -> None:
    """The axes of two files of one form are the same; their prompts are not."""
    runs = [fake.build(tmp_path / name, "full", of_prompts(sha)) for name, sha in (("a", "a" * 64), ("b", other))]
    first, second = sides.load([str(run) for run in runs], {})
    found = compare.compare(first, second)
    assert bool(found.rows) == compared
    named = {(entry.field, entry.a, entry.b) for entry in found.incomparable}
    assert named == (set() if compared else {("prompts", f"sharegpt {'a' * 12}", f"sharegpt {'b' * 12}")})
