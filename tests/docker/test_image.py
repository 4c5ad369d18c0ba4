"""A built cpu image, run as a user would. .ci/docker builds two of the same sources and names them here."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import IO

import pytest

ROOT = Path(__file__).resolve().parents[2]
IMAGE = os.environ.get("SMBENCH_IMAGE", "")
AGAIN = os.environ.get("SMBENCH_IMAGE_AGAIN", "")
SECRET = os.environ.get("SMBENCH_IMAGE_SECRET", "")
DOCKER = os.environ.get("DOCKER") or "docker"
OFFLINE = ("run", "--rm", "--network", "none")
RESULTS = "/workspace/runs"
CHUNK_BYTES = 1 << 20
GZIP = b"\x1f\x8b"
LOCKS = (("kernels", "kernels-cpu.txt"), ("smbench", "smbench.txt"))
DOCKERS_OWN = ("/etc/hostname", "/etc/hosts", "/etc/resolv.conf")

pytestmark = [
    pytest.mark.docker,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not IMAGE, reason="SMBENCH_IMAGE names no image; .ci/docker builds one and runs these tests"),
]


def docker(*arguments: str, content: bytes | None = None) -> str:
    done = subprocess.run([DOCKER, *arguments], input=content, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def inside(program: str, *options: str, image: str = IMAGE) -> str:
    """What a shell in the image prints: any start command works, not only `smbench`."""
    return docker(*OFFLINE, *options, "--entrypoint", "sh", image, "-c", program)


def own(folder: Path, user: int) -> None:
    for path in (folder, *folder.rglob("*")):
        os.chown(path, user, user)


def owners(folder: Path) -> set[tuple[int, int]]:
    return {(found.st_uid, found.st_gid) for path in folder.rglob("*") if (found := path.stat())}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results folder of the LoRA recipe's cpu profile, run by the image's own user."""
    folder = tmp_path_factory.mktemp("runs")
    own(folder, 1000)
    docker(*OFFLINE, "--volume", f"{folder}:{RESULTS}", IMAGE, "run", "lora", "--profile", "cpu")
    return folder


def test_smoke_is_fine_with_the_image() -> None:
    said = docker(*OFFLINE, "--entrypoint", "python3", IMAGE, "/opt/smbench/smoke.py").splitlines()
    assert said[0] == "kernels: triton 3.7.1, torch 2.13.0+cpu"
    assert said[-1] == "image kernels for cpu: fine"


def test_the_report_is_on_the_host_and_the_users_own(runs: Path) -> None:
    assert (runs / "lora-cpu" / "report.md").stat().st_size > 1000
    assert owners(runs) == {(1000, 1000)}


def test_every_result_says_which_image_it_is_of(runs: Path) -> None:
    facts = json.loads(inside("cat /etc/smbench/image.json"))
    records = [json.loads(line) for line in (runs / "lora-cpu" / "results.jsonl").read_text().splitlines()]
    (environment,) = [record["environment"] for record in records if record["record"] == "environment"]
    assert environment["image"].items() >= facts.items()
    assert facts["sbom_sha256"] == hashlib.sha256(inside("cat /etc/smbench/sbom.json").encode()).hexdigest()
    locks = {name: hashlib.sha256((ROOT / "docker" / "locks" / file).read_bytes()).hexdigest() for name, file in LOCKS}
    assert facts["locks"] == locks


def test_a_user_without_a_name_in_the_image_can_work_on_a_folder_of_their_own(runs: Path, tmp_path: Path) -> None:
    """As `docker run --user "$(id -u):$(id -g)"` has it: plotting wants a home, kernels a place to be compiled in."""
    folder = tmp_path / "runs"
    shutil.copytree(runs, folder)
    (folder / "lora-cpu" / "report.md").unlink()
    own(folder, 4242)
    program = f"smbench report {RESULTS}/lora-cpu && touch $HOME/x $TRITON_CACHE_DIR.probe /workspace/x && id -u"
    said = inside(program, "--user", "4242:4242", "--volume", f"{folder}:{RESULTS}")
    assert said.splitlines()[-1] == "4242"
    assert (folder / "lora-cpu" / "report.md").stat().st_uid == 4242


def test_the_image_holds_what_it_needs_and_cannot_be_changed_by_its_user() -> None:
    said = inside(
        "id -u; for name in cc c++ python smbench; do command -v $name; done; "
        "find /opt/smbench /etc/smbench -writable ! -type l | head; "
        "/opt/smbench/stacks/kernels/bin/python -c 'import smbench.worker, smbench_kernels, torch'; echo end"
    )
    user, *commands, end = said.splitlines()
    assert (user, end) == ("1000", "end")
    assert commands == ["/usr/bin/cc", "/usr/bin/c++", "/opt/smbench/venv/bin/python", "/opt/smbench/venv/bin/smbench"]


def test_labels_name_the_image_for_registries() -> None:
    labels = json.loads(docker("image", "inspect", "--format", "{{json .Config.Labels}}", IMAGE))
    facts = json.loads(inside("cat /etc/smbench/image.json"))
    assert labels["org.opencontainers.image.revision"] == facts["commit"]
    assert labels["org.opencontainers.image.created"] == facts["created"]
    assert (labels["smbench.arch"], labels["smbench.stacks"]) == ("cpu", "kernels")


def files(image: str) -> dict[str, str]:
    """Hash by path of everything in an image but what docker itself lays into a container."""
    program = (ROOT / "docker" / "build" / "file_hashes.py").read_bytes()
    listed = docker(
        *OFFLINE,
        *("--interactive", "--user", "0", "--entrypoint", "sh", image, "-c"),
        "cat > /tmp/list.py && for root in bin etc lib lib64 opt root sbin usr var workspace cache; do "
        'python3 /tmp/list.py /$root/ /tmp/list && sed "s|  |  /$root/|" /tmp/list; done',
        content=program,
    )
    rows = [line.split("  ", 1) for line in listed.splitlines() if line]
    return {path: digest for digest, path in rows if path not in DOCKERS_OWN}


def test_two_builds_of_the_same_sources_have_the_same_files() -> None:
    first, second = files(IMAGE), files(AGAIN)
    assert len(first) > 10_000
    differing = sorted(path for path in first.keys() | second.keys() if first.get(path) != second.get(path))
    assert differing == []


def holds(stream: IO[bytes], secret: bytes) -> bool:
    """Whether a stream has these bytes, even across the border of two chunks."""
    tail = b""
    while chunk := stream.read(CHUNK_BYTES):
        if secret in tail + chunk:
            return True
        tail = chunk[-len(secret) :]
    return False


def test_the_builds_secrets_are_in_no_layer_and_in_no_history() -> None:
    """pip's configuration and the certificates of .ci/docker carry a word that can come from nowhere else."""
    assert SECRET
    assert SECRET not in docker("image", "history", "--no-trunc", IMAGE) + docker("image", "inspect", IMAGE)
    with subprocess.Popen([DOCKER, "image", "save", IMAGE], stdout=subprocess.PIPE) as saving:
        assert saving.stdout is not None
        with tarfile.open(fileobj=saving.stdout, mode="r|") as archive:
            looked_at = 0
            for member in archive:
                file = archive.extractfile(member) if member.isfile() else None
                if file is None:
                    continue
                looked_at += member.size
                head = file.read(2) if member.size else b""
                # this would be blind to compressed layers, which no daemon saves yet
                assert head != GZIP, member.name
                assert not holds(file, SECRET.encode()), member.name
    assert looked_at > 100_000_000
