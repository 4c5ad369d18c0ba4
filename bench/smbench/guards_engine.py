"""Integrity checks that only cells of engines need: token counts, prefix caches, kernels, outputs, settings.

Owns what an engine must have done and what all engines of a run must share. What clocks of batches and loads must agree
on is in `guards_load`; the guards that every kind of cell has are in `guards`, which also holds the list of all.
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
from smbench.result import Batch, Load, Request, Result, Serving
from smbench.workloads import prompts_of

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
    "context limit": ("max_model_len", "context_length", "session_len", "max_seq_len"),
    "most sequences": ("max_num_seqs", "max_running_requests", "max_batch_size"),
    "prefix caching": ("enable_prefix_caching", "!disable_radix_cache", "enable_block_reuse"),
    "dtype": ("dtype",),
    "KV cache dtype": ("kv_cache_dtype", "cache_dtype"),
}
"""What all engines of a run are given alike: a quantity to the settings that hold it, `!` marks the opposite sense.

The names are those of vLLM (EngineArgs), sglang (ServerArgs), lmdeploy (its EngineConfigs) and TensorRT-LLM (LlmArgs).
"""
PROMPT_SLACK = 0.01
"""Share of the prompt tokens by which a client's count may differ: it writes prompts as text, and a server may put a
token before them. No engine is faster by as much."""


def tokens(evidence: Evidence) -> Iterator[Finding]:
    """Every request had the prompt that was asked, and generated as many tokens as were asked."""
    for result, serving in _served(evidence):
        for fault in (_requests_fault(result.cell, serving), _batches_fault(result.cell, serving)):
            if fault:
                yield Finding(
                    "tokens",
                    "refuted",
                    f"{result.cell.label()}: {fault}",
                    "give token ids, ignore_eos, and a context limit above prompt plus output, then measure again",
                    result.cell_id,
                )
        if serving.load is not None:
            yield from _of_load(result, serving, serving.load)


def prefix_cache(evidence: Evidence) -> Iterator[Finding]:
    """No prompt was answered from a cache of earlier prompts, but where prompts share a beginning on purpose."""
    silent: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for result, serving in _served(evidence):
        sent: list[Request | Batch] = [*serving.requests, *serving.batches]
        cached = [entry.cached_tokens for entry in sent] or _probed(serving)
        total[result.cell.provider] += 1
        silent[result.cell.provider] += all(count is None for count in cached)
        hits = [count for count in cached if count]
        if hits and not _may_cache(evidence.recipe, result.cell):
            prompts = sum(entry.prompt_tokens for entry in sent)
            what = "requests" if serving.requests else "batches" if serving.batches else "probes of the server"
            share = f"{sum(hits)} of {prompts} = {sum(hits) / prompts:.1%}" if prompts else f"{sum(hits)}"
            yield Finding(
                "prefix_cache",
                "refuted",
                f"{result.cell.label()}: {len(hits)} of {len(cached)} {what} took prompt tokens from a prefix cache, "
                f"{share}",
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


def prompts(evidence: Evidence) -> Iterator[Finding]:
    """All engines got the same prompts wherever they ran the same point."""
    points: dict[object, dict[str, list[str]]] = {}
    for result, serving in _served(evidence):
        if serving.prompts is not None and serving.prompts.sha256 is not None:
            of_point = points.setdefault(result.cell.point, {})
            of_point.setdefault(serving.prompts.sha256, []).append(result.cell.provider)
    differing = [of_point for of_point in points.values() if len(of_point) > 1]
    if differing:
        words = "; ".join(f"{sha256[:12]}: {', '.join(providers)}" for sha256, providers in differing[0].items())
        yield Finding(
            "prompts",
            "warning",
            f"the prompts are not the same for all engines at {len(differing)} of {len(points)} points: {words}",
            "one file of conversations for a whole run, and one tokenizer: measure in a fresh folder (`OUT=`)",
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
    # but for `generate`, the work of a cell is that of prompts in one piece
    chunks = -(-length // min(length, int(cell.axes.get("chunk_tokens", length))))
    once = {"ttft": chunks, "prefill_latency": chunks, "tpot": 1, "decode_latency": 1}
    return once.get(measurement, chunks + output - 1)


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


def _requests_fault(cell: Cell, serving: Serving) -> str | None:
    """What is wrong with the requests of a `generate` cell."""
    wrong = [(i, fault) for i, request in enumerate(serving.requests) if (fault := _fault(cell, request))]
    if not wrong:
        return None
    i, fault = wrong[0]
    return f"{len(wrong)} of {len(serving.requests)} requests are not what was asked; request {i}: {fault}"


def _batches_fault(cell: Cell, serving: Serving) -> str | None:
    """What is wrong with the repetitions of a batch."""
    wrong = [(i, fault) for i, batch in enumerate(serving.batches) if (fault := _batch_fault(cell, serving, batch))]
    if not wrong:
        return None
    i, fault = wrong[0]
    return f"{len(wrong)} of {len(serving.batches)} batches are not what was asked; batch {i}: {fault}"


def _batch_fault(cell: Cell, serving: Serving, batch: Batch) -> str | None:
    """What of a batch is not what its cell asks."""
    count = prompts_of(cell.subject, cell.axes)
    # conversations of somebody's file have lengths of their own, and a warm-up may have others
    prompt = None if cell.axes.get("dataset") == "sharegpt" else count * int(cell.axes["input_len"])
    output = count * int(cell.axes["output_len"])
    ended = batch.finish_reasons.get(ALL_TOKENS, 0)
    faults = []
    if batch.batch != count:
        faults.append(f"{batch.batch} prompts, not {count}")
    if prompt is not None and batch.prompt_tokens != prompt:
        faults.append(f"{batch.prompt_tokens} prompt tokens, not {prompt}")
    if batch.completion_tokens != output:
        faults.append(f"{batch.completion_tokens} tokens generated, not {output}")
    if ended != sum(batch.finish_reasons.values()) or ended != batch.batch:
        said = ", ".join(f"{reason!r} {number} times" for reason, number in batch.finish_reasons.items())
        faults.append(f"they ended by {said or 'nothing'}, not {ALL_TOKENS!r} {batch.batch} times")
    return ", ".join(faults) or None


def _of_load(result: Result, serving: Serving, load: Load) -> Iterator[Finding]:
    """What a client counted against what its cell asks."""
    cell = result.cell
    count, output = prompts_of(cell.subject, cell.axes), int(cell.axes["output_len"])
    known = serving.prompts.tokens if serving.prompts else None
    if known is None and cell.axes.get("dataset") != "sharegpt":
        known = count * int(cell.axes["input_len"])
    faults = []
    if load.completed + load.failed != count:
        faults.append(f"{load.completed} requests completed and {load.failed} failed, of {count}")
    if load.completion_tokens != load.completed * output:
        faults.append(f"{load.completion_tokens} tokens generated, not {load.completed} × {output}")
    if known is not None and abs(load.prompt_tokens - known) > PROMPT_SLACK * known:
        faults.append(f"{load.prompt_tokens} prompt tokens, not {known}")
    if faults:
        yield Finding(
            "tokens",
            "refuted",
            f"{cell.label()}: {', '.join(faults)}",
            "have the server ignore the end of text, with a context limit above prompt plus output; measure again",
            result.cell_id,
        )
    elif known is not None and load.prompt_tokens != known:
        yield Finding(
            "tokens",
            "note",
            f"{cell.label()}: the client counts {load.prompt_tokens} prompt tokens, and {known} were asked",
            "rates of prompt tokens are off by as much",
        )


def _probed(serving: Serving) -> list[int | None]:
    """Prompt tokens from a cache in the answers to one prompt that a server was sent twice before its load."""
    server = serving.settings.get("server")
    probes = server.get("probes") if isinstance(server, Mapping) else None
    found = [probe.get("cached_tokens") for probe in probes or () if isinstance(probe, Mapping)]
    return [count if isinstance(count, int) else None for count in found]


def _may_cache(recipe: Recipe, cell: Cell) -> bool:
    """Whether a prefix cache is part of what a cell measures."""
    asked = bool(recipe.providers[cell.provider].settings.get("prefix_caching"))
    return asked and cell.axes.get("dataset") == "shared-prefix"


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
