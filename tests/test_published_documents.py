"""The published numbers render into the very tables of their documents, cell by cell, headers and blanks included."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt
from typer.testing import CliRunner

from smbench import published, published_report
from smbench.cli import app
from smbench.errors import UsageError
from smbench.published import Published

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ROOT.parent / "shared" / "documents"
FOLDER = ROOT / "recipes" / "published"

FILES = {
    "001": ("paged-attention-a100",),
    "002": ("gptq-rtx4090", "gptq-l40"),
    "003": ("hstu-layer-h100", "hstu-inference-l20"),
    "004": ("sglang-one-batch",),
}
"""The files that hold a document's tables, in its order."""

Table = list[list[str]]


def document(number: str) -> str:
    found = sorted(DOCUMENTS.glob(f"{number}_*.txt"))
    if not found:
        pytest.skip(f"the source documents are not beside this checkout ({number}_*.txt)")
    return found[0].read_text(encoding="utf-8")


def load(name: str) -> Published:
    return published.load(FOLDER / f"{name}.toml")


def tables(markdown: str) -> list[tuple[str, Table]]:
    """Every table with the heading above it; cells as a reader sees them."""
    found: list[tuple[str, Table]] = []
    heading, tokens = "", MarkdownIt("commonmark").enable("table").parse(markdown)
    for before, token in itertools.pairwise(tokens):
        if before.type == "heading_open":
            heading = seen(token)
        elif token.type == "table_open":
            found.append((heading, []))
        elif token.type == "tr_open":
            found[-1][1].append([])
        elif before.type in ("th_open", "td_open"):
            found[-1][1][-1].append(" ".join(seen(token).split()))
    return found


def seen(token: Any) -> str:
    return "".join(child.content for child in token.children or ())


def printed(name: str) -> list[Table]:
    """The tables of a rendered file that its document has."""
    found = tables(published_report.render(load(name)))
    return [table for heading, table in found[1:] if "not a table of the document" not in heading]


def block(markdown: str, after: str) -> list[str]:
    """The lines of the first code block after a piece of text."""
    fence = markdown.split(after, 1)[1].split("```", 1)[1]
    return fence.split("```", 1)[0].split("\n", 1)[1].rstrip("\n").split("\n")


def records(text: str) -> list[dict[str, object]]:
    """JSON objects that stand behind each other with nothing but space between them."""
    decoder, found, at = json.JSONDecoder(), [], text.index("{")
    while at < len(text):
        record, at = decoder.raw_decode(text, at)
        found.append(record)
        while at < len(text) and text[at].isspace():
            at += 1
    return found


@pytest.mark.parametrize(("number", "count"), [("001", 6), ("002", 5), ("003", 3)])
def test_every_table_of_a_document_is_rendered_cell_by_cell(number: str, count: int) -> None:
    theirs = [table for _, table in tables(document(number))]
    ours = [table for name in FILES[number] for table in printed(name)]
    assert len(theirs) == count
    assert ours == theirs


def test_the_records_of_a_document_are_rendered_key_by_key() -> None:
    theirs = records("\n".join(block(document("004"), "`benchmark.log`\n")[1:]))
    ours = records("\n".join(block(published_report.render(load("sglang-one-batch")), "## benchmark.log")))
    assert len(theirs) == 4
    assert [list(record.items()) for record in ours] == [list(record.items()) for record in theirs]


def test_the_log_of_a_document_is_rendered_line_by_line() -> None:
    theirs = block(document("004"), "terminal output")
    assert len(theirs) == 31
    assert block(published_report.render(load("sglang-one-batch")), "## terminal output") == theirs


def test_the_documents_that_print_no_number_are_known() -> None:
    assert tables(document("000")) == []


def test_all_five_documents_have_their_numbers_here() -> None:
    held = {name: load(name) for name in published.names(FOLDER)}
    assert {numbers.document for numbers in held.values()} == {"000", "001", "002", "003", "004"}
    assert {name: len(list(numbers.points())) for name, numbers in held.items()} == {
        "gptq-l40": 29,
        "gptq-rtx4090": 21,
        "hstu-inference-b200": 19,
        "hstu-inference-l20": 96,
        "hstu-layer-h100": 20,
        "lora-rtx3090": 5544,
        "paged-attention-a100": 51,
        "sglang-one-batch": 76,
    }


def test_a_blank_cell_has_a_reason_and_no_number() -> None:
    numbers = load("paged-attention-a100")
    blanks = [name for table in numbers.table for _, name in table.reasons()]
    assert blanks == ["blank"] * 21
    assert "| 2 | 4096 |  | 1297.227 |  |" in published_report.render(numbers)


def test_a_cell_that_cannot_have_a_number_is_left_out_of_its_record() -> None:
    first = records("\n".join(block(published_report.render(load("sglang-one-batch")), "## benchmark.log")))[0]
    assert "median_decode_latency" not in first
    assert first["prefill_latency"] == 3.7364211082458496


def test_trailing_zeros_are_printed_as_published() -> None:
    assert ["4K", "44.3293", "31.7074", "24.5428", "24.7954", "25.5000"] in printed("hstu-layer-h100")[1]


def test_values_read_off_a_plot_say_so_and_carry_their_uncertainty() -> None:
    numbers = load("hstu-inference-l20")
    assert {point.uncertainty for point in numbers.points()} == {0.02}
    text = published_report.render(numbers)
    assert "read off a plot, within 2%" in text
    values = {
        (p.at["edition"], p.at["new_len"]): p.printed
        for p in numbers.points()
        if (p.at["op"], p.at["batch"], p.at.get("total_len")) == ("hstu_block", 8, 2048)
    }
    assert (values["document", 128], values["corrected", 128]) == (3.8, 6.3)


def test_an_inferred_device_is_called_so() -> None:
    text = published_report.render(load("paged-attention-a100"))
    assert "NVIDIA A100-SXM4-80GB (inferred: the document does not say)" in text


@pytest.mark.parametrize("name", published.names(FOLDER))
def test_every_file_renders_whole(name: str) -> None:
    numbers = load(name)
    found = tables(published_report.render(numbers))[1:]
    wanted = [part for part in published_report.parts(numbers) if part.kind == "table"]
    assert [(len(table), len(table[0])) for _, table in found] == [(1 + len(p.rows), len(p.headers)) for p in wanted]


def test_the_command_prints_markdown_or_json() -> None:
    text = CliRunner().invoke(app, ["report", "--published", "gptq-l40"])
    assert text.exit_code == 0
    assert "| 1024 | 2.41 | 3.01 | 2.33 |" in text.output
    answer = json.loads(CliRunner().invoke(app, ["report", "--published", "gptq-l40", "--json"]).output)
    assert answer["parts"][0]["rows"][0] == ["1024", "2.41", "3.01", "2.33"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["report"], "give a run folder, or --published NAME"),
        (["report", "a", "--published", "gptq-l40"], "give a run folder, or --published NAME"),
        (["report", "--published", "gptq-l4"], "did you mean 'gptq-l40'"),
    ],
)
def test_a_wrong_call_says_what_is_right(arguments: list[str], complaint: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, UsageError)
    assert complaint in str(result.exception)


LOG = """
format = 2
document = "000"
title = "t"
device = "a GPU"
arch = "sm86"
notes = []
versions = {}
source = { repository = "r", commit = "c", licence = "none" }
protocol = {}
legend = {}
at = {}
facts = { layers = 2, doubled = "layers * 2" }
missing = { blank = { reason = "left blank", kind = "unmeasured" } }
block = { log = { section = "log", text = { 1 = "start" } } }

[[table]]
path = "p"
at = {}
axes = ["batch"]
columns = [{ at = {}, metric = "duration", unit = "ms", digits = 1 }]
rows = [[1, 0.5], [2, "blank"]]
layout = { section = "s", form = "lines", block = "log", pattern = "took {duration:6.1} ms", lines = [2, 3] }

[[work]]
where = { batch = 1 }
metric = "duration"
dtype = "float16"
phases = [{ name = "call", bytes = "batch * doubled" }]
"""


def test_a_log_with_a_missing_number_keeps_its_line() -> None:
    numbers = published.parse(LOG.encode(), "log.toml")
    assert next(published_report.parts(numbers)).lines == ["start", "took    0.5 ms", "took        ms"]
    assert numbers.numbers == {"layers": 2.0, "doubled": 4.0}


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ('"blank"]', '"gone"]', "table[0].rows[1]: 'gone' is not a positive number, and no reason of [missing]: blank"),
        ("0.5]", "0.55]", "rows[0]: 0.55 has more than 1 decimals"),
        ('block = "log"', 'block = "lag"', "table[0].layout.block: unknown block 'lag'; known: log"),
        ("{duration:6.1}", "{latency:6.1}", "layout.pattern: one {metric:width.decimals} for each of duration"),
        ("lines = [2, 3]", "lines = [2]", "lines need a block, a pattern and one line number for each row"),
        ('"layers * 2"', '"layers * two"', "facts.doubled: 'layers * two': no number is known for two; known: layers"),
        ('"batch * doubled"', '"batch * seq_len"', "work[0]: phase 'call': bytes: 'batch * seq_len': no number"),
        ('"batch * doubled"', '"-doubled"', "work[0]: phase 'call': bytes is negative: -4"),
        ('"batch * doubled"', '"open(1)"', "work[0].phases[0].bytes: 'open(1)': 'open(1)' is no arithmetic"),
        ("where = { batch = 1 }", "where = { batch = 3 }", "work[0].where: no duration has these coordinates"),
        ("digits = 1", 'definition = "x"', "'duration' has no definition 'x'; known: none"),
        ("axes = ", "read_off_plot = true\naxes = ", "read_off_plot and an uncertainty above 0 come together"),
        ("axes = ", "effective = { 9 = {} }\naxes = ", "effective: no row is labelled '9'"),
    ],
)
def test_a_bad_file_is_named_with_what_is_wrong(old: str, new: str, complaint: str) -> None:
    assert old in LOG
    with pytest.raises(UsageError) as caught:
        published.parse(LOG.replace(old, new, 1).encode(), "log.toml")
    assert str(caught.value).startswith("log.toml: ")
    assert complaint in str(caught.value)
