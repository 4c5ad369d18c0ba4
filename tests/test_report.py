"""What a reader of a report can rely on: every number and word of it, and that foreign strings stay words."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

import fake_run
import small_runs
from rendered_runs import assert_whole_tables
from smbench import __version__, report
from smbench.analysis import Analysis
from smbench.cell import Cell
from smbench.errors import UsageError
from smbench.formats import LONGEST, escape
from smbench.recipe import Profile
from smbench.result import Result

GOLDEN = Path(__file__).with_name("golden")
UPDATE = "SMBENCH_UPDATE_GOLDEN"
"""`SMBENCH_UPDATE_GOLDEN=1 pytest tests/test_report.py` writes the golden files anew; read their diff."""

Outcome = Callable[[Cell, Profile], Result | None]
RUNS: Mapping[str, tuple[str, Outcome, Mapping[str, Any]]] = {
    "every_status": ("full", fake_run.every_status, {**fake_run.GPU, "libraries": {"torch": fake_run.HOSTILE}}),
    "cpu": ("cpu", fake_run.on_a_processor, fake_run.CPU),
    "all_failed": ("full", fake_run.all_failed, {**fake_run.GPU, "gpu": {"name": fake_run.HOSTILE}}),
    "unfinished": ("full", fake_run.unfinished, fake_run.GPU),
}


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, tuple[Path, Analysis]]:
    """Every fake run, rendered once."""
    found = {}
    for name, (profile, outcome, environment) in RUNS.items():
        folder = fake_run.build(
            tmp_path_factory.mktemp("runs") / name, fake_run.RECIPE, profile, outcome, [environment]
        )
        found[name] = folder, report.render(folder)
    return found


def text_of(rendered: Mapping[str, tuple[Path, Analysis]], name: str) -> str:
    return (rendered[name][0] / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", RUNS)
def test_text_is_what_was_reviewed(rendered: Mapping[str, tuple[Path, Analysis]], name: str) -> None:
    golden = GOLDEN / f"report_{name}.md"
    text = text_of(rendered, name).replace(f"smbench == {__version__}\n", "smbench == VERSION\n")
    if os.environ.get(UPDATE):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text, encoding="utf-8")
    assert text == golden.read_text(encoding="utf-8"), f"{golden.name}: if the change is meant, {UPDATE}=1 rewrites it"


@pytest.mark.parametrize("name", RUNS)
def test_tables_have_equal_columns_and_no_blank_numbers(
    rendered: Mapping[str, tuple[Path, Analysis]], name: str
) -> None:
    text = text_of(rendered, name)
    assert_whole_tables(text)


@pytest.mark.parametrize("name", RUNS)
def test_foreign_strings_stay_words(rendered: Mapping[str, tuple[Path, Analysis]], name: str) -> None:
    text = text_of(rendered, name)
    # a viewer that would let HTML through
    lenient = MarkdownIt("commonmark", {"html": True}).enable("table")
    inline = [child for token in lenient.parse(text) for child in token.children or [token]]
    assert not [token for token in inline if token.type in ("html_inline", "html_block")]
    links = [
        str(token.attrs.get("href", token.attrs.get("src"))) for token in inline if token.type in ("link_open", "image")
    ]
    assert all(link.startswith(("figures/", "https://github.com/vllm-project/vllm/pull/")) for link in links)
    headings = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    assert sum(token.type == "heading_open" for token in inline) == len(headings)
    assert "not a heading" not in headings
    page = (rendered[name][0] / "report.html").read_text(encoding="utf-8")
    assert page.count("<script") == 1 and "<b>" not in page and 'href="javascript' not in page


@pytest.mark.parametrize("name", RUNS)
def test_nothing_undefined_is_printed(rendered: Mapping[str, tuple[Path, Analysis]], name: str) -> None:
    text = text_of(rendered, name)
    assert not re.search(r"\b(nan|inf|None|Undefined|undefined)\b|object at 0x", text)


@pytest.mark.parametrize("name", RUNS)
def test_figures_of_the_text_exist_and_no_others(rendered: Mapping[str, tuple[Path, Analysis]], name: str) -> None:
    folder = rendered[name][0]
    named = set(re.findall(r"\]\((figures/[^)]+)\)", text_of(rendered, name)))
    there = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.glob("figures/*")}
    assert there.keys() == named
    assert all(data.startswith(b"\x89PNG") and len(data) > 10_000 for data in there.values())
    assert bool(there) == any(row.summaries for row in rendered[name][1].rows)


def test_figures_are_readable_in_width(rendered: Mapping[str, tuple[Path, Analysis]]) -> None:
    data = (rendered["every_status"][0] / "figures" / "bgmv_shrink_cold.png").read_bytes()
    assert int.from_bytes(data[16:20], "big") == 1200


def test_rendering_again_gives_the_same_bytes_and_leaves_no_stale_file(tmp_path: Path) -> None:
    folder = fake_run.build(tmp_path / "run", fake_run.RECIPE, "cpu", fake_run.on_a_processor, [fake_run.CPU])
    report.render(folder)
    first = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    (folder / "figures" / "of_another_recipe.png").write_bytes(b"stale")
    report.render(folder)
    assert {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()} == first


def test_a_report_without_gpu_says_so_first(rendered: Mapping[str, tuple[Path, Analysis]]) -> None:
    head = text_of(rendered, "cpu").split("## 1.")[0]
    assert "No GPU number is in this report" in head
    assert "No GPU number" not in text_of(rendered, "every_status")


def test_an_unfinished_report_says_how_far_it_is(rendered: Mapping[str, tuple[Path, Analysis]]) -> None:
    planned = len(rendered["unfinished"][1].rows)
    assert f"30 of {planned} cells have a result" in text_of(rendered, "unfinished").split("## 1.")[0]
    assert "Unfinished" not in text_of(rendered, "every_status")


def test_a_withheld_number_is_a_dash_with_its_reason(rendered: Mapping[str, tuple[Path, Analysis]]) -> None:
    text = text_of(rendered, "every_status")
    expand = text.split("##### bgmv_expand")[1]
    row = next(line for line in expand.splitlines() if line.startswith("| 1 | 128 |"))
    assert row.split("|")[5].strip() == "—"
    assert "`invalid`, e.g. selection: bgmv_expand/smbench-tuned" in expand


def test_published_numbers_stand_beside_the_same_protocol_only(
    rendered: Mapping[str, tuple[Path, Analysis]],
) -> None:
    text = text_of(rendered, "every_status")
    published = text.split("### 3.3")[1].split("### 3.4")[0]
    # the record of the document at batch 1, hidden size 4096: 0.002283519903818766 ms by default, 2.44 µs for punica
    assert "| 1 | 4096 | 2.436 | 2.130 | 2.284 |" in published
    assert "Another card" in published
    assert "are not shown: this profile has no measure" in text_of(rendered, "cpu")


def test_our_kernels_are_said_to_be_in_the_languages_that_ran(tmp_path: Path) -> None:
    def some_in_cuda(cell: Cell, profile: Profile) -> Result | None:
        found = fake_run.every_status(cell, profile)
        if found is None or found.selection is None or cell.provider != "smbench-tuned" or cell.axes["batch"] != 1:
            return found
        selection = found.selection.model_copy(update={"config": {"KERNEL": 2, "CHUNK": 8}})
        return found.model_copy(update={"selection": selection})

    folder = fake_run.build(tmp_path / "run", fake_run.RECIPE, "full", some_in_cuda, [fake_run.GPU])
    report.render(folder)
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert "our kernels in Triton, with launch parameters that a model of the card ranks first" in text
    assert "our kernels in CUDA C++ and Triton, with launch parameters that the tuner found" in text


def test_reasons_are_counted_not_repeated(tmp_path: Path) -> None:
    def numbered(cell: Cell, profile: Profile) -> Result:
        return fake_run.result(
            cell, "crashed", f"illegal address at 0x{cell.cell_id[:4]} in cell {cell.axes['hidden_size']}"
        )

    folder = fake_run.build(tmp_path / "run", fake_run.RECIPE, "cpu", numbered, [fake_run.CPU])
    report.render(folder)
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert len(text.split("## 4. TODO")[1].splitlines()) < 30


def test_a_recipe_with_other_axes_renders(tmp_path: Path) -> None:
    def timed(cell: Cell, profile: Profile) -> Result:
        return small_runs.timed(cell)

    folder = fake_run.build(tmp_path / "run", small_runs.recipe_text(), "cpu", timed, [fake_run.CPU])
    report.render(folder)
    assert "bgmv_shrink" in (folder / "report.md").read_text(encoding="utf-8")


def test_an_unknown_template_lists_the_known_ones(tmp_path: Path) -> None:
    recipe = fake_run.RECIPE.replace(b'"lora.md.j2"', b'"../secrets.md.j2"')
    folder = fake_run.build(tmp_path / "run", recipe, "cpu", fake_run.on_a_processor, [fake_run.CPU])
    with pytest.raises(UsageError, match=r"unknown template.*lora\.md\.j2"):
        report.render(folder)


def test_matplotlib_is_imported_only_to_draw() -> None:
    code = "import sys, smbench.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60))
def test_any_string_is_literal_in_a_table_and_at_the_start_of_a_line(text: str) -> None:
    lenient = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    shown = str(escape(text))
    expected = plain(text)
    cells = lenient.parse(f"| a | b |\n|---|---|\n| {shown} | x |\n")
    inline = [token for token in cells if token.type == "inline"]
    assert [literal(token.children or []) for token in inline] == ["a", "b", expected, "x"]
    if expected:
        tokens = lenient.parse(f"- {shown}\n")
        assert [token.type for token in tokens if token.block and "list" not in token.type] == [
            "paragraph_open",
            "inline",
            "paragraph_close",
        ]


def plain(text: str) -> str:
    """What a reader should see of a string: visible characters, single spaces."""
    kept = "".join(" " if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp") else c for c in text)
    return " ".join(kept.split())


def literal(tokens: list[Any]) -> str:
    """The text of inline tokens that are all text."""
    assert {token.type for token in tokens} <= {"text"}, tokens
    return "".join(token.content for token in tokens)


def test_long_strings_are_cut_with_a_count() -> None:
    assert str(escape("x" * (LONGEST + 7))) == "x" * LONGEST + "… (7 more characters)"
