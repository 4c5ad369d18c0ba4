"""The context of the last step, smbench on TensorRT-LLM: what the builder gets to see. Owns its layout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import jinja2

from smbench import __version__
from smbench.arch import Arch
from smbench.errors import UsageError
from smbench.images import context

TEMPLATE = "kvcache.Dockerfile.j2"
PARTS = (
    "docker/build/with_pip.sh",
    "docker/build/trtllm_layer.sh",
    "docker/build/trtllm_facts.py",
    "docker/locks/smbench.txt",
)
"""Files of the checkout that the layer is built with."""
TITLES = {
    "trtllm": "NVIDIA's release of TensorRT-LLM",
    "kvcache": "TensorRT-LLM v0.19 with the HSTU KV-cache extension, and the inference layer of recsys-examples",
}
"""Images by name."""


@dataclass(frozen=True, slots=True)
class Origin:
    """What the layer is built from."""

    commit: str
    """Hash of the checkout's commit, with `-dirty` where tracked files differ from it; empty without git."""
    epoch: int
    """Seconds since 1970 of the commit, 1980 where there is none: the first year that a zip can name."""


def origin(checkout: Path) -> Origin:
    """The checkout as git knows it."""
    commit, time = _git(checkout, "rev-parse", "HEAD"), _git(checkout, "log", "-1", "--format=%ct")
    dirty = "-dirty" if commit and _git(checkout, "status", "--porcelain", "--untracked-files=no") else ""
    return Origin(f"{commit}{dirty}", int(os.environ.get("SOURCE_DATE_EPOCH") or time or 315532800))


def render(folder: Path, arch: Arch, image: str) -> str:
    """The Dockerfile of an image for an arch, from the template in a folder."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder), undefined=jinja2.StrictUndefined, trim_blocks=True, autoescape=False
    )
    return environment.get_template(TEMPLATE).render(arch=arch, image=image, title=TITLES[image])


def lay_out(checkout: Path, folder: Path, arch: Arch, image: str, wheelhouse: str, epoch: int) -> None:
    """Make `folder` the context. UsageError where something of the checkout is missing, or WHEELHOUSE is no folder."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "layer").mkdir(parents=True)
    for name in PARTS:
        if not (checkout / name).is_file():
            raise UsageError(f"{name} is missing: images are built from a whole checkout of smbench")
        shutil.copyfile(checkout / name, folder / "layer" / Path(name).name)
    (folder / "Dockerfile").write_text(render(checkout / "docker", arch, image), encoding="utf-8")
    (folder / "wheelhouse").mkdir()
    local = context.wheelhouse_folder(wheelhouse)
    if local is not None:
        locked = (folder / "layer" / "smbench.txt").read_text(encoding="utf-8")
        names = set(re.findall(r"^([a-z0-9][a-z0-9.-]*)==", locked, flags=re.MULTILINE))
        for wheel in sorted(local.glob("*.whl")):
            if re.sub(r"[-_.]+", "-", wheel.name.split("-")[0]).lower() in names:
                shutil.copyfile(wheel, folder / "wheelhouse" / wheel.name)
    context.build_wheel(checkout, folder / "dist", epoch)


def arguments(origin: Origin, base_id: str, sources: str) -> dict[str, str]:
    """Build arguments of the layer; those without a value are left to be empty."""
    found = {
        "SMBENCH_VERSION": __version__,
        "SMBENCH_COMMIT": origin.commit,
        "SOURCE_DATE_EPOCH": str(origin.epoch),
        "BASE_ID": base_id,
        "SOURCES": sources,
    }
    return {name: value for name, value in found.items() if value}


def _git(checkout: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(checkout), *arguments], capture_output=True, text=True, timeout=60, check=False
        )
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
