"""The search for launch parameters. Owns the strategy; what a time is, and whether an output is right, is injected.

A model orders the candidates, so that the good ones come early and the hopeless ones never run; the search of a point
also starts from what won at its neighbours. Then two stages, the second with fewer configurations and more samples,
after Jamieson and Talwalkar, "Non-stochastic best arm identification and hyperparameter optimization" (2016).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from smbench_kernels.op import Config, Point, Tunable

PREDICTED_LIMIT = 3.0
"""A configuration modelled to be this many times slower than the best modelled one is not tried."""
PATIENCE = 64
"""The screening stops after this many configurations in a row without a new best. With 24, 3 of 50 random points of the
LoRA grid on an H200 missed their exhaustive best by more than 2 %; with 48 or more none did (kernels/NOTES.md)."""
SCREEN_SAMPLES, FINAL_SAMPLES = 5, 20
FINAL_ROUNDS = 3
"""The shortlist is timed in rounds, there and back again, so that a drift of the clocks hits all alike."""
SHORTLIST_LIMIT = 1.06
"""Screened configurations within this factor of the best are timed again."""
SHORTLIST = 8
REFINEMENTS = 3
"""Searches around the best so far, of a Tunable that has parts to be chosen in turns."""

Clock = Callable[[Config, int], float | None]
"""Median seconds of a configuration over so many samples; None where it is wrong or does not launch."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The outcome of one point."""

    config: Config
    time_s: float
    """Median of the medians of FINAL_ROUNDS rounds."""
    candidates: int
    """Size of the search space."""
    timed: int
    """How many of them ran."""


def search(
    point: Point, tunable: Tunable, facts: Mapping[str, float], clock: Clock, hints: Sequence[Config] = ()
) -> Choice | None:
    """The best configuration of a point; None where none is right. `facts` are those of Tunable.predict.

    A Tunable that refines is searched again around what won, until that stays the best, at most REFINEMENTS times.
    Hints are tried first: those that belong to the space, and those that the Tunable admits.
    """
    space = tunable.space(point)
    best = _search(point, [*space, *_admitted(point, space, tunable, hints)], tunable, facts, clock, hints)
    for _ in range(REFINEMENTS if tunable.refine else 0):
        if best is None or tunable.refine is None:
            break
        around = tunable.refine(point, best.config)
        refined = _search(point, around, tunable, facts, clock, (best.config, *hints)) if around else None
        if refined is None:
            break
        candidates, timed = best.candidates + refined.candidates, best.timed + refined.timed
        settled = refined.config == best.config or refined.time_s >= best.time_s
        best = replace(min(best, refined, key=lambda found: found.time_s), candidates=candidates, timed=timed)
        if settled:
            break
    return best


def _admitted(point: Point, space: Sequence[Config], tunable: Tunable, hints: Sequence[Config]) -> list[Config]:
    """Each hint that the Tunable admits beside what its space holds."""
    found: list[Config] = []
    for hint in hints:
        if tunable.admits and hint not in space and hint not in found and tunable.admits(point, hint):
            found.append(hint)
    return found


def _search(
    point: Point,
    space: Sequence[Config],
    tunable: Tunable,
    facts: Mapping[str, float],
    clock: Clock,
    hints: Sequence[Config],
) -> Choice | None:
    """The best configuration of one space."""
    screened: list[tuple[float, int, Config]] = []
    best, timed, best_at = float("inf"), 0, 0
    for config in order(point, space, tunable, facts, hints):
        timed += 1
        seconds = clock(config, SCREEN_SAMPLES)
        if seconds is not None:
            screened.append((seconds, timed, config))
            if seconds < best:
                best, best_at = seconds, timed
        if timed - best_at >= PATIENCE and not tunable.exhaustive:
            break
    near = [entry for entry in screened if entry[0] <= best * SHORTLIST_LIMIT]
    shortlist = sorted(near, key=lambda entry: entry[:2])[:SHORTLIST]
    finals = _finals([config for _, _, config in shortlist], clock)
    if not finals:
        return None
    # the rank breaks ties, so that configurations themselves are never compared
    time_s, _, config = min(finals, key=lambda entry: entry[:2])
    return Choice(config, time_s, len(space), timed)


def _finals(shortlist: Sequence[Config], clock: Clock) -> list[tuple[float, int, Config]]:
    """Median time, rank and configuration of the shortlisted ones."""
    times: list[list[float]] = [[] for _ in shortlist]
    ranked = list(enumerate(shortlist))
    for turn in range(FINAL_ROUNDS):
        for rank, config in ranked if turn % 2 == 0 else reversed(ranked):
            seconds = clock(config, FINAL_SAMPLES)
            if seconds is not None:
                times[rank].append(seconds)
    return [(statistics.median(times[rank]), rank, config) for rank, config in ranked if times[rank]]


def order(
    point: Point, space: Sequence[Config], tunable: Tunable, facts: Mapping[str, float], hints: Sequence[Config]
) -> list[Config]:
    """The configurations worth trying: hints that belong to the space, then the rest by modelled time.

    Of an exhaustive space all of them are.
    """
    predicted = [(tunable.predict(point, config, facts), index) for index, config in enumerate(space)]
    least = min((seconds for seconds, _ in predicted), default=0.0)
    limit = math.inf if tunable.exhaustive else least * PREDICTED_LIMIT
    by_model = [space[index] for seconds, index in sorted(predicted) if seconds <= limit]
    first = [config for config in space if config in list(hints)]
    return first + [config for config in by_model if config not in first]
