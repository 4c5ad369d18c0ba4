"""Run folders of document 004 with exact, made-up numbers, for tests of its report. No engine, no server, no worker."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import fake_run
from smbench.cell import Cell
from smbench.recipe import Profile
from smbench.result import Batch, Kernel, Load, Measurement, Prompts, Result, Serving, Session, Status, Trace
from smbench.shapes import SHAPES
from smbench.workloads import MEASURES, facts_of, measures_of, work_of

GPU: Mapping[str, Any] = {**fake_run.GPU, "libraries": {"torch": "2.13.0", "vllm": "0.32.0"}}
CPU: Mapping[str, Any] = {**fake_run.CPU, "libraries": {"torch": "2.13.0", "vllm": "0.32.0", "transformers": "5.19.0"}}
VERSIONS: Mapping[str, str] = {
    "vllm": "0.32.0",
    "sglang": "0.5.23",
    "lmdeploy": "0.18.0",
    "trtllm": "1.2.0",
    "transformers": "5.19.0",
}

PREFILL_S: Mapping[str, float] = {
    "vllm": 0.4,
    "sglang": 0.36,
    "lmdeploy-turbomind": 0.48,
    "lmdeploy-pytorch": 0.6,
    "tensorrt-llm": 0.32,
    "vllm-cpu": 0.04,
    "transformers": 0.05,
}
"""Seconds of a prefill of 4 × 1024 tokens on one GPU, or of 4 × 64 on a processor."""
STEP_S: Mapping[str, float] = {
    "vllm": 0.016,
    "sglang": 0.0164,
    "lmdeploy-turbomind": 0.02,
    "lmdeploy-pytorch": 0.024,
    "tensorrt-llm": 0.0128,
    "vllm-cpu": 0.005,
    "transformers": 0.008,
}
"""Seconds of a decode step of four sequences on one GPU, or on a processor."""
REPETITIONS = (1.5, 1.0, 0.98, 1.03)
"""Of each time, the warm-up first."""
CAPACITY: Mapping[str, float] = {"vllm": 12.0, "sglang": 10.0, "lmdeploy-turbomind": 6.0, "vllm-cpu": 6.0}
"""Requests a second that a server completes at most."""
OUTPUT = 9
"""Output tokens of a request of a load."""


def _measures(profile: str) -> str:
    names = list(dict.fromkeys(name for names in MEASURES.values() for name in names))
    return "".join(
        f"""
[[profile.{profile}.measure]]
name = "{name}"
title = "{name}"
method = "wall"
l2 = "none"
calls = 1
warmup = 1
samples = 3
window_s = 60.0
"""
        for name in names
    )


def _provider(name: str, title: str, color: str, engine: str, more: str = "") -> str:
    return f"""
[providers.{name}]
title = "{title}"
color = "{color}"
selection = "library"
engine = "{engine}"
{more}
"""


RECIPE = "".join(
    [
        """\
format = 1
name = "frameworks"
title = "Inference frameworks: one set of metrics"
document = "004"
protocol_version = 1
kind = "engine"
stack = "vllm"
seed = 0
template = "frameworks.md.j2"
baseline = "vllm"
headline = "e2e_latency"
published = ["sglang-one-batch"]
""",
        _provider("vllm", "vLLM", "#1f77b4", "vllm"),
        _provider("sglang", "sglang", "#d62728", "sglang", 'stack = "sglang"'),
        _provider("lmdeploy-turbomind", "LMDeploy TurboMind", "#2ca02c", "lmdeploy", 'stack = "lmdeploy"'),
        _provider("tensorrt-llm", "TensorRT-LLM", "#9467bd", "trtllm", 'stack = "trtllm"'),
        _provider("vllm-cpu", "vLLM on the CPU", "#1f77b4", "vllm", 'devices = ["cpu"]'),
        _provider("transformers", "transformers", "#7f7f7f", "transformers"),
        """
[profile.full]
device = "cuda"
providers = ["vllm", "sglang", "lmdeploy-turbomind", "tensorrt-llm"]
time_limit_s = 900.0
estimate = { startup_s = 30.0, cell_s = 60.0, source = "made up" }
engine = { max_model_len = 4096, max_num_seqs = 256, memory_fraction = 0.85 }
""",
        _measures("full"),
        """
[[profile.full.grid]]
ops = ["static_batch"]
[profile.full.grid.axes]
model = ["synthetic:qwen2.5-7b-bf16"]
dtype = ["bfloat16"]
batch = [4, 8]
input_len = [1024]
output_len = [1, 1024]
tensor_parallel = [1, 8]
graphs = ["default"]

[[profile.full.grid]]
ops = ["offline"]
[profile.full.grid.axes]
model = ["synthetic:qwen2.5-7b-bf16"]
dtype = ["bfloat16"]
dataset = ["random", "sharegpt"]
num_prompts = [10, 1000]
input_len = [1024]
output_len = [256]
tensor_parallel = [1]
graphs = ["default"]

[[profile.full.grid]]
ops = ["online"]
[profile.full.grid.axes]
model = ["synthetic:qwen2.5-7b-bf16"]
dtype = ["bfloat16"]
dataset = ["random"]
num_prompts = [64]
input_len = [1024]
output_len = [9]
request_rate = ["2", "8", "16", "inf"]
max_concurrency = [0]
tensor_parallel = [1]
graphs = ["default"]

[[profile.full.grid]]
ops = ["online"]
[profile.full.grid.axes]
model = ["synthetic:qwen2.5-7b-bf16"]
dtype = ["bfloat16"]
dataset = ["random"]
num_prompts = [64]
input_len = [1024]
output_len = [9]
request_rate = ["inf"]
max_concurrency = [1, 8]
tensor_parallel = [1]
graphs = ["default"]

[profile.cpu]
device = "cpu"
providers = ["transformers", "vllm-cpu"]
time_limit_s = 120.0
estimate = { startup_s = 15.0, cell_s = 6.0, source = "made up" }
engine = { max_model_len = 512, max_num_seqs = 16, memory_fraction = 0.5 }
""",
        _measures("cpu"),
        """
[[profile.cpu.grid]]
ops = ["static_batch"]
[profile.cpu.grid.axes]
model = ["synthetic:tiny-bf16"]
dtype = ["bfloat16"]
batch = [4]
input_len = [64]
output_len = [1, 16]
tensor_parallel = [1]
graphs = ["eager"]

[[profile.cpu.grid]]
ops = ["offline"]
[profile.cpu.grid.axes]
model = ["synthetic:tiny-bf16"]
dtype = ["bfloat16"]
dataset = ["random"]
num_prompts = [10]
input_len = [64]
output_len = [16]
tensor_parallel = [1]
graphs = ["eager"]

[[profile.cpu.grid]]
ops = ["online"]
providers = ["vllm-cpu"]
[profile.cpu.grid.axes]
model = ["synthetic:tiny-bf16"]
dtype = ["bfloat16"]
dataset = ["random"]
num_prompts = [24]
input_len = [64]
output_len = [9]
request_rate = ["4"]
max_concurrency = [0]
tensor_parallel = [1]
graphs = ["eager"]
""",
    ]
).encode()
"""A recipe of document 004: its static batches on one and eight GPUs, offline, rates and concurrencies."""

Outcome = Callable[[Cell, Profile], Result | None]


def build(
    folder: Path,
    profile: str,
    outcome: Outcome,
    environments: Sequence[Mapping[str, Any]] = (GPU,),
    recipe_text: bytes = RECIPE,
) -> Path:
    """Write a run folder; `outcome` gives each cell's result, None for a cell that was not reached."""
    made = Session(
        started_at=fake_run.STARTED_AT, wall_s=3000.0, worker_start_s=40.0, workers=4, results=1000, ended="finished"
    )
    return fake_run.build(folder, recipe_text, profile, outcome, environments, (made,))


def number(cell: Cell, axis: str) -> int:
    return int(cell.axes[axis])


def prefill_s(cell: Cell) -> float:
    """Proportional to the batch; eight GPUs are four times as fast as one."""
    return PREFILL_S[cell.provider] * number(cell, "batch") / 4 / (4 if cell.axes["tensor_parallel"] == 8 else 1)


def step_s(cell: Cell) -> float:
    """A quarter longer for twice the batch."""
    slower = 1.25 if cell.axes["batch"] == 8 else 1.0
    return STEP_S[cell.provider] * slower / (4 if cell.axes["tensor_parallel"] == 8 else 1)


def batches(cell: Cell) -> tuple[Batch, ...]:
    """The repetitions of a static or offline cell."""
    output = number(cell, "output_len")
    count = number(cell, "batch") if cell.subject == "static_batch" else number(cell, "num_prompts")
    found = []
    for i, factor in enumerate(REPETITIONS):
        if cell.subject == "static_batch":
            prefill: float | None = factor * prefill_s(cell)
            steps = tuple(factor * step_s(cell) for _ in range(output - 1))
            e2e = (prefill or 0.0) + sum(steps)
        else:
            prefill, steps = None, ()
            e2e = factor * (1.0 + count * output * STEP_S[cell.provider] / 64)
        found.append(
            Batch(
                batch=count,
                prompt_tokens=count * number(cell, "input_len"),
                completion_tokens=count * output,
                cached_tokens=0,
                finish_reasons={"length": count},
                e2e_s=e2e,
                prefill_s=prefill,
                step_s=steps,
                output_sha256=hashlib.sha256(f"{cell.cell_id} {i}".encode()).hexdigest(),
            )
        )
    return tuple(found)


def load(cell: Cell, **changes: Any) -> Load:
    """What a client would see of a server that answers at its capacity and at a latency that grows with its load."""
    count, output = number(cell, "num_prompts"), number(cell, "output_len")
    rate = None if cell.axes["request_rate"] == "inf" else float(cell.axes["request_rate"])
    limit = number(cell, "max_concurrency") or None
    step = STEP_S[cell.provider] * (1 + (limit or (8 if rate is None else rate)) / 16)
    first = PREFILL_S[cell.provider] / 4
    capacity = CAPACITY[cell.provider]
    if limit is not None:
        ttft = [first] * count
        duration = count * (first + (output - 1) * step) / limit
    else:
        arrival = [0.0 if rate is None else i / rate for i in range(count)]
        # one after the other leaves at the capacity: who comes faster waits
        left: list[float] = []
        for at in arrival:
            left.append(max(at, left[-1] if left else 0.0) + (1 / capacity))
        ttft = [first + max(0.0, end - 1 / capacity - at) for end, at in zip(left, arrival, strict=True)]
        duration = max(at + t + (output - 1) * step for at, t in zip(arrival, ttft, strict=True))
    e2e = [t + (output - 1) * step for t in ttft]
    fields: dict[str, Any] = {
        "client": "vllm bench serve 0.32.0",
        "native": f"native/{cell.cell_id}.json",
        "native_sha256": hashlib.sha256(cell.cell_id.encode()).hexdigest(),
        "duration_s": duration,
        "completed": count,
        "failed": 0,
        "prompt_tokens": count * number(cell, "input_len"),
        "completion_tokens": count * output,
        "ttft_s": tuple(ttft),
        "tpot_s": (step,) * count,
        "itl_s": (step,) * (count * (output - 1)),
        "e2e_s": tuple(e2e),
        "request_rate": rate,
        "max_concurrency": limit,
        "burstiness": 1.0,
    }
    return Load.model_validate(fields | changes)


def engine_of(cell: Cell) -> str:
    return {"tensorrt-llm": "trtllm"}.get(cell.provider, cell.provider.partition("-")[0])


def settings_of(cell: Cell) -> dict[str, Any]:
    """Settings under the names of the engine."""
    engine, gpus = engine_of(cell), cell.axes["tensor_parallel"]
    found: dict[str, Any] = {"transformers": {"attn_implementation": "sdpa", "dtype": cell.axes["dtype"]}}.get(
        engine, {"dtype": f"torch.{cell.axes['dtype']}"}
    )
    if engine == "vllm":
        found |= {
            "model_config": {"max_model_len": 4096, "enforce_eager": cell.axes["graphs"] == "eager"},
            "cache_config": {"enable_prefix_caching": False, "gpu_memory_utilization": 0.85, "block_size": 16},
            "scheduler_config": {"max_num_seqs": 256, "max_num_batched_tokens": 8192},
            "parallel_config": {"tensor_parallel_size": gpus},
        }
    elif engine == "sglang":
        found |= {
            "context_length": 4100,
            "max_running_requests": 256,
            "disable_radix_cache": True,
            "mem_fraction_static": 0.85,
            "chunked_prefill_size": 8192,
            "tp_size": gpus,
            "page_size": 1,
        }
    elif engine == "lmdeploy":
        found |= {"session_len": 4096, "max_batch_size": 256, "enable_prefix_caching": False, "tp": gpus}
    elif engine == "trtllm":
        found |= {"max_seq_len": 4096, "max_batch_size": 256, "tensor_parallel_size": gpus}
    if cell.subject == "online":
        found |= {
            "server_command": ["python", "-m", f"{engine}.server", "--model", "<model>", "--port", "<port>", "--eager"],
            "client_command": [
                "vllm",
                "bench",
                "serve",
                "--port",
                "<port>",
                "--num-prompts",
                str(number(cell, "num_prompts")),
            ],
        }
    return found


def serving(cell: Cell, **changes: Any) -> Serving:
    """What a well-behaved engine says of a cell."""
    online, static = cell.subject == "online", cell.subject == "static_batch"
    engine = engine_of(cell)
    fields: dict[str, Any] = {
        "engine": engine,
        "version": VERSIONS[engine],
        "kernels": {"linear": {"torch Linear": 112}, "attention": {"FLASH_ATTN": 28}},
        "settings": settings_of(cell),
        "batches": () if online else batches(cell),
        "load": load(cell) if online else None,
        "prompts": Prompts(dataset="random", count=8, tokens=None, sha256=None),
        "step_clock": None if online else "engine-step" if static else "none",
        "memory": {"weights_bytes": 15_200_000_000, "kv_cache_tokens": 355_636},
    }
    return Serving.model_validate(fields | changes)


def samples_of(served: Serving) -> Mapping[str, Sequence[float]]:
    """The values of each measure, those of warm-ups first."""
    if served.load is not None:
        found = served.load
        return {
            "ttft": found.ttft_s,
            "tpot": found.tpot_s,
            "itl": found.itl_s,
            "e2e_latency": found.e2e_s,
            "duration": (found.duration_s,),
        }
    return {
        "prefill_latency": [batch.prefill_s for batch in served.batches if batch.prefill_s is not None],
        "decode_latency": [batch.step_s[0] for batch in served.batches if batch.step_s],
        "e2e_latency": [batch.e2e_s for batch in served.batches],
    }


def ok(cell: Cell, profile: Profile, **changes: Any) -> Result:
    """A measured cell; `changes` are fields of its Serving."""
    served = serving(cell, **changes)
    warmup = 0 if served.load else profile.measure[0].warmup
    work = work_of(facts_of(SHAPES[str(cell.axes["model"]).removeprefix("synthetic:")].config), cell.axes, cell.subject)
    values = samples_of(served)
    measurements = tuple(
        Measurement(
            name=measure.name,
            method="wall",
            l2="none",
            calls_per_sample=1,
            warmup_s=tuple(values[measure.name][:warmup]),
            samples_s=tuple(values[measure.name][warmup:]),
            busy_s=1.0,
            work=work.get(measure.name),
        )
        for measure in profile.measure
        if measure.name in measures_of(cell.subject, cell.axes) and values.get(measure.name)
    )
    return result(cell, "ok", serving=served, measurements=measurements)


def result(cell: Cell, status: Status, reason: str | None = None, **changes: Any) -> Result:
    """A result of any status."""
    ran = status in ("ok", "verified", "incorrect")
    fields: dict[str, Any] = {
        "cell_id": cell.cell_id,
        "cell": cell,
        "status": status,
        "reason": reason,
        "environment_id": "0" if ran else None,
        "phases_s": {"inputs": 0.1, "start": 20.0, "generate": 4.0, "total": 24.5} if ran else {},
        "started_at": fake_run.STARTED_AT,
    }
    return Result.model_validate(fields | changes)


def on_eight_gpus(cell: Cell, profile: Profile) -> Result | None:
    """Everything measured, but for what is not there: a stack, a user's file, a few that fail in ways of their own."""
    if cell.provider == "tensorrt-llm":
        return result(cell, "skipped", "stack 'trtllm' is not here; an image of it can complete the same folder")
    if cell.axes.get("dataset") == "sharegpt":
        return result(cell, "skipped", "no file of conversations was given: SHAREGPT=FILE names one")
    if cell.provider == "lmdeploy-turbomind" and cell.subject == "static_batch" and cell.axes["batch"] == 8:
        return result(cell, "oom", "CUDA out of memory. Tried to allocate 2.00 GiB")
    if cell.provider == "lmdeploy-turbomind" and cell.subject == "online":
        if cell.axes["request_rate"] == "16":
            failed = load(cell, failed=6, completed=58, errors={"HTTP 500": 6})
            return result(
                cell, "incorrect", "6 of 64 requests failed: HTTP 500 6 times", serving=serving(cell, load=failed)
            )
        if cell.axes["request_rate"] == "8":
            return result(cell, "crashed", f"the server died: {fake_run.HOSTILE}")
        if cell.axes["max_concurrency"] == 8:
            return result(cell, "timeout", "the server was not ready after 600 s")
    if cell.provider == "vllm" and cell.subject == "static_batch" and cell.axes["output_len"] == 1:
        return ok(cell, profile, trace=TRACE)
    return ok(cell, profile)


TRACE = Trace(
    tool="torch.profiler 2.13.0",
    file="traces/0123.json",
    file_sha256="0" * 64,
    size_bytes=1_000_000,
    repetition_s=0.5,
    kernels=(
        Kernel(name=f"gemm<{fake_run.HOSTILE}>", calls=28, device_s=0.3, share=0.75),
        Kernel(name="flash_fwd", calls=28, device_s=0.1, share=0.25),
    ),
)


def one_engine(cell: Cell, profile: Profile) -> Result | None:
    """Only vLLM is there."""
    if cell.provider != "vllm":
        return result(cell, "skipped", f"stack '{engine_of(cell)}' is not here")
    return on_eight_gpus(cell, profile)


def on_a_processor(cell: Cell, profile: Profile) -> Result | None:
    """What the cpu profile leaves."""
    return ok(cell, profile)


def nothing_works(cell: Cell, profile: Profile) -> Result | None:
    return result(cell, "crashed", f"RuntimeError: {fake_run.HOSTILE}")


def unfinished(cell: Cell, profile: Profile) -> Result | None:
    """Only static batches were reached."""
    return on_eight_gpus(cell, profile) if cell.subject == "static_batch" else None
