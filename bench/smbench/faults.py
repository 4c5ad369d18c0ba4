"""What is wrong with a file that has a model for it, in the file's own words: key paths and the keys that are known."""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import BaseModel, ValidationError


def explain(error: ValidationError, model: type[BaseModel], name: str) -> list[str]:
    """One line for each fault: file, key path, what is wrong, and the known keys where a key is unknown."""
    lines = []
    for fault in error.errors():
        path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in fault["loc"]).lstrip(".")
        message = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "extra_forbidden":
            known = _known_keys(model, fault["loc"][:-1])
            hint = difflib.get_close_matches(str(fault["loc"][-1]), known, n=1)
            did_you_mean = f"; did you mean {hint[0]!r}?" if hint else ""
            message = f"unknown key; known keys here: {', '.join(known)}{did_you_mean}"
        elif fault["type"] == "missing":
            message = "this key is missing"
        elif fault["type"] != "value_error":
            message = f"{message}, found {fault['input']!r}"
        lines.append(f"{name}: {path}: {message}" if path else f"{name}: {message}")
    return lines


def _known_keys(model: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """The keys of the table at a key path of a model."""
    current: Any = model
    for part in path:
        if isinstance(current, type) and issubclass(current, BaseModel) and part in current.model_fields:
            current = _table_in(current.model_fields[str(part)].annotation)
    return sorted(current.model_fields) if isinstance(current, type) and issubclass(current, BaseModel) else []


def _table_in(annotation: Any) -> Any:
    """The model that an annotation such as `dict[str, Profile]` or `list[Grid]` holds."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inner = [_table_in(argument) for argument in getattr(annotation, "__args__", ())]
    return next((table for table in inner if table is not None), None)
