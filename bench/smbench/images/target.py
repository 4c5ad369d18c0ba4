"""Which image it is to be: an arch and a stack, resolved against docker/archs.toml. Owns no fact of either."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from smbench.arch import Arch, ArchTable, Build, Stack
from smbench.errors import UsageError

ALL = "all"
"""The image of every stack that the arch can have, and the default."""
TRTLLM = "trtllm"
"""A stack whose image has another base and is built elsewhere (`smbench.kvcache`): here only a name to suggest."""


@dataclass(frozen=True, slots=True)
class Packages:
    """One stack in an image."""

    stack: Stack
    build: Build

    @property
    def name(self) -> str:
        return self.stack.name

    @property
    def lock(self) -> str:
        return self.build.lock

    @property
    def cpu_torch(self) -> str | None:
        """The version of torch that is installed beside the lock, None where the lock has it."""
        return self.build.torch if "torch" in self.build.without else None


@dataclass(frozen=True, slots=True)
class Target:
    """One image."""

    arch: Arch
    name: str
    """A stack's, or `all`."""
    packages: tuple[Packages, ...]

    @property
    def title(self) -> str:
        return ", ".join(row.stack.title for row in self.packages)

    @property
    def tag(self) -> str:
        """What the built image is called on this machine."""
        return f"smbench:{self.name}-{self.arch.name}"

    @property
    def dockerfile(self) -> str:
        return f"{self.arch.name}.Dockerfile"

    @property
    def locks(self) -> list[str]:
        """Files of docker/locks/ that its build reads."""
        return [*(row.lock for row in self.packages), "smbench.txt", "sbom.txt"]


def sm(arch: Arch) -> int | None:
    """Compute capability as compilers write it, such as 90; None for an arch that has none."""
    return None if arch.compute_capability is None else 10 * arch.compute_capability[0] + arch.compute_capability[1]


def packages(table: ArchTable, arch: Arch) -> tuple[Packages, ...]:
    """Every stack that the arch can have, in the table's order."""
    variant: Literal["cpu", "cuda"] = "cpu" if arch.compute_capability is None else "cuda"
    return tuple(
        Packages(stack, build) for stack in table.stack.values() if (build := stack.build.get(variant)) is not None
    )


def targets(table: ArchTable, arch: Arch) -> list[Target]:
    """Every image of an arch: one a stack, and the one with all of them."""
    rows = packages(table, arch)
    return [*(Target(arch, row.name, (row,)) for row in rows), Target(arch, ALL, rows)]


def resolve(table: ArchTable, arch: str, stack: str | None) -> Target:
    """The image that is asked for. UsageError lists what there is."""
    if not arch:
        raise UsageError(f"ARCH is missing: make image ARCH=sm89, for instance; known: {', '.join(table.arch)}")
    if arch not in table.arch:
        raise UsageError(f"ARCH: unknown arch {arch!r}; {_known(arch, table.arch)}")
    found = {target.name: target for target in targets(table, table.arch[arch])}
    name = stack or ALL
    if name in found:
        return found[name]
    if name in table.stack:
        raise UsageError(f"STACK: {name!r} has no packages for {arch}; stacks that have some: {', '.join(found)}")
    elsewhere = [] if table.arch[arch].compute_capability is None else [TRTLLM]
    raise UsageError(f"STACK: unknown stack {name!r}; {_known(name, [*found, *elsewhere])}")


def _known(name: str, rows: Iterable[str]) -> str:
    known = list(rows)
    hint = difflib.get_close_matches(name, known, n=1)
    did_you_mean = f"; did you mean {hint[0]!r}?" if hint else ""
    return f"known: {', '.join(known)}{did_you_mean}"
