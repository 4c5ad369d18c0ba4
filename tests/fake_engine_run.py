"""Run folders of engines with exact, made-up numbers, for tests of document 002's report. No engine and no worker."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import fake_run
from smbench.cell import Cell
from smbench.recipe import Profile
from smbench.result import Measurement, OutputCheck, Request, Result, Serving, Session, Status
from smbench.workloads import ModelFacts, work_of

QWEN_32B = ModelFacts(
    layers=64,
    hidden=5120,
    intermediate=27648,
    heads=40,
    kv_heads=8,
    head_dim=128,
    vocabulary=152064,
    bits=4,
    group=128,
    tied_embeddings=False,
    context=32768,
)
TINY = ModelFacts(
    layers=4,
    hidden=256,
    intermediate=768,
    heads=4,
    kv_heads=2,
    head_dim=64,
    vocabulary=1024,
    bits=4,
    group=128,
    tied_embeddings=False,
    context=4096,
)
FACTS: Mapping[str, ModelFacts] = {"synthetic:qwen2.5-32b": QWEN_32B, "synthetic:tiny": TINY}
ENGINES: Mapping[str, tuple[str, str]] = {
    "vllm": ("vLLM", "0.26.0"),
    "sglang": ("sglang", "0.5.23"),
    "transformers": ("transformers", "5.19.0"),
}

GPU: Mapping[str, Any] = {**fake_run.GPU, "libraries": {"torch": "2.11.0", "vllm": "0.26.0"}}
CPU: Mapping[str, Any] = {**fake_run.CPU, "libraries": {"torch": "2.13.0", "vllm": "0.32.0", "transformers": "5.19.0"}}

T0_S: Mapping[str, float] = {"vllm-marlin": 1.75, "vllm-exllama": 1.02, "vllm-machete": 1.13, "sglang": 1.71}
"""Seconds of a prefill without what each chunk costs, as eager mode on an H200 roughly has them."""
CHUNK_S: Mapping[str, float] = {"vllm-marlin": 0.0447, "vllm-exllama": 0.0490, "vllm-machete": 0.0330, "sglang": 0.0452}
"""Seconds that each further chunk costs."""
SMALL_ROWS_S = 0.0571
"""The same for the exllama kernel up to 50 rows."""
STEP_S: Mapping[str, float] = {"vllm-marlin": 0.0083, "vllm-exllama": 0.0091, "vllm-machete": 0.0080, "sglang": 0.0081}
"""Seconds of a decode step with CUDA graphs."""
EAGER_STEP_S = 0.0302

RECIPE = b"""\
format = 1
name = "gptq"
title = "gptq speed test"
document = "002"
protocol_version = 1
kind = "engine"
stack = "vllm"
seed = 0
template = "gptq.md.j2"
baseline = "vllm-marlin"
headline = "e2e_latency"
published = ["gptq-rtx4090", "gptq-l40"]

[values]
chunks = [1024, 512, 256, 128, 64, 32]

[providers.vllm-marlin]
title = "vLLM, Marlin"
color = "#1f77b4"
selection = "library"
engine = "vllm"
kernel = "MarlinLinearKernel"

[providers.vllm-exllama]
title = "vLLM, Exllama"
color = "#d62728"
selection = "library"
engine = "vllm"
kernel = "ExllamaLinearKernel"

[providers.vllm-machete]
title = "vLLM, Machete"
color = "#9467bd"
selection = "library"
engine = "vllm"
archs = ["sm90"]
kernel = "MacheteLinearKernel"

[providers.sglang]
title = "sglang"
color = "#2ca02c"
selection = "library"
engine = "sglang"
stack = "sglang"

[providers.vllm-cpu]
title = "vLLM on a processor"
color = "#1f77b4"
selection = "library"
engine = "vllm"
devices = ["cpu"]

[providers.transformers]
title = "transformers, dequantized"
color = "#7f7f7f"
selection = "library"
engine = "transformers"
devices = ["cpu"]

[[unsupported]]
where = { scheduling = "v0-default" }
reason = "vLLM removed this scheduler after 0.10; the nearest present equivalent is scheduling whole"

[profile.full]
device = "cuda"
providers = ["vllm-marlin", "vllm-exllama", "vllm-machete", "sglang"]
time_limit_s = 900.0
estimate = { startup_s = 30.0, cell_s = 60.0, source = "made up" }
engine = { max_model_len = 9000, max_num_seqs = 4, memory_fraction = 0.9 }

[[profile.full.measure]]
name = "e2e_latency"
title = "seconds a request, end to end"
method = "wall"
l2 = "none"
calls = 1
warmup = 1
samples = 10
window_s = 900.0

[[profile.full.measure]]
name = "ttft"
title = "time to first token"
method = "wall"
l2 = "none"
calls = 1
warmup = 1
samples = 10
window_s = 900.0

[[profile.full.measure]]
name = "tpot"
title = "time per output token"
method = "wall"
l2 = "none"
calls = 1
warmup = 1
samples = 10
window_s = 900.0

[[profile.full.grid]]
ops = ["generate"]
[profile.full.grid.axes]
model = ["synthetic:qwen2.5-32b"]
dtype = ["float16"]
input_len = [8000]
output_len = [16]
scheduling = ["chunked"]
chunk_tokens = "chunks"
attention = ["default"]
graphs = ["default"]

[[profile.full.grid]]
ops = ["generate"]
providers = ["vllm-marlin", "vllm-exllama"]
[profile.full.grid.axes]
model = ["synthetic:qwen2.5-32b"]
dtype = ["float16"]
input_len = [8000]
output_len = [16, 512]
scheduling = ["whole", "v0-default"]
chunk_tokens = [9000]
attention = ["default"]
graphs = ["default", "eager"]

[[profile.full.grid]]
ops = ["generate"]
[profile.full.grid.axes]
model = ["synthetic:qwen2.5-32b"]
dtype = ["float16"]
input_len = [8000]
output_len = [512]
scheduling = ["chunked"]
chunk_tokens = [1024]
attention = ["default"]
graphs = ["default"]

[[profile.full.grid]]
ops = ["generate"]
providers = ["vllm-marlin"]
[profile.full.grid.axes]
model = ["synthetic:qwen2.5-32b"]
dtype = ["float16"]
input_len = [8000]
output_len = [16, 512]
scheduling = ["chunked"]
chunk_tokens = [1024]
attention = ["flash-attention", "flashinfer"]
graphs = ["default"]

[profile.cpu]
device = "cpu"
providers = ["vllm-cpu", "transformers"]
time_limit_s = 120.0
estimate = { startup_s = 15.0, cell_s = 6.0, source = "made up" }
engine = { max_model_len = 640, max_num_seqs = 4, memory_fraction = 0.5, reference = "transformers" }

[[profile.cpu.measure]]
name = "e2e_latency"
title = "seconds a request, end to end"
method = "wall"
l2 = "none"
calls = 1
warmup = 1
samples = 3
window_s = 60.0

[[profile.cpu.measure]]
name = "ttft"
title = "time to first token"
method = "wall"
l2 = "none"
calls = 1
warmup = 1
samples = 3
window_s = 60.0

[[profile.cpu.measure]]
name = "tpot"
title = "time per output token"
method = "wall"
l2 = "none"
calls = 1
warmup = 1
samples = 3
window_s = 60.0

[[profile.cpu.grid]]
ops = ["generate"]
[profile.cpu.grid.axes]
model = ["synthetic:tiny"]
dtype = ["float32"]
input_len = [512]
output_len = [4, 32]
scheduling = ["chunked"]
chunk_tokens = [256, 64]
attention = ["default"]
graphs = ["eager"]
"""
"""A recipe of document 002: its prefill sweep, its decoding, its schedulers, and a cpu profile."""

Outcome = Callable[[Cell, Profile], Result | None]


def build(
    folder: Path,
    profile: str,
    outcome: Outcome,
    environments: Sequence[Mapping[str, Any]] = (GPU,),
    price_per_hour: float | None = None,
    recipe_text: bytes = RECIPE,
) -> Path:
    """Write a run folder; `outcome` gives each cell's result, None for a cell that was not reached."""
    made = Session(
        started_at=fake_run.STARTED_AT,
        wall_s=4000.0 if profile == "full" else 240.0,
        worker_start_s=4.0,
        workers=2,
        results=1000,
        ended="finished",
        price_per_hour=price_per_hour,
    )
    return fake_run.build(folder, recipe_text, profile, outcome, environments, (made,))


def number(cell: Cell, axis: str) -> int:
    return int(cell.axes[axis])


def ttft_s(cell: Cell) -> float:
    """A plausible prefill: a part of its own, and a cost of each chunk."""
    if cell.axes["model"] == "synthetic:tiny":
        slow = 2.0 if cell.provider == "transformers" else 1.0
        return slow * (0.06 + 0.004 * (number(cell, "input_len") / number(cell, "chunk_tokens")))
    chunks = -(-number(cell, "input_len") // number(cell, "chunk_tokens"))
    small = cell.provider == "vllm-exllama" and number(cell, "chunk_tokens") <= 50
    return T0_S[cell.provider] + chunks * (SMALL_ROWS_S if small else CHUNK_S[cell.provider])


def step_s(cell: Cell) -> float:
    """A plausible decode step."""
    if cell.axes["model"] == "synthetic:tiny":
        return 0.012 if cell.provider == "transformers" else 0.005
    slower = 1.004 if cell.axes["attention"] == "flashinfer" else 1.0
    return slower * (EAGER_STEP_S if cell.axes["graphs"] == "eager" else STEP_S[cell.provider])


def wobble(cell: Cell, i: int) -> float:
    """A small, exact spread that differs between cells."""
    return 1 + 0.0008 * ((3 * i + int(cell.cell_id[:2], 16)) % 7 - 3)


def requests(cell: Cell, count: int, **changes: Any) -> tuple[Request, ...]:
    """So many requests, the first of them slower."""
    steps = (number(cell, "output_len") - 1) * step_s(cell)
    found = []
    for i in range(count):
        factor = wobble(cell, i) * (1.3 if i == 0 else 1.0)
        fields: dict[str, Any] = {
            "prompt_tokens": number(cell, "input_len"),
            "completion_tokens": number(cell, "output_len"),
            "finish_reason": "length",
            "cached_tokens": 0,
            "e2e_s": factor * (ttft_s(cell) + steps),
            "ttft_s": factor * ttft_s(cell),
            "output_sha256": hashlib.sha256(f"{cell.cell_id} {i}".encode()).hexdigest(),
        }
        found.append(Request.model_validate(fields | changes))
    return tuple(found)


def settings_of(cell: Cell) -> dict[str, Any]:
    """Settings under the names of the engine."""
    engine = engine_of(cell)
    if engine == "sglang":
        return {
            "context_length": 9004,
            "max_running_requests": 4,
            "disable_radix_cache": True,
            "chunked_prefill_size": cell.axes["chunk_tokens"],
            "dtype": cell.axes["dtype"],
            "kv_cache_dtype": "auto",
            "model_path": "<model>",
        }
    if engine == "transformers":
        return {"attn_implementation": "sdpa", "dtype": cell.axes["dtype"], "threads": 2}
    return {
        "model_config": {"max_model_len": 9000, "dtype": f"torch.{cell.axes['dtype']}", "model": "<model>"},
        "cache_config": {"enable_prefix_caching": False, "cache_dtype": "auto", "block_size": 16},
        "scheduler_config": {"max_num_seqs": 4, "max_num_batched_tokens": cell.axes["chunk_tokens"]},
        "enforce_eager": cell.axes["graphs"] == "eager",
    }


def engine_of(cell: Cell) -> str:
    return cell.provider.partition("-")[0]


def kernels_of(cell: Cell) -> dict[str, dict[str, int]]:
    """What a well-behaved engine reports."""
    linear = {
        "vllm-marlin": "MarlinLinearKernel",
        "vllm-exllama": "ExllamaLinearKernel",
        "vllm-machete": "MacheteLinearKernel",
        "sglang": "GPTQMarlinLinearMethod",
        "vllm-cpu": "CPUWNA16LinearKernel",
        "transformers": "Linear",
    }[cell.provider]
    attention = {"flashinfer": "FLASHINFER", "triton": "TRITON_ATTN"}.get(str(cell.axes["attention"]), "FLASH_ATTN")
    layers = FACTS[str(cell.axes["model"])].layers
    return {"linear": {linear: 4 * layers}, "attention": {attention: layers}}


def serving(cell: Cell, served: tuple[Request, ...], **changes: Any) -> Serving:
    engine, version = ENGINES[engine_of(cell)]
    fields: dict[str, Any] = {
        "engine": engine,
        "version": version,
        "kernels": kernels_of(cell),
        "settings": settings_of(cell),
        "requests": served,
        "memory": {"weights_bytes": 19_300_000_000, "kv_cache_tokens": 300_000, "peak_bytes": 125_000_000_000},
    }
    return Serving.model_validate(fields | changes)


def ok(cell: Cell, profile: Profile, **changes: Any) -> Result:
    """A measured cell; `changes` are fields of its Serving."""
    row = profile.measure[0]
    served = requests(cell, row.warmup + row.samples)
    work = work_of(FACTS[str(cell.axes["model"])], cell.axes)
    steps = number(cell, "output_len") - 1
    values: Mapping[str, list[float]] = {
        "e2e_latency": [request.e2e_s for request in served],
        "ttft": [request.ttft_s or 0.0 for request in served],
        "tpot": [(request.e2e_s - (request.ttft_s or 0.0)) / steps for request in served],
    }
    measurements = tuple(
        Measurement(
            name=measure.name,
            method="wall",
            l2="none",
            calls_per_sample=1,
            warmup_s=tuple(values[measure.name][: measure.warmup]),
            samples_s=tuple(values[measure.name][measure.warmup :]),
            busy_s=sum(values["e2e_latency"]),
            work=work[measure.name],
        )
        for measure in profile.measure
    )
    return result(cell, "ok", serving=serving(cell, served, **changes), measurements=measurements)


def phases_of(served: Serving | None) -> dict[str, float]:
    """The steps of a cell that served requests."""
    if served is None:
        return {}
    generating = sum(request.e2e_s for request in served.requests) + 0.01
    return {"inputs": 0.1, "start": 18.0, "generate": generating, "total": 18.1 + generating}


def result(cell: Cell, status: Status, reason: str | None = None, **changes: Any) -> Result:
    """A result of any status."""
    ran = status in ("ok", "verified", "incorrect")
    fields: dict[str, Any] = {
        "cell_id": cell.cell_id,
        "cell": cell,
        "status": status,
        "reason": reason,
        "environment_id": "0" if ran else None,
        "telemetry": {"sm_clock_hz": [1.98e9]} if ran and cell.axes["model"] != "synthetic:tiny" else {},
        "phases_s": phases_of(changes.get("serving")),
        "started_at": fake_run.STARTED_AT,
    }
    return Result.model_validate(fields | changes)


def on_an_h200(cell: Cell, profile: Profile) -> Result | None:
    """What the sweep leaves on an H200: sglang is not there, the old scheduler nowhere."""
    if cell.axes["scheduling"] == "v0-default":
        return result(cell, "unsupported", "vLLM removed this scheduler after 0.10; see scheduling whole")
    if cell.provider == "sglang":
        return result(cell, "skipped", "stack 'sglang' is not here; `make stack STACK=sglang` installs it")
    return ok(cell, profile)


def with_sglang(cell: Cell, profile: Profile) -> Result | None:
    """The same with sglang, whose limit for the context is another one, and a few failures."""
    if cell.axes["scheduling"] == "v0-default":
        return on_an_h200(cell, profile)
    if cell.provider == "vllm-machete" and number(cell, "chunk_tokens") == 64:
        return result(cell, "crashed", f"the engine died: {fake_run.HOSTILE}")
    if cell.provider == "vllm-exllama" and number(cell, "chunk_tokens") == 256:
        return result(cell, "oom", "CUDA out of memory. Tried to allocate 2.00 GiB")
    # a silent fallback, which the selection guard refutes
    if cell.provider == "vllm-machete" and number(cell, "chunk_tokens") == 512:
        return ok(cell, profile, kernels={"linear": {"MarlinLinearKernel": 256}, "attention": {"FLASH_ATTN": 64}})
    return ok(cell, profile)


def on_a_processor(cell: Cell, profile: Profile) -> Result | None:
    """What the cpu profile leaves: vLLM measured and compared, the reference measured."""
    if cell.provider == "transformers":
        return ok(cell, profile)
    check = OutputCheck(
        passed=True,
        reference="transformers, dequantized weights, float32",
        tokens=4 * number(cell, "output_len"),
        equal_tokens=4 * number(cell, "output_len"),
        logprob_error=2e-5,
        logprob_bound=1e-3,
    )
    return ok(cell, profile, output=check)


def nothing_works(cell: Cell, profile: Profile) -> Result | None:
    return result(cell, "crashed", f"RuntimeError: {fake_run.HOSTILE}")


def unfinished(cell: Cell, profile: Profile) -> Result | None:
    """Only the cells with short outputs were reached."""
    return on_an_h200(cell, profile) if cell.axes["output_len"] == 16 else None
