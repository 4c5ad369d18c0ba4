"""docker/kvcache.toml as values. Owns the format of that file and no fact of it."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from smbench.errors import CorruptError, UsageError
from smbench.faults import explain
from smbench.recipe import Table

FORMAT = 1
"""Version of the file's format. History: 1 = first."""

Bytes = Annotated[int, Field(gt=0)]
Text = Annotated[str, Field(min_length=1)]


class Release(Table):
    """`[release]`: NVIDIA's image of TensorRT-LLM."""

    image: Text
    """Repository; the digest is named by whoever builds."""
    source: Text


class Source(Table):
    """`[source.<name>]`: a repository of the build."""

    url: Annotated[str, Field(pattern=r"^https://[^/]+/[^/]+/[^/]+\.git$")]
    branch: Text
    """Where the commit is found; nothing is built from a branch's moving end."""
    commit: Annotated[str, Field(pattern=r"^([0-9a-f]{7,40})?$")]
    """Empty where it is not known: then it has to be named."""
    files: dict[str, list[str]]
    """Files that the build uses, with words that they have to know: else it is not what was meant."""
    source: Text
    note: str | None = None

    @property
    def mirror(self) -> str:
        """Where a mirror lies below SOURCE_DIR: `OWNER/REPOSITORY.git`, as in its address."""
        return "/".join(self.url.split("/")[-2:])

    @property
    def host(self) -> str:
        """The address up to the owner, which a folder of mirrors stands for."""
        return "/".join(self.url.split("/")[:3]) + "/"


class Needs(Table):
    """`[needs]`: what the long build takes."""

    memory_bytes_per_job: Bytes
    memory_bytes_base: Bytes
    disk_bytes: Bytes
    seconds_on_a_large_machine: Bytes
    source: Text


class KvcacheTable(Table):
    """The whole of docker/kvcache.toml."""

    format: int
    release: Release
    source: dict[str, Source]
    needs: Needs


def load(path: Path) -> KvcacheTable:
    """The table in a file. UsageError names file, key and the known keys; CorruptError for a newer format."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError("images are built from a checkout of smbench, and this is an installed one") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path.name}: not valid TOML: {error}") from error
    if isinstance(version := data.get("format"), int) and version > FORMAT:
        raise CorruptError(f"{path.name}: format {version} is newer than this smbench reads ({FORMAT}); update smbench")
    try:
        return KvcacheTable.model_validate(data)
    except ValidationError as error:
        raise UsageError("\n".join(explain(error, KvcacheTable, path.name))) from error
