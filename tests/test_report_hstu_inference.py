"""The report of document 003, second half: sums, latencies, the block, published times marked, copies, graphs."""

from __future__ import annotations

import csv
import re

import pytest

import fake_inference_run as fake
import fake_run
from rendered_runs import Rendered, assert_whole_tables, render, table_after, text_of
from smbench import report
from smbench.document_hstu_inference import HstuInference

RUNS = {
    "full": (fake.on_a_card, fake_run.GPU),
    "quick": (fake.on_a_card, fake_run.GPU),
    "cpu": (fake.on_a_processor, fake_run.CPU),
    "failed": (fake_run.all_failed, {**fake_run.GPU, "gpu": {"name": fake_run.HOSTILE}}),
    "ignored": (fake.ignoring_the_cache, fake_run.GPU),
}


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Rendered:
    """Every fake run of the shipped recipe, rendered once."""
    parent = tmp_path_factory.mktemp("runs")
    return render(parent, fake.PATH.read_bytes(), RUNS, lambda name: name if name in ("full", "cpu") else "quick")


@pytest.mark.parametrize("name", RUNS)
def test_tables_have_equal_columns_and_no_blank_cells(rendered: Rendered, name: str) -> None:
    text = text_of(rendered, name)
    assert_whole_tables(text)
    assert not re.search(r"\b(nan|inf|None|Undefined|undefined)\b|object at 0x", text)


def test_the_setup_is_beside_the_documents(rendered: Rendered) -> None:
    table = table_after(text_of(rendered, "full"), "HSTU setup for benchmark")
    rows = {row[0]: row[1:] for row in table[1:]}
    assert rows["Number of HSTU layers"] == ["8", "8"]
    assert rows["Max Per Sequence Length"] == ["4096", "4096 (its code: 8192)"]
    assert rows["Page size"] == ["32", "unstated"]


def test_sums_are_of_one_request_at_each_length(rendered: Rendered) -> None:
    analysis = rendered["full"][1]
    table = table_after(text_of(rendered, "full"), "Sum of the medians")
    assert [row[0] for row in table[1:]] == ["1", "2", "4", "8"]
    for provider, column in (("recompute", 1), ("cache", 2), ("cache-graph", 3)):
        source = "nowhere" if provider == "recompute" else "device"
        rows = [r for r in analysis.select("hstu_request", provider, batch=8, source=source)]
        assert len(rows) == (16 if provider != "cache-graph-serial" else 0)
        total = sum(row.summaries["call"].median for row in rows)
        assert float(table[4][column]) == pytest.approx(total * 1e3, rel=1e-3)
    assert float(table[4][5][:-1]) == pytest.approx(float(table[4][1]) / float(table[4][3]), rel=1e-2)


def test_published_sums_are_marked_as_what_they_are(rendered: Rendered) -> None:
    text = text_of(rendered, "full")
    assert table_after(text, "Published, NVIDIA L20, **faulty**")[4][:4] == ["8", "548.0", "200.0", "212.0"]
    assert table_after(text, "as its repository showed it in 2026")[1][-1] == "1.27×"
    assert "Published times are of **another card**, NVIDIA L20" in text
    assert "**These are not the document's sizes.**" in text_of(rendered, "cpu")


def test_latencies_are_a_distribution(rendered: Rendered) -> None:
    rows = table_after(text_of(rendered, "full"), "Latency of single requests")[1:]
    assert {row[1] for row in rows} == {"256", "2048", "4096"}
    for row in rows:
        median, p90, p99 = (float(value) for value in row[3:6])
        assert median < p90 < p99


def test_the_block_stands_by_cached_tokens_with_its_bound(rendered: Rendered) -> None:
    table = table_after(text_of(rendered, "full"), "Batch 8:")
    assert len(table) == 1 + 21
    line = next(row for row in table if row[:3] == ["4096", "128", "3968"])
    without, cache, graph = (float(value) for value in line[3:6])
    assert float(line[7][:-1]) == pytest.approx(without / graph, rel=1e-2)
    assert float(line[9].removesuffix(" % †")) == pytest.approx(float(line[8]) / graph * 100, rel=1e-2)
    assert cache > graph


def test_shares_of_cells_whose_clocks_were_held_down_are_marked(rendered: Rendered) -> None:
    text = text_of(rendered, "full")
    marked = {batch: [row[-1].endswith("†") for row in table_after(text, f"Batch {batch}:")[1:]] for batch in (1, 8)}
    assert all(marked[8]) and not any(marked[1])
    assert "held the clocks down while this cell ran: sw_power_cap." in text
    assert "†" not in text_of(rendered, "cpu")


def test_published_blocks_are_faulty_corrected_and_suspect(rendered: Rendered) -> None:
    text = text_of(rendered, "full").split("#### What was published")[1]
    table = table_after(text, "Batch 1, ms")
    assert table[0][2:] == ["NVIDIA L20, faulty", "NVIDIA L20, corrected", "NVIDIA B200, suspect"]
    assert next(row for row in table if row[:2] == ["2048", "128"])[2:] == ["0.750 (5.27×)", "1.700 (2.31×)", "—"]
    assert text.count("- `refuted`, sensitivity: block, batch") == 2
    assert "of this one it has no findings" in text


def test_the_statements_follow_from_the_numbers(rendered: Rendered) -> None:
    text = text_of(rendered, "full").split("### 3. The document's statements")[1]
    rows = {row[0]: row for row in table_after(text, "history of 2048 tokens")[1:]}
    assert rows["1"][1:5] == ["1920", "5.27×", "2.31×", "—"]
    assert rows["8"][1:5] == ["1920", "9.03×", "4.81×", "4.22×"]
    assert "1.36× to 2.58× (its edition, faulty), 1.27× to 2.58× (of 2026)" in text
    assert re.search(r"Here: \d\.\d\d× to \d\.\d\d× with KV cache, CUDA graph over 4 batch sizes", text)
    assert "The graph is clearly slower at 0 of" in text


def test_copies_are_beside_and_before_the_layers(rendered: Rendered) -> None:
    text = text_of(rendered, "full").split("#### Host, device or nowhere")[1]
    times = table_after(text, "Medians in ms")
    line = next(row for row in times if row[:4] == ["block", "8", "4096", "128"])
    device, first = float(line[5]), float(line[7])
    cell = next(c for c in fake.RECIPE.cells("full") if c.axes.get("source") == "host" and c.axes["batch"] == 8)
    assert first - device == pytest.approx(fake.onload_bytes(cell) / fake.BUS_BYTES_PER_S * 1e3, rel=0.05)
    # 1.1 times the longer one, which are the copies, and an eighth of the shorter one beside it
    copies = first - device
    assert line[-2:] == ["1.10×", f"{1.1 * copies / (copies + device / 8):.2f}×"]
    rates = next(row for row in table_after(text, "Bytes of a step") if row[:4] == ["block", "8", "4096", "128"])
    assert rates[6] == rates[7] == "50 GB/s"
    assert "users were evicted" in text and "figures/transfers_call.png" in text


def test_graphs_and_bookkeeping_have_their_cost(rendered: Rendered) -> None:
    text = text_of(rendered, "full")
    row = table_after(text, "#### Graphs")[1]
    assert row[0] == "8 × 4352" and row[3:] == ["250 ms to 250 ms", "3 MiB to 3 MiB"]
    assert table_after(text, "#### Bookkeeping")[2] == ["8", "10000", "4096", "128", "50.00", "50.60"]
    assert "No graph was captured in this run." in text_of(rendered, "cpu")


def test_an_ignored_cache_is_refuted_and_shows_no_time(rendered: Rendered) -> None:
    text = text_of(rendered, "ignored")
    assert re.search(r"\| sensitivity \| refuted \|", text)
    line = next(row for row in table_after(text, "Batch 8:") if row[:2] == ["4096", "128"])
    assert line[4:6] == ["—", "—"]
    assert "of this one it has no findings" not in text


def test_records_hold_every_time_and_count(rendered: Rendered) -> None:
    folder, analysis = rendered["full"]
    assert {path.name for path in folder.glob("records/*")} == {"times_call.csv", "counts.csv"}
    times, counts = (
        list(csv.DictReader((folder / "records" / name).read_text(encoding="utf-8").splitlines()))
        for name in ("times_call.csv", "counts.csv")
    )
    assert len(times) == sum(bool(row.summaries) for row in analysis.rows)
    host = next(line for line in counts if line["source"] == "host")
    assert int(host["attended_tokens"]) == int(host["host_tokens"]) + int(host["new_tokens"]) > 0


@pytest.mark.parametrize("name", RUNS)
def test_figures_of_the_text_exist_and_no_others(rendered: Rendered, name: str) -> None:
    folder = rendered[name][0]
    named = set(re.findall(r"\]\((figures/[^)]+)\)", text_of(rendered, name)))
    there = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.glob("figures/*")}
    assert there.keys() == named and len(there) == (0 if name == "failed" else 4)
    assert all(data.startswith(b"\x89PNG") and len(data) > 10_000 for data in there.values())


def test_rendering_again_gives_the_same_bytes(rendered: Rendered) -> None:
    folder = rendered["quick"][0]
    first = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    report.render(folder)
    assert {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()} == first


def test_the_document_is_the_recipes(rendered: Rendered) -> None:
    assert isinstance(report.document_of(rendered["full"][1]), HstuInference)
