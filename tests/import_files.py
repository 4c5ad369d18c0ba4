"""The result files of other tools in tests/data/imports, for tests of `smbench import`. Owns where they lie."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

DATA = Path(__file__).with_name("data") / "imports"
FILES = sorted(path.name for path in DATA.iterdir() if path.suffix != ".md")


def edited(name: str, change: Callable[[dict[str, Any]], object]) -> bytes:
    """A file's one object after a change."""
    values = json.loads((DATA / name).read_text(encoding="utf-8"))
    change(values)
    return json.dumps(values).encode()
