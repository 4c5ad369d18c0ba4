"""How values look in a report: units, digits and the one escaping of foreign text. Owns no numbers.

Every filter returns Markup, so whatever a template prints without a filter goes through `escape`: a string from a
machine, a recipe or an error message cannot break a table, and cannot become HTML, a link or an image.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from markupsafe import Markup

LONGEST = 300
"""Characters of a foreign string that a report shows; the whole string is in results.jsonl."""
LONGEST_WHOLE = 5000
"""The same for a sentence whose end matters."""
DASH = Markup("—")
"""What stands where a number is missing."""

_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
_SPECIAL = re.compile(r"([\\`*\[\]|~$])")
# an underscore inside a word is no emphasis, and `bgmv_shrink` stays readable
_UNDERSCORE = re.compile(r"(?<![^\W_])_|_(?![^\W_])")
# what begins a heading, a list, a rule or an underlined heading at the start of a line
_BLOCK_START = re.compile(r"^( ?)(\d*)(?=(?:#{1,6}|[+-]|(?<=\d)[.)])(?: |$)|(?:-{2,}|=+) *$)")


def escape(text: str, longest: int = LONGEST) -> Markup:
    """Foreign text as one line of literal Markdown, shortened to `longest` characters."""
    kept = "".join(" " if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp") else char for char in text)
    line = re.sub(r"\s+", " ", kept)
    if len(line) > longest:
        line = f"{line[:longest]}… ({len(line) - longest} more characters)"
    line = "".join(_ENTITIES.get(char, char) for char in _SPECIAL.sub(r"\\\1", line))
    line = _UNDERSCORE.sub(r"\\_", line)
    return Markup(_BLOCK_START.sub(r"\1\2\\", line))


def whole(text: str) -> Markup:
    """A sentence of an audit or of a data file, whose arithmetic must not be cut, as one line of literal Markdown."""
    return escape(text, LONGEST_WHOLE)


def fenced(text: str, language: str = "") -> Markup:
    """Program text as a block of code: its lines without control characters, in a fence that they cannot close."""
    lines = [
        "".join(char for char in line if unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Co"))
        for line in text.splitlines()
    ]
    longest = max((len(run) for line in lines for run in re.findall("`+", line)), default=0)
    fence = "`" * max(3, longest + 1)
    return Markup("\n".join([f"{fence}{language}", *lines, fence]))


def finalize(value: Any) -> Markup | Any:
    """What Jinja prints for an expression. TypeError for a value that has no one way of being printed."""
    if isinstance(value, Markup):
        return value
    if isinstance(value, str):
        return escape(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return Markup(str(value))
    # jinja passes an undefined through here and StrictUndefined raises when it is turned into text
    if type(value).__name__ == "StrictUndefined":
        return value
    raise TypeError(f"a template prints {value!r} without a filter that gives it a unit")


def optional(form: Callable[..., Markup]) -> Callable[..., Markup]:
    """The filter that prints a dash for None."""

    def filter_(value: Any, *arguments: Any) -> Markup:
        return DASH if value is None else form(value, *arguments)

    return filter_


def microseconds(seconds: float) -> Markup:
    """A time in µs without its unit, four digits and never more than three decimals."""
    return Markup(_digits(seconds * 1e6))


def seconds(value: float) -> Markup:
    """A time in seconds without its unit, four digits."""
    return Markup(f"{value:.4f}" if value < 1 else f"{value:.3f}" if value < 10 else f"{value:.2f}")


def milliseconds(seconds: float) -> Markup:
    """A time in ms without its unit, four digits and never more than three decimals."""
    return Markup(_digits(seconds * 1e3))


def teraflops(rate: float) -> Markup:
    """A rate in TFLOP/s with its unit."""
    return Markup(f"{rate / 1e12:.3g} TFLOP/s")


def size(count: int) -> Markup:
    """A number of bytes in the largest binary unit that it reaches, three digits."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= factor:
            return Markup(f"{count / factor:.3g} {unit}" if count < 1000 * factor else f"{count / factor:.0f} {unit}")
    return Markup(f"{count} B")


def money(amount: float) -> Markup:
    """A sum in whatever currency its price was in."""
    return Markup(f"{amount:.2f}")


def duration(seconds: float) -> Markup:
    """A span of wall clock with its unit."""
    if seconds < 1:
        return Markup(f"{seconds * 1e3:.0f} ms")
    if seconds < 120:
        return Markup(f"{seconds:.1f} s")
    return Markup(f"{seconds / 60:.1f} min")


def ratio(value: float) -> Markup:
    """A ratio, e.g. `1.42×`."""
    return Markup(f"{value:.2f}×" if value < 100 else f"{value:.0f}×")


def percent(fraction: float) -> Markup:
    """A fraction as per cent."""
    return Markup(f"{fraction * 100:.1f} %")


def error(value: float) -> Markup:
    """A numerical error, which spans orders of magnitude."""
    return Markup(f"{value:.2g}")


def gigabytes_per_s(rate: float) -> Markup:
    """A rate in GB/s with its unit."""
    return Markup(f"{rate / 1e9:.0f} GB/s")


def span(bounds: tuple[int, int]) -> Markup:
    """Fewest and most, as one number where they are equal."""
    low, high = bounds
    return Markup(str(low)) if low == high else Markup(f"{low} to {high}")


def listing(values: Iterable[object], word: str = "and") -> Markup:
    """Words in a sentence: `a, b and c`."""
    words = [value if isinstance(value, Markup) else escape(str(value)) for value in values]
    if len(words) < 2:
        return words[0] if words else DASH
    return Markup(", ".join(words[:-1]) + f" {word} {words[-1]}")


def quantity(value: object, name: str) -> Markup:
    """A fact of an environment, its unit taken from the end of its name."""
    if value is None:
        return Markup("unknown")
    if isinstance(value, bool):
        return Markup("yes" if value else "no")
    if isinstance(value, int | float):
        for ending, factor, unit in (
            ("_bytes", 2.0**-30 if value >= 2**30 else 2.0**-20, "GiB" if value >= 2**30 else "MiB"),
            ("_bytes_per_s", 1e-9, "GB/s"),
            ("_hz", 1e-6, "MHz"),
            ("_w", 1.0, "W"),
            ("_s", 1.0, "s"),
            ("_c", 1.0, "°C"),
        ):
            if name.endswith(ending):
                return Markup(f"{value * factor:.5g} {unit}")
        return Markup(f"{value:.6g}" if isinstance(value, float) else str(value))
    if isinstance(value, list | tuple):
        return Markup(", ".join(quantity(item, "") for item in value)) if value else Markup("none")
    return escape(str(value))


def label(name: str) -> Markup:
    """An identifier as words, without the unit at its end, which `quantity` prints."""
    group, _, last = name.rpartition(".")
    words = last if last.isupper() else re.sub(r"_(bytes_per_s|bytes|hz|w|s|c)$", "", last).replace("_", " ")
    return escape(f"{group.replace('.', ': ')}: {words}" if group else words)


def _digits(number: float) -> str:
    if number >= 1000:
        return f"{number:.0f}"
    return f"{number:.1f}" if number >= 100 else f"{number:.2f}" if number >= 10 else f"{number:.3f}"


FILTERS: Mapping[str, Callable[..., Markup]] = {
    "us": optional(microseconds),
    "s": optional(seconds),
    "ms": optional(milliseconds),
    "tflops": optional(teraflops),
    "size": optional(size),
    "money": optional(money),
    "duration": optional(duration),
    "ratio": optional(ratio),
    "percent": optional(percent),
    "error": optional(error),
    "gbps": optional(gigabytes_per_s),
    "span": optional(span),
    "listing": listing,
    "quantity": quantity,
    "label": label,
    "whole": whole,
    "fenced": fenced,
}
"""The filters that templates may use beside Jinja's own."""
