"""Other projects' kernels with searched launch parameters: they reach the library's call, for the version they are of.

The libraries are never installed here: stand-ins of theirs compute with torch and tell what parameters they were given.
"""

from __future__ import annotations

import importlib.machinery
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from smbench.worker.gate import Truth, Verdict, examine
from smbench_kernels import configs, lora_peers, lora_sglang_space, lora_vllm_space
from smbench_kernels.op import Config, Op, Point, Prepared, UnsupportedPoint
from smbench_kernels.registry import op as find_op

CPU = torch.device("cpu")
POINT: Point = {"batch": 6, "seq_len": 1, "hidden_size": 32, "rank": 8, "num_loras": 2, "dtype": "float16"}
LINEAR: Point = {**POINT, "projection": "qkv", "prefill": "all"}
SQUARE: Point = {**LINEAR, "projection": "square"}
LIBRARIES = {"vllm": "vllm 0.26.0", "sglang": "sglang 0.5.23"}
NAMES = ("bgmv_shrink", "bgmv_expand", "lora_linear")


def by_token(sorted_: torch.Tensor, counts: torch.Tensor, ids: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """LoRA and tokens of each group of vLLM's metadata."""
    start = 0
    for index, count in zip(ids.tolist(), counts.tolist(), strict=True):
        if count:
            yield index, sorted_[start : start + count].long()
        start += count


class Meta:
    """What is used of vLLM's metadata."""

    specialized: ClassVar[list[bool]] = []

    def __init__(self, loras: int) -> None:
        self.loras = loras

    @classmethod
    def make(cls, loras: int, tokens: int, device: torch.device) -> Meta:
        return cls(loras)

    def prepare_tensors(self, adapters: torch.Tensor) -> None:
        self.order = torch.argsort(adapters, stable=True)
        self.ids, self.counts = torch.unique(adapters, return_counts=True)

    def meta_args(self, tokens: int, specialize_active_lora: bool) -> tuple[torch.Tensor, ...]:
        self.specialized.append(specialize_active_lora)
        return self.order, self.counts, self.ids


def pretend_vllm(asked: list[tuple[str, Config]]) -> dict[str, ModuleType]:
    """Modules as vLLM has them; every call tells its launch parameters."""
    names = ("vllm", "vllm.triton_utils", "vllm.lora", "vllm.lora.ops")
    base = "vllm.lora.ops.triton_ops"
    modules = {name: ModuleType(name) for name in (*names, base, f"{base}.utils", f"{base}.lora_shrink_op")}
    modules[f"{base}.lora_expand_op"] = ModuleType(f"{base}.lora_expand_op")
    chosen = {"block_m": 64, "max_nreg": None}
    utils: Any = modules[f"{base}.utils"]
    utils.get_lora_op_configs = lambda op_type, **_: chosen
    utils._LORA_A_PTR_DICT, utils._LORA_B_PTR_DICT = {}, {}
    utils._get_lora_a_ptr = lambda a, device: utils._LORA_A_PTR_DICT.setdefault(tuple(w.data_ptr() for w in a), "table")
    utils._get_lora_b_ptr = lambda b, start, device: utils._LORA_B_PTR_DICT.setdefault(
        tuple(w.data_ptr() for w in b), "table"
    )
    parts: dict[str, Any] = {part: modules[f"{base}.lora_{part}_op"] for part in ("shrink", "expand")}
    for module in parts.values():
        module.get_lora_op_configs = utils.get_lora_op_configs

    def shrink(x: Any, a: Any, out: Any, order: Any, counts: Any, ids: Any, scale: float) -> None:
        assert tuple(w.data_ptr() for w in a) in utils._LORA_A_PTR_DICT, "made before a graph is captured"
        asked.append(("shrink", parts["shrink"].get_lora_op_configs("shrink", batch=len(x))))
        out.zero_()
        for index, tokens in by_token(order, counts, ids):
            for number, weights in enumerate(a if index >= 0 else ()):
                out[number, tokens] = scale * (x[tokens].float() @ weights[index].float().T)

    def expand(h: Any, b: Any, y: Any, order: Any, counts: Any, ids: Any, offset_start: int, add_inputs: bool) -> None:
        assert tuple(w.data_ptr() for w in b) in utils._LORA_B_PTR_DICT, "made before a graph is captured"
        asked.append(("expand", parts["expand"].get_lora_op_configs(op_type="expand", batch=len(y))))
        for index, tokens in by_token(order, counts, ids):
            column = offset_start
            for number, weights in enumerate(b if index >= 0 else ()):
                width = weights.shape[1]
                y[tokens, column : column + width] += (h[number, tokens] @ weights[index].float().T).to(y.dtype)
                column += width

    ops: Any = modules[base]
    ops.lora_shrink, ops.lora_expand, ops.LoRAKernelMeta = shrink, expand, Meta
    modules["vllm.triton_utils"].HAS_TRITON = True  # type: ignore[attr-defined]
    return modules


def pretend_sglang(asked: list[tuple[str, Config]]) -> dict[str, ModuleType]:
    """Modules as sglang 0.5.23 has them."""
    folder = lora_sglang_space.FOLDERS[0]
    parents = {".".join(folder.split(".")[:depth]) for depth in range(1, 6)} | {"sglang.srt", "sglang.srt.lora"}
    parts: dict[str, Any] = {p: ModuleType(f"{folder}.chunked_sgmv_{p}") for p in ("shrink", "expand")}
    utils: Any = ModuleType("sglang.srt.lora.utils")
    utils.LoRABatchInfo = SimpleNamespace
    for part, module in parts.items():
        setattr(module, f"get_lora_{part}_config", lambda **_: {"BLOCK_N": 1})

    def rows(info: Any) -> Iterator[tuple[int, torch.Tensor]]:
        bounds = info.seg_indptr.tolist()
        for slot, start, end in zip(info.weight_indices.tolist(), bounds, bounds[1:], strict=False):
            assert end - start <= info.max_len
            if info.lora_ranks[slot]:
                yield slot, info.permutation[start:end].long()

    def shrink(x: Any, weights: Any, batch_info: Any, num_slices: int, split_k: int | None = None) -> Any:
        found = parts["shrink"].get_lora_shrink_config(K=1, R=1, num_slices=num_slices, chunk_size=batch_info.max_len)
        asked.append(("shrink", {"BLOCK_M": batch_info.max_len, **found, **({"SPLIT_K": split_k} if split_k else {})}))
        out = torch.full((len(x), weights.shape[1]), torch.nan, dtype=x.dtype)
        for slot, tokens in rows(batch_info):
            out[tokens] = (x[tokens].float() @ weights[slot].float().T).to(x.dtype)
        return out

    def expand(x: Any, weights: Any, batch_info: Any, slice_offsets: Any, max_slice_size: int, base_output: Any) -> Any:
        found = parts["expand"].get_lora_expand_config(K=1, R=1, num_slices=1, chunk_size=batch_info.max_len)
        asked.append(("expand", {"BLOCK_M": batch_info.max_len, **found}))
        rank, bounds = weights.shape[2], slice_offsets.tolist()
        for slot, tokens in rows(batch_info):
            for number, (start, end) in enumerate(itertools.pairwise(bounds)):
                hidden = x[tokens, number * rank : (number + 1) * rank].float()
                base_output[tokens, start:end] += (hidden @ weights[slot, start:end].float().T).to(base_output.dtype)
        return base_output

    parts["shrink"].chunked_sgmv_lora_shrink_forward = shrink
    parts["expand"].chunked_sgmv_lora_expand_forward = expand
    modules = [*(ModuleType(name) for name in parents), *parts.values(), utils]
    return {module.__name__: module for module in modules}


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, list[tuple[str, Config]]]:
    """A stand-in of a library, in a process that claims to interpret, and what its calls were given."""
    asked: list[tuple[str, Config]] = []
    package: str = request.param
    modules = (pretend_vllm if package == "vllm" else pretend_sglang)(asked)
    for name, module in modules.items():
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(lora_peers, "library", lambda package: LIBRARIES[package])
    return package, asked


def right(op: Op, point: Point, bind: Any) -> Prepared:
    """What a provider prepared for inputs with tokens that have no LoRA; its output must be right."""
    inputs = op.make_inputs(point, 3, CPU)
    inputs["indices"][1] = -1
    truth = Truth.of(op, point, inputs)
    buffers = {name: tensor.clone() for name, tensor in inputs.items()}
    prepared: Prepared = bind(point, buffers)
    prepared.begin()
    verdict = Verdict(op.tolerance(point))
    examine(verdict, prepared.run, buffers, truth, "inputs", prepared.finish)
    assert verdict.passed, verdict.faults
    return prepared


def point_of(name: str) -> Point:
    return LINEAR if name == "lora_linear" else POINT


@pytest.mark.parametrize("name", NAMES)
def test_given_parameters_reach_the_call_and_only_that(
    name: str, library: tuple[str, list[tuple[str, Config]]]
) -> None:
    package, asked = library
    op, point = find_op(name), point_of(name)
    tunable = op.tuning(f"{package}-tuned")
    config = tunable.space(point)[-1]
    if tunable.refine is not None:
        config = tunable.refine(point, config)[-1]
    prepared = right(op, point, lambda point, inputs: tunable.binding(point, inputs)(config))
    assert (prepared.config, prepared.config_source) == (config, "given")
    for part, given in asked:
        wanted = lora_peers.part_of(config, part) if name == "lora_linear" else config
        assert {key: value for key, value in wanted.items() if (key, value) != ("SPLIT_K", 1)}.items() <= given.items()
    assert [part for part, _ in asked] == ["shrink", "expand"] if name == "lora_linear" else len(asked) == 1
    asked.clear()
    Meta.specialized.clear()
    default = right(op, point, op.provider(package))
    assert not any(Meta.specialized), "an engine launches for all adapters unless one asks"
    assert default.config_source == "library"
    # what the library chooses itself, as before
    assert all(given.get("block_m", 64) == 64 and given.get("BLOCK_N", 1) == 1 for _, given in asked)


@pytest.mark.parametrize("name", NAMES)
def test_a_tuned_provider_takes_what_was_found_for_this_version(
    name: str, library: tuple[str, list[tuple[str, Config]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package, _ = library
    op, point = find_op(name), point_of(name)
    monkeypatch.setattr(configs, "ROOT", tmp_path)
    with pytest.raises(UnsupportedPoint, match=rf"{name} of {LIBRARIES[package]} is not tuned for cpu"):
        right(op, point, op.provider(f"{package}-tuned"))
    config = op.tuning(f"{package}-tuned").space(point)[0]
    save(tmp_path, name, LIBRARIES[package], point, config)
    prepared = right(op, point, op.provider(f"{package}-tuned"))
    assert (prepared.config, prepared.config_source) == (config, "tuned-exact")


def save(root: Path, name: str, library: str, point: Point, config: Config) -> None:
    path = configs.path_of("cpu", name, root, library)
    entry = configs.Entry(point, config, 1e-6, 1)
    configs.save(path, configs.Tuned(name, "cpu", "3.6.0", "made up", [entry], library))


def test_one_call_of_plain_points_is_the_two_tuned_kernels(
    library: tuple[str, list[tuple[str, Config]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package, asked = library
    monkeypatch.setattr(configs, "ROOT", tmp_path)
    op = find_op("lora_linear")
    assert op.tuning(f"{package}-tuned").space(SQUARE) == [], "nothing is searched twice"
    found = {}
    for part in lora_peers.PARTS:
        tunable = find_op(f"bgmv_{part}").tuning(f"{package}-tuned")
        found[part] = tunable.space(POINT)[-1]
        save(tmp_path, f"bgmv_{part}", LIBRARIES[package], POINT, found[part])
    prepared = right(op, SQUARE, op.provider(f"{package}-tuned"))
    assert (prepared.config, prepared.config_source) == (lora_peers.joined(found), "tuned-exact")
    assert [part for part, _ in asked] == ["shrink", "expand"]
    nearest = right(op, {**SQUARE, "rank": 16}, op.provider(f"{package}-tuned"))
    assert nearest.config_source == "tuned-nearest: shrink: tuned-nearest: rank 8; expand: tuned-nearest: rank 8"


@pytest.mark.parametrize("space", [lora_vllm_space, lora_sglang_space])
def test_the_spaces_fit_the_shape_and_the_card(space: Any) -> None:
    single = {**POINT, "batch": 1, "hidden_size": 4096, "rank": 64, "dtype": "bfloat16"}
    many = {**single, "batch": 16, "seq_len": 512, "num_loras": 8}
    rows = "block_m" if space is lora_vllm_space else "BLOCK_M"
    for part in (space.shrink, space.expand):
        assert {config[rows] for config in part(single)} == {16}, "one token fills no larger block"
        assert {config[rows] for config in part(many)} > {16}
        for point in (single, many, {**single, "rank": 24}, {**LINEAR, "hidden_size": 4096}):
            found = part(point)
            assert found and len(found) == len({tuple(config.items()) for config in found})


def test_what_won_on_an_h200_is_in_the_space() -> None:
    """Winners of a search of 2026 at decode and prefill: a space without them would starve the opponent."""
    decode = {**POINT, "batch": 32, "hidden_size": 14336, "rank": 64, "num_loras": 8, "dtype": "bfloat16"}
    prefill = {**decode, "batch": 16, "seq_len": 128}
    vllm = {"num_ctas": 1, "group_size_m": 8, "num_warps": 4}
    tiles = {"block_m": 16, "block_n": 64, "block_k": 128, "split_k": 64, "num_stages": 4}
    assert {**tiles, **vllm} in lora_vllm_space.shrink(decode)
    tiles = {"block_m": 32, "block_n": 64, "block_k": 256, "split_k": 8, "num_stages": 2}
    assert {**tiles, **vllm} in lora_vllm_space.shrink(prefill)
    tiles = {"block_m": 64, "block_n": 128, "block_k": 32, "num_stages": 2}
    assert {**tiles, "num_ctas": 1, "num_warps": 4} in lora_vllm_space.expand(prefill)
    tiles = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 128, "SPLIT_K": 16}
    assert {**tiles, "num_warps": 4, "num_stages": 4} in lora_sglang_space.shrink(decode)
    tiles = {"BLOCK_M": 16, "BLOCK_N": 128, "BLOCK_K": 64}
    assert {**tiles, "num_warps": 8, "num_stages": 2} in lora_sglang_space.expand(decode)
