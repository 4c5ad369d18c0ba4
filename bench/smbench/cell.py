"""A cell: one fully resolved point of an experiment, and its identity. Owns no measured value."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Literal

from pydantic import BaseModel, ConfigDict, StrictInt, StrictStr

from smbench.identity import short_hash

AxisValue = StrictInt | StrictStr


class Cell(BaseModel):
    """What is computed: never where, how long it takes or how it is timed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["op", "engine"]
    """What sort of worker runs it."""
    subject: str
    """The operation, or what engines are asked to do."""
    provider: str
    """The implementation, or the engine with its settings."""
    axes: Mapping[str, AxisValue]
    seed: int
    """Seed of the inputs."""

    @cached_property
    def cell_id(self) -> str:
        """First 16 hex digits of the SHA-256 of the cell's canonical JSON: equal cells compute the same thing."""
        # not model_dump, which takes longer than all else here
        fields = (self.kind, self.subject, self.provider, dict(self.axes), self.seed)
        return short_hash(dict(zip(Cell.model_fields, fields, strict=True)))

    @cached_property
    def point(self) -> tuple[str, tuple[tuple[str, AxisValue], ...]]:
        """The operation and its axes without the provider: cells of one point are compared with each other."""
        return self.subject, tuple(sorted(self.axes.items()))

    def label(self) -> str:
        """A line a person recognizes, e.g. `bgmv_shrink/torch batch=8 hidden_size=4096`."""
        return f"{self.subject}/{self.provider} " + " ".join(f"{name}={value}" for name, value in self.axes.items())
