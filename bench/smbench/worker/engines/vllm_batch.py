"""A batch of prompts in vLLM, at once or step by step. Owns the clock of a step and what makes an answer of steps.

Written against `LLM.generate`, `LLMEngine.add_request` and `LLMEngine.step` of 0.26.0 and 0.32.0, with the engine's
core in this process and asynchronous scheduling off: a step then returns when its tokens are on the host.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Sequence
from typing import Any

from smbench.worker.engines import BatchAnswer

_numbers = itertools.count()


def at_once(llm: Any, prompts: Sequence[Sequence[int]], output_len: int) -> BatchAnswer:
    """All prompts, scheduled as vLLM likes."""
    from vllm.sampling_params import RequestOutputKind

    asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
    answers = llm.generate(asked, _sampling(output_len, RequestOutputKind.FINAL_ONLY), use_tqdm=False)
    return _answer(answers, [list(answer.outputs[0].token_ids) for answer in answers])


def steps(llm: Any, prompts: Sequence[Sequence[int]], output_len: int) -> BatchAnswer:
    """All prompts in one step, then a step for each further token. RuntimeError where a step did not serve all."""
    from vllm.sampling_params import RequestOutputKind

    engine, number = llm.llm_engine, next(_numbers)
    # only what a step added: repeating all tokens so far would make late steps longer
    sampling = _sampling(output_len, RequestOutputKind.DELTA)
    names = [f"{number}-{i}" for i in range(len(prompts))]
    asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
    tokens: dict[str, list[int]] = {name: [] for name in names}
    last: dict[str, Any] = {}
    step_s = []
    began = time.perf_counter()
    for name, prompt in zip(names, asked, strict=True):
        engine.add_request(name, prompt, sampling)
    for step in range(output_len):
        answers = engine.step()
        now = time.perf_counter()
        step_s.append(now - began)
        for answer in answers:
            tokens[answer.request_id] += answer.outputs[0].token_ids
            last[answer.request_id] = answer
        if behind := sum(len(found) != step + 1 for found in tokens.values()):
            engine.abort_request(names)
            raise RuntimeError(f"step {step} of a batch of {len(names)}: {behind} of it did not get their one token")
        # what is kept above is no part of the next step
        began = time.perf_counter()
    if engine.has_unfinished_requests():
        engine.abort_request(names)
        raise RuntimeError(f"a batch goes on after {output_len} steps")
    return _answer([last[name] for name in names], [tokens[name] for name in names], step_s)


def _sampling(output_len: int, kind: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True, detokenize=False, output_kind=kind)


def _answer(answers: Sequence[Any], tokens: Sequence[Sequence[int]], step_s: Sequence[float] = ()) -> BatchAnswer:
    return BatchAnswer(
        token_ids=tokens,
        prompt_tokens=[len(answer.prompt_token_ids) for answer in answers],
        finish_reasons=[str(answer.outputs[0].finish_reason) for answer in answers],
        cached_tokens=_total(answer.num_cached_tokens for answer in answers),
        prefill_s=step_s[0] if step_s else None,
        step_s=step_s[1:],
        step_clock="engine-step" if step_s else "none",
    )


def _total(counts: Iterable[int | None]) -> int | None:
    found = list(counts)
    return None if any(count is None for count in found) else sum(count or 0 for count in found)
