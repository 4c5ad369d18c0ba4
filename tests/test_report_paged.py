"""The report of document 001: its format, its numbers beside the published ones, an answer that follows from data."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

import fake_run
from rendered_runs import Rendered, assert_whole_tables, render, text_of
from smbench import report
from smbench.cell import Cell
from smbench.recipe import MeasureRow, Profile
from smbench.result import Measurement, Result, Work

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "paged-attention.toml"
BLOCK_COST = {"classic-v1": 2.0, "classic-v2": 1.0, "smbench-tuned": 0.01}
"""How much longer a block of one token takes than an endless one."""
COST = {"torch": 0.98, "smbench": 1.15, "smbench-tuned": 1.05, "smbench-triton": 1.3, "fa3": 1.1}
LOOKUP = 1.08
POOL = 0.75


def seconds(cell: Cell, measure: MeasureRow) -> float:
    """A time with one known factor for each effect, the same for every shape."""
    axes = cell.axes
    tokens = float(axes["batch"]) * float(axes["seq_len"])
    bound = tokens * float(axes["kv_heads"]) * float(axes["head_dim"]) * 4 / fake_run.MEMORY_BYTES_PER_S
    factor = COST.get(cell.provider, 1.6) * (1 + BLOCK_COST.get(cell.provider, 0.3) / float(axes["block_size"]))
    factor *= LOOKUP if axes["address"] == "table" else 1.0
    factor *= POOL if axes["layout"] == "document" else 1.0
    return (2e-6 + bound) * factor * {"none": 20.0, "warm": 0.9, "cold": 1.0}[measure.l2]


def timed(cell: Cell, profile: Profile) -> Result:
    measurements = tuple(
        Measurement(
            name=measure.name,
            method=measure.method,
            l2=measure.l2,
            calls_per_sample=measure.calls,
            warmup_s=(),
            samples_s=tuple(seconds(cell, measure) * (1 + 0.001 * (i % 3 - 1)) for i in range(9)),
            busy_s=0.01,
        )
        for measure in profile.measure
    )
    sources = {"smbench-triton": "default", "classic-v1": "default", "classic-v2": "default"}
    return fake_run.result(cell, "ok", measurements=measurements, sources=sources)


def on_a_card(cell: Cell, profile: Profile) -> Result | None:
    """What a machine with vLLM and sglang would leave."""
    axes = cell.axes
    if cell.provider == "flashinfer":
        return fake_run.result(cell, "unsupported", "the Python package 'flashinfer' is not installed here")
    if cell.provider == "fa3" and int(axes["block_size"]) % 16:
        return fake_run.result(cell, "unsupported", "FlashAttention takes blocks of a multiple of 16 tokens")
    if axes["memory"] in ("managed-host", "managed-oversubscribed"):
        return fake_run.result(cell, "unsupported", f"memory {axes['memory']!r} is not measured: the bus")
    return timed(cell, profile)


def on_a_processor(cell: Cell, profile: Profile) -> Result | None:
    if cell.axes["memory"] != "device":
        return fake_run.result(cell, "unsupported", "managed memory needs tensors of one CUDA device")
    if cell.provider == "smbench-triton":
        return fake_run.result(cell, "verified", fake_run.INTERPRETED, sources={"smbench-triton": "default"})
    if cell.provider != "torch":
        return fake_run.result(cell, "unsupported", "needs a device of kind cuda, this profile runs on cpu")
    return timed(cell, profile)


RUNS = {
    "full": (on_a_card, fake_run.GPU),
    "quick": (on_a_card, fake_run.GPU),
    "cpu": (on_a_processor, fake_run.CPU),
    "failed": (fake_run.all_failed, {**fake_run.GPU, "gpu": {"name": fake_run.HOSTILE}}),
}


def small_work(_cell: Cell) -> Work:
    """So little that no guard has anything against any time."""
    return Work(bytes=1, flops=1)


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Rendered:
    """Every fake run of the shipped recipe, rendered once."""
    parent = tmp_path_factory.mktemp("runs")
    return render(parent, RECIPE.read_bytes(), RUNS, lambda name: "full" if name == "failed" else name, small_work)


def rows_after(text: str, heading: str, which: int = 0) -> list[list[str]]:
    """The first table after a line that is a heading, as cells."""
    part = text.split(f"\n{heading}\n")[1 + which]
    table = re.findall(r"(?:^\|.*\n)+", part, re.MULTILINE)[0]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]


@pytest.mark.parametrize("name", RUNS)
def test_the_front_matter_is_the_documents(rendered: Rendered, name: str) -> None:
    head = text_of(rendered, name).split("---\n")
    assert head[0] == "" and 'title:  "Profile VLLM Performance"' in head[1]
    assert "tags: [CUDA, UVM, Profiler]" in head[1] and "date:   2026-01-02" in head[1]
    page = (rendered[name][0] / "report.html").read_text(encoding="utf-8")
    assert "author_profile" not in page and "This post is to log" in page


@pytest.mark.parametrize("name", RUNS)
def test_tables_have_equal_columns_and_no_blank_cells(rendered: Rendered, name: str) -> None:
    text = text_of(rendered, name)
    assert_whole_tables(text)
    assert not re.search(r"\b(nan|inf|None|Undefined|undefined)\b|object at 0x", text)


def test_the_documents_tables_are_there_in_its_order(rendered: Rendered) -> None:
    text = text_of(rendered, "full")
    titles = re.findall(r"^(vllm|Without page table lookup|Original vllm|No offset)$", text, re.MULTILINE)
    assert titles == [
        "vllm",
        "Without page table lookup",
        "Original vllm",
        "Without page table lookup",
        "Original vllm",
        "No offset",
    ]


def test_published_numbers_stand_in_their_own_columns(rendered: Rendered) -> None:
    text = text_of(rendered, "full")
    first = rows_after(text, "vllm")
    assert first[0][:4] == ["block", "seq_len", "uvm", "normal"] and "A100" in first[0][4]
    assert [row[0] for row in first[2:]] == ["1", "2", "4", "8", "16", "32", "64", "128"]
    assert first[2][4:] == ["1029", "1028"] and first[-1][4:] == ["—", "—"]
    # the document times this case twice, and each table keeps its own number
    assert rows_after(text, "Original vllm")[2][-2:] == ["1038", "—"]
    assert rows_after(text, "No offset")[2][-2:] == ["—", "264.3"]
    assert "another card" in text


def test_measured_numbers_are_those_of_the_cell(rendered: Rendered) -> None:
    text, analysis = text_of(rendered, "full"), rendered["full"][1]
    rows = analysis.select("paged_attention", "classic-v1", batch=16, seq_len=1024, block_size=8, layout="document")
    times = {str(row.cell.axes["address"]): row.summaries["document"].median * 1e6 for row in rows}
    for heading, which, address in (
        ("Without page table lookup", 1, "contiguous"),
        ("Original vllm", 1, "table"),
        ("No offset", 0, "same-block"),
    ):
        row = next(row for row in rows_after(text, heading, which) if row[0] == "8")
        assert float(row[4]) == pytest.approx(times[address], rel=1e-3)


def test_effects_are_separated(rendered: Rendered) -> None:
    """Each made-up factor comes back in its own column and in no other."""
    text = text_of(rendered, "full").split("## What those tables mix")[1]
    table = rows_after(text, "classic v1:")
    assert len(table) - 2 == 4 * 8
    for row in table[2:]:
        assert row[4:] == ["1.08×", "1.00×?", "0.75×", "1.11×"], row


def test_the_answer_follows_from_the_numbers(rendered: Rendered) -> None:
    answer = next(line for line in text_of(rendered, "full").splitlines() if line.startswith("**The answer**"))
    # 1 + 2 / 1 over 1 + 2 / 32, and 1 + 0.01 / 1 over 1 + 0.01 / 32
    assert "the block size moves the time by up to 2.82×" in answer
    assert "multiplies it by 1.08× to 1.08× over all shapes and block sizes (32 of 32 differences are clear)" in answer
    assert "managed memory that is resident by 1.00× to 1.00×" in answer
    assert "the block size moves the time by at most 1.0 %" in answer
    assert "by itself multiplies the time by 0.75× to 0.75×" in answer
    assert "**The answer**" not in text_of(rendered, "cpu")


def test_the_field_is_counted(rendered: Rendered) -> None:
    text = text_of(rendered, "full").split("## Against the field")[1]
    assert "at each of 99 points: smbench, tuned is clearly faster at 99, clearly slower at 0" in text
    line = next(line for line in text.splitlines() if line.startswith("| 40/40 | 32 | 4096 |"))
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[9] == "1.0 %" and cells[10] == "FlashAttention 3, block 32"
    ours, theirs = max(map(float, cells[3:9])), float(cells[11])
    assert cells[12] == f"{ours / theirs:.2f}×"


def test_what_is_not_measured_has_its_reason(rendered: Rendered) -> None:
    last = text_of(rendered, "full").split("## Situations not tested")[1]
    assert "managed-host" in last and "managed-oversubscribed" in last and "flashinfer" in last


def test_a_processor_gives_a_report_without_gpu_numbers(rendered: Rendered) -> None:
    text = text_of(rendered, "cpu")
    assert "No GPU number is in this report" in text and "kernel torch SDPA, contiguous cache" in text
    assert "### Verified, not timed" in text and "smbench in Triton" in text


def test_records_hold_every_median(rendered: Rendered) -> None:
    folder, analysis = rendered["full"]
    assert {path.name for path in folder.glob("records/*")} == {
        "times_cold.csv",
        "times_warm.csv",
        "times_document.csv",
    }
    lines = list(csv.DictReader((folder / "records" / "times_cold.csv").read_text(encoding="utf-8").splitlines()))
    numbers = [row for row in analysis.rows if row.summary("cold")]
    assert len(lines) == len(numbers)
    assert lines[0]["provider"] == numbers[0].cell.provider
    assert float(lines[0]["time_us"]) == pytest.approx(numbers[0].summaries["cold"].median * 1e6, abs=1e-3)


@pytest.mark.parametrize("name", RUNS)
def test_figures_of_the_text_exist_and_no_others(rendered: Rendered, name: str) -> None:
    folder = rendered[name][0]
    named = set(re.findall(r"\]\((figures/[^)]+)\)", text_of(rendered, name)))
    there = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.glob("figures/*")}
    assert there.keys() == named and bool(there) == (name != "failed")
    assert all(data.startswith(b"\x89PNG") and len(data) > 10_000 for data in there.values())


def test_rendering_again_gives_the_same_bytes(rendered: Rendered) -> None:
    folder = rendered["quick"][0]
    first = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    report.render(folder)
    assert {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()} == first
