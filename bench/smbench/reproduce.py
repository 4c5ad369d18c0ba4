"""REPRODUCE.md: the commands that do a run again, rendered from its records. Owns which facts are needed for that."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from smbench.machines import Machines
from smbench.report import markdown_templates
from smbench.result import Environment
from smbench.runfolder import Run

TEMPLATE = "reproduce.md.j2"
UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Facts:
    """What the template says."""

    recipe: str
    profile: str
    recipe_sha256: str
    providers: Sequence[str] | None
    """The providers that were chosen by name, None where the profile ran whole."""
    devices: Sequence[str]
    commits: Sequence[str]
    dirty: bool
    smbench_version: str
    environments: Sequence[Environment]
    versions: Mapping[str, Sequence[str]]
    """Each fact that a number depends on, with its value in each environment."""
    planned: int
    reached: int


def render(run: Run) -> bytes:
    """The bytes of REPRODUCE.md. Equal runs give equal bytes."""
    text: str = markdown_templates().get_template(TEMPLATE).render(facts=_facts(run))
    return (text.rstrip("\n") + "\n").encode()


def _facts(run: Run) -> Facts:
    machines = Machines(run.environments)
    sources = [entry.environment.get("source") or {} for entry in run.environments]
    chosen = list(dict.fromkeys(cell.provider for cell in run.cells))
    whole = set(chosen) == set(run.recipe.profile[run.profile_name].providers)
    return Facts(
        recipe=run.recipe.name,
        profile=run.profile_name,
        recipe_sha256=hashlib.sha256(run.recipe_text).hexdigest(),
        providers=None if whole else chosen,
        devices=machines.names() or [UNKNOWN],
        commits=list(dict.fromkeys(str(source["commit"]) for source in sources if source.get("commit"))),
        dirty=any(source.get("dirty") for source in sources),
        smbench_version=run.smbench_version,
        environments=run.environments,
        versions=_versions(run.environments),
        planned=len(run.cells),
        reached=len(run.results),
    )


def _versions(environments: Sequence[Environment]) -> Mapping[str, Sequence[str]]:
    columns = [dict(_named(entry)) for entry in environments]
    names = dict.fromkeys(name for column in columns for name in column)
    return {name: [column.get(name, UNKNOWN) for column in columns] for name in names}


def _named(entry: Environment) -> list[tuple[str, str]]:
    facts = entry.environment
    gpu, runtime = facts.get("gpu") or {}, facts.get("runtime") or {}
    python, image = facts.get("python") or {}, facts.get("image") or {}
    named = [
        ("GPU", gpu.get("name")),
        ("driver", gpu.get("driver_version")),
        ("CUDA", runtime.get("cuda")),
        ("Python", python.get("version")),
        *((str(name), version) for name, version in (facts.get("libraries") or {}).items()),
        *((f"image {name}", value) for name, value in image.items()),
    ]
    return [(name, str(value)) for name, value in named if value is not None]
