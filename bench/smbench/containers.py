"""From facts of a host to the containers of a run: where it takes place, which images, the exact command lines.

Pure: asks no daemon (dockerd.py) and starts nothing (launching.py).

A container gets the run folder, a cache folder and the card, and nothing else of the host: no docker socket, no network
unless a download is asked for, the caller's user. Shared memory is the container's own and not the host's, so that what
a killed engine leaves there goes with the container.
"""

from __future__ import annotations

import csv
import difflib
import io
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal

from smbench.errors import UsageError
from smbench.place import AGAIN, DIGEST, NO_GPU, ImageHere

Where = Literal["auto", "docker", "here"]

ALL = "all"
"""What `STACK=` calls the image of several stacks."""
CACHE = PurePosixPath("/cache")
"""Home and every cache of the images."""
MODELS = PurePosixPath("/models")
DATASETS = PurePosixPath("/datasets")
RUNS = PurePosixPath("/workspace/runs")
SHM_SIZE = "16g"
"""A limit and no reservation; docker's own 64 MB is too little for engines with several processes."""
STACK_LIMIT = "stack=67108864:67108864"
STOP_LIMIT_S = 30
"""What a stopped container has to drop its cell and flush; it needs a second or two."""
DOWNLOAD = "SMBENCH_DOWNLOAD"
"""Variable that allows weights to be fetched (models.py)."""
PASSED_ON = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
"""Variables of the caller that choose what is measured on, so that they hold inside as well."""


@dataclass(frozen=True, slots=True)
class Image:
    """One of our images on this host."""

    reference: str
    """What docker is told to run."""
    arch: str
    stacks: frozenset[str]
    digest: str | None
    """Of its manifest, `sha256:…`; None for one that no registry has."""
    version: str | None
    """Of the smbench in it."""
    created: int = 0
    """Seconds since 1970."""

    @property
    def name(self) -> str:
        """As `make image STACK=` has it: the stack, or `all` for one with several."""
        return next(iter(self.stacks)) if len(self.stacks) == 1 else ALL


@dataclass(frozen=True, slots=True)
class Daemon:
    """A docker daemon that answers."""

    nvidia: bool
    """It can hand a GPU to a container."""
    rootless: bool
    """It runs as the caller, who therefore is root inside."""
    images: Sequence[Image]


@dataclass(frozen=True, slots=True)
class NoDaemon:
    """No docker, in one line that holds cause and fix."""

    reason: str


@dataclass(frozen=True, slots=True)
class Wish:
    """What the caller asks of the place."""

    where: Where = "auto"
    arch: str | None = None
    stack: str | None = None
    force: bool = False

    @property
    def image(self) -> bool:
        """Whether an image is asked for, so that running without one would not be it."""
        return self.where == "docker" or self.arch is not None or self.stack is not None


@dataclass(frozen=True, slots=True)
class InPlace:
    """In this very Python, and why."""

    reason: str


@dataclass(frozen=True, slots=True)
class InContainers:
    """In images of one arch."""

    arch: str
    images: Sequence[Image]
    """Those of the arch, and of the stack that is asked for."""
    daemon: Daemon


@dataclass(frozen=True, slots=True)
class Task:
    """What every container of a run is told."""

    recipe: str
    profile: str
    folder: Path
    """The run folder on the host, absolute."""
    caches: Mapping[Path, PurePosixPath]
    """Folders of the host that lie at, or below, CACHE inside; see `caches`."""
    user: str
    """`uid:gid` of the caller."""
    rootless: bool
    """Docker runs as the caller, who is root inside: files of that root are his outside."""
    gpu: bool
    again: str
    """The command that goes on after an interruption, as the caller types it."""
    name: str
    """Of the container, see `container_name`."""
    model: str | None = None
    """As the caller gives it; a folder of the host is mounted."""
    providers: Sequence[str] = ()
    price: float | None = None
    force: bool = False
    sharegpt: Path | None = None
    """A file of the host, which is mounted."""
    trace: str | None = None
    environ: Mapping[str, str] = field(default_factory=dict)
    """The caller's."""

    @property
    def download(self) -> bool:
        """Whether the caller allows weights to be fetched; only then is there a network."""
        return self.environ.get(DOWNLOAD) == "1"


def known(what: str, given: str, names: Iterable[str]) -> str:
    """`given`, where it is a name. UsageError lists the names and the nearest one."""
    listed = sorted(set(names))
    if given in listed:
        return given
    hint = difflib.get_close_matches(given, listed, n=1)
    did_you_mean = f"; did you mean {what}={hint[0]}?" if hint else ""
    raise UsageError(f"unknown {what} {given!r}; known: {', '.join(listed)}{did_you_mean}")


def choose(
    wish: Wish,
    inside: ImageHere | None,
    daemon: Daemon | NoDaemon,
    card_arch: str | None,
    device: Literal["cuda", "cpu"],
    needed: Collection[str],
) -> InPlace | InContainers:
    """Where a run takes place whose cells need these stacks. UsageError where that is not what was asked for.

    `card_arch` is None without a card.
    """
    if inside is not None:
        return _inside(wish, inside)
    arch = _arch(wish, card_arch, device)
    if wish.where == "here":
        if wish.stack is not None:
            raise UsageError("STACK= chooses an image, and WHERE=here runs without one; leave one of the two out")
        return InPlace("WHERE=here")
    if device == "cpu" and not wish.image:
        return InPlace("the cpu profile needs no image; ARCH=cpu runs it in one")
    if isinstance(daemon, NoDaemon):
        trouble: str | None = daemon.reason
    elif arch is None:
        trouble = "the driver does not tell this card's compute capability, so no image can be chosen"
    elif (trouble := _trouble(wish, daemon, arch, needed)) is None:
        return InContainers(arch, asked_for(daemon.images, arch, wish.stack), daemon)
    if wish.image:
        raise UsageError(f"{trouble}; or leave ARCH=, STACK= and WHERE= out, to run in place")
    return InPlace(str(trouble))


def next_image(
    images: Sequence[Image], needed: Collection[str], used: Collection[str], stack: str | None
) -> Image | None:
    """The image to run next: the one with most of the needed stacks, and of those the smallest, then the newest.

    `used` has the references of images that ran already; of the needed stacks, `stack` leaves that one.
    """
    wanted = set(needed) if stack in (None, ALL) else {stack} & set(needed)
    left = [image for image in images if image.reference not in used and image.stacks & wanted]
    return max(left, key=lambda image: (len(image.stacks & wanted), -len(image.stacks), image.created), default=None)


def command_line(image: Image, task: Task, last: bool) -> list[str]:
    """The `docker run` of one container. Only the `last` one packs the bundle."""
    folder = RUNS / task.folder.name
    mounts = [_mount(source, target) for source, target in {task.folder: folder, **task.caches}.items()]
    model = task.model
    if model is not None and (path := Path(model).expanduser()).is_dir():
        path = path.resolve()
        mounts.append(_mount(path, MODELS / path.name, "readonly"))
        model = str(MODELS / path.name)
    sharegpt: PurePosixPath | None = None
    if task.sharegpt is not None:
        file = task.sharegpt.resolve()
        sharegpt = DATASETS / file.name
        mounts.append(_mount(file, sharegpt, "readonly"))
    variables = {name: task.environ[name] for name in PASSED_ON if name in task.environ}
    variables[AGAIN] = task.again
    if image.digest is not None:
        variables[DIGEST] = image.digest
    if task.gpu:
        variables["NVIDIA_DRIVER_CAPABILITIES"] = "compute,utility"
    if task.download:
        variables |= {DOWNLOAD: "1", "HF_HUB_OFFLINE": "0"}
    return [
        *("docker", "run", "--rm", "--init", "--pull", "never"),
        *("--name", task.name),
        *("--label", f"smbench.recipe={task.recipe}"),
        *("--user", "0:0" if task.rootless else task.user),
        *("--security-opt", "no-new-privileges"),
        *(() if task.download else ("--network", "none")),
        *(("--gpus", "all") if task.gpu else ()),
        *("--shm-size", SHM_SIZE),
        # a daemon without privileges of its own cannot raise limits, and without a card nothing needs it
        *(("--ulimit", "memlock=-1:-1", "--ulimit", STACK_LIMIT) if task.gpu and not task.rootless else ()),
        *("--stop-timeout", str(STOP_LIMIT_S)),
        *(part for mount in mounts for part in ("--mount", mount)),
        *(part for name, value in variables.items() for part in ("--env", f"{name}={value}")),
        # by name alone: a secret belongs into no command line
        *(("--env", "HF_TOKEN") if task.download and "HF_TOKEN" in task.environ else ()),
        *("--entrypoint", "smbench", image.reference),
        *("run", task.recipe, "--profile", task.profile, "--out", str(folder)),
        *(part for provider in task.providers for part in ("--provider", provider)),
        *(("--model", model) if model is not None else ()),
        *(("--price", f"{task.price:g}") if task.price is not None else ()),
        *(("--sharegpt", str(sharegpt)) if sharegpt is not None else ()),
        *(("--trace", task.trace) if task.trace is not None else ()),
        *(("--force",) if task.force else ()),
        *(() if last else ("--no-pack",)),
        "--json",
    ]


def container_name(text: str) -> str:
    """A name that docker takes."""
    return re.sub(r"[^a-zA-Z0-9_.-]+", "-", f"smbench-{text}")


def caches(environ: Mapping[str, str], home: Path, arch: str) -> dict[Path, PurePosixPath]:
    """Folders of the host that keep what a container would lose, with their places inside, outermost first.

    Compiled kernels and engines' own caches are one folder an arch; weights are the caller's own, which runs in place
    use as well (models.py).
    """
    ours = Path(environ.get("SMBENCH_CACHE") or home / ".cache" / "smbench").expanduser()
    hub = Path(environ.get("HF_HOME") or home / ".cache" / "huggingface").expanduser()
    return {
        ours / "images" / arch: CACHE,
        ours / "models": CACHE / ".cache" / "smbench" / "models",
        hub: CACHE / "huggingface",
    }


def pushed_tag(image: Image, version: str) -> str:
    """`<stack>-<arch>-<version>`, the tag that an image gets in a registry; `version` is of one that says none."""
    return f"{image.name}-{image.arch}-{re.sub(r'[^A-Za-z0-9_.-]+', '-', image.version or version)}"


def asked_for(images: Sequence[Image], arch: str | None, stack: str | None) -> list[Image]:
    """The images of an arch and a stack, `all` being the image of several; None leaves the choice open."""
    return [
        image
        for image in images
        if arch in (None, image.arch) and (stack is None or stack == image.name or stack in image.stacks)
    ]


def _inside(wish: Wish, inside: ImageHere) -> InPlace:
    if wish.where == "docker":
        raise UsageError("WHERE=docker: this is already inside an image, which has no docker; leave it out")
    if wish.arch not in (None, inside.arch):
        raise UsageError(f"ARCH={wish.arch}: this is inside the image of {inside}; leave it out, or take another image")
    if wish.stack not in (None, ALL, *inside.stacks):
        raise UsageError(f"STACK={wish.stack}: this is inside the image of {inside}; run it in an image of that stack")
    return InPlace(f"already inside an image ({inside})")


def _arch(wish: Wish, card_arch: str | None, device: str) -> str | None:
    """The arch of the images to run, None where the card does not tell. UsageError where it cannot be the one asked."""
    if wish.arch in (None, NO_GPU):
        return NO_GPU if device == "cpu" else card_arch
    if card_arch is None:
        raise UsageError(f"ARCH={wish.arch}, and no NVIDIA GPU is visible: take ARCH=cpu, or see `smbench doctor`")
    if wish.arch != card_arch and not wish.force:
        raise UsageError(
            f"ARCH={wish.arch}, and this card is {card_arch}: leave ARCH= out, or measure all the same, every result "
            "marked, with FORCE=1"
        )
    return wish.arch


def _trouble(wish: Wish, daemon: Daemon, arch: str, needed: Collection[str]) -> str | None:
    """Why no container can run, with the fix; None where one can."""
    if arch != NO_GPU and not daemon.nvidia:
        return "docker has no NVIDIA runtime: install nvidia-container-toolkit and restart docker"
    if next_image(asked_for(daemon.images, arch, wish.stack), needed, (), wish.stack) is not None:
        return None
    if wish.stack not in (None, ALL) and wish.stack not in needed:
        return f"no missing cell needs stack {wish.stack!r}; needed: {', '.join(sorted(needed)) or 'none'}"
    others = sorted({image.arch for image in daemon.images} - {arch})
    have = f" (images here are for {', '.join(others)})" if others else ""
    stack = wish.stack or (next(iter(needed)) if len(needed) == 1 else ALL)
    return f"no image of {' or '.join(sorted(needed))} for {arch}{have}: {make_image(arch, stack)}"


def make_image(arch: str, stack: str) -> str:
    """The command that makes an image."""
    return f"make image ARCH={arch}" + (f" STACK={stack}" if stack != ALL else "")


def _mount(source: Path, target: PurePosixPath, *options: str) -> str:
    """A bind mount as `--mount` reads it: one line of CSV."""
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(["type=bind", f"source={source}", f"target={target}", *options])
    return line.getvalue()
