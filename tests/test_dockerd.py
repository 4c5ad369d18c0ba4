"""What the docker daemon is asked, and what is made of its answers: the real SDK over a fake daemon on a socket."""

from __future__ import annotations

import gc
import json
import os
import shutil
import socket
import sys
import threading
import warnings
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingUnixStreamServer
from typing import Any

import pytest

from smbench import cli, dockerd
from smbench.containers import Daemon, Image, NoDaemon

DIGEST = "sha256:" + "cd" * 32


class FakeDaemon(ThreadingUnixStreamServer):
    """Docker's API on a socket: what `ask` and `push` use of it."""

    daemon_threads = True

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), _Api)
        self.info: dict[str, Any] = {"Runtimes": {"runc": {}}, "SecurityOptions": ["name=seccomp,profile=default"]}
        self.images: list[dict[str, Any]] = []
        self.pushed: list[dict[str, Any]] = []
        self.asked: list[str] = []

    def handle_error(self, *_: object) -> None:
        """A client that leaves in the middle, as one does after a refusal, is no error of a daemon."""


class _Api(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeDaemon

    def address_string(self) -> str:
        return "socket"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        if self.path.endswith("/version"):
            self._say({"ApiVersion": "1.41", "MinAPIVersion": "1.12", "Version": "20.10.24"})
        elif self.path.endswith("/info"):
            self._say(self.server.info)
        else:
            self._say(self.server.images)

    def do_POST(self) -> None:
        self.server.asked.append(self.path)
        if "/push" not in self.path:
            self._say({}, 201)
            return
        # a stream of documents, by which the SDK tells it from an error
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for line in (*(json.dumps(document).encode() + b"\r\n" for document in self.server.pushed), b""):
            self.wfile.write(f"{len(line):x}\r\n".encode() + line + b"\r\n")

    def _say(self, document: Any, code: int = 200) -> None:
        body = json.dumps(document).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A `docker` that is there and is not asked."""
    docker = tmp_path / "bin/docker"
    docker.parent.mkdir()
    docker.write_text("#!/bin/sh\nexit 1\n")
    docker.chmod(0o755)
    monkeypatch.setenv("PATH", f"{docker.parent}:{os.environ['PATH']}")


@pytest.fixture
def daemon(command: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDaemon]:
    """The real `dockerd` over a fake daemon."""
    # a socket's path has to be short
    path = Path("/tmp") / f"smbench-test-{os.getpid()}.sock"
    monkeypatch.setenv("DOCKER_HOST", f"unix://{path}")
    monkeypatch.setattr(dockerd, "HOOKS", ())
    with FakeDaemon(path) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()
    path.unlink()


def entry(*tags: str, digests: tuple[str, ...] = (), arch: str = "sm89", stacks: str = "vllm") -> dict[str, Any]:
    labels = {"smbench.arch": arch, "smbench.stacks": stacks, "org.opencontainers.image.version": "0.1.0"}
    return {"Id": "sha256:1", "RepoTags": list(tags), "RepoDigests": list(digests), "Labels": labels, "Created": 7}


def test_images_are_found_by_their_labels_under_our_name(daemon: FakeDaemon) -> None:
    daemon.images = [
        entry("ghcr.io/you/smbench:vllm-sm89-0.1.0", "smbench:vllm-sm89", digests=(f"ghcr.io/you/smbench@{DIGEST}",)),
        entry(digests=(f"localhost:5000/smbench@{DIGEST}",), stacks="kernels,vllm"),
        entry("experiment:latest"),
        entry("<none>:<none>"),
    ]
    found = dockerd.ask()
    assert isinstance(found, Daemon)
    assert found.images == [
        Image("smbench:vllm-sm89", "sm89", frozenset({"vllm"}), DIGEST, "0.1.0", 7),
        Image(f"localhost:5000/smbench@{DIGEST}", "sm89", frozenset({"kernels", "vllm"}), DIGEST, "0.1.0", 7),
    ]
    assert any("label" in path for path in daemon.asked), "the daemon is asked for ours alone"


@pytest.mark.parametrize(
    ("info", "nvidia"),
    [
        ({"Runtimes": {"runc": {}}}, False),
        ({"Runtimes": {"runc": {}, "nvidia": {}}}, True),
        ({"Runtimes": {"runc": {}}, "DiscoveredDevices": [{"Source": "cdi", "ID": "nvidia.com/gpu=0"}]}, True),
    ],
)
def test_the_nvidia_runtime_is_seen(daemon: FakeDaemon, info: dict[str, Any], nvidia: bool) -> None:
    daemon.info = info
    assert dockerd.ask() == Daemon(nvidia, False, [])


def test_a_rootless_daemon_is_seen(daemon: FakeDaemon) -> None:
    daemon.info = {"SecurityOptions": ["name=rootless"]}
    assert dockerd.ask() == Daemon(False, True, [])


class Push:
    """`smbench push` in this process."""

    def __init__(self, patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str]) -> None:
        self._patch = patch
        self._capture = capture

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        """(exit code, standard output, standard error)."""
        self._patch.setattr(sys, "argv", ["smbench", "push", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        written = self._capture.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, written.out, written.err


@pytest.fixture
def push(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Push:
    return Push(monkeypatch, capsys)


def test_a_push_ends_with_the_digest_and_how_to_give_it_to_a_pod(daemon: FakeDaemon, push: Push) -> None:
    daemon.images = [entry("smbench:vllm-sm89"), entry("smbench:all-sm89", stacks="kernels,vllm")]
    daemon.pushed = [
        {"status": "The push refers to repository [ghcr.io/you/smbench]"},
        {"status": "Pushed", "id": "5f70bf18a086"},
        {"status": "vllm-sm89-0.1.0: digest: x size: 1"},
        {"progressDetail": {}, "aux": {"Tag": "vllm-sm89-0.1.0", "Digest": DIGEST, "Size": 528}},
    ]
    code, out, err = push("--registry", "ghcr.io/you/", "--stack", "vllm")
    assert code == 0, err
    assert out.splitlines() == [
        "ghcr.io/you/smbench:vllm-sm89-0.1.0",
        f"  image     ghcr.io/you/smbench@{DIGEST}",
        f"  variable  SMBENCH_IMAGE_DIGEST={DIGEST}",
    ]
    assert any("/images/smbench:vllm-sm89/tag?tag=vllm-sm89-0.1.0&repo=ghcr.io" in path for path in daemon.asked)


def test_a_refused_push_says_what_to_do(daemon: FakeDaemon, push: Push) -> None:
    daemon.images = [entry("smbench:vllm-sm89")]
    daemon.pushed = [{"errorDetail": {"message": "denied"}, "error": "denied: requested access is denied"}]
    code, out, err = push("--registry", "ghcr.io/you")
    assert (code, out) == (2, "")
    assert "denied; is it `docker login ghcr.io`?" in err
    for arguments, says in (
        (("--registry", ""), "REGISTRY is missing"),
        (("--registry", "r", "--arch", "sm90"), "no image for sm90 here: make image ARCH=sm90"),
        (("--registry", "r", "--stack", "kernels"), "no image of kernels here: make image ARCH=sm89 STACK=kernels"),
    ):
        code, _, err = push(*arguments)
        assert code == 2 and says in err


def reason_without_daemon(monkeypatch: pytest.MonkeyPatch, path: Path) -> str:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{path}")
    found = dockerd.ask()
    with warnings.catch_warnings():
        # the SDK leaves a socket that could not connect to the collector
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()
    assert isinstance(found, NoDaemon) and "\n" not in found.reason
    return found.reason


def test_a_daemon_that_does_not_run_is_told_from_one_that_refuses(
    command: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path("/tmp") / f"smbench-dead-{os.getpid()}.sock"
    assert "is not running: sudo systemctl start docker" in reason_without_daemon(monkeypatch, path)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
        try:
            assert "is not running" in reason_without_daemon(monkeypatch, path), "bound, and nobody listens"
            path.chmod(0)
            user = os.geteuid()
            if user == 0:
                # root may do anything: ask as somebody
                os.seteuid(65534)
            try:
                refused = reason_without_daemon(monkeypatch, path)
            finally:
                os.seteuid(user)
            assert "sudo usermod -aG docker $USER" in refused
        finally:
            path.unlink()


def test_without_a_docker_command_there_is_no_docker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert dockerd.ask() == NoDaemon("docker is not installed")
