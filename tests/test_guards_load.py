"""Guards of batches and loads: silent on an honest run; each speaks, with its arithmetic, on its fault."""

from __future__ import annotations

from typing import Any

import pytest

import fake_frameworks_run as fake
from small_runs import environment
from smbench import arch, guards_load, recipe, resources
from smbench.analysis import analyse, summaries_of
from smbench.arch import Device
from smbench.cell import Cell
from smbench.findings import Evidence, Finding
from smbench.guards import GUARDS, names
from smbench.guards_engine import passes
from smbench.result import Load, Result, Session

RECIPE = recipe.parse(fake.RECIPE, "frameworks.toml")
FULL = RECIPE.profile["full"]
CELLS = RECIPE.cells("full")
AT_EIGHT = next(c for c in CELLS if c.provider == "vllm" and c.axes.get("max_concurrency") == 8)
SESSION = Session(
    started_at="2026-01-02T03:04:05Z", wall_s=1.0, worker_start_s=1.0, workers=1, results=100, ended="finished"
)


def card() -> Device:
    found = arch.load(resources.archs_file()).device_named("NVIDIA H200")
    assert found
    return found


def cell(subject: str, provider: str = "vllm", **axes: int | str) -> Cell:
    return next(
        c
        for c in CELLS
        if (c.subject, c.provider) == (subject, provider) and all(c.axes[k] == v for k, v in axes.items())
    )


def findings(guard: str, *results: Result) -> list[Finding]:
    seen = Evidence(RECIPE, card(), results, summaries_of(results), [environment()], [SESSION])
    return list(GUARDS[guard](seen))


def the_finding(guard: str, *results: Result) -> Finding:
    (finding,) = findings(guard, *results)
    assert finding.guard == guard
    assert finding.remedy
    return finding


def refuted(guard: str, result: Result) -> str:
    """What a guard says of a cell that it refutes, and that no number of the cell is shown then."""
    finding = the_finding(guard, result)
    assert (finding.severity, finding.cell_id) == ("refuted", result.cell_id)
    analysis = analyse(RECIPE, "full", [result.cell], {result.cell_id: result}, [environment()], [SESSION], card())
    assert (analysis.rows[0].status, analysis.rows[0].summaries) == ("invalid", {})
    return finding.message


def with_batch(result: Result, index: int, **changes: Any) -> Result:
    """The result with one of its repetitions otherwise."""
    assert result.serving
    batches = list(result.serving.batches)
    batches[index] = batches[index].model_copy(update=changes)
    return result.model_copy(update={"serving": result.serving.model_copy(update={"batches": tuple(batches)})})


def with_load(load_cell: Cell, **changes: Any) -> Result:
    """A load that is otherwise."""
    return fake.ok(load_cell, FULL, load=fake.load(load_cell, **changes))


def test_an_honest_run_has_no_finding_but_notes() -> None:
    results = [result for c in CELLS if (result := fake.on_eight_gpus(c, FULL)) and result.status == "ok"]
    seen = Evidence(RECIPE, card(), results, summaries_of(results), [environment()], [SESSION])
    found = [finding for guard in GUARDS.values() for finding in guard(seen)]
    # the fake sglang adds four tokens to its context, as the real one does
    assert {(f.guard, f.severity) for f in found} == {
        ("prefix_cache", "note"),
        ("rates", "note"),
        ("settings", "warning"),
    }


def test_a_report_names_the_guards_that_had_something_to_look_at() -> None:
    assert "little" not in names("engine", ["generate"])
    assert "batch_clocks" not in names("engine", ["online"])
    assert {"little", "rates", "load_clocks", "batch_clocks"} <= set(names("engine", ["static_batch", "online"]))
    assert "tokens" not in names("op", ["online"])


# ------------------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompt_tokens": 4095}, "batch 2: 4095 prompt tokens, not 4096"),
        ({"completion_tokens": 4000}, "batch 2: 4000 tokens generated, not 4096"),
        ({"finish_reasons": {"length": 3, "stop": 1}}, "they ended by 'length' 3 times, 'stop' 1 times"),
        ({"finish_reasons": {}}, "they ended by nothing, not 'length' 4 times"),
        ({"batch": 3}, "batch 2: 3 prompts, not 4"),
    ],
)
def test_tokens_refutes_a_batch_that_is_not_what_was_asked(changes: dict[str, Any], said: str) -> None:
    message = refuted("tokens", with_batch(fake.ok(cell("static_batch", output_len=1024), FULL), 2, **changes))
    assert "1 of 4 batches are not what was asked" in message
    assert said in message


def test_a_hit_in_the_prefix_cache_refutes_a_batch_unless_prompts_share_a_beginning_on_purpose() -> None:
    hit = with_batch(fake.ok(cell("offline"), FULL), 1, cached_tokens=512)
    assert "1 of 4 batches took prompt tokens from a prefix cache, 512 of 40960 = 1.2%" in refuted("prefix_cache", hit)
    axes = {**hit.cell.axes, "dataset": "shared-prefix"}
    shared = hit.cell.model_copy(update={"axes": axes})
    moved = hit.model_copy(update={"cell": shared, "cell_id": shared.cell_id})
    # the provider was not told to cache, so it must not
    assert findings("prefix_cache", moved)
    row = RECIPE.providers["vllm"].model_copy(update={"settings": {"prefix_caching": True}})
    allowed = RECIPE.model_copy(update={"providers": {**RECIPE.providers, "vllm": row}})
    seen = Evidence(allowed, card(), [moved], {}, [environment()], [SESSION])
    assert list(GUARDS["prefix_cache"](seen)) == []


def test_a_server_that_answers_a_repeated_prompt_from_its_cache_is_refuted() -> None:
    def probed(*cached: int | None) -> Result:
        probes = [{"prompt_tokens": 1024, "completion_tokens": 9, "cached_tokens": count} for count in cached]
        return fake.ok(AT_EIGHT, FULL, settings={**fake.settings_of(AT_EIGHT), "server": {"probes": probes}})

    assert findings("prefix_cache", probed(0, 0)) == []
    assert "1 of 2 probes of the server took prompt tokens from a prefix cache, 1008" in refuted(
        "prefix_cache", probed(0, 1008)
    )
    assert "in 1 of 1 cells the engine does not say" in the_finding("prefix_cache", probed(None, None)).message


def test_a_batch_has_a_step_for_each_further_token() -> None:
    result = fake.ok(cell("static_batch", output_len=1024, tensor_parallel=1), FULL)
    assert result.serving
    steps = result.serving.batches[1].step_s
    message = refuted("batch_clocks", with_batch(result, 1, step_s=(*steps, steps[0])))
    assert "1024 decode steps, and 1024 output tokens are one prefill and 1023" in message


@pytest.mark.parametrize(
    ("factor", "said"),
    [(0.9, "prefill and steps take 16.768 s, and the whole batch"), (1.1, "something is in no part")],
)
def test_prefill_and_steps_make_up_the_batch(factor: float, said: str) -> None:
    result = fake.ok(cell("static_batch", output_len=1024, tensor_parallel=1, batch=4), FULL)
    assert result.serving
    whole = result.serving.batches[1].e2e_s
    assert said in refuted("batch_clocks", with_batch(result, 1, e2e_s=factor * whole))
    assert findings("batch_clocks", with_batch(result, 1, e2e_s=1.01 * whole)) == []


def test_a_median_step_that_is_not_what_a_batch_is_made_of_is_said() -> None:
    result = fake.ok(cell("static_batch", output_len=1024, tensor_parallel=1, batch=4), FULL)
    assert result.serving
    found = result.serving.batches[1]
    # a third of the steps takes three times as long
    steps = tuple(step * (3 if i % 3 == 0 else 1) for i, step in enumerate(found.step_s))
    slower = with_batch(result, 1, step_s=steps, e2e_s=(found.prefill_s or 0) + sum(steps))
    finding = the_finding("batch_clocks", slower)
    assert finding.severity == "warning"
    assert "in 1 of 1 cells the mean decode step is more than 1.2 times the median one, 1.67 times" in finding.message


# --------------------------------------------------------------------------------------------------------------- loads


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"completion_tokens": 570}, "570 tokens generated, not 64 × 9"),
        ({"prompt_tokens": 60_000}, "60000 prompt tokens, not 65536"),
        ({"completed": 63, "completion_tokens": 567}, "63 requests completed and 0 failed, of 64"),
    ],
)
def test_tokens_refutes_a_load_that_is_not_what_was_asked(changes: dict[str, Any], said: str) -> None:
    assert said in refuted("tokens", with_load(AT_EIGHT, **changes))


def test_a_few_prompt_tokens_more_are_a_note() -> None:
    """A server may put a token before each prompt."""
    finding = the_finding("tokens", with_load(AT_EIGHT, prompt_tokens=65_600))
    assert finding.severity == "note"
    assert "the client counts 65600 prompt tokens, and 65536 were asked" in finding.message


def changed_series(name: str, factor: float) -> dict[str, Any]:
    load = fake.load(AT_EIGHT)
    return {name: tuple(factor * value for value in getattr(load, name))}


def test_first_and_further_tokens_make_up_a_request() -> None:
    for changes in (changed_series("tpot_s", 1.1), changed_series("ttft_s", 0.8)):
        message = refuted("load_clocks", with_load(AT_EIGHT, **changes))
        assert "TTFT + 8 × TPOT is" in message and "and E2E 0.292 s" in message
    assert findings("load_clocks", with_load(AT_EIGHT, **changed_series("tpot_s", 1.01))) == []


def test_every_completed_request_has_its_latencies() -> None:
    message = refuted("load_clocks", with_load(AT_EIGHT, ttft_s=(0.1,) * 60))
    assert message.endswith("64 requests were completed, and there are 60 values of TTFT")


def test_no_request_outlasts_its_load() -> None:
    load = fake.load(AT_EIGHT)
    e2e = (*load.e2e_s[1:], 5.0)
    ttft = (*load.ttft_s[1:], 5.0 - 8 * load.tpot_s[0])
    result = with_load(AT_EIGHT, e2e_s=e2e, ttft_s=ttft)
    assert any("a request took 5 s, and the whole load 2.336 s" in f.message for f in findings("load_clocks", result))


def test_pieces_of_several_tokens_are_said() -> None:
    load = fake.load(AT_EIGHT)
    finding = the_finding("load_clocks", with_load(AT_EIGHT, itl_s=load.itl_s[::2]))
    assert finding.severity == "note"
    assert "streams up to 2 tokens a piece on average" in finding.message


def test_tokens_that_came_in_bursts_are_said() -> None:
    """Half of the gaps are 3 µs: their sum is that of the others alone, and the whole request is as long."""
    load = fake.load(AT_EIGHT)
    burst = tuple(3e-6 if i % 2 else 2 * gap for i, gap in enumerate(load.itl_s))
    finding = the_finding("load_clocks", with_load(AT_EIGHT, itl_s=burst), fake.ok(cell("online"), FULL))
    assert finding.severity == "warning"
    assert "vllm: in 1 of 2 loads more than 10% of the gaps between tokens are below 50 µs, 50% at" in finding.message


def test_no_more_requests_are_in_flight_than_were_allowed() -> None:
    """64 requests of 0.292 s each in 1.5 s are 12.5 at a time, and 8 were allowed."""
    result = with_load(AT_EIGHT, duration_s=1.5)
    assert "42.67 requests/s × 0.292 s = 12.46 requests in flight, and 8 were allowed" in refuted("little", result)
    assert guards_load.concurrency(fake.load(AT_EIGHT)) == pytest.approx(8.0)


def test_requests_cannot_have_arrived_faster_than_they_were_sent() -> None:
    """63 gaps of 0.5 s; four deviations of a Poisson process of 63 are 50 %."""
    result = with_load(cell("online", request_rate="2"), duration_s=10.0)
    message = refuted("rates", result)
    assert "64 requests in 10 s, and at 2 a second they cannot have arrived in less than 15.63 s" in message


def test_an_engine_that_does_not_keep_up_is_named_and_its_number_stands() -> None:
    finding = the_finding("rates", *(fake.ok(cell("online", request_rate=rate), FULL) for rate in ("2", "8", "16")))
    assert (finding.severity, finding.cell_id) == ("note", None)
    assert finding.message.startswith("vllm does not keep up with 16/s: ")


def test_keeping_up_is_finishing_one_latency_after_the_last_arrival() -> None:
    def load(**changes: Any) -> Load:
        return fake.load(cell("online", request_rate="8"), **changes)

    # 63 / 8 + 0.292 s
    assert guards_load.kept_up(load(duration_s=8.167)) is True
    assert guards_load.kept_up(load(duration_s=8.167 / 0.94)) is False
    assert guards_load.kept_up(load(request_rate=None)) is None


# ---------------------------------------------------------------------------------------------------------- physics


def scaled(result: Result, factor: float) -> Result:
    measurements = tuple(
        m.model_copy(update={"samples_s": tuple(factor * s for s in m.samples_s)}) for m in result.measurements
    )
    return result.model_copy(update={"measurements": measurements})


def test_several_gpus_have_the_bandwidth_and_arithmetic_of_all() -> None:
    """A step reads 15 GB: 3.2 ms on one H200, 0.4 ms on eight."""
    on_one, on_eight = (
        fake.ok(cell("static_batch", output_len=1024, batch=4, tensor_parallel=count), FULL) for count in (1, 8)
    )
    # 16 and 4 ms a step
    assert findings("roofline", on_one, on_eight) == []
    assert findings("roofline", scaled(on_eight, 0.5)) == []
    too_fast = [finding.message for finding in findings("roofline", scaled(on_one, 0.125))]
    assert any("decode_latency: 2.00 ms is less than the bound" in message for message in too_fast)
    assert any("/ 38400 GB/s" in finding.message for finding in findings("roofline", scaled(on_eight, 0.05)))


def test_weights_are_read_once_a_prefill_and_once_a_step() -> None:
    batch = cell("static_batch", output_len=1024)
    assert [passes(batch, name) for name in ("prefill_latency", "decode_latency", "e2e_latency")] == [1, 1, 1024]
    assert [passes(cell("online"), name) for name in ("ttft", "e2e_latency", "duration")] == [1, 9, 9]
    assert passes(cell("offline"), "e2e_latency") == 256


def test_the_scatter_of_a_load_is_no_unsteady_measurement() -> None:
    load = cell("online", request_rate="16")
    assert findings("spread", fake.ok(load, FULL)) == []
    unsteady = fake.ok(cell("offline"), FULL)
    measurement = unsteady.measurements[0].model_copy(update={"samples_s": (1.0, 2.0, 3.0)})
    assert findings("spread", unsteady.model_copy(update={"measurements": (measurement,)}))
