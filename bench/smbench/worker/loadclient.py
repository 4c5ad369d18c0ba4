"""`vllm bench serve` against a server: its command line, its process, how far it has come. Owns that program's run.

It comes from the stack of vLLM whatever engine the server is of, so that all engines meet the same client. Does not own
the server (`server`), what its file means (`loadresult`), nor what a cell makes of it (`online`).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import smbench
from smbench.worker import loopback, warden
from smbench.worker.cellprocess import tail
from smbench.worker.processes import descendants
from smbench.worker.server import Server

PERCENTILES = "50,90,95,99"
METRICS = "ttft,tpot,itl,e2el"
ENDPOINT = "/v1/completions"
POLL_S = 0.2
GRACE_S = 2.0
"""The client gets this long to end when it shall."""
AFTER_SERVER_S = 10.0
"""A client whose server has died gets this long to fail the rest of its requests and to write its file."""

WORDS_BYTES = 4000
"""The end of a log in which the reason of an early end is looked for."""

Ending = Literal["ended", "server died", "silent"]


@dataclass(frozen=True, slots=True)
class Load:
    """What a server is asked."""

    prompts: Sequence[Sequence[int] | str]
    output_len: int
    request_rate: str
    """`inf`, or requests per second."""
    max_concurrency: int
    """0 for no limit."""
    warmups: int
    seed: int


@dataclass(frozen=True, slots=True)
class Turns:
    """A process and the processor, by the account of Linux's scheduler (/proc/PID/schedstat).

    A client that is ready to run and has to wait sees tokens late, and several at once.
    """

    ran_s: float
    waited_s: float
    """Ready to run, while something else ran."""

    @classmethod
    def of(cls, pid: int) -> Turns | None:
        """As of now, for the main thread; None for a process that is gone, or where the kernel keeps no account."""
        try:
            ran, waited, _ = Path(f"/proc/{pid}/schedstat").read_text(encoding="ascii").split()
        except (OSError, ValueError):
            return None
        return cls(int(ran) / 1e9, int(waited) / 1e9)

    def since(self, before: Turns) -> Turns:
        """What was added."""
        return Turns(self.ran_s - before.ran_s, self.waited_s - before.waited_s)


@dataclass(frozen=True, slots=True)
class Run:
    """How a client's run went."""

    ending: Ending
    code: int
    """Exit code of the client below its warden."""
    done: int
    """Requests that it said were answered, or had failed, before it ended or the server died."""
    file: Path | None
    """Its own result, where it wrote one."""
    turns: Turns | None = None
    """What the client had of the processor while the load ran; None where Linux does not say."""


def command(python: Path, load: Load, server: Server, folder: Path) -> list[str]:
    """The client's command; `folder` has the prompts and gets the result."""
    arguments = [
        "--backend=openai",
        f"--base-url=http://{loopback.HOST}:{server.port}",
        f"--endpoint={ENDPOINT}",
        f"--model={server.command.model}",
        # the client runs in the model's folder, so that its file names no place
        "--tokenizer=.",
        "--dataset-name=custom",
        f"--dataset-path={folder / 'prompts.jsonl'}",
        f"--num-prompts={len(load.prompts)}",
        f"--request-rate={load.request_rate}",
        f"--num-warmups={load.warmups}",
        # the server is known to be ready
        "--ready-check-timeout-sec=0",
        f"--seed={load.seed}",
        "--temperature=0",
        "--ignore-eos",
        "--save-result",
        "--save-detailed",
        f"--result-dir={folder}",
        "--result-filename=result.json",
        f"--percentile-metrics={METRICS}",
        f"--metric-percentiles={PERCENTILES}",
    ]
    if load.max_concurrency:
        arguments.append(f"--max-concurrency={load.max_concurrency}")
    return [str(python), "-m", "smbench.worker.benchserve", *arguments]


def environment(own: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What the client runs in: no proxy, no credential, no hub, and this very smbench wherever its Python is."""
    places = [str(Path(smbench.__file__).parents[1]), own.get("PYTHONPATH", "")]
    return {
        **loopback.private(own),
        "PYTHONPATH": os.pathsep.join(place for place in places if place),
        # a file in the model's folder must not be imported
        "PYTHONSAFEPATH": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }


def run(
    python: Path,
    load: Load,
    server: Server,
    folder: Path,
    model: Path,
    log: Path,
    silent_s: float,
    beat: Callable[[], None],
) -> Run:
    """Run the client to its end; `beat` is called whenever a request is done.

    Ended early: the server died, or no request was done for `silent_s`. Nothing of the client is left.
    """
    rows = [json.dumps({"prompt": prompt, "output_tokens": load.output_len}) + "\n" for prompt in load.prompts]
    (folder / "prompts.jsonl").write_text("".join(rows), encoding="utf-8")
    words = warden.command(command(python, load, server, folder), GRACE_S)
    with log.open("wb") as file:
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            cwd=model,
            env=environment(),
            start_new_session=True,
        )
    progress = Progress(log, len(load.prompts))
    try:
        ending, done, turns = _watch(process, server, progress, silent_s, beat)
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait()
    result = folder / "result.json"
    return Run(ending, process.returncode, done, result if result.is_file() else None, turns)


class Progress:
    """How far a load has come by the client's own bar, read from a log that grows."""

    BEGINS = "Starting main benchmark run"

    def __init__(self, log: Path, count: int) -> None:
        self._log = log
        self._bar = re.compile(rf"(\d+)/{count} \[")
        self._read = 0
        self._rest = ""
        self._began = False
        self.done: int | None = None
        """Requests that are done; None before the load begins."""

    def look(self) -> int | None:
        """Read on; the requests that are done now."""
        with self._log.open("rb") as file:
            file.seek(self._read)
            new = file.read()
        self._read += len(new)
        text = self._rest + new.decode("utf-8", errors="replace")
        if not self._began:
            # the bar of the warm-up may count to the same number
            _, begins, after = text.rpartition(self.BEGINS)
            if begins:
                self._began, self.done, text = True, 0, after
        if self._began and (found := self._bar.findall(text)):
            self.done = int(found[-1])
        # what was read may end within a word
        self._rest = text[-len(self.BEGINS) :]
        return self.done


def _watch(
    process: subprocess.Popen[bytes],
    server: Server,
    progress: Progress,
    silent_s: float,
    beat: Callable[[], None],
) -> tuple[Ending, int, Turns | None]:
    """Wait for the client's end; how it came about, how many requests were done until then, and its turns."""
    heard = time.monotonic()
    died: float | None = None
    done = 0
    client: int | None = None
    first: Turns | None = None
    last: Turns | None = None
    while process.poll() is None:
        now = time.monotonic()
        before = progress.done
        if progress.look() != before:
            heard = now
            beat()
        if progress.done is not None:
            # the warden's first child; looked for once, since that reads all of /proc
            client = client or next(iter(descendants(process.pid)), None)
            turns = Turns.of(client) if client else None
            first, last = first or turns, turns or last
        if died is None:
            # what a client is refused once nobody answers is not done
            done = progress.done or 0
            died = None if server.alive else now
        if died is not None and now > died + AFTER_SERVER_S:
            return "server died", done, None
        if died is None and now > heard + silent_s:
            return "silent", done, None
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(POLL_S)
    if not server.alive:
        return "server died", done, None
    return "ended", progress.look() or 0, last.since(first) if first and last else None


def is_missing(log: Path) -> bool:
    """Whether a client ended because vLLM, or smbench, is not in its Python."""
    return re.search(r"No module named '?(?:vllm|smbench)\b", tail(log, WORDS_BYTES)) is not None


def version(native: Mapping[str, Any]) -> str:
    """Name and version of the client, as its file has it."""
    return str(native.get("client", "vllm bench serve"))
