"""`launch` as a user meets it: over a fake docker whose containers are the real `smbench run` over a fake worker.

What is asked of docker word for word is in test_containers.py, what the daemon answers in test_dockerd.py.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fake_docker
from small_runs import recipe_text
from smbench import __version__, cli, dockerd, place, resources, runfolder
from smbench.containers import Daemon, Image, NoDaemon
from smbench.plan import Here

DIGEST = "sha256:" + "cd" * 32
KERNELS = Image("smbench:kernels-cpu", "cpu", frozenset({"kernels"}), None, __version__, 1)
VLLM = Image("smbench:vllm-cpu", "cpu", frozenset({"vllm"}), DIGEST, __version__, 2)
CARD = Here("NVIDIA L40S", "sm89", 48 << 30)
TWO_STACKS = b"""
[providers.engine]
title = "of another stack"
color = "#2ca02c"
selection = "library"
stack = "vllm"
requires = ["only_in_the_vllm_image"]
"""


def two_stacks() -> bytes:
    """A recipe whose cells need two stacks."""
    text = recipe_text((100, 200), ("torch", "engine"))
    text = text.replace(
        b"[providers.torch]", b'[providers.torch]\nstack = "kernels"\nrequires = ["only_in_the_kernels_image"]'
    )
    at = text.index(b"\n[profile.cpu]")
    return text[:at] + TWO_STACKS + text[at:]


class Host:
    """`smbench` in this process on a machine without a GPU, with a fake docker that has these images."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self._patch = patch
        self._capture = capture
        self._journal = folder / "journal"
        stacks = folder / "stacks"
        for image, module in (
            ("smbench-kernels-cpu", "only_in_the_kernels_image"),
            ("smbench-vllm-cpu", "only_in_the_vllm_image"),
        ):
            (stacks / image / module).mkdir(parents=True)
            (stacks / image / module / "__init__.py").touch()
        (folder / "recipes").mkdir()
        (folder / "recipes/small.toml").write_bytes(two_stacks())
        (folder / "bin").mkdir()
        docker = folder / "bin/docker"
        docker.write_text(f'#!/bin/sh\nexec {sys.executable} {fake_docker.__file__} "$@"\n')
        docker.chmod(0o755)
        for name, value in {
            "PATH": f"{docker.parent}:{os.environ['PATH']}",
            "SMBENCH_CACHE": str(folder / "cache"),
            "HF_HOME": str(folder / "hub"),
            "FAKE_DOCKER_JOURNAL": str(self._journal),
            "FAKE_DOCKER_RECIPES": str(folder / "recipes"),
            "FAKE_DOCKER_STACKS": str(stacks),
        }.items():
            patch.setenv(name, value)
        patch.delenv("SMBENCH_DOWNLOAD", raising=False)
        patch.chdir(folder)
        patch.setattr(resources, "recipes_dir", lambda: folder / "recipes")
        self.card(Here())
        self.has(KERNELS, VLLM)

    def card(self, here: Here) -> None:
        self._patch.setattr(place, "here", lambda: here)

    def has(self, *images: Image, nvidia: bool = False) -> None:
        self._patch.setattr(dockerd, "ask", lambda: Daemon(nvidia, False, images))

    def has_no_docker(self, reason: str) -> None:
        self._patch.setattr(dockerd, "ask", lambda: NoDaemon(reason))

    def containers(self) -> list[list[str]]:
        """The command lines so far."""
        return [json.loads(line) for line in self._journal.read_text().splitlines()] if self._journal.exists() else []

    def images(self) -> list[str]:
        """What ran so far."""
        return [command[command.index("--entrypoint") + 2] for command in self.containers()]

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        """(exit code, standard output, standard error)."""
        self._patch.setattr(sys, "argv", ["smbench", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        written = self._capture.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, written.out, written.err

    def statuses(self, folder: str = "runs/small-cpu") -> dict[tuple[str, int], str]:
        """By provider and size."""
        results = runfolder.load(self.folder / folder).results.values()
        return {(r.cell.provider, int(r.cell.axes["hidden_size"])): r.status for r in results}


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Host:
    return Host(tmp_path, monkeypatch, capfd)


def test_a_run_that_spans_stacks_takes_one_container_for_each_over_one_folder(host: Host) -> None:
    code, out, err = host("launch", "small", "--arch", "cpu")
    assert code == 0, err
    # either may be the first, so the newer image is
    assert host.images() == ["smbench:vllm-cpu", "smbench:kernels-cpu"]
    assert set(host.statuses().values()) == {"ok"} and len(host.statuses()) == 4
    assert out.splitlines() == ["4 ok", "report: runs/small-cpu/report.md"]
    assert f"docker: smbench:vllm-cpu, {DIGEST}" in err
    # only the last one packs, and names are never shared
    assert ["--no-pack" in command for command in host.containers()] == [True, False]
    assert len({command[command.index("--name") + 1] for command in host.containers()}) == 2


def test_cells_of_a_stack_without_an_image_wait_for_it(host: Host) -> None:
    host.has(KERNELS)
    code, _, err = host("launch", "small", "--arch", "cpu")
    assert code == 0
    assert host.statuses()["engine", 100] == "skipped" and host.statuses()["torch", 100] == "ok"
    assert "2 cells of stack vllm are skipped: make image ARCH=cpu STACK=vllm, and the same command" in err
    host.has(KERNELS, VLLM)
    assert host("launch", "small", "--arch", "cpu")[0] == 0
    assert host.images() == ["smbench:kernels-cpu", "smbench:vllm-cpu"]
    assert set(host.statuses().values()) == {"ok"}


def test_a_finished_folder_is_measured_no_more(host: Host) -> None:
    host("launch", "small", "--arch", "cpu")
    before = (host.folder / "runs/small-cpu/results.jsonl").read_bytes()
    code, out, _ = host("launch", "small", "--arch", "cpu")
    assert (code, out.splitlines()[0]) == (0, "4 ok")
    assert (host.folder / "runs/small-cpu/results.jsonl").read_bytes() == before


def test_one_stack_can_be_asked_for(host: Host) -> None:
    assert host("launch", "small", "--stack", "vllm")[0] == 0
    assert host.images() == ["smbench:vllm-cpu"]
    assert host.statuses()["engine", 100] == "ok" and host.statuses()["torch", 100] == "skipped"


def test_the_digest_and_the_callers_own_command_reach_the_container(host: Host) -> None:
    host("launch", "small", "--stack", "vllm", "--out", "there", "--price", "2.5")
    (command,) = host.containers()
    assert f"SMBENCH_IMAGE_DIGEST={DIGEST}" in command
    again = "smbench launch small --profile cpu --out there --price 2.5 --stack vllm"
    assert f"SMBENCH_AGAIN={again}" in command
    assert command[command.index("--user") + 1] == f"{os.getuid()}:{os.getgid()}"


def test_the_folders_that_docker_would_make_as_root_are_there_before(host: Host) -> None:
    host("launch", "small", "--stack", "vllm")
    cache = host.folder / "cache/images/cpu"
    assert (cache / "huggingface").is_dir() and (cache / ".cache/smbench/models").is_dir()
    assert (host.folder / "cache/models").is_dir() and (host.folder / "hub").is_dir()


def test_a_measured_failure_does_not_keep_the_next_stack_from_running(host: Host) -> None:
    text = two_stacks().replace(b"[100, 200]", b"[100, 10]")
    (host.folder / "recipes/small.toml").write_bytes(text)
    code, out, _ = host("launch", "small", "--arch", "cpu")
    assert code == 1 and len(host.images()) == 2
    assert "2 ok" in out


@pytest.mark.parametrize(("code", "says"), [("125", "docker cannot start it"), ("137", "the container was killed")])
def test_a_container_that_does_not_come_to_its_end_ends_the_run(
    host: Host, monkeypatch: pytest.MonkeyPatch, code: str, says: str
) -> None:
    monkeypatch.setenv("FAKE_DOCKER_CODE", code)
    ended, out, err = host("launch", "small", "--arch", "cpu")
    assert (ended, out) == (1, "") and says in err and len(host.containers()) == 1


def test_a_container_that_was_stopped_from_outside_ends_the_run_as_it_ended(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_DOCKER_CODE", "0")
    assert host("launch", "small", "--arch", "cpu")[:2] == (0, "")
    assert len(host.containers()) == 1


def test_an_image_of_another_version_is_named(host: Host) -> None:
    host.has(dataclasses.replace(KERNELS, version="0.0.1"))
    _, _, err = host("launch", "small", "--arch", "cpu")
    assert f"smbench:kernels-cpu has smbench 0.0.1, this is {__version__}: make image ARCH=cpu" in err


def test_a_dry_run_shows_the_command_lines_and_starts_nothing(host: Host) -> None:
    code, out, _ = host("launch", "small", "--arch", "cpu", "--dry-run")
    assert code == 0 and len(out.splitlines()) == 2 and not host.containers()
    assert all(line.startswith("docker run --rm --init ") for line in out.splitlines())
    assert not (host.folder / "runs").exists() and not (host.folder / "cache").exists()


def in_place(host: Host, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[list[str], str]:
    """What the process becomes, and what was said before."""
    became: list[list[str]] = []

    def become(program: str, command: list[str]) -> None:
        became.append(command)
        raise SystemExit(0)

    monkeypatch.setattr(os, "execv", become)
    code, _, err = host("launch", *arguments)
    assert code == 0 and len(became) == 1 and not host.containers()
    return became[0], err


def test_the_cpu_profile_runs_in_this_very_python(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    command, err = in_place(host, monkeypatch, "small", "--out", "x", "--price", "1", "--provider", "torch")
    assert command[1:] == [
        *["-m", "smbench", "run", "small", "--profile", "cpu", "--out", "x", "--price", "1", "--provider", "torch"]
    ]
    assert command[0] == sys.executable
    assert err == "in place: the cpu profile needs no image; ARCH=cpu runs it in one\n"


def test_a_profiler_is_for_the_run_to_judge(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    command, _ = in_place(host, monkeypatch, "small", "--trace", "torch")
    assert command[command.index("--trace") + 1] == "torch"


def test_where_there_is_no_docker_a_gpu_run_takes_place_here(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.card(CARD)
    host.has_no_docker("docker is not installed")
    command, err = in_place(host, monkeypatch, "small")
    assert command[command.index("--profile") + 1] == "full"
    assert err == "in place: docker is not installed\n"


def test_a_gpu_run_goes_into_the_image_of_the_cards_arch(host: Host) -> None:
    host.card(CARD)
    image = dataclasses.replace(KERNELS, reference="smbench:kernels-sm89", arch="sm89")
    host.has(dataclasses.replace(image, arch="sm90", reference="smbench:kernels-sm90"), image, nvidia=True)
    _, out, _ = host("launch", "small", "--dry-run")
    assert " --gpus all " in out and " smbench:kernels-sm89 run small --profile full " in out
    assert "/runs/small-l40s," in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ("small", "--arch", "sm98"),
            "unknown ARCH 'sm98'; known: cpu, sm80, sm86, sm89, sm90; did you mean ARCH=sm90?",
        ),
        (("small", "--stack", "vlm"), "did you mean STACK=vllm?"),
        (("small", "--where", "dokcer"), "did you mean WHERE=docker?"),
        (("smal",), "unknown recipe 'smal'; known: small; did you mean 'small'?"),
        (("small", "--arch", "sm89"), "no NVIDIA GPU is visible: take ARCH=cpu"),
        (("small", "--arch", "cpu", "--where", "here", "--stack", "vllm"), "leave one of the two out"),
    ],
)
def test_bad_input_is_one_line_with_its_fix(host: Host, arguments: tuple[str, ...], says: str) -> None:
    code, out, err = host("launch", *arguments)
    assert (code, out) == (2, "") and says in err
    assert err.startswith("error: ") and len(err.splitlines()) == 1


def test_a_folder_that_cannot_be_written_is_named_before_anything_starts(host: Host) -> None:
    (host.folder / "runs").touch()
    code, _, err = host("launch", "small", "--arch", "cpu")
    assert code == 2 and "choose another folder with OUT=" in err and not host.containers()


def test_sigterm_reaches_the_container_and_the_same_command_goes_on(host: Host) -> None:
    """A whole process, since signals are about processes."""
    program = (
        "import sys; from pathlib import Path; from smbench import cli, containers, dockerd, place, plan, resources;"
        "resources.recipes_dir = lambda: Path('recipes'); place.here = plan.Here;"
        "image = lambda s: containers.Image(f'smbench:{s}-cpu', 'cpu', frozenset({s}), None, None);"
        "dockerd.ask = lambda: containers.Daemon(False, False, [image('kernels'), image('vllm')]); cli.main()"
    )
    command = [sys.executable, "-c", program, "launch", "small", "--arch", "cpu"]
    slow = os.environ | {"FAKE_WORKER_DELAY_S": "30"}
    with subprocess.Popen(command, env=slow, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        results = host.folder / "runs/small-cpu/logs"
        for _ in range(200):
            if list(results.glob("*.request.json")):
                break
            time.sleep(0.1)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (0, ""), err
    assert err.count("stopped; every finished cell is kept; the same command goes on: smbench launch small") == 1
    assert time.monotonic() - began < 10
    assert subprocess.run(command, capture_output=True, check=False, timeout=60).returncode == 0
    assert set(host.statuses().values()) == {"ok"}
