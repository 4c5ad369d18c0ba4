"""Where recipes, report templates and the arch table lie. Owns the places; does not read the files.

A wheel carries them as package data; a checkout, editable install included, has them at the repository's root.
"""

from __future__ import annotations

from pathlib import Path

from smbench.errors import CorruptError

PACKAGE_DATA = Path(__file__).resolve().parent / "data"
REPOSITORY = Path(__file__).resolve().parents[2]


def recipes_dir() -> Path:
    """The folder of `<recipe>.toml`, with `published/` in it. CorruptError where this installation lacks it."""
    return _first("recipes", PACKAGE_DATA / "recipes", REPOSITORY / "recipes")


def templates_dir() -> Path:
    """The folder of `<report>.j2`. CorruptError where this installation lacks it."""
    return _first("report templates", PACKAGE_DATA / "report_templates", REPOSITORY / "report_templates")


def archs_file() -> Path:
    """The table of arch, device and stack facts. CorruptError where this installation lacks it."""
    return _first("arch table", PACKAGE_DATA / "archs.toml", REPOSITORY / "docker" / "archs.toml")


def _first(what: str, packaged: Path, checked_out: Path) -> Path:
    if packaged.exists():
        return packaged
    # only beside our own pyproject.toml: an installed package has a stranger's folder two levels up
    if (REPOSITORY / "pyproject.toml").exists() and checked_out.exists():
        return checked_out
    raise CorruptError(
        f"this installation of smbench has no {what}: looked for {packaged} and {checked_out}; "
        "install the wheel again, or run from a whole checkout"
    )
