"""The bytes of a foreign result file as JSON objects or rows of a table, and careful looks into them.

Owns what every reader needs to fail well: a message that names the file, the result in it, the key, what was found.
Does not know any tool.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from smbench.errors import CorruptError, UsageError

LARGEST_BYTES = 1 << 30
_LEAST_RATE = 1e-6
"""Requests per second that six decimals can still say."""
SHOWN = 60
"""Characters of a foreign value that a message shows."""
_BETWEEN = re.compile(r"(?:\s+|#[^\n]*(?:\n|$))*")
"""What may stand between JSON objects: blank lines and comment lines."""


@dataclass(frozen=True, slots=True)
class Content:
    """A file, read: either objects or rows."""

    name: str
    sha256: str
    objects: tuple[Mapping[str, Any], ...] = ()
    """JSON objects in order: one of a JSON file, one a line of JSON lines, or any that follow one another."""
    rows: tuple[tuple[str, ...], ...] = ()
    """Of a table with commas."""

    def found(self) -> str:
        """What a message says was found."""
        if self.rows:
            return f"a table that begins with {shown(','.join(self.rows[0]))}"
        keys = ", ".join(list(self.objects[0])[:8])
        return f"{len(self.objects)} JSON object{'s' if len(self.objects) > 1 else ''} with the keys {shown(keys)}"


def read(path: Path) -> Content:
    """The content of a file.

    UsageError: it is not there, no file, or too large. CorruptError: it holds neither JSON objects nor a table.
    """
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise UsageError(f"{path.name} is no file; name the result file itself")
        if size > LARGEST_BYTES:
            raise UsageError(f"{path.name} has {size} bytes, and more than {LARGEST_BYTES} are not read")
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    return parse(data, path.name)


def parse(data: bytes, name: str) -> Content:
    """The content of the bytes of a file called `name`. CorruptError as in `read`."""
    sha256 = hashlib.sha256(data).hexdigest()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CorruptError(f"{name}: not a text: byte {error.start} is not UTF-8") from error
    start = _after_gap(text, 0)
    if start == len(text):
        raise CorruptError(f"{name}: the file is empty")
    if text[start] == "{":
        return Content(name, sha256, objects=_objects(text, name))
    if text[start] == "[":
        raise CorruptError(f"{name}: a JSON list, and no tool that is known here writes one as its result")
    return Content(name, sha256, rows=_rows(text, name))


def shown(value: object) -> str:
    """A foreign value in a message: short, on one line."""
    text = " ".join(str(value).split())
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def _after_gap(text: str, position: int) -> int:
    found = _BETWEEN.match(text, position)
    return found.end() if found else position


def _objects(text: str, name: str) -> tuple[Mapping[str, Any], ...]:
    """JSON objects one after the other, with blank and comment lines between them: what one-batch logs look like."""
    decoder = json.JSONDecoder()
    objects: list[Mapping[str, Any]] = []
    position = _after_gap(text, 0)
    while position < len(text):
        where = f"{name}: object {len(objects) + 1}, line {text.count(chr(10), 0, position) + 1}"
        try:
            value, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            rest = text[error.pos :].strip()
            # half a word such as `tru` is no value either
            cut = not rest or rest == "-" or rest.isalpha() or error.msg.startswith("Unterminated")
            fault = "ends in the middle: the file is cut off" if cut else f"is not JSON: {error.msg}"
            raise CorruptError(f"{where}: {fault} (line {error.lineno}, column {error.colno})") from error
        except (ValueError, RecursionError) as error:
            raise CorruptError(f"{where}: is not JSON that can be read: {shown(error)}") from error
        if not isinstance(value, dict):
            raise CorruptError(f"{where}: {shown(value)} stands where a JSON object should")
        objects.append(value)
        position = _after_gap(text, end)
    return tuple(objects)


def _rows(text: str, name: str) -> tuple[tuple[str, ...], ...]:
    try:
        rows = tuple(tuple(row) for row in csv.reader(io.StringIO(text, newline=""), strict=True))
    except csv.Error as error:
        raise CorruptError(f"{name}: neither JSON objects nor a table with commas: {error}") from error
    if not any(len(row) > 1 for row in rows):
        raise CorruptError(f"{name}: neither JSON objects nor a table with commas; it begins with {shown(text[:200])}")
    return rows


@dataclass(frozen=True, slots=True)
class Fields:
    """A JSON object, looked at with care: every fault names its place."""

    values: Mapping[str, Any]
    where: str

    def fail(self, key: str, expected: str) -> NoReturn:
        """CorruptError: the key has something else than expected."""
        found = f"found {shown(repr(self.values[key]))}" if key in self.values else "there is none"
        raise CorruptError(f"{self.where}: {key}: expected {expected}, {found}")

    def number(self, key: str) -> float:
        """A finite number of at least 0."""
        value: Any = self.values.get(key)
        if not _is_number(value):
            self.fail(key, "a number of at least 0")
        return float(value)

    def maybe_number(self, key: str) -> float | None:
        """The same; None where the key is absent or null."""
        return None if self.values.get(key) is None else self.number(key)

    def count(self, key: str) -> int:
        """An integer of at least 0; whole numbers that were written with a point count."""
        value = self.number(key)
        if value != int(value) or value >= 2**63:
            self.fail(key, "an integer of at least 0")
        return int(value)

    def maybe_count(self, key: str) -> int | None:
        """The same; None where the key is absent or null."""
        return None if self.values.get(key) is None else self.count(key)

    def maybe_text(self, key: str) -> str | None:
        """A text; None where the key is absent or null."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, str):
            self.fail(key, "a text")
        return value

    def numbers(self, key: str) -> list[float]:
        """A list of finite numbers of at least 0."""
        value = self.values.get(key)
        if not isinstance(value, list) or not all(map(_is_number, value)):
            self.fail(key, "a list of numbers of at least 0")
        return [float(item) for item in value]

    def series(self, key: str) -> list[list[float]]:
        """A list of such lists."""
        value = self.values.get(key)
        if not isinstance(value, list) or not all(isinstance(row, list) and all(map(_is_number, row)) for row in value):
            self.fail(key, "a list of lists of numbers of at least 0")
        return [[float(item) for item in row] for row in value]

    def part(self, key: str) -> Fields:
        """The object below a key."""
        value = self.values.get(key)
        if not isinstance(value, dict):
            self.fail(key, "a JSON object")
        return Fields(value, f"{self.where}: {key}")

    def maybe_part(self, key: str) -> Fields | None:
        """The same; None where the key is absent or null."""
        return None if self.values.get(key) is None else self.part(key)

    def parts(self, key: str) -> list[Fields]:
        """The objects of the list below a key."""
        value = self.values.get(key)
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            self.fail(key, "a list of JSON objects")
        return [Fields(item, f"{self.where}: {key}[{i}]") for i, item in enumerate(value)]

    def without_error(self, output_lens: Sequence[float]) -> list[int]:
        """Which requests succeeded: those with an empty text in `errors`; in files without it, those with output."""
        errors = self.values.get("errors")
        if errors is None:
            return [i for i, tokens in enumerate(output_lens) if tokens > 0]
        if not isinstance(errors, list) or len(errors) != len(output_lens):
            self.fail("errors", f"a list of {len(output_lens)} texts")
        return [i for i, error in enumerate(errors) if not error]

    def plain(self, keys: Sequence[str]) -> dict[str, Any]:
        """Those of the keys that are there with a text, a finite number or a truth value: what may be kept as it is."""
        found = {key: self.values[key] for key in keys if isinstance(self.values.get(key), str | bool | int | float)}
        return {key: value for key, value in found.items() if isinstance(value, str) or _is_plain(value)}


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value) and value >= 0
    except OverflowError:
        return False


def _is_plain(value: float) -> bool:
    return abs(value) < 2**63 if isinstance(value, int) else math.isfinite(value)


def base_name(model: object) -> str | None:
    """A model's name without the folder or the organization before it: where it lay is nobody's business.

    None for anything that is no text.
    """
    if not isinstance(model, str):
        return None
    return model.replace("\\", "/").rstrip("/").rpartition("/")[2] or None


def rate_text(rate: object) -> str | None:
    """A request rate as our axis has it: `inf`, or a decimal without trailing zeros; None for anything else."""
    if isinstance(rate, bool) or not isinstance(rate, str | int | float):
        return None
    try:
        value = float(rate)
    except (ValueError, OverflowError):
        return None
    if math.isnan(value) or value < _LEAST_RATE:
        return None
    return "inf" if math.isinf(value) else f"{value:.6f}".rstrip("0").rstrip(".")


def common_length(lengths: Sequence[float]) -> int | None:
    """The length that all have; None where they differ or there are none."""
    return int(lengths[0]) if lengths and len(set(lengths)) == 1 else None


def mean_length(tokens: int | None, requests: int | None) -> int | None:
    """Tokens of each request where they divide evenly, which equal lengths do; None otherwise."""
    return tokens // requests if tokens and requests and tokens % requests == 0 else None
