"""The rows of docker/archs.toml, and what a wrong file is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from smbench.arch import Arch, ArchTable, Device, load
from smbench.errors import CorruptError, UsageError
from smbench.resources import archs_file

TABLE = load(archs_file())
DEVICES = list(TABLE.device.values())
GPU_ARCHS = [arch for arch in TABLE.arch.values() if arch.compute_capability is not None]

ROWS = """
format = 2
[base]
image = "debian@sha256:0000000000000000000000000000000000000000000000000000000000000000"
source = "a registry"
[worker]
requires = ["numpy"]
[stack.vllm]
title = "vLLM"
module = "vllm"
build.cuda = { lock = "vllm.txt", requires = ["vllm==1.0"], torch = "2.0.0" }
[arch.sm89]
compute_capability = [8, 9]
products = ["L4"]
source = "a guide"
[device."NVIDIA L4"]
arch = "sm89"
sm_count = 58
source = "a datasheet"
"""


def written(folder: Path, text: str) -> Path:
    file = folder / "archs.toml"
    file.write_text(text, encoding="utf-8")
    return file


def fault(folder: Path, text: str) -> str:
    with pytest.raises(UsageError) as caught:
        load(written(folder, text))
    return str(caught.value)


def device_names(device: Device) -> str:
    return device.name


@pytest.mark.parametrize(
    ("name", "capability", "block_bytes", "warps"),
    [
        ("sm80", (8, 0), 163 * 1024, 64),
        ("sm86", (8, 6), 99 * 1024, 48),
        ("sm89", (8, 9), 99 * 1024, 48),
        ("sm90", (9, 0), 227 * 1024, 64),
    ],
)
def test_arch_limits(name: str, capability: tuple[int, int], block_bytes: int, warps: int) -> None:
    arch = TABLE.arch_of_capability(capability)
    assert arch is not None
    assert (arch.name, arch.shared_memory_per_block_bytes, arch.max_warps_per_sm) == (name, block_bytes, warps)


def test_unknown_hardware_is_none() -> None:
    assert TABLE.arch_of_capability((7, 5)) is None
    assert TABLE.device_named("NVIDIA B9000") is None
    assert TABLE.device_named("H200") is None


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA A100-SXM4-40GB",
        "NVIDIA A100-SXM4-80GB",
        "NVIDIA A100-PCIE-40GB",
        "NVIDIA A100 80GB PCIe",
        "NVIDIA A10",
        "NVIDIA GeForce RTX 3090",
        "NVIDIA GeForce RTX 4090",
        "NVIDIA L4",
        "NVIDIA L20",
        "NVIDIA L40",
        "NVIDIA L40S",
        "NVIDIA H100 80GB HBM3",
        "NVIDIA H100 PCIe",
        "NVIDIA H200",
        "NVIDIA RTX A6000",
        "NVIDIA RTX 6000 Ada Generation",
    ],
)
def test_products_of_the_documents_and_of_rentals_are_known(name: str) -> None:
    device = TABLE.device_named(name)
    assert device is not None
    assert device.memory_bandwidth_bytes_per_s is not None
    assert {"float16", "bfloat16"} <= set(device.tensor_flops_per_s)


@pytest.mark.parametrize("device", [device for device in DEVICES if device.boost_clock_hz], ids=device_names)
def test_peaks_agree_with_cores_and_clocks(device: Device) -> None:
    """A mistyped figure does not come out as a power of two of operations a clock and multiprocessor."""
    assert device.sm_count is not None
    assert device.boost_clock_hz is not None
    assert device.fp32_flops_per_s is not None
    fp32 = device.fp32_flops_per_s / device.sm_count / device.boost_clock_hz
    assert fp32 == pytest.approx(128 if device.arch == "sm80" else 256, rel=0.01)
    tensor = device.tensor_flops_per_s["bfloat16"] / device.sm_count / (device.tensor_clock_hz or device.boost_clock_hz)
    rates = {"sm80": [2048], "sm86": [512, 1024], "sm89": [512, 1024], "sm90": [4096]}[device.arch]
    assert any(tensor == pytest.approx(rate, rel=0.015) for rate in rates)


@pytest.mark.parametrize("device", DEVICES, ids=device_names)
def test_tensor_peaks_agree_with_each_other(device: Device) -> None:
    peaks = device.tensor_flops_per_s
    assert peaks["float16"] == peaks["bfloat16"]
    assert peaks["tf32"] == pytest.approx(peaks["bfloat16"] / 2, rel=0.02)
    if device.float16_accumulate_flops_per_s is not None:
        assert device.float16_accumulate_flops_per_s == pytest.approx(2 * peaks["float16"], rel=0.01)


@pytest.mark.parametrize("arch", GPU_ARCHS, ids=lambda arch: arch.name)
def test_no_limit_of_a_gpu_arch_is_left_out(arch: Arch) -> None:
    assert [name for name, value in arch if value is None] == []


def test_geforce_accumulates_in_float32_at_half_rate() -> None:
    device = TABLE.device_named("NVIDIA GeForce RTX 3090")
    assert device is not None
    assert device.tensor_flops_per_s["float16"] == 71e12
    assert device.float16_accumulate_flops_per_s == 142e12


def test_peak_at_a_clock_scales_from_the_stated_clock() -> None:
    device = TABLE.device_named("NVIDIA H200")
    assert device is not None
    assert device.tensor_peak_flops_per_s("bfloat16") == 989.4e12
    assert device.tensor_peak_flops_per_s("bfloat16", clock_hz=1980e6) == pytest.approx(989.4e12 * 1980 / 1830)
    assert device.tensor_peak_flops_per_s("float64") is None


def test_peak_at_a_clock_is_unknown_without_a_stated_clock() -> None:
    device = TABLE.device_named("NVIDIA L20")
    assert device is not None
    assert device.tensor_peak_flops_per_s("float16") == 119.5e12
    assert device.tensor_peak_flops_per_s("float16", clock_hz=2.5e9) is None


def test_an_absent_figure_stays_absent(tmp_path: Path) -> None:
    device = load(written(tmp_path, ROWS)).device_named("NVIDIA L4")
    assert device is not None
    assert device.sm_count == 58
    assert device.memory_bandwidth_bytes_per_s is None
    assert device.tensor_peak_flops_per_s("float16") is None


def test_unknown_key_names_file_path_and_known_keys(tmp_path: Path) -> None:
    said = fault(tmp_path, ROWS + "l2_byte = 1\n")
    assert said.startswith("archs.toml: device.NVIDIA L4.l2_byte: unknown key; known keys here: arch, boost_clock_hz")
    assert "did you mean 'l2_bytes'?" in said


def test_unknown_table_is_an_error(tmp_path: Path) -> None:
    assert fault(tmp_path, ROWS + "[gpu]\n").startswith(
        "archs.toml: gpu: unknown key; known keys here: arch, base, device"
    )


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("sm_count = 58", 'sm_count = "58"', "device.NVIDIA L4.sm_count"),
        ("sm_count = 58", "sm_count = 0", "device.NVIDIA L4.sm_count"),
        ("sm_count = 58", "tensor_flops_per_s = { int9 = 1.0 }", "device.NVIDIA L4.tensor_flops_per_s"),
        ("sm_count = 58", 'name = "NVIDIA L40"', "device.NVIDIA L4.name"),
        ("[8, 9]", "[8]", "arch.sm89.compute_capability"),
        ('source = "a datasheet"', "", "device.NVIDIA L4.source: this key is missing"),
        ('arch = "sm89"', 'arch = "sm99"', "device.NVIDIA L4.arch: unknown arch 'sm99'; known: sm89"),
        ("format = 2", "format = [", "not valid TOML"),
    ],
)
def test_wrong_values_are_named(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert said in fault(tmp_path, ROWS.replace(old, new))


def test_two_archs_of_one_capability_are_an_error(tmp_path: Path) -> None:
    twin = '[arch.ada]\ncompute_capability = [8, 9]\nproducts = []\nsource = "a guide"\n'
    assert "(8, 9) is already arch.sm89" in fault(tmp_path, ROWS + twin)


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorruptError, match="format 3 is newer"):
        load(written(tmp_path, ROWS.replace("format = 2", "format = 3")))


def test_the_table_is_immutable() -> None:
    for name in type(DEVICES[0]).model_fields:
        with pytest.raises(ValueError, match="frozen"):
            setattr(DEVICES[0], name, 1)
    assert isinstance(TABLE, ArchTable)
