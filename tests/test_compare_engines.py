"""Engine runs beside each other: each measurement under the metric that it is, and no other."""

from __future__ import annotations

from pathlib import Path

import pytest

import fake_engine_run as fake
from smbench import compare, comparison, sides
from smbench.cell import Cell
from smbench.errors import UsageError
from smbench.recipe import Profile
from smbench.result import Result


def slower_prefill(cell: Cell, profile: Profile) -> Result | None:
    """The same H200 with prefills, and so whole requests, that take longer."""
    result = fake.on_an_h200(cell, profile)
    if result is None or result.status != "ok":
        return result
    added = {"ttft": 1.0, "e2e_latency": 1.0, "tpot": 0.0}
    measurements = tuple(
        m.model_copy(update={"samples_s": tuple(s + added[m.name] for s in m.samples_s)}) for m in result.measurements
    )
    return result.model_copy(update={"measurements": measurements})


@pytest.fixture
def found(tmp_path: Path) -> compare.Comparison:
    a = fake.build(tmp_path / "a", "full", fake.on_an_h200)
    b = fake.build(tmp_path / "b", "full", slower_prefill)
    first, second = sides.load([str(a), str(b)], {})
    return compare.compare(first, second)


def test_every_measurement_is_compared_as_its_own_metric(found: compare.Comparison) -> None:
    assert {(row.measurement, row.metric) for row in found.rows} == {
        ("e2e_latency", "e2e_latency"),
        ("ttft", "ttft"),
        ("tpot", "tpot"),
    }
    verdicts = {
        name: {row.verdict for row in found.rows if row.measurement == name} for name in ("e2e_latency", "ttft", "tpot")
    }
    assert verdicts["tpot"] == {"same"}
    assert verdicts["ttft"] == {"slower"}


def test_a_comparison_prints_seconds_and_names_the_metric(found: compare.Comparison) -> None:
    text = comparison.render([found])
    assert "| ttft | generate | vllm-marlin |" in text
    assert "cells with a number" in text


def test_published_numbers_of_an_engine_name_their_series(tmp_path: Path) -> None:
    run = fake.build(tmp_path / "a", "full", fake.on_an_h200)
    with pytest.raises(
        UsageError, match=r"series of gptq-l40: vllm-gptq_marlin, vllm-gptq, sglang.*providers of a: vllm-"
    ):
        sides.load([str(run), "published:gptq-l40"], {})


def test_published_kernels_are_no_numbers_of_an_engine(tmp_path: Path) -> None:
    run = fake.build(tmp_path / "a", "full", fake.on_an_h200)
    with pytest.raises(UsageError, match="series of lora-rtx3090: none of e2e_latency, tpot, ttft"):
        sides.load([str(run), "published:lora-rtx3090"], {})
