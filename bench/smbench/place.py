"""Where a run takes place: the image that this process is in, the card beside it, the folder that results can go to.

Owns what the command line reads of /etc/smbench/image.json, and the refusals that depend on the place, each with its
fix. Starts nothing, measures nothing, and does not own what a result records of the image (worker/environment.py).
"""

from __future__ import annotations

import errno
import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from smbench import arch, resources, stacks
from smbench.errors import CorruptError, UsageError
from smbench.nvml import NvmlUnavailable, fixed_facts, open_gpu, visible_gpus
from smbench.plan import Here

IMAGE_FILE = Path("/etc/smbench/image.json")
VOLUME = Path("/workspace")
"""Where pods mount what outlives them."""
NO_GPU = "cpu"
"""The arch of machines and images without a GPU."""

DIGEST = "SMBENCH_IMAGE_DIGEST"
"""Variable with the digest that the image was started by, since a container cannot see its own."""
FORCED = "SMBENCH_FORCED_ARCH"
"""Variable that tells workers that the image is of another arch than the card, and that this was wanted."""
AGAIN = "SMBENCH_AGAIN"
"""Variable with the command that goes on, where that is not the one that runs in the container."""

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class ImageHere:
    """The image that this process is in."""

    arch: str
    stacks: tuple[str, ...]

    def __str__(self) -> str:
        return f"{' + '.join(self.stacks) or 'no stack'} for {self.arch}"


def image_here(file: Path = IMAGE_FILE) -> ImageHere | None:
    """The image, None outside of one. CorruptError for a file that says no arch."""
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        return ImageHere(str(facts["arch"]), tuple(map(str, facts.get("stacks", ()))))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptError(
            f"{file} does not say what this image is ({type(error).__name__}: {error}); build the image again"
        ) from error


def here() -> Here:
    """The machine that a plan is for: the GPU that a worker would use, and the stacks."""
    import psutil

    try:
        facts = fixed_facts(open_gpu())
    except NvmlUnavailable:
        return Here(memory_bytes=psutil.virtual_memory().total, stacks=stacks.here())
    name = str(facts.get("name", "NVIDIA GPU"))
    found = arch_of(facts, arch.load(resources.archs_file()))
    return Here(name, found, facts.get("memory_bytes"), stacks.here(), visible_gpus())


def arch_of(facts: Mapping[str, object], table: arch.ArchTable) -> str | None:
    """The arch of a card: by its compute capability, also where the table has no row for it, else by its name."""
    capability = facts.get("compute_capability")
    if isinstance(capability, list | tuple) and len(capability) == 2:
        row = table.arch_of_capability((int(capability[0]), int(capability[1])))
        return row.name if row else f"sm{capability[0]}{capability[1]}"
    device = table.device_named(str(facts.get("name")))
    return device.arch if device else None


def forced_arch(image: ImageHere | None, card: Here, device: str, force: bool) -> bool:
    """Whether a run on `device` goes on although image and card differ; UsageError where they do and nobody forces."""
    if image is None or device == "cpu":
        return False
    if image.arch == NO_GPU:
        raise UsageError(
            f"this image ({image}) has no CUDA: run PROFILE=cpu, or an image of ARCH={card.arch or 'this card'}"
        )
    if card.arch is None or card.arch == image.arch:
        return False
    if force:
        return True
    raise UsageError(
        f"this image is for {image.arch} and the card ({card.device_name}) is {card.arch}: take the image of "
        f"ARCH={card.arch}, or measure all the same, every result marked, with --force"
    )


def digest(environ: Mapping[str, str] = os.environ) -> str | None:
    """The digest that this image was started by, None where nobody says. UsageError for one that cannot be."""
    told = environ.get(DIGEST)
    if not told:
        return None
    if not _DIGEST.fullmatch(told):
        raise UsageError(f"{DIGEST} is {told!r}, not sha256: and 64 hex digits; `make push` prints the right one")
    return told


def runs_root(image: ImageHere | None, volume: Path = VOLUME, home: Path | None = None) -> tuple[Path, str | None]:
    """The folder that holds `runs/` where no `OUT=` is given, and a warning where that does not outlive the container.

    Outside of an image it is the working directory; inside, the volume that pods mount.
    """
    if image is None:
        return Path.cwd(), None
    places = (volume, Path.cwd(), home or Path.home())
    for place in places:
        trouble = _trouble(place)
        if trouble is None:
            lost = place != volume and _exists(volume)
            reason = f"{_trouble(volume)}; results go to {place}/runs, which ends with this container" if lost else None
            return place, reason
    return volume, None


def require_writable(folder: Path) -> None:
    """UsageError, with cause and fix, where a run folder cannot be made or written."""
    results = folder / "results.jsonl"
    trouble = _trouble(results if _exists(results) else folder)
    if trouble is not None:
        raise UsageError(f"{trouble}; or choose another folder with OUT=")


def _trouble(path: Path) -> str | None:
    """Why nothing can be written at a file, or in a folder that is or will be there, and the fix; None where it can."""
    existing = next(place for place in (path.absolute(), *path.absolute().parents) if _exists(place))
    try:
        if existing == path.absolute() and existing.is_file():
            with existing.open("ab"):
                return None
        # the only question whose answer counts: permission bits know nothing of quotas, mounts and root squash
        with tempfile.TemporaryFile(dir=existing):
            return None
    except OSError as error:
        return f"{existing} cannot be written ({error.strerror}): {_fix(existing, error)}"


def _exists(path: Path) -> bool:
    """Whether a path is there as far as can be told: below a folder that is closed to us nothing is."""
    try:
        path.stat()
    except OSError:
        return False
    return True


def _fix(path: Path, error: OSError) -> str:
    if error.errno == errno.EROFS:
        return "its file system is mounted read-only: mount it writable"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free space"
    if error.errno in (errno.EACCES, errno.EPERM):
        owner = path.stat().st_uid
        user = f"{os.getuid()}:{os.getgid()}"
        return f"it belongs to uid {owner} and this is uid {os.getuid()}: sudo chown -R {user} {path}"
    return "move it away" if error.errno == errno.ENOTDIR else "see the cause"
