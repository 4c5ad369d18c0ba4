"""Writes docker/locks/: for each build of a stack in docker/archs.toml, every package by version and hash.

Owns the form of those locks: Linux on x86-64, CPython 3.11 to 3.13, wheels only, no index named. Images need two more:
the command line's, and that of the SBOM's writer. Does not own what stacks ask for (the `[stack]` rows), nor the
resolving: that is uv's, called by the path in the first argument.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ROOT / "docker" / "locks"
PYTHONS = (">=3.11", "<3.14")
MACHINE = (
    "implementation_name == 'cpython'",
    "platform_machine == 'x86_64'",
    "sys_platform == 'linux'",
)
"""What every lock is for, so no line of it says so again."""
SBOM = ("cyclonedx-python-lib>=11.12",)
"""What writes an image's SBOM while it is built (docker/build/image_facts.py); no image contains it."""


def project(requires: Sequence[str]) -> str:
    """A pyproject.toml that asks for `requires` on the machines that locks are for."""
    environment = " and ".join([*MACHINE, f"python_version {PYTHONS[1][0]} '{PYTHONS[1][1:]}'"])
    return "\n".join(
        [
            "[project]",
            'name = "stack"',
            'version = "0"',
            f'requires-python = "{PYTHONS[0]}"',
            # JSON strings are TOML strings
            f"dependencies = {json.dumps(list(requires))}",
            "[tool.uv]",
            f"environments = [{json.dumps(environment)}]",
            "",
        ]
    )


def without_machine(line: str) -> str:
    """A line of uv's output without the markers that hold on every machine that the lock is for."""
    requirement, semicolon, rest = line.partition(" ; ")
    if not semicolon:
        return line
    marker, backslash, _ = rest.partition(" \\")
    implied = {*MACHINE, f"python_full_version {PYTHONS[1][0]} '{PYTHONS[1][1:]}'"}
    kept = [part for part in marker.split(" and ") if part not in implied]
    end = " \\" if backslash else ""
    return f"{requirement} ; {' and '.join(kept)}{end}" if kept else f"{requirement}{end}"


def lock(
    uv: Path,
    requires: Sequence[str],
    target: Path,
    arguments: Sequence[str],
    without: Sequence[str] = (),
) -> int:
    """Resolve `requires` into `target`; the versions it already has stay where they can. Returns how many packages."""
    with tempfile.TemporaryDirectory() as folder:
        asked, excluded, found = (Path(folder) / name for name in ("pyproject.toml", "excluded.txt", "lock.txt"))
        asked.write_text(project(requires), encoding="utf-8")
        excluded.write_text("\n".join(without), encoding="utf-8")
        if target.exists():
            found.write_text(target.read_text(encoding="utf-8"), encoding="utf-8")
        command = [str(uv), "pip", "compile", str(asked), "--excludes", str(excluded), "--output-file", str(found)]
        command += ["--universal", "--python-version", "3.11", "--generate-hashes", "--only-binary", ":all:"]
        command += ["--no-emit-index-url", "--no-header", "--no-annotate", "--quiet", *arguments]
        subprocess.run(command, cwd=folder, check=True)
        lines = [without_machine(line) for line in found.read_text(encoding="utf-8").splitlines()]
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return sum("==" in line for line in lines)


def main(uv: Path, arguments: Sequence[str]) -> None:
    table: Mapping[str, Any] = tomllib.loads((ROOT / "docker" / "archs.toml").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    counts = {}
    for stack in table["stack"].values():
        for build in stack["build"].values():
            requires = [*build["requires"], *table["worker"]["requires"]]
            counts[build["lock"]] = lock(uv, requires, LOCKS / build["lock"], arguments, build.get("without", []))
    # the command line of an image has the versions of `.venv`
    same = [*arguments, "--constraint", str(ROOT / "requirements.lock")]
    counts["smbench.txt"] = lock(uv, project["dependencies"], LOCKS / "smbench.txt", same)
    counts["sbom.txt"] = lock(uv, SBOM, LOCKS / "sbom.txt", arguments)
    for name, count in counts.items():
        print(f"docker/locks/{name}: {count} packages")


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]).resolve(), sys.argv[2:])
    except subprocess.CalledProcessError as error:
        # uv has said why
        sys.exit(error.returncode)
