"""Inside an image: which card it is for, which digest it was started by, where results go, and what says so."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

import fake_host
import fake_nvml
from small_runs import REPOSITORY, cell, environment, recipe_text, small_recipe, timed
from smbench import arch, cli, doctor_image, guards_image, place
from smbench.errors import CorruptError, UsageError
from smbench.findings import Evidence
from smbench.place import ImageHere
from smbench.plan import Here
from smbench.stacks import Stacks
from smbench.worker import environment as worker_environment

DIGEST = "sha256:" + "0f" * 32
IMAGE = ImageHere("sm89", ("vllm",))
L40S = Here("NVIDIA L40S", "sm89", 48 << 30)
A10 = Here("NVIDIA A10", "sm86", 24 << 30)


def image_file(folder: Path, **facts: object) -> Path:
    path = folder / "image.json"
    path.write_text(json.dumps({"format": 1, "name": "vllm", "arch": "sm89", "stacks": ["vllm"], **facts}))
    return path


def test_an_image_is_known_by_its_file(tmp_path: Path) -> None:
    assert place.image_here(tmp_path / "none") is None
    assert place.image_here(image_file(tmp_path)) == IMAGE
    for text in ("{", "[]", "{}", "1"):
        (tmp_path / "image.json").write_text(text)
        with pytest.raises(CorruptError, match="does not say what this image is"):
            place.image_here(tmp_path / "image.json")


@pytest.mark.parametrize(
    ("facts", "found"),
    [
        ({"name": "NVIDIA H200", "compute_capability": [9, 0]}, "sm90"),
        ({"name": "a card without a row", "compute_capability": [8, 6]}, "sm86"),
        ({"name": "a card of tomorrow", "compute_capability": [12, 0]}, "sm120"),
        ({"name": "NVIDIA H200"}, "sm90"),
        ({"name": "a card without a row"}, None),
    ],
)
def test_the_arch_of_a_card_needs_no_row_of_its_own(facts: dict[str, Any], found: str | None) -> None:
    assert place.arch_of(facts, arch.load(REPOSITORY / "docker/archs.toml")) == found


def test_the_machine_is_asked_for_its_arch(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = fake_nvml.install(monkeypatch)
    fake.answers |= {"nvmlDeviceGetName": "NVIDIA of tomorrow", "nvmlDeviceGetCudaComputeCapability": (8, 9)}
    found = place.here()
    assert (found.device_name, found.arch) == ("NVIDIA of tomorrow", "sm89")


def test_an_image_of_another_arch_is_refused_unless_forced() -> None:
    with pytest.raises(
        UsageError, match=re.escape("this image is for sm89 and the card (NVIDIA A10) is sm86")
    ) as refused:
        place.forced_arch(IMAGE, A10, "cuda", force=False)
    assert "ARCH=sm86" in str(refused.value) and "--force" in str(refused.value)
    assert place.forced_arch(IMAGE, A10, "cuda", force=True)
    # nothing to force, so nothing to mark
    assert not place.forced_arch(IMAGE, L40S, "cuda", force=True)
    assert not place.forced_arch(IMAGE, A10, "cpu", force=True)
    assert not place.forced_arch(None, A10, "cuda", force=True)
    with pytest.raises(UsageError, match="no CUDA"):
        place.forced_arch(ImageHere("cpu", ("kernels",)), L40S, "cuda", force=True)


def test_a_digest_is_one_or_is_refused() -> None:
    assert place.digest({}) is None
    assert place.digest({place.DIGEST: DIGEST}) == DIGEST
    for told in ("latest", DIGEST[:-1], f"repo@{DIGEST}", DIGEST.upper()):
        with pytest.raises(UsageError, match="not sha256: and 64 hex digits"):
            place.digest({place.DIGEST: told})


def test_results_go_to_the_volume_of_a_pod(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    volume = tmp_path / "workspace"
    volume.mkdir()
    assert place.runs_root(None, volume) == (tmp_path, None)
    assert place.runs_root(IMAGE, volume) == (volume, None)


def test_a_volume_that_cannot_be_written_is_said_since_results_end_with_the_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # a file stands for a folder that even root cannot write
    volume = tmp_path / "workspace"
    volume.touch()
    monkeypatch.setattr(place, "_trouble", lambda path: "the cause: the fix" if path == volume else None)
    root, warning = place.runs_root(IMAGE, volume)
    assert root == tmp_path
    assert warning == f"the cause: the fix; results go to {tmp_path}/runs, which ends with this container"


def test_a_folder_of_somebody_else_is_named_with_its_owner(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    theirs.chmod(0o500)
    place.require_writable(tmp_path / "new/run")
    user = os.geteuid()
    if user == 0:
        # root may write anywhere: be somebody
        tmp_path.chmod(0o755)
        for parent in (tmp_path.parent, tmp_path.parent.parent):
            parent.chmod(0o755)
        os.seteuid(65534)
    try:
        with pytest.raises(UsageError) as refused:
            place.require_writable(theirs / "run")
    finally:
        os.seteuid(user)
    said = str(refused.value)
    assert said.startswith(f"{theirs} cannot be written (Permission denied): it belongs to uid {user}")
    assert "sudo chown -R" in said and said.endswith("or choose another folder with OUT=")


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs").touch()
    with pytest.raises(UsageError, match="Not a directory"):
        place.require_writable(tmp_path / "runs/x")


def test_a_record_has_the_digest_that_the_container_was_told(tmp_path: Path) -> None:
    missing: list[str] = []
    facts = worker_environment.image(image_file(tmp_path), missing, {place.DIGEST: DIGEST})
    assert facts["digest"] == DIGEST and "forced_arch" not in facts and missing == []
    for told in ({}, {place.DIGEST: "latest"}):
        missing = []
        assert worker_environment.image(image_file(tmp_path), missing, told)["digest"] is None
        assert missing == [
            "image.digest: not told; SMBENCH_IMAGE_DIGEST=sha256:… says what the container was started by"
        ]
    assert worker_environment.image(tmp_path / "none", missing, {place.DIGEST: DIGEST}) == {}


def evidence(forced: bool) -> Evidence:
    image = {"arch": "sm86", "digest": DIGEST, **({"forced_arch": True} if forced else {})}
    here = environment(image=image, gpu={"name": "NVIDIA L40S"})
    return Evidence(small_recipe(), None, [timed(cell())], {}, [here], [])


def test_forced_results_are_marked_in_every_report() -> None:
    (finding,) = guards_image.forced_arch(evidence(forced=True))
    assert finding.severity == "warning" and finding.guard == "image"
    assert finding.message.startswith("1 of 1 results are from an image of another arch than the card")
    assert "sm86 on NVIDIA L40S" in finding.message
    assert list(guards_image.forced_arch(evidence(forced=False))) == []


class Pod:
    """`smbench` in this process, inside an image, over a fake worker."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self.patch = patch
        self.out = ""
        """Standard output of the last command."""
        self._capture = capture
        (folder / "recipes").mkdir()
        (folder / "recipes/small.toml").write_bytes(recipe_text())
        patch.chdir(folder)
        for module, name, value in fake_host.replacements(folder / "recipes"):
            patch.setattr(module, name, value)
        patch.setattr(place, "image_here", lambda: ImageHere("sm89", ("kernels",)))
        patch.setattr(place, "runs_root", lambda image: (folder / "workspace", None))
        patch.setattr(cli, "_here", lambda: L40S)
        for name in (place.DIGEST, place.AGAIN, place.FORCED):
            patch.delenv(name, raising=False)

    def __call__(self, *arguments: str) -> tuple[int, str]:
        """(exit code, standard error)."""
        self.patch.setattr("sys.argv", ["smbench", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert isinstance(ended.value.code, int)
        written = self._capture.readouterr()
        self.out = written.out
        return ended.value.code, written.err


@pytest.fixture
def pod(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Pod:
    return Pod(tmp_path, monkeypatch, capsys)


def test_a_run_in_a_pod_writes_to_its_volume_and_warns_of_a_missing_digest(pod: Pod) -> None:
    code, err = pod("run", "small", "--provider", "torch")
    assert code == 0, err
    assert (pod.folder / "workspace/runs/small-l40s/results.jsonl").exists()
    assert "this image's digest is unknown" in err
    pod.patch.setenv(place.DIGEST, DIGEST)
    assert "digest" not in pod("run", "small", "--provider", "torch")[1]
    pod.patch.setenv(place.DIGEST, "latest")
    code, err = pod("run", "small", "--provider", "torch")
    assert code == 2 and "not sha256: and 64 hex digits" in err


def test_a_run_on_another_card_needs_force_and_tells_its_workers(pod: Pod) -> None:
    pod.patch.setattr(cli, "_here", lambda: A10)
    code, err = pod("run", "small", "--provider", "torch")
    assert code == 2 and "this image is for sm89" in err and not (pod.folder / "workspace").exists()
    assert pod("run", "small", "--provider", "torch", "--force")[0] == 0
    assert os.environ[place.FORCED] == "1"
    # a mark that somebody's shell left does not stay
    pod.patch.setattr(cli, "_here", lambda: L40S)
    assert pod("run", "small", "--provider", "torch", "--out", "other")[0] == 0
    assert os.environ[place.FORCED] == "0"


def test_an_interrupted_container_says_the_callers_command(pod: Pod) -> None:
    pod.patch.setenv(place.AGAIN, "make run RECIPE=small")
    (pod.folder / "recipes/small.toml").write_bytes(recipe_text((21,)))
    code, err = pod("run", "small", "--provider", "torch")
    assert code == 1 and "the same command goes on: make run RECIPE=small" in err


def checks(image: ImageHere | None, card: Here, folder: Path) -> dict[str, tuple[str, str | None]]:
    return {check.name: (check.verdict, check.fix) for check in doctor_image.run_checks(image, card, folder)}


def stack_of(folder: Path, torch: str, cuda: str) -> Stacks:
    """An image's folder of stacks with one stack in it."""
    python = folder / "stacks/vllm/bin/python"
    version = folder / "stacks/vllm/lib/python3.11/site-packages/torch/version.py"
    for path in (python, version):
        path.parent.mkdir(parents=True)
    python.touch()
    version.write_text(f"__version__ = '{torch}'\ncuda: Optional[str] = {cuda}\n")
    return Stacks([folder / "stacks"])


def test_the_doctor_knows_the_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = fake_nvml.install(monkeypatch)
    assert checks(None, L40S, tmp_path) == {}
    monkeypatch.setenv(place.DIGEST, DIGEST)
    here = Here("NVIDIA L40S", "sm89", 1, stack_of(tmp_path, "2.13.0+cu130", "'13.0'"))
    found = checks(IMAGE, here, tmp_path)
    assert {found[name][0] for name in ("image", "digest", "stack vllm")} == {"ok"}
    assert found["memlock"][0] in ("ok", "warn")
    fake.answers["nvmlSystemGetCudaDriverVersion"] = 12080
    verdict, fix = checks(IMAGE, here, tmp_path)["stack vllm"]
    assert verdict == "fail" and "newer driver" in str(fix)


def test_the_doctor_says_what_is_wrong_with_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(place.DIGEST, "latest")
    found = checks(IMAGE, A10, tmp_path)
    assert [found[name][0] for name in ("image", "digest", "stack vllm")] == ["fail", "fail", "fail"]
    monkeypatch.delenv(place.DIGEST)
    found = checks(IMAGE, Here(), tmp_path)
    assert found["image"] == ("warn", "start the container with its GPU: --gpus all")
    assert found["digest"][0] == "warn" and "make push" in str(found["digest"][1])


def test_the_doctors_own_python_is_not_asked_for_torch_in_an_image(pod: Pod) -> None:
    pod("doctor")
    assert pod.out and "stack kernels" in pod.out and "triton" not in pod.out and "image" in pod.out


def test_the_doctor_says_what_keeps_results_from_being_written(tmp_path: Path) -> None:
    (tmp_path / "runs").touch()
    verdict, fix = checks(IMAGE, L40S, tmp_path / "runs/x")["results"]
    assert verdict == "fail" and "Not a directory" in str(fix)
