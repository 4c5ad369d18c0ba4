"""What a verdict can be relied on for: how often it is wrong, what it refuses to compare, and every word around it."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from typer.testing import CliRunner

import fake_run
import small_runs
from compared import big_run, cell, packable, side, simulated, timing
from smbench import bundle, compare, comparison, ratios, sides
from smbench.cell import Cell
from smbench.cli import app
from smbench.compare import Entry, Side
from smbench.errors import CorruptError, UsageError
from smbench.recipe import Profile
from smbench.result import Result
from smbench.verdicts import MARGIN, judge

STEADY = (1.00e-6, 1.01e-6, 0.99e-6, 1.00e-6, 1.00e-6, 1.005e-6, 0.995e-6)

Outcome = Callable[[Cell, Profile], Result | None]


def times(factor: float) -> list[float]:
    return [factor * sample for sample in STEADY]


def against(a: Side, b: Side) -> compare.Comparison:
    return compare.compare(a, b)


def of(*arguments: object, **matches: str) -> compare.Comparison:
    """The comparison of two things that a command line could name."""
    a, b = sides.load([str(argument) for argument in arguments], {k.replace("_", "/"): v for k, v in matches.items()})
    return compare.compare(a, b)


def shares(machines: dict[str, Any], slowdown: float) -> dict[str, float]:
    """How often each verdict falls between pairs of runs that differ by the noise of a machine and a slowdown."""
    counted: Counter[str] = Counter()
    for seed in range(3):
        rng = np.random.default_rng(seed)
        a, b = simulated(rng, **machines), simulated(rng, slowdown=slowdown, **machines)
        counted.update(against(a, b).counts())
    return {verdict: count / counted.total() for verdict, count in counted.items()}


GRAPHS = {"of_samples": 0.0006, "samples": 5, "memory": 0.0}
"""Means of hundreds of calls scatter so little that nothing in a run shows how far the next run lies."""
MACHINES: Mapping[str, dict[str, Any]] = {
    "a GPU, cold cache": {},
    "a GPU, graphs of many calls": GRAPHS,
    "a GPU, graphs, restless": {**GRAPHS, "of_the_run": 0.007, "of_the_cell": 0.01},
    "a quiet processor": {"of_the_run": 0.004, "of_the_cell": 0.006, "of_samples": 0.012, "memory": 0.4},
    "a GPU, cold cache, three repeats": {"runs": 3},
    "a GPU, graphs, restless, three repeats": {**GRAPHS, "of_the_run": 0.007, "of_the_cell": 0.01, "runs": 3},
}


@pytest.mark.parametrize("machine", MACHINES)
def test_two_runs_of_one_machine_are_the_same_and_a_slowdown_of_a_tenth_is_found(machine: str) -> None:
    alike = shares(MACHINES[machine], 1.0)
    assert alike["same"] >= 0.95, alike
    assert alike["slower"] + alike["faster"] <= 0.025, alike
    slowed = shares(MACHINES[machine], 1.1)
    assert slowed["slower"] >= 0.95, slowed
    assert slowed["same"] + slowed["faster"] <= 0.005, slowed


def test_a_noisy_machine_makes_verdicts_unclear_and_not_wrong() -> None:
    noisy = {"of_the_run": 0.01, "of_the_cell": 0.03, "of_samples": 0.03, "memory": 0.6}
    alike, slowed = shares(noisy, 1.0), shares(noisy, 1.1)
    assert alike["slower"] + alike["faster"] <= 0.025, alike
    assert slowed["same"] + slowed["faster"] <= 0.025, slowed
    assert slowed["unclear"] > 0.5, slowed


def test_a_slowdown_of_some_cells_is_found_there_and_nowhere_else() -> None:
    rng = np.random.default_rng(0)
    a, b = simulated(rng), simulated(rng)
    slow = {cell_id for cell_id, entry in b.entries.items() if entry.cell.provider == "b"}
    entries = [
        replace(entry, timings={"cold": timing(*(np.multiply(r, 1.1).tolist() for r in entry.timings["cold"].runs))})
        if cell_id in slow
        else entry
        for cell_id, entry in b.entries.items()
    ]
    found = {row.cell.cell_id for row in against(a, side(entries)).rows if row.verdict == "slower"}
    assert found >= slow
    assert len(found - slow) <= 2


def test_ratio_and_interval_of_known_samples() -> None:
    (row,) = against(side([(cell(), {"cold": timing(times(1))})]), side([(cell(), {"cold": timing(times(2))})])).rows
    assert (row.verdict, row.basis) == ("slower", "samples")
    assert row.ratio == pytest.approx(2.0)
    assert row.ci_low is not None and row.ci_high is not None
    assert 1.97 < row.ci_low < row.ratio < row.ci_high < 2.03
    assert [row.a, row.b] == pytest.approx([1e-6, 2e-6])
    assert (row.samples_a, row.samples_b) == (7, 7)
    assert row.tolerance == pytest.approx(MARGIN)


@given(
    st.lists(st.floats(1e-7, 1e-3), min_size=1, max_size=9),
    st.lists(st.floats(1e-7, 1e-3), min_size=1, max_size=9),
)
@settings(deadline=None, max_examples=60)
def test_the_other_way_round_is_the_inverse_verdict(a: list[float], b: list[float]) -> None:
    one, two = side([(cell(), {"cold": timing(a)})]), side([(cell(), {"cold": timing(b)})])
    (forth,), (back,) = against(one, two).rows, against(two, one).rows
    assert forth.ratio == pytest.approx(1 / back.ratio)
    assert forth.ci_low is not None and forth.ci_high is not None
    assert back.ci_low is not None and back.ci_high is not None
    assert forth.ci_low <= forth.ratio <= forth.ci_high
    # the two directions draw other resamples, so an interval that ends on the tolerance may fall on either side
    if abs(forth.ci_low - 1 / back.ci_high) < 1e-9 and abs(forth.ci_high - 1 / back.ci_low) < 1e-9:
        assert {"slower": "faster", "faster": "slower"}.get(forth.verdict, forth.verdict) == back.verdict


@pytest.mark.parametrize("n", [1, 2, 5, 6, 21, 40])
def test_medians_of_resamples_are_distributed_like_those_of_drawn_resamples(n: int) -> None:
    samples = np.random.default_rng(n).lognormal(0, 0.3, n)
    exact = np.concatenate([ratios.resampled_medians(samples[None], seed)[0] for seed in range(20)])
    drawn = np.median(samples[np.random.default_rng(0).integers(0, n, (20_000, n))], axis=1)
    assert np.mean(exact) == pytest.approx(np.mean(drawn), abs=0.01)
    assert np.std(exact) == pytest.approx(np.std(drawn), abs=0.01)


@pytest.mark.parametrize(
    ("ratio", "low", "high", "floor", "verdict"),
    [
        (0.10, 0.09, 0.11, 0.00, "slower"),
        (-0.10, -0.11, -0.09, 0.00, "faster"),
        (0.00, -0.01, 0.01, 0.00, "same"),
        # beyond the margin, but not beyond what noise explains
        (0.03, 0.025, 0.035, 0.04, "same"),
        # noise could hide a slowdown of a tenth, so nothing is known
        (0.00, -0.01, 0.01, 0.15, "unclear"),
        (0.10, 0.09, 0.11, 0.15, "unclear"),
        (0.01, -0.06, 0.08, 0.00, "unclear"),
        (0.03, 0.01, 0.04, 0.00, "unclear"),
    ],
)
def test_the_rule(ratio: float, low: float, high: float, floor: float, verdict: str) -> None:
    assert judge(ratio, low, high, floor, MARGIN)[0] == verdict


def test_repeats_are_resampled_over_restarts_and_say_so() -> None:
    # within each run nothing varies: only restarts can show that 3 % is nothing here
    a = side([(cell(i), {"cold": timing([1e-6] * 5, [1.04e-6] * 5, [1.02e-6] * 5)}) for i in range(9)], runs=3)
    b = side([(cell(i), {"cold": timing([1.05e-6] * 5, [1.03e-6] * 5, [1.07e-6] * 5)}) for i in range(9)], runs=3)
    found = against(a, b)
    assert {row.basis for row in found.rows} == {"restarts"}
    assert found.noise[0].source == "restarts"
    assert found.noise[0].sd == pytest.approx(0.03, rel=0.3)
    assert found.counts()["slower"] == 0
    one = side([(cell(i), {"cold": timing([1.05e-6] * 5)}) for i in range(9)])
    assert {row.basis for row in against(a, one).rows} == {"restarts of A, samples of B"}


@pytest.mark.parametrize(
    ("changes", "field", "values"),
    [
        ({"method": "event"}, "method", ("graph", "event")),
        ({"l2": "warm"}, "l2", ("cold", "warm")),
    ],
)
def test_unlike_timings_are_incomparable(changes: dict[str, str], field: str, values: tuple[str, str]) -> None:
    other = side([(cell(), {"cold": timing(times(1), **changes)})])
    found = against(side([(cell(), {"cold": timing(times(1))})]), other)
    assert found.rows == []
    (entry,) = found.incomparable
    assert (entry.field, entry.a, entry.b, entry.cells) == (field, *values, (cell(),))


def test_unlike_protocol_measurement_precision_and_seed_are_incomparable() -> None:
    a = side([(cell(), {"cold": timing(times(1))})])
    for b, expected in (
        (replace(a, protocol_version=2), ("protocol_version", "1", "2")),
        (side([(cell(), {"wall": timing(times(1))})]), ("measurement", "cold", "wall")),
        (side([(cell(dtype="bfloat16"), {"cold": timing(times(1))})]), ("dtype", "float16", "bfloat16")),
        (side([(cell(seed=7), {"cold": timing(times(1))})]), ("seed", "0", "7")),
    ):
        found = against(a, b)
        assert found.rows == []
        assert [(entry.field, entry.a, entry.b) for entry in found.incomparable] == [expected]


def test_cells_of_one_side_are_counted_and_lost_numbers_are_listed_with_their_reason() -> None:
    both, gone = cell(128), cell(256)
    timings = {"cold": timing(times(1))}
    a = side([(both, timings), (gone, timings), (cell(512), timings)])
    b = side([Entry(both, "ok", None, timings), Entry(gone, "oom", "out of memory", {})])
    found = against(a, b)
    assert (len(found.rows), found.only_a, found.only_b) == (1, 1, 0)
    assert [(e.cell, e.a, e.b, e.reason) for e in found.one_sided] == [(gone, "ok", "oom", "out of memory")]


def test_a_metric_that_is_better_when_higher_is_turned_round() -> None:
    a, b = (side([(cell(), {"r": timing([rate], metric="decode_throughput")})]) for rate in (100.0, 50.0))
    (row,) = against(a, b).rows
    assert row.verdict == "slower"
    assert [row.ratio, row.a, row.b] == pytest.approx([2.0, 100.0, 50.0])


def test_a_shift_of_everything_is_named_on_one_kind_of_device_only() -> None:
    rng = np.random.default_rng(0)
    a, b = simulated(rng), simulated(rng, slowdown=1.5)
    (shift,) = against(a, b).shifts
    assert (shift.verdict, shift.cells, shift.of) == ("slower", 180, 180)
    assert against(a, replace(b, devices=frozenset({"another card"}))).shifts == []
    assert against(a, simulated(rng)).shifts == []


def folders(tmp_path: Path, slow: float = 1.0, profile: str = "full") -> tuple[Path, Path]:
    """Two fake runs, of which the second is slower by a factor."""

    def slowed(cell: Cell, profile: Profile) -> Result | None:
        result = (
            fake_run.every_status(cell, profile) if profile.device == "cuda" else fake_run.on_a_processor(cell, profile)
        )
        if result is None:
            return None
        scaled = [m.model_copy(update={"samples_s": tuple(slow * s for s in m.samples_s)}) for m in result.measurements]
        return result.model_copy(update={"measurements": tuple(scaled)})

    hostile = {**fake_run.GPU, "libraries": {"torch": fake_run.HOSTILE}}
    a = fake_run.build(tmp_path / "a", fake_run.RECIPE, profile, fake_run.every_status, [fake_run.GPU])
    return a, fake_run.build(tmp_path / "b", fake_run.RECIPE, profile, slowed, [hostile])


def test_files_say_the_same_and_foreign_strings_stay_words(tmp_path: Path) -> None:
    a, b = folders(tmp_path, slow=1.2)
    compared = [of(a, b)]
    comparison.write(compared, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == list(comparison.FILES)
    stored = json.loads((tmp_path / "out" / "compare.json").read_text(encoding="utf-8"))
    (found,) = stored["comparisons"]
    assert found["counts"] == compared[0].counts()
    assert found["counts"]["slower"] == len(found["cells"]) > 30
    assert all(1.19 < entry["ratio"] < 1.21 for entry in found["cells"])
    assert {"fact": "libraries.torch", "a": ["2.11.0"], "b": [fake_run.HOSTILE]} in found["environment"]
    text = (tmp_path / "out" / "compare.md").read_text(encoding="utf-8")
    assert f"**{len(found['cells'])} slower**, **0 faster**, **0 same**, **0 unclear**." in text
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(text)
    inline = [child for token in tokens for child in token.children or [token]]
    assert not [token for token in inline if token.type in ("html_inline", "html_block", "link_open")]
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(tables) == sum(token.type == "table_open" for token in tokens) >= 4
    for table in tables:
        assert len({len(re.split(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1, table
    assert not re.search(r"\b(nan|inf|None|Undefined)\b|object at 0x", text)
    assert (tmp_path / "out" / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_a_refuted_number_is_not_compared(tmp_path: Path) -> None:
    a, _ = folders(tmp_path)
    (loaded,) = sides.load([str(a)], {})
    refuted = [entry for entry in loaded.entries.values() if entry.status == "invalid"]
    assert refuted
    assert all(not entry.timings for entry in refuted)


def test_a_bundle_is_compared_like_its_folder_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    a, b = folders(tmp_path, slow=1.1)
    packable(b)
    done = bundle.pack(b, tmp_path / "b.tar.gz")
    assert done
    packed = done.path
    rows = [of(a, path).rows for path in (b, packed)]
    assert rows[0] == rows[1] != []
    damaged = bytearray(packed.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    packed.write_bytes(damaged)
    with pytest.raises(CorruptError):
        sides.load([str(a), str(packed)], {})


def test_repeats_are_joined_by_commas_and_must_be_of_one_experiment(tmp_path: Path) -> None:
    a, b = folders(tmp_path)
    (joined,) = sides.load([f"{a},{b}"], {})
    assert (joined.runs, joined.name) == (2, "a, b")
    assert {len(t.runs) for entry in joined.entries.values() for t in entry.timings.values()} == {2}
    other = fake_run.build(tmp_path / "cpu", fake_run.RECIPE, "cpu", fake_run.on_a_processor, [fake_run.CPU])
    with pytest.raises(UsageError, match="repeats of one experiment, but profile: full, cpu"):
        sides.load([f"{a},{other}"], {})


def test_published_numbers_are_put_against_the_provider_that_is_named() -> None:
    (alone,) = sides.load(["published:lora-rtx3090"], {})
    series = {entry.cell.provider for entry in alone.entries.values()}
    assert {"jee/default", "jee/tuned"} < series
    found = against(alone, alone)
    assert len(found.rows) == len(alone.entries)
    assert found.counts()["same"] == len(found.rows)


def test_published_numbers_meet_a_run(tmp_path: Path) -> None:
    a, _ = folders(tmp_path)
    with pytest.raises(UsageError, match=r"say what is put against what.*jee/default.*smbench-tuned"):
        sides.load(["published:lora-rtx3090", str(a)], {})
    with pytest.raises(UsageError, match="--match jee/none=smbench: no such pair"):
        sides.load(["published:lora-rtx3090", str(a)], {"jee/none": "smbench"})
    compared = of("published:lora-rtx3090", a, jee_default="smbench")
    # only the measurement with the document's method and cache state is comparable
    assert {(row.measurement, row.cell.provider) for row in compared.rows} == {("document", "smbench")}
    assert [entry.fact for entry in compared.differences()][:1] == ["gpu.name"]
    assert "their own spread is not in the intervals" in comparison.render([compared])


def command(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


def test_the_command_and_its_exit_codes(tmp_path: Path) -> None:
    a, b = folders(tmp_path, slow=1.1)
    assert command(a, b).exit_code == 0
    assert "# Comparison" in command(a, b).stdout
    assert json.loads(command(a, b, "--json").stdout)["comparisons"][0]["counts"]["faster"] == 0
    assert command(a, b, "--fail-slower", "5%").exit_code == 1
    assert command(b, a, "--fail-slower", "5%").exit_code == 0
    assert command(a, b, "--fail-slower", "0.2").exit_code == 0
    assert command(a, a, "--fail-slower", "0%").exit_code == 0
    assert command(a).exit_code == command(a, b, "--margin", "much").exit_code == 2
    assert isinstance(command(a, tmp_path / "none").exception, UsageError)


def test_nothing_comparable_is_exit_code_3_and_names_the_field(tmp_path: Path) -> None:
    a, _ = folders(tmp_path)
    text = fake_run.RECIPE.replace(b"protocol_version = 1", b"protocol_version = 2")
    newer = fake_run.build(tmp_path / "newer", text, "full", fake_run.every_status)
    result = command(a, newer)
    assert result.exit_code == 3
    assert "nothing is comparable; protocol_version: 1, 2" in result.stderr


def test_two_runs_of_10000_cells_compare_within_10_s(tmp_path: Path) -> None:
    """Files of 22 MB each; 3 to 5 s on two cores of a shared server, reading and drawing included."""
    runs = [str(big_run(tmp_path / name, 10_000, 70, seed)) for seed, name in enumerate("ab")]
    assert (tmp_path / "a" / "results.jsonl").stat().st_size > 20e6
    began = time.perf_counter()
    found = of(*runs)
    comparison.write([found], tmp_path / "out")
    took_s = time.perf_counter() - began
    assert found.counts()["same"] > 9900
    assert took_s < 10


def test_a_run_of_another_recipe_shares_no_cell(tmp_path: Path) -> None:
    a, _ = folders(tmp_path)
    text = small_runs.recipe_text()
    b = fake_run.build(tmp_path / "small", text, "cpu", lambda cell, _: small_runs.timed(cell), [fake_run.CPU])
    found = of(a, b)
    assert (found.rows, found.only_b) == ([], 2)
    assert "**Nothing could be compared.**" in comparison.render([found])
