"""Traces of engine cells: one more repetition that does not count, what took the time, and what a bundle keeps."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

import pytest

import bundles
from serving_requests import SAMPLES, WARMUP, batch_job, command, job, through_the_host
from smbench import bundle, plan, profiling, recipe, resources, verify
from smbench.errors import UsageError
from smbench.worker import chrometrace

COMPUTES = """
import torch
from smbench.worker.engines import fake
honest = fake.Fake.batch
def batch(self, prompts, output_len, stepwise):
    torch.ones(64, 64) @ torch.ones(64, 64)
    return honest(self, prompts, output_len, stepwise)
fake.Fake.batch = batch
"""
"""The fake computes something, so that a profiler sees it."""


def event(name: str, begin: float, length: float, category: str = "cpu_op", thread: int = 1) -> dict[str, Any]:
    return {"ph": "X", "name": name, "cat": category, "ts": begin, "dur": length, "pid": 1, "tid": thread}


def test_kernels_of_a_gpu_are_put_together_by_name() -> None:
    events = [
        event("cudaLaunchKernel", 0, 100, "cuda_runtime"),
        event("gemm", 10, 30, "kernel"),
        event("aten::mm", 0, 500),
        event("gemm", 50, 30, "kernel"),
        event("copy", 90, 20, "gpu_memcpy"),
        {"ph": "M", "name": "process_name"},
    ]
    gemm, copy = chrometrace.longest(events)
    assert (gemm["name"], gemm["calls"], gemm["device_s"], gemm["share"]) == ("gemm", 2, pytest.approx(60e-6), 0.75)
    assert (copy["name"], copy["calls"], copy["share"]) == ("copy", 1, 0.25)


def test_an_operator_counts_without_what_it_calls() -> None:
    events = [
        event("aten::linear", 0, 100),
        event("aten::addmm", 10, 80),
        event("aten::copy_", 20, 10),
        event("aten::copy_", 120, 10),
        # of another thread, which nests on its own
        event("aten::relu", 30, 40, thread=2),
    ]
    found = {row["name"]: (row["calls"], round(row["device_s"] * 1e6)) for row in chrometrace.longest(events)}
    assert found == {"aten::addmm": (1, 70), "aten::relu": (1, 40), "aten::linear": (1, 20), "aten::copy_": (2, 20)}


def test_only_the_longest_are_kept_and_shares_are_of_all() -> None:
    found = chrometrace.longest([event(f"kernel {i}", i, 1, "kernel") for i in range(40)])
    assert len(found) == chrometrace.KEPT
    assert sum(row["share"] for row in found) == pytest.approx(chrometrace.KEPT / 40)


def test_a_trace_is_one_more_repetition_that_does_not_count(tmp_path: Path) -> None:
    traced, plain = batch_job("static_batch", step_ms=1), batch_job("static_batch", step_ms=1, at=9)
    result = through_the_host([traced], tmp_path, worker=command(COMPUTES), trace="torch").result(traced)
    assert result.status == "ok" and result.serving is not None
    assert len(result.serving.batches) == WARMUP + SAMPLES
    trace = result.serving.trace
    assert trace is not None and trace.note is None and trace.file is not None
    assert (trace.tool.partition(" ")[0], trace.file) == ("torch.profiler", f"traces/{result.cell_id}.json")
    kept = (tmp_path / trace.file).read_bytes()
    assert (len(kept), hashlib.sha256(kept).hexdigest()) == (trace.size_bytes, trace.file_sha256)
    assert any(kernel.name == "aten::mm" and kernel.calls == 1 for kernel in trace.kernels)
    assert trace.repetition_s >= 0.005
    assert "trace" in result.phases_s
    untraced = through_the_host([plain], tmp_path).result(plain)
    assert untraced.serving is not None and untraced.serving.trace is None


def test_a_trace_that_is_too_large_leaves_its_kernels(tmp_path: Path) -> None:
    asked = batch_job("offline")
    program = COMPUTES + "from smbench.worker import tracing\ntracing.LARGEST_BYTES = 100\n"
    result = through_the_host([asked], tmp_path, worker=command(program), trace="torch").result(asked)
    assert result.serving is not None and result.serving.trace is not None
    trace = result.serving.trace
    assert trace.note == f"a trace of {trace.size_bytes} bytes is not kept, the most is 100"
    assert trace.file is None and trace.kernels
    assert not (tmp_path / "traces").exists()


def test_an_engine_that_cannot_be_profiled_is_measured_all_the_same(tmp_path: Path) -> None:
    asked = job()
    program = """
from smbench.worker.engines import UnsupportedByEngine, fake
def tracer(self, folder):
    raise UnsupportedByEngine("it computes elsewhere")
fake.Fake.tracer = tracer
"""
    result = through_the_host([asked], tmp_path, worker=command(program), trace="torch").result(asked)
    assert result.status == "ok" and result.serving is not None and result.serving.trace is not None
    assert (result.serving.trace.note, result.serving.trace.kernels) == ("it computes elsewhere", ())


def test_a_profiler_that_takes_the_process_with_it_takes_no_numbers(tmp_path: Path) -> None:
    asked = batch_job("static_batch")
    program = """
import os, signal
from smbench.worker.engines import fake
fake.Fake.tracer = lambda self, folder: os.kill(os.getpid(), signal.SIGSEGV)
"""
    answer = through_the_host([asked], tmp_path, worker=command(program), trace="torch")
    result = answer.result(asked)
    assert result.status == "ok" and result.serving is not None and result.serving.trace is not None
    assert len(result.serving.batches) == WARMUP + SAMPLES and result.measurements
    assert result.serving.trace.note == "the cell's process died under the profiler (killed by SIGSEGV)"
    assert not answer.of(asked, "died")


NSYS = f"""#!{sys.executable}
import pathlib, subprocess, sys
arguments = sys.argv[1:]
if arguments == ["--version"]:
    print("NVIDIA Nsight Systems version 2025.3.1.90-253135822126v0")
elif arguments[0] == "profile":
    assert "--capture-range=cudaProfilerApi" in arguments
    file = pathlib.Path(arguments[arguments.index("--output") + 1])
    print("Capture range started in the application.", flush=True)
    code = subprocess.call(arguments[arguments.index(sys.executable):])
    file.write_bytes(b"recording")
    sys.exit(code)
else:
    print("Processing ...")
    print("Time (%),Total Time (ns),Instances,Avg (ns),Name")
    print('75.0,3000,2,1500.0,"void gemm<int, 4>(float*)"')
    print("25.0,1000,1,1000.0,copy")
"""
CUDA_PROFILER = """
import sys, types
profiler = types.SimpleNamespace(start=lambda: None, stop=lambda: None)
for name, members in {"torch": {}, "torch.cuda": {"profiler": profiler}}.items():
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__dict__.update(members)
"""
"""There is no CUDA here to tell, and importing torch takes seconds."""


def test_nsys_watches_a_program_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "nsys").write_text(NSYS, encoding="utf-8")
    (tools / "nsys").chmod(stat.S_IRWXU)
    (tools / "sitecustomize.py").write_text(CUDA_PROFILER, encoding="utf-8")
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(tools))
    asked = batch_job("static_batch", step_ms=1)
    result = through_the_host([asked], tmp_path, trace="nsys").result(asked)
    assert result.status == "ok" and result.serving is not None and result.serving.trace is not None
    trace = result.serving.trace
    assert (trace.tool, trace.note) == ("nsys 2025.3.1.90-253135822126v0", None)
    assert trace.file == f"traces/{result.cell_id}.nsys-rep"
    assert [(kernel.name, kernel.calls, round(kernel.share, 9)) for kernel in trace.kernels] == [
        ("void gemm<int, 4>(float*)", 2, 0.75),
        ("copy", 1, 0.25),
    ]
    assert trace.kernels[0].device_s == pytest.approx(3e-6)
    assert trace.repetition_s >= 0.005
    assert not list((tmp_path / "logs").glob("*.request.json"))


def test_without_nsys_the_cell_is_measured_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    asked = batch_job("static_batch")
    result = through_the_host([asked], tmp_path, trace="nsys").result(asked)
    assert result.status == "ok" and result.serving is not None and result.serving.trace is not None
    assert result.serving.trace.note == "nsys is not on the PATH"


def planned(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> plan.Plan:
    monkeypatch.setenv("SMBENCH_CACHE", str(tmp_path))
    file = recipe.find(name, resources.recipes_dir())
    return plan.make(recipe.load(file), file.read_bytes(), "cpu", plan.Here())


@pytest.mark.parametrize(
    ("tool", "name", "words"),
    [
        ("torhc", "gptq", "--trace torhc: unknown profiler; known: torch, nsys; did you mean 'torch'?"),
        ("torch", "lora", "--trace torch: recipe 'lora' measures operations; traces are of engines"),
        (
            "nsys",
            "gptq",
            "--trace nsys: it watches a GPU, and this profile runs on the CPU; take --trace torch",
        ),
    ],
)
def test_a_profiler_that_cannot_be_had_is_refused_before_anything_runs(
    tool: str, name: str, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as refusal:
        profiling.require(tool, planned(name, monkeypatch, tmp_path))
    assert str(refusal.value) == words


def test_traces_of_torch_are_redacted_into_a_bundle_and_those_of_nsys_stay_out(tmp_path: Path) -> None:
    folder = bundles.run_folder(tmp_path / "run")
    (folder / "traces").mkdir()
    (folder / "traces" / "0123.json").write_text(json.dumps({"traceName": "/home/somebody/trace.json"}))
    (folder / "traces" / "0123.nsys-rep").write_bytes(b"\0HF_TOKEN=secret")
    done = bundle.pack(folder, tmp_path / "bundle.tar.gz", bundles.NOBODY)
    assert done is not None
    _, files = bundles.files_of(done.path)
    assert json.loads(files["data/traces/0123.json"]) == {"traceName": "<PATH>"}
    assert "data/traces/0123.nsys-rep" not in files
    assert "0123.nsys-rep holds variables of the process in a form of its own and stays out" in done.notes
    assert not verify.verify(done.path).unconfirmed
