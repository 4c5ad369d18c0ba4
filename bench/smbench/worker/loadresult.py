"""The file of `vllm bench serve` as a load record, as measurements, and as it is kept. Owns what its keys mean.

With `--save-detailed` it has a list for each of `input_lens`, `output_lens`, `ttfts`, `itls` and `errors`, one entry a
request, and in newer versions `latencies` (0.32 has it, 0.26 has not); seconds. A failed request has output length 0.
The latency of a request is to its last token, which is its time to first token plus all gaps between pieces of its
stream (vllm/benchmarks/lib/endpoint_request_func.py).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NATIVE = "native"
"""The folder of clients' own files in a run folder."""
DROPPED = ("generated_texts",)
"""Lists of a client's file that are not kept: random prompts have random answers, and they are the most of the file."""
_LISTS = ("input_lens", "output_lens", "ttfts", "itls", "errors")
_EXCEPTION = re.compile(r"(?:\w+\.)*(\w+)(?::.*)?", re.DOTALL)
NANOSECONDS = 9
"""Digits of a stored second: what the client's clock resolves."""


class NotALoad(ValueError):
    """The client's file is not what it should be; the message says where."""


@dataclass(frozen=True, slots=True)
class Answers:
    """The client's file, request by request."""

    native: Mapping[str, Any]
    prompt_tokens: Sequence[int]
    completion_tokens: Sequence[int]
    """0 for a request that failed."""
    ttft_s: Sequence[float]
    itl_s: Sequence[Sequence[float]]
    e2e_s: Sequence[float]
    errors: Sequence[str]
    """Kind of failure; empty for a request that completed."""

    @property
    def completed(self) -> list[int]:
        """Indices of the requests that did."""
        return [i for i, error in enumerate(self.errors) if not error]

    @property
    def kinds(self) -> Mapping[str, int]:
        """Kind of failure to how many, most frequent first."""
        return dict(Counter(error for error in self.errors if error).most_common())

    def mismatches(self, prompt_tokens: Sequence[int], output_len: int) -> list[str]:
        """Completed requests whose counts of tokens are not what was asked, in words."""
        return [
            f"request {i}: {self.prompt_tokens[i]} prompt and {self.completion_tokens[i]} generated tokens, "
            f"{prompt_tokens[i]} and {output_len} were asked"
            for i in self.completed
            if (self.prompt_tokens[i], self.completion_tokens[i]) != (prompt_tokens[i], output_len)
        ]


def read(path: Path, count: int) -> Answers:
    """The file of a load of `count` requests. NotALoad where it is cut short, or contradicts itself."""
    try:
        native = json.loads(path.read_bytes())
    except ValueError as error:
        raise NotALoad(f"the client's file is no JSON: {error}") from error
    if not isinstance(native, dict):
        raise NotALoad("the client's file holds no JSON object")
    for key in _LISTS:
        if not isinstance(native.get(key), list) or len(native[key]) != count:
            raise NotALoad(f"the client's file: {key!r} is no list of {count} requests")
    lengths = [int(length) for length in native["output_lens"]]
    errors = [_kind(words) if length == 0 else "" for words, length in zip(native["errors"], lengths, strict=True)]
    whole = [ttft + math.fsum(gaps) for ttft, gaps in zip(native["ttfts"], native["itls"], strict=True)]
    told = native.get("latencies", whole)
    completed = errors.count("")
    for key, found in (("completed", completed), ("failed", count - completed)):
        if native.get(key) != found:
            raise NotALoad(f"the client's file: {key!r} is {native.get(key)!r}, and its lists have {found}")
    return Answers(native, native["input_lens"], lengths, native["ttfts"], native["itls"], told, errors)


def load(answers: Answers, client: str, cell_id: str, sha256: str) -> dict[str, Any]:
    """The load record, as it is stored."""
    native, done = answers.native, answers.completed
    rate = native["request_rate"]
    return {
        "client": client,
        "native": f"{NATIVE}/{cell_id}.json",
        "native_sha256": sha256,
        "duration_s": _rounded(native["duration"]),
        "completed": len(done),
        "failed": len(answers.errors) - len(done),
        "errors": answers.kinds,
        "prompt_tokens": sum(answers.prompt_tokens[i] for i in done),
        "completion_tokens": sum(answers.completion_tokens[i] for i in done),
        "ttft_s": [_rounded(answers.ttft_s[i]) for i in done],
        "tpot_s": [_rounded(tpot) for i in done if (tpot := _tpot_s(answers, i)) is not None],
        "itl_s": [_rounded(gap) for i in done for gap in answers.itl_s[i]],
        "e2e_s": [_rounded(answers.e2e_s[i]) for i in done],
        "request_rate": None if rate == "inf" else float(rate),
        "max_concurrency": native.get("max_concurrency"),
        "burstiness": native.get("burstiness"),
    }


def measurements(found: Mapping[str, Any], measures: Sequence[str], work: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The samples of each measure that a load has; one without any sample is left out. KeyError for an unknown one."""
    samples: Mapping[str, Sequence[float]] = {
        "ttft": found["ttft_s"],
        "tpot": found["tpot_s"],
        "itl": found["itl_s"],
        "e2e_latency": found["e2e_s"],
        "duration": [found["duration_s"]],
    }
    return [
        {
            "name": name,
            "method": "wall",
            "l2": "none",
            "calls_per_sample": 1,
            "warmup_s": [],
            "samples_s": samples[name],
            "busy_s": found["duration_s"],
            "work": work.get(name),
        }
        for name in measures
        if samples[name]
    ]


def keep(answers: Answers, folder: Path, cell_id: str) -> str:
    """Write the client's file into a run folder without texts and without where things lie; its SHA-256."""
    kept = {key: value for key, value in answers.native.items() if key not in DROPPED}
    # a traceback names files of this machine
    kept["errors"] = list(answers.errors)
    data = (json.dumps(kept, separators=(",", ":")) + "\n").encode()
    (folder / NATIVE).mkdir(parents=True, exist_ok=True)
    (folder / NATIVE / f"{cell_id}.json").write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def _kind(words: str) -> str:
    """What failed, in few words: an exception's class from its traceback, or the reason of an HTTP status."""
    lines = [line.strip() for line in str(words).splitlines() if line.strip()]
    if not lines:
        return "no answer"
    if lines[0].startswith("Traceback") and (found := _EXCEPTION.fullmatch(lines[-1])):
        return found[1]
    return lines[0][:100]


def _tpot_s(answers: Answers, i: int) -> float | None:
    """Time per output token after the first; None for a single token."""
    tokens = answers.completion_tokens[i]
    return None if tokens < 2 else (answers.e2e_s[i] - answers.ttft_s[i]) / (tokens - 1)


def _rounded(seconds: float) -> float:
    """To a nanosecond, unless nothing would be left."""
    return round(seconds, NANOSECONDS) or seconds
