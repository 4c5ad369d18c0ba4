"""What `smbench audit` reads and prints: published files, run folders and bundles in, findings out as Markdown or JSON.

Owns that reading and the format of the JSON; the rules are in `audit` and `guards`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from smbench import arch, audit, published, published_report, report, resources, sides
from smbench.errors import UsageError
from smbench.guards import GUARDS, Finding
from smbench.machines import Machines
from smbench.observations import Dataset, of_analysis, of_published

FORMAT = 1
"""Version of the JSON. History: 1 = first."""
TEMPLATE = "audit.md.j2"
SEVERITIES: Mapping[str, str] = {"refuted": "Refuted", "warning": "Warnings", "note": "Notes"}
"""In the order of a report, with their headings."""


@dataclass(frozen=True, slots=True)
class Audited:
    """One thing that was looked at."""

    kind: Literal["published", "measured"]
    dataset: Dataset
    findings: Sequence[Finding]

    def counts(self) -> Mapping[str, int]:
        """How many findings of each severity."""
        found = Counter(finding.severity for finding in self.findings)
        return {severity: found[severity] for severity in ("refuted", "warning", "note")}

    def groups(self, severity: str) -> Mapping[tuple[str, str], Sequence[str]]:
        """The messages of a severity by rule and remedy."""
        found: dict[tuple[str, str], list[str]] = {}
        for finding in self.findings:
            if finding.severity == severity:
                found.setdefault((finding.guard, finding.remedy), []).append(finding.message)
        return found


def examine(arguments: Sequence[str], only_published: bool) -> list[Audited]:
    """The findings of what a command line names: published numbers, run folders, bundles.

    `only_published` takes every argument as a name of published numbers, and no argument as all of them. UsageError for
    what is neither; CorruptError as in `runfolder.load`.
    """
    known = published.names(published_report.folder())
    if only_published and not arguments:
        return [_published(name) for name in known]
    if not arguments:
        raise UsageError(f"name a run folder, a bundle or published numbers ({', '.join(known)}), or give --published")
    return [_one(argument, known, only_published) for argument in arguments]


def refuted(audited: Sequence[Audited]) -> bool:
    """Whether any number or claim cannot be true."""
    return any(audit.refuted(entry.findings) for entry in audited)


def render(audited: Sequence[Audited]) -> str:
    """The Markdown of an audit."""
    text = (
        report.markdown_templates()
        .get_template(TEMPLATE)
        .render(audited=audited, severities=SEVERITIES, rules=list(audit.RULES), guards=list(GUARDS))
    )
    return re.sub(r"\n{3,}", "\n\n", text).rstrip("\n") + "\n"


def as_json(audited: Sequence[Audited]) -> dict[str, Any]:
    """The findings, for programs."""
    return {
        "format": FORMAT,
        "refuted": refuted(audited),
        "audited": [
            {
                "name": entry.dataset.name,
                "kind": entry.kind,
                "title": entry.dataset.title,
                "device": entry.dataset.device_name,
                "numbers": len(entry.dataset.observations),
                "counts": dict(entry.counts()),
                "findings": [
                    {
                        "rule": finding.guard,
                        "severity": finding.severity,
                        "message": finding.message,
                        "remedy": finding.remedy,
                        "cell_id": finding.cell_id,
                    }
                    for finding in entry.findings
                ],
            }
            for entry in audited
        ],
    }


def _one(argument: str, known: Sequence[str], only_published: bool) -> Audited:
    name = argument.removeprefix(sides.PUBLISHED)
    if only_published or name != argument or (name in known and not Path(argument).exists()):
        return _published(name)
    path = Path(argument)
    if not path.exists():
        raise UsageError(f"{argument} is no run folder, no bundle and no published numbers; known: {', '.join(known)}")
    return _measured(path)


def _published(name: str) -> Audited:
    numbers = published_report.load(name)
    device = arch.load(resources.archs_file()).device_named(numbers.device)
    dataset = of_published(name, numbers, device)
    return Audited("published", dataset, audit.examine(dataset))


def _measured(path: Path) -> Audited:
    run = sides.read(path)
    analysis = report.analysis_of(run)
    names = Machines(run.environments).names()
    dataset = of_analysis(path.name, analysis, ", ".join(names) or "an unknown machine")
    return Audited("measured", dataset, [*analysis.findings, *audit.examine(dataset)])
