"""Writes the SHA-256 of every file below a folder, as `sha256sum` does. Owns the order: the same files, the same list.

Symbolic links are listed by what they point at, since `sha256sum` would follow them: `<64 dashes>  path -> target`.
"""

import hashlib
import sys
from pathlib import Path

CHUNK_BYTES = 1 << 20


def digest(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            found.update(chunk)
    return found.hexdigest()


def lines(root: Path) -> list[str]:
    """One line a file or link, paths relative to `root`, sorted."""
    listed = []
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_symlink():
            listed.append(f"{'-' * 64}  {name} -> {path.readlink()}")
        elif path.is_file():
            listed.append(f"{digest(path)}  {name}")
    return listed


if __name__ == "__main__":
    root, output = Path(sys.argv[1]), Path(sys.argv[2])
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("\n".join(lines(root)) + "\n", encoding="utf-8")
