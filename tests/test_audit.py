"""The audit finds what is planted and what is known of the documents, and nothing in honest numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import fake_run
from clean_published import CARD, KINDS, honest
from smbench import audit, audit_report
from smbench.arch import Device
from smbench.cell import Cell
from smbench.cli import app
from smbench.errors import UsageError
from smbench.guards import Finding
from smbench.observations import of_published
from smbench.published import Published
from smbench.recipe import Profile
from smbench.result import Result

ROOT = Path(__file__).resolve().parent.parent
RULE_FILES = ("audit.py", "audit_bounds.py", "audit_patterns.py", "audit_statements.py", "observations.py")


def examine(data: dict[str, Any], device: Device | None = CARD) -> list[Finding]:
    return audit.examine(of_published("made up", Published.model_validate(data), device))


def the_finding(data: dict[str, Any], rule: str, device: Device | None = CARD) -> Finding:
    """The one finding of a file, which the rule made."""
    (finding,) = examine(data, device)
    assert finding.guard == rule
    assert finding.remedy
    return finding


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 2**32))
@settings(max_examples=15, deadline=None)
def test_honest_numbers_give_no_finding(kind: str, seed: int) -> None:
    assert examine(honest(kind, seed)) == []


def test_too_fast_a_request_is_refuted_with_its_arithmetic() -> None:
    data = honest("requests")
    data["table"][1]["rows"][1] = ["graphs", 9.0]
    finding = the_finding(data, "physics")
    assert finding.severity == "refuted"
    # 16 GB of weights and 16 G * 8 * 8000 operations on a card of 1 TB/s and 100 TFLOP/s; the L2 may hold 50 MB
    assert (
        "decoding: method=graphs: 9 s is impossible on Test card: at least 18.42 s = prefill 10.24 s "
        "(1024 TFLOP / 100 TFLOP/s) + 511 × decode step 16 ms (16 GB / 1 TB/s)"
    ) in finding.message


def test_an_inferred_device_refutes_nothing() -> None:
    data = honest("requests") | {"device_basis": "inferred"}
    data["table"][1]["rows"][1] = ["graphs", 9.0]
    severities = {finding.guard: finding.severity for finding in examine(data)}
    assert severities == {"physics": "warning", "unstated": "note"}


def test_a_bound_needs_the_peak_of_the_very_precision() -> None:
    data = honest("requests")
    data["table"][1]["rows"][1] = ["graphs", 9.0]
    data["work"][0]["accumulate"] = "float16"
    # 511 steps of 16 GB alone are less than 9 s, and the card's float16 peak is unknown
    assert examine(data) == []


def test_an_unknown_device_is_a_note() -> None:
    finding = the_finding(honest("requests"), "physics", None)
    assert (finding.severity, "held against no bound" in finding.message) == ("note", True)


def test_a_copied_column_is_found_with_its_chance() -> None:
    data = honest("requests")
    prefills, decoding = data["table"]
    decoding["rows"] = [[f"method {i}", row[2]] for i, row in enumerate(prefills["rows"][:4])]
    decoding |= {"effective": {}, "at": {**decoding["at"], "output_len": 16}}
    finding = the_finding(data, "copied")
    assert finding.severity == "warning"
    assert "4 numbers in a row" in finding.message
    assert re.search(r"36 places × \S+\^4 = \S+ such runs", finding.message)


def test_a_copy_that_chance_explains_is_not_called_one() -> None:
    data = honest("requests")
    prefills, decoding = data["table"]
    # one digit: the numbers of any two engines agree often
    for table in (prefills, decoding):
        for column in table["columns"]:
            column["digits"] = 0
    prefills["rows"] = [[chunk, 20, 20, 21] for chunk in (1024, 512, 256, 128)]
    prefills["rows"] += [[64, 22, 22, 22], [32, 24, 24, 24]]
    decoding["rows"] = [["eager", 50], ["graphs", 40], ["other kernel", 45]]
    assert "copied" not in {finding.guard for finding in examine(data)}


def test_two_labels_of_one_configuration_are_found() -> None:
    data = honest("requests")
    decoding = data["table"][1]
    decoding["rows"][2][1] = decoding["rows"][0][1]
    decoding["effective"]["other kernel"] = decoding["effective"]["eager"]
    finding = the_finding(data, "one_configuration")
    assert finding.severity == "warning"
    assert "'eager' and 'other kernel' are one configuration (mode=eager), and both read" in finding.message


def test_equal_numbers_of_labels_with_unknown_settings_are_a_note() -> None:
    data = honest("requests")
    decoding = data["table"][1]
    decoding["effective"] = {}
    decoding["rows"][2][1] = decoding["rows"][0][1]
    finding = the_finding(data, "one_configuration")
    assert (finding.severity, "by chance one expects" in finding.message) == ("note", True)


def ignore_cached(data: dict[str, Any]) -> None:
    for table in data["table"]:
        first: dict[int, float] = {}
        for row in table["rows"]:
            row[2] = first.setdefault(row[1], row[2])


def test_a_time_that_ignores_the_cached_tokens_is_refuted() -> None:
    data = honest("histories")
    for table in data["table"]:
        # slow enough for the largest total, so that no bound is broken
        table["rows"] = [[total, new, 10 * value] for total, new, value in sorted(table["rows"])]
    ignore_cached(data)
    data["work"][0]["phases"][0]["flops"] = "batch * 2e6 * (new * 200 + new * total)"
    found = [finding for finding in examine(data) if finding.guard == "sensitivity"]
    assert [finding.severity for finding in found] == ["refuted", "refuted"]
    assert "b1: the time does not depend on total: at new=" in found[0].message


def test_without_a_device_ignored_input_is_a_warning() -> None:
    data = honest("histories")
    ignore_cached(data)
    found = {finding.guard: finding.severity for finding in examine(data, None)}
    assert found == {"physics": "note", "sensitivity": "warning"}


def test_a_load_that_stays_below_the_limit_exercises_nothing() -> None:
    data = honest("histories")
    data["facts"]["users"] = 16
    finding = the_finding(data, "exercised")
    assert finding.severity == "warning"
    assert "users * 2048 = 32768 tokens does not exceed pool_tokens = 32768 tokens (it fills)" in finding.message


def test_a_false_claim_is_refuted_and_a_partly_false_one_is_a_warning() -> None:
    data = honest("histories")
    data["expectation"][0]["low"] = 200.0
    assert [(f.guard, f.severity) for f in examine(data)] == [("expectations", "refuted")] * 2
    data = honest("blocks")
    data["table"][1]["rows"][0][1] *= 1.5
    data["table"][1]["rows"][0][1] = round(data["table"][1]["rows"][0][1], 6)
    finding = the_finding(data, "expectations")
    assert (finding.severity, "fails at 1 of 12 points" in finding.message) == ("note", True)
    data["expectation"][0]["stated"] = True
    assert the_finding(data, "expectations").severity == "warning"


def test_a_wrong_definition_is_refuted_and_an_unstated_one_named() -> None:
    data = honest("log")
    overall = data["table"][0]["columns"][1]
    overall["definition"] = "output tokens"
    finding = the_finding(data, "conventions")
    assert finding.severity == "refuted"
    assert (
        "all 6 figures are input and output tokens = (input_len + output_len) * batch / e2e_latency" in finding.message
    )
    assert "the document says output tokens" in finding.message
    del overall["definition"]
    assert the_finding(data, "conventions").severity == "warning"


def test_a_rate_that_nothing_reproduces_is_found() -> None:
    data = honest("log")
    data["table"][0]["rows"][3][4] = 17.0
    finding = the_finding(data, "conventions")
    assert "no known definition reproduces all 6 figures" in finding.message


def test_what_changes_along_with_the_studied_axis_is_named() -> None:
    data = honest("blocks")
    data["quantity"][0]["formula"] = "pool_tokens * block * 256"
    finding = the_finding(data, "confounded")
    assert (
        "along block (1 to 32) not only block changes, but also pool: 16.78 MB to 536.9 MB at every point "
        "(beyond the 50 MB of l2 at 4, 8, 16, 32 only)"
    ) in finding.message


def test_missing_cells_are_counted_and_inapplicable_ones_are_not() -> None:
    data = honest("blocks")
    for row in data["table"][0]["rows"][:5]:
        row[2] = "blank"
    finding = the_finding(data, "missing")
    assert finding.message == "table, seq_len=1024: 5 of 6 cells have no number: left blank"


def test_parameters_tuned_for_another_problem_are_named() -> None:
    data = honest("kernels")
    data["tuned"][0]["at"] = {"rank": 64}
    finding = the_finding(data, "tuned")
    assert "192 of 192 numbers of config=tuned use parameters searched at rank=64" in finding.message


def test_a_setting_that_was_not_applied_everywhere_is_found() -> None:
    data = honest("kernels")
    default, tuned = data["table"]
    for one, other in zip(default["rows"], tuned["rows"], strict=True):
        if one[0] == 8:
            other[2] = one[2] * 1.001
    finding = the_finding(data, "effect")
    assert "config default and tuned do not differ in the median at batch 8, and do elsewhere" in finding.message


def test_rates_above_the_memorys_need_a_warm_cache() -> None:
    data = honest("kernels")
    data["protocol"]["l2"] = "warm"
    for table in data["table"]:
        table["rows"] = [[*row[:2], row[2] / 3, row[3]] if row[0] * row[1] < 10 else row for row in table["rows"]]
    found = {finding.guard: finding for finding in examine(data) if finding.guard != "shape"}
    assert set(found) == {"cache_rates"}
    assert found["cache_rates"].severity == "note"
    data["protocol"]["l2"] = "cold"
    assert {finding.severity for finding in examine(data) if finding.guard == "physics"} == {"refuted"}


def twice(data: dict[str, Any]) -> None:
    table = data["table"][0]
    rows = [[row[0], round(row[1] * 1.2, 6), row[2]] for row in table["rows"]]
    data["table"].append({**table, "title": "again", "rows": rows})


def step_back(data: dict[str, Any]) -> None:
    data["table"][0]["rows"][1][3] *= 0.5


def stand_apart(data: dict[str, Any]) -> None:
    data["work"], data["expectation"] = [], []
    for i, row in enumerate(data["table"][0]["rows"]):
        row[1] = 3.0 if i == 2 else 1.0 + i / 100


def code_differs(data: dict[str, Any]) -> None:
    data["settings"] = [{**data["settings"][0], "found": {"layers": "63"}}]


def silent(data: dict[str, Any]) -> None:
    data["protocol"] = {**data["protocol"], "statistic": "unstated"}
    data["inferred"] = {"statistic": "mean"}


@pytest.mark.parametrize(
    ("kind", "plant", "rule", "severity", "said"),
    [
        ("blocks", twice, "agreement", "warning", "6 points stand in table and in again and differ by 20.0% to 20.0%"),
        (
            "blocks",
            stand_apart,
            "shape",
            "note",
            "1 of 12 numbers stand apart from others that agree; the farthest: table",
        ),
        ("log", code_differs, "settings", "warning", "layers is stated as 64, and 63 in the source's code"),
        ("log", silent, "unstated", "note", "the document does not state: statistic (inferred: mean)"),
    ],
)
def test_a_planted_oddity_is_the_only_finding(
    kind: str, plant: Callable[[dict[str, Any]], None], rule: str, severity: str, said: str
) -> None:
    data = honest(kind)
    # its own dictionaries: the head of all kinds is shared
    data["protocol"] = dict(data["protocol"])
    plant(data)
    finding = the_finding(data, rule)
    assert finding.severity == severity
    assert said in finding.message


def test_a_curve_that_turns_back_is_a_note() -> None:
    data = honest("kernels")
    data["work"] = []
    data["table"][0]["rows"][1][3] *= 0.4
    assert {(f.guard, f.severity) for f in examine(data)} == {("shape", "note")}


def found(name: str) -> dict[str, list[Finding]]:
    (entry,) = audit_report.examine([name], only_published=True)
    rules: dict[str, list[Finding]] = {}
    for finding in entry.findings:
        rules.setdefault(finding.guard, []).append(finding)
    return rules


def test_the_impossible_rows_of_the_l40_and_nothing_of_the_4090() -> None:
    rules = found("gptq-l40")
    impossible = [finding.message.split(" is impossible")[0] for finding in rules["physics"]]
    assert {finding.severity for finding in rules["physics"]} == {"refuted"}
    assert "decoding: method=sglang 0.4.0.post2: 10.41 s" in impossible
    assert "prefills, chunked: chunk_tokens=1024, provider=sglang: 2.33 s" in impossible
    # Exllama sums in float16, at a rate that no datasheet of this card states: nothing is refuted there
    assert not [text for text in impossible if "provider=vllm-gptq:" in text]
    by_bytes = next(finding.message for finding in rules["physics"] if "10.41" in finding.message)
    assert "511 × decode step 22.95 ms (19.83 GB / 864 GB/s)" in by_bytes
    assert "prefill 2.989 s (541.2 TFLOP / 181.1 TFLOP/s)" in by_bytes
    assert "physics" not in found("gptq-rtx4090")


def test_the_copied_column_and_the_single_configuration_of_the_l40() -> None:
    rules = found("gptq-l40")
    (copied,) = rules["copied"]
    assert "4 numbers in a row (2.33 s, 2.35 s, 2.49 s, 2.79 s)" in copied.message
    assert "provider=sglang" in copied.message and "prefills, default scheduler" in copied.message
    (single,) = rules["one_configuration"]
    assert "gptq_marlin + enforce_eager' and 'vllm default scheduler + gptq + enforce_eager'" in single.message
    assert "both read 16.07 s" in single.message


def test_the_ignored_cache_and_the_unmeasured_offload_of_the_l20() -> None:
    rules = found("hstu-inference-l20")
    ignored = {finding.message.split(": ")[0]: finding.severity for finding in rules["sensitivity"]}
    # the corrected values of the same plots are not among them
    assert ignored == {"block, batch 1": "refuted", "block, batch 8": "refuted"}
    assert [finding.message.split(" is ")[0] for finding in rules["exercised"]] == [
        "eviction from the pool",
        "offload to the host",
    ]
    assert (
        "users * longest_history_tokens = 65536 tokens does not exceed pool_tokens = 327680"
        in rules["exercised"][0].message
    )
    (claim, *_) = [finding for finding in rules["expectations"] if finding.severity == "refuted"]
    assert "5 to 10 times" in claim.message and "corrected" in claim.message and "= 2.31" in claim.message
    (later,) = found("hstu-inference-b200")["sensitivity"]
    assert (later.severity, "block, batch 8" in later.message) == ("warning", True)


def test_the_convention_of_the_one_batch_benchmark() -> None:
    (finding,) = found("sglang-one-batch")["conventions"]
    assert "all 9 figures are input and output tokens" in finding.message
    assert "the document does not say what it counts" in finding.message


def test_the_gaps_and_the_confounders_of_the_block_sizes() -> None:
    rules = found("paged-attention-a100")
    assert "batch=32: 6 of 6 cells have no number" in " ".join(finding.message for finding in rules["missing"])
    assert len(rules["missing"]) == 4
    touched, repeated, pool = rules["confounded"]
    assert "4.118 MB to 15.78 MB at batch=1, seq_len=4096 (within the 41.94 MB of l2)" in touched.message
    assert (
        "4.194 MB to 52.83 MB at seq_len=1024, batch=16 (beyond the 41.94 MB of l2 at 16, 32 only)" in touched.message
    )
    assert "share of block visits" in repeated.message
    assert "4.194 MB to 134.2 MB" in pool.message
    slower = [finding.message for finding in rules["expectations"]]
    assert any("332.5 µs / 611.9 µs = 0.543" in message for message in slower)


def test_the_defects_of_the_lora_numbers_that_data_can_show() -> None:
    rules = found("lora-rtx3090")
    assert "768 of 768 numbers" in rules["tuned"][0].message
    assert "the last adapter is never exercised" in rules["exercised"][0].message
    assert "54 of 5544 numbers imply more than the 936 GB/s" in rules["cache_rates"][0].message
    assert "fails at 179 of 384 points" in rules["expectations"][0].message
    assert not [f for findings in rules.values() for f in findings if f.severity == "refuted"]


def test_no_rule_knows_a_document() -> None:
    """What the rules find, they find by rule: no name, device, axis or value of a document is in their code."""
    code = "".join((ROOT / "bench" / "smbench" / name).read_text(encoding="utf-8") for name in RULE_FILES)
    words = {"L40", "L20", "A100", "gptq", "sglang", "hstu", "punica", "chunk_tokens", "block_size", "16.07", "overall"}
    assert [word for word in sorted(words) if word in code] == []


def test_the_command_prints_findings_and_fails_where_something_is_refuted() -> None:
    clean = CliRunner().invoke(app, ["audit", "--published", "gptq-rtx4090"])
    assert clean.exit_code == 0
    assert "| gptq-rtx4090 | published | NVIDIA GeForce RTX 4090 | 21 | 0 |" in clean.output
    refuted = CliRunner().invoke(app, ["audit", "gptq-l40", "published:sglang-one-batch", "--json"])
    assert refuted.exit_code == 1
    answer = json.loads(refuted.output)
    assert (answer["format"], answer["refuted"]) == (1, True)
    assert [entry["name"] for entry in answer["audited"]] == ["gptq-l40", "sglang-one-batch"]
    assert answer["audited"][0]["counts"]["refuted"] == 11


def test_all_published_files_are_audited_at_once() -> None:
    audited = audit_report.examine([], only_published=True)
    assert len(audited) == 8
    text = audit_report.render(audited)
    # every finding whole, whatever its length
    for entry in audited:
        assert text.count("more characters") == 0
        assert f"## {entry.dataset.name}: " in text


def measured(folder: Path, outcome: Callable[[Cell, Profile], Result | None]) -> list[Finding]:
    fake_run.build(folder, fake_run.RECIPE, "full", outcome)
    (entry,) = audit_report.examine([str(folder)], only_published=False)
    assert entry.kind == "measured"
    return list(entry.findings)


def test_a_clean_run_has_no_finding(tmp_path: Path) -> None:
    assert measured(tmp_path / "run", fake_run.ok) == []


def test_a_run_is_audited_by_guards_and_rules(tmp_path: Path) -> None:
    def ignorant(cell: Cell, profile: Profile) -> Result:
        """One provider takes the same time whatever the batch."""
        if cell.provider == "sglang":
            one = Cell.model_validate(cell.model_dump() | {"axes": {**cell.axes, "batch": 1}})
            times = {m.name: m for m in fake_run.ok(one, profile).measurements}
            result = fake_run.ok(cell, profile)
            slow = [m.model_copy(update={"samples_s": times[m.name].samples_s}) for m in result.measurements]
            return result.model_copy(update={"measurements": tuple(slow)})
        return fake_run.ok(cell, profile)

    rules = {(finding.guard, finding.severity) for finding in measured(tmp_path / "run", ignorant)}
    assert ("sensitivity", "refuted") in rules
    assert {guard for guard, _ in rules} <= {"sensitivity", "roofline", "cache_rates"}


def test_the_cells_of_a_run_without_a_number_are_gaps(tmp_path: Path) -> None:
    findings = measured(tmp_path / "run", fake_run.unfinished)
    assert any(finding.guard == "missing" and "status skipped" in finding.message for finding in findings)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "name a run folder, a bundle or published numbers"),
        (["nothing-here"], "nothing-here is no run folder, no bundle and no published numbers; known: gptq-l40"),
        (["--published", "gptq-l41"], "did you mean 'gptq-l40'"),
    ],
)
def test_a_wrong_call_says_what_is_right(arguments: list[str], complaint: str) -> None:
    result = CliRunner().invoke(app, ["audit", *arguments])
    assert isinstance(result.exception, UsageError)
    assert complaint in str(result.exception)
