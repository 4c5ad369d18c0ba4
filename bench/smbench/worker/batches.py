"""Repetitions of a batch: a run, what is stored of it, which samples it gives. Owns the clock where an engine has none.

Does not own how an engine is driven (`engines`) nor when it is started (`enginecell`).
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from smbench.worker.datasets import Prompts, tokens_sha256
from smbench.worker.engines import BatchAnswer, Engine


@dataclass(frozen=True, slots=True)
class Repetition:
    """One batch and its answer."""

    prompts: Prompts
    answer: BatchAnswer
    e2e_s: float

    def record(self) -> dict[str, Any]:
        """As it is stored."""
        told = self.answer
        return {
            "batch": len(self.prompts),
            "prompt_tokens": sum(told.prompt_tokens),
            "completion_tokens": sum(map(len, told.token_ids)),
            "cached_tokens": told.cached_tokens,
            "finish_reasons": dict(Counter(told.finish_reasons)),
            "e2e_s": self.e2e_s,
            "prefill_s": told.prefill_s,
            "step_s": list(told.step_s),
            "output_sha256": tokens_sha256(told.token_ids),
        }

    def value(self, measure: str) -> float | None:
        """One sample of a measure; None where the engine showed no steps."""
        if measure == "e2e_latency":
            return self.e2e_s
        if measure == "prefill_latency":
            return self.answer.prefill_s
        if measure == "decode_latency":
            return statistics.median(self.answer.step_s) if self.answer.step_s else None
        raise KeyError(f"unknown measure {measure!r}; known: prefill_latency, decode_latency, e2e_latency")


def run(engine: Engine, prompts: Prompts, output_len: int, stepwise: bool) -> Repetition:
    """Hand over a batch and wait for its last token.

    Where the engine's steps were seen, their sum is the whole: what an engine does to hand its answer out is no step.
    RuntimeError for an answer of another shape than that of the batch.
    """
    began = time.perf_counter()
    answer = engine.batch(prompts, output_len, stepwise)
    e2e_s = time.perf_counter() - began
    if not len(answer.token_ids) == len(answer.prompt_tokens) == len(answer.finish_reasons) == len(prompts):
        raise RuntimeError(f"{len(prompts)} prompts were handed over, and {len(answer.token_ids)} were answered")
    if stepwise and answer.prefill_s is not None:
        if len(answer.step_s) != output_len - 1:
            raise RuntimeError(f"{len(answer.step_s)} decode steps were seen, {output_len - 1} were asked for")
        e2e_s = answer.prefill_s + sum(answer.step_s)
    return Repetition(prompts, answer, e2e_s)


def compared(done: Sequence[Repetition], first_counted: int) -> list[tuple[Sequence[int], Sequence[int]]]:
    """Prompts and what was generated, of which outputs are compared: the first and the last of a batch."""
    chosen = done[first_counted]
    pairs = list(zip(chosen.prompts, chosen.answer.token_ids, strict=True))
    return [pairs[0], *pairs[1:][-1:]]
