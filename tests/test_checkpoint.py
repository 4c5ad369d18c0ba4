"""Packed weights mean what the format says; a checkpoint from a seed is whole, equal everywhere, and makes sense."""

from __future__ import annotations

import json
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from smbench import checkpointfiles, models
from smbench.shapes import ARCHITECTURES, GROUP, HUB, QUANTIZATION, SHAPES
from smbench.worker import checkpoint, gptq
from smbench.worker.noise import LARGEST, SPREAD, bell

CPU = torch.device("cpu")
TINY = SHAPES["tiny"]


def nibbles(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randint(0, 16, (rows, columns), dtype=torch.int32, generator=torch.Generator().manual_seed(seed))


def slow_weight(packed: gptq.Packed, row: int, column: int) -> float:
    """One weight by the definition, with Python's own integers."""
    word = int(packed.qweight[row // 8, column]) & 0xFFFFFFFF
    value = (word >> (4 * (row % 8))) & 15
    group = int(packed.g_idx[row])
    zeros = int(packed.qzeros[group, column // 8]) & 0xFFFFFFFF
    zero = ((zeros >> (4 * (column % 8))) & 15) + 1
    return (value - zero) * float(packed.scales[group, column])


@given(rows=st.integers(1, 6), columns=st.integers(1, 20), seed=st.integers(0, 2**31))
def test_unpacking_undoes_packing(rows: int, columns: int, seed: int) -> None:
    values = nibbles(8 * rows, columns, seed)
    words = gptq.pack(values)
    assert (words.dtype, words.shape) == (torch.int32, (rows, columns))
    assert torch.equal(gptq.unpack(words), values)


def test_the_lowest_row_lies_in_the_lowest_bits() -> None:
    values = torch.arange(8, dtype=torch.int32)[:, None]
    assert int(gptq.pack(values)) == 0x76543210
    assert int(gptq.pack(values + 8)) & 0xFFFFFFFF == 0xFEDCBA98


@settings(max_examples=25)
@given(groups=st.integers(1, 3), eights=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_dequantized_weights_are_those_of_the_definition(groups: int, eights: int, seed: int) -> None:
    """Any zero points and any order of groups, not only those of symmetric quantization."""
    rows, columns = 16 * groups, 8 * eights
    generator = torch.Generator().manual_seed(seed)
    packed = gptq.Packed(
        qweight=gptq.pack(nibbles(rows, columns, seed)),
        qzeros=gptq.pack(nibbles(columns, groups, seed + 1)).T.contiguous(),
        scales=torch.rand(groups, columns, generator=generator).to(torch.float16),
        g_idx=torch.randint(0, groups, (rows,), dtype=torch.int32, generator=generator),
    )
    weight = gptq.dequantize(packed.qweight, packed.qzeros, packed.scales, packed.g_idx)
    assert (weight.dtype, weight.shape) == (torch.float32, (columns, rows))
    expected = [[slow_weight(packed, row, column) for row in range(rows)] for column in range(columns)]
    assert weight.tolist() == expected


def test_other_widths_are_refused() -> None:
    words = torch.zeros((1, 8), dtype=torch.int32)
    with pytest.raises(ValueError, match="only 4 bits"):
        gptq.dequantize(words, words, words.half(), words[0], bits=8)


@settings(max_examples=25)
@given(groups=st.integers(1, 3), deviation=st.floats(1e-3, 1.0), seed=st.integers(0, 2**31))
def test_quantizing_rounds_to_the_nearest_step(groups: int, deviation: float, seed: int) -> None:
    weight = deviation * torch.randn(groups * GROUP, 16, generator=torch.Generator().manual_seed(seed))
    packed = gptq.quantize(weight, GROUP)
    back = gptq.dequantize(packed.qweight, packed.qzeros, packed.scales, packed.g_idx).T
    step = packed.scales.float().repeat_interleave(GROUP, dim=0)
    # the scale itself is rounded to float16, which moves the largest weight of a group by a little more
    assert ((weight - back).abs() <= step * (0.5 + 7 * 2**-11)).all()
    assert packed.qzeros.unique().tolist() == [0x77777777]


def test_a_group_of_zeros_stays_zero() -> None:
    packed = gptq.quantize(torch.zeros(GROUP, 8), GROUP)
    assert gptq.dequantize(packed.qweight, packed.qzeros, packed.scales, packed.g_idx).count_nonzero() == 0


def test_draws_do_not_depend_on_how_they_are_cut() -> None:
    whole = bell(3, "layer", range(1000), CPU)
    pieces = torch.cat([bell(3, "layer", range(start, start + 125), CPU) for start in range(0, 1000, 125)])
    assert torch.equal(whole, pieces)


def test_draws_are_bell_shaped_and_unlike_for_other_seeds_and_names() -> None:
    drawn = bell(0, "a", range(200_000), CPU).double()
    assert abs(drawn.mean()) < 5 * SPREAD / 200_000**0.5
    assert drawn.std() == pytest.approx(SPREAD, rel=0.01)
    assert drawn.abs().max() <= LARGEST
    # two thirds lie within one deviation of a normal distribution
    assert ((drawn.abs() < SPREAD).double().mean() - 0.683).abs() < 0.02
    for other in (bell(1, "a", range(200_000), CPU), bell(0, "b", range(200_000), CPU), drawn.roll(1)):
        assert torch.corrcoef(torch.stack([drawn, other.double()]))[0, 1].abs() < 0.02


def test_the_numbers_of_a_seed_never_change() -> None:
    """They name the weights: other numbers are another format, and results of both are not the same cell."""
    assert bell(0, "model.norm.weight", range(8), CPU).tolist() == [-244, -33, 40, -308, -104, 221, 109, -256]
    assert checkpoint.FORMAT == models.FORMAT == 2


@pytest.mark.gpu
def test_a_gpu_draws_the_same_bytes() -> None:
    part = next(part for part in next(iter(checkpoint.shards(TINY))) if isinstance(part, checkpoint.Linear))
    here, there = (checkpoint.draw(part, 0, torch.device(device)) for device in ("cpu", "cuda"))
    assert all(torch.equal(here[name], there[name].cpu()) for name in here)


@pytest.mark.parametrize("name", SHAPES)
def test_the_files_of_a_shape_hold_every_tensor_once_and_as_many_bytes_as_predicted(name: str) -> None:
    shape = SHAPES[name]
    files = checkpoint.shards(shape)
    parts = [part for file in files for part in file]
    assert len({part.name for part in parts}) == len(parts)
    total = sum(map(checkpoint.tensor_bytes, parts))
    facts = checkpointfiles.checked_facts(shape.config, name, plain=True)
    # norms, biases and the index of groups are what the estimate leaves out
    assert total == pytest.approx(facts.resident_bytes("float16"), rel=0.02)
    linear = [part for part in parts if isinstance(part, checkpoint.Linear)]
    assert sum(part.rows * part.columns for part in linear) == facts.linear_parameters


@pytest.mark.parametrize("name", SHAPES)
def test_every_layer_of_a_shape_suits_every_kernel(name: str) -> None:
    """Marlin wants outputs in multiples of 64 after fusing, Machete of 128, all of them whole groups of inputs."""
    layer = [part for file in checkpoint.shards(SHAPES[name]) for part in file if ".layers.0." in f"{part.name}."]
    linear = {part.name.rpartition(".")[2]: part for part in layer if isinstance(part, checkpoint.Linear)}
    fused = {
        "qkv": sum(linear[module].columns for module in ("q_proj", "k_proj", "v_proj")),
        "o": linear["o_proj"].columns,
        "gate_up": linear["gate_proj"].columns + linear["up_proj"].columns,
        "down": linear["down_proj"].columns,
    }
    assert all(part.rows % GROUP == 0 for part in linear.values())
    assert {module for module, columns in fused.items() if columns % 128} == set()


def test_known_models_of_the_hub_are_pinned_and_have_a_shape() -> None:
    for name, shape in HUB.items():
        assert models.REVISION.fullmatch(name.partition("@")[2])
        assert shape in SHAPES
    assert set(SHAPES["tiny"].config["architectures"]) <= set(ARCHITECTURES)


def test_a_checkpoint_is_what_its_shape_says(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    written = checkpoint.write(TINY, 0, tmp_path / "tiny", CPU)
    assert sorted(path.name for path in (tmp_path / "tiny").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    index = json.loads((tmp_path / "tiny" / checkpointfiles.INDEX).read_text(encoding="utf-8"))
    tensors = safetensors.load_file(tmp_path / "tiny" / "model-00001-of-00001.safetensors")
    assert sum(tensor.nbytes for tensor in tensors.values()) == written == index["metadata"]["total_size"]
    assert set(index["weight_map"]) == set(tensors)
    assert checkpointfiles.faults(tmp_path / "tiny") == []
    config = checkpointfiles.read_config(tmp_path / "tiny")
    assert config["quantization_config"] == dict(QUANTIZATION)
    assert checkpointfiles.checked_facts(config, "tiny").layers == TINY.num_hidden_layers
    # the same seed gives the same bytes, another one does not
    checkpoint.write(TINY, 0, tmp_path / "again", CPU)
    checkpoint.write(TINY, 1, tmp_path / "other", CPU)
    hashes = [checkpointfiles.content_hash(tmp_path / name) for name in ("tiny", "again", "other")]
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_checkpoint_that_is_not_quantized_is_bfloat16_throughout(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    checkpoint.write(SHAPES["tiny-bf16"], 0, tmp_path / "plain", CPU)
    checkpoint.write(TINY, 0, tmp_path / "packed", CPU)
    assert checkpointfiles.faults(tmp_path / "plain") == []
    assert "quantization_config" not in checkpointfiles.read_config(tmp_path / "plain")
    plain, packed = (
        safetensors.load_file(tmp_path / name / "model-00001-of-00001.safetensors") for name in ("plain", "packed")
    )
    assert {tensor.dtype for tensor in plain.values()} == {torch.bfloat16}
    for module, rows, columns in (("self_attn.k_proj", 256, 128), ("mlp.down_proj", 768, 256)):
        name = f"model.layers.3.{module}"
        weight = plain[f"{name}.weight"]
        # the layout of torch's Linear, at the scale of the packed one
        assert weight.shape == (columns, rows)
        twin = gptq.dequantize(*(packed[f"{name}.{tensor}"] for tensor in ("qweight", "qzeros", "scales", "g_idx")))
        assert weight.float().std() == pytest.approx(float(twin.std()), rel=0.05)


def test_layers_are_drawn_at_the_scale_that_keeps_activations_near_one() -> None:
    """A layer turns inputs of deviation one into outputs of its gain: nothing overflows, nothing fades."""
    inputs = torch.randn(64, TINY.hidden_size, generator=torch.Generator().manual_seed(0))
    parts = {part.name: part for file in checkpoint.shards(TINY) for part in file}
    for module, gain in (("self_attn.q_proj", 1.7), ("self_attn.v_proj", 1.0), ("self_attn.o_proj", 8**-0.5)):
        name = f"model.layers.1.{module}"
        drawn = checkpoint.draw(parts[name], 0, CPU)
        packed = gptq.Packed(*(drawn[f"{name}.{tensor}"] for tensor in ("qweight", "qzeros", "scales", "g_idx")))
        weight = gptq.dequantize(packed.qweight, packed.qzeros, packed.scales, packed.g_idx)
        assert (inputs @ weight.T).std() == pytest.approx(gain, rel=0.1)
    norm = checkpoint.draw(parts["model.norm.weight"], 0, CPU)["model.norm.weight"].float()
    assert norm.mean() == pytest.approx(1.0, abs=0.05)


def test_a_disk_without_room_is_refused_before_anything_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(0, 0, 10**9))
    monkeypatch.setattr(checkpoint, "draw", lambda *_: pytest.fail("drawn"))
    with pytest.raises(OSError, match=r"has 1\.0 GB free, and the checkpoint takes 19\.3 GB in \d+ files"):
        checkpoint.write(SHAPES["qwen2.5-32b"], 0, tmp_path / "model", CPU)
    assert list(tmp_path.iterdir()) == []


def test_what_breaks_while_writing_leaves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise OSError("the disk broke")

    (tmp_path / "tiny.unfinished").mkdir()
    (tmp_path / "tiny.unfinished" / "old").touch()
    monkeypatch.setattr(checkpoint, "_write_tensors", broken)
    with pytest.raises(OSError, match="the disk broke"):
        checkpoint.write(TINY, 0, tmp_path / "tiny", CPU)
    assert not (tmp_path / "tiny").exists()
    assert not (tmp_path / "tiny.unfinished" / "old").exists()


def test_a_checkpoint_that_is_there_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    with pytest.raises(FileExistsError):
        checkpoint.write(TINY, 0, tmp_path / "tiny", CPU)
