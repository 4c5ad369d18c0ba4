"""Recorded environments, asked what a report says of them. Owns no format, and knows few names of facts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from smbench.result import Environment

NONE_IS_A_FACT = ("cpu.quota_cores", "os.container")
"""Paths of the record whose None says that there is none; any other None is an unknown."""


@dataclass(frozen=True, slots=True)
class Machines:
    """The environments of a run, as a rule one."""

    environments: Sequence[Environment]

    def names(self) -> list[str]:
        """The GPUs, or the processors where there is no GPU; nothing before the first worker has started."""
        return list(dict.fromkeys(self._name(entry) for entry in self.environments))

    def versions(self, library: str) -> list[str]:
        """The versions of a library, empty where it is not installed."""
        found = [_group(entry, "libraries").get(library) for entry in self.environments]
        return list(dict.fromkeys(str(version) for version in found if version is not None))

    def facts(self) -> Mapping[str, list[object]]:
        """Every recorded fact by its path in the record: its value, or its values where environments differ.

        None stands for an unknown fact, the word `absent` for one that an environment does not have.
        """
        leaves = [dict(_leaves(entry.environment)) for entry in self.environments]
        paths = dict.fromkeys(path for facts in leaves for path in facts if path not in ("format", "missing"))
        values = {path: [facts.get(path, "absent") for facts in leaves] for path in paths}
        return {path: found[:1] if found.count(found[0]) == len(found) else found for path, found in values.items()}

    def unknown(self) -> list[str]:
        """Why facts are unknown, each reason once."""
        reasons = [reason for entry in self.environments for reason in entry.environment.get("missing", ())]
        return list(dict.fromkeys(str(reason) for reason in reasons))

    def gpu_names(self) -> set[str | None]:
        """The names of the GPUs; None stands for an environment without one."""
        return {_group(entry, "gpu").get("name") for entry in self.environments}

    def _name(self, entry: Environment) -> str:
        return str(_group(entry, "gpu").get("name") or _group(entry, "cpu").get("model") or "an unknown device")


def _group(entry: Environment, name: str) -> Mapping[str, str]:
    found: Mapping[str, str] = entry.environment.get(name) or {}
    return found


def _leaves(tree: Mapping[str, object], path: str = "") -> Iterator[tuple[str, object]]:
    """Every value that is no mapping, with the keys that lead to it."""
    for key, value in tree.items():
        here = f"{path}.{key}" if path else str(key)
        if isinstance(value, Mapping):
            yield from _leaves(value, here)
        elif value is None and here in NONE_IS_A_FACT:
            yield here, "none"
        else:
            yield here, value
