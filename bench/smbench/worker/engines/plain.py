"""Settings of an engine as JSON-able facts. Owns what becomes of values that are neither numbers nor words."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Mapping
from typing import Any

DEEPEST = 6
"""Levels that are followed: below lie caches and models, not settings."""
LONGEST = 64
"""Entries of a list that are kept; longer ones are data."""
_LARGEST_INTEGER = 2**63 - 1


def plain(value: Any) -> Any:
    """JSON of a configuration object: dataclasses and mappings by name, enums by name.

    Anything else that has no form in JSON is left out, and so are absolute paths, which say where something lies and
    not what it is.
    """
    found = _plain(value, DEEPEST)
    return None if found is _NOTHING else found


class _Nothing:
    """Marks a value that is left out; None is a setting."""


_NOTHING = _Nothing()


def _plain(value: Any, depth: int) -> Any:
    if isinstance(value, enum.Enum):
        return value.name
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return value if abs(value) <= _LARGEST_INTEGER else _NOTHING
    if isinstance(value, float):
        return value if math.isfinite(value) else _NOTHING
    if isinstance(value, str):
        return _NOTHING if value.startswith(("/", "~")) else value
    if type(value).__module__ == "torch" and type(value).__name__ in ("dtype", "device"):
        return str(value)
    if depth == 0:
        return _NOTHING
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        # a field that is not initialized yet has no value
        fields = {f.name: getattr(value, f.name, _NOTHING) for f in dataclasses.fields(value) if f.name[0] != "_"}
        return _mapping(fields, depth)
    if isinstance(value, Mapping):
        return _mapping(value, depth)
    if isinstance(value, list | tuple | set | frozenset) and len(value) <= LONGEST:
        items = sorted(value, key=str) if isinstance(value, set | frozenset) else value
        kept = [_plain(item, depth - 1) for item in items]
        return [item for item in kept if item is not _NOTHING]
    return _NOTHING


def _mapping(values: Mapping[Any, Any], depth: int) -> Any:
    kept = {str(plain(key)): _plain(value, depth - 1) for key, value in values.items()}
    return {key: value for key, value in kept.items() if value is not _NOTHING}
