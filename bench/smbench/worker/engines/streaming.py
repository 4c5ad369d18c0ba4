"""The steps of a batch as they come out of an engine's stream. Owns what becomes of the times of tokens.

For engines whose scheduler runs in other processes or threads, where nobody can stand between two of its steps. A step
has ended when the last prompt of the batch has its token. Does not own how an engine is asked.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

from smbench.worker.engines import BatchAnswer

MOST_TOGETHER = 0.1
"""Part of the tokens that may come together with the one before them; of more, the times of steps say nothing."""


class Arrivals:
    """When each prompt's tokens came, by the host's clock, from now on."""

    def __init__(self, prompts: int) -> None:
        self._times: list[list[float]] = [[] for _ in range(prompts)]
        self._together = 0
        self._began = time.perf_counter()

    def saw(self, prompt: int, count: int) -> None:
        """A prompt of the batch has so many tokens by now."""
        now, times = time.perf_counter(), self._times[prompt]
        fresh = count - len(times)
        self._together += max(0, fresh - 1)
        times += [now] * fresh

    def timed(self, answer: BatchAnswer) -> BatchAnswer:
        """The answer with the times of its steps; as it is where they were not seen."""
        counts = {len(times) for times in self._times}
        if len(counts) > 1 or not max(counts):
            sys.stderr.write(f"prompts of a batch got {sorted(counts)} tokens, so there are no steps of all of them\n")
            return answer
        tokens = sum(map(len, self._times))
        if self._together > MOST_TOGETHER * tokens:
            sys.stderr.write(f"{self._together} of {tokens} tokens came together with others: the steps are not seen\n")
            return answer
        ends = [max(times) for times in zip(*self._times, strict=True)]
        return replace(
            answer,
            prefill_s=ends[0] - self._began,
            step_s=_differences(ends),
            step_clock="stream",
        )


def _differences(ends: Sequence[float]) -> list[float]:
    return [after - before for before, after in itertools.pairwise(ends)]
