"""An engine whose answers are known in advance: what tests of everything around an engine are run against.

Owns its scripts. A recipe for measuring never names it.
"""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from smbench.worker.engines import BatchAnswer, Completion, ServeCommand, Setup, UnsupportedByEngine, fakeserver
from smbench.workloads import SHARING

ENVIRONMENT: Mapping[str, str] = {"SMBENCH_FAKE_ENGINE": "1"}
SETTINGS: Mapping[str, str] = {
    "script": "what it does: a key of SCRIPTS, or nothing for an honest engine",
    "at": "the request at which the script strikes, counted from 0",
    "step_ms": "time of a token, in milliseconds",
    "prefix_caching": "whether prompts with a prefix in common by design are answered from a cache",
}
KERNEL = "FakeLinearKernel"
LAYERS = 4
_started = itertools.count(1)
_asked = itertools.count()


def preload() -> None:
    """Nothing to import."""


def start(setup: Setup) -> Fake:
    """A running fake; scripts of starting strike here."""
    script = str(setup.settings.get("script", ""))
    if script and script not in {*SCRIPTS, *STARTS}:
        raise ValueError(f"unknown script {script!r}; known: {', '.join([*STARTS, *sorted(SCRIPTS)])}")
    if script in STARTS:
        STARTS[script]()
    return Fake(setup, script)


def serve_command(setup: Setup, host: str, port: int) -> ServeCommand:
    """The server of `fakeserver`, which takes the same settings and has scripts of its own."""
    if next(_asked) == 0:
        # as engines do when they are imported
        os.environ["SMBENCH_FAKE_IMPORTED"] = "1"
    options = [f"--{name.replace('_', '-')}={value}" for name, value in setup.settings.items()]
    return ServeCommand(
        argv=(sys.executable, "-m", "smbench.worker.engines.fakeserver", f"--host={host}", f"--port={port}", *options),
        model=fakeserver.MODEL,
        version="1.0",
        settings={"enable_prefix_caching": False, "dtype": setup.dtype},
    )


def token(prompt: Sequence[int], index: int) -> int:
    """Token `index` of the answer to a prompt."""
    return (sum(prompt) + 31 * index) % 1000


class Fake:
    """Answers every prompt with tokens that follow from its own, at a fixed pace."""

    version = "1.0"

    def __init__(self, setup: Setup, script: str) -> None:
        self._script = script
        self._at = int(setup.settings.get("at", 0))
        self._step_s = int(setup.settings.get("step_ms", 0)) / 1000
        self._served = 0
        self._shared = setup.input_len // 2 if setup.prefix_caching else 0
        self.settings: Mapping[str, Any] = {
            "max_model_len": setup.limits.max_model_len,
            "max_num_seqs": setup.limits.max_num_seqs,
            "enable_prefix_caching": setup.prefix_caching,
            "dtype": setup.dtype,
            "max_num_batched_tokens": setup.chunk_tokens,
            "engines_in_process": next(_started),
        }
        linear = {"OtherLinearKernel": LAYERS} if script == "wrong-kernel" else {KERNEL: LAYERS}
        self.kernels: Mapping[str, Mapping[str, int]] = {"linear": linear, "attention": {"FAKE_ATTN": LAYERS}}

    def generate(self, prompt: Sequence[int], output_len: int, top_logprobs: int = 0) -> Completion:
        """The answer, or what the script says."""
        strikes = self._script if self._served == self._at else ""
        self._served += 1
        if strikes in STRIKES:
            STRIKES[strikes]()
        began = time.perf_counter()
        time.sleep(self._step_s)
        ttft_s = time.perf_counter() - began
        time.sleep(self._step_s * (output_len - 1))
        generated = output_len - 1 if strikes == "short" else output_len
        return Completion(
            token_ids=[token(prompt, index) for index in range(generated)],
            prompt_tokens=len(prompt) // 2 if strikes == "truncated" else len(prompt),
            finish_reason="stop" if strikes == "short" else "length",
            cached_tokens=len(prompt) - 1 if strikes == "cached" else 0,
            ttft_s=None if strikes == "no-clock" else ttft_s,
        )

    def batch(self, prompts: Sequence[Sequence[int]], output_len: int, stepwise: bool) -> BatchAnswer:
        """The answers, or what the script says of the last prompt."""
        strikes = self._script if self._served == self._at else ""
        self._served += 1
        if strikes in STRIKES:
            STRIKES[strikes]()
        step_s = []
        for _ in range(output_len):
            began = time.perf_counter()
            time.sleep(self._step_s)
            step_s.append(time.perf_counter() - began)
        seen = stepwise and strikes != "no-clock"
        tokens = [[token(prompt, index) for index in range(output_len)] for prompt in prompts]
        if strikes == "short":
            tokens[-1].pop()
        halved = len(prompts[-1]) // 2 if strikes == "truncated" else 0
        hits = len(prompts[-1]) - 1 if strikes == "cached" else 0
        # a step that nobody saw is missing from the record, which is no faster for it
        kept = step_s[1:-1] if strikes == "lost-step" else step_s[1:]
        return BatchAnswer(
            token_ids=tokens,
            prompt_tokens=[*(len(prompt) for prompt in prompts[:-1]), len(prompts[-1]) - halved],
            finish_reasons=["length"] * (len(prompts) - 1) + ["stop" if strikes == "short" else "length"],
            # every prompt of a group but its first finds what they share
            cached_tokens=hits + self._shared * (len(prompts) - -(-len(prompts) // SHARING)),
            prefill_s=step_s[0] if seen else None,
            step_s=kept if seen else (),
            step_clock="engine-step" if seen else "none",
        )

    def tracer(self, folder: Path) -> None:
        """Nothing of its own: nothing is computed."""

    def memory(self) -> Mapping[str, int]:
        """Round numbers."""
        return {"weights_bytes": 1 << 20, "kv_cache_tokens": 4096}

    def close(self) -> None:
        """Hangs where the script says so."""
        if self._script == "hang-at-close":
            _hang()


def _unsupported() -> None:
    raise UnsupportedByEngine("the fake engine does not offer this")


def _out_of_memory() -> None:
    raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 TiB.\nand more words")


def _raise() -> None:
    raise RuntimeError("the fake engine is broken\nin two lines")


def _crash() -> None:
    sys.stderr.write("the fake engine's last words\n")
    sys.stderr.flush()
    os.kill(os.getpid(), signal.SIGSEGV)


def _exit() -> None:
    sys.stderr.write("torch.OutOfMemoryError: CUDA out of memory.\n")
    sys.exit(3)


def _hang() -> None:
    time.sleep(600)


def _server() -> None:
    """A server in a session of its own, which outlives the cell; its number is in the log."""
    server = subprocess.Popen(["sleep", "600"], start_new_session=True)
    sys.stderr.write(f"server {server.pid}\n")


def _garbage() -> None:
    os.write(1, b"words on standard output\n")


STARTS: Mapping[str, Callable[[], None]] = {
    "unsupported": _unsupported,
    "oom-at-start": _out_of_memory,
    "hang-at-start": _hang,
    "server": _server,
}
"""What happens before the engine is there."""
STRIKES: Mapping[str, Callable[[], None]] = {
    "raise": _raise,
    "oom": _out_of_memory,
    "crash": _crash,
    "exit": _exit,
    "hang": _hang,
    "garbage": _garbage,
}
"""What happens at a request."""
SCRIPTS = frozenset(
    {*STRIKES, "short", "truncated", "cached", "no-clock", "lost-step", "wrong-kernel", "hang-at-close"}
)
