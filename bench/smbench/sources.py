"""Which code measured and which code renders, as files and hashes. Owns what counts as part of either."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from smbench import resources
from smbench.identity import files_sha256

KERNELS = "smbench_kernels"
KERNEL_SUFFIXES = (".py", ".json")
RENDERING_LIBRARIES = ("jinja2", "markdown-it-py", "markupsafe")


def kernel_files() -> dict[str, bytes]:
    """The sources and tuned configurations of the installed kernels, by relative path in order; imports nothing."""
    spec = importlib.util.find_spec(KERNELS)
    if spec is None or not spec.submodule_search_locations:
        return {}
    folder = Path(next(iter(spec.submodule_search_locations)))
    return dict(_below(folder, KERNEL_SUFFIXES))


def kernels_sha256() -> str:
    """The hash that an environment records of the kernels that ran, of those that are installed here."""
    return files_sha256(kernel_files().items())


def renderer_id() -> str:
    """16 hex digits that are equal where a report of equal records must come out equal."""
    package = Path(__file__).resolve().parent
    files = [
        *((f"smbench/{path.name}", path.read_bytes()) for path in sorted(package.glob("*.py"))),
        *_below(resources.templates_dir(), (".j2", ".js")),
        *_below(resources.recipes_dir() / "published", (".toml",)),
        ("archs.toml", resources.archs_file().read_bytes()),
        *((name, importlib.metadata.version(name).encode()) for name in RENDERING_LIBRARIES),
    ]
    return files_sha256(files)[:16]


def _below(folder: Path, suffixes: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.suffix in suffixes}
    for place in sorted(found):
        if "__pycache__" not in place:
            yield place, found[place].read_bytes()
