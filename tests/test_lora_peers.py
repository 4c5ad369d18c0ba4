"""The providers over vLLM's and sglang's LoRA kernels: they refuse with a reason, and they prepare what a call needs.

The libraries themselves are never installed here; `make run` on a GPU checks their output against the reference.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from smbench_kernels import lora, lora_sglang, lora_vllm
from smbench_kernels.op import Inputs, Point, Prepared, UnsupportedPoint

POINT: Point = {"batch": 4, "seq_len": 1, "hidden_size": 32, "rank": 8, "num_loras": 2, "dtype": "float16"}
PROVIDERS: dict[str, dict[str, Callable[..., Prepared]]] = {
    package: {name: getattr(module, name) for name in ("bgmv_shrink", "bgmv_expand", "sgmv_shrink", "sgmv_expand")}
    for package, module in (("vllm", lora_vllm), ("sglang", lora_sglang))
}


def inputs_for(name: str) -> Inputs:
    return lora.make_inputs(
        POINT, 0, torch.device("cpu"), expands=name.endswith("expand"), per_token=name.startswith("bgmv")
    )


def pretend_installed(package: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An importable package without the modules that the provider needs, in a process that claims to interpret."""
    (folder / package).mkdir()
    (folder / package / "__init__.py").write_text("", encoding="utf-8")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("SGLANG_USE_CUSTOM_TRITON_KERNEL_CACHE", "0")
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize("package", PROVIDERS)
@pytest.mark.parametrize("name", PROVIDERS["vllm"])
def test_a_missing_library_is_unsupported(package: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find_spec(name))
    with pytest.raises(UnsupportedPoint, match=f"^{package} is not installed in this stack$"):
        PROVIDERS[package][name](POINT, inputs_for(name))


@pytest.mark.parametrize(
    ("package", "expected"),
    [
        ("vllm", r"lora_shrink, lora_expand and LoRAKernelMeta .* 0\.26 to 0\.33: No module named 'vllm\.lora'"),
        ("sglang", r"chunked_sgmv_lora_shrink_forward .* 0\.5\.16 to 0\.5\.23: No module named 'sglang\.kernels'"),
    ],
)
def test_an_incompatible_library_is_unsupported_and_says_what_was_expected(
    package: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_installed(package, tmp_path, monkeypatch)
    with pytest.raises(UnsupportedPoint, match=f"^{package} .* is installed, but this provider expects {expected}"):
        PROVIDERS[package]["bgmv_shrink"](POINT, inputs_for("bgmv_shrink"))
    monkeypatch.undo()
    sys.modules.pop(package, None)


@pytest.mark.parametrize("package", PROVIDERS)
def test_without_a_gpu_the_kernels_are_refused(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_installed(package, tmp_path, monkeypatch)
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(UnsupportedPoint, match=f"^{package}'s LoRA kernels need an NVIDIA GPU$"):
        PROVIDERS[package]["bgmv_shrink"](POINT, inputs_for("bgmv_shrink"))


def test_sglang_chunks_hold_every_token_once_with_its_adapter() -> None:
    adapters = torch.tensor([2] * 40 + [-1] * 3 + [0] * 16 + [2, 1, -1], dtype=torch.int32)
    fields: Any = SimpleNamespace
    info = lora_sglang.chunks(fields, adapters, num_loras=3, rank=8)
    bounds = info.seg_indptr.tolist()
    covered = []
    for slot, start, end in zip(info.weight_indices.tolist(), bounds, bounds[1:], strict=False):
        tokens = info.permutation[start:end]
        assert 0 < len(tokens) <= lora_sglang.CHUNK
        # tokens without an adapter are given the one behind the last, whose rank is 0
        assert set(adapters[tokens].tolist()) == {-1 if slot == 3 else slot}
        covered += tokens.tolist()
    assert sorted(covered) == list(range(len(adapters)))
    # 41 tokens of adapter 2 are three chunks; the others are one chunk each
    assert info.num_segments == len(info.weight_indices) == 6
    assert info.lora_ranks.tolist() == [8, 8, 8, 0]
