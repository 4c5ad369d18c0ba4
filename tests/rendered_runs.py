"""Fake runs of a shipped recipe, rendered, and what their reports say. Owns no run: those are the tests'."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

import fake_run
from smbench import report
from smbench.analysis import Analysis
from smbench.cell import Cell
from smbench.result import Work

Rendered = Mapping[str, tuple[Path, Analysis]]
"""Folder and analysis of each run by its name."""


def render(
    parent: Path,
    recipe: bytes,
    runs: Mapping[str, tuple[Any, Mapping[str, Any]]],
    profile_of: Callable[[str], str],
    work: Callable[[Cell], Work] | None = None,
) -> Rendered:
    """Build and render each run, of outcomes and an environment; `work` stands for the fake's own, where given."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        if work is not None:
            patch.setattr(fake_run, "work", work)
        for name, (outcome, environment) in runs.items():
            fake_run.build(parent / name, recipe, profile_of(name), outcome, [environment])
            found[name] = parent / name, report.render(parent / name)
    return found


def text_of(rendered: Rendered, name: str) -> str:
    """A run's report."""
    return (rendered[name][0] / "report.md").read_text(encoding="utf-8")


def table_after(text: str, words: str) -> list[list[str]]:
    """The first table after some words, as cells, without its rule."""
    table = re.findall(r"(?:^\|.*\n)+", text.split(words, 1)[1], re.MULTILINE)[0]
    lines = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table.splitlines()]
    return [lines[0], *lines[2:]]


def assert_whole_tables(text: str) -> None:
    """A report's tables are tables to Markdown, at least one, each with equal columns and no blank cell."""
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    assert len(tables) == sum(token.type == "table_open" for token in tokens) > 0
    for table in tables:
        rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in table.splitlines()]
        assert len({len(row) for row in rows}) == 1, table
        assert all(cell.strip() for row in rows for cell in row), table
