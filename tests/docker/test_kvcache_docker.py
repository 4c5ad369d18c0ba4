"""The images with TensorRT-LLM, built by a real daemon from stand-in repositories: all but NVIDIA's own parts."""

from __future__ import annotations

import ensurepip
import json
import os
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvcache_mirrors
from kvcache_mirrors import Mirrors
from smbench.kvcache import __main__ as command
from smbench.kvcache.needs import Machine

BASE = os.environ.get("SMBENCH_IMAGE", "")
DOCKER = os.environ.get("DOCKER") or "docker"
DIGEST = "sha256:" + "0123456789abcdef" * 4
TAG = "smbench:kvcache-sm89"

pytestmark = [
    pytest.mark.docker,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not BASE, reason="SMBENCH_IMAGE names no image to stand in for NVIDIA's; .ci/docker does"),
]


def docker(*arguments: str) -> str:
    done = subprocess.run([DOCKER, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def inside(program: str) -> str:
    return docker("run", "--rm", "--network", "none", "--entrypoint", "sh", TAG, "-c", program).strip()


@pytest.fixture(scope="module")
def mirrors(tmp_path_factory: pytest.TempPathFactory) -> Mirrors:
    """The base of the fork is an image of ours with a pip, which NVIDIA's images have."""
    (wheel,) = (Path(ensurepip.__file__).parent / "_bundled").glob("pip-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        pip = {f"python/{name}": archive.read(name).decode("utf-8") for name in archive.namelist() if _is_text(name)}
    return kvcache_mirrors.make(tmp_path_factory.mktemp("mirrors"), BASE, pip)


def _is_text(name: str) -> bool:
    return not name.endswith((".exe", "/"))


@pytest.fixture(scope="module")
def image(mirrors: Mirrors, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mirrors]:
    """`make kvcache-image ARCH=sm89` with SOURCE_DIR=, on a machine that is said to be large."""
    tag = f"sm89-{mirrors.fork[:12]}"
    names = (TAG, f"smbench-trtllm-kvcache/inference:{tag}", f"smbench-trtllm-kvcache/release:{tag}")
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(command, "BUILD", tmp_path_factory.mktemp("build"))
            patch.setattr(command, "_machine", lambda *_: Machine(2, 512 * 10**9, 10**12))
            patch.setenv("DOCKER", DOCKER)
            status = command.main(
                [
                    *("kvcache", "--arch", "sm89", "--max-jobs", "2"),
                    *("--source-dir", str(mirrors.folder), "--base-digest", DIGEST),
                    *("--tensorrt-llm-commit", mirrors.fork, "--recsys-examples-commit", mirrors.examples),
                ]
            )
        assert status == 0
        yield mirrors
    finally:
        subprocess.run([DOCKER, "image", "rm", *names], capture_output=True, check=False)


def test_each_stage_was_told_what_it_builds(image: Mirrors) -> None:
    told = f"{kvcache_mirrors.BASE_TAG}@{DIGEST} --clean --cuda_architectures 89-real -j 2"
    assert inside("cat /told-release").splitlines() == [told]
    assert inside("cat /told-inference") == "INFERENCEBUILD=1"
    assert inside("cat /3rdparty/cutlass/include/cutlass.h") == "// a submodule"


def test_the_image_says_what_it_is_of(image: Mirrors) -> None:
    facts = json.loads(inside("cat /etc/smbench/image.json"))
    assert (facts["name"], facts["arch"], facts["stacks"], facts["base"]) == ("kvcache", "sm89", ["trtllm"], DIGEST)
    assert facts["sources"].split() == [
        f"geoffreyQiu/TensorRT-LLM@{image.fork}",
        f"NVIDIA/recsys-examples@{image.examples}",
    ]
    labels = json.loads(docker("image", "inspect", "--format", "{{json .Config.Labels}}", TAG))
    assert (labels["smbench.arch"], labels["smbench.stacks"]) == ("sm89", "trtllm")


def test_command_and_worker_are_there_for_the_fixed_user(image: Mirrors) -> None:
    assert inside("id -u") == "1000"
    assert "lora" in docker("run", "--rm", "--network", "none", TAG, "list")
    modules = "smbench.worker, smbench_kernels, tensorrt_llm, numpy, psutil, pynvml"
    assert inside(f"/opt/smbench/stacks/trtllm/bin/python -c 'import {modules}; print(1)'") == "1"
    assert inside("touch /workspace/x /cache/y && echo fine") == "fine"


def test_a_base_without_tensorrt_llm_is_refused(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "BUILD", tmp_path)
        patch.setenv("DOCKER", DOCKER)
        assert command.main(["trtllm", "--arch", "sm89", "--base-image", BASE]) == 1
    assert "the base image has no tensorrt_llm" in "".join(capfd.readouterr())
