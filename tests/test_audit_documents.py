"""What the audit finds in the five documents and in runs, and how the command tells it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

import fake_run
from smbench import audit_report
from smbench.cell import Cell
from smbench.cli import app
from smbench.errors import UsageError
from smbench.guards import Finding
from smbench.recipe import Profile
from smbench.result import Result

ROOT = Path(__file__).resolve().parent.parent
RULE_FILES = ("audit.py", "audit_bounds.py", "audit_patterns.py", "audit_statements.py", "observations.py")


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
