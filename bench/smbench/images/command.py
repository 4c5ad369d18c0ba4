"""The command that builds an image, as a value: what `make image` runs and what DRY_RUN=1 prints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from smbench.images.target import Target

PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "FTP_PROXY", "http_proxy", "https_proxy", "no_proxy", "ftp_proxy")
"""Build arguments that docker knows by itself and keeps out of an image's history."""


@dataclass(frozen=True, slots=True)
class Source:
    """What the image is built from."""

    version: str
    commit: str
    """Hash of the commit, with `-dirty` where tracked files differ from it."""
    epoch: int
    """Seconds since 1970 of the commit: what files and records give as their time."""


@dataclass(frozen=True, slots=True)
class Options:
    """What the user may choose."""

    base_image: str
    base_id: str
    """Digest of the base image, or the id of one that is on this machine alone: it reaches every result."""
    torch_index_url: str = ""
    strip: bool = True
    no_cache: bool = False


def build(
    docker: str,
    target: Target,
    context: Path,
    source: Source,
    options: Options,
    secrets: Mapping[str, Path],
    environ: Mapping[str, str],
) -> list[str]:
    """The whole command; BuildKit has to be on (DOCKER_BUILDKIT=1), since the build has secrets."""
    arguments = {
        "BASE_IMAGE": options.base_image,
        "BASE_ID": options.base_id,
        "SMBENCH_VERSION": source.version,
        "SMBENCH_COMMIT": source.commit,
        "SOURCE_DATE_EPOCH": str(source.epoch),
        "CREATED": datetime.fromtimestamp(source.epoch, UTC).isoformat(),
        "TORCH_INDEX_URL": options.torch_index_url,
        "STRIP": str(int(options.strip)),
    }
    # an argument that no stage declares is a warning of the builder
    if target.arch.compute_capability is None:
        del arguments["STRIP"]
    if not any(row.cpu_torch for row in target.packages):
        del arguments["TORCH_INDEX_URL"]
    return [
        docker,
        "build",
        *("--progress", "plain"),
        *("--file", str(context / "Dockerfile")),
        *("--target", target.name),
        *("--tag", target.tag),
        *(["--no-cache"] if options.no_cache else []),
        *(part for name, value in arguments.items() if value for part in ("--build-arg", f"{name}={value}")),
        *(part for name in PROXIES if environ.get(name) for part in ("--build-arg", name)),
        *(part for name, file in sorted(secrets.items()) for part in ("--secret", f"id={name},src={file}")),
        str(context),
    ]
