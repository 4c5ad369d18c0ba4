"""The build as a list of commands, with every argument resolved. Owns their order; runs none.

The order of document 003: check out TensorRT-LLM's fork with its submodules, have its own Makefile build the release
image for one arch, build the inference layer of the recommender examples on it (INFERENCEBUILD=1), and lay smbench on
top.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from smbench.kvcache.sources import Pinned

TENSORRT_LLM = "tensorrt-llm"
EXAMPLES = "recsys-examples"
LOCAL_NAME = "smbench-trtllm-kvcache"
"""First part of the names of the images in between."""


@dataclass(frozen=True, slots=True)
class Step:
    """One command."""

    title: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        words = [
            *(f"{name}={shlex.quote(value)}" for name, value in self.environment.items()),
            shlex.join(self.command),
        ]
        return " ".join(words)


def check_out(pinned: Pinned, folder: Path) -> list[Step]:
    """A repository at its commit, with submodules and the files that git-lfs keeps."""
    into = [*pinned.git, "-C", str(folder)]
    return [
        Step(f"clone {pinned.name}", [*pinned.git, "clone", "--no-checkout", pinned.source.url, str(folder)]),
        Step(f"check out {pinned.commit}", [*into, "checkout", "--quiet", "--detach", f"{pinned.commit}^{{commit}}"]),
        Step(f"submodules of {pinned.name}", [*into, "submodule", "--quiet", "update", "--init", "--recursive"]),
    ]


def large_files(pinned: Pinned, folder: Path) -> Step:
    """The files that git-lfs keeps: without them the compiler meets three lines of text, hours later."""
    return Step(f"large files of {pinned.name}", [*pinned.git, "-C", str(folder), "lfs", "pull"])


def release_image(sm: int, tag: str) -> str:
    """What the fork's Makefile calls its release image."""
    return f"{LOCAL_NAME}/release:sm{sm}-{tag}"


def inference_image(sm: int, tag: str) -> str:
    """What the image with the recommender examples is called."""
    return f"{LOCAL_NAME}/inference:sm{sm}-{tag}"


def build_release(checkout: Path, sm: int, jobs: int, base_tag: str, tag: str) -> Step:
    """The long one. `base_tag` is TAG@sha256:… of the fork's base image."""
    return Step(
        "build TensorRT-LLM (hours)",
        [
            "make",
            *("-C", str(checkout / "docker")),
            "release_build",
            f"CUDA_ARCHS={sm}-real",
            f"BUILD_WHEEL_OPTS=-j {jobs}",
            f"BASE_TAG={base_tag}",
            f"IMAGE_NAME={LOCAL_NAME}",
            f"IMAGE_TAG=sm{sm}-{tag}",
        ],
        {"DOCKER_BUILDKIT": "1"},
    )


def build_inference(docker: str, checkout: Path, sm: int, jobs: int, tag: str) -> Step:
    """The recommender examples without Megatron, which only training needs."""
    return Step(
        "build the inference layer of recsys-examples",
        [
            docker,
            "build",
            *("--build-arg", f"BASE_IMAGE={release_image(sm, tag)}"),
            *("--build-arg", "INFERENCEBUILD=1"),
            *("--build-arg", f"MAX_JOBS={jobs}"),
            *("--tag", inference_image(sm, tag)),
            *("--file", str(checkout / "docker" / "Dockerfile")),
            str(checkout),
        ],
        {"DOCKER_BUILDKIT": "1"},
    )


def build_layer(
    docker: str, context: Path, base: str, tag: str, arguments: Mapping[str, str], secrets: Mapping[str, Path]
) -> Step:
    """smbench on an image that has TensorRT-LLM."""
    return Step(
        "lay smbench on it",
        [
            docker,
            "build",
            *("--progress", "plain"),
            *("--file", str(context / "Dockerfile")),
            *("--build-arg", f"BASE_IMAGE={base}"),
            *(part for name, value in arguments.items() for part in ("--build-arg", f"{name}={value}")),
            *(part for name, file in sorted(secrets.items()) for part in ("--secret", f"id={name},src={file}")),
            *("--tag", tag),
            str(context),
        ],
        {"DOCKER_BUILDKIT": "1"},
    )
