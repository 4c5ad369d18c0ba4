"""Commands that concern images: launch (`make run`) and push (`make push`). Thin but for the order of containers.

`launch` runs `smbench run` here or in containers, one for each stack that missing cells need, over one run folder: each
measures what its stacks can and leaves the other cells `skipped` for the next. Owns how containers are started, stopped
and followed; which and how is containers.py, what daemon there is is dockerd.py.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer

from smbench import __version__, terminal
from smbench.stacks import Stacks

if TYPE_CHECKING:
    from smbench.containerprocess import Ended
    from smbench.containers import Daemon, Image, InContainers, NoDaemon, Task, Wish
    from smbench.place import ImageHere
    from smbench.plan import Plan

commands = typer.Typer()

DOCKER_FAILED = {125: "docker cannot start it", 126: "its command cannot run", 127: "it has no smbench command"}
"""Exit codes of `docker run` itself."""

RecipeName = Annotated[str, typer.Argument(help="Recipe name, see `smbench list`.")]
ArchName = Annotated[str | None, typer.Option("--arch", help="Arch of the image, such as sm89 or cpu.")]
StackName = Annotated[str | None, typer.Option("--stack", help="Only the image of this stack, or `all`.")]


@commands.command()
def launch(
    recipe: RecipeName,
    profile: Annotated[str | None, typer.Option("--profile", help="full, quick or cpu.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Run folder (default runs/<recipe>-<device>).")] = None,
    arch: ArchName = None,
    stack: StackName = None,
    model: Annotated[str | None, typer.Option("--model", help="Other weights for engines, see `run`.")] = None,
    price: Annotated[float | None, typer.Option("--price", help="What an hour costs.", min=0)] = None,
    sharegpt: Annotated[Path | None, typer.Option("--sharegpt", metavar="FILE", help="See `run`.")] = None,
    trace: Annotated[str | None, typer.Option("--trace", help="torch or nsys, see `run`.")] = None,
    provider: Annotated[list[str] | None, typer.Option("--provider", help="Only this implementation.")] = None,
    where: Annotated[str, typer.Option("--where", help="docker, here, or auto: docker where it can be.")] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Measure even if image and card differ; marked.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the command lines and start nothing.")] = False,
) -> None:
    """Run a recipe where it runs best: in images of this card's arch, or in place; says which and why."""
    from smbench import containers, place, plan

    wish = _wish(where, arch, stack, force)
    resolved = _plan(recipe, profile, provider, model, wish, sharegpt)
    inside = place.image_here()
    root, warning = place.runs_root(inside)
    if warning and out is None:
        terminal.warn(warning)
    card = place.here()
    folder = out or plan.default_folder(resolved, None if wish.arch == place.NO_GPU else card.device_name, root)
    place.require_writable(folder)
    device = resolved.profile.device
    needed = _needed(resolved, folder) or _stacks(resolved)
    chosen = containers.choose(wish, inside, _daemon(wish, inside, device), card.arch, device, needed)
    options = ["--profile", resolved.profile_name, *_option("--out", out), *_option("--model", model)]
    options += [*_option("--price", price), *(part for name in provider or () for part in ("--provider", name))]
    options += [*_option("--sharegpt", sharegpt), *_option("--trace", trace), *(["--force"] if force else [])]
    if isinstance(chosen, containers.InPlace):
        typer.echo(f"in place: {chosen.reason}", err=True)
        _make_stack(resolved, card.stacks, dry_run)
        _in_place([sys.executable, "-m", "smbench", "run", recipe, *options], dry_run)
    again = ["smbench", "launch", recipe, *options, *_option("--arch", arch), *_option("--stack", stack)]
    again += _option("--where", None if where == "auto" else where)
    task = containers.Task(
        recipe=recipe,
        profile=resolved.profile_name,
        folder=folder.resolve(),
        caches=containers.caches(os.environ, Path.home(), chosen.arch),
        user=f"{os.getuid()}:{os.getgid()}",
        rootless=chosen.daemon.rootless,
        gpu=device == "cuda",
        again=shlex.join(again),
        name=f"{folder.name}-{os.getpid()}",
        model=model,
        providers=provider or (),
        price=price,
        force=force,
        sharegpt=sharegpt,
        trace=trace,
        environ=os.environ,
    )
    containers_of_run = _Launch(resolved, task, chosen, wish.stack)
    if dry_run:
        containers_of_run.show()
    else:
        containers_of_run.run()


@commands.command()
def push(
    registry: Annotated[str, typer.Option("--registry", help="Where to, such as ghcr.io/you or docker.io/you.")],
    arch: ArchName = None,
    stack: StackName = None,
    as_root: Annotated[
        bool, typer.Option("--as-root", help="For pods whose volume only root can write: the image's user is root.")
    ] = False,
) -> None:
    """Push this host's images to a registry and say their digests, which pods have to be told."""
    from smbench import containers, dockerd, place
    from smbench.errors import UsageError

    if not registry.strip("/"):
        raise UsageError("REGISTRY is missing: make push REGISTRY=ghcr.io/you, for instance")
    wish = _wish("docker", arch, stack, False)
    daemon = dockerd.ask()
    if isinstance(daemon, containers.NoDaemon):
        raise UsageError(f"{daemon.reason}; pushing needs docker")
    found = containers.asked_for(daemon.images, wish.arch, wish.stack)
    # several images may have the stack; it is the one of that name that is asked for
    found = [image for image in found if wish.stack in (None, image.name)] or found
    if not found:
        what = f" of {wish.stack}" if wish.stack else ""
        target = f"ARCH={wish.arch or 'sm89'}" + (f" STACK={wish.stack}" if wish.stack else "")
        raise UsageError(f"no image{what}{f' for {wish.arch}' if wish.arch else ''} here: make image {target}")
    repository = f"{registry.strip('/').removeprefix('https://').removeprefix('http://')}/smbench"
    for image in found:
        tag = containers.pushed_tag(image, __version__) + ("-root" if as_root else "")
        typer.echo(f"pushing {image.reference} as {repository}:{tag}", err=True)
        digest = dockerd.push(image, repository, tag, as_root, lambda line: typer.echo(line, err=True))
        terminal.say(f"{repository}:{tag}")
        terminal.say(f"  image     {repository}@{digest}")
        terminal.say(f"  variable  {place.DIGEST}={digest}")


def _make_stack(resolved: Plan, stacks: Stacks, dry_run: bool) -> None:
    """The stack that the recipe cannot do without, where this checkout does not have it yet."""
    from smbench import stacksetup

    stack = stacksetup.missing_stack(resolved, stacks)
    command = stacksetup.command(stack) if stack else None
    if stack is None or command is None:
        return
    if dry_run:
        terminal.say(shlex.join(command))
    else:
        typer.echo(f"making stack {stack!r} beside this checkout, once", err=True)
        stacksetup.make(stack)


class _Every(Stacks):
    """Stands for a machine that has every stack: which of them are there is for images to say."""

    def missing(self, stack: str, packages: Sequence[str]) -> list[str]:
        return []


class _Launch:
    """The containers of one run, one after the other."""

    def __init__(self, resolved: Plan, task: Task, chosen: InContainers, stack: str | None) -> None:
        self._plan = resolved
        self._task = task
        self._chosen = chosen
        self._stack = stack
        self._failed = False

    def show(self) -> None:
        """Say the command lines, as if every container did all that its stacks can."""
        needed, used = self._needed(), set[str]()
        while image := self._next(needed, used):
            needed, used = needed - image.stacks, {*used, image.reference}
            command, _ = self._command(image, last=self._next(needed, used) is None)
            terminal.say(shlex.join(command))

    def run(self) -> None:
        """Container after container until no image here has a stack that a missing cell needs."""
        from smbench.containerprocess import ContainerProcesses

        self._make_folders()
        used: set[str] = set()
        needed = self._needed()
        with ContainerProcesses() as processes:
            while image := self._next(needed, used):
                used.add(image.reference)
                self._say_begin(image)
                command, name = self._command(image, last=self._next(needed - image.stacks, used) is None)
                ended = processes.run(command, name)
                finished = self._finished(ended)
                if processes.told is not None or not finished:
                    self._leave(image, ended, processes.told, finished)
                self._failed = self._failed or ended.code != 0
                needed = _needed(self._plan, self._task.folder)
        self._say_end(needed)

    def _needed(self) -> set[str]:
        # with nothing missing one container still renders the report and packs the bundle
        return _needed(self._plan, self._task.folder) or _stacks(self._plan)

    def _next(self, needed: set[str], used: set[str]) -> Image | None:
        from smbench import containers

        return containers.next_image(self._chosen.images, needed, used, self._stack)

    def _command(self, image: Image, last: bool) -> tuple[list[str], str]:
        """The command line and the container's name, which differs between the containers of a run."""
        from smbench import containers

        task = replace(self._task, name=containers.container_name(f"{self._task.name}-{image.name}"))
        return containers.command_line(image, task, last), task.name

    def _make_folders(self) -> None:
        """Everything that is mounted, and where one mount lies in another the place for it: docker would as root."""
        (outer, inside), *_ = self._task.caches.items()
        places = [outer / target.relative_to(inside) for target in self._task.caches.values()]
        for folder in (self._task.folder, *self._task.caches, *places):
            folder.mkdir(parents=True, exist_ok=True)

    def _say_begin(self, image: Image) -> None:
        if image.version not in (None, __version__):
            terminal.warn(
                f"{image.reference} has smbench {image.version}, this is {__version__}: make image ARCH={image.arch}"
            )
        typer.echo(f"docker: {image.reference}, {image.digest or 'no digest: it is in no registry'}", err=True)

    def _finished(self, ended: Ended) -> bool:
        """Whether a container came to its end, by the one document that it then writes."""
        try:
            return "counts" in json.loads(ended.out) and ended.code in (0, 1)
        except (ValueError, TypeError):
            return False

    def _leave(self, image: Image, ended: Ended, told: signal.Signals | None, finished: bool) -> NoReturn:
        """End as the container did, with a word where it could say none."""
        go_on = f"every finished cell is kept; the same command goes on: {self._task.again}"
        if told is not None:
            # a container that was stopped at work has said it itself
            if finished or ended.code not in (0, 130):
                typer.echo(f"stopped; {go_on}", err=True)
            raise typer.Exit(130 if told == signal.SIGINT else 0)
        if ended.code in DOCKER_FAILED:
            terminal.fail(
                f"{image.reference}: {DOCKER_FAILED[ended.code]}, for the reason above; WHERE=here runs without docker",
                1,
            )
        if ended.code == 128 + signal.SIGKILL:
            terminal.fail(f"the container was killed, by the host or for want of memory; {go_on}", 1)
        # it was stopped from outside, or failed, and has said so
        raise typer.Exit(ended.code)

    def _say_end(self, needed: set[str]) -> None:
        from smbench import report, runfolder

        folder = self._task.folder
        if not (folder / "run.json").exists():
            terminal.fail(
                f"the container measured and {terminal.shown(folder)} is empty: docker's daemon sees other folders "
                "than this machine; run where the daemon is, or with WHERE=here",
                1,
            )
        found = runfolder.load(folder)
        for stack in sorted(needed):
            cells = [entry.cell.cell_id for entry in self._plan.entries if entry.stack == stack]
            skipped = sum(1 for cell_id in cells if cell_id in found.results)
            if skipped:
                terminal.warn(
                    f"{skipped} cells of stack {stack} are skipped: make image ARCH={self._chosen.arch} STACK={stack}, "
                    "and the same command completes this folder"
                )
        bundle = max(folder.glob("*.tar.gz"), key=lambda path: path.stat().st_mtime_ns, default=None)
        terminal.say_how_it_ended(folder, report.analysis_of(found), False, bundle)
        if self._failed:
            raise typer.Exit(1)


def _in_place(command: list[str], dry_run: bool) -> NoReturn:
    """Become `smbench run`, so that signals and exit codes are its own."""
    if dry_run:
        terminal.say(shlex.join(command))
        raise typer.Exit(0)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(command[0], command)


def _wish(where: str, arch: str | None, stack: str | None, force: bool) -> Wish:
    from smbench import arch as archs
    from smbench import containers, resources

    table = archs.load(resources.archs_file())
    places: dict[str, Literal["auto", "docker", "here"]] = {"auto": "auto", "docker": "docker", "here": "here"}
    return containers.Wish(
        where=places[containers.known("WHERE", where, places)],
        arch=None if arch is None else containers.known("ARCH", arch, table.arch),
        stack=None if stack is None else containers.known("STACK", stack, [*table.stack, containers.ALL]),
        force=force,
    )


def _plan(
    recipe_name: str,
    profile: str | None,
    providers: list[str] | None,
    model: str | None,
    wish: Wish,
    sharegpt: Path | None,
) -> Plan:
    """What would run here with every stack."""
    import psutil

    from smbench import place, plan, recipe, resources

    machine = place.here()
    if wish.arch == place.NO_GPU:
        machine = plan.Here(memory_bytes=psutil.virtual_memory().total)
    path = recipe.find(recipe_name, resources.recipes_dir())
    everywhere = replace(machine, stacks=_Every(()))
    return plan.make(recipe.load(path), path.read_bytes(), profile, everywhere, providers or (), model, sharegpt)


def _needed(resolved: Plan, folder: Path) -> set[str]:
    """The stacks of cells that have no result yet, or were skipped for want of their stack."""
    from smbench import runfolder

    done = runfolder.load(folder).results if (folder / "run.json").exists() else {}
    missing = (
        entry
        for entry in resolved.entries
        if entry.cell.cell_id not in done or done[entry.cell.cell_id].status == "skipped"
    )
    # what is skipped with every stack here wants something else: a file, more cards
    return {entry.stack for entry in missing if entry.runs}


def _stacks(resolved: Plan) -> set[str]:
    """The stacks of cells that can run on this machine."""
    return {entry.stack for entry in resolved.entries if entry.unsupported is None}


def _daemon(wish: Wish, inside: ImageHere | None, device: str) -> Daemon | NoDaemon:
    """The daemon, asked only where the answer counts."""
    from smbench import containers, dockerd

    if inside is not None or wish.where == "here" or (device == "cpu" and not wish.image):
        return containers.NoDaemon("not asked")
    return dockerd.ask()


def _option(name: str, value: object) -> list[str]:
    return [] if value is None else [name, f"{value:g}" if isinstance(value, float) else str(value)]
