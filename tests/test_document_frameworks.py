"""What a reader of document 004's report can rely on: its forms, its numbers, its sentences, each from the records."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

import bundles
import fake_frameworks_run as fake
import fake_run
from rendered_runs import assert_whole_tables
from smbench import metricnames, onebatch, published, report, resources, runfolder, verify
from smbench.cell import Cell
from smbench.document_frameworks import Frameworks
from smbench.document_frameworks_commands import command
from smbench.document_frameworks_conclusions import pareto
from smbench.document_frameworks_load import Online, online
from smbench.formats import fenced
from smbench.published import Published
from smbench.recipe import Profile
from smbench.result import Batch, Result

RUNS: Mapping[str, tuple[str, fake.Outcome, Mapping[str, Any]]] = {
    "full": ("full", fake.on_eight_gpus, fake.GPU),
    "one": ("full", fake.one_engine, fake.GPU),
    "cpu": ("cpu", fake.on_a_processor, fake.CPU),
    "failed": ("full", fake.nothing_works, {**fake.GPU, "gpu": {"name": fake_run.HOSTILE}}),
    "unfinished": ("full", fake.unfinished, fake.GPU),
}


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Every fake run, rendered once."""
    found = {}
    for name, (profile, outcome, environment) in RUNS.items():
        found[name] = fake.build(tmp_path_factory.mktemp("runs") / name, profile, outcome, [environment])
        report.render(found[name])
    return found


def text_of(rendered: Mapping[str, Path], name: str) -> str:
    return (rendered[name] / "report.md").read_text(encoding="utf-8")


def document(folder: Path) -> Frameworks:
    found = report.document_of(report.analysis_of(runfolder.load(folder)))
    assert isinstance(found, Frameworks)
    return found


def measured(tmp_path: Path, outcome: fake.Outcome, profile: str = "full") -> Frameworks:
    return document(fake.build(tmp_path / "run", profile, outcome))


def part(text: str, heading: str) -> str:
    """What stands under a heading, up to the next one of its level or above."""
    level = len(heading.split(" ")[0])
    return re.split(rf"\n#{{1,{level}}} ", text.split(f"\n{heading}\n", 1)[1])[0]


def table(text: str, *first: str) -> list[list[str]]:
    """The cells of the rows whose first ones are these."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return [row for row in rows if row[: len(first)] == list(first)]


# --------------------------------------------------------------------------------------------------- the text as such


@pytest.mark.parametrize("name", RUNS)
def test_sections_are_the_documents_in_its_order(rendered: Mapping[str, Path], name: str) -> None:
    headings = re.findall(r"^#{2,4} (.*)", re.sub(r"```.*?```", "", text_of(rendered, name), flags=re.DOTALL), re.M)
    wanted = [
        "technical idea",
        "quick start",
        "benchmark and profiler",
        "static single batch",
        "offline",
        "online serving",
        "profiler",
        "metrics",
        "the document's own numbers",
        "conclusions",
        "settings of the engines",
        "Situations not tested",
        "Integrity",
    ]
    assert [heading for heading in headings if heading in wanted] == wanted
    explained = part(text_of(rendered, name), "#### static single batch")
    assert re.findall(r"^#{6} (.*_.*|decode.*)$", explained, re.M) == [
        "prefill_latency",
        "prefill_throughput",
        "decode latency",
        "decode throughput",
    ]


@pytest.mark.parametrize("name", RUNS)
def test_tables_have_equal_columns_and_no_blank_cells(rendered: Mapping[str, Path], name: str) -> None:
    text = text_of(rendered, name)
    assert_whole_tables(text)


@pytest.mark.parametrize("name", RUNS)
def test_foreign_strings_stay_words_and_nothing_undefined_is_printed(rendered: Mapping[str, Path], name: str) -> None:
    text = text_of(rendered, name).replace('api_key="None"', "")
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(text)
    inline = [child for token in tokens for child in token.children or [token]]
    assert not [token for token in inline if token.type in ("html_inline", "html_block", "link_open")]
    images = [str(token.attrs["src"]) for token in inline if token.type == "image"]
    assert all(image.startswith("figures/") for image in images)
    # no paragraph is stuck to a block of code, and every block that is opened is closed
    assert not re.search(r"```\n(?![\n#])\S", re.sub(r"```\w*\n.*?\n```", "``", text, flags=re.DOTALL))
    assert not re.search(r"\b(nan|None|Undefined|undefined)\b|object at 0x|&#39;|^\\#", text, re.M)


@pytest.mark.parametrize("name", RUNS)
def test_figures_of_the_text_exist_and_no_others(rendered: Mapping[str, Path], name: str) -> None:
    named = set(re.findall(r"\]\((figures/[^)]+)\)", text_of(rendered, name)))
    there = {
        path.relative_to(rendered[name]).as_posix(): path.read_bytes() for path in rendered[name].glob("figures/*")
    }
    assert there.keys() == named
    assert all(data.startswith(b"\x89PNG") and len(data) > 10_000 for data in there.values())
    wanted = {"failed": 0, "unfinished": 2, "cpu": 2}
    assert len(there) == wanted.get(name, 3)


def test_equal_folders_render_to_equal_bytes(rendered: Mapping[str, Path], tmp_path: Path) -> None:
    folder = fake.build(tmp_path / "again", "cpu", fake.on_a_processor, [fake.CPU])
    report.render(folder)
    for path in rendered["cpu"].rglob("*"):
        if path.is_file():
            assert (folder / path.relative_to(rendered["cpu"])).read_bytes() == path.read_bytes(), path.name


def test_a_bundle_renders_to_the_same_report(tmp_path: Path) -> None:
    """Without the client's own files, which the fake has not; the records alone make the report."""

    def batches_only(cell: Cell, profile: Profile) -> Result | None:
        return fake.on_a_processor(cell, profile) if cell.subject != "online" else None

    folder = fake.build(tmp_path / "run", "cpu", batches_only, [fake.CPU])
    bundles.true_identities(folder / "results.jsonl")
    assert verify.verify(bundles.packed(folder, tmp_path / "bundle.tar.gz")).unconfirmed == ()


def test_the_shipped_recipe_renders_in_every_profile(tmp_path: Path) -> None:
    from smbench import recipe

    path = resources.recipes_dir() / "frameworks.toml"
    loaded = recipe.load(path)
    assert list(loaded.profile) == ["full", "quick", "cpu"]
    for profile in loaded.profile:
        folder = fake.build(tmp_path / profile, profile, fake.nothing_works, recipe_text=path.read_bytes())
        report.render(folder)
        assert "## conclusions" in (folder / "report.md").read_text(encoding="utf-8")


def test_the_shipped_recipe_has_the_documents_cases_and_prompts() -> None:
    from smbench import recipe

    cells = recipe.load(resources.recipes_dir() / "frameworks.toml").cells("full")
    static = {
        (c.axes["batch"], c.axes["input_len"], c.axes["output_len"], c.axes["tensor_parallel"])
        for c in cells
        if c.subject == "static_batch" and str(c.axes["model"]).startswith("Qwen/Qwen2.5-32B-Instruct@")
    }
    assert {(b, 1024, o, 8) for b in (4, 8) for o in (1, 1024)} <= static
    assert {c.axes["num_prompts"] for c in cells if c.subject == "offline"} == {10, 1000}
    loads = {(c.axes["request_rate"], c.axes["max_concurrency"]) for c in cells if c.subject == "online"}
    assert {(rate, 0) for rate in ("1", "2", "4", "8", "16", "inf")} < loads
    assert {("inf", count) for count in (1, 8, 32, 128)} < loads
    providers = {"vllm", "sglang", "lmdeploy-turbomind", "lmdeploy-pytorch", "tensorrt-llm"}
    assert {c.provider for c in cells} == providers


# ------------------------------------------------------------------------------------------- the table across engines


def test_the_table_across_engines_to_the_digit(rendered: Mapping[str, Path]) -> None:
    across = part(text_of(rendered, "full"), "### across engines")
    assert "| Req | vLLM | sglang | LMDeploy TurboMind |\n" in across
    # 4 * 1024 tokens in 0.4 s + 1023 steps of 16 ms
    assert table(across, "static", "1", "1024 + 1024", "one batch", "4") == [
        ["static", "1", "1024 + 1024", "one batch", "4", "4", "0.4000 / 244.3", "0.3600 / 239.0", "0.4800 / 195.6"]
    ]
    # it ran out of memory at batch 8
    assert table(across, "static", "8", "1024 + 1024", "one batch", "8")[0][-1] == "—"
    # 10 * 256 tokens in 1 + 10 * 256 * 0.016 / 64 s; no first token is seen
    assert table(across, "offline", "1", "1024 + 256", "one batch", "10")[0][5:7] == ["10", "— / 1561"]
    # 0.1 s and 8 tokens of 0.024 s, eight at a time: 64 * 0.292 / 8 = 2.336 s; a late server has no number
    assert table(across, "online", "1", "1024 + 9", "8 at a time") == [
        ["online", "1", "1024 + 9", "8 at a time", "8", "64", "0.1000 / 246.6", "0.0900 / 251.0", "—"]
    ]
    # a provider without any number has no column, one engine alone has one
    assert "TensorRT-LLM" not in across
    assert "| Req | vLLM |\n" in part(text_of(rendered, "one"), "### across engines")


# ------------------------------------------------------------------------------------------------------ static batches


def test_the_static_table_to_the_digit(rendered: Mapping[str, Path]) -> None:
    static = part(text_of(rendered, "full"), "#### static single batch")
    eight = static.split("###### tensor parallel over 8 GPUs")[1]
    assert table(eight, "8", "1024", "1024", "sglang") == [
        [
            *("8", "1024", "1024", "sglang"),
            *("0.1800 (0.1764–0.1854)", "45511", "5.125 (5.022–5.279)", "1561"),
            *("5.423 (5.314–5.586)", "3021", "1511"),
        ]
    ]
    # one token comes from the prefill: no step, and the prompt makes up almost all of the overall throughput
    assert table(eight, "4", "1024", "1", "vLLM")[0][6:] == ["—", "—", "0.1000 (0.0980–0.1030)", "41000", "40.00"]
    assert "- LMDeploy TurboMind, 2 cells: `oom`, CUDA out of memory" in eight


def test_the_warm_up_is_in_no_number(tmp_path: Path) -> None:
    doc = measured(tmp_path, fake.on_eight_gpus)
    (group, _) = doc.cells.static
    found = next(case for case in doc.cases(group) if case.output_len == 1024 and case.batch == 4)
    assert found.prefill and found.prefill.n == 3
    assert (found.prefill.ci_low, found.prefill.ci_high) == pytest.approx((0.392, 0.412))


def log_of(numbers: Published) -> list[dict[str, int | float | str]]:
    """The result file of the document."""
    records = numbers.table[0]
    keys = [str(column.header) for column in records.layout.columns] if records.layout else []
    rows = []
    for row in records.rows:
        values = dict(zip(keys, ["test_run", *row], strict=True))
        rows.append({key: value for key, value in values.items() if value != "no-decode"})
    return rows


def test_the_documents_own_times_give_its_result_file_and_its_terminal_output(tmp_path: Path) -> None:
    """A run that takes what the document's took leaves what the document's left, key by key and line by line."""
    numbers = published.load(published.find("sglang-one-batch", resources.recipes_dir() / "published"))
    theirs = {(e["batch_size"], e["output_len"]): e for e in log_of(numbers)}
    # the five steps of a case that its terminal shows
    rows = [row[1:] for row in numbers.table[2].rows if row[0] == "benchmark"]
    first = {(b, o, i): printed_step(float(b), float(s), float(rate)) for b, _, o, i, s, rate in rows}

    def as_printed(cell: Cell, profile: Profile) -> Result | None:
        if cell.subject != "static_batch" or cell.provider != "sglang" or cell.axes["tensor_parallel"] != 8:
            return None
        batch, output = fake.number(cell, "batch"), fake.number(cell, "output_len")
        entry = theirs[batch, output]
        prefill, total = float(str(entry["prefill_latency"])), float(str(entry["total_latency"]))
        steps: tuple[float, ...] = ()
        if output > 1:
            middle = float(str(entry["median_decode_latency"]))
            shown = [first[batch, output, i] for i in range(1, 6)]
            # as many below the median as above it; those above have what is left of the total
            below = 511 - sum(step < middle for step in shown)
            low = [middle * 0.99] * below
            left, count = total - prefill - sum(shown) - middle - sum(low), 1023 - 6 - below
            steps = (*shown, middle, *low, *([left / count] * count))
            assert left / count > middle
        found = fake.batches(cell)[0]
        fields = {**found.model_dump(), "e2e_s": total, "prefill_s": prefill, "step_s": steps}
        repeated = (Batch.model_validate(fields),) * 4
        result = fake.ok(cell, profile, batches=repeated)
        if not steps:
            return result
        ordered = sorted(steps)[511]
        measurements = [
            m.model_copy(update={"samples_s": (ordered,) * 3}) if m.name == "decode_latency" else m
            for m in result.measurements
        ]
        return result.model_copy(update={"measurements": tuple(measurements)})

    doc = measured(tmp_path, as_printed)
    assert doc.example
    ((provider, text),) = doc.result_files(doc.example)
    assert provider == "sglang"
    objects = [json.loads(found) for found in re.findall(r"\{.*?\}", text, re.DOTALL)]
    for found, entry in zip(objects, theirs.values(), strict=True):
        assert found.keys() == entry.keys()
        numbers_of = {key: value for key, value in entry.items() if key != "run_name"}
        assert {key: found[key] for key in numbers_of} == pytest.approx(numbers_of, rel=1e-12)
    ((_, listing),) = doc.listings(doc.example)
    assert listing.split("Benchmark ...\n")[1] == terminal(numbers).split("Benchmark ...\n")[1]


def printed_step(batch: float, seconds: float, rate: float) -> float:
    """A step that is printed as so many seconds, of five decimals, and as so many tokens a second, of two."""
    low = max(seconds - 0.5e-5, batch / (rate + 0.005))
    high = min(seconds + 0.5e-5, batch / (rate - 0.005))
    assert low < high
    return (low + high) / 2


def terminal(numbers: Published) -> str:
    """What the document's terminal shows, line by line, from the tables that hold its numbers."""
    lines = {number: text for number, text in numbers.block["terminal"].text.items()}
    found = {int(number): text for number, text in lines.items()}
    for shown in numbers.table[1:]:
        layout = shown.layout
        assert layout and layout.pattern and layout.lines
        for line, row in zip(layout.lines, shown.rows, strict=True):
            values = [float(value) for value in row[len(shown.axes) :]]
            names = [column.metric for column in shown.columns]
            pattern = re.sub(r"\{(\w+):(\d+)\.(\d)\}", r"{\1:\2.\3f}", layout.pattern)
            found[line] = pattern.format(**dict(zip(names, values, strict=True)))
    return "\n".join(found[number] for number in sorted(found))


def test_a_listing_begins_with_the_cache_and_the_warm_up(rendered: Mapping[str, Path]) -> None:
    listing = (rendered["full"] / "records" / "bench_one_batch_vllm.txt").read_text(encoding="utf-8")
    assert listing.split("\n\n")[0].splitlines()[:8] == [
        "# synthetic:qwen2.5-7b-bf16, bfloat16, one device, the engine's own choice of graphs",
        "max_total_num_tokens=355636",
        "Warmup ...",
        "Prefill. latency: 0.60000 s, throughput:   6826.67 token/s",
        "Total. latency:  0.600 s, throughput:   6833.33 token/s",
        "Benchmark ...",
        "Prefill. latency: 0.40000 s, throughput:  10240.00 token/s",
        "Total. latency:  0.400 s, throughput:  10250.00 token/s",
    ]
    assert listing.count("# synthetic:") == 2


def test_a_cell_is_its_repetition_with_the_lower_median_total(tmp_path: Path) -> None:
    """Of 4, 1, 3 and 2 s that count, after 9 s that do not, it is that of 2 s, its own prefill beside it."""

    def outcome(cell: Cell, profile: Profile) -> Result | None:
        if cell.subject != "static_batch" or cell.axes["output_len"] != 1:
            return None
        (first, *_) = fake.batches(cell)
        found = [first.model_copy(update={"e2e_s": s, "prefill_s": s - 1e-4}) for s in (9.0, 4.0, 1.0, 3.0, 2.0)]
        return fake.ok(cell, profile, batches=tuple(found))

    doc = measured(tmp_path, outcome)
    row = next(row for row in doc.view.analysis.rows if row.summaries and row.result)
    assert row.result
    (line,) = onebatch.lines([row.result], warmup=1)
    assert (line.total_latency, line.prefill_latency) == (2.0, 1.9999)
    assert (line.median_decode_latency, line.median_decode_throughput) == (None, None)
    assert b"median" not in onebatch.dump([line])


def test_every_line_of_a_result_file_says_which_setting_it_is_of(rendered: Mapping[str, Path]) -> None:
    lines = (rendered["full"] / "records" / "bench_one_batch_vllm.jsonl").read_text(encoding="utf-8").splitlines()
    names = {json.loads(line)["run_name"] for line in lines}
    assert len(lines) == 8
    assert names == {f"vllm, synthetic:qwen2.5-7b-bf16, tp {count}" for count in (1, 8)}


def test_formulas_are_worked_with_numbers_of_one_cell(rendered: Mapping[str, Path]) -> None:
    explained = part(text_of(rendered, "full"), "##### explain")
    assert (
        "prefill_throughput = input_len × batch / prefill_latency = 1024 × 4 / 0.40000 = 10240.00 token/s" in explained
    )
    assert "Here 1023 steps, median 0.01600 s." in explained
    assert "= 0.40000 + 16.36800 = 16.76800 s" in explained
    assert "output_throughput = output_len × batch / total_latency = 244.27 token/s, 0.500× the overall" in explained
    # a run without numbers has the formulas alone
    bare = part(text_of(rendered, "failed"), "##### explain")
    assert "prefill_throughput = input_len × batch / prefill_latency\n" in bare


# --------------------------------------------------------------------------------------------------- offline and online


def test_the_offline_table_and_listing_to_the_digit(rendered: Mapping[str, Path]) -> None:
    offline = part(text_of(rendered, "full"), "#### offline")
    # 1 + 1000 * 256 * 0.02 / 64 = 81 s
    assert table(offline, "random", "1000", "1024 + 256", "LMDeploy TurboMind")[0][4:] == [
        *("81.00 (79.38–83.43)", "12.35", "12642", "3160", "15802")
    ]
    assert "Request throughput (req/s):              6.10\n" in offline
    assert "- vLLM, 2 cells: `skipped`, no file of conversations was given: SHAREGPT=FILE names one" in offline


def test_rates_of_somebodys_conversations_are_of_the_repetitions_that_count(tmp_path: Path) -> None:
    """A warm-up may have other prompts."""

    def outcome(cell: Cell, profile: Profile) -> Result | None:
        if cell.subject != "offline" or cell.axes["dataset"] != "sharegpt" or cell.provider != "vllm":
            return None
        found = fake.batches(cell)
        first = found[0].model_copy(update={"prompt_tokens": 1})
        others = [batch.model_copy(update={"prompt_tokens": 5000}) for batch in found[1:]]
        return fake.ok(cell, profile, batches=(first, *others))

    doc = measured(tmp_path, outcome)
    (group,) = doc.cells.offline
    assert [entry.rates["input_throughput"] * entry.duration.median for entry in doc.offline(group)] == [5000, 5000]


def test_the_load_tables_to_the_digit(rendered: Mapping[str, Path]) -> None:
    served = part(text_of(rendered, "full"), "#### online serving")
    rows = table(served, "random", "16/s", "64", "1024 + 9", "vLLM")
    # request i of 64 arrives at i / 16 and leaves at (i + 1) / 12: the last one waits 63 / 12 - 63 / 16 = 1.3125 s
    assert rows[0][5:10] == ["11.42", "102.7", "11793", "11.56", "no"]
    assert table(served, "16/s", "random", "vLLM")[0][3] == "756.3 / 756.3 / 1281 / 1399"
    # 17 of 64 wait for at most 0.35 s; every TPOT of 32 ms is within 40
    assert rows[0][10:] == ["11.42 (100.0 %)", "3.03 (26.6 %)"]
    assert table(served, "random", "2/s", "64", "1024 + 9", "vLLM")[0][9] == "yes"
    assert table(served, "random", "all at once", "64", "1024 + 9", "vLLM")[0][9] == "—"
    for reason in ("`crashed`, the server died", "`incorrect`, 6 of 64 requests failed", "`timeout`, the server was"):
        assert f"- LMDeploy TurboMind, 1 cell: {reason}" in served


def test_a_load_under_the_names_of_its_client(rendered: Mapping[str, Path]) -> None:
    lines = (rendered["full"] / "records" / "serving_vllm.jsonl").read_text(encoding="utf-8").splitlines()
    found = next(r for line in lines if (r := json.loads(line))["max_concurrency"] == 8)
    assert {key: found[key] for key in ("completed", "failed", "total_input_tokens", "total_output_tokens")} == {
        "completed": 64,
        "failed": 0,
        "total_input_tokens": 65536,
        "total_output_tokens": 576,
    }
    assert found["duration"] == pytest.approx(64 * 0.292 / 8)
    assert found["median_ttft_ms"] == pytest.approx(100.0)
    assert found["p99_e2el_ms"] == pytest.approx(292.0)
    assert found["total_token_throughput"] == pytest.approx((65536 + 576) / 2.336)
    # the keys that the client's own file has for the same statistics
    own = {name.own.split(",")[0] for name in metricnames.names_in("vllm-serve")}
    for key in found:
        if key.endswith("_ms"):
            assert f"*_{key.split('_', 1)[1]}" in own
        elif key.endswith(("throughput", "goodput")) or key == "duration":
            assert key in own


def numbers_of(tmp_path: Path, **changes: Any) -> Online:
    """The numbers of one load that is otherwise."""

    def outcome(cell: Cell, profile: Profile) -> Result | None:
        if cell.subject != "online" or cell.provider != "vllm" or cell.axes["max_concurrency"] != 8:
            return None
        load = fake.load(cell, **changes)
        return fake.ok(cell, profile, load=load)

    doc = measured(tmp_path, outcome)
    row = next(row for row in doc.view.analysis.rows if row.summaries)
    found = online(row)
    assert found
    return found


def test_goodput_counts_requests_that_keep_both_limits(tmp_path: Path) -> None:
    """8 of 64 are late with the first token, the next 8 with the others, 4 of them with both."""
    ttft = [2.5] * 8 + [0.1] * 56
    tpot = [0.024] * 4 + [0.3] * 8 + [0.024] * 52
    e2e = [a + 8 * b for a, b in zip(ttft, tpot, strict=True)]
    found = numbers_of(
        tmp_path, ttft_s=tuple(ttft), tpot_s=tuple(tpot), e2e_s=tuple(e2e), itl_s=(), duration_s=sum(e2e) / 8
    )
    assert found.goodput["server"] == pytest.approx(52 * 8 / sum(e2e))
    assert found.share_good["server"] == pytest.approx(52 / 64)
    assert "itl" not in found.spreads


def test_percentiles_lie_between_two_values(tmp_path: Path) -> None:
    ttft = [0.001 * (i + 1) for i in range(64)]
    e2e = [t + 8 * 0.024 for t in ttft]
    found = numbers_of(tmp_path, ttft_s=tuple(ttft), e2e_s=tuple(e2e), duration_s=sum(e2e) / 8)
    spread = found.spreads["ttft"]
    # places 31.5, 56.7 and 62.37 of 0 to 63
    assert (spread.median, spread.p90, spread.p99) == pytest.approx((0.0325, 0.0577, 0.06337))
    assert spread.mean == pytest.approx(0.0325)
    assert spread.count == 64


def test_a_front_has_what_nothing_beats() -> None:
    places = {"a": (1.0, 5.0), "b": (2.0, 5.0), "c": (2.0, 9.0), "d": (1.5, 4.0), "e": (3.0, 10.0), "f": (1.0, 3.0)}
    places["g"] = (4.0, 10.0)
    assert pareto(list(places), lambda name: places[name]) == ["a", "c", "e"]
    assert pareto([], lambda name: places[name]) == []


# ---------------------------------------------------------------------------------------------------------- conclusions


def test_conclusions_follow_from_the_numbers(rendered: Mapping[str, Path]) -> None:
    said = part(text_of(rendered, "full"), "## conclusions")
    # 0.36 against 0.40 s: 8 of 8, and the intervals of ± 3 % do not meet; 16 against 16.4 ms: they do
    assert "- Static, by prefill latency, sglang is the fastest at 8 of 8 points (clearly at 8)." in said
    assert "- Static, by decode latency, vLLM is the fastest at 4 of 4 points (clearly at 0)." in said
    assert "- vLLM: from batch 4 to 8, its prefill latency is 2.000× as long (4 pairs of cells), so a token" in said
    assert (
        "- vLLM: from batch 4 to 8, its decode latency is 1.250× as long (2 pairs of cells), so a token of it costs"
        " less in the larger batch." in said
    )
    assert "- sglang: on 8 GPUs in place of 1, its decode latency is 0.250× as long (2 pairs of cells)." in said
    assert (
        "- In the document: from batch 4 to 8, the prefill latency is 1.999× and the decode latency 1.223× as long."
        in said
    )
    assert (
        "- vLLM as a server: most output at 8 at a time, 246.6 token/s. It keeps up with 8.00 requests/s. It falls "
        "behind at 16.00 requests/s, where it completes 11.42." in said
    )
    assert "LMDeploy TurboMind as a server: most output at all at once, 53.04 token/s. It keeps up with 2.00" in said
    assert (
        "- Throughput against median TTFT: on the common Pareto front are 0 of 6 loads of vLLM, 1 of 6 loads of" in said
    )


def test_one_engine_is_not_compared_with_itself(rendered: Mapping[str, Path]) -> None:
    said = part(text_of(rendered, "one"), "## conclusions")
    for workload in ("Static", "Offline", "Online"):
        assert f"- {workload}: no two engines have a number at the same point, so none is called faster." in said
    assert "fastest" not in said.split("A point is")[0]
    assert "common Pareto front" not in said
    assert "- vLLM: from batch 4 to 8" in said


def test_no_number_no_conclusion(rendered: Mapping[str, Path]) -> None:
    said = part(text_of(rendered, "failed"), "## conclusions")
    assert len([line for line in said.splitlines() if line.startswith("- ")]) == 4
    assert "No cell has a number, so there is nothing to put side by side." in text_of(rendered, "failed")
    assert "**No cell has a number.**" in text_of(rendered, "failed")
    assert "**Unfinished.** 32 of 72 cells" in text_of(rendered, "unfinished")
    assert "**No GPU number is in this report.**" in text_of(rendered, "cpu")


# ----------------------------------------------------------------------------------------------- the document's numbers


def test_published_numbers_stand_beside_equal_cases_on_cards_only(rendered: Mapping[str, Path]) -> None:
    theirs = part(text_of(rendered, "full"), "## the document's own numbers")
    rows = table(theirs, "8", "1024", "1024")
    assert rows[0][3:] == [
        *("the document", "8", "7.163", "1144", "23.10", "346.3", "30.81", "531.7", "265.9"),
    ]
    assert [(row[3], row[4]) for row in rows[1:]] == [
        (f"{title}, synthetic:qwen2.5-7b-bf16", count) for count in ("1", "8") for title in ("vLLM", "sglang")
    ]
    assert ", and equal the printed ones; its output throughput is not in the document" in theirs
    assert "- conventions, warning: overall_throughput: all 9 figures are input and output tokens" in theirs
    assert "pools are allocated before, unlike the document says" in theirs
    for name in ("cpu", "failed"):
        alone = part(text_of(rendered, name), "## the document's own numbers")
        assert "They do not stand beside this run's" in alone
        assert {row[3] for row in table(alone, "4", "1024")} == {"the document"}


def test_a_wrong_printed_rate_is_not_called_equal() -> None:
    from smbench.document_frameworks_published import Document004

    path = published.find("sglang-one-batch", resources.recipes_dir() / "published")
    good = published.load(path)
    assert Document004(good).agrees
    text = path.read_text(encoding="utf-8").replace("1143.3438072320973", "1144.3438072320973")
    assert not Document004(published.parse(text.encode(), path.name)).agrees


# ------------------------------------------------------------------------------------ quick start, settings, profiler


def test_the_commands_that_ran_are_the_quick_start(rendered: Mapping[str, Path]) -> None:
    start = part(text_of(rendered, "full"), "### quick start")
    assert start.count("- server, ") == 3
    assert "python -m vllm.server \\\n    --model MODEL \\\n    --port 30000 \\\n    --eager\n" in start
    assert 'base_url="http://127.0.0.1:30000/v1"' in start
    assert "No server was started in this run" in part(text_of(rendered, "unfinished"), "### quick start")


def test_a_command_is_what_a_shell_takes_back() -> None:
    words = ["python", "-m", "x", "--model", "<model>", "--json", '{"a": "b c"}', "--flag", "it's", "-O3"]
    text = command(words)
    expected = ["MODEL" if word == "<model>" else word for word in words]
    assert shlex.split(text.replace("\\\n", "")) == expected
    assert text.splitlines()[0] == "python -m x \\"


def test_a_fence_is_longer_than_any_in_its_text() -> None:
    text = fenced("a\n````\nb\u202e\x1b[31m", "json")
    assert text.splitlines() == ["`````json", "a", "````", "b[31m", "`````"]
    (token,) = MarkdownIt("commonmark").parse(str(text))
    assert token.content == "a\n````\nb[31m\n"


def test_settings_stand_side_by_side(rendered: Mapping[str, Path]) -> None:
    text = text_of(rendered, "full")
    settings = part(text, "## settings of the engines")
    assert table(settings, "context limit") == [["context limit", "yes", "differs", "4096", "4100", "4096"]]
    assert table(settings, "prefix caching") == [["prefix caching", "yes", "alike", "off", "off", "off"]]
    assert table(settings, "tensor parallel") == [["tensor parallel", "no", "alike", "1 or 8", "1 or 8", "1 or 8"]]
    assert table(settings, "tokens of a KV cache page") == [
        ["tokens of a KV cache page", "no", "differs", "16", "1", "—"]
    ]
    assert "context limit is not the same in all engines" in part(text, "## Integrity")


def test_top_kernels_stand_where_a_cell_was_profiled(rendered: Mapping[str, Path]) -> None:
    traced = part(text_of(rendered, "full"), "#### profiler")
    assert "##### vLLM, static: one device, 1 output token, batch 4" in text_of(rendered, "full")
    assert "torch.profiler 2.13.0; one more repetition, 0.5000 s" in text_of(rendered, "full")
    assert table(text_of(rendered, "full"), "flash_fwd")[0] == ["flash_fwd", "28", "100.0", "25.0 %"]
    assert "No cell was profiled" not in traced
    assert "No cell was profiled" in part(text_of(rendered, "cpu"), "#### profiler")


# ------------------------------------------------------------------------------------------------------------- glossary


def test_every_metric_of_the_report_is_declared_with_what_ours_counts(rendered: Mapping[str, Path]) -> None:
    glossary = part(text_of(rendered, "full"), "## metrics").split("### ")[0]
    (overall,) = table(glossary, "overall_throughput")
    assert overall[4].startswith("input and output tokens (")
    (output,) = table(glossary, "output_throughput")
    assert output[4].startswith("static_batch: of the batch (") and "offline and online: of the load (" in output[4]
    # a run without servers has no number of theirs
    doc = document(rendered["full"])
    assert {entry.metric.name for entry in doc.glossary()} >= {"ttft", "tpot", "itl", "goodput", "prefill_latency"}


def test_a_name_that_counts_something_else_is_in_italics(rendered: Mapping[str, Path]) -> None:
    names = part(text_of(rendered, "full"), "### what each tool calls them")
    rows = {(row[0], row[1], row[2]): row[3] for row in table(names) if len(row) == 5}
    assert rows["tpot", "guidellm run", "time_per_output_token_ms"] == "*all tokens*"
    assert rows["tpot", "guidellm run", "inter_token_latency_ms"] == "after first token"
    assert rows["e2e_latency", "python -m sglang.bench_one_batch", "total_latency"] == "sum of phases"


def test_situations_not_tested_name_workload_and_axes(rendered: Mapping[str, Path]) -> None:
    situations = part(text_of(rendered, "full"), "## Situations not tested")
    assert table(situations, "TensorRT-LLM", "8", "static_batch")
    assert table(situations, "vLLM", "2", "offline; dataset sharegpt")
    assert table(situations, "LMDeploy TurboMind", "1", "online; request_rate inf; max_concurrency 8")
