"""HSTU's operations through the worker on a card: every provider that is here passes its gate; a step is weighed."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import pytest
import torch

from smbench.memorysnapshot import read
from smbench.worker.op import Job, OpRunner
from smbench.worker.timing import Spec
from smbench_kernels.registry import op as find_op

pytestmark = pytest.mark.gpu

POINT: dict[str, int | str] = {
    **{"batch": 5, "seq_len": 300, "lengths": "jagged", "mask": "contextual", "heads": 2, "head_dim": 256},
    "dtype": "bfloat16",
}
STEP = Spec("step", "graph", "cold", calls=1, replays=1, warmup=1, samples=5, min_samples=3, window_s=0.1)
HALVES = [
    Spec(part, "event", "warm", calls=1, replays=1, warmup=2, samples=5, min_samples=3, window_s=0.1, part=part)
    for part in ("forward", "backward")
]
LAYERS = ("hstu_layer", "hstu_layer_silu_u")
CELLS = [
    (name, provider)
    for name in ("hstu_attention_forward", "hstu_attention_backward", *LAYERS)
    for provider in find_op(name).providers
    # the definition is what all are compared with
    if provider != "torch"
]


def outcome(name: str, provider: str, native: Path | None = None, **axes: int | str) -> dict[str, Any]:
    point = {**POINT, **axes} | ({"embedding": 128, "layers": 2} if name in LAYERS else {})
    runner = OpRunner(torch.device("cuda"), [STEP, *HALVES], io.StringIO(), native)
    return runner.run(Job("0123456789abcdef", name, provider, point, 3, None))


@pytest.mark.parametrize(("name", "provider"), CELLS)
@pytest.mark.parametrize("mask", ["causal", "contextual"])
def test_every_provider_that_is_here_is_right_and_timed(name: str, provider: str, mask: str) -> None:
    found = outcome(name, provider, mask=mask)
    if found["status"] == "unsupported":
        pytest.skip(str(found["reason"]))
    assert (found["status"], found["reason"]) == ("ok", None)
    timed = [row["name"] for row in found["measurements"]]
    assert timed == (["step", "forward", "backward"] if name in LAYERS else ["step"])


def test_a_step_is_weighed_and_its_course_kept(tmp_path: Path) -> None:
    kept = {provider: outcome("hstu_layer", provider, tmp_path / provider) for provider in ("fused", "fused-none")}
    for provider, found in kept.items():
        memory = found["memory"]
        path = tmp_path / provider / "0123456789abcdef.memory.pickle"
        assert memory["method"] == "allocator" and memory["snapshot"] == f"{provider}/{path.name}"
        assert memory["snapshot_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        course = memory["timeline_bytes"]
        assert list(read(path.read_bytes(), path.name).bytes) == course
        # the allocator's own two counts are where its history says, which has sizes as they were asked for: blocks are
        # rounded up to 512 bytes, and what is left of a large one stays with it up to 1 MiB
        for counted, drawn in (
            (memory["saved_bytes"], course[memory["backward_at"] - 1]),
            (memory["peak_bytes"], max(course)),
        ):
            assert 0 <= counted - drawn < 0.05 * counted
    assert kept["fused-none"]["memory"]["saved_bytes"] < kept["fused"]["memory"]["saved_bytes"] / 2
