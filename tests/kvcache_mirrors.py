"""Small repositories in the place of TensorRT-LLM's fork and recsys-examples: mirrors, laid out as SOURCE_DIR is.

They hold what the build touches, and a submodule. Their Makefile and Dockerfiles build images of a few files, and say
what they were told.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

FORK = "geoffreyQiu/TensorRT-LLM.git"
EXAMPLES = "NVIDIA/recsys-examples.git"
SUBMODULE = "NVIDIA/cutlass.git"
BASE_TAG = "25.03-py3"

MAKEFILE = """\
DOCKER ?= docker
BASE_TAG ?= {base_tag}
release_build:
\t$(DOCKER) build --file Dockerfile.multi --tag $(IMAGE_NAME)/release:$(IMAGE_TAG) \\
\t\t--build-arg BASE_TAG="$(BASE_TAG)" \\
\t\t--build-arg BUILD_WHEEL_ARGS="--clean --cuda_architectures $(CUDA_ARCHS) $(BUILD_WHEEL_OPTS)" ..
"""
MULTI = """\
ARG BASE_IMAGE={base_image}
ARG BASE_TAG={base_tag}
FROM {base_image}
USER root
ARG BASE_TAG
ARG BUILD_WHEEL_ARGS
# the base is an image of ours, for want of one of NVIDIA's: what is ours goes, and pip comes, which NVIDIA's have
RUN rm -rf /opt/smbench /etc/smbench /usr/local/bin/smbench
COPY python /usr/lib/python3/dist-packages
COPY 3rdparty /3rdparty
RUN echo "$BASE_TAG $BUILD_WHEEL_ARGS" > /told-release
"""
INFERENCE = """\
ARG BASE_IMAGE
FROM ${BASE_IMAGE}
ARG INFERENCEBUILD
RUN echo "INFERENCEBUILD=$INFERENCEBUILD" > /told-inference
"""


@dataclass(frozen=True)
class Mirrors:
    """A folder of mirrors and the commits in it."""

    folder: Path
    fork: str
    examples: str


def make(folder: Path, base_image: str = "local-base", python_files: dict[str, str] | None = None) -> Mirrors:
    """Mirrors below a folder; `python_files` are more files of the fork, by path."""
    _repository(folder, SUBMODULE, {"include/cutlass.h": "// a submodule\n"})
    fork = _repository(
        folder,
        FORK,
        {
            "docker/Makefile": MAKEFILE.format(base_tag=BASE_TAG),
            "docker/Dockerfile.multi": MULTI.format(base_tag=BASE_TAG, base_image=base_image),
            "python/tensorrt_llm/__init__.py": "",
            **(python_files or {}),
        },
        {"3rdparty/cutlass": f"https://github.com/{SUBMODULE}"},
    )
    benchmark = "examples/hstu/benchmark/paged_hstu_with_kvcache_benchmark.py"
    examples = _repository(folder, EXAMPLES, {"docker/Dockerfile": INFERENCE, benchmark: "print()\n"})
    return Mirrors(folder, fork, examples)


def _repository(folder: Path, name: str, files: dict[str, str], submodules: dict[str, str] | None = None) -> str:
    """Make one mirror; the commit that it holds."""
    work = folder / "work" / name
    work.mkdir(parents=True)
    git(work, "init", "--quiet", "--initial-branch", "main")
    for path, text in files.items():
        (work / path).parent.mkdir(parents=True, exist_ok=True)
        (work / path).write_text(text, encoding="utf-8")
    for path, address in (submodules or {}).items():
        among = ("-c", f"url.{folder}/.insteadOf=https://github.com/", "-c", "protocol.file.allow=always")
        git(work, *among, "submodule", "--quiet", "add", address, path)
    git(work, "add", ".")
    git(work, "commit", "--quiet", "--message", "stand-in")
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    git(folder, "clone", "--quiet", "--mirror", str(work), str(folder / name))
    return git(work, "rev-parse", "HEAD")


def git(folder: Path, *arguments: str) -> str:
    identity = {
        "GIT_AUTHOR_NAME": "a",
        "GIT_AUTHOR_EMAIL": "a@b",
        "GIT_COMMITTER_NAME": "a",
        "GIT_COMMITTER_EMAIL": "a@b",
    }
    done = subprocess.run(
        ["git", *arguments], cwd=folder, env={**os.environ, **identity}, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()
