"""The doctor's questions inside an image: what it is, its stacks, its limits, the volume that outlives it.

Owns these checks; asks nothing outside of an image, where there is nothing to say.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

from smbench import place
from smbench.doctor import Check, cuda, torch_build_in
from smbench.errors import UsageError
from smbench.nvml import NvmlUnavailable, fixed_facts, open_gpu
from smbench.place import ImageHere
from smbench.plan import Here

NOT_OF_AN_IMAGE = frozenset({"cuda", "triton"})
"""Checks of the doctor's own Python, which in an image measures nothing: the stacks' are asked here."""


def run_checks(image: ImageHere | None, card: Here, run_dir: Path) -> list[Check]:
    """The checks of this container; none outside of an image. `run_dir` is where runs will be written."""
    if image is None:
        return []
    return [arch(image, card), digest(), *stacks(image, card), memlock(), results(run_dir)]


def arch(image: ImageHere, card: Here) -> Check:
    """Whether the image is this card's."""
    shown = f"{image}; this card is {card.arch or 'not told' if card.gpu_present else 'none'}"
    try:
        place.forced_arch(image, card, "cuda" if card.gpu_present else "cpu", force=False)
    except UsageError as error:
        return Check("image", "fail", shown, str(error))
    if not card.gpu_present and image.arch != place.NO_GPU:
        return Check("image", "warn", shown, "start the container with its GPU: --gpus all")
    return Check("image", "ok", shown)


def digest() -> Check:
    """Whether results can say which image they are from."""
    fix = f"start the container with -e {place.DIGEST}=sha256:…, which `make push` prints"
    try:
        found = place.digest()
    except UsageError as error:
        return Check("digest", "fail", "not one", str(error))
    return Check("digest", "ok", found) if found else Check("digest", "warn", "unknown: results cannot name it", fix)


def stacks(image: ImageHere, card: Here) -> Iterator[Check]:
    """Whether each stack has its Python, with a torch that the driver runs."""
    for stack in image.stacks:
        name = f"stack {stack}"
        home = card.stacks.python(stack).parent.parent
        torch = next(home.glob("lib/python3*/site-packages/torch"), None)
        if card.stacks.python(stack) == card.stacks.own or torch is None:
            fix = "SMBENCH_STACKS must name the image's own folder of stacks: do not override it"
            yield Check(name, "fail", "its environment is missing", fix)
            continue
        build = torch_build_in(torch)
        if not card.gpu_present or build.cuda is None:
            yield Check(name, "ok", f"torch {build.version}")
            continue
        found = cuda(_driver_cuda(), build)
        # a fix of the doctor's is for a checkout; an image can only move
        move = "another host, with a newer driver: they let you filter by CUDA version" if found.fix else None
        yield Check(name, found.verdict, found.found, move)


def memlock() -> Check:
    """Whether engines may pin host memory, as transfers between processes and cards do."""
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if limit == resource.RLIM_INFINITY:
        return Check("memlock", "ok", "unlimited")
    found = f"at most {limit >> 10} KiB of locked memory"
    return Check("memlock", "warn", found, "start the container with --ulimit memlock=-1; one GPU alone does without")


def results(run_dir: Path) -> Check:
    """Whether results can be written where they outlive the container."""
    try:
        place.require_writable(run_dir)
    except UsageError as error:
        return Check("results", "fail", "cannot be written", str(error))
    _, warning = place.runs_root(ImageHere("", ()))
    if warning:
        fix = f"mount a volume at {place.VOLUME} that uid 1000 can write, or take the image that `push --as-root` makes"
        return Check("results", "warn", warning, fix)
    return Check("results", "ok", f"{run_dir} can be written")


def _driver_cuda() -> str | None:
    try:
        return fixed_facts(open_gpu()).get("cuda_driver_version")
    except NvmlUnavailable:
        return None
