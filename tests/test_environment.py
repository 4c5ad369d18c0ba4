"""What a result records of its environment, and above all what it does not."""

from __future__ import annotations

import getpass
import json
import os
import platform
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fake_nvml import FIXED_FACTS, UUID, FakeNvml, NVMLErrorNotSupported, install
from smbench import __version__
from smbench.identity import environment_id
from smbench.worker import environment
from smbench.worker.environment import capture, package_sha256, source_checkout, variables

CARD = SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    multi_processor_count=132,
    L2_cache_size=60 << 20,
    total_memory=150109880320,
    uuid=UUID.removeprefix("GPU-"),
)


@pytest.fixture(name="nvml")
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    return install(monkeypatch)


@pytest.fixture(name="cuda")
def torch_with_a_card(monkeypatch: pytest.MonkeyPatch, nvml: FakeNvml) -> FakeNvml:
    torch = SimpleNamespace(
        version=SimpleNamespace(cuda="13.0"),
        cuda=SimpleNamespace(is_available=lambda: True, get_device_properties=lambda index: CARD),
        backends=SimpleNamespace(cudnn=SimpleNamespace(version=lambda: 91900)),
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    return nvml


@pytest.fixture(name="no_nvml")
def without_bindings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)


def git(folder: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=Nobody", "-c", "user.email=nobody@example.org", "-c", "commit.gpgsign=false")
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


@pytest.fixture(name="checkout")
def git_checkout(tmp_path: Path) -> Path:
    git(tmp_path, "init", "--quiet")
    (tmp_path / "code.py").write_text("one\n", encoding="utf-8")
    git(tmp_path, "add", "code.py")
    git(tmp_path, "commit", "--quiet", "-m", "first")
    return tmp_path


def test_a_card_is_recorded_with_what_torch_and_the_driver_say(cuda: FakeNvml) -> None:
    facts = capture()
    assert facts["gpu"] == {
        **FIXED_FACTS,
        "usable_memory_bytes": 150109880320,
        "sm_count": 132,
        "l2_bytes": 60 << 20,
    }
    assert (facts["runtime"]["cuda"], facts["runtime"]["cudnn"]) == ("13.0", 91900)


def test_the_driver_is_asked_about_the_card_that_torch_uses(cuda: FakeNvml) -> None:
    cuda.answers["nvmlDeviceGetEnforcedPowerLimit"] = lambda handle: 450_000 if handle == f"card of {UUID}" else 1
    assert capture()["gpu"]["power_limit_w"] == 450.0


def test_a_fact_that_the_card_does_not_tell_is_none_with_the_reason(cuda: FakeNvml) -> None:
    cuda.answers["nvmlDeviceGetEccMode"] = NVMLErrorNotSupported()
    facts = capture()
    assert facts["gpu"]["ecc_enabled"] is None
    assert [reason for reason in facts["missing"] if reason.startswith("gpu")] == ["gpu.ecc_enabled: Not Supported"]


def test_without_a_gpu_everything_else_is_recorded(no_nvml: None, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_only = SimpleNamespace(version=SimpleNamespace(cuda=None), cuda=SimpleNamespace(is_available=lambda: False))
    monkeypatch.setitem(sys.modules, "torch", cpu_only)
    facts = capture()
    assert facts["gpu"] == {}
    assert facts["runtime"]["cuda"] is None
    assert "gpu: the Python package nvidia-ml-py is not installed" in facts["missing"]
    assert facts["cpu"]["cores_usable"] >= 1
    assert facts["python"]["version"] == platform.python_version()
    assert facts["smbench"]["version"] == __version__
    assert facts["os"]["kernel"] == platform.release()
    assert {"torch", "triton", "numpy"} <= set(facts["libraries"])


def test_torch_need_not_be_there(no_nvml: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    facts = capture()
    assert facts["runtime"]["cuda"] is None
    assert "runtime: torch cannot be imported (ModuleNotFoundError)" in facts["missing"]


def test_every_unknown_fact_has_a_reason(no_nvml: None) -> None:
    facts = capture()
    reasons = [reason.partition(":")[0] for reason in facts["missing"]]
    for group, values in facts.items():
        if isinstance(values, dict):
            for name, value in values.items():
                if value is None and (group, name) not in (("cpu", "quota_cores"), ("os", "container")):
                    assert group in reasons or f"{group}.{name}" in reasons


def test_the_record_survives_json(cuda: FakeNvml) -> None:
    facts = capture()
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts


def test_nothing_personal_is_recorded(cuda: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "planted-host")
    monkeypatch.setattr(platform, "node", lambda: "planted-host")
    cuda.answers |= {"nvmlDeviceGetSerial": "planted-serial", "nvmlDeviceGetUUID": UUID}
    planted = {
        "HF_TOKEN": "planted-token",
        "AWS_SECRET_ACCESS_KEY": "planted-key",
        "SMBENCH_PASSWORD": "planted-password",
        "TRITON_TOKEN": "planted-a",
        "VLLM_API_KEY": "planted-b",
        "TORCH_SECRET": "planted-c",
        # on the list, with values that are none of a setting
        "TRITON_PTXAS_PATH": "/home/planted-user/ptxas",
        "LD_PRELOAD": "/home/planted-user/lib.so",
        "TRITON_INTERPRET": "planted-d",
        "PYTORCH_CUDA_ALLOC_CONF": "planted-e",
        "CUDA_VISIBLE_DEVICES": UUID,
        "VLLM_ATTENTION_BACKEND": "/planted-user",
        "HOSTNAME": "planted-host",
        "USER": "planted-user",
        "HOME": "/home/planted-user",
    }
    for name, value in planted.items():
        monkeypatch.setenv(name, value)
    text = json.dumps(capture())
    assert "planted" not in text
    assert UUID not in text and UUID.removeprefix("GPU-") not in text
    for personal in (getpass.getuser(), os.uname().nodename, str(Path.home()), str(Path.cwd()), sys.prefix):
        # a word such as `root` alone is part of many others
        assert f'"{personal}"' not in text
        assert "/" not in personal or personal not in text


@pytest.mark.parametrize(
    ("name", "value", "recorded"),
    [
        ("TRITON_DEBUG", "1", "1"),
        ("TRITON_DEBUG", "True", "True"),
        ("TRITON_DEBUG", "hunter2", "set"),
        ("CUDA_VISIBLE_DEVICES", "0,1", "0,1"),
        ("CUDA_VISIBLE_DEVICES", "", ""),
        ("CUDA_VISIBLE_DEVICES", UUID, "set"),
        ("TRITON_PTXAS_PATH", "/opt/ptxas", "set"),
        ("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True,max_split_size_mb:64", None),
        ("CUBLAS_WORKSPACE_CONFIG", ":4096:8", ":4096:8"),
        ("OMP_NUM_THREADS", "8", "8"),
    ],
)
def test_variables_are_recorded_by_the_grammar_of_their_values(name: str, value: str, recorded: str | None) -> None:
    assert variables({name: value}) == {name: value if recorded is None else recorded}


def test_variables_that_are_not_on_the_list_are_not_even_named() -> None:
    assert variables({"TRITON_SECRET": "1", "PATH": "/bin"}) == {}


def test_a_clean_checkout(checkout: Path) -> None:
    missing: list[str] = []
    found = source_checkout(checkout, missing)
    assert len(found["commit"]) == 40
    assert (found["dirty"], missing) == (False, [])


def test_a_changed_checkout_is_dirty(checkout: Path) -> None:
    (checkout / "code.py").write_text("two\n", encoding="utf-8")
    assert source_checkout(checkout, [])["dirty"] is True


def test_a_folder_that_only_lies_in_a_checkout_is_not_of_it(checkout: Path) -> None:
    installed = checkout / "venv" / "smbench"
    installed.mkdir(parents=True)
    (installed / "code.py").write_text("one\n", encoding="utf-8")
    missing: list[str] = []
    assert source_checkout(installed, missing) == {"commit": None, "dirty": None}
    assert len(missing) == 1
    assert str(checkout) not in missing[0]


def test_no_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    missing: list[str] = []
    assert source_checkout(tmp_path, missing) == {"commit": None, "dirty": None}
    assert missing == ["source: git is not installed"]


def test_the_hash_of_a_package_is_of_its_files_and_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "planted_package"
    (package / "configs").mkdir(parents=True)
    (package / "__init__.py").write_text(
        "raise RuntimeError('a package is hashed without being run')", encoding="utf-8"
    )
    config = package / "configs" / "a.json"
    config.write_text("{}", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    first = package_sha256("planted_package")
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "x.pyc").write_bytes(b"1")
    assert package_sha256("planted_package") == first
    config.write_text("{ }", encoding="utf-8")
    second = package_sha256("planted_package")
    config.rename(package / "configs" / "b.json")
    assert len({first, second, package_sha256("planted_package")}) == 3
    assert package_sha256("no_such_package_here") is None


def test_what_the_image_build_wrote_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "image.json"
    monkeypatch.setattr(environment, "IMAGE_FILE", file)
    assert capture()["image"] == {}
    file.write_text('{"stack": "kernels", "arch": "sm90"}', encoding="utf-8")
    assert capture()["image"] == {"stack": "kernels", "arch": "sm90", "digest": None}
    file.write_text("{", encoding="utf-8")
    facts = capture()
    assert facts["image"] == {}
    assert "image: image.json is unreadable (JSONDecodeError)" in facts["missing"]


def test_the_id_is_of_the_facts_alone() -> None:
    facts: dict[str, Any] = {"gpu": {"name": "NVIDIA H200", "power_limit_w": 700.0}, "missing": ["a: b"]}
    # sha256 of {"gpu":{"name":"NVIDIA H200","power_limit_w":700.0}}
    assert environment_id(facts) == "b96c564915f4406f"
    assert environment_id({**facts, "missing": []}) == environment_id(facts)
    assert environment_id(dict(reversed(facts.items()))) == environment_id(facts)
    assert environment_id({**facts, "gpu": {"name": "NVIDIA H200", "power_limit_w": 600.0}}) != environment_id(facts)


def test_capturing_twice_gives_one_id(cuda: FakeNvml) -> None:
    assert environment_id(capture()) == environment_id(capture())


def test_the_module_prints_its_record() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "smbench.worker.environment"], capture_output=True, text=True, check=True, timeout=60
    )
    record = json.loads(done.stdout)
    assert record.pop("environment_id") == environment_id(record)
