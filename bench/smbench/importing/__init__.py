"""Result files of other tools, read into one record (`imported`). One module a tool; each says which version was read.

The tool is known by what is in the file, never by the file's name. Owns which formats exist; `content` owns how a bad
file is refused: with its name, what was found and what is known, and never with a traceback.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from pydantic import ValidationError

from smbench.errors import CorruptError
from smbench.imported import ImportedRun
from smbench.importing import (
    aiperf,
    guidellm,
    sglang_offline,
    sglang_one_batch,
    sglang_serving,
    vllm_latency,
    vllm_serve,
    vllm_throughput,
)
from smbench.importing.content import Content
from smbench.importing.content import parse as parse_content
from smbench.importing.content import read as read_content


class Format(Protocol):
    """What a module of this package has."""

    TOOL: str
    """A key of `metricnames.TOOLS`."""
    FORMAT: str
    """What a message calls it."""

    def knows(self, keys: set[str]) -> bool:
        """Whether a JSON object with these keys is the tool's."""

    def read(self, content: Content) -> Iterator[ImportedRun]:
        """Each result of a file whose objects are all the tool's. CorruptError names file, place, key and fault."""


FORMATS: tuple[Format, ...] = (
    vllm_serve,
    vllm_latency,
    vllm_throughput,
    sglang_serving,
    sglang_one_batch,
    sglang_offline,
    aiperf,
    guidellm,
)


def read(path: Path) -> list[ImportedRun]:
    """Every result of a file.

    UsageError where it cannot be read. CorruptError where it is cut off, of no known format, of several, or says
    something that cannot be.
    """
    return _runs(read_content(path))


def parse(data: bytes, name: str) -> list[ImportedRun]:
    """Every result in the bytes of a file called `name`. CorruptError as in `read`."""
    return _runs(parse_content(data, name))


def known() -> str:
    """The formats, as a message lists them."""
    return "; ".join(form.FORMAT for form in FORMATS)


def _runs(content: Content) -> list[ImportedRun]:
    form = _format_of(content)
    try:
        return [_checked(run) for run in form.read(content)]
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(map(str, fault["loc"]))
        message = fault["msg"].removeprefix("Value error, ")
        raise CorruptError(f"{content.name}: {form.FORMAT}: {place}: {message}") from error


def _format_of(content: Content) -> Format:
    if content.rows:
        if aiperf.knows_rows(content.rows):
            return aiperf
        raise CorruptError(f"{content.name}: {content.found()}; no known format; known: {known()}")
    found = [next((form for form in FORMATS if form.knows(set(values))), None) for values in content.objects]
    if found[0] is None:
        raise CorruptError(f"{content.name}: {content.found()}; no known format; known: {known()}")
    for position, form in enumerate(found, 1):
        if form is not found[0]:
            other = form.FORMAT if form else "of no known format"
            raise CorruptError(f"{content.name}: object 1 is {found[0].FORMAT}, and object {position} is {other}")
    return found[0]


def _checked(run: ImportedRun) -> ImportedRun:
    """The run, with a note for each median that its own samples contradict."""
    notes = [fault for measure in run.measures if (fault := measure.contradiction()) is not None]
    return run.model_copy(update={"notes": (*run.notes, *notes)}) if notes else run
