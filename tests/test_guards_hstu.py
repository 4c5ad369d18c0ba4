"""Guards of the KV cache: they refute the document's published times and a cache that is not used, no honest run."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest

import fake_inference_run as fake
from small_runs import environment, session
from smbench import arch, published, resources
from smbench.analysis import analyse, summaries_of
from smbench.arch import Device
from smbench.findings import Evidence, Finding
from smbench.guards import GUARDS, names
from smbench.published import Published
from smbench.result import Result

FULL = fake.RECIPE.profile["full"]
CELLS = fake.RECIPE.cells("full")


def device(name: str) -> Device | None:
    return arch.load(resources.archs_file()).device_named(name)


def findings(guard: str, results: Sequence[Result], card: Device | None) -> list[Finding]:
    seen = Evidence(fake.RECIPE, card, results, summaries_of(results), [environment()], [session()])
    return list(GUARDS[guard](seen))


def results(outcome: object = fake.on_a_card) -> list[Result]:
    assert callable(outcome)
    return [outcome(cell, FULL) for cell in CELLS]


def file(name: str) -> Published:
    return published.load(published.find(name, resources.recipes_dir() / "published"))


def of_published(name: str, edition: str) -> list[Result]:
    """The published times of the block as if this recipe had measured them, as uncertain as they were read off."""
    found = []
    for point in file(name).points():
        if (point.at["op"], point.at["edition"]) == ("hstu_block", edition):
            cell = fake.block_cell("cache", point.at["batch"], point.at["total_len"], point.at["new_len"])
            assert cell is not None
            spread = (1 - point.uncertainty, 1.0, 1 + point.uncertainty)
            found.append(fake.timed(cell, FULL, point.value, spread))
    assert len(found) >= 19
    return found


@pytest.mark.parametrize("card", [device("NVIDIA H200"), None])
@pytest.mark.parametrize("guard", ["sensitivity", "kv_accounting"])
def test_an_honest_run_has_no_finding(guard: str, card: Device | None) -> None:
    assert findings(guard, results(), card) == []


def test_published_times_of_the_document_are_refuted() -> None:
    found = findings("sensitivity", of_published("hstu-inference-l20", "document"), device("NVIDIA L20"))
    refuted = [finding for finding in found if finding.severity == "refuted"]
    said = {finding.cell_id: finding.message for finding in refuted}
    # in both figures, and at the very point of the claim of 5 to 10 times
    for batch in (1, 8):
        cell = fake.block_cell("cache", batch, 2048, 128)
        assert cell is not None and cell.cell_id in said
    cell = fake.block_cell("cache", 1, 2048, 128)
    assert cell is not None
    for words in (
        "128 new of 128 tokens (33.56 GFLOP) take 0.75 ms",
        "128 new of 2048 tokens (57.72 GFLOP) take 0.75 ms",
        "256 new of 256 tokens (46.18 GFLOP) take 0.88 ms, which is no more work",
    ):
        assert words in said[cell.cell_id]


def test_corrected_times_pass() -> None:
    assert findings("sensitivity", of_published("hstu-inference-l20", "corrected"), device("NVIDIA L20")) == []


def test_the_later_cards_times_are_refuted_where_they_can_be() -> None:
    results_ = of_published("hstu-inference-b200", "later")
    found = findings("sensitivity", results_, None)
    batches = {r.cell.axes["batch"] for r in results_ for f in found if f.cell_id == r.cell_id}
    # at batch 1 it shows no point with less work that takes longer
    assert (batches, {finding.severity for finding in found}) == ({8}, {"refuted"})


def test_a_cache_that_is_ignored_is_refuted_and_loses_its_numbers() -> None:
    made = results(fake.ignoring_the_cache)
    card = device("NVIDIA H200")
    found = findings("sensitivity", made, card)
    at_fault = {result.cell_id: result.cell for result in made}
    refuted = [at_fault[f.cell_id or ""] for f in found if f.severity == "refuted"]
    assert {cell.provider for cell in refuted} == {"cache", "cache-graph"}
    analysis = analyse(fake.RECIPE, "full", CELLS, {r.cell_id: r for r in made}, [environment()], [session()], card)
    rows = [row for row in analysis.rows if row.cell in refuted]
    assert rows and all((row.status, row.summaries) == ("invalid", {}) for row in rows)


def test_times_that_launches_hold_up_are_no_fault() -> None:
    """Nothing makes them longer, so nothing follows from their not growing."""
    flat = [fake.timed(cell, FULL, 4e-4) for cell in CELLS if cell.provider != "recompute"]
    assert findings("sensitivity", flat, device("NVIDIA H200")) == []


def test_a_host_that_is_slower_at_some_times_is_no_fault() -> None:
    """Launches took 3.3, 4.8 or 6.5 ms on one machine, by the cell and not by the work; what exceeds them is work."""
    launches = (3.3e-3, 4.8e-3, 6.5e-3)
    held = []
    for number, cell in enumerate(cell for cell in CELLS if cell.subject == "hstu_block" and cell.provider == "cache"):
        axes = fake.integers(cell)
        work_s = fake.flops(axes, axes["total"], axes["new"]) / fake.FLOPS_PER_S
        held.append(fake.timed(cell, FULL, max(work_s, launches[number * 7 % 3])))
    assert len({result.measurements[0].samples_s[1] for result in held}) > 3
    assert findings("sensitivity", held, device("NVIDIA H200")) == []


def test_unsteady_times_prove_nothing() -> None:
    """Not even where the published numbers would: a machine that others use too slows down single cells."""
    noisy = [
        fake.timed(result.cell, FULL, result.measurements[0].samples_s[1], (0.5, 1.0, 1.0, 1.0, 2.0))
        for result in of_published("hstu-inference-l20", "document")
    ]
    assert findings("sensitivity", noisy, device("NVIDIA L20")) == []


def test_a_cache_that_gains_nothing_is_called_so() -> None:
    """The provider computes the cached tokens again."""
    made = []
    for cell in CELLS:
        axes = fake.integers(cell)
        again = cell.subject == "hstu_block" and cell.provider == "cache"
        taken = fake.flops(axes, axes["total"], axes["total"]) / fake.FLOPS_PER_S + 1e-5 if again else None
        made.append(fake.timed(cell, FULL, taken))
    found = findings("sensitivity", made, device("NVIDIA H200"))
    assert found and {f.severity for f in found} == {"warning"}
    assert all(f.message.startswith("cache gains nothing from its cache: ") for f in found)


FAULTS = {
    "the published fault": (
        {"attended_tokens": 7 * 8 * 128},
        r"7168 tokens were attended to, and 7 steps × 8 users × ",
    ),
    "tokens lost": ({"device_tokens": 0}, "0 tokens found on the device \\+ 0 on the host \\+ 7168 new ones are not"),
    "computed again": (
        {"device_tokens": 0, "new_tokens": 7 * 8 * 4096},
        "0 tokens were found on the device, and 222208 are cached there",
    ),
    "found elsewhere": (
        {"device_tokens": 0, "host_tokens": 7 * 8 * 3968},
        "0 tokens were found on the device, and 222208 are cached there",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_counts_that_contradict_the_point_are_refuted(fault: str) -> None:
    cell = fake.block_cell("cache", 8, 4096, 128)
    assert cell is not None
    changes, message = FAULTS[fault]
    result = fake.timed(cell, FULL)
    wrong = result.model_copy(update={"counts": {**result.counts, **changes}})
    (finding,) = findings("kv_accounting", [wrong], None)
    assert (finding.severity, finding.cell_id) == ("refuted", cell.cell_id)
    assert re.search(message, finding.message)


def test_counts_that_are_not_there_are_missed() -> None:
    cell = fake.block_cell("cache", 8, 4096, 128)
    assert cell is not None
    silent = fake.timed(cell, FULL).model_copy(update={"counts": {}})
    (finding,) = findings("kv_accounting", [silent], None)
    assert (finding.severity, finding.cell_id) == ("warning", None)


def test_the_guards_are_named_for_recipes_with_a_cache_alone() -> None:
    assert {"sensitivity", "kv_accounting"} <= set(names("op", ["hstu_block"]))
    assert not {"sensitivity", "kv_accounting"} & set(names("op", ["paged_attention"]))
