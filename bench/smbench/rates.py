"""Rates that follow from stored times and token counts, by the formulas of `metrics`. Pure; nothing of it is stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from smbench.errors import UsageError

LIMITS = ("ttft", "tpot", "e2e_latency")
"""Latencies of a request that a goodput may be stated against."""


def batch_rates(
    batch: int, input_len: int, output_len: int, prefill_s: float | None, step_s: float | None, e2e_s: float
) -> dict[str, float]:
    """The rates of a static batch, token/s by metric: document 004's, and output_throughput beside them.

    `prefill_s` is the time to all first tokens and `step_s` one decode step, None where the engine shows neither;
    `e2e_s` is the whole batch.
    """
    rates: dict[str, float] = {}
    if prefill_s is not None:
        rates["prefill_throughput"] = input_len * batch / prefill_s
    if step_s is not None:
        rates["decode_throughput"] = batch / step_s
    rates["overall_throughput"] = (input_len + output_len) * batch / e2e_s
    rates["output_throughput"] = output_len * batch / e2e_s
    return rates


def load_rates(duration_s: float, completed: int, prompt_tokens: int, completion_tokens: int) -> dict[str, float]:
    """The rates of a load by metric: request/s and token/s; tokens are those of the completed requests."""
    return {
        "request_throughput": completed / duration_s,
        "input_throughput": prompt_tokens / duration_s,
        "output_throughput": completion_tokens / duration_s,
        "total_token_throughput": (prompt_tokens + completion_tokens) / duration_s,
    }


def goodput(duration_s: float, latencies_s: Mapping[str, Sequence[float]], limits_s: Mapping[str, float]) -> float:
    """Completed requests within every limit, request/s. Latencies are those of the completed requests, in one order.

    UsageError for a limit on something else than ttft, tpot or e2e_latency, or on a latency that not every request has:
    a request of one token has no tpot, and whoever states a limit on it has to leave such requests out.
    """
    if unknown := sorted(limits_s.keys() - set(LIMITS)):
        raise UsageError(f"goodput has no limit {unknown[0]!r}; known: {', '.join(LIMITS)}")
    if not limits_s:
        raise UsageError("goodput needs a limit: it counts the requests that keep all of them")
    series = [latencies_s[name] for name in limits_s]
    if len({len(values) for values in series}) > 1:
        counts = ", ".join(f"{name}: {len(latencies_s[name])}" for name in limits_s)
        raise UsageError(f"goodput needs every limited latency of every request, and there are {counts}")
    limits = list(limits_s.values())
    good = sum(
        all(value <= limit for value, limit in zip(row, limits, strict=True)) for row in zip(*series, strict=True)
    )
    return good / duration_s
