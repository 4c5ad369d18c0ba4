"""The cache manager that lets Triton find shipped kernels. Owns the reading of one kernel's folder, and no place."""

from __future__ import annotations

import json

from triton.runtime.cache import FileCacheManager

from smbench.worker.baked import folder


class BakedCacheManager(FileCacheManager):  # type: ignore[misc]
    """Triton's cache manager for one key: the shipped folder of that key if there is one, else the user's cache."""

    def __init__(self, key: str, override: bool = False, dump: bool = False) -> None:
        shipped = folder() / key
        self._shipped = shipped if not override and not dump and shipped.is_dir() else None
        self._key = key
        if self._shipped is None:
            super().__init__(key, override, dump)

    def get_file(self, filename: str) -> str | None:
        """Path of a file, None where neither has it."""
        if self._shipped is None:
            found: str | None = super().get_file(filename)
            return found
        path = self._shipped / filename
        return str(path) if path.is_file() else None

    def get_group(self, filename: str) -> dict[str, str] | None:
        """Names and paths of the files of a kernel, None where it is not there whole."""
        if self._shipped is None:
            found: dict[str, str] | None = super().get_group(filename)
            return found
        try:
            listed = json.loads((self._shipped / f"__grp__{filename}").read_text(encoding="utf-8"))["child_paths"]
        except (OSError, ValueError, KeyError):
            return self._not_shipped().get_group(filename)
        group = {name: self._shipped / name for name in listed}
        if not all(path.is_file() for path in group.values()):
            return self._not_shipped().get_group(filename)
        return {name: str(path) for name, path in group.items()}

    def put(self, data: object, filename: str, binary: bool = True) -> str:
        """Write a file into the user's cache; its path."""
        if self._shipped is not None:
            self._not_shipped()
        path: str = super().put(data, filename, binary)
        return path

    def _not_shipped(self) -> BakedCacheManager:
        """From here on the user's cache: what was shipped for this key is damaged."""
        self._shipped = None
        super().__init__(self._key)
        return self
