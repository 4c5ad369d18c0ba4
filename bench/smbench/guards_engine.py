"""Integrity checks that only cells of engines need: token counts, prefix caches, kernels, outputs, settings.

Owns what an engine must have done and what all engines of a run must share. The guards that every kind of cell has are
in `guards`, which also holds the list of all.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from smbench.arch import Device
from smbench.cell import Cell
from smbench.findings import Evidence, Finding
from smbench.recipe import Recipe
from smbench.result import Request, Result, Serving

ALL_TOKENS = "length"
"""The finish reason of a request that generated all that was asked."""

ATTENTION: Mapping[str, tuple[str, ...]] = {
    "flash-attention": ("flashattn", "flashattention", "fa2", "fa3", "fa4"),
    "flashinfer": ("flashinfer",),
    "triton": ("triton",),
}
"""Value of the axis `attention` to how engines call such a backend: lower case, letters and digits only."""

SUMS_IN_FLOAT16 = frozenset({"ExllamaLinearKernel"})
"""Linear kernels that have cuBLAS sum in float16: vLLM csrc/quantization/gptq/q_gemm.cu, which calls cublasHgemm."""
FLOAT16_SUM_GAIN = 2
"""No product of docker/archs.toml sums in float16 at more than this multiple of its rate with sums in float32."""

ALIKE: Mapping[str, tuple[str, ...]] = {
    "context limit": ("max_model_len", "context_length"),
    "most sequences": ("max_num_seqs", "max_running_requests"),
    "prefix caching": ("enable_prefix_caching", "!disable_radix_cache"),
    "dtype": ("dtype",),
    "KV cache dtype": ("kv_cache_dtype", "cache_dtype"),
}
"""What all engines of a run are given alike: a quantity to the settings that hold it, `!` marks the opposite sense.

The names are those of vLLM (EngineArgs) and sglang (ServerArgs).
"""


def tokens(evidence: Evidence) -> Iterator[Finding]:
    """Every request had the prompt that was asked, and generated as many tokens as were asked."""
    for result, serving in _served(evidence):
        wrong = [(i, fault) for i, request in enumerate(serving.requests) if (fault := _fault(result.cell, request))]
        if wrong:
            i, fault = wrong[0]
            yield Finding(
                "tokens",
                "refuted",
                f"{result.cell.label()}: {len(wrong)} of {len(serving.requests)} requests are not what was asked; "
                f"request {i}: {fault}",
                "give token ids, ignore_eos, and a context limit above prompt plus output, then measure again",
                result.cell_id,
            )


def prefix_cache(evidence: Evidence) -> Iterator[Finding]:
    """No prompt was answered from a cache of earlier prompts."""
    silent: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for result, serving in _served(evidence):
        total[result.cell.provider] += 1
        silent[result.cell.provider] += all(request.cached_tokens is None for request in serving.requests)
        hits = [request.cached_tokens for request in serving.requests if request.cached_tokens]
        if hits:
            prompts = sum(request.prompt_tokens for request in serving.requests)
            yield Finding(
                "prefix_cache",
                "refuted",
                f"{result.cell.label()}: {len(hits)} of {len(serving.requests)} requests took prompt tokens from a "
                f"prefix cache, {sum(hits)} of {prompts} = {sum(hits) / prompts:.1%}",
                "turn prefix caching off, or the time is not that of the prompt",
                result.cell_id,
            )
    for provider, count in silent.items():
        if count:
            yield Finding(
                "prefix_cache",
                "note",
                f"{provider}: in {count} of {total[provider]} cells the engine does not say how many prompt tokens "
                "came from a cache",
                "the settings in records/ say whether prefix caching was on",
            )


def selection(evidence: Evidence) -> Iterator[Finding]:
    """The promised linear kernel ran in every quantized layer, and the attention that the cell asks for."""
    for result, serving in _served(evidence):
        promised = evidence.recipe.providers[result.cell.provider].kernel
        linear = serving.kernels.get("linear", {})
        if promised is not None and set(linear) != {promised}:
            yield _unselected(result, f"promised {promised} for all linear layers", linear)
        asked = str(result.cell.axes.get("attention", "default"))
        attention = serving.kernels.get("attention", {})
        if asked in ATTENTION and not (attention and all(_is_attention(name, asked) for name in attention)):
            yield _unselected(result, f"asked for attention {asked}", attention)


def outputs(evidence: Evidence) -> Iterator[Finding]:
    """Outputs that were compared with a reference are the reference's."""
    for result in evidence.results:
        found = result.serving.output if result.serving else None
        if found is None or found.passed:
            continue
        error = "unknown" if found.logprob_error is None else f"{found.logprob_error:.3g}"
        faults = "; ".join(found.faults[:3])
        yield Finding(
            "outputs",
            "refuted",
            f"{result.cell.label()}: {found.equal_tokens} of {found.tokens} tokens equal those of {found.reference}, "
            f"largest difference of a log-probability {error} nats, at most {found.logprob_bound:.3g} allowed"
            f"{': ' if faults else ''}{faults}",
            "its time is withheld: look at how it reads the checkpoint",
            result.cell_id,
        )


def settings(evidence: Evidence) -> Iterator[Finding]:
    """What all engines are given alike reads the same in their own settings, wherever they ran the same point."""
    points: dict[object, list[tuple[str, Mapping[str, str | None]]]] = {}
    for result, serving in _served(evidence):
        points.setdefault(result.cell.point, []).append((result.cell.provider, alike(serving.settings)))
    for quantity in ALIKE:
        values: dict[str, dict[str, None]] = {}
        differing = 0
        for served in points.values():
            said = [(value, provider) for provider, words in served if (value := words[quantity]) is not None]
            if len({value for value, _ in said}) > 1:
                differing += 1
                for value, provider in said:
                    values.setdefault(value, {})[provider] = None
        if differing:
            words = "; ".join(f"{value}: {', '.join(providers)}" for value, providers in values.items())
            yield Finding(
                "settings",
                "warning",
                f"{quantity} is not the same in all engines at {differing} of {len(points)} points: {words}",
                "give all engines of a run the same, or name the difference beside the numbers",
            )


def alike(resolved: Mapping[str, Any]) -> Mapping[str, str | None]:
    """The quantities of ALIKE in an engine's settings as comparable words; None where it has no such setting."""
    leaves = _leaves(resolved)
    found: dict[str, str | None] = {}
    for quantity, names in ALIKE.items():
        values = [_word(leaves[name.lstrip("!")], name.startswith("!")) for name in names if name.lstrip("!") in leaves]
        found[quantity] = next((value for value in values if value is not None), None)
    # "auto" is not another type: it is the model's
    if found["KV cache dtype"] == "auto":
        found["KV cache dtype"] = found["dtype"]
    return found


def passes(cell: Cell, measurement: str) -> int:
    """How often an engine reads all weights for one sample: once a chunk of the prompt, once a further token."""
    length, output = int(cell.axes["input_len"]), int(cell.axes["output_len"])
    chunks = -(-length // min(length, int(cell.axes["chunk_tokens"])))
    return {"ttft": chunks, "tpot": 1}.get(measurement, chunks + output - 1)


def peak_flops_per_s(device: Device, recipe: Recipe, cell: Cell, clock_hz: float | None) -> float | None:
    """Peak of the matrix units for a cell; higher for a kernel that sums in float16. None where it is unknown."""
    peak = device.tensor_peak_flops_per_s(str(cell.axes["dtype"]), clock_hz)
    if peak is None or recipe.providers[cell.provider].kernel not in SUMS_IN_FLOAT16:
        return peak
    return peak * FLOAT16_SUM_GAIN


def _served(evidence: Evidence) -> Iterator[tuple[Result, Serving]]:
    """The cells whose engine did what it was asked, or said so."""
    for result in evidence.results:
        if result.serving is not None and result.status in ("ok", "verified"):
            yield result, result.serving


def _fault(cell: Cell, request: Request) -> str | None:
    """What of a request is not what its cell asks."""
    prompt, output = cell.axes["input_len"], cell.axes["output_len"]
    faults = []
    if request.prompt_tokens != prompt:
        faults.append(f"a prompt of {request.prompt_tokens} tokens, not {prompt}")
    if request.completion_tokens != output:
        faults.append(f"{request.completion_tokens} tokens generated, not {output}")
    if request.finish_reason != ALL_TOKENS:
        faults.append(f"it ended by {request.finish_reason!r}, not {ALL_TOKENS!r}")
    return ", ".join(faults) or None


def _is_attention(name: str, asked: str) -> bool:
    return re.sub(r"[^a-z0-9]", "", name.lower()).startswith(ATTENTION[asked])


def _unselected(result: Result, promise: str, found: Mapping[str, int]) -> Finding:
    ran = ", ".join(f"{name} in {count} layers" for name, count in found.items())
    return Finding(
        "selection",
        "refuted",
        f"{result.cell.label()}: {promise}; the engine reports {ran or 'nothing of the kind'}",
        "the engine fell back to something else, or cannot tell: its log in logs/ says why",
        result.cell_id,
    )


def _leaves(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Every value that is no mapping by its last key; of several, the one nearest to the top."""
    found = {name: value for name, value in tree.items() if not isinstance(value, Mapping)}
    for value in tree.values():
        if isinstance(value, Mapping):
            found = {**_leaves(value), **found}
    return found


def _word(value: Any, opposite: bool) -> str | None:
    if value is None or isinstance(value, list | tuple):
        return None
    if isinstance(value, bool):
        return "on" if value != opposite else "off"
    word = str(value).removeprefix("torch.")
    return {"half": "float16"}.get(word, word)
