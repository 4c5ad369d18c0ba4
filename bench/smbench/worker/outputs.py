"""Whether an engine's tokens and log-probabilities are those of the model. Owns the comparison and its bounds.

The truth is one forward pass in float32 over prompt and generated tokens, on weights that we unpack ourselves
(`engines.transformers.Reference`). Each generated token is judged given the engine's own tokens before it, so that one
difference is not counted again and again. Runs after the last timed request.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from smbench.worker.engines import Engine, Setup

if TYPE_CHECKING:
    from torch import Tensor

TOP = 5
"""Likeliest tokens whose log-probabilities are compared, besides the generated one."""

BOUND_NATS: Mapping[str, float] = {"float32": 1e-3, "float16": 0.02, "bfloat16": 0.12}
"""Largest difference of a log-probability, by the dtype of activations: for the synthetic shape `tiny`.

Measured there over 18 requests of up to 1500 + 64 tokens: transformers 0.0097 in float16 and 0.071 in bfloat16, vLLM
on a CPU 0.0067 and 0.072; float32 2e-5. A fault makes more: the least were 0.16 (a prompt without its first token, one
other token among 512), 0.20 (all scales 2 % too large, biases missing), 0.33 (one layer's scales 10 % too large or one
group off), 1.1 (one layer's zeros off by one), 4.4 (one layer's nibbles swapped). Deeper models round more often, and
need bounds of their own.
"""

MOST_FAULTS = 4


@dataclass(slots=True)
class Comparison:
    """What was found so far."""

    bound: float
    tokens: int = 0
    equal_tokens: int = 0
    logprob_error: float | None = None
    faults: list[str] = field(default_factory=list)

    def judge(self, request: int, truth: Tensor, tokens: Sequence[int]) -> None:
        """Whether each token is the likeliest one, given the true log-probabilities [len(tokens), vocabulary].

        A token that is not the likeliest may be less likely by twice the bound: both may be off by it.
        """
        best = truth.max(dim=-1)
        for i, token in enumerate(tokens):
            self.tokens += 1
            self.equal_tokens += token == int(best.indices[i])
            gap = float(best.values[i] - truth[i, token])
            if gap > 2 * self.bound:
                likeliest = int(best.indices[i])
                self._fault(f"request {request}, token {i}: {token} is {gap:.3g} nats less likely than {likeliest}")

    def judge_logprobs(self, request: int, truth: Tensor, said: Sequence[Mapping[int, float]]) -> None:
        """Whether the engine's log-probabilities are the true ones."""
        for i, of_token in enumerate(said):
            for token, logprob in of_token.items():
                error = abs(logprob - float(truth[i, token]))
                if math.isfinite(error):
                    self.logprob_error = max(self.logprob_error or 0.0, error)
                # what is no number is within no bound
                if not error <= self.bound:
                    self._fault(
                        f"request {request}, token {i}: log-probability of {token} is {logprob:.3g}, "
                        f"should be {float(truth[i, token]):.3g}"
                    )

    def record(self, reference: str) -> dict[str, Any]:
        """As it is stored."""
        return {
            "passed": not self.faults and self.tokens > 0,
            "reference": reference,
            "tokens": self.tokens,
            "equal_tokens": self.equal_tokens,
            "logprob_error": self.logprob_error,
            "logprob_bound": self.bound,
            "faults": self.faults or ([] if self.tokens else ["no token was generated"]),
        }

    def _fault(self, words: str) -> None:
        if len(self.faults) < MOST_FAULTS:
            self.faults.append(words)


def check(engine: Engine, setup: Setup, served: Sequence[tuple[Sequence[int], Sequence[int]]]) -> dict[str, Any]:
    """Compare prompts and what was generated in timed requests; then ask for the same again with log-probabilities."""
    # transformers is imported only where something is compared
    from smbench.worker.engines.transformers import Reference

    began = time.perf_counter()
    reference = Reference(setup.model)
    found = Comparison(BOUND_NATS[setup.dtype])
    for request, (prompt, tokens) in enumerate(served):
        truth = reference.logprobs(prompt, tokens)
        found.judge(request, truth, tokens)
        again = engine.generate(prompt, setup.output_len, top_logprobs=TOP)
        if again.logprobs is None:
            continue
        if list(again.token_ids) != list(tokens):
            # a kernel whose order of sums is not fixed may decide a close race otherwise; both must then be right
            truth = reference.logprobs(prompt, again.token_ids)
            found.judge(request, truth, again.token_ids)
        found.judge_logprobs(request, truth, again.logprobs)
    sys.stderr.write(f"outputs compared with {reference.name} in {time.perf_counter() - began:.1f} s\n")
    return found.record(reference.name)
