"""The gate's third round: a provider bound to other integers must give another output, the right one."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
import torch

from smbench.worker import op as worker_op
from smbench.worker.op import Job, OpRunner
from smbench_kernels import paged_attention_definition as definition
from smbench_kernels.op import Inputs, Op, Point, Prepared
from smbench_kernels.registry import op as find_op

POINT: Point = {
    **{"heads": 4, "kv_heads": 2, "head_dim": 16, "dtype": "float16", "batch": 2, "seq_len": 30, "lengths": "equal"},
    **{"block_size": 4, "layout": "fair", "memory": "device", "address": "table"},
}


def writes(point: Point, inputs: Inputs, y: torch.Tensor) -> Prepared:
    """The truth of some inputs, written when called."""

    def run() -> None:
        y.copy_(definition.reference(point, inputs))

    return Prepared(run, {}, "library")


def honest(point: Point, inputs: Inputs) -> Prepared:
    """Writes the truth."""
    return writes(point, inputs, inputs["y"])


def table_of_the_first_binding(point: Point, inputs: Inputs) -> Prepared:
    """Keeps the block table that it saw first, wherever that came from."""
    kept = CACHE.setdefault("block_tables", inputs["block_tables"].clone())
    return writes(point, {**inputs, "block_tables": kept}, inputs["y"])


def table_where_there_should_be_none(point: Point, inputs: Inputs) -> Prepared:
    """Reads the table though addresses are to be computed; equal as long as the blocks are in order."""
    return honest({**point, "address": "table"}, inputs)


CACHE: dict[str, torch.Tensor] = {}
PROVIDERS = {
    function.__name__: f"{__name__}:{function.__name__}"
    for function in (honest, table_of_the_first_binding, table_where_there_should_be_none)
}


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> OpRunner:
    def found(_name: str) -> Op:
        return replace(find_op("paged_attention"), providers=PROVIDERS)

    monkeypatch.setattr(worker_op, "find_op", found)
    monkeypatch.setattr("smbench_kernels.op.load", lambda target: globals()[target.partition(":")[2]])
    CACHE.clear()
    return OpRunner(torch.device("cpu"), [], io.StringIO())


def outcome(runner: OpRunner, provider: str, **axes: int | str) -> dict[str, Any]:
    return runner.run(Job("cell", "paged_attention", provider, {**POINT, **axes}, 0, "verified only"))


def test_an_honest_provider_passes_three_rounds(runner: OpRunner) -> None:
    found = outcome(runner, "honest")
    assert found["status"] == "verified" and found["check"]["rounds"] == 3


def test_a_table_that_is_kept_is_seen(runner: OpRunner) -> None:
    found = outcome(runner, "table_of_the_first_binding")
    assert found["status"] == "incorrect" and "redrawn integers" in found["reason"]
    assert "inputs" not in found["reason"], "the first two rounds have nothing against it"


def test_a_table_that_should_not_matter_is_seen_to_matter(runner: OpRunner) -> None:
    found = outcome(runner, "table_where_there_should_be_none", layout="ordered", address="contiguous")
    assert found["status"] == "incorrect" and found["reason"].startswith("redrawn integers")


def test_the_next_provider_gets_the_first_integers_back(runner: OpRunner) -> None:
    for _ in range(2):
        assert outcome(runner, "honest")["status"] == "verified"
    assert runner._data is not None
    first = runner._data.truths[0].inputs["block_tables"]
    assert torch.equal(runner._data.sets[0]["block_tables"], first)
