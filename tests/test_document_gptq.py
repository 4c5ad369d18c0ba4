"""What a reader of document 002's report can rely on: its numbers, its verdicts, and that they follow from the data."""

from __future__ import annotations

import json
import math
import os
import re
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

import bundles
import fake_engine_run as fake
import fake_run
from rendered_runs import assert_whole_tables
from smbench import __version__, report, runfolder, verify
from smbench.cell import Cell
from smbench.document_gptq import Gptq
from smbench.document_gptq_fit import fit
from smbench.document_gptq_machines import Printed, printed
from smbench.document_gptq_numbers import Interval, split
from smbench.errors import UsageError
from smbench.recipe import Profile
from smbench.result import Result

GOLDEN = Path(__file__).with_name("golden")
UPDATE = "SMBENCH_UPDATE_GOLDEN"

RUNS: Mapping[str, tuple[str, fake.Outcome, Mapping[str, Any], float | None]] = {
    "h200": ("full", fake.on_an_h200, fake.GPU, 2.5),
    "sglang": ("full", fake.with_sglang, fake.GPU, None),
    "cpu": ("cpu", fake.on_a_processor, fake.CPU, None),
    "failed": ("full", fake.nothing_works, {**fake.GPU, "gpu": {"name": fake_run.HOSTILE}}, None),
    "unfinished": ("full", fake.unfinished, fake.GPU, None),
}


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Every fake run, rendered once."""
    found = {}
    for name, (profile, outcome, environment, price) in RUNS.items():
        found[name] = fake.build(tmp_path_factory.mktemp("runs") / name, profile, outcome, [environment], price)
        report.render(found[name])
    return found


def text_of(rendered: Mapping[str, Path], name: str) -> str:
    return (rendered[name] / "report.md").read_text(encoding="utf-8")


def document(folder: Path) -> Gptq:
    found = report.document_of(report.analysis_of(runfolder.load(folder)))
    assert isinstance(found, Gptq)
    return found


def measured(tmp_path: Path, outcome: fake.Outcome) -> Gptq:
    return document(fake.build(tmp_path / "run", "full", outcome))


def part(text: str, heading: str) -> str:
    """What stands under a heading, up to the next one of its level."""
    level = heading.split(" ")[0]
    return text.split(f"\n{heading}\n")[1].split(f"\n{level} ")[0]


# --------------------------------------------------------------------------------------------------- the text as such


@pytest.mark.parametrize("name", RUNS)
def test_text_is_what_was_reviewed(rendered: Mapping[str, Path], name: str) -> None:
    golden = GOLDEN / f"gptq_{name}.md"
    text = text_of(rendered, name).replace(f"- smbench == {__version__}\n", "- smbench == VERSION\n")
    if os.environ.get(UPDATE):
        golden.write_text(text, encoding="utf-8")
    assert text == golden.read_text(encoding="utf-8"), f"{golden.name}: if the change is meant, {UPDATE}=1 rewrites it"


@pytest.mark.parametrize("name", RUNS)
def test_sections_are_the_documents_in_its_order(rendered: Mapping[str, Path], name: str) -> None:
    headings = re.findall(r"^##? (.*)", text_of(rendered, name), re.MULTILINE)
    assert headings[:7] == [
        "gptq speed test",
        "setting",
        "prefills",
        "decoding",
        "conclusion",
        "Situations not tested",
        "Summarize",
    ]


@pytest.mark.parametrize("name", RUNS)
def test_tables_have_equal_columns_and_no_blank_cells(rendered: Mapping[str, Path], name: str) -> None:
    text = text_of(rendered, name)
    assert_whole_tables(text)


@pytest.mark.parametrize("name", RUNS)
def test_foreign_strings_stay_words_and_nothing_undefined_is_printed(rendered: Mapping[str, Path], name: str) -> None:
    text = text_of(rendered, name)
    lenient = MarkdownIt("commonmark", {"html": True}).enable("table")
    inline = [child for token in lenient.parse(text) for child in token.children or [token]]
    assert not [token for token in inline if token.type in ("html_inline", "html_block", "link_open")]
    images = [str(token.attrs["src"]) for token in inline if token.type == "image"]
    assert all(image.startswith("figures/") for image in images)
    assert not re.search(r"\b(nan|inf|None|Undefined|undefined)\b|object at 0x|&#39;", text)


@pytest.mark.parametrize("name", RUNS)
def test_figures_of_the_text_exist_and_no_others(rendered: Mapping[str, Path], name: str) -> None:
    named = set(re.findall(r"\]\((figures/[^)]+)\)", text_of(rendered, name)))
    there = {
        path.relative_to(rendered[name]).as_posix(): path.read_bytes() for path in rendered[name].glob("figures/*")
    }
    assert there.keys() == named
    assert all(data.startswith(b"\x89PNG") and len(data) > 10_000 for data in there.values())
    assert bool(there) == (name != "failed")


def test_equal_folders_render_to_equal_bytes(rendered: Mapping[str, Path], tmp_path: Path) -> None:
    folder = fake.build(tmp_path / "again", "full", fake.with_sglang, [fake.GPU])
    report.render(folder)
    for path in rendered["sglang"].rglob("*"):
        if path.is_file():
            assert (folder / path.relative_to(rendered["sglang"])).read_bytes() == path.read_bytes(), path.name


def test_a_bundle_of_an_engine_run_verifies_though_its_samples_are_not_kept(tmp_path: Path) -> None:
    folder = fake.build(tmp_path / "run", "full", fake.with_sglang, [fake.GPU])
    bundles.true_identities(folder / "results.jsonl")
    found = verify.verify(bundles.packed(folder, tmp_path / "bundle.tar.gz"))
    assert found.unconfirmed == ()


# -------------------------------------------------------------------------------------------------------- its numbers


def test_the_prefill_table_has_the_documents_form_and_statistic(rendered: Mapping[str, Path], tmp_path: Path) -> None:
    lines = part(text_of(rendered, "sglang"), "## prefills").splitlines()
    header = next(i for i, line in enumerate(lines) if line.startswith("| max_num_batched_tokens |"))
    rows = [line.split("|")[1].strip() for line in lines[header + 2 : header + 8]]
    assert rows == ["1024", "512", "256", "128", "64", "32"]
    # the mean of the ten counted requests: the first one, which is slower, is not among them
    cell = next(c for c in cells() if c.provider == "vllm-marlin" and c.axes["chunk_tokens"] == 1024)
    samples = [request.e2e_s for request in fake.requests(cell, 11)]
    assert lines[header + 2].split("|")[2].strip() == f"{statistics.mean(samples[1:]):.3f}"


def cells() -> list[Cell]:
    from smbench import recipe

    return recipe.parse(fake.RECIPE, "gptq.toml").cells("full")


def test_a_dash_has_its_reason_below_the_table(rendered: Mapping[str, Path]) -> None:
    prefills = part(text_of(rendered, "sglang"), "## prefills")
    row = next(line for line in prefills.splitlines() if line.startswith("| 256 |"))
    assert row.split("|")[3].strip() == "—"
    assert "- vLLM, Exllama, 1 cell: `oom`, CUDA out of memory" in prefills
    # a silent fallback to another kernel has no number either
    assert "- vLLM, Machete, 1 cell: `invalid`, selection: " in prefills


def test_prefill_and_steps_are_taken_apart_as_they_were_put_together(tmp_path: Path) -> None:
    doc = measured(tmp_path, fake.on_an_h200)
    taken = [entry for entry in doc.phases(doc.cells.decoding) if entry.split]
    assert len(taken) == 9
    for entry in taken:
        assert entry.split
        assert entry.split.step.value == pytest.approx(fake.step_s(entry.row.cell), rel=2e-3)
        assert entry.split.prefill.value == pytest.approx(fake.ttft_s(entry.row.cell), rel=3e-3)
        for found in (entry.split.step, entry.split.prefill):
            assert found.low < found.value < found.high


def test_sixteen_tokens_are_one_prefill_and_fifteen_steps(tmp_path: Path) -> None:
    def exact(cell: Cell, profile: Profile) -> Result | None:
        result = fake.on_an_h200(cell, profile)
        if result is None or result.status != "ok":
            return result
        e2e = 2.0 + 0.01 * (int(cell.axes["output_len"]) - 1)
        measurements = [m.model_copy(update={"samples_s": (e2e,) * 10}) for m in result.measurements]
        return result.model_copy(update={"measurements": tuple(measurements)})

    doc = measured(tmp_path, exact)
    long = next(row for row in doc.cells.decoding if row.summaries)
    short = doc.cells.partner(long)
    assert short
    found = split(short, long)
    assert found
    assert found.step.value == pytest.approx(0.01)
    assert found.prefill.value == pytest.approx(2.0)


def test_rates_are_least_work_over_time(rendered: Mapping[str, Path]) -> None:
    doc = document(rendered["sglang"])
    row = next(row for row in doc.cells.decoding if row.cell.provider == "vllm-machete")
    (entry,) = doc.phases([row])
    assert entry.decode_rate and entry.prefill_rate and entry.decode_rate.fraction and entry.prefill_rate.fraction
    # 19.93 GB in 8 ms; 541 TFLOP in 1.4 s
    assert entry.decode_rate.per_s == pytest.approx(19.93e9 / 0.008, rel=0.01)
    assert entry.decode_rate.fraction == pytest.approx(19.93e9 / 0.008 / 4.8e12, rel=0.01)
    assert entry.prefill_rate.per_s == pytest.approx(541.2e12 / 1.394, rel=0.01)


# ------------------------------------------------------------------------------------------------------- its verdicts


def scaled(**factors: float) -> fake.Outcome:
    """Every provider measured, the times of some multiplied."""

    def outcome(cell: Cell, profile: Profile) -> Result | None:
        if cell.axes["scheduling"] == "v0-default":
            return fake.on_an_h200(cell, profile)
        result = fake.ok(cell, profile)
        name = cell.provider.removeprefix("vllm-")
        name = "flashinfer" if cell.axes["attention"] == "flashinfer" else name
        factor = factors.get(name, 1.0) * (factors.get("small", 1.0) if int(cell.axes["chunk_tokens"]) < 128 else 1.0)
        measurements = tuple(
            m.model_copy(update={"samples_s": tuple(factor * s for s in m.samples_s)}) for m in result.measurements
        )
        return result.model_copy(update={"measurements": measurements})

    return outcome


def verdicts(tmp_path: Path, outcome: fake.Outcome) -> Mapping[str, str]:
    doc = measured(tmp_path, outcome)
    return {claim.key: claim.verdict for claim in [*doc.conclusions(), doc.claims.decoding()]}


def test_verdicts_follow_the_numbers_and_nothing_else(tmp_path: Path) -> None:
    first = verdicts(tmp_path / "first", scaled())
    assert first == {
        "chunked": "confirmed",
        "marlin": "refuted",
        "exllama": "refuted",
        "attention": "confirmed",
        "decoding": "refuted",
    }
    # the same with other times: every verdict turns
    second = verdicts(tmp_path / "second", scaled(sglang=0.5, marlin=0.7, exllama=0.95, flashinfer=1.1))
    assert second == {
        "chunked": "refuted",
        "marlin": "confirmed",
        "exllama": "confirmed",
        "attention": "refuted",
        "decoding": "confirmed",
    }


def test_what_the_scatter_leaves_open_is_unclear(tmp_path: Path) -> None:
    def restless(cell: Cell, profile: Profile) -> Result | None:
        result = fake.ok(cell, profile) if cell.axes["scheduling"] != "v0-default" else fake.on_an_h200(cell, profile)
        if result is None or result.status != "ok":
            return result
        measurements = tuple(
            m.model_copy(update={"samples_s": tuple(s * (1 + 0.5 * (i % 5)) for i, s in enumerate(m.samples_s))})
            for m in result.measurements
        )
        return result.model_copy(update={"measurements": measurements})

    found = verdicts(tmp_path, restless)
    assert {found[key] for key in ("chunked", "exllama", "attention", "decoding")} == {"unclear"}


def test_a_claim_without_numbers_says_why(rendered: Mapping[str, Path]) -> None:
    claims = {claim.key: claim for claim in document(rendered["h200"]).conclusions()}
    assert claims["chunked"].verdict == "not measurable here"
    assert claims["chunked"].reason == (
        "sglang: skipped, stack 'sglang' is not here; `make stack STACK=sglang` installs it"
    )
    cpu = document(rendered["cpu"]).conclusions()
    assert {claim.verdict for claim in cpu} == {"not measurable here"}
    assert cpu[0].reason == "this profile does not run vLLM with Marlin nor sglang"


def test_every_verdict_of_the_text_has_a_ratio_and_an_interval(rendered: Mapping[str, Path]) -> None:
    conclusion = part(text_of(rendered, "sglang"), "## conclusion")
    lines = [line for line in conclusion.splitlines() if re.match(r"\d\. ", line)]
    assert len(lines) == 4
    for line in lines:
        assert re.search(
            r"\*\*(Confirmed|Refuted|Unclear)\*\*: .* took \d+\.\d{3}× the time of .* \(95 % interval ", line
        )


# ---------------------------------------------------------------------------------------------- the published numbers


def claims_of(doc: Gptq) -> Mapping[tuple[str, str], Printed]:
    return {(entry.card, entry.key): entry for card in doc.cards for entry in printed(card)}


def test_the_documents_claims_on_its_own_numbers(rendered: Mapping[str, Path]) -> None:
    found = claims_of(document(rendered["h200"]))
    rtx, l40 = "NVIDIA GeForce RTX 4090", "NVIDIA L40"
    # 3.67 / 4.15 and 3.01 / 2.41 at 1024 tokens
    assert found[rtx, "exllama"].ratio == pytest.approx(3.67 / 4.15)
    assert found[rtx, "exllama"].holds
    assert found[l40, "exllama"].ratio == pytest.approx(3.01 / 2.41)
    assert not found[l40, "exllama"].holds
    # 10.41 against 15.50 s: it holds on numbers that the card cannot reach
    assert found[l40, "decoding"].holds
    assert (found[l40, "decoding"].impossible, found[l40, "decoding"].of) == (1, 2)
    assert not found[rtx, "decoding"].holds


def test_impossible_and_copied_numbers_are_marked_where_they_stand(rendered: Mapping[str, Path]) -> None:
    prefills = part(text_of(rendered, "h200"), "## prefills")
    row = next(line for line in prefills.splitlines() if line.startswith("| 1024 | 4.15"))
    assert [entry.strip() for entry in row.split("|")[2:-1]] == [
        "4.15",
        "3.67",
        "4.16",
        "2.41 (1)",
        "3.01",
        "2.33 (1, 2)",
    ]
    assert "(1) NVIDIA L40, physics, refuted, 11 findings" in prefills
    assert "(2) NVIDIA L40, copied, warning" in prefills
    decoding = part(text_of(rendered, "h200"), "## decoding")
    assert "| sglang 0.4.0.post2 | NVIDIA L40 | 10.41 (1) |" in decoding
    assert "| vllm default scheduler + gptq + enforce_eager | NVIDIA L40 | 16.07 (3) |" in decoding


def test_published_numbers_stand_beside_runs_of_the_same_lengths_on_cards_only(rendered: Mapping[str, Path]) -> None:
    assert "are not shown beside these" in text_of(rendered, "cpu")
    assert "10.41" not in text_of(rendered, "cpu")


def test_the_summary_takes_all_cards_apart(rendered: Mapping[str, Path]) -> None:
    machines = {(m.card, m.engine): m for m in document(rendered["sglang"]).machines()}
    sglang = machines["NVIDIA L40", "sglang"]
    # (10.41 - 2.33) / 496, which needs 1224 of 864 GB/s
    assert sglang.step_s == pytest.approx((10.41 - 2.33) / 496)
    assert sglang.decode and sglang.decode.fraction == pytest.approx(1.416, abs=0.002)
    assert sglang.marks == (1, 2)
    here = [machine for machine in machines.values() if machine.measured]
    assert {machine.card for machine in here} == {"NVIDIA H200"}
    assert len(here) == 4


# ---------------------------------------------------------------------------------------------- what dequantizing costs


def test_a_fit_finds_the_line_and_leaves_the_other_kernel_out() -> None:
    times = {chunk: 1.5 + 0.1 * math.ceil(8000 / chunk) for chunk in (1024, 512, 256, 128, 64)}
    found = fit("x", 50, 8000, {**times, 32: 18.0})
    assert found
    assert found.start.value == pytest.approx(1.5)
    assert found.per_chunk.value == pytest.approx(0.1)
    assert [point.chunk for point in found.switched] == [32]
    assert found.at(250) == pytest.approx(26.5)
    assert fit("x", 50, 8000, {1024: 1.0, 512: 2.0, 32: 5.0}) is None


def test_the_interval_of_a_fit_covers_the_truth_as_often_as_it_says() -> None:
    import random

    generator = random.Random(1)
    hits = 0
    for _ in range(1000):
        times = {c: 1.5 + 0.1 * math.ceil(8000 / c) + generator.gauss(0, 0.2) for c in (1024, 512, 256, 128, 64)}
        found = fit("x", 50, 8000, times)
        assert found
        hits += found.per_chunk.low <= 0.1 <= found.per_chunk.high
    assert 930 <= hits <= 970


def test_the_published_curves_show_the_cost_of_a_chunk(rendered: Mapping[str, Path]) -> None:
    doc = document(rendered["h200"])
    (here,) = doc.fits
    assert here.per_chunk.value == pytest.approx(fake.CHUNK_S["vllm-exllama"], rel=0.01)
    rtx, l40 = doc.published_fits
    assert isinstance(rtx.per_chunk, Interval)
    # about 142 GB a chunk: at 1008 GB/s within the interval, at 864 GB/s twice what was published
    assert rtx.traffic_s and rtx.per_chunk.low * 0.95 < rtx.traffic_s < rtx.per_chunk.high
    assert l40.traffic_s and l40.traffic_s > 1.5 * l40.per_chunk.high
    assert rtx.at(250) > 2 * rtx.switched[0].seconds


# --------------------------------------------------------------------------------------- settings, outputs and the cost


def test_settings_of_every_provider_are_in_records_with_what_cells_have_besides(rendered: Mapping[str, Path]) -> None:
    names = {path.name for path in (rendered["sglang"] / "records").iterdir()}
    assert names == {
        "result.txt",
        "settings_sglang.json",
        "settings_vllm-exllama.json",
        "settings_vllm-machete.json",
        "settings_vllm-marlin.json",
    }
    found = json.loads((rendered["sglang"] / "records" / "settings_sglang.json").read_text(encoding="utf-8"))
    assert found["settings"]["context_length"] == 9004
    assert "chunked_prefill_size" not in found["settings"]
    assert {entry["settings"]["chunked_prefill_size"] for entry in found["cells"]} == {1024, 512, 256, 128, 64, 32}
    assert found["cells"][0]["kernels"] == {"linear": {"GPTQMarlinLinearMethod": 256}, "attention": {"FLASH_ATTN": 64}}


def test_differing_settings_are_in_the_report(rendered: Mapping[str, Path]) -> None:
    settings = part(text_of(rendered, "sglang"), "## Settings of the engines")
    assert "| sglang | 9004 | 4 | off | float16 | float16 |" in settings
    assert "| vLLM | enforce_eager | false (vllm-marlin" in settings
    assert "context limit is not the same in all engines" in part(text_of(rendered, "sglang"), "## Integrity")


def test_the_log_is_the_documents(rendered: Mapping[str, Path]) -> None:
    log = (rendered["h200"] / "records" / "result.txt").read_text(encoding="utf-8")
    lines = log.split("\n\n")[0].splitlines()
    assert lines[0].startswith("# generate/vllm-marlin ") and lines[0].endswith(": ok")
    values = [float(line.split()[1]) for line in lines[1:12]]
    assert [line.split()[0] for line in lines[1:12]] == [str(i) for i in range(11)]
    assert float(lines[12].removeprefix("avg_latency ")) == pytest.approx(statistics.mean(values[1:]), abs=2e-6)


def test_weights_and_compared_outputs_are_named(rendered: Mapping[str, Path]) -> None:
    text = text_of(rendered, "cpu")
    assert "its weights are random" in part(text, "## setting")
    assert "Outputs of 4 cells were compared with transformers, dequantized weights, float32, and passed" in text
    assert "passed: 288 of 288 tokens are equal" in text
    assert "nearest to its bound is 2e-05 of 0.001 nats" in text
    assert "No GPU number is in this report" in text.split("## setting")[0]
    assert "No GPU number" not in text_of(rendered, "h200")


def test_trained_weights_are_not_called_random(tmp_path: Path) -> None:
    text = fake.RECIPE.replace(b'["synthetic:qwen2.5-32b"]', b'["Qwen2.5-32B-Instruct-GPTQ-Int4@0123abcd"]')

    def crashed(cell: Cell, profile: Profile) -> Result | None:
        return fake.result(cell, "crashed", "no such model")

    folder = fake.build(tmp_path / "run", "full", crashed, recipe_text=text)
    report.render(folder)
    assert "its weights are random" not in (folder / "report.md").read_text(encoding="utf-8")


def test_money_is_wall_clock_times_price(rendered: Mapping[str, Path]) -> None:
    # 4000 s at 2.50 an hour
    assert "At 2.50 an hour this cost 2.78" in part(text_of(rendered, "h200"), "## What it cost")
    assert "Nobody gave a price" in part(text_of(rendered, "sglang"), "## What it cost")


def test_time_of_requests_is_counted_once_however_many_measures_they_have(rendered: Mapping[str, Path]) -> None:
    doc = document(rendered["h200"])
    cost = doc.engines.cost()
    assert cost and cost.busy
    due = sum(
        r.e2e_s
        for row in doc.view.analysis.rows
        if row.result and row.result.serving
        for r in row.result.serving.requests
    )
    assert cost.serving_s == pytest.approx(due)
    assert sum(share.seconds for share in cost.parts) == pytest.approx(cost.wall_s)


# ------------------------------------------------------------------------------------------------ other runs, bad input


def test_the_shipped_recipe_renders_in_every_profile(tmp_path: Path) -> None:
    from smbench import recipe, resources

    path = resources.recipes_dir() / "gptq.toml"
    loaded = recipe.load(path)
    for profile in loaded.profile:
        folder = fake.build(tmp_path / profile, profile, crashed_by_name, recipe_text=path.read_bytes())
        report.render(folder)
        assert "## Summarize" in (folder / "report.md").read_text(encoding="utf-8")


def crashed_by_name(cell: Cell, profile: Profile) -> Result | None:
    return fake.result(cell, "crashed", f"{cell.provider} died")


def test_a_document_of_one_card_refuses_two_files(tmp_path: Path) -> None:
    text = fake_run.RECIPE.replace(b'["lora-rtx3090"]', b'["lora-rtx3090", "gptq-l40"]')
    folder = fake_run.build(tmp_path / "run", text, "cpu", fake_run.on_a_processor, [fake_run.CPU])
    with pytest.raises(UsageError, match="published: 2 files"):
        report.render(folder)


def test_a_card_of_the_document_that_is_unknown_renders_without_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*_: object) -> None:
        return None

    monkeypatch.setattr("smbench.arch.ArchTable.device_named", unknown)
    folder = fake.build(tmp_path / "run", "full", fake.on_an_h200, [fake.GPU])
    report.render(folder)
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert "The peaks of this device are unknown" in text
    assert "impossible on" not in text
