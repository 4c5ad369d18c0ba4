"""Each guard is silent on a clean run and speaks, with its arithmetic, on the fault that it is there for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from small_runs import CHECK, cell, environment, measurement, session, small_recipe, timed, untimed
from smbench.analysis import analyse
from smbench.arch import Device
from smbench.guards import GUARDS, Evidence, Finding
from smbench.result import Environment, Result, Selection, Session, Work
from smbench.stats import summarize

CARD = Device(
    name="Test card",
    arch="sm90",
    memory_bandwidth_bytes_per_s=1e12,
    l2_bytes=50_000_000,
    boost_clock_hz=1e9,
    tensor_flops_per_s={"float16": 1e14},
    source="made up",
)
"""1 MB takes 1 µs, and 0.1 GFLOP in float16 takes 1 µs at the stated clock of 1 GHz."""
CLEAN_TELEMETRY: Mapping[str, Any] = {
    "sm_clock_hz": [1.00e9, 0.99e9],
    "throttle_reasons": ["idle"],
    "other_processes": 0,
}


def evidence(
    results: Sequence[Result],
    device: Device | None = CARD,
    environments: Sequence[Environment] = (environment(),),
    sessions: Sequence[Session] = (session(),),
) -> Evidence:
    summaries = {
        (result.cell_id, entry.name): summarize([entry.samples_s])[0]
        for result in results
        for entry in result.measurements
    }
    return Evidence(small_recipe(), device, results, summaries, environments, sessions)


def findings(guard: str, seen: Evidence) -> list[Finding]:
    return list(GUARDS[guard](seen))


def the_finding(guard: str, seen: Evidence) -> Finding:
    (finding,) = findings(guard, seen)
    assert finding.guard == guard
    assert finding.remedy
    return finding


def test_a_clean_run_has_no_finding_of_any_guard() -> None:
    results = [timed(cell(size), (1e-6, 1e-6, 1.01e-6), telemetry=CLEAN_TELEMETRY) for size in (100, 200)]
    checks = ({"method": "graph", "expected_s": 4e-4, "measured_s": 4.04e-4},)
    seen = evidence(
        results,
        environments=[environment(source={"dirty": False})],
        sessions=[session(timer_checks=checks, results=len(results))],
    )
    assert [finding for name in GUARDS for finding in findings(name, seen)] == []


def test_correctness_names_every_wrong_cell() -> None:
    wrong = untimed(cell(300), "incorrect", "first inputs: relative error 1 exceeds 0.01")
    finding = the_finding("correctness", evidence([timed(cell(100)), wrong]))
    assert (finding.severity, finding.cell_id) == ("refuted", wrong.cell_id)
    assert finding.message == ("bgmv_shrink/torch hidden_size=300: first inputs: relative error 1 exceeds 0.01")


def moved(bytes_: int, seconds: float, l2: str, flops: int = 0, **changes: Any) -> Result:
    """A result that claims to have moved so many bytes in so much time."""
    entry = measurement((seconds,) * 3, name="wall", method="graph", l2=l2)
    return timed(cell(100, dtype="float16"), measurements=(entry,), work=Work(bytes=bytes_, flops=flops), **changes)


def test_roofline_refutes_what_is_faster_than_memory() -> None:
    finding = the_finding("roofline", evidence([moved(10_000_000, 5e-6, "cold")]))
    assert finding.severity == "refuted"
    assert finding.message == (
        "bgmv_shrink/torch hidden_size=100 dtype=float16, wall: 5.00 µs is less than the bound 10.00 µs = "
        "10.00 MB / 1000 GB/s"
    )


def test_roofline_leaves_five_percent_for_a_board_that_clocks_higher() -> None:
    assert findings("roofline", evidence([moved(10_000_000, 9.6e-6, "cold")])) == []
    assert len(findings("roofline", evidence([moved(10_000_000, 9.4e-6, "cold")]))) == 1


def test_roofline_grants_a_warm_cache_what_can_stay_in_it() -> None:
    # 10 MB stay in the 50 MB of L2, so nothing is claimed of memory
    assert findings("roofline", evidence([moved(10_000_000, 5e-6, "warm")])) == []
    # of 110 MB at most 50 stay: 60 MB must move in 60 µs
    assert findings("roofline", evidence([moved(110_000_000, 60e-6, "warm")])) == []
    finding = the_finding("roofline", evidence([moved(110_000_000, 50e-6, "warm")]))
    assert "50.00 µs is less than the bound 60.00 µs = 60.00 MB / 1000 GB/s" in finding.message


def test_roofline_refutes_what_is_faster_than_arithmetic() -> None:
    finding = the_finding("roofline", evidence([moved(1000, 5e-6, "warm", flops=1_000_000_000)]))
    assert "5.00 µs is less than the bound 10.00 µs = 1.00 GFLOP / 100 TFLOP/s" in finding.message


def test_roofline_scales_arithmetic_to_the_clock_that_ran() -> None:
    fast = {"sm_clock_hz": [1.5e9, 2.0e9]}
    assert findings("roofline", evidence([moved(1000, 5e-6, "warm", flops=1_000_000_000, telemetry=fast)])) == []
    slow = {"sm_clock_hz": [0.5e9]}
    finding = the_finding("roofline", evidence([moved(1000, 10e-6, "warm", flops=1_000_000_000, telemetry=slow)]))
    assert "10.00 µs is less than the bound 20.00 µs = 1.00 GFLOP / 50 TFLOP/s" in finding.message


def test_roofline_borrows_no_peak_for_a_type_that_the_table_does_not_state() -> None:
    odd = moved(1000, 1e-9, "warm", flops=1_000_000_000)
    other = timed(cell(100, dtype="bfloat16"), measurements=odd.measurements, work=odd.work)
    assert findings("roofline", evidence([other])) == []


@pytest.mark.parametrize("device", [None, Device(name="New card", arch="sm90", source="nothing known")])
def test_an_unknown_device_gives_a_note_and_never_a_refutation(device: Device | None) -> None:
    seen = evidence([moved(10_000_000_000, 1e-9, "cold"), moved(10_000_000_000, 1e-9, "warm")], device=device)
    finding = the_finding("roofline", seen)
    assert (finding.severity, finding.cell_id) == ("note", None)
    assert "docker/archs.toml" in finding.remedy
    assert findings("roofline", evidence([untimed(cell(), "oom")], device=device)) == []


def selected(provider: str, source: str) -> Result:
    return timed(cell(100, provider), selection=Selection(source=source, config={}))


def test_selection_refutes_a_configuration_that_was_not_promised() -> None:
    assert findings("selection", evidence([selected("ours", "default"), selected("torch", "library")])) == []
    finding = the_finding("selection", evidence([selected("ours", "tuned-exact")]))
    assert finding.severity == "refuted"
    assert finding.message == "bgmv_shrink/ours hidden_size=100: promised a default configuration, ran 'tuned-exact'"


def test_selection_warns_once_of_cells_that_ran_a_neighbours_configuration() -> None:
    recipe = small_recipe()
    rows = {**recipe.providers, "ours": recipe.providers["ours"].model_copy(update={"selection": "tuned"})}
    tuned = recipe.model_copy(update={"providers": rows})
    results = [
        timed(cell(size, "ours"), selection=Selection(source=source, config={}))
        for size, source in ((100, "tuned-exact"), (200, "tuned-nearest: 100"), (300, "tuned-nearest: 100"))
    ]
    seen = evidence(results)
    finding = the_finding(
        "selection",
        Evidence(tuned, seen.device, seen.results, seen.summaries, seen.environments, seen.sessions),
    )
    assert (finding.severity, finding.cell_id) == ("warning", None)
    assert finding.message.startswith("ours: 2 cells ran the configuration of the nearest tuned point")


def observed(size: int, **telemetry: Any) -> Result:
    return timed(cell(size), telemetry=telemetry)


def test_clocks_warn_of_a_drop_below_the_highest_of_the_run() -> None:
    results = [observed(100, sm_clock_hz=[1.98e9]), observed(200, sm_clock_hz=[1.9e9, 1.5e9]), observed(300)]
    finding = the_finding("clocks", evidence(results))
    assert finding.severity == "warning"
    assert finding.message == (
        "1 of 3 cells saw an SM clock more than 10% under the run's highest (1500 against 1980 MHz)"
    )


def test_clocks_warn_of_what_held_them_down_and_not_of_idling() -> None:
    results = [
        observed(100, throttle_reasons=["sw_power_cap", "idle"]),
        observed(200, throttle_reasons=["sw_power_cap", "applications_clocks_setting"]),
    ]
    finding = the_finding("clocks", evidence(results))
    assert finding.message == "2 cells ran while the clocks were held down by sw_power_cap"


def test_idle_warns_of_other_processes() -> None:
    finding = the_finding("idle", evidence([observed(100, other_processes=2), observed(200, other_processes=0)]))
    assert (finding.severity, finding.message) == ("warning", "1 cells ran while other processes held the GPU")


def test_spread_warns_once_for_each_measure_with_the_worst() -> None:
    results = [timed(cell(100), (1.0, 1.0, 1.0)), timed(cell(200), (0.8, 1.0, 1.2)), timed(cell(300), (0.9, 1.0, 1.1))]
    finding = the_finding("spread", evidence(results))
    assert finding.message == "wall: 2 of 3 medians have (p90 − p10) / median above 5%, the worst 32%"


def test_timer_warns_of_a_known_kernel_that_was_timed_wrong() -> None:
    checks = (
        {"method": "graph", "expected_s": 4e-4, "measured_s": 4e-4},
        {"method": "event", "expected_s": 4e-4, "measured_s": 4.4e-4},
    )
    finding = the_finding("timer", evidence([timed(cell())], sessions=[session(timer_checks=checks)]))
    assert finding.message == "event: a kernel of 400.0 µs was timed at 440.0 µs (+10.0%)"


def test_environment_warns_of_a_mixture_and_says_what_differs() -> None:
    one = environment("e0", gpu={"name": "A", "driver": "1"}, python="3.11")
    other = environment("e1", gpu={"name": "B", "driver": "1"}, python="3.11", image="x")
    finding = the_finding("environment", evidence([timed(cell())], environments=[one, other]))
    assert finding.severity == "warning"
    assert finding.message == (
        "results of 2 different environments are in this run; they differ in gpu.name: A | B; image: absent | x"
    )


def test_environment_notes_uncommitted_changes() -> None:
    finding = the_finding("environment", evidence([timed(cell())], environments=[environment(source={"dirty": True})]))
    assert finding.severity == "note"


def test_what_a_guard_refutes_becomes_invalid_and_loses_its_number() -> None:
    impossible, honest = moved(10_000_000, 5e-6, "cold"), timed(cell(200), (1e-3,) * 3)
    cells = [impossible.cell, honest.cell]
    results = {result.cell_id: result for result in (impossible, honest)}
    analysis = analyse(small_recipe(), "cpu", cells, results, [environment()], [session()], CARD)
    first, second = analysis.rows
    assert (first.status, first.summaries) == ("invalid", {})
    assert first.reason is not None
    assert first.reason.startswith("roofline: bgmv_shrink/torch hidden_size=100 dtype=float16, wall: 5.00 µs is less")
    assert (second.status, second.reason) == ("ok", None)
    assert second.summary("wall") is not None


def test_a_verified_cell_with_the_wrong_configuration_is_invalid_too() -> None:
    result = untimed(cell(100, "ours"), "verified", check=CHECK, selection=Selection(source="tuned-exact", config={}))
    analysis = analyse(small_recipe(), "cpu", [result.cell], {result.cell_id: result}, [], [session()], None)
    assert analysis.rows[0].status == "invalid"


def test_a_warning_leaves_the_number_standing() -> None:
    result = timed(cell(100), (0.5, 1.0, 1.5))
    analysis = analyse(small_recipe(), "cpu", [result.cell], {result.cell_id: result}, [], [session()], CARD)
    assert [finding.guard for finding in analysis.findings] == ["spread"]
    assert analysis.rows[0].status == "ok"


def test_results_of_a_killed_session_are_named_since_their_wall_clock_is_unknown() -> None:
    results = [timed(cell(100)), timed(cell(200))]
    finding = the_finding("sessions", evidence(results, sessions=[session(results=1)]))
    assert finding.severity == "note"
    assert finding.message.startswith("1 of 2 results were made by sessions that were killed")
