"""`python -m smbench.kvcache trtllm|kvcache`: what `make image STACK=trtllm` and `make kvcache-image` call."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from smbench import machine
from smbench.arch import Arch
from smbench.arch import load as load_archs
from smbench.errors import CorruptError, UsageError
from smbench.images import daemon, secrets
from smbench.images.target import sm
from smbench.kvcache import layer, needs, sources, steps, table
from smbench.kvcache.needs import Machine
from smbench.kvcache.sources import Pinned
from smbench.kvcache.steps import Step
from smbench.resources import REPOSITORY

DOCKER_FOLDER = REPOSITORY / "docker"
BUILD = REPOSITORY / "build"
UNKNOWN_TAG = "TAG"
"""Stands in a dry run for the tag that only the fork's Dockerfile knows."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 fine, 1 a step of the build failed, 2 usage or something is missing, 3 a damaged file."""
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
    except (UsageError, CorruptError) as error:
        sys.stderr.write(f"smbench: {error}\n")
        return error.exit_code
    return status


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--arch", default="", help="row of docker/archs.toml")
    common.add_argument("--docker", default=os.environ.get("DOCKER") or "docker", help="docker's client")
    common.add_argument("--wheelhouse", default="", help="folder of wheels that is looked at first")
    common.add_argument("--ca-bundle", default="", help="PEM certificates that the build has to trust")
    common.add_argument("--dry-run", action="store_true", help="print the commands, run none")
    parser = argparse.ArgumentParser(prog="python -m smbench.kvcache", description=__doc__)
    commands = parser.add_subparsers(required=True)

    trtllm = commands.add_parser("trtllm", parents=[common], help="smbench on NVIDIA's release of TensorRT-LLM")
    trtllm.add_argument("--base-image", default="", help="the release by digest, or an image on this machine")
    trtllm.set_defaults(run=_trtllm)

    kvcache = commands.add_parser("kvcache", parents=[common], help="document 003's TensorRT-LLM, built from source")
    kvcache.add_argument("--source-dir", default="", help="folder of mirrors, OWNER/REPOSITORY.git")
    kvcache.add_argument("--max-jobs", default="", help="compilers at once")
    kvcache.add_argument("--base-digest", default="", help="sha256:… of the image that the fork builds on")
    kvcache.add_argument("--tensorrt-llm-commit", default="")
    kvcache.add_argument("--recsys-examples-commit", default="")
    kvcache.add_argument("--force", action="store_true", help="build though memory or disk look too small")
    kvcache.set_defaults(run=_kvcache)
    return parser


def _trtllm(options: argparse.Namespace) -> int:
    arch, _ = _arch(options.arch)
    release = table.load(DOCKER_FOLDER / "kvcache.toml").release.image
    if not options.dry_run:
        daemon.require(options.docker)
    name, _, digest = options.base_image.partition("@")
    if not name or (digest and not _is_digest(digest)):
        raise UsageError(
            f"BASE_IMAGE is missing or has no digest: name NVIDIA's release as {release}@sha256:…, which "
            f"`docker pull {release}:TAG` prints"
        )
    base_id = digest or (None if options.dry_run else daemon.image_id(options.docker, name))
    if base_id is None and not options.dry_run:
        raise UsageError(
            f"BASE_IMAGE: {name} has no digest and is no image on this machine: name it as {release}@sha256:…"
        )
    with _layer(options, arch, "trtllm", options.base_image, base_id or "", "") as last:
        return _run([last], options.dry_run)


def _kvcache(options: argparse.Namespace) -> int:
    arch, capability = _arch(options.arch)
    facts = table.load(DOCKER_FOLDER / "kvcache.toml")
    if not options.dry_run:
        daemon.require(options.docker)
    if not _is_digest(options.base_digest):
        raise UsageError(
            "BASE_DIGEST is missing or no digest: TensorRT-LLM builds on an image that its docker/Dockerfile.multi "
            "names by a tag, and a tag can move; name it as sha256:…, which `docker pull` of that image prints"
        )
    here = _machine(options.docker, options.dry_run)
    jobs = needs.jobs(here, facts.needs, options.max_jobs)
    for line in needs.report(here, facts.needs, jobs):
        sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
    named = {steps.TENSORRT_LLM: options.tensorrt_llm_commit, steps.EXAMPLES: options.recsys_examples_commit}
    pinned = {one.name: one for one in sources.pin(facts.source, named, options.source_dir)}
    wrong = [] if options.force else needs.shortages(here, facts.needs, jobs)
    if not options.dry_run or options.source_dir:
        wrong += [why for one in pinned.values() if (why := sources.missing(one)) is not None]
    if wrong and not options.dry_run:
        raise UsageError("\n".join(["this build cannot end well:", *(f"  {line}" for line in wrong)]))
    for line in wrong:
        sys.stdout.write(f"# would be refused: {line}\n")

    folder = BUILD / "kvcache" / arch.name
    checkouts = {name: folder / name for name in pinned}
    if not options.dry_run:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    for name, one in pinned.items():
        if (status := _run(steps.check_out(one, checkouts[name]), options.dry_run)) != 0:
            return status
        if not options.dry_run:
            _check_out_is_whole(one, checkouts[name])
        if options.dry_run or _uses_lfs(checkouts[name]):
            # in a dry run nobody knows yet; TensorRT-LLM does
            if options.dry_run and name != steps.TENSORRT_LLM:
                continue
            if (status := _run([steps.large_files(one, checkouts[name])], options.dry_run)) != 0:
                return status
    fork = pinned[steps.TENSORRT_LLM]
    tag = fork.commit[:12]
    base_tag = f"{_base_tag(fork, checkouts[fork.name], options.dry_run)}@{options.base_digest}"
    built_from = " ".join(f"{one.source.mirror.removesuffix('.git')}@{one.commit}" for one in pinned.values())
    long_steps = [
        steps.build_release(checkouts[fork.name], capability, jobs, base_tag, tag),
        steps.build_inference(options.docker, checkouts[steps.EXAMPLES], capability, jobs, tag),
    ]
    base = steps.inference_image(capability, tag)
    # laid out before the long build, so that nothing of ours fails after it
    with _layer(options, arch, "kvcache", base, options.base_digest, built_from) as last:
        return _run([*long_steps, last], options.dry_run)


def _arch(name: str) -> tuple[Arch, int]:
    """The arch and its compute capability. UsageError where there is none."""
    known = load_archs(DOCKER_FOLDER / "archs.toml").arch
    with_gpu = [row.name for row in known.values() if sm(row) is not None]
    capability = sm(known[name]) if name in known else None
    if capability is None:
        what = f"unknown arch {name!r}" if name not in known else f"{name} has no GPU, and TensorRT-LLM needs one"
        raise UsageError(f"ARCH: {what if name else 'is missing'}; one of {', '.join(with_gpu)}")
    return known[name], capability


def _is_digest(text: str) -> bool:
    return re.fullmatch(r"sha256:[0-9a-f]{64}", text) is not None


def _machine(docker: str, dry_run: bool) -> Machine:
    """This machine, with the disk that docker writes to where it can be told."""
    root = Path(REPOSITORY)
    if not dry_run:
        told = Path(daemon.ask(docker, "info", "--format", "{{.DockerRootDir}}"))
        # a daemon elsewhere has its disk elsewhere
        root = told if told.is_dir() else root
    return Machine(machine.cores_usable(), machine.memory_total_bytes() or 0, shutil.disk_usage(root).free)


def _check_out_is_whole(pinned: Pinned, folder: Path) -> None:
    """The files that the build uses are there, and know what they are told. UsageError before the long build."""
    for name, words in pinned.source.files.items():
        if not (folder / name).is_file():
            raise UsageError(
                f"source {pinned.name}: {pinned.commit} has no {name}: it is not the repository, or not the commit, "
                "that was meant"
            )
        text = (folder / name).read_text(encoding="utf-8")
        for word in words:
            if word not in text:
                raise UsageError(
                    f"source {pinned.name}: {name} of {pinned.commit} does not know {word}: this commit is built "
                    "in another way than document 003 says"
                )


def _uses_lfs(folder: Path) -> bool:
    """Whether files of the checkout are kept by git-lfs. UsageError where they are and it is not installed."""
    attributes = folder / ".gitattributes"
    if not attributes.is_file() or "filter=lfs" not in attributes.read_text(encoding="utf-8", errors="replace"):
        return False
    if shutil.which("git-lfs") is None:
        raise UsageError(f"{folder.name} keeps files with git-lfs, which is not installed: apt-get install git-lfs")
    return True


def _base_tag(fork: Pinned, checkout: Path, dry_run: bool) -> str:
    """The tag of the fork's base image, from its own Dockerfile; a dry run asks the mirror, if there is one."""
    if not dry_run:
        text = (checkout / "docker" / "Dockerfile.multi").read_text(encoding="utf-8")
    elif fork.mirrors is not None:
        place = fork.mirrors / fork.source.mirror
        show = ["git", "-C", str(place), "show", f"{fork.commit}:docker/Dockerfile.multi"]
        text = subprocess.run(show, capture_output=True, text=True, check=False).stdout
    else:
        return UNKNOWN_TAG
    found = re.search(r'^ARG BASE_TAG="?([^"\s]+)', text, flags=re.MULTILINE)
    if found is None:
        raise UsageError(f"source {fork.name}: docker/Dockerfile.multi names no BASE_TAG: it is not of this version")
    return found[1]


@contextmanager
def _layer(
    options: argparse.Namespace, arch: Arch, image: str, base: str, base_id: str, built_from: str
) -> Iterator[Step]:
    """The step that lays smbench on an image, with its context laid out and its secrets there meanwhile."""
    folder = BUILD / "images" / f"{image}-{arch.name}"
    origin = layer.origin(REPOSITORY)
    if not options.dry_run:
        layer.lay_out(REPOSITORY, folder, arch, image, options.wheelhouse, origin.epoch)
    with tempfile.TemporaryDirectory(prefix="smbench-secrets-") as private:
        taken = secrets.collect(Path(private), options.ca_bundle, "", "")
        arguments = layer.arguments(origin, base_id, built_from)
        yield steps.build_layer(options.docker, folder, base, f"smbench:{image}-{arch.name}", arguments, taken)


def _run(planned: Sequence[Step], dry_run: bool) -> int:
    """Run steps one after the other; a dry run prints them. The exit status is 1 where one fails."""
    for step in planned:
        if dry_run:
            sys.stdout.write(f"# {step.title}\n{step}\n")
            continue
        sys.stdout.write(f"smbench: {step.title}\n")
        sys.stdout.flush()
        done = subprocess.run(step.command, env={**os.environ, **step.environment}, check=False)
        if done.returncode != 0:
            sys.stderr.write(
                f"smbench: {step.title} failed (exit status {done.returncode}); the cause is above:\n{step}\n"
            )
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
