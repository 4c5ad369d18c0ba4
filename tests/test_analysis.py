"""From records to rows: no number where the status says none, comparisons that count right, a split that adds up."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from small_runs import CHECK, cell, measurement, session, small_recipe, timed, untimed
from smbench.analysis import Analysis, Row, analyse, bandwidth
from smbench.cell import Cell
from smbench.result import UNTESTED, Result, Session, Status, Work


def analysed(
    results: Sequence[Result], cells: Sequence[Cell] | None = None, sessions: Sequence[Session] = ()
) -> Analysis:
    planned = [result.cell for result in results] if cells is None else cells
    return analyse(small_recipe(), "cpu", planned, {r.cell_id: r for r in results}, [], sessions, None)


def around(median: float, width: float = 0.01) -> tuple[float, ...]:
    """Samples whose median and interval lie within ± width of a value, relatively."""
    return tuple(median * (1 + width * k / 5) for k in range(-5, 6))


def test_rows_follow_the_plan_and_what_was_not_reached_is_skipped() -> None:
    cells = [cell(300), cell(100), cell(200)]
    analysis = analysed([timed(cell(100))], cells)
    assert [(row.cell, row.status) for row in analysis.rows] == [
        (cells[0], "skipped"),
        (cells[1], "ok"),
        (cells[2], "skipped"),
    ]
    assert analysis.rows[0].reason == "not reached yet; the same command goes on"
    assert analysis.counts() == {"skipped": 2, "ok": 1}


def test_a_result_that_the_plan_does_not_have_is_left_out() -> None:
    analysis = analysed([timed(cell(100)), timed(cell(999))], [cell(100)])
    assert [row.cell for row in analysis.rows] == [cell(100)]


@pytest.mark.parametrize("status", [status for status in UNTESTED if status != "skipped"])
def test_a_status_without_a_number_has_a_reason_and_no_number(status: Status) -> None:
    (row,) = analysed([untimed(cell(100), status, "the very reason")]).rows
    assert (row.status, row.reason, row.summary("wall")) == (status, "the very reason", None)


def test_a_verified_cell_has_no_number_either() -> None:
    (row,) = analysed([untimed(cell(100), "verified", "interpreted", check=CHECK)]).rows
    assert (row.status, row.summaries) == ("verified", {})


def test_rows_are_found_by_their_point_whatever_the_order_of_axes() -> None:
    analysis = analysed([timed(cell(100, batch=8)), timed(cell(100, "ours", batch=8))])
    found = analysis.row("bgmv_shrink", "ours", batch=8, hidden_size=100)
    assert found is analysis.rows[1]
    # a point is complete or none
    assert analysis.row("bgmv_shrink", "ours", hidden_size=100) is None
    assert analysis.select(hidden_size=100) == analysis.rows
    assert analysis.select(provider="ours", batch=8) == [analysis.rows[1]]
    assert analysis.select(batch=16) == []


def providers(times: dict[str, list[float | None]]) -> Analysis:
    """One cell for each provider and hidden size 100, 200, …; None has no number."""
    return analysed(
        [
            untimed(cell(100 * (i + 1), name), "oom")
            if median is None
            else timed(cell(100 * (i + 1), name), around(median))
            for name, medians in times.items()
            for i, median in enumerate(medians)
        ]
    )


def of(analysis: Analysis, provider: str) -> list[Row]:
    return analysis.select(provider=provider)


def test_a_comparison_counts_points_that_both_have_and_intervals_that_do_not_overlap() -> None:
    # twice as fast, half as fast, the same within noise, and two points where one side has no number
    analysis = providers({"ours": [1.0, 2.0, 1.0, 1.0, None], "torch": [2.0, 1.0, 1.001, None, 1.0]})
    comparison = analysis.compare(of(analysis, "ours"), "torch", "wall")
    assert comparison is not None
    assert (comparison.points, comparison.faster, comparison.slower, comparison.unclear) == (3, 1, 1, 1)
    assert comparison.geomean_speedup == pytest.approx((2.0 * 0.5 * 1.001) ** (1 / 3))
    assert [comparison.lowest, comparison.highest] == pytest.approx([0.5, 2.0])


def test_against_several_the_fastest_at_each_point_counts() -> None:
    analysis = providers({"ours": [1.0, 1.0], "torch": [2.0, 8.0], "cuda-only": [4.0, 4.0]})
    comparison = analysis.compare(of(analysis, "ours"), ["torch", "cuda-only"], "wall")
    assert comparison is not None
    assert [comparison.lowest, comparison.highest] == pytest.approx([2.0, 4.0])


def test_there_is_no_comparison_without_a_common_number() -> None:
    analysis = providers({"ours": [1.0, None], "torch": [None, 1.0]})
    assert analysis.compare(of(analysis, "ours"), "torch", "wall") is None
    assert analysis.compare(of(analysis, "ours"), "torch", "no such measure") is None
    assert analysis.speedup(of(analysis, "ours")[0], "wall", "torch") is None


def test_a_speedup_is_the_others_time_over_ours() -> None:
    analysis = providers({"ours": [1.0], "torch": [3.0]})
    assert analysis.speedup(of(analysis, "ours")[0], "wall", "torch") == pytest.approx(3.0)


def test_time_split_adds_up_to_the_wall_clock() -> None:
    results = [
        timed(
            cell(size),
            measurements=(measurement((1.0,), "wall", busy_s=1.5), measurement((1.0,), "second", busy_s=0.5)),
            phases_s={"inputs": 0.25, "compile": 0.5, "check": 0.125, "capture": 0.125, "total": 99.0},
        )
        for size in (100, 200)
    ]
    # a cell that crashed cost time too
    results.append(untimed(cell(300), "crashed", phases_s={"inputs": 0.25}))
    split = analysed(results, sessions=[session(8.0, 1.0, compile_s=0.25), session(4.0, 0.5)]).time_split()
    assert split == {
        "wall": 12.0,
        "kernels": 4.0,
        "start": 1.5,
        "inputs": 0.75,
        "compile": 1.25,
        "check": 0.25,
        "capture": 0.25,
        "other": 4.0,
    }
    assert sum(seconds for name, seconds in split.items() if name != "wall") == split["wall"]


def test_a_split_without_anything_is_zero() -> None:
    assert set(analysed([], [cell(100)]).time_split().values()) == {0.0}


def test_bandwidth_needs_both_sides() -> None:
    (row,) = analysed([timed(cell(100), (0.5, 0.5))]).rows
    assert bandwidth(Work(bytes=1000, flops=0), row.summary("wall")) == 2000.0
    assert bandwidth(None, row.summary("wall")) is None
    assert bandwidth(Work(bytes=1000, flops=0), None) is None


def test_a_record_holds_to_the_rules_of_its_status() -> None:
    """No number without a passed check, no reason on `ok`, a reason on everything else."""
    good = timed(cell(100)).model_dump()
    for changes, told in (
        ({"status": "ok", "measurements": ()}, "status 'ok' with 0 measurements"),
        ({"status": "ok", "check": None}, "without a passed correctness check"),
        ({"status": "ok", "reason": "why"}, "status 'ok' takes no reason"),
        ({"status": "timeout", "reason": "why"}, "status 'timeout' with 1 measurements"),
        ({"status": "timeout", "measurements": ()}, "status 'timeout' needs reason"),
        ({"cell_id": "0" * 16}, "is not the hash of the cell"),
        ({"seconds": 1.0}, "Extra inputs are not permitted"),
    ):
        with pytest.raises(ValueError, match=told):
            Result.model_validate(good | changes)
