"""Our cells and the results of other tools, put beside each other by what was really done. Pure.

Neither side's cell ids can be the other's: a foreign file says part of what a cell of ours does. So a workload is
matched by every fact that both sides state, and each fact that keeps two apart is named. Numbers are matched by metric
and definition. Does not own verdicts (`verdicts`), nor what a file says (`importing`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from smbench import rates
from smbench.cell import AxisValue, Cell
from smbench.compare import Entry, Incomparable, Side
from smbench.errors import UsageError
from smbench.imported import ImportedRun, Measure
from smbench.metrics import definition_of
from smbench.result import Result, Serving, Status
from smbench.verdicts import Timing

WORKLOAD = (
    "workload", "model", "dataset", "batch", "num_prompts", "input_len", "output_len", "request_rate",
    "max_concurrency", "tensor_parallel", "dtype", "engine",
)  # fmt: skip
"""Facts that make two results one workload, where both sides state them."""
MEAN = " (mean)"
Facts = Mapping[str, AxisValue]


@dataclass(frozen=True, slots=True)
class Loaded:
    """One result of either kind, ready to be matched."""

    cell: Cell
    status: Status
    reason: str | None
    facts: Facts
    timings: Mapping[str, Timing]
    """By metric; with the definition in the name where it is not what our numbers of the workload count."""

    def entry(self, cell: Cell | None = None, timings: Mapping[str, Timing] | None = None) -> Entry:
        """The entry of a side; under another cell, or with fewer numbers."""
        return Entry(cell or self.cell, self.status, self.reason, self.timings if timings is None else timings)


def of_import(run: ImportedRun, label: str) -> Loaded:
    """A foreign result under a cell that holds what its file says."""
    axes: dict[str, AxisValue] = {**({"model": run.model} if run.model else {}), **run.axes}
    cell = Cell(kind="engine", subject=run.workload, provider=run.engine or label, axes=axes, seed=0)
    facts = _facts(run.workload, axes, run.engine)
    if run.failed:
        reason = f"{run.failed} of {run.failed + (run.completed or 0)} requests failed"
        return Loaded(cell, "incorrect", reason, facts, {})
    if not run.measures:
        return Loaded(cell, "incorrect", "the file has no number of it", facts, {})
    return Loaded(cell, "ok", None, facts, _timings(run.workload, run.measures))


def of_result(cell: Cell, status: Status, reason: str | None, result: Result | None) -> Loaded:
    """One of our cells; its numbers as far as the status leaves it any, and with the rates that follow from them."""
    facts = dict(_facts(cell.subject, cell.axes, result.serving.engine if result and result.serving else None))
    if result is None or result.serving is None or status != "ok":
        return Loaded(cell, status, reason, facts, {})
    requests, prompt_tokens, completion_tokens = _counted(result.serving)
    if requests:
        # what the engine counted: a tokenizer may have put a token before each prompt, and prompts of a file differ
        facts |= {"input_len": _whole(prompt_tokens / requests), "output_len": _whole(completion_tokens / requests)}
    return Loaded(cell, status, reason, facts, _timings(cell.subject, _measures(cell, result, result.serving)))


def beside(first: Side, own: Sequence[Loaded], side: Side, other: Sequence[Loaded]) -> Side:
    """The side with each result under the cell of the first side that is of one workload with it.

    A result that matches several cells, because it does not say which engine it is of, stands beside each. An imported
    one that matches none is named in `apart`, with every fact that sets it apart from the nearest cell. UsageError
    where several workloads of the side would stand beside one cell: nobody said which of them it is.
    """
    entries: dict[str, Entry] = {}
    apart: dict[tuple[str, str, str], list[Cell]] = {}
    taken: dict[str, Cell] = {}
    cells = {mine.cell.cell_id: mine for mine in own}
    for loaded in other:
        matching = [mine for mine in cells.values() if not _unlike(mine.facts, loaded.facts)]
        for mine in matching:
            found = loaded.entry(mine.cell, _told_apart(mine.timings, loaded.timings))
            cell_id = mine.cell.cell_id
            if taken.setdefault(cell_id, loaded.cell) != loaded.cell:
                raise UsageError(
                    f"{first.name}: {mine.cell.label()}: of {side.name} both {taken[cell_id].label()} and "
                    f"{loaded.cell.label()} are of its workload as far as it is stated; say more of it when importing "
                    "(--engine, --axis NAME=VALUE), or name the other side first"
                )
            for difference in _definitions(mine, loaded):
                apart.setdefault(difference, []).append(mine.cell)
            if mine.timings and loaded.timings and not mine.timings.keys() & found.timings.keys():
                # the two have no number in common, which is no result of either
                entries.setdefault(loaded.cell.cell_id, loaded.entry())
                continue
            entries[cell_id] = _joined(entries[cell_id], found) if cell_id in entries else found
        if not matching:
            entries.setdefault(loaded.cell.cell_id, loaded.entry())
            if side.kind == "import":
                for difference in _nearest(cells.values(), loaded):
                    apart.setdefault(difference, []).append(loaded.cell)
    if side.kind != "import":
        # a run has many cells that an import is not about; what the import is about is what has to be found
        for mine in (mine for cell_id, mine in cells.items() if cell_id not in taken):
            for field, theirs, own_value in _nearest(other, mine):
                apart.setdefault((field, own_value, theirs), []).append(mine.cell)
    named = [Incomparable(*key, tuple(cells)) for key, cells in apart.items()]
    return replace(side, entries=entries, apart=named, runs=max(side.runs, _repeats(entries)))


def alone(side: Side, own: Sequence[Loaded]) -> Side:
    """The first side of a comparison: a run with what follows from its numbers besides, an import with its results."""
    found: dict[str, Entry] = {}
    for loaded in own:
        cell_id = loaded.cell.cell_id
        found[cell_id] = _joined(found[cell_id], loaded.entry()) if cell_id in found else loaded.entry()
    entries = dict(side.entries)
    for cell_id, entry in found.items():
        entries[cell_id] = _with_definitions(entries[cell_id], entry) if cell_id in entries else entry
    return replace(side, entries=entries, runs=max(side.runs, _repeats(entries)))


def _with_definitions(measured: Entry, more: Entry) -> Entry:
    """A cell of a run with what follows from its numbers. Those stay as they are, but for saying what they count."""
    counts = {timing.metric: timing.definition for timing in more.timings.values()}
    own = {name: replace(timing, definition=counts.get(timing.metric, "")) for name, timing in measured.timings.items()}
    return replace(measured, timings={**more.timings, **own})


def _counted(serving: Serving) -> tuple[int, int, int]:
    """Requests that completed, their prompt tokens and their output tokens; of a batch, those of one repetition."""
    if serving.load is not None:
        return serving.load.completed, serving.load.prompt_tokens, serving.load.completion_tokens
    if serving.batches:
        last = serving.batches[-1]
        return last.batch, last.prompt_tokens, last.completion_tokens
    return 0, 0, 0


def _facts(workload: str, axes: Mapping[str, AxisValue], engine: str | None) -> Facts:
    known = {name: value for name, value in axes.items() if name in WORKLOAD}
    if "model" in known:
        known["model"] = _model(str(known["model"]))
    return {"workload": workload, **known, **({"engine": engine} if engine else {})}


def _model(name: str) -> str:
    """A model's bare name: neither organization, folder nor revision, nor how our axis says where it is from."""
    bare = name.partition("@")[0].removeprefix("synthetic:").removeprefix("folder:")
    return bare.rstrip("/").rpartition("/")[2]


def _whole(value: float) -> AxisValue:
    return int(value) if value == int(value) else f"{value:.6g}"


def _measures(cell: Cell, result: Result, serving: Serving) -> Iterator[Measure]:
    phased = any(batch.prefill_s is not None for batch in serving.batches)
    for measurement in result.measurements:
        definition = definition_of(cell.subject, measurement.name)
        if cell.subject == "static_batch" and measurement.name == "e2e_latency" and not phased:
            definition = "batch"
        yield Measure(metric=measurement.name, definition=definition, samples=measurement.samples_s)
    medians = {measurement.name: _median(measurement.samples_s) for measurement in result.measurements}
    if cell.subject == "static_batch":
        # rates of a wall clock are not document 004's
        yield from _batch_rates(cell, medians) if phased and "e2e_latency" in medians else ()
        return
    duration = serving.load.duration_s if serving.load is not None else medians.get("e2e_latency")
    requests, prompt_tokens, completion_tokens = _counted(serving)
    if duration and requests:
        for metric, value in rates.load_rates(duration, requests, prompt_tokens, completion_tokens).items():
            yield Measure(metric=metric, definition="of the load", stated={"total": value})


def _batch_rates(cell: Cell, medians: Mapping[str, float]) -> Iterator[Measure]:
    """Document 004's, of the medians of all repetitions."""
    size, prompt, output = (int(cell.axes[name]) for name in ("batch", "input_len", "output_len"))
    prefill, step = medians.get("prefill_latency"), medians.get("decode_latency")
    for metric, value in rates.batch_rates(size, prompt, output, prefill, step, medians["e2e_latency"]).items():
        statistic = "median" if metric == "decode_throughput" else "total"
        yield Measure(metric=metric, definition=definition_of(cell.subject, metric), stated={statistic: value})


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def _timings(workload: str, measures: Iterable[Measure]) -> dict[str, Timing]:
    """Numbers by name: samples, else the median, else the figure itself; a mean beside it, for who has no other."""
    found: dict[str, Timing] = {}
    for measure in measures:
        own = measure.definition == definition_of(workload, measure.metric)
        name = measure.metric if own else f"{measure.metric}, {measure.definition}"
        # a ratio needs numbers above zero, and a single one of zero leaves only the stated figures
        if measure.samples and min(measure.samples) > 0:
            found[name] = _timing(measure, measure.samples, stated=len(measure.samples) == 1)
        else:
            middle = [measure.statistic(statistic) for statistic in ("median", "total")]
            value = next((value for value in middle if value), None)
            if value:
                found[name] = _timing(measure, (value,), stated=True)
        mean = measure.statistic("mean") or (fmean(measure.samples) if measure.samples else None)
        if mean:
            found[name + MEAN] = _timing(measure, (mean,), stated=True)
    return found


def _timing(measure: Measure, samples: tuple[float, ...], stated: bool) -> Timing:
    return Timing(measure.metric, "wall", "none", (samples,), measure.definition, stated)


def _told_apart(own: Mapping[str, Timing], other: Mapping[str, Timing]) -> dict[str, Timing]:
    """The other side's numbers, without the means where both have something better."""
    better = {name for name in own if name in other}
    return {
        name: timing
        for name, timing in other.items()
        if not (name.endswith(MEAN) and (name.removesuffix(MEAN) in better or name not in own))
    }


def _unlike(a: Facts, b: Facts) -> list[tuple[str, str, str]]:
    """The facts that both state and that differ."""
    return [(name, str(a[name]), str(b[name])) for name in WORKLOAD if name in a and name in b and a[name] != b[name]]


def _nearest(own: Iterable[Loaded], loaded: Loaded) -> list[tuple[str, str, str]]:
    """What sets a result apart from the cell that it has most in common with: field, the cell's value, its own."""
    found = [_unlike(mine.facts, loaded.facts) for mine in own]
    return min(found, key=len, default=[])


def _definitions(mine: Loaded, loaded: Loaded) -> Iterator[tuple[str, str, str]]:
    """Metrics that both have, in no definition that both have; or all metrics, where they have none in common."""
    a, b = (_by_metric(side.timings) for side in (mine, loaded))
    for metric in a:
        if metric in b and not set(a[metric]) & set(b[metric]):
            yield f"definition of {metric}", ", ".join(a[metric]), ", ".join(b[metric])
    if a and b and not a.keys() & b.keys():
        yield "measurement", ", ".join(a), ", ".join(b)


def _by_metric(timings: Mapping[str, Timing]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for timing in timings.values():
        definitions = found.setdefault(timing.metric, [])
        if timing.definition not in definitions:
            definitions.append(timing.definition)
    return found


def _repeats(entries: Mapping[str, Entry]) -> int:
    """The most repeats that a number has."""
    return max((len(timing.runs) for entry in entries.values() for timing in entry.timings.values()), default=1)


def _joined(a: Entry, b: Entry) -> Entry:
    """Two results of one workload: repeats."""
    if not (a.timings and b.timings):
        return a if a.timings else b
    joined = {
        name: replace(own, runs=(*own.runs, *b.timings[name].runs))
        for name, own in a.timings.items()
        if name in b.timings
    }
    return Entry(a.cell, a.status, a.reason, joined)
