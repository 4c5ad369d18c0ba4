"""What a run leaves: one record a line of `results.jsonl`. Owns the shape and the status rules, not the file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from smbench.cell import Cell

FORMAT = 1
"""Version of `results.jsonl`, `run.json` and `plan.json`. History: 1 = first."""

Status = Literal["ok", "verified", "incorrect", "invalid", "unsupported", "oom", "timeout", "crashed", "skipped"]
"""`ok` was checked and timed; `verified` was checked and, for a reason, not timed; the others carry a reason only."""

UNTESTED: tuple[Status, ...] = ("incorrect", "invalid", "unsupported", "oom", "timeout", "crashed", "skipped")
"""The statuses that a report lists under situations not tested."""

Seconds = Annotated[FiniteFloat, Field(ge=0)]

DEEPEST = 16
"""Levels of nesting in facts of a machine."""
LARGEST_INTEGER = 2**63 - 1


def _plain_facts(facts: Mapping[str, Any], depth: int = 0) -> Mapping[str, Any]:
    """The facts, if they are JSON that every reader takes alike: no NaN or infinity, no huge integer, not deep."""
    if depth == DEEPEST:
        raise ValueError(f"nested deeper than {DEEPEST}")
    for value in facts.values():
        items = value if isinstance(value, list | tuple) else (value,)
        for item in items:
            if isinstance(item, Mapping):
                _plain_facts(item, depth + 1)
            elif isinstance(item, list | tuple):
                _plain_facts({"": item}, depth + 1)
            elif isinstance(item, float) and not math.isfinite(item):
                raise ValueError(f"{item} is no number")
            elif isinstance(item, int) and abs(item) > LARGEST_INTEGER:
                raise ValueError("an integer has more than 64 bits")
    return facts


Facts = Annotated[Mapping[str, Any], AfterValidator(_plain_facts)]
"""What a machine or a tool said, in its own keys."""


class Record(BaseModel):
    """Base of everything that is stored: immutable, and a key that is not declared is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Work(Record):
    """The least that any implementation must do."""

    bytes: Annotated[int, Field(ge=0)]
    flops: Annotated[int, Field(ge=0)]


class Measurement(Record):
    """Raw samples of one way of timing one cell."""

    name: str
    """The recipe's name of this way, e.g. `document` or `cold`."""
    method: Literal["graph", "event", "wall"]
    """CUDA graph replay between two events; calls between two events; host clock around calls and a synchronize."""
    l2: Literal["cold", "warm", "none"]
    """State of the device's last-level cache before each call; `none` on a CPU, where nothing was controlled."""
    calls_per_sample: Annotated[int, Field(ge=1)]
    """A sample is the time of this many calls, divided by it."""
    warmup_s: tuple[Seconds, ...]
    """Samples that were taken first and are not counted, per call."""
    samples_s: Annotated[tuple[Annotated[FiniteFloat, Field(gt=0)], ...], Field(min_length=1)]
    """Every counted sample in order, seconds per call. None is ever dropped."""
    busy_s: Seconds
    """Time that the device spent on these samples, flushes between them included."""
    work: Work | None = None
    """Least work of one sample, where the measurements of a cell time different things; else the cell's is meant."""


class OutputError(Record):
    """How one of several outputs compared with its reference, in the words of Check."""

    relative_error: float | None
    elementwise_error: float | None


class Check(Record):
    """How the output compared with the reference."""

    passed: bool
    rounds: int
    """How many sets of fresh random inputs were compared."""
    relative_error: float | None
    """Worst 2-norm error of the change to the output, relative to the reference; None where it was not finite."""
    relative_bound: float
    elementwise_error: float | None
    """Worst single error in units of the reference's root mean square; None where it was not finite."""
    elementwise_bound: float
    reference: str
    """Precision of the truth, e.g. `float64`."""
    outputs: Mapping[str, OutputError] = {}
    """By output, where an operation has several; the worst of them stands above."""


class Memory(Record):
    """What one forward and one backward pass need beyond what was there before them."""

    method: Literal["allocator", "saved-tensors"]
    """The CUDA caching allocator's own count; or what autograd keeps, without the output, where nobody counts."""
    saved_bytes: Annotated[int, Field(ge=0)]
    """Held between the passes: the output and everything that the forward pass keeps for the backward pass."""
    peak_bytes: Annotated[int, Field(ge=0)] | None
    """Most at a time during both, gradients included; None where nobody counts."""
    snapshot: str | None = None
    """PyTorch's memory snapshot, its place below the run folder: `native/<cell_id>.memory.pickle`; None: not kept."""
    snapshot_sha256: str | None = None
    timeline_bytes: tuple[int, ...] = ()
    """In use after each allocation or release, in order; empty where there is no snapshot or too much in it."""
    backward_at: Annotated[int, Field(ge=0)] | None = None
    """How many entries of the timeline belong to the forward pass."""


class Selection(Record):
    """Which launch parameters ran."""

    source: str
    """`default`, `tuned-exact`, `tuned-nearest: …`, `given` or `library`."""
    config: Mapping[str, int]
    kernels: Mapping[str, Mapping[str, int]] = {}
    """Compiled facts by kernel: num_warps, num_stages, shared_bytes, registers, spills."""


class Request(Record):
    """One request to an engine, warm-ups included, in the order in which they were sent."""

    prompt_tokens: Annotated[int, Field(ge=0)]
    """As the engine counts them."""
    completion_tokens: Annotated[int, Field(ge=0)]
    finish_reason: str
    """The engine's own word; `length` where it generated all that was asked."""
    cached_tokens: int | None
    """Prompt tokens that came from a prefix cache; None where the engine does not say."""
    e2e_s: Seconds
    """Host clock, from handing over the prompt to having the last token."""
    ttft_s: Seconds | None
    """From handing over the prompt to its first token, by the engine's own clock; None where it has none."""
    output_sha256: str
    """Of the generated token ids."""


class Batch(Record):
    """One repetition of a batch that is handed over at once, warm-ups included, in the order in which they ran."""

    batch: Annotated[int, Field(ge=1)]
    """Prompts."""
    prompt_tokens: Annotated[int, Field(ge=0)]
    """Of all prompts, as the engine counts them."""
    completion_tokens: Annotated[int, Field(ge=0)]
    """Of all prompts."""
    cached_tokens: int | None
    """Prompt tokens that came from a prefix cache; None where the engine does not say."""
    finish_reasons: Mapping[str, int]
    """The engine's own words and how many prompts ended by each; `length` where all that was asked was generated."""
    e2e_s: Seconds
    """From handing over the batch to having the last token: with a clock of steps their sum, the first one included."""
    prefill_s: Seconds | None
    """From handing over the batch to having every prompt's first token; None where nobody saw it."""
    step_s: tuple[Seconds, ...]
    """The decode steps in order, one fewer than tokens of a prompt; empty where an engine has no steps to time."""
    output_sha256: str
    """Of the generated token ids, a line for each prompt."""


class Load(Record):
    """What the load client saw of one cell of a server."""

    client: str
    """Name and version of the load client, e.g. `vllm bench serve 0.32.0`."""
    native: str
    """The client's own file, its place below the run folder: `native/<cell_id>.json`."""
    native_sha256: str
    """Of that file as it is kept: as the client wrote it, but for generated texts and tracebacks."""
    duration_s: Seconds
    """From the first request to the last answer."""
    completed: Annotated[int, Field(ge=0)]
    failed: Annotated[int, Field(ge=0)]
    errors: Mapping[str, int] = {}
    """Kind of failure to how many requests failed by it."""
    prompt_tokens: Annotated[int, Field(ge=0)]
    """Of all completed requests."""
    completion_tokens: Annotated[int, Field(ge=0)]
    """Of all completed requests."""
    ttft_s: tuple[Seconds, ...]
    """Of each completed request."""
    tpot_s: tuple[Seconds, ...]
    """Of each completed request with more than one output token."""
    itl_s: tuple[Seconds, ...]
    """Between any two tokens that followed each other, of all completed requests."""
    e2e_s: tuple[Seconds, ...]
    """Of each completed request."""
    request_rate: Annotated[FiniteFloat, Field(gt=0)] | None = None
    """Requests per second that were sent; None for all at once."""
    max_concurrency: Annotated[int, Field(ge=1)] | None = None
    """None for no limit."""
    burstiness: Annotated[FiniteFloat, Field(gt=0)] | None = None
    """Shape of the gamma distribution of gaps between requests, 1 for a Poisson process; None where nobody says."""


class Prompts(Record):
    """Which prompts a batch or a load consisted of."""

    dataset: str
    count: Annotated[int, Field(ge=1)]
    tokens: Annotated[int, Field(ge=0)] | None
    """Of all prompts of one repetition; None where a client drew them as text."""
    sha256: str | None
    """Of the token ids of the first counted repetition, a line for each prompt; None as above."""
    file_sha256: str | None = None
    """Of the file that they were taken from; None where they were made."""


class Kernel(Record):
    """What a profiler says of one kernel or operator."""

    name: str
    calls: Annotated[int, Field(ge=1)]
    device_s: Seconds
    """Time of all calls: on the GPU, or on the processor where there is none."""
    share: Annotated[FiniteFloat, Field(ge=0, le=1)]
    """Of the time of everything that the profiler saw there."""


class Trace(Record):
    """One more repetition under a profiler, after the last that counts."""

    tool: str
    """Name and version, e.g. `torch.profiler 2.13.0`."""
    note: str | None = None
    """Why there is no trace, or no file of it."""
    file: str | None
    """The trace's place below the run folder; None where `note` says why."""
    file_sha256: str | None
    size_bytes: Annotated[int, Field(ge=0)]
    """Of the trace, kept or not."""
    repetition_s: Seconds
    """How long the repetition took under the profiler; no measurement."""
    kernels: tuple[Kernel, ...]
    """The longest ones, by time."""


class OutputCheck(Record):
    """How an engine's outputs compared with another engine's on the same weights."""

    passed: bool
    reference: str
    """What told the truth, e.g. `transformers, dequantized weights, float32`."""
    tokens: int
    """Generated tokens that were compared, each given the reference's own tokens before it where they differ."""
    equal_tokens: int
    logprob_error: float | None
    """Largest difference of a compared token's log-probability, in nats; None where the engine gave none."""
    logprob_bound: float
    faults: tuple[str, ...] = ()


class Serving(Record):
    """What an engine said and did in a cell."""

    engine: str
    version: str
    kernels: Mapping[str, Mapping[str, int]]
    """What really runs, by role (`linear`, `attention`): name of the implementation to number of layers."""
    settings: Facts
    """Every setting as the engine resolved it."""
    requests: tuple[Request, ...] = ()
    """Of a `generate` cell."""
    batches: tuple[Batch, ...] = ()
    """Of a `static_batch` or `offline` cell."""
    load: Load | None = None
    """Of an `online` cell."""
    prompts: Prompts | None = None
    """Of every cell but those of `generate`, whose prompts follow from the cell alone."""
    step_clock: Literal["engine-step", "stream", "none"] | None = None
    """How the steps of batches were seen: the engine was asked for each; tokens came one by one; not at all."""
    memory: Mapping[str, int] = {}
    """Bytes and tokens that the engine reported: weights_bytes, kv_cache_tokens, peak_bytes."""
    output: OutputCheck | None = None
    """None where the profile compares with no reference."""
    trace: Trace | None = None
    """None where nobody asked for one."""

    @property
    def served(self) -> bool:
        """Whether the engine did anything at all, and nothing of it failed."""
        loaded = self.load is not None and self.load.completed > 0 and self.load.failed == 0
        return bool(self.requests) or bool(self.batches) or loaded


class Result(Record):
    """One measured, verified or failed cell."""

    record: Literal["result"] = "result"
    cell_id: str
    cell: Cell
    status: Status
    reason: str | None = None
    """Why there is no number; also why a `verified` cell was not timed. None exactly when the status is `ok`."""
    environment_id: str | None = None
    """The environment record that this result was made in; None when no worker came so far."""
    check: Check | None = None
    memory: Memory | None = None
    """What only operations have that consist of a forward and a backward pass."""
    selection: Selection | None = None
    serving: Serving | None = None
    """What only cells of engines have."""
    work: Work | None = None
    measurements: tuple[Measurement, ...] = ()
    counts: Mapping[str, int] = {}
    """What the calls of this cell, checks and warm-ups included, moved and met, by the provider's own names."""
    telemetry: Facts = {}
    phases_s: Mapping[str, Seconds] = {}
    """Wall clock of the worker's steps for this cell: inputs, compile, check, memory, capture, total."""
    compilations: int = 0
    """Kernels that were compiled for this cell because no cache held them."""
    started_at: str
    """UTC, ISO 8601."""

    @model_validator(mode="after")
    def _status_decides_shape(self) -> Self:
        if self.cell_id != self.cell.cell_id:
            raise ValueError(f"cell_id {self.cell_id} is not the hash of the cell ({self.cell.cell_id})")
        if (self.reason is None) != (self.status == "ok"):
            raise ValueError(f"status {self.status!r} {'needs' if self.reason is None else 'takes no'} reason")
        if (self.status == "ok") != bool(self.measurements):
            raise ValueError(f"status {self.status!r} with {len(self.measurements)} measurements")
        if self.status in ("ok", "verified") and not self._checked:
            raise ValueError(f"status {self.status!r} without a passed correctness check")
        return self

    @property
    def _checked(self) -> bool:
        """An operation was compared with its reference; an engine served requests, and passed where it was compared."""
        if self.cell.kind == "op":
            return self.check is not None and self.check.passed
        return (
            self.serving is not None
            and self.serving.served
            and (self.serving.output is None or self.serving.output.passed)
        )


class Environment(Record):
    """The machine and software that results were made in, stored once for each distinct one."""

    record: Literal["environment"] = "environment"
    environment_id: str
    environment: Facts


class Session(Record):
    """One invocation of `run` on the folder: what a rental paid for."""

    record: Literal["session"] = "session"
    started_at: str
    wall_s: Seconds
    worker_start_s: Seconds
    """Process starts, imports and device initialization of all workers."""
    compile_s: Seconds = 0.0
    """Compiling kernels on all cores before the first cell, of all workers."""
    workers: int
    results: int
    """How many results this session appended."""
    ended: Literal["finished", "interrupted", "failed"]
    price_per_hour: Annotated[FiniteFloat, Field(ge=0)] | None = None
    """What the machine costs, in the user's currency; None where nobody said."""
    timer_checks: tuple[Facts, ...] = ()
    """Each worker's timing of a kernel of known length, by method."""


AnyRecord = Annotated[Result | Environment | Session, Field(discriminator="record")]
