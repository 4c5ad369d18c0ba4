"""Published numbers as their document prints them: its tables, its records, its log lines. Owns that look only.

The sentences around them are in the template and in the file; nothing is computed but the form of a number.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from markupsafe import Markup

from smbench import published, report, resources
from smbench.observations import coordinates
from smbench.published import Published
from smbench.published_table import FIELD, Column, Entry, Printed, PublishedTable, Settings

TEMPLATE = "published.md.j2"


@dataclass(frozen=True, slots=True)
class Shown:
    """One table, block of records or log."""

    heading: str
    kind: Literal["table", "code"]
    in_document: bool
    """The document prints it; otherwise its numbers come from a figure, a data file or a later edition."""
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    """Cells as printed; a missing one is empty."""
    lines: Sequence[str]
    """Of a block of code."""
    notes: Sequence[str]


def folder() -> Path:
    """Where the files of published numbers lie."""
    return resources.recipes_dir() / "published"


def load(name: str) -> Published:
    """The published numbers of a name. UsageError lists the known ones."""
    return published.load(published.find(name, folder()))


def render(numbers: Published) -> str:
    """The Markdown of everything in a file."""
    environment = report.markdown_templates()
    environment.filters["code"] = code
    text = environment.get_template(TEMPLATE).render(published=numbers, parts=list(parts(numbers)))
    return re.sub(r"\n{3,}", "\n\n", text).rstrip("\n") + "\n"


def as_json(name: str, numbers: Published) -> dict[str, Any]:
    """The tables as printed, for programs."""
    return {
        "name": name,
        "document": numbers.document,
        "device": numbers.device,
        "device_basis": numbers.device_basis,
        "parts": [
            {
                "heading": part.heading,
                "in_document": part.in_document,
                "headers": list(part.headers),
                "rows": [list(row) for row in part.rows],
                "lines": list(part.lines),
            }
            for part in parts(numbers)
        ],
    }


def parts(numbers: Published) -> Iterator[Shown]:
    """Settings, then tables in the order of the file; a log stands where its first table does."""
    for settings in numbers.settings:
        yield _settings(settings)
    done: set[str] = set()
    for table in numbers.table:
        form = table.layout.form if table.layout else "table"
        if form == "table":
            yield _table(numbers, table)
        elif form == "records":
            yield _records(table)
        elif table.layout and table.layout.block and table.layout.block not in done:
            done.add(table.layout.block)
            yield _log(numbers, table.layout.block)


def code(lines: Sequence[str]) -> Markup:
    """A fenced block that its content cannot leave."""
    longest = max((len(run) for line in lines for run in re.findall(r"`+", line)), default=0)
    fence = "`" * max(3, longest + 1)
    return Markup("\n".join([fence, *(re.sub(r"[\r\n]", " ", line) for line in lines), fence]))


def _settings(settings: Settings) -> Shown:
    notes = [f"{item}: the source's code has {value}" for item, value in settings.found.items()]
    return Shown(settings.section, "table", True, settings.headers, settings.rows, [], notes)


def _table(numbers: Published, table: PublishedTable) -> Shown:
    columns = table.layout.columns if table.layout else _default_columns(table)
    return Shown(
        table.layout.section if table.layout else table.name,
        "table",
        table.layout is not None,
        [printed.header for printed in columns],
        [[_cell(table, printed, row) for printed in columns] for row in table.rows],
        [],
        list(_notes(numbers, table)),
    )


def _default_columns(table: PublishedTable) -> list[Printed]:
    axes = [Printed(header=axis, axis=axis) for axis in table.axes]
    values = [
        Printed(header=f"{coordinates(column.at.items()) or column.metric} [{column.unit}]", value=i)
        for i, column in enumerate(table.columns)
    ]
    return [*axes, *values]


def _notes(numbers: Published, table: PublishedTable) -> Iterator[str]:
    if table.read_off_plot:
        yield f"read off a plot, within {table.uncertainty:.0%}; figure: {table.path}"
    if table.commit:
        yield f"from another state of the source: {table.commit}"
    for name in dict.fromkeys(name for _, name in table.reasons()):
        yield f"cells without a number: {numbers.missing[name].reason}"
    for label, settings in table.effective.items():
        yield f"{label} ran with {coordinates(settings.items())}"


def _cell(table: PublishedTable, printed: Printed, row: Sequence[Entry]) -> str:
    if printed.text is not None:
        return printed.text
    if printed.axis is not None:
        value = str(row[table.axes.index(printed.axis)])
        return printed.labels.get(value, value)
    index = printed.value or 0
    return _number(table.columns[index], row[len(table.axes) + index])


def _number(column: Column, entry: Entry) -> str:
    """A value as printed; the empty string for a missing one."""
    if isinstance(entry, str):
        return ""
    return str(entry) if column.digits is None else f"{entry:.{column.digits}f}"


def _records(table: PublishedTable) -> Shown:
    layout = table.layout
    lines: list[str] = []
    for row in table.rows:
        record: dict[str, Entry] = {}
        for printed in layout.columns if layout else ():
            if printed.text is not None:
                record[printed.header] = printed.text
            elif printed.axis is not None:
                record[printed.header] = row[table.axes.index(printed.axis)]
            elif not isinstance(entry := row[len(table.axes) + (printed.value or 0)], str):
                record[printed.header] = entry
        lines += json.dumps(record, indent=3).splitlines()
    return Shown(layout.section if layout else table.name, "code", True, [], [], lines, [])


def _log(numbers: Published, name: str) -> Shown:
    block = numbers.block[name]
    lines = {int(place): text for place, text in block.text.items()}
    for table in numbers.table:
        layout = table.layout
        if layout is None or layout.block != name:
            continue
        for place, row in zip(layout.lines, table.rows, strict=True):
            values = {c.metric: v for c, v in zip(table.columns, row[len(table.axes) :], strict=True)}
            lines[place] = _line(layout.pattern or "", values)
    return Shown(block.section, "code", True, [], [], [lines[place] for place in sorted(lines)], [])


def _line(pattern: str, values: Mapping[str, Entry]) -> str:
    def number(found: re.Match[str]) -> str:
        metric, width, decimals = found.groups()
        entry = values[metric]
        return "".rjust(int(width)) if isinstance(entry, str) else f"{entry:{width}.{decimals}f}"

    return FIELD.sub(number, pattern)
