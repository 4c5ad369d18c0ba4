"""Images, short of docker: which there are, their Dockerfiles, locks, secrets, context, command and sizes."""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
import tomllib
import zlib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from smbench.arch import Build, load
from smbench.errors import UsageError
from smbench.images import cli, command, context, dockerfile, secrets, sizes
from smbench.images.target import Target, resolve, targets

ROOT = Path(__file__).resolve().parent.parent
DOCKER = ROOT / "docker"
TABLE = load(DOCKER / "archs.toml")
TARGETS = [target for arch in TABLE.arch.values() for target in targets(TABLE, arch)]
BUILDS = [build for stack in TABLE.stack.values() for build in stack.build.values()]


def lock_rows(file: str) -> list[Requirement]:
    lines = (DOCKER / "locks" / file).read_text(encoding="utf-8").splitlines()
    return [Requirement(line.removesuffix("\\")) for line in lines if "==" in line]


def usage(*arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(arguments) == 2
    return capsys.readouterr().err


# --- which images there are


def test_every_gpu_has_every_stack_and_the_cpu_has_those_that_run_there() -> None:
    names = {arch: [target.name for target in targets(TABLE, row)] for arch, row in TABLE.arch.items()}
    for arch in ("sm80", "sm86", "sm89", "sm90"):
        assert names[arch] == ["kernels", "vllm", "sglang", "lmdeploy", "all"]
    assert names["cpu"] == ["kernels", "vllm", "all"]


def test_all_is_the_default() -> None:
    assert resolve(TABLE, "sm89", None).tag == "smbench:all-sm89"
    assert [row.lock for row in resolve(TABLE, "cpu", None).packages] == ["kernels-cpu.txt", "vllm-cpu.txt"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--arch", "sm88"], "ARCH: unknown arch 'sm88'; known: sm80, sm86, sm89, sm90, cpu; did you mean"),
        ([], "ARCH is missing: make image ARCH=sm89, for instance; known: sm80"),
        (
            ["--arch", "sm90", "--stack", "vlm"],
            "unknown stack 'vlm'; known: kernels, vllm, sglang, lmdeploy, all, trtllm; did",
        ),
        (
            ["--arch", "cpu", "--stack", "sglang"],
            "'sglang' has no packages for cpu; stacks that have some: kernels, vllm",
        ),
        (["--arch", "cpu", "--wheelhouse", "/nowhere"], "WHEELHOUSE: /nowhere is not a folder"),
        (["--arch", "cpu", "--dry-run", "--ca-bundle", "/nowhere"], "CA_BUNDLE: /nowhere is not a file"),
        (["--arch", "cpu", "--dry-run", "--apt-sources", "/nowhere"], "APT_SOURCES: /nowhere is not a file"),
    ],
)
def test_a_mistake_is_one_line_with_the_way_out(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    error = usage("build", *arguments, capsys=capsys)
    assert said in error
    assert error.startswith("smbench: ")
    assert error.count("\n") == 1


def test_no_docker_is_told_with_what_works_without(capsys: pytest.CaptureFixture[str]) -> None:
    said = usage("--docker", "/nowhere/docker", "build", "--arch", "cpu", capsys=capsys)
    assert said.startswith("smbench: no docker on this machine")
    assert "make run RECIPE=" in said


def fake_docker(folder: Path, script: str) -> str:
    client = folder / "docker"
    client.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    client.chmod(0o755)
    return str(client)


def test_no_daemon_is_told_with_the_clients_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    client = fake_docker(tmp_path, "echo 'permission denied' >&2; exit 1")
    said = usage("--docker", client, "build", "--arch", "cpu", capsys=capsys)
    assert said.startswith("smbench: no docker daemon answers (permission denied): start it")


def test_a_base_image_by_a_tag_that_is_not_here_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    client = fake_docker(tmp_path, 'case "$1" in version) echo 20;; *) exit 1;; esac')
    said = usage("--docker", client, "build", "--arch", "cpu", "--base-image", "debian:bookworm", capsys=capsys)
    assert "BASE_IMAGE: debian:bookworm has no digest and is no image on this machine" in said
    assert "debian:bookworm@sha256:…" in said


# --- Dockerfiles


def test_the_committed_dockerfiles_are_what_is_rendered() -> None:
    assert dockerfile.differing(TABLE, DOCKER) == []


def test_a_changed_a_missing_and_a_left_over_dockerfile_are_found_and_mended(tmp_path: Path) -> None:
    (tmp_path / dockerfile.TEMPLATE).write_text((DOCKER / dockerfile.TEMPLATE).read_text("utf-8"), encoding="utf-8")
    dockerfile.write(TABLE, tmp_path)
    (tmp_path / "sm80.Dockerfile").write_text("FROM scratch\n", encoding="utf-8")
    (tmp_path / "sm90.Dockerfile").rename(tmp_path / "sm70.Dockerfile")
    (tmp_path / "mine.Dockerfile").write_text("FROM scratch\n", encoding="utf-8")
    wrong = [path.name for path in dockerfile.differing(TABLE, tmp_path)]
    assert wrong == ["sm80.Dockerfile", "sm90.Dockerfile", "sm70.Dockerfile"]
    dockerfile.write(TABLE, tmp_path)
    assert dockerfile.differing(TABLE, tmp_path) == []
    assert not (tmp_path / "sm70.Dockerfile").exists()
    assert (tmp_path / "mine.Dockerfile").exists()


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.tag)
def test_each_image_is_a_stage_that_runs_as_a_user_and_names_its_arch(target: Target) -> None:
    text = (DOCKER / target.dockerfile).read_text(encoding="utf-8")
    stage = text.partition(f" AS {target.name}\n")[2].partition("\nFROM ")[0]
    assert "USER 1000:1000" in stage
    assert 'ENTRYPOINT ["smbench"]' in stage
    assert f'smbench.arch="{target.arch.name}"' in stage
    for row in target.packages:
        assert f"--lock /locks/{row.lock} " in text


def test_the_default_stage_is_all() -> None:
    for arch in TABLE.arch:
        stages = re.findall(r"^FROM .* AS (\S+)$", (DOCKER / f"{arch}.Dockerfile").read_text("utf-8"), re.MULTILINE)
        assert stages[-1] == "all"
        assert stages[0] == "base"


def test_only_gpus_images_are_stripped_and_each_for_its_own_capability() -> None:
    found = {
        arch: set(re.findall(r"--sm (\d+)", (DOCKER / f"{arch}.Dockerfile").read_text("utf-8"))) for arch in TABLE.arch
    }
    assert found == {"sm80": {"80"}, "sm86": {"86"}, "sm89": {"89"}, "sm90": {"90"}, "cpu": set()}


# --- locks


@pytest.mark.parametrize("row", BUILDS, ids=lambda build: build.lock)
def test_a_lock_satisfies_its_row(row: Build) -> None:
    locked = {found.name: found for found in lock_rows(row.lock)}
    for text in [*row.requires, *TABLE.worker.requires]:
        wanted = Requirement(text)
        assert wanted.name in locked, f"run make locks: {wanted} is not in {row.lock}"
        (pin,) = locked[wanted.name].specifier
        assert pin.version in wanted.specifier
    assert not locked.keys() & set(row.without)
    if "torch" in row.without:
        assert not [name for name in locked if name.startswith("nvidia-c")]
    else:
        assert str(locked["torch"].specifier) == f"=={row.torch}"


@pytest.mark.parametrize("file", sorted((DOCKER / "locks").iterdir()), ids=lambda file: file.name)
def test_a_lock_is_of_versions_and_hashes_alone(file: Path) -> None:
    lines = file.read_text(encoding="utf-8").splitlines()
    assert all(re.match(r"    --hash=sha256:[0-9a-f]{64}( \\)?$|[a-z0-9.-]+==\S+( ; .+)? \\$", line) for line in lines)
    assert "://" not in file.read_text(encoding="utf-8")


def test_there_is_no_lock_that_nothing_reads() -> None:
    read = {lock for target in TARGETS for lock in target.locks}
    assert {file.name for file in (DOCKER / "locks").iterdir()} == read


def test_the_workers_requirements_are_the_projects() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(TABLE.worker.requires) <= set(project["dependencies"])


def test_the_command_line_of_an_image_has_the_versions_of_the_checkouts() -> None:
    ours = {line for line in (ROOT / "requirements.lock").read_text("utf-8").splitlines() if "==" in line}
    pins = {line.split(";")[0].strip(" \\") for line in ours}
    locked = lock_rows("smbench.txt")
    assert {f"{row.name}{row.specifier}" for row in locked} <= pins
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    assert {Requirement(text).name for text in wanted} <= {row.name for row in locked}, "run make locks"


# --- the command


def built(target: Target, **changes: Any) -> list[str]:
    options = command.Options("debian@sha256:00", "sha256:00", torch_index_url="https://x.invalid/cpu", **changes)
    source = command.Source("1.2", "abc", 1_700_000_000)
    taken = {"pip_conf": Path("/p/pip.conf"), "ca_bundle": Path("/p/ca.pem")}
    return command.build("docker", target, Path("/ctx"), source, options, taken, {"HTTPS_PROXY": "http://user:word@p"})


def test_the_command_has_everything_resolved() -> None:
    words = built(resolve(TABLE, "cpu", "kernels"))
    text = " ".join(words)
    assert words[:2] == ["docker", "build"]
    assert words[-1] == "/ctx"
    assert "--target kernels --tag smbench:kernels-cpu" in text
    assert "--build-arg BASE_IMAGE=debian@sha256:00 --build-arg BASE_ID=sha256:00" in text
    assert "--build-arg SOURCE_DATE_EPOCH=1700000000 --build-arg CREATED=2023-11-14T22:13:20+00:00" in text
    assert "--secret id=ca_bundle,src=/p/ca.pem --secret id=pip_conf,src=/p/pip.conf" in text


def test_a_proxys_password_is_not_on_the_command_line() -> None:
    words = built(resolve(TABLE, "cpu", "kernels"))
    assert "HTTPS_PROXY" in words
    assert "word" not in " ".join(words)


def test_an_argument_is_given_where_a_stage_takes_it() -> None:
    cpu, gpu = built(resolve(TABLE, "cpu", None)), built(resolve(TABLE, "sm90", None), strip=False)
    assert [word for word in cpu if word.startswith(("STRIP=", "TORCH_"))] == ["TORCH_INDEX_URL=https://x.invalid/cpu"]
    assert [word for word in gpu if word.startswith(("STRIP=", "TORCH_"))] == ["STRIP=0"]
    assert "--no-cache" in built(resolve(TABLE, "cpu", None), no_cache=True)


def test_a_dry_run_prints_the_command_and_needs_no_docker(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (
        "--docker",
        "/nowhere/docker",
        "build",
        "--arch",
        "sm86",
        "--stack",
        "vllm",
        "--strip",
        "0",
        "--dry-run",
    )
    assert cli.main(arguments) == 0
    said = capsys.readouterr().out
    assert said.startswith("DOCKER_BUILDKIT=1 /nowhere/docker build ")
    assert "--tag smbench:vllm-sm86" in said
    assert f"BASE_IMAGE={TABLE.base.image}" in said
    assert "STRIP=0" in said


# --- what a build takes from this machine


def test_of_pips_settings_only_those_that_lead_to_an_index_go_into_a_build() -> None:
    listed = "\n".join(
        [
            ":env:.default-timeout='60'",
            "global.cache-dir='/home/me/cache'",
            "global.cert='/etc/ca.pem'",
            "global.extra-index-url='file:///srv/simple https://more.invalid/simple'",
            "global.find-links='/srv/wheels'",
            "global.index-url='https://user:word@index.invalid/simple'",
            "global.timeout='10'",
            "install.timeout='20'",
            "wheel.index-url='https://not.invalid'",
        ]
    )
    assert secrets.pip_settings(listed) == {
        "default-timeout": ["60"],
        "extra-index-url": ["https://more.invalid/simple"],
        "index-url": ["https://user:word@index.invalid/simple"],
        "timeout": ["20"],
    }
    text = secrets.pip_conf(secrets.pip_settings(listed))
    assert text.startswith("[global]\ndefault-timeout = 60\nextra-index-url = https://more.invalid/simple\n")


def test_certificates_are_those_named_else_those_that_pip_uses_here(tmp_path: Path) -> None:
    mine, pips = tmp_path / "mine.pem", tmp_path / "pips.pem"
    mine.touch()
    pips.touch()
    environ = {"REQUESTS_CA_BUNDLE": str(pips), "SSL_CERT_FILE": str(tmp_path / "gone.pem")}
    assert secrets.ca_bundle(str(mine), str(pips), environ) == mine
    assert secrets.ca_bundle("", None, environ) == pips
    assert secrets.ca_bundle("", None, {"SSL_CERT_FILE": str(tmp_path / "gone.pem")}) is None
    with pytest.raises(UsageError, match="CA_BUNDLE"):
        secrets.ca_bundle(str(tmp_path / "gone.pem"), None, {})


# --- the context


@pytest.fixture(scope="module")
def wheelhouse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheelhouse")
    for name in (
        "torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl",
        "NumPy-9-py3-none-any.whl",
        "django-5-py3-none-any.whl",
    ):
        (folder / name).write_bytes(b"wheel")
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_the_context_is_the_same_twice_and_holds_what_the_dockerfile_mounts(tmp_path: Path, wheelhouse: Path) -> None:
    target = resolve(TABLE, "cpu", "kernels")
    one = context.lay_out(ROOT, tmp_path / "one", target, wheelhouse, 1_700_000_000)
    two = context.lay_out(ROOT, tmp_path / "two", target, wheelhouse, 1_700_000_000)
    assert names(one) == names(two)
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names(one))
    mounted = re.findall(r"type=bind,source=([^,]+),", (one / "Dockerfile").read_text(encoding="utf-8"))
    for source in {*mounted, "smoke.py"} - {"locks/vllm-cpu.txt"}:
        assert (one / source).exists(), source


def test_the_context_has_the_wheels_that_the_image_installs_and_no_others(tmp_path: Path, wheelhouse: Path) -> None:
    cpu = context.lay_out(ROOT, tmp_path / "cpu", resolve(TABLE, "cpu", "kernels"), wheelhouse, 0)
    taken = sorted(path.name for path in (cpu / "wheelhouse").iterdir())
    assert taken == ["NumPy-9-py3-none-any.whl", "torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl"]


def test_a_checkout_with_something_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="images are built from a whole checkout"):
        context.lay_out(tmp_path, tmp_path / "context", resolve(TABLE, "cpu", "kernels"), None, 0)


# --- sizes


def test_the_pull_size_is_that_of_the_compressed_layers(tmp_path: Path) -> None:
    content = os.urandom(3_000_000) + bytes(9_000_000)
    saved = io.BytesIO()
    with tarfile.open(fileobj=saved, mode="w") as archive:
        for name, data in (
            ("abc/layer.tar", content),
            ("abc.json", b"{}" * 1000),
            ("manifest.json", json.dumps([{"Layers": ["abc/layer.tar", "def/layer.tar"]}]).encode()),
        ):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
        # how docker saves a layer for the second time
        again = tarfile.TarInfo("def/layer.tar")
        again.type, again.linkname = tarfile.SYMTYPE, "../abc/layer.tar"
        archive.addfile(again)
    saved.seek(0)
    packer = zlib.compressobj(6, zlib.DEFLATED, 31)
    assert sizes.archive_bytes(saved) == pytest.approx(len(packer.compress(content) + packer.flush()), rel=0.001)
