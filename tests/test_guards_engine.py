"""Guards of engine cells: silent on an honest run; each speaks, with its arithmetic, on the fault it is there for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

import fake_engine_run as fake
from small_runs import environment
from smbench import arch, recipe, resources
from smbench.analysis import analyse, summaries_of
from smbench.arch import Device
from smbench.cell import Cell
from smbench.findings import Evidence, Finding
from smbench.guards import GUARDS
from smbench.guards_engine import ALIKE, alike
from smbench.result import OutputCheck, Result, Session

RECIPE = recipe.parse(fake.RECIPE, "gptq.toml")
FULL = RECIPE.profile["full"]
CELLS = [cell for cell in RECIPE.cells("full") if cell.axes["scheduling"] != "v0-default"]
SESSION = Session(
    started_at="2026-01-02T03:04:05Z", wall_s=1.0, worker_start_s=1.0, workers=1, results=100, ended="finished"
)


def card(name: str = "NVIDIA H200") -> Device:
    found = arch.load(resources.archs_file()).device_named(name)
    assert found
    return found


def cell(provider: str = "vllm-marlin", **axes: int | str) -> Cell:
    return next(c for c in CELLS if c.provider == provider and all(c.axes[k] == v for k, v in axes.items()))


def findings(guard: str, *results: Result, device: Device | None = None) -> list[Finding]:
    seen = Evidence(RECIPE, device or card(), results, summaries_of(results), [environment()], [SESSION])
    return list(GUARDS[guard](seen))


def the_finding(guard: str, *results: Result, device: Device | None = None) -> Finding:
    (finding,) = findings(guard, *results, device=device)
    assert finding.guard == guard
    assert finding.remedy
    return finding


def changed(result: Result, index: int, **request: Any) -> Result:
    """The result with one of its requests otherwise."""
    assert result.serving
    requests = list(result.serving.requests)
    requests[index] = requests[index].model_copy(update=request)
    serving = result.serving.model_copy(update={"requests": tuple(requests)})
    return result.model_copy(update={"serving": serving})


def test_an_honest_run_has_no_finding_of_any_guard() -> None:
    results = [fake.ok(c, FULL) for c in CELLS if c.provider != "sglang"]
    seen = Evidence(RECIPE, card(), results, summaries_of(results), [environment()], [SESSION])
    assert [finding for guard in GUARDS.values() for finding in guard(seen)] == []


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({"prompt_tokens": 7998}, "request 3: a prompt of 7998 tokens, not 8000"),
        ({"completion_tokens": 320}, "request 3: 320 tokens generated, not 512"),
        ({"finish_reason": "stop"}, "request 3: it ended by 'stop', not 'length'"),
    ],
)
def test_tokens_refutes_a_cell_with_one_request_that_was_not_as_asked(request_: Mapping[str, Any], said: str) -> None:
    result = changed(fake.ok(cell(output_len=512), FULL), 3, **request_)
    finding = the_finding("tokens", result)
    assert (finding.severity, finding.cell_id) == ("refuted", result.cell_id)
    assert "1 of 11 requests are not what was asked" in finding.message
    assert said in finding.message


def test_tokens_refutes_the_cell_so_that_no_number_of_it_is_shown() -> None:
    result = changed(fake.ok(cell(output_len=512), FULL), 0, completion_tokens=320)
    analysis = analyse(RECIPE, "full", [result.cell], {result.cell_id: result}, [environment()], [SESSION], card())
    row = analysis.rows[0]
    assert (row.status, row.summaries) == ("invalid", {})
    assert row.reason and row.reason.startswith("tokens: ")


def test_prefix_cache_refutes_a_hit_and_notes_an_engine_that_does_not_say() -> None:
    hit = changed(fake.ok(cell(), FULL), 4, cached_tokens=7984)
    finding = the_finding("prefix_cache", hit)
    assert finding.severity == "refuted"
    assert "1 of 11 requests" in finding.message and "7984 of 88000 = 9.1%" in finding.message
    silent = fake.ok(cell(), FULL, requests=fake.requests(cell(), 11, cached_tokens=None))
    finding = the_finding("prefix_cache", silent, fake.ok(cell("vllm-exllama"), FULL))
    assert finding.severity == "note"
    assert finding.message.startswith("vllm-marlin: in 1 of 1 cells")


@pytest.mark.parametrize(
    ("linear", "ran"),
    [
        ({"MarlinLinearKernel": 256}, "MarlinLinearKernel in 256 layers"),
        ({"ExllamaLinearKernel": 255, "MarlinLinearKernel": 1}, "ExllamaLinearKernel in 255 layers, Marlin"),
        ({"UnquantizedLinearMethod": 257}, "UnquantizedLinearMethod in 257 layers"),
        ({}, "the engine reports nothing of the kind"),
    ],
)
def test_selection_refutes_a_kernel_that_is_not_the_promised_one(linear: Mapping[str, int], ran: str) -> None:
    result = fake.ok(cell("vllm-exllama"), FULL, kernels={"linear": linear, "attention": {"FLASH_ATTN": 64}})
    finding = the_finding("selection", result)
    assert (finding.severity, finding.cell_id) == ("refuted", result.cell_id)
    assert "promised ExllamaLinearKernel for all linear layers" in finding.message
    assert ran in finding.message


def test_selection_leaves_an_engine_alone_that_promises_no_kernel() -> None:
    assert findings("selection", fake.ok(cell("sglang"), FULL, kernels={})) == []


@pytest.mark.parametrize(
    ("asked", "reported", "fine"),
    [
        ("flash-attention", {"FLASH_ATTN": 64}, True),
        ("flash-attention", {"FlashAttentionBackend": 64}, True),
        ("flash-attention", {"fa3": 64}, True),
        ("flashinfer", {"FLASHINFER": 64}, True),
        ("flashinfer", {"FlashInferAttnBackend": 64}, True),
        ("flashinfer", {"FLASH_ATTN": 64}, False),
        ("flash-attention", {"FLASHINFER": 64}, False),
        ("flash-attention", {"FLASH_ATTN": 63, "TRITON_ATTN": 1}, False),
        ("flash-attention", {}, False),
    ],
)
def test_selection_holds_attention_to_what_the_cell_asks(asked: str, reported: Mapping[str, int], fine: bool) -> None:
    result = fake.ok(
        cell(attention=asked), FULL, kernels={"linear": {"MarlinLinearKernel": 256}, "attention": reported}
    )
    found = findings("selection", result)
    assert not found if fine else f"asked for attention {asked}" in found[0].message


def test_any_attention_will_do_where_none_was_asked() -> None:
    kernels = {"linear": {"MarlinLinearKernel": 256}, "attention": {"SOMETHING_NEW": 64}}
    assert findings("selection", fake.ok(cell(attention="default"), FULL, kernels=kernels)) == []


def sped_up(result: Result, measure: str, factor: float) -> Result:
    """The result with the times of one measurement divided."""
    measurements = tuple(
        m.model_copy(update={"samples_s": tuple(s / factor for s in m.samples_s)}) if m.name == measure else m
        for m in result.measurements
    )
    return result.model_copy(update={"measurements": measurements})


def test_roofline_holds_each_measurement_to_its_own_work() -> None:
    # 19.93 GB in a step, 0.06 of them perhaps in the L2: 4.1 ms at 4.8 TB/s, and the fake takes 8.3
    result = fake.ok(cell(output_len=512, attention="default"), FULL)
    assert findings("roofline", result) == []
    assert findings("roofline", sped_up(result, "tpot", 1.9)) == []
    finding = the_finding("roofline", sped_up(result, "tpot", 2.2))
    assert finding.severity == "refuted"
    assert "tpot: 3.77 ms is less than the bound 4.14 ms = 19.87 GB / 4800 GB/s" in finding.message
    # a prefill is bound by its 541 TFLOP, at the clock that ran
    finding = the_finding("roofline", sped_up(fake.ok(cell(chunk_tokens=1024, output_len=16), FULL), "ttft", 5.0))
    assert "= 541.23 TFLOP / 1070 TFLOP/s" in finding.message


def test_roofline_would_have_refuted_the_documents_fastest_row() -> None:
    # 10.41 s for 8000 + 512 tokens on an L40
    row = fake.ok(cell(output_len=512, chunk_tokens=1024, attention="default"), FULL).model_copy(
        update={"telemetry": {}}
    )
    (e2e,) = (m for m in row.measurements if m.name == "e2e_latency")
    measured = row.model_copy(update={"measurements": (e2e.model_copy(update={"samples_s": (10.41,)}),)})
    finding = the_finding("roofline", measured, device=card("NVIDIA L40"))
    assert "10410.00 ms is less than the bound" in finding.message


def test_roofline_leaves_a_tiny_model_what_the_cache_can_hold() -> None:
    # 3.5 MB of weights stay in 60 MB of L2, however often they are read
    tiny = cell(chunk_tokens=32, output_len=16).model_copy(
        update={"axes": {**cell(chunk_tokens=32, output_len=16).axes, "model": "synthetic:tiny"}}
    )
    result = fake.ok(Cell.model_validate(tiny.model_dump()), FULL)
    assert findings("roofline", sped_up(result, "tpot", 5000.0)) == []


def test_a_kernel_that_sums_in_float16_may_be_twice_as_fast() -> None:
    def prefill(provider: str) -> Result:
        result = fake.ok(cell(provider, chunk_tokens=1024, output_len=16), FULL)
        (ttft,) = (m for m in result.measurements if m.name == "ttft")
        faster = ttft.model_copy(update={"samples_s": (2.2,) * 3})
        return result.model_copy(update={"telemetry": {}, "measurements": (faster,)})

    # 541 TFLOP at 165 TFLOP/s take 3.3 s
    four_thousand_ninety = card("NVIDIA GeForce RTX 4090")
    assert findings("roofline", prefill("vllm-exllama"), device=four_thousand_ninety) == []
    assert len(findings("roofline", prefill("vllm-marlin"), device=four_thousand_ninety)) == 1


def test_an_unknown_card_is_said_to_be_unknown_though_engines_are_timed_by_the_host() -> None:
    results = [fake.ok(cell(), FULL)]

    def notes(name: str | None) -> list[str]:
        where = [environment(gpu={"name": name} if name else {})]
        seen = Evidence(RECIPE, None, results, summaries_of(results), where, [SESSION])
        return [finding.severity for finding in GUARDS["roofline"](seen)]

    assert notes("NVIDIA X9000") == ["note"]
    assert notes(None) == []


def test_outputs_names_what_differed_once() -> None:
    check = OutputCheck(
        passed=False,
        reference="transformers, dequantized weights, float32",
        tokens=64,
        equal_tokens=40,
        logprob_error=1.5,
        logprob_bound=0.05,
        faults=("token 7 of request 1 is 12, not 903",),
    )
    c = cell()
    result = fake.result(c, "incorrect", "outputs differ", serving=fake.serving(c, fake.requests(c, 11), output=check))
    finding = the_finding("outputs", result)
    assert finding.severity == "refuted"
    assert "40 of 64 tokens equal those of transformers" in finding.message
    assert "1.5 nats, at most 0.05 allowed: token 7 of request 1" in finding.message
    assert findings("correctness", result) == []


def test_an_incorrect_cell_without_a_comparison_is_still_named() -> None:
    result = fake.result(cell(), "incorrect", "not a number in the logits")
    assert the_finding("correctness", result).cell_id == result.cell_id


def test_settings_warns_of_what_should_be_alike_and_is_not() -> None:
    finding = the_finding("settings", fake.ok(cell(), FULL), fake.ok(cell("sglang"), FULL))
    assert finding.severity == "warning"
    assert finding.message == (
        "context limit is not the same in all engines at 1 of 1 points: 9000: vllm-marlin; 9004: sglang"
    )


@pytest.mark.parametrize(
    ("change", "quantity"),
    [
        ({"disable_radix_cache": False}, "prefix caching"),
        ({"max_running_requests": 8}, "most sequences"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"kv_cache_dtype": "fp8_e5m2"}, "KV cache dtype"),
    ],
)
def test_settings_knows_every_quantity_under_both_engines_names(change: Mapping[str, Any], quantity: str) -> None:
    settings = {**fake.settings_of(cell("sglang")), "context_length": 9000}
    same = fake.ok(cell("sglang"), FULL, settings=settings)
    assert findings("settings", fake.ok(cell(), FULL), same) == []
    other = fake.ok(cell("sglang"), FULL, settings={**settings, **change})
    said = [finding.message for finding in findings("settings", fake.ok(cell(), FULL), other)]
    assert any(message.startswith(f"{quantity} is not the same") for message in said)


def test_settings_of_unlike_points_may_differ() -> None:
    def with_dtype(provider: str, dtype: str) -> Result:
        there = cell(provider)
        return fake.ok(Cell.model_validate({**there.model_dump(), "axes": {**there.axes, "dtype": dtype}}), FULL)

    both = [with_dtype(provider, dtype) for provider in ("vllm-marlin", "vllm-exllama") for dtype in DTYPES]
    assert findings("settings", *both) == []


DTYPES = ("float16", "bfloat16")


def test_unlike_software_of_engines_is_a_note_and_an_unlike_machine_a_warning() -> None:
    def found(*environments: Mapping[str, Any]) -> list[tuple[str, str]]:
        records = [environment(str(i), **facts) for i, facts in enumerate(environments)]
        seen = Evidence(RECIPE, card(), [], {}, records, [SESSION])
        return [(finding.severity, finding.message) for finding in GUARDS["environment"](seen)]

    vllm = {"libraries": {"torch": "2.11.0", "vllm": "0.26.0"}, "gpu": {"name": "A", "driver": "1"}}
    sglang = {"libraries": {"torch": "2.14.1", "sglang": "0.5.23"}, "gpu": {"name": "A", "driver": "1"}}
    ((severity, message),) = found(vllm, sglang)
    assert severity == "note"
    assert "libraries.torch: 2.11.0 | 2.14.1" in message
    severities = [severity for severity, _ in found(vllm, {**sglang, "gpu": {"name": "A", "driver": "2"}})]
    assert severities == ["note", "warning"]


def test_an_engine_without_a_setting_is_not_called_different() -> None:
    assert set(alike({"threads": 2}).values()) == {None}
    assert alike({"threads": 2}).keys() == ALIKE.keys()
    bare = fake.ok(cell("sglang"), FULL, settings={"threads": 2})
    assert findings("settings", fake.ok(cell(), FULL), bare) == []


@pytest.mark.parametrize("guard", ["tokens", "prefix_cache", "selection", "settings"])
def test_cells_without_a_number_are_left_to_their_status(guard: str) -> None:
    broken: Sequence[Callable[[Cell], Result]] = [
        lambda c: fake.result(c, "crashed", "died", serving=fake.serving(c, ())),
        lambda c: fake.result(c, "oom", "CUDA out of memory"),
    ]
    assert [finding for make in broken for finding in findings(guard, make(cell()))] == []
