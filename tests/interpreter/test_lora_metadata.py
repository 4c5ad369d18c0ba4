"""Our metadata of a step is what the operation defines, whatever the indices are at the time of the call."""

from __future__ import annotations

import pytest
import torch

from smbench.worker.gate import Truth, Verdict, examine, replace_integers, restore
from smbench_kernels import lora_metadata
from smbench_kernels.op import Point

CPU = torch.device("cpu")


@pytest.mark.parametrize(("batch", "seq_len", "loras"), [(1, 1, 8), (37, 1, 3), (5, 9, 4)])
def test_filling_follows_the_indices(batch: int, seq_len: int, loras: int) -> None:
    point: Point = {"batch": batch, "seq_len": seq_len, "num_loras": loras}
    inputs = lora_metadata.make_inputs(point, 1, CPU)
    buffers = {name: tensor.clone() for name, tensor in inputs.items()}
    prepared = lora_metadata.ours(point, buffers)
    verdict = Verdict(lora_metadata.OP.tolerance(point))
    # bound once: a captured graph would see the second indices in the same place
    for truth_inputs in (inputs, lora_metadata.redraw(point, inputs, 5)):
        truth = Truth.of(lora_metadata.OP, point, truth_inputs)
        restore(buffers, truth)
        replace_integers(buffers, truth)
        examine(verdict, prepared.run, buffers, truth, "indices", prepared.finish)
    assert verdict.passed and verdict.rounds == 2, verdict.faults
