"""Tuned peers on a GPU, where their libraries are installed: their candidates are right, captured and timed."""

from __future__ import annotations

import pytest
import torch

from smbench.worker.timing import Flush
from smbench.worker.tune import PointClock
from smbench_kernels.op import Point, UnsupportedPoint
from smbench_kernels.registry import op as find_op

pytestmark = pytest.mark.gpu
POINT: Point = {"batch": 40, "seq_len": 1, "hidden_size": 1024, "rank": 24, "num_loras": 5, "dtype": "bfloat16"}
POINTS: dict[str, Point] = {
    "bgmv_shrink": POINT,
    "bgmv_expand": POINT,
    "sgmv_shrink": {**POINT, "batch": 9, "seq_len": 130},
    "sgmv_expand": {**POINT, "batch": 9, "seq_len": 130},
    "lora_linear": {**POINT, "seq_len": 70, "projection": "qkv", "prefill": "half"},
}


@pytest.mark.parametrize("package", ["vllm", "sglang"])
@pytest.mark.parametrize("name", POINTS)
def test_candidates_of_a_library_are_right_and_timed(name: str, package: str) -> None:
    op, point = find_op(name), POINTS[name]
    tunable = op.tuning(f"{package}-tuned")
    assert tunable.library is not None
    try:
        tunable.library()
    except UnsupportedPoint as reason:
        pytest.skip(str(reason))
    device = torch.device("cuda")
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        clock = PointClock(op, tunable, point, 0, stream, Flush(device))
        space = tunable.space(point)
        few = [space[0], space[len(space) // 2], space[-1]]
        times = [clock(config, 3) for config in few]
        if tunable.refine is not None:
            refined = tunable.refine(point, few[1])
            times += [clock(refined[0], 3), clock(refined[-1], 3)]
    # a configuration may be wrong or too large for the card, not all of them
    assert any(seconds is not None and 1e-6 < seconds < 1e-2 for seconds in times), times
