"""lora_linear's portable kernels compute the definition: slices, batches that mix prefill and decode, no LoRA."""

from __future__ import annotations

import pytest
import torch

from smbench_kernels import lora, lora_linear, lora_linear_triton
from smbench_kernels.op import Point, UnsupportedPoint
from smbench_kernels.registry import op as find_op

CPU = torch.device("cpu")
OP = find_op("lora_linear")


def point_of(**axes: int | str) -> Point:
    plain: dict[str, int | str] = {"batch": 5, "seq_len": 1, "hidden_size": 256, "rank": 16, "num_loras": 3}
    return {**plain, "dtype": "float16", "projection": "square", "prefill": "all", **axes}


@pytest.mark.parametrize(
    "axes",
    [
        {"projection": "qkv", "rank": 12},
        {"projection": "gate-up", "batch": 3, "seq_len": 19, "prefill": "one", "hidden_size": 130, "dtype": "bfloat16"},
        {"batch": 2, "seq_len": 21, "rank": 70},
    ],
    ids=str,
)
def test_the_default_accumulates_the_definition(axes: dict[str, int | str], seed: int) -> None:
    point = point_of(**axes)
    inputs = lora_linear.make_inputs(point, seed, CPU, no_lora=1)
    prepared = OP.provider("smbench")(point, inputs)
    assert (prepared.config, prepared.config_source) == (lora_linear_triton.CONFIG, "default")
    for turn in range(2):
        # other LoRAs with the next step
        inputs["indices"].copy_(lora.draw_indices(len(inputs["indices"]), 3, 1, seed + turn))
        prepared.begin()
        before, expected = inputs["y"].clone(), OP.expected(point, inputs)["y"]
        prepared.run()
        used = lora.token_indices(inputs) >= 0
        assert torch.equal(inputs["y"][~used], before[~used])
        error, change = inputs["y"].double() - expected, expected - before.double()
        assert error.norm() <= OP.tolerance(point).relative * change.norm()


def test_kernels_for_a_gpu_are_refused_without_one(seed: int) -> None:
    point = point_of()
    inputs = lora_linear.make_inputs(point, seed, CPU)
    for config in OP.tuning().space(point)[::20]:
        with pytest.raises(UnsupportedPoint, match="NVIDIA GPU"):
            OP.tuning().prepare(point, inputs, config)
