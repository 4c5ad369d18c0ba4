"""The layout of a bundle: BagIt 1.0 (RFC 8493) with our own fields. Owns names, places and tag files; reads no file.

<recipe>-<device>-<12 hex>/      the digits are the payload manifest's own
  bagit.txt  bag-info.txt  manifest-sha256.txt  tagmanifest-sha256.txt
  data/                          see REQUIRED and FOLDERS
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from smbench.machines import Machines
from smbench.plan import slug
from smbench.result import FORMAT as RUN_FORMAT
from smbench.runfolder import Run

FORMAT = 1
"""Version of the bundle. History: 1 = first."""
REQUIRED = ("REPRODUCE.md", "plan.json", "recipe.toml", "report.html", "report.md", "results.jsonl", "run.json")
FOLDERS = ("figures", "image", "logs", "native", "records", "sources", "traces")
"""What a payload may hold besides REQUIRED."""
BAGIT = b"BagIt-Version: 1.0\nTag-File-Character-Encoding: UTF-8\n"
TAG_FILES = ("bagit.txt", "bag-info.txt", "manifest-sha256.txt", "tagmanifest-sha256.txt")
"""In the order in which they lie in the archive, before the payload."""
INFO = (
    "Bag-Software-Agent",
    "Payload-Oxum",
    "Smbench-Bundle-Format",
    "Smbench-Run-Format",
    "Smbench-Recipe",
    "Smbench-Profile",
    "Smbench-Device",
    "Smbench-Renderer",
)
"""The keys of bag-info.txt. None says when or by whom it was packed."""
AGENT = "smbench "


def bundle_name(run: Run, manifest: bytes) -> str:
    """What the top folder of a bundle is called, and the file as a rule."""
    return f"{slug(run.recipe.name)}-{device_slug(run)}-{hashlib.sha256(manifest).hexdigest()[:12]}"


def device_slug(run: Run) -> str:
    """The devices of a run as part of a file name."""
    names = sorted({slug(name) if name else "cpu" for name in Machines(run.environments).gpu_names()})
    safe = ["".join(char for char in name if char.isascii())[:60].strip("-") or "gpu" for name in names]
    return safe[0] if len(safe) == 1 else f"{len(safe)}-devices" if safe else "unmeasured"


def manifest_of(digests: Iterable[tuple[str, str]]) -> bytes:
    """The lines of a manifest from pairs of SHA-256 and place, as `sha256sum` takes them."""
    return "".join(f"{digest}  {place}\n" for digest, place in digests).encode()


def info_of(run: Run, size_bytes: int, files: int, version: str, renderer: str) -> bytes:
    """bag-info.txt. `version` is that of the smbench that packs, `renderer` what `sources.renderer_id` gave it."""
    oxum, formats = f"{size_bytes}.{files}", (str(FORMAT), str(RUN_FORMAT))
    values = (f"{AGENT}{version}", oxum, *formats, run.recipe.name, run.profile_name, device_slug(run), renderer)
    return "".join(f"{key}: {value}\n" for key, value in zip(INFO, values, strict=True)).encode()


def tag_files(info: bytes, manifest: bytes) -> dict[str, bytes]:
    """The files of TAG_FILES."""
    files = dict(zip(TAG_FILES, (BAGIT, info, manifest), strict=False))
    return {
        **files,
        TAG_FILES[3]: manifest_of((hashlib.sha256(data).hexdigest(), name) for name, data in files.items()),
    }


def foreign_place(place: str) -> bool:
    """Whether a bundle of this format has no such file, `place` being relative to `data/`."""
    return place not in REQUIRED and place.partition("/")[0] not in FOLDERS
