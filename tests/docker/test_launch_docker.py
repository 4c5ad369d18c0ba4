"""`make run` and `make push` on a real daemon: our image as the caller's user, as a pod, evicted, pushed, pulled back.

What needs an image of ours is skipped where there is none; `make image ARCH=cpu STACK=kernels` makes it.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from importlib import import_module, util
from pathlib import Path
from typing import Any

import pytest

from smbench import containers, dockerd, place, runfolder
from smbench.containers import Daemon, Image

pytestmark = [pytest.mark.docker, pytest.mark.timeout(600)]

UID = os.getuid() or 1234
"""Who the files belong to; a caller who is root stands for one who is not."""


def docker(*arguments: str, limit_s: float = 300) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False, timeout=limit_s)


def smbench(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environ = os.environ | {"SMBENCH_CACHE": str(folder / "cache"), "HF_HOME": str(folder / "hub")}
    command = [sys.executable, "-m", "smbench", *arguments]
    return subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture(scope="module")
def image() -> Image:
    """Our image for machines without a GPU."""
    found = dockerd.ask()
    assert isinstance(found, Daemon)
    ours = containers.next_image(containers.asked_for(found.images, "cpu", None), {"kernels"}, (), None)
    return ours or pytest.skip("docker: no image of kernels for cpu; make image ARCH=cpu STACK=kernels")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of UID's own."""
    runs = tmp_path / "runs"
    runs.mkdir()
    if os.getuid() == 0:
        os.chown(runs, UID, UID)
    return runs


def test_a_run_in_the_image_is_the_callers_own(image: Image, folder: Path) -> None:
    cache = folder.parent / "cache"
    for made in (folder / "lora", cache, cache / "huggingface", cache / ".cache/smbench/models"):
        made.mkdir(parents=True)
        os.chown(made, UID, UID)
    task = containers.Task(
        recipe="lora",
        profile="cpu",
        folder=folder / "lora",
        caches={cache: containers.CACHE},
        user=f"{UID}:{UID}",
        rootless=False,
        gpu=False,
        again="the callers own command",
        name=containers.container_name(f"test-{os.getpid()}"),
        providers=["torch"],
    )
    done = docker(*containers.command_line(image, task, last=True)[1:])
    assert done.returncode == 0, done.stderr
    run = runfolder.load(folder / "lora")
    assert {result.status for result in run.results.values()} == {"ok"}
    written = list((folder / "lora").rglob("*"))
    assert {path.stat().st_uid for path in written} == {UID}
    assert {"report.md", "report.html"} <= {path.name for path in written} and list(folder.glob("lora/*.tar.gz"))
    (here,) = run.environments
    assert here.environment["image"]["arch"] == "cpu"
    assert here.environment["image"]["digest"] == image.digest


def test_launch_takes_the_image_that_is_asked_for(image: Image, tmp_path: Path) -> None:
    done = smbench(tmp_path, "launch", "lora", "--arch", "cpu", "--provider", "torch", "--out", "here")
    assert done.returncode == 0, done.stderr
    assert f"docker: {image.reference}" in done.stderr
    assert done.stdout.splitlines()[1] == "report: here/report.md"
    assert {path.stat().st_uid for path in (tmp_path / "here").rglob("*")} == {os.getuid()}


@pytest.mark.parametrize("started", [("run", "lora"), ("bash",)], ids=["entrypoint", "any start command"])
def test_a_pod_that_is_evicted_flushes_and_ends_with_zero(image: Image, folder: Path, started: tuple[str, ...]) -> None:
    """As the first process of a container, with nobody before it to pass a signal on, in the 10 s of `docker stop`."""
    name = f"smbench-test-{os.getpid()}-{started[0]}"
    shell = ["--entrypoint", "bash"] if started == ("bash",) else []
    command = ["-c", "echo started; exec smbench run lora"] if shell else list(started)
    mount = f"type=bind,source={folder},target=/workspace"
    begun = docker(
        "run", "-d", "--name", name, "--user", f"{UID}:{UID}", "--mount", mount, *shell, image.reference, *command
    )
    assert begun.returncode == 0, begun.stderr
    try:
        results = folder / "runs/lora-cpu/results.jsonl"
        for _ in range(300):
            if results.exists() and '"status":"ok"' in results.read_text():
                break
            time.sleep(0.2)
        docker("stop", name)
        code = docker("inspect", name, "--format", "{{.State.ExitCode}}").stdout.strip()
        said = docker("logs", name).stderr
    finally:
        docker("rm", "--force", name)
    assert code == "0", said
    assert "stopped; every finished cell is kept; the same command goes on: smbench run lora --profile cpu" in said
    run = runfolder.load(results.parent)
    assert run.warnings == [] and run.sessions[-1].ended == "interrupted"


def test_a_results_folder_that_cannot_be_written_is_one_line(image: Image, folder: Path) -> None:
    mount = f"type=bind,source={folder},target=/workspace"
    run = ("run", "lora", "--out", "/workspace/x")
    for user, readonly, says in ((UID, ",readonly", "mounted read-only"), (UID + 1, "", f"it belongs to uid {UID}")):
        done = docker("run", "--rm", "--user", f"{user}:{user}", "--mount", mount + readonly, image.reference, *run)
        assert done.returncode == 2
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and says in errors[0] and "OUT=" in errors[0]


def test_the_doctor_of_a_pod_knows_its_image(image: Image) -> None:
    digest = "sha256:" + "5c" * 32
    done = docker("run", "--rm", "--env", f"{place.DIGEST}={digest}", image.reference, "doctor")
    found = {line.split()[0]: line for line in done.stdout.splitlines() if line}
    assert "kernels for cpu" in found["image"] and digest in found["digest"]
    assert {"stack", "memlock", "shm", "results"} <= set(found)


@pytest.fixture
def tiny() -> Iterator[tuple[Any, str]]:
    """(client, tag) of an image of one small file that says it is ours."""
    client = import_module("docker").from_env()
    tag = f"smbench-test.invalid/smbench:{os.getpid()}"
    dockerfile = b"FROM scratch\nCOPY file /file\nLABEL smbench.arch=sm80 smbench.stacks=lmdeploy\nUSER 1000:1000\n"
    context = io.BytesIO()
    with tarfile.open(fileobj=context, mode="w") as archive:
        for name, content in (("Dockerfile", dockerfile), ("file", os.urandom(64))):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    context.seek(0)
    client.images.build(fileobj=context, custom_context=True, tag=tag, rm=True)
    yield client, tag
    for entry in client.images.list(filters={"label": "smbench.stacks=lmdeploy"}):
        names = [*entry.tags, *entry.attrs["RepoDigests"]]
        if all(name.startswith(("127.0.0.1:", "smbench-test.invalid/")) for name in names):
            client.api.remove_image(entry.id, force=True)
    client.close()


def test_what_is_pushed_is_what_its_digest_gives_back(tiny: tuple[Any, str], tmp_path: Path) -> None:
    spec = util.spec_from_file_location("registry", Path(__file__).with_name("registry.py"))
    assert spec is not None and spec.loader is not None
    registries = util.module_from_spec(spec)
    spec.loader.exec_module(registries)
    client, tag = tiny
    with registries.running() as registry:
        for as_root, user in ((False, "1000:1000"), (True, "0:0")):
            options = ["--registry", registry.name, "--arch", "sm80", "--stack", "lmdeploy"]
            done = smbench(tmp_path, "push", *options, *(["--as-root"] if as_root else []))
            assert done.returncode == 0, done.stderr
            pushed, by_digest, variable = (line.strip() for line in done.stdout.splitlines())
            digest = variable.removeprefix(f"variable  {place.DIGEST}=")
            # the registry's own answer, not docker's word
            assert registries.digest_of(registry.manifests[pushed.rpartition(":")[2]][1]) == digest
            reference = by_digest.removeprefix("image").strip()
            assert reference == f"{registry.name}/smbench@{digest}"
            if not as_root:
                daemon = dockerd.ask()
                assert isinstance(daemon, Daemon)
                assert [i.digest for i in daemon.images if tag == i.reference or digest == i.digest] == [digest]
            client.api.pull(reference)
            assert client.images.get(reference).attrs["Config"]["User"] == user
            assert client.images.get(reference).labels["smbench.arch"] == "sm80"
