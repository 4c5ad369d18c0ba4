"""`python -m smbench.images build|dockerfiles|sbom|sizes`: what make's targets for images call."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from smbench import __version__
from smbench.arch import ArchTable, load
from smbench.errors import CorruptError, UsageError
from smbench.images import command, context, daemon, dockerfile, secrets, sizes
from smbench.images.target import Target, resolve
from smbench.resources import REPOSITORY

DOCKERFILES = REPOSITORY / "docker"
NO_COMMIT_EPOCH = 315532800
"""1980-01-01, the first day that a zip can name: the time of sources that come from no commit."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 fine, 1 the build failed or a Dockerfile is not what is rendered, 2 usage, 3 a damaged file."""
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
    except (UsageError, CorruptError) as error:
        sys.stderr.write(f"smbench: {error}\n")
        return error.exit_code
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m smbench.images", description=__doc__)
    parser.add_argument("--docker", default=os.environ.get("DOCKER") or "docker", help="docker's client")
    commands = parser.add_subparsers(required=True)

    build = commands.add_parser("build", help="build one image")
    build.add_argument("--arch", default="", help="row of docker/archs.toml")
    build.add_argument("--stack", help="one stack (default: all that the arch can have)")
    build.add_argument("--base-image", default="", help="Debian bookworm, by digest or on this machine")
    build.add_argument("--wheelhouse", default="", help="folder of wheels that is looked at first")
    build.add_argument("--torch-index-url", default="", help="index for torch alone")
    build.add_argument("--ca-bundle", default="", help="PEM certificates that the build has to trust")
    build.add_argument("--apt-conf", default="", help="configuration of apt in the build, such as a proxy")
    build.add_argument("--apt-sources", default="", help="sources.list of the build")
    build.add_argument("--strip", choices=("0", "1"), default="1", help="0 keeps device code of every arch")
    build.add_argument("--sbom", type=Path, help="also write the image's SBOM to this file")
    build.add_argument("--no-cache", action="store_true", help="build every step anew")
    build.add_argument("--dry-run", action="store_true", help="print the commands, run none")
    build.set_defaults(run=_build)

    files = commands.add_parser("dockerfiles", help="render docker/*.Dockerfile")
    files.add_argument("--check", action="store_true", help="change nothing, fail where one is not what is rendered")
    files.set_defaults(run=_dockerfiles)

    sbom = commands.add_parser("sbom", help="the SBOM of a built image on standard output")
    sbom.add_argument("--arch", default="")
    sbom.add_argument("--stack")
    sbom.set_defaults(run=_sbom)

    size = commands.add_parser("sizes", help="every built image: what it takes on disk and on the wire")
    size.add_argument("--pull", action="store_true", help="also compress each as a registry does; takes minutes")
    size.set_defaults(run=_sizes)
    return parser


def _build(options: argparse.Namespace) -> int:
    table = _table()
    target = resolve(table, options.arch, options.stack)
    wheelhouse = context.wheelhouse_folder(options.wheelhouse)
    if not options.dry_run:
        daemon.require(options.docker)
    chosen = command.Options(
        *_base(options, table), options.torch_index_url, strip=options.strip == "1", no_cache=options.no_cache
    )
    source = _source()
    folder = REPOSITORY / "build" / "images" / f"{target.name}-{target.arch.name}"
    with tempfile.TemporaryDirectory(prefix="smbench-secrets-") as private:
        taken = secrets.collect(Path(private), options.ca_bundle, options.apt_conf, options.apt_sources)
        build = command.build(options.docker, target, folder, source, chosen, taken, os.environ)
        if options.dry_run:
            sys.stdout.write(f"DOCKER_BUILDKIT=1 {shlex.join(build)}\n")
            if options.sbom:
                sys.stdout.write(f"{shlex.join(_sbom_command(options.docker, target))} > {options.sbom}\n")
            return 0
        context.lay_out(REPOSITORY, folder, target, wheelhouse, source.epoch)
        status = daemon.run(build)
    if status != 0:
        sys.stderr.write(f"smbench: the build of {target.tag} failed; the cause is above\n")
        return 1
    if options.sbom:
        options.sbom.write_text(daemon.ask(*_sbom_command(options.docker, target)) + "\n", encoding="utf-8")
    sys.stdout.write(f"{target.tag}\n")
    return 0


def _dockerfiles(options: argparse.Namespace) -> int:
    table = _table()
    if not options.check:
        for path in dockerfile.write(table, DOCKERFILES):
            sys.stdout.write(f"{path.relative_to(REPOSITORY)}\n")
        return 0
    differing = dockerfile.differing(table, DOCKERFILES)
    for path in differing:
        sys.stderr.write(
            f"{path.relative_to(REPOSITORY)}: not what Dockerfile.j2 and archs.toml give; run make dockerfiles\n"
        )
    return 1 if differing else 0


def _sbom(options: argparse.Namespace) -> int:
    target = resolve(_table(), options.arch, options.stack)
    daemon.require(options.docker)
    sys.stdout.write(daemon.ask(*_sbom_command(options.docker, target)) + "\n")
    return 0


def _sizes(options: argparse.Namespace) -> int:
    daemon.require(options.docker)
    sys.stdout.write("| image | stacks | disk | pull |\n|---|---|---:|---:|\n")
    for size in sizes.measure(options.docker, options.pull):
        pull = "not measured" if size.pull_bytes is None else f"{size.pull_bytes / 1e6:.0f} MB"
        sys.stdout.write(f"| {size.tag} | {size.stacks} | {size.disk_bytes / 1e6:.0f} MB | {pull} |\n")
        sys.stdout.flush()
    return 0


def _table() -> ArchTable:
    file = DOCKERFILES / "archs.toml"
    if not file.exists():
        raise UsageError("images are built from a checkout of smbench, and this is an installed one")
    return load(file)


def _base(options: argparse.Namespace, table: ArchTable) -> tuple[str, str]:
    """The base image, and what says which one it is. UsageError where nothing does."""
    name = options.base_image or table.base.image
    _, at, digest = name.partition("@")
    if at:
        return name, digest
    found = None if options.dry_run else daemon.image_id(options.docker, name)
    if found is None and not options.dry_run:
        raise UsageError(
            f"BASE_IMAGE: {name} has no digest and is no image on this machine: name it as {name}@sha256:…, which "
            f"`docker pull {name}` prints, or import one under that name (docker/README.md)"
        )
    return name, found or ""


def _source() -> command.Source:
    """What the image is built from, as git knows it; without git SMBENCH_COMMIT and SOURCE_DATE_EPOCH say so."""
    commit, time = _git("rev-parse", "HEAD"), _git("log", "-1", "--format=%ct")
    dirty = "-dirty" if commit and _git("status", "--porcelain", "--untracked-files=no") else ""
    epoch = os.environ.get("SOURCE_DATE_EPOCH") or time or str(NO_COMMIT_EPOCH)
    if not epoch.isdecimal():
        raise UsageError(f"SOURCE_DATE_EPOCH: {epoch!r} is no number of seconds since 1970")
    return command.Source(__version__, os.environ.get("SMBENCH_COMMIT") or f"{commit}{dirty}", int(epoch))


def _git(*arguments: str) -> str:
    """The output of a git command on this checkout, empty where there is no git or no repository."""
    try:
        done = subprocess.run(
            ["git", "-C", str(REPOSITORY), *arguments], capture_output=True, text=True, timeout=60, check=False
        )
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _sbom_command(docker: str, target: Target) -> list[str]:
    return [docker, "run", "--rm", "--network", "none", "--entrypoint", "cat", target.tag, "/etc/smbench/sbom.json"]
