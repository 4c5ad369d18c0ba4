"""Integrity checks over results: pure functions from evidence to findings. Owns the limits and the remedies.

A guard never changes a result. A finding of severity `refuted` turns the cell's status to `invalid` in the analysis, so
that no table shows its number; a `warning` stands beside the number.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from smbench import guards_engine, guards_hstu, guards_image, guards_load
from smbench.arch import Device
from smbench.findings import Evidence, Finding, clocks_hz, held_down, timed, work_of
from smbench.result import Environment, Measurement, Result
from smbench.workloads import gpus_of

__all__ = ["GUARDS", "Evidence", "Finding", "examine", "leaves_of", "names"]

ROOFLINE_SLACK = 1.05
"""A cell may beat the datasheet's bound by this factor before it is refuted: clocks differ between boards."""
SPREAD_LIMIT = 0.05
"""(p90 − p10) / median above which a median is called unsteady."""
CLOCK_DROP_LIMIT = 0.10
"""Relative drop of the SM clock within a run above which cells are called throttled."""
TIMER_LIMIT = 0.02
"""Relative error of a kernel of known length above which the timer is not trusted."""
STACK_FACTS = ("libraries.", "missing", "python.", "runtime.", "variables.")
"""How the paths of facts begin that belong to the Python of a stack and not to the machine."""


def correctness(evidence: Evidence) -> Iterator[Finding]:
    """No number on a red gate: every wrong output is named."""
    for result in evidence.results:
        compared = result.serving.output if result.serving else None
        # what an engine's outputs were compared with is said by the guard `outputs`
        if result.status == "incorrect" and (compared is None or compared.passed):
            yield Finding(
                "correctness",
                "refuted",
                f"{result.cell.label()}: {result.reason}",
                "its time is withheld; compare the provider with the reference at this point",
                result.cell_id,
            )


def roofline(evidence: Evidence) -> Iterator[Finding]:
    """Nothing is faster than its bytes or its arithmetic allow. From a warm cache only what exceeds it must move."""
    device = evidence.device
    if device is None or device.memory_bandwidth_bytes_per_s is None:
        if any(_on_a_gpu(evidence, m) for result in evidence.results for m in result.measurements):
            yield Finding(
                "roofline",
                "note",
                "the peak rates of this device are unknown, so no time was held against a physical bound",
                "add a row with a source to docker/archs.toml",
            )
        return
    for result, measurement, summary in timed(evidence):
        work = work_of(result, measurement)
        if work is None:
            continue
        # work that several cards share has all of their memory and arithmetic
        gpus = gpus_of(result.cell.axes)
        moved = max(0, work.bytes - gpus * _resident_bytes(result, measurement, device))
        bandwidth = gpus * device.memory_bandwidth_bytes_per_s
        memory_s = moved / bandwidth
        one = _peak_flops_per_s(evidence, result, device)
        peak = gpus * one if one else None
        compute_s = work.flops / peak if peak else 0.0
        bound_s = max(memory_s, compute_s)
        if summary.median * ROOFLINE_SLACK < bound_s:
            what = (
                f"{_bytes(moved)} / {bandwidth / 1e9:.0f} GB/s"
                if memory_s >= compute_s
                else f"{_flops(work.flops)} / {(peak or 0) / 1e12:.0f} TFLOP/s"
            )
            yield Finding(
                "roofline",
                "refuted",
                f"{result.cell.label()}, {measurement.name}: {_time(summary.median)} is less than the bound "
                f"{_time(bound_s)} = {what}",
                "impossible on this device: look for skipped work, a cached output or a wrong byte count",
                result.cell_id,
            )


def selection(evidence: Evidence) -> Iterator[Finding]:
    """The configuration, or the kernel of an engine, that a provider's name promises is the one that ran."""
    yield from guards_engine.selection(evidence)
    for result in evidence.results:
        if result.selection is None or result.status not in ("ok", "verified"):
            continue
        promised = evidence.recipe.providers[result.cell.provider].selection.removeprefix("library-")
        if not result.selection.source.startswith(promised):
            yield Finding(
                "selection",
                "refuted",
                f"{result.cell.label()}: promised a {promised} configuration, ran {result.selection.source!r}",
                "run `make tune RECIPE=…` on this device, then measure again",
                result.cell_id,
            )
    nearest = Counter(
        result.cell.provider
        for result in evidence.results
        if result.selection and result.selection.source.startswith("tuned-nearest")
    )
    for provider, count in nearest.items():
        yield Finding(
            "selection",
            "warning",
            f"{provider}: {count} cells ran the configuration of the nearest tuned point, not one tuned for them",
            "tune the very points that are measured: `make tune RECIPE=…`",
        )


def clocks(evidence: Evidence) -> Iterator[Finding]:
    """Clocks stayed up, and nothing held them down."""
    highest = max((max(clocks_hz(result)) for result in evidence.results if clocks_hz(result)), default=0.0)
    slow = [r for r in evidence.results if clocks_hz(r) and min(clocks_hz(r)) < (1 - CLOCK_DROP_LIMIT) * highest]
    if slow:
        lowest = min(min(clocks_hz(result)) for result in slow)
        yield Finding(
            "clocks",
            "warning",
            f"{len(slow)} of {len(evidence.results)} cells saw an SM clock more than {CLOCK_DROP_LIMIT:.0%} under the "
            f"run's highest ({lowest / 1e6:.0f} against {highest / 1e6:.0f} MHz)",
            "let the card cool, check its power limit, measure again",
        )
    reasons = Counter(reason for result in evidence.results for reason in held_down(result))
    for reason, count in reasons.items():
        yield Finding(
            "clocks",
            "warning",
            f"{count} cells ran while the clocks were held down by {reason}",
            "power and thermal limits belong to the card and its host: state them beside the numbers",
        )


def idle(evidence: Evidence) -> Iterator[Finding]:
    """Nobody else was on the card."""
    busy = [result for result in evidence.results if result.telemetry.get("other_processes")]
    if busy:
        yield Finding(
            "idle",
            "warning",
            f"{len(busy)} cells ran while other processes held the GPU",
            "stop them (`smbench doctor` lists how many) and measure again",
        )


def spread(evidence: Evidence) -> Iterator[Finding]:
    """Samples of one cell agree, where they are repetitions: those of a load differ by its nature."""
    unsteady: dict[str, list[float]] = {}
    total: Counter[str] = Counter()
    for result, measurement, summary in timed(evidence):
        if result.cell.subject == "online":
            continue
        total[measurement.name] += 1
        if summary.spread > SPREAD_LIMIT:
            unsteady.setdefault(measurement.name, []).append(summary.spread)
    for name, spreads in unsteady.items():
        yield Finding(
            "spread",
            "warning",
            f"{name}: {len(spreads)} of {total[name]} medians have (p90 − p10) / median above {SPREAD_LIMIT:.0%}, "
            f"the worst {max(spreads):.0%}",
            "read their intervals, not their medians; a quiet machine narrows them",
        )


def timer(evidence: Evidence) -> Iterator[Finding]:
    """A kernel of known length is timed at that length."""
    for session in evidence.sessions:
        for check in session.timer_checks:
            error = check["measured_s"] / check["expected_s"] - 1
            if abs(error) > TIMER_LIMIT:
                yield Finding(
                    "timer",
                    "warning",
                    f"{check['method']}: a kernel of {check['expected_s'] * 1e6:.1f} µs was timed at "
                    f"{check['measured_s'] * 1e6:.1f} µs ({error:+.1%})",
                    "times by this method are off by as much on this machine",
                )


def environment(evidence: Evidence) -> Iterator[Finding]:
    """All numbers of a run come from one machine and one set of software; engines each have software of their own."""
    differences = _differences(evidence.environments)
    of_stacks = {key: value for key, value in differences.items() if key.startswith(STACK_FACTS)}
    if evidence.recipe.kind == "engine" and of_stacks:
        differences = {key: value for key, value in differences.items() if key not in of_stacks}
        yield Finding(
            "environment",
            "note",
            f"engines run in stacks of their own: {len(evidence.environments)} environments, which differ in "
            + "; ".join(f"{key}: {value}" for key, value in of_stacks.items()),
            "a comparison of engines is one of their whole stacks",
        )
    if differences:
        yield Finding(
            "environment",
            "warning",
            f"results of {len(evidence.environments)} different environments are in this run; they differ in "
            + "; ".join(f"{key}: {value}" for key, value in differences.items()),
            "measure in one environment, in a fresh folder (`OUT=`), before comparing providers",
        )
    if any(entry.environment.get("source", {}).get("dirty") for entry in evidence.environments):
        yield Finding(
            "environment",
            "note",
            "the source checkout had uncommitted changes when this was measured",
            "commit first, so that others can get the same code",
        )


def sessions(evidence: Evidence) -> Iterator[Finding]:
    """Every result belongs to a session that ended, so that the wall clock is known."""
    recorded = sum(session.results for session in evidence.sessions)
    if recorded < len(evidence.results):
        yield Finding(
            "sessions",
            "note",
            f"{len(evidence.results) - recorded} of {len(evidence.results)} results were made by sessions that were "
            "killed before they could record their wall clock",
            "their numbers are whole; what the rental paid for is more than the report's time split says",
        )


GUARDS: Mapping[str, Callable[[Evidence], Iterator[Finding]]] = {
    "correctness": correctness,
    "outputs": guards_engine.outputs,
    "tokens": guards_engine.tokens,
    "prefix_cache": guards_engine.prefix_cache,
    "prompts": guards_engine.prompts,
    "batch_clocks": guards_load.batch_clocks,
    "load_clocks": guards_load.load_clocks,
    "little": guards_load.little,
    "rates": guards_load.rates,
    "sensitivity": guards_hstu.sensitivity,
    "kv_accounting": guards_hstu.kv_accounting,
    "roofline": roofline,
    "selection": selection,
    "settings": guards_engine.settings,
    "clocks": clocks,
    "idle": idle,
    "spread": spread,
    "timer": timer,
    "environment": environment,
    "image": guards_image.forced_arch,
    "sessions": sessions,
}
"""Every guard by name, in the order that reports print."""


ENGINES_ONLY = ("outputs", "tokens", "prefix_cache", "settings")
"""Guards that have nothing to look at in a recipe of operations."""


BY_WORKLOAD: Mapping[str, tuple[str, ...]] = {
    "prompts": ("static_batch", "offline", "online"),
    "batch_clocks": ("static_batch", "offline"),
    "load_clocks": ("online",),
    "little": ("online",),
    "rates": ("online",),
    "sensitivity": (guards_hstu.BLOCK,),
    "kv_accounting": guards_hstu.SUBJECTS,
}
"""Guards that look at some operations, or workloads of engines, only."""


def names(kind: str, subjects: Collection[str] = ()) -> list[str]:
    """The guards that look at recipes of a kind, `op` or `engine`, with these operations or workloads."""
    return [
        name
        for name in GUARDS
        if (kind == "engine" or name not in ENGINES_ONLY)
        and (name not in BY_WORKLOAD or set(BY_WORKLOAD[name]) & set(subjects))
    ]


def examine(evidence: Evidence) -> list[Finding]:
    """The findings of all guards."""
    return [finding for guard in GUARDS.values() for finding in guard(evidence)]


def _resident_bytes(result: Result, measurement: Measurement, device: Device) -> int:
    """What of a sample's bytes the last-level cache may have held."""
    if result.cell.kind == "engine":
        # nobody empties the cache between the steps of an engine: each may find as much there
        return (device.l2_bytes or 0) * guards_engine.passes(result.cell, measurement.name)
    return (device.l2_bytes or 0) if measurement.l2 == "warm" else 0


def _peak_flops_per_s(evidence: Evidence, result: Result, device: Device) -> float | None:
    # at the clock that ran: a datasheet states the peak at a lower one than cards reach
    clock_hz = max(clocks_hz(result), default=None)
    if result.cell.kind == "engine":
        return guards_engine.peak_flops_per_s(device, evidence.recipe, result.cell, clock_hz)
    return device.tensor_peak_flops_per_s(str(result.cell.axes.get("dtype")), clock_hz)


def _on_a_gpu(evidence: Evidence, measurement: Measurement) -> bool:
    """Engines are timed by the host clock wherever they run; operations only without a GPU."""
    on_cards = any((entry.environment.get("gpu") or {}).get("name") for entry in evidence.environments)
    return measurement.method != "wall" or (evidence.recipe.kind == "engine" and on_cards)


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.2f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def _bytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"


def _flops(count: int) -> str:
    return f"{count / 1e9:.2f} GFLOP" if count < 1e12 else f"{count / 1e12:.2f} TFLOP"


def _differences(environments: Sequence[Environment]) -> dict[str, str]:
    """`a | b` for every leaf that is not the same in all environments, by its key."""
    leaves = [dict(leaves_of(entry.environment)) for entry in environments]
    keys = sorted({key for leaf in leaves for key in leaf})
    return {
        key: " | ".join(str(leaf.get(key, "absent")) for leaf in leaves)
        for key in keys
        if len({str(leaf.get(key)) for leaf in leaves}) > 1
    }


def leaves_of(tree: object, path: str = "") -> Iterator[tuple[str, object]]:
    """Every value of a tree of mappings that is none itself, with the keys that lead to it, joined by dots."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from leaves_of(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, tree
