"""The definition that LoRA kernels are judged by: inputs, float64 truth, counted work, and the torch baseline."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from smbench_kernels import lora, lora_torch
from smbench_kernels.op import Inputs, Point, Prepared

CPU = torch.device("cpu")
BASELINES = {
    "bgmv_shrink": lora_torch.bgmv_shrink,
    "bgmv_expand": lora_torch.bgmv_expand,
    "sgmv_shrink": lora_torch.sgmv_shrink,
    "sgmv_expand": lora_torch.sgmv_expand,
}
Baseline = Callable[[Point, Inputs], Prepared]


def point_of(batch: int = 4, seq_len: int = 3, hidden: int = 20, rank: int = 5, dtype: str = "float16") -> Point:
    return {"batch": batch, "seq_len": seq_len, "hidden_size": hidden, "rank": rank, "num_loras": 3, "dtype": dtype}


def make(name: str, point: Point, seed: int = 1, no_lora: int = 0) -> Inputs:
    return lora.make_inputs(
        point, seed, CPU, expands=name.endswith("expand"), per_token=name.startswith("bgmv"), no_lora=no_lora
    )


@pytest.mark.parametrize("seed", range(20))
def test_every_lora_is_drawn(seed: int) -> None:
    """The document's script never drew the last one."""
    assert set(lora.draw_indices(8, 8, 0, seed).tolist()) == set(range(8))
    assert set(lora.draw_indices(40, 8, 3, seed).tolist()) == set(range(-1, 8))


@pytest.mark.parametrize("seed", range(20))
def test_a_small_batch_draws_different_loras(seed: int) -> None:
    drawn = lora.draw_indices(5, 8, 2, seed).tolist()
    assert drawn.count(-1) == 2
    assert len(set(drawn)) == 4


def test_more_tokens_without_lora_than_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no_lora is 3, outside 0\.\.2"):
        lora.draw_indices(2, 8, 3, 0)


@pytest.mark.parametrize("name", BASELINES)
def test_a_seed_gives_the_same_inputs_and_another_seed_others(name: str) -> None:
    first, again, other = (make(name, point_of(), seed) for seed in (1, 1, 2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["x"], other["x"])


@pytest.mark.parametrize("name", BASELINES)
def test_a_call_changes_y_by_about_one(name: str) -> None:
    """What keeps float16 from overflowing however often calls accumulate."""
    point = point_of(batch=16, seq_len=8, hidden=512, rank=16)
    inputs = make(name, point)
    change = lora.reference(point, inputs) - inputs["y"].double()
    assert 0.8 < change.square().mean().sqrt() < 1.2
    assert change.abs().max() < 16


@pytest.mark.parametrize("name", BASELINES)
def test_reference_is_the_definition_written_out(name: str) -> None:
    point = point_of()
    inputs = make(name, point, no_lora=1)
    length = 1 if name.startswith("bgmv") else 3
    expected = inputs["y"].double()
    for token in range(12):
        index = int(inputs["indices"][token // length])
        if index >= 0:
            expected[token] += inputs["weights"][index].double() @ inputs["x"][token].double()
    torch.testing.assert_close(lora.reference(point, inputs), expected)


def test_work_counts_each_present_lora_once() -> None:
    point = point_of(batch=6, seq_len=1, hidden=100, rank=5)
    inputs = {**make("bgmv_shrink", point), "indices": torch.tensor([2, 2, 0, -1, 2, 0], dtype=torch.int32)}
    weights, x, y, indices = 2 * 5 * 100 * 2, 5 * 100 * 2, 5 * 5 * 4 * 2, 6 * 4
    assert lora.work(point, inputs).bytes == weights + x + y + indices
    assert lora.work(point, inputs).flops == 2 * 5 * 100 * 5
    inputs = {**make("bgmv_expand", point), "indices": inputs["indices"]}
    weights, x, y = 2 * 100 * 5 * 2, 5 * 5 * 4, 5 * 100 * 2 * 2
    assert lora.work(point, inputs).bytes == weights + x + y + indices


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("no_lora", [0, 2, 4])
@pytest.mark.parametrize(("name", "baseline"), BASELINES.items())
def test_torch_accumulates_and_skips_tokens_without_lora(
    name: str, baseline: Baseline, no_lora: int, dtype: str
) -> None:
    point = point_of(batch=4, seq_len=1 if name.startswith("bgmv") else 3, dtype=dtype)
    inputs = make(name, point, no_lora=no_lora)
    without = lora.token_indices(inputs) < 0
    inputs["y"][without] = float("nan")
    run = baseline(point, inputs).run
    tolerance = lora.tolerance(point)
    for _ in range(2):
        before, expected = inputs["y"].double(), lora.reference(point, inputs)
        run()
        change, error = (expected - before)[~without], (inputs["y"].double() - expected)[~without]
        assert error.norm() <= tolerance.relative * change.norm()
        assert bool(inputs["y"][without].isnan().all())
