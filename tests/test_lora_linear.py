"""What a layer's one LoRA call is judged by, and the metadata of a step: definitions, truth, least work, baselines."""

from __future__ import annotations

import pytest
import torch

from smbench_kernels import lora, lora_linear, lora_metadata, lora_torch
from smbench_kernels.lora_linear import LinearSizes
from smbench_kernels.op import Point

CPU = torch.device("cpu")


def point_of(projection: str = "square", prefill: str = "all", **axes: int | str) -> Point:
    sizes: Point = {"batch": 5, "seq_len": 3, "hidden_size": 16, "rank": 3, "num_loras": 3}
    return {**sizes, "dtype": "float16", "projection": projection, "prefill": prefill, **axes}


def test_slices_have_the_sizes_of_a_model() -> None:
    at = {name: lora_linear.slices_of(point_of(name, hidden_size=4096)) for name in lora_linear.PROJECTIONS}
    assert at == {"square": (4096,), "qkv": (4096, 1024, 1024), "gate-up": (14336, 14336)}
    with pytest.raises(ValueError, match="hidden_size 10 has no whole slices for projection 'qkv'"):
        lora_linear.slices_of(point_of("qkv", hidden_size=10))


@pytest.mark.parametrize(
    ("prefill", "lengths"), [("all", (3, 3, 3, 3, 3)), ("half", (3, 3, 3, 1, 1)), ("one", (3, 1, 1, 1, 1))]
)
def test_a_batch_mixes_prefill_and_decode(prefill: str, lengths: tuple[int, ...]) -> None:
    assert LinearSizes.of(point_of(prefill=prefill)).lengths == lengths
    inputs = lora_linear.make_inputs(point_of(prefill=prefill), 1, CPU)
    assert tuple(inputs["seq_lens"].tolist()) == lengths
    assert inputs["seq_starts"].tolist() == [sum(lengths[:number]) for number in range(5)]
    assert len(inputs["x"]) == len(inputs["y"]) == sum(lengths)


@pytest.mark.parametrize("projection", lora_linear.PROJECTIONS)
@pytest.mark.parametrize("prefill", lora_linear.PREFILLS)
def test_reference_is_the_definition_written_out(projection: str, prefill: str) -> None:
    point = point_of(projection, prefill)
    inputs = lora_linear.make_inputs(point, 1, CPU, no_lora=1)
    expected = inputs["y"].double()
    for token, index in enumerate(lora.token_indices(inputs).tolist()):
        if index < 0:
            continue
        x, changes = inputs["x"][token].double(), []
        for number in range(len(lora_linear.slices_of(point))):
            hidden = inputs[f"a{number}"][index].double() @ x
            changes.append(inputs[f"b{number}"][index].double() @ hidden)
        expected[token] += torch.cat(changes)
    torch.testing.assert_close(lora_linear.reference(point, inputs), expected)


def test_a_call_changes_y_by_about_one() -> None:
    point = point_of("qkv", batch=16, seq_len=8, hidden_size=512, rank=16)
    inputs = lora_linear.make_inputs(point, 1, CPU)
    change = lora_linear.reference(point, inputs) - inputs["y"].double()
    assert 0.8 < change.square().mean().sqrt() < 1.2


def test_least_work_has_no_intermediate() -> None:
    point = point_of("qkv", batch=4, seq_len=1)
    inputs = lora_linear.make_inputs(point, 1, CPU)
    inputs = {**inputs, "indices": torch.tensor([2, 2, -1, 0], dtype=torch.int32)}
    # two LoRAs are present, three tokens have one; 16 + 4 + 4 outputs
    weights, x, y, indices = 2 * (3 * 3 * 16 + 24 * 3) * 2, 3 * 16 * 2, 3 * 24 * 2 * 2, 4 * 4
    assert lora_linear.work(point, inputs).bytes == weights + x + y + indices
    assert lora_linear.work(point, inputs).flops == 2 * 3 * (3 * 3 * 16 + 24 * 3)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("projection", "prefill"), [("square", "all"), ("qkv", "half"), ("gate-up", "one")])
def test_torch_accumulates_and_skips_tokens_without_lora(projection: str, prefill: str, dtype: str) -> None:
    point = point_of(projection, prefill, dtype=dtype)
    inputs = lora_linear.make_inputs(point, 1, CPU, no_lora=2)
    without = lora.token_indices(inputs) < 0
    inputs["y"][without] = float("nan")
    run, tolerance = lora_torch.lora_linear(point, inputs).run, lora.tolerance(point)
    for _ in range(2):
        before, expected = inputs["y"].double(), lora_linear.reference(point, inputs)
        run()
        change, error = (expected - before)[~without], (inputs["y"].double() - expected)[~without]
        assert error.norm() <= tolerance.relative * change.norm()
        assert bool(inputs["y"][without].isnan().all())


@pytest.mark.parametrize(
    ("axes", "family"),
    [
        ({"seq_len": 1}, "bgmv"),
        ({"seq_len": 1, "prefill": "one"}, "bgmv"),
        ({}, "sgmv"),
        ({"prefill": "half"}, None),
        ({"projection": "qkv", "seq_len": 1}, None),
    ],
)
def test_what_shrink_and_expand_alone_do_too_is_known(axes: Point, family: str | None) -> None:
    point = {**point_of(), **axes}
    assert lora_linear.plain_op(point) == family
    assert lora_linear.plain_point(point).keys() == lora.AXES.keys()


def test_metadata_is_the_stable_order_of_the_tokens_that_have_a_lora() -> None:
    point: Point = {"batch": 4, "seq_len": 2, "num_loras": 3}
    inputs = lora_metadata.make_inputs(point, 1, CPU)
    inputs = {**inputs, "indices": torch.tensor([2, -1, 0, 2], dtype=torch.int32)}
    assert lora_metadata.reference(point, inputs).tolist() == [4, 5, 0, 1, 6, 7, 0, 0]
    prepared = lora_metadata.baseline(point, inputs)
    prepared.run()
    prepared.finish()
    assert inputs["y"].tolist() == [4, 5, 0, 1, 6, 7, 0, 0]


def test_metadata_is_drawn_anew_with_sequences_without_a_lora() -> None:
    point: Point = {"batch": 8, "seq_len": 2, "num_loras": 3}
    inputs = lora_metadata.make_inputs(point, 1, CPU)
    redrawn = lora_metadata.redraw(point, inputs, 5)
    assert (redrawn["indices"] < 0).sum() == 2
    assert not torch.equal(redrawn["indices"], inputs["indices"])
