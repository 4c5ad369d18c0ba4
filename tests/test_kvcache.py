"""The build of TensorRT-LLM: what is refused before it begins, and what is run, over small stand-in repositories."""

from __future__ import annotations

import json
import shlex
import shutil
import tomllib
from pathlib import Path

import pytest

import kvcache_mirrors
from kvcache_mirrors import Mirrors
from smbench.arch import load as load_archs
from smbench.errors import CorruptError, UsageError
from smbench.kvcache import __main__ as command
from smbench.kvcache import layer, needs, table
from smbench.kvcache.needs import Machine
from smbench.resources import REPOSITORY

DIGEST = "sha256:" + "0123456789abcdef" * 4
RELEASE = f"nvcr.io/nvidia/tensorrt-llm/release@{DIGEST}"
LARGE = Machine(cores=64, memory_bytes=512 * 10**9, disk_free_bytes=10**12)
TABLE = table.load(REPOSITORY / "docker" / "kvcache.toml")
NEEDS = TABLE.needs

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")


@pytest.fixture(scope="module")
def mirrors(tmp_path_factory: pytest.TempPathFactory) -> Mirrors:
    return kvcache_mirrors.make(tmp_path_factory.mktemp("mirrors"))


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A docker that writes down how it is called, a large machine, and a build folder of the test's own."""
    log = tmp_path / "docker.jsonl"
    program = tmp_path / "docker"
    program.write_text(
        "#!/usr/bin/env python3\n"
        "import json, sys\n"
        f"open({str(log)!r}, 'a').write(json.dumps(sys.argv[1:]) + '\\n')\n"
        "print('/nowhere' if sys.argv[1] == 'info' else 'sha256:' + 'f' * 64)\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(command, "BUILD", tmp_path / "build")
    monkeypatch.setattr(command, "_machine", lambda *_: LARGE)
    monkeypatch.setenv("DOCKER", str(program))
    return log


def kvcache(mirrors: Mirrors, *more: str) -> int:
    given = {
        "--arch": "sm89",
        "--source-dir": str(mirrors.folder),
        "--base-digest": DIGEST,
        "--tensorrt-llm-commit": mirrors.fork,
        "--recsys-examples-commit": mirrors.examples,
    }
    given.update(dict(zip(more[::2], more[1::2], strict=True)))
    flags = ["--dry-run"] if given.pop("--dry-run", "") else []
    return command.main(["kvcache", *flags, *(word for pair in given.items() for word in pair)])


def builds(log: Path) -> list[list[str]]:
    called = [json.loads(line) for line in log.read_text().splitlines()]
    return [words for words in called if words[0] == "build"]


def test_the_whole_build_runs_over_mirrors_alone(mirrors: Mirrors, docker: Path, tmp_path: Path) -> None:
    """git and the fork's own Makefile run for real, with addresses of the real host; only docker is a stand-in."""
    assert kvcache(mirrors, "--max-jobs", "7") == 0
    fork = tmp_path / "build" / "kvcache" / "sm89" / "tensorrt-llm"
    assert kvcache_mirrors.git(fork, "rev-parse", "HEAD") == mirrors.fork
    # the submodule's address is of a host that was never asked
    assert (fork / "3rdparty" / "cutlass" / "include" / "cutlass.h").is_file()
    release, inference, ours = builds(docker)
    tag = f"sm89-{mirrors.fork[:12]}"
    assert f"smbench-trtllm-kvcache/release:{tag}" in release
    assert "BUILD_WHEEL_ARGS=--clean --cuda_architectures 89-real -j 7" in release
    assert f"BASE_TAG={kvcache_mirrors.BASE_TAG}@{DIGEST}" in release
    assert {f"BASE_IMAGE=smbench-trtllm-kvcache/release:{tag}", "INFERENCEBUILD=1", "MAX_JOBS=7"} <= set(inference)
    assert f"BASE_IMAGE=smbench-trtllm-kvcache/inference:{tag}" in ours
    assert f"SOURCES=geoffreyQiu/TensorRT-LLM@{mirrors.fork} NVIDIA/recsys-examples@{mirrors.examples}" in ours
    assert "smbench:kvcache-sm89" in ours
    context = tmp_path / "build" / "images" / "kvcache-sm89"
    assert 'smbench.arch="sm89"' in (context / "Dockerfile").read_text()
    assert len(list((context / "dist").glob("smbench-*.whl"))) == 1


def test_a_dry_run_prints_every_command_and_runs_none(
    mirrors: Mirrors, docker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert kvcache(mirrors, "--dry-run", "yes", "--max-jobs", "3") == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("memory: about 21 GB with 3 compilers; there are 512")
    commands = [shlex.split(line) for line in said if not line.startswith(("#", "memory:", "disk:", "time:"))]
    programs = [next(word for word in words if "=" not in word) for words in commands]
    assert [Path(program).name for program in programs] == ["git"] * 7 + ["make", "docker", "docker"]
    (make,) = [words for words in commands if "make" in words]
    assert f"BASE_TAG={kvcache_mirrors.BASE_TAG}@{DIGEST}" in make
    assert "BUILD_WHEEL_OPTS=-j 3" in make
    assert not docker.exists() and not (tmp_path / "build").exists()


@pytest.mark.parametrize("arch", ["sm80", "sm86", "sm89", "sm90"])
def test_each_arch_is_built_for_itself(
    arch: str, mirrors: Mirrors, docker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert kvcache(mirrors, "--dry-run", "yes", "--arch", arch) == 0
    assert f"CUDA_ARCHS={arch.removeprefix('sm')}-real" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--arch", ""), "ARCH: is missing; one of sm80"),
        (("--arch", "sm12"), "ARCH: unknown arch 'sm12'; one of sm80"),
        (("--arch", "cpu"), "ARCH: cpu has no GPU"),
        (("--base-digest", ""), "BASE_DIGEST is missing"),
        (("--base-digest", "25.03-py3"), "BASE_DIGEST is missing or no digest"),
        (("--source-dir", "/nowhere/at/all"), "SOURCE_DIR: /nowhere/at/all is not a folder"),
        (("--tensorrt-llm-commit", ""), "TENSORRT_LLM_COMMIT is missing"),
        (("--tensorrt-llm-commit", "hstu-kvcache"), "'hstu-kvcache' is not a commit's hash"),
        (("--tensorrt-llm-commit", "0" * 40), f"has no commit {'0' * 40}"),
        (("--max-jobs", "65"), "MAX_JOBS: '65' is not from 1 to 64"),
        (("--max-jobs", "0"), "MAX_JOBS: '0' is not from 1 to 64"),
        (("--max-jobs", "many"), "MAX_JOBS: 'many'"),
    ],
)
def test_what_cannot_end_well_does_not_begin(
    given: tuple[str, str], message: str, mirrors: Mirrors, docker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert kvcache(mirrors, *given) == 2
    assert message in capsys.readouterr().err
    assert not docker.exists() or not builds(docker)


def test_a_vanished_source_is_named_before_the_long_build(
    mirrors: Mirrors, docker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "mirrors"
    shutil.copytree(mirrors.folder, folder)
    shutil.rmtree(folder / kvcache_mirrors.EXAMPLES)
    assert kvcache(mirrors, "--source-dir", str(folder)) == 2
    error = capsys.readouterr().err
    assert f"git clone --mirror https://github.com/{kvcache_mirrors.EXAMPLES}" in error
    # and a submodule's, which only the checkout tells of
    shutil.copytree(mirrors.folder / kvcache_mirrors.EXAMPLES, folder / kvcache_mirrors.EXAMPLES)
    shutil.rmtree(folder / kvcache_mirrors.SUBMODULE)
    assert kvcache(mirrors, "--source-dir", str(folder)) == 1
    assert "submodules of tensorrt-llm failed" in capsys.readouterr().err
    assert not builds(docker)


def test_a_commit_that_is_built_otherwise_is_refused(
    tmp_path: Path, docker: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """recsys-examples went on without TensorRT-LLM: its Dockerfile of today would build something else."""
    monkeypatch.setattr(kvcache_mirrors, "INFERENCE", "ARG BASE_IMAGE\nFROM ${BASE_IMAGE}\n")
    later = kvcache_mirrors.make(tmp_path / "later")
    assert kvcache(later) == 2
    assert "docker/Dockerfile" in (error := capsys.readouterr().err) and "does not know INFERENCEBUILD" in error
    assert not builds(docker)


def test_memory_and_disk_are_said_and_looked_at_first() -> None:
    assert needs.jobs(LARGE, NEEDS, "") == 64
    # 24 GB carry three compilers beside the system
    small = Machine(cores=16, memory_bytes=24 * 10**9, disk_free_bytes=50 * 10**9)
    assert needs.jobs(small, NEEDS, "") == 3
    with pytest.raises(
        UsageError, match="MAX_JOBS: 8 compilers need about 43 GB of memory, and there are 24: MAX_JOBS=3"
    ):
        needs.jobs(small, NEEDS, "8")
    (disk,) = needs.shortages(small, NEEDS, 3)
    assert "50 GB are free" in disk and "120 are needed" in disk
    tiny = Machine(cores=2, memory_bytes=4 * 10**9, disk_free_bytes=10**12)
    (memory,) = needs.shortages(tiny, NEEDS, needs.jobs(tiny, NEEDS, ""))
    assert "4 GB are too little" in memory
    assert needs.shortages(LARGE, NEEDS, 64) == []


def test_a_small_machine_is_refused_unless_forced(
    mirrors: Mirrors, docker: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "_machine", lambda *_: Machine(4, 25 * 10**9, 10 * 10**9))
    assert kvcache(mirrors) == 2
    assert "10 GB are free where docker keeps images" in capsys.readouterr().err
    assert not docker.exists() or not builds(docker)
    # a dry run is for another machine as well
    assert kvcache(mirrors, "--dry-run", "yes") == 0
    assert "would be refused: disk: 10 GB are free" in capsys.readouterr().out


def test_the_release_image_is_named_by_digest(docker: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["trtllm", "--arch", "sm89"]) == 2
    assert "nvcr.io/nvidia/tensorrt-llm/release@sha256:…" in capsys.readouterr().err
    assert command.main(["trtllm", "--arch", "sm89", "--base-image", "nvcr.io/x@sha256:12"]) == 2
    assert command.main(["trtllm", "--arch", "sm90", "--base-image", RELEASE]) == 0
    (ours,) = builds(docker)
    assert {f"BASE_IMAGE={RELEASE}", f"BASE_ID={DIGEST}", "smbench:trtllm-sm90"} <= set(ours)
    assert not any("SOURCES" in word for word in ours)


def test_the_template_renders_for_every_arch_and_image() -> None:
    for name, arch in load_archs(REPOSITORY / "docker" / "archs.toml").arch.items():
        for image in layer.TITLES:
            text = layer.render(REPOSITORY / "docker", arch, image)
            assert f"--arch {name} --image {image}" in text
            assert "{{" not in text and text.rstrip().endswith('CMD ["--help"]')


def test_the_table_is_read_strictly(tmp_path: Path) -> None:
    text = (REPOSITORY / "docker" / "kvcache.toml").read_text()
    assert set(tomllib.loads(text)["source"]) == {"tensorrt-llm", "recsys-examples"}
    file = tmp_path / "kvcache.toml"
    file.write_text(text + "\nspeed = 1\n")
    with pytest.raises(UsageError, match="speed"):
        table.load(file)
    file.write_text(text.replace("format = 1", "format = 2"))
    with pytest.raises(CorruptError, match="update smbench"):
        table.load(file)
    with pytest.raises(UsageError, match="checkout"):
        table.load(tmp_path / "absent.toml")
