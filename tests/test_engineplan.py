"""What engines cannot do is known before anything is loaded: by engine, device, context and memory, with the reason."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from checkpoints import quantized, write_checkpoint
from small_runs import REPOSITORY
from smbench import engineplan, enginerules, recipe
from smbench.cell import Cell
from smbench.engineplan import EngineJob
from smbench.enginerules import ENGINES
from smbench.errors import UsageError
from smbench.models import Model
from smbench.recipe import EngineLimits, Recipe
from smbench.worker import engines
from smbench.workloads import WORKLOADS, facts_of

GPTQ = REPOSITORY / "recipes" / "gptq.toml"
PINNED = "Qwen/Qwen2.5-32B-Instruct-GPTQ-Int4@c83e67dfb2664f5039fd4cd99e206799e27dd800"
GIB = 2**30
AXES: dict[str, Any] = {
    "model": "synthetic:tiny",
    "dtype": "float16",
    "input_len": 512,
    "output_len": 16,
    "scheduling": "chunked",
    "chunk_tokens": 128,
    "attention": "default",
    "graphs": "eager",
}
LIMITS = EngineLimits(max_model_len=1024, max_num_seqs=4, memory_fraction=0.5)


@pytest.fixture(autouse=True)
def empty_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("SMBENCH_CACHE", str(tmp_path / "cache"))


def gptq(old: str = "", new: str = "") -> Recipe:
    """The recipe with one edit."""
    text = GPTQ.read_text(encoding="utf-8")
    assert old in text
    return recipe.parse(text.replace(old, new).encode(), "gptq.toml")


def jobs(
    profile: str = "full",
    model: str | None = None,
    memory_bytes: int | None = 141 * 10**9,
    edited: Recipe | None = None,
) -> dict[str, list[tuple[Cell, EngineJob]]]:
    """Cells with their jobs, by provider."""
    chosen = edited or gptq()
    found = engineplan.models_of(chosen, profile, model)
    cells = chosen.cells(profile, {"model": engineplan.only(found)} if model else {})
    made = engineplan.jobs_of(chosen, profile, cells, found, memory_bytes)
    by_provider: dict[str, list[tuple[Cell, EngineJob]]] = {}
    for cell in cells:
        by_provider.setdefault(cell.provider, []).append((cell, made[cell.cell_id]))
    return by_provider


def reasons(found: dict[str, list[tuple[Cell, EngineJob]]], provider: str) -> set[str | None]:
    return {job.unsupported for _, job in found[provider]}


def fault(
    engine: str,
    device: str = "cuda",
    settings: dict[str, int | str | bool] | None = None,
    quantized: bool = True,
    **axes: Any,
) -> str:
    """What is wrong with one cell; empty where nothing is."""
    cell = Cell(kind="engine", subject="generate", provider="any", axes={**AXES, **axes}, seed=0)
    row = gptq().providers["vllm-cpu"].model_copy(update={"engine": engine, "settings": settings or {}})
    return "; ".join(enginerules.faults(engine, device, LIMITS, row, cell, quantized))


def test_engines_of_the_rules_are_those_that_have_drivers() -> None:
    assert set(ENGINES) == set(engines.ENGINES)


@pytest.mark.parametrize("engine", ENGINES)
def test_rules_speak_of_values_that_the_axes_have(engine: str) -> None:
    rules, axes = ENGINES[engine], WORKLOADS["generate"]
    assert set(rules.attention) == set(rules.graphs) <= {"cuda", "cpu"}
    for axis, offered in {
        "dtype": [rules.dtypes],
        "attention": rules.attention.values(),
        "graphs": rules.graphs.values(),
    }.items():
        assert all(set(values) <= set(axes[axis].choices) for values in offered)


def test_the_shipped_recipe_tells_drivers_only_what_they_know() -> None:
    for name, row in gptq().providers.items():
        driver = importlib.util.find_spec(engines.ENGINES[str(row.engine)])
        assert driver is not None, f"{name}: no driver"
        assert set(row.settings) <= set(engines.driver(str(row.engine)).SETTINGS), name


def test_what_works_has_no_fault() -> None:
    for engine in ENGINES:
        assert fault(engine, "cuda", quantized=engine != "trtllm", graphs="default") == ""
    assert fault("vllm", "cpu") == ""
    assert fault("transformers", "cpu", dtype="float32") == ""


def test_vllm_needs_steps_that_hold_its_requests() -> None:
    assert fault("vllm", chunk_tokens=3) == "vLLM needs max_num_batched_tokens (3) of at least max_num_seqs (4)"
    assert fault("vllm", chunk_tokens=4) == ""


def test_whole_prompts_need_steps_of_the_context_limit() -> None:
    assert "chunk_tokens 512 is less than max_model_len 1024" in fault("vllm", scheduling="whole", chunk_tokens=512)
    assert fault("vllm", scheduling="whole", chunk_tokens=1024) == ""


def test_quantized_layers_of_vllm_take_no_float32() -> None:
    assert fault("vllm", dtype="float32") == (
        "vllm on cuda with GPTQ weights offers dtype float16 or bfloat16, not float32"
    )


def test_exllama_takes_float16_alone() -> None:
    assert fault("vllm", settings={"linear_kernel": "exllama"}, dtype="bfloat16") == (
        "Exllama takes float16 activations only, not bfloat16"
    )
    assert fault("vllm", settings={"linear_kernel": "marlin"}, dtype="bfloat16") == ""


def test_sglang_needs_chunks_of_whole_pages() -> None:
    assert fault("sglang", settings={"page_size": 64}, chunk_tokens=32) == (
        "sglang needs chunked_prefill_size (32) to be a multiple of page_size (64)"
    )
    assert fault("sglang", settings={"page_size": 64}, chunk_tokens=128) == ""


def test_sglang_needs_whole_pages_of_a_static_batch_and_chooses_chunks_itself_otherwise() -> None:
    axes = {
        "model": "m",
        "dtype": "bfloat16",
        "input_len": 100,
        "output_len": 4,
        "tensor_parallel": 1,
        "graphs": "default",
    }
    row = gptq().providers["vllm-cpu"].model_copy(update={"engine": "sglang", "settings": {"page_size": 64}})
    found = {}
    for subject, more in (("static_batch", {"batch": 2}), ("offline", {"dataset": "random", "num_prompts": 2})):
        cell = Cell(kind="engine", subject=subject, provider="any", axes={**axes, **more}, seed=0)
        found[subject] = list(enginerules.faults("sglang", "cuda", LIMITS, row, cell, quantized=False))
    assert found["offline"] == []
    assert found["static_batch"] == ["sglang needs chunked_prefill_size (200) to be a multiple of page_size (64)"]


def test_an_engine_without_a_server_or_a_second_gpu_says_so() -> None:
    axes = {
        "model": "m",
        "dtype": "bfloat16",
        "input_len": 100,
        "output_len": 4,
        "tensor_parallel": 2,
        "graphs": "eager",
    }
    row = gptq().providers["vllm-cpu"].model_copy(update={"settings": {}})
    load = {"dataset": "random", "num_prompts": 2, "request_rate": "inf", "max_concurrency": 0}
    online = Cell(kind="engine", subject="online", provider="any", axes={**axes, **load}, seed=0)
    assert list(enginerules.faults("transformers", "cpu", LIMITS, row, online, quantized=False)) == [
        "transformers here does generate, static_batch, offline, not online: it has no OpenAI-compatible server "
        "that is compared here"
    ]
    static = Cell(kind="engine", subject="static_batch", provider="any", axes={**axes, "batch": 2}, seed=0)
    assert list(enginerules.faults("vllm", "cpu", LIMITS, row, static, quantized=False)) == [
        "vllm shares no layers between devices of kind cpu here, so tensor_parallel is 1"
    ]
    assert fault("trtllm") == "trtllm takes no GPTQ weights: give it a model that is not quantized"


def test_sglang_would_shorten_a_request_at_the_context_limit_and_says_nothing() -> None:
    assert "sglang would silently shorten the output" in fault("sglang", input_len=512, output_len=511)
    assert fault("sglang", input_len=512, output_len=510) == ""
    assert "sglang takes prompts of at most 1018 tokens" in fault("sglang", input_len=1019, output_len=2)


def test_a_cpu_has_no_cuda_graphs_one_attention_and_no_gptq_in_sglang() -> None:
    assert "offers graphs default or eager, not full" in fault("vllm", "cpu", graphs="full")
    assert "offers attention default, not flashinfer" in fault("vllm", "cpu", attention="flashinfer")
    assert fault("sglang", "cpu") == "sglang runs GPTQ on cuda only, this profile runs on cpu"


def test_transformers_offers_no_graphs_and_no_backends() -> None:
    assert "offers graphs default or eager, not full" in fault("transformers", graphs="full")
    assert "offers attention default, not flash-attention" in fault("transformers", attention="flash-attention")


@pytest.mark.parametrize("engine", ENGINES)
def test_no_engine_has_the_scheduler_of_the_document(engine: str) -> None:
    said = fault(engine, quantized=engine != "trtllm", scheduling="v0-default", chunk_tokens=1024)
    assert re.search(r"offers scheduling chunked( or whole)?, not v0-default", said)


def test_every_fault_of_a_cell_is_named() -> None:
    assert len(fault("vllm", "cpu", graphs="full", attention="triton", dtype="float32").split("; ")) == 3


def test_the_document_s_cells_all_run_on_a_card_that_holds_the_model() -> None:
    found = jobs()
    gone = {cell.axes["scheduling"] for entries in found.values() for cell, job in entries if job.unsupported}
    assert gone == {"v0-default"}
    cell, job = found["vllm-machete"][0]
    assert job.engine == "vllm"
    assert job.request["model"]["name"] == cell.axes["model"] == PINNED
    assert job.request["limits"] == {
        "max_model_len": 9000,
        "max_num_seqs": 4,
        "memory_fraction": 0.95,
        "kv_cache_bytes": None,
    }
    assert (job.request["requests"], job.request["expected_kernel"]) == (
        {"warmup": 1, "samples": 10},
        "MacheteLinearKernel",
    )
    asked = {"subject": cell.subject, "axes": cell.axes, "seed": cell.seed, "engine": job.request}
    assert engines.setup_of(asked).chunk_tokens == 1024


def test_cells_of_the_document_s_scheduler_say_what_became_of_it() -> None:
    chosen = gptq()
    gone = [cell for cell in chosen.cells("full") if cell.axes["scheduling"] == "v0-default"]
    assert len(gone) == 8
    assert all(any(rule.matches(cell) for rule in chosen.unsupported) for cell in gone)


def test_a_model_larger_than_the_card_is_refused_with_the_arithmetic() -> None:
    """16.2 GB in 4 bits, embeddings and head 3.1 GB; 9000 tokens of 262144 bytes; 32 tokens of three vectors."""
    with pytest.raises(UsageError) as caught:
        jobs(memory_bytes=16 * GIB)
    assert str(caught.value) == (
        f"model {PINNED} does not fit: weights 19.3 GB + KV cache of 9000 tokens 2.36 GB + activations of a step of 32 "
        "tokens 0.01 GB = 21.7 GB, and 95% of this device's 17.2 GB is 16.3 GB; take a smaller one with MODEL="
    )


def test_what_alone_does_not_fit_is_unsupported_alone() -> None:
    """Between the two needs lie the activations of a whole prompt: 9000 tokens instead of 1024."""
    found = jobs(memory_bytes=round(23e9 / 0.95))
    whole = [job.unsupported for cell, job in found["vllm-marlin"] if cell.axes["scheduling"] == "whole"]
    assert whole
    assert all(text and text.startswith("does not fit: weights 19.3 GB") for text in whole)
    assert reasons(found, "vllm-machete") == {None}


def test_an_engine_that_dequantizes_needs_four_times_the_weights() -> None:
    found = jobs("cpu", "synthetic:qwen2.5-0.5b", memory_bytes=4 * 10**9)
    assert reasons(found, "vllm-cpu") == {None}
    for reason in reasons(found, "transformers"):
        assert reason is not None
        assert reason.startswith("does not fit: weights 0.99 GB")
        assert reason.endswith(" GB, and 50% of this device's 4.00 GB is 2.00 GB")


def test_without_knowing_the_memory_nothing_is_predicted() -> None:
    assert reasons(jobs(memory_bytes=None), "sglang") == {None}


def test_a_request_longer_than_a_context_is_refused() -> None:
    with pytest.raises(UsageError) as caught:
        jobs(edited=gptq("input_len = [8000]", "input_len = [8500]"))
    assert str(caught.value) == (
        f"recipe 'gptq', model {PINNED}: a request of 9012 tokens (input_len + output_len) is longer than "
        "max_model_len (9000)"
    )
    with pytest.raises(UsageError, match=r"a request of 8512 tokens .* is longer than the model's context \(4096\)"):
        jobs(model="synthetic:tiny")
    with pytest.raises(UsageError, match="max_model_len 5000 is more than the model's context 4096"):
        jobs("cpu", edited=gptq("max_model_len = 1024", "max_model_len = 5000"))


def test_a_cache_that_cannot_hold_the_context_is_refused() -> None:
    with pytest.raises(UsageError) as caught:
        jobs("cpu", edited=gptq("kv_cache_bytes = 1073741824", "kv_cache_bytes = 1000000"))
    assert str(caught.value) == (
        "recipe 'gptq', model synthetic:tiny: kv_cache_bytes 1000000 holds 488 tokens of 2048 bytes each, "
        "and max_model_len is 1024"
    )


def test_an_unknown_engine_lists_those_that_exist() -> None:
    with pytest.raises(UsageError) as caught:
        jobs("cpu", edited=gptq('engine = "transformers"', 'engine = "tranformers"'))
    assert str(caught.value) == (
        "recipe 'gptq': providers.transformers.engine: unknown engine 'tranformers'; "
        "known: vllm, sglang, lmdeploy, trtllm, transformers, fake; did you mean 'transformers'?"
    )


def test_a_model_given_stands_for_all_and_a_bad_one_is_refused_before_the_plan(tmp_path: Path) -> None:
    chosen = gptq()
    found = engineplan.models_of(chosen, "cpu", "synthetic:qwen2.5-0.5b")
    assert engineplan.only(found) == "synthetic:qwen2.5-0.5b"
    bad = write_checkpoint(tmp_path / "model", quantized(desc_act=True))
    with pytest.raises(UsageError, match="desc_act is true"):
        engineplan.models_of(chosen, "cpu", str(bad))
    assert set(engineplan.models_of(chosen, "full", None)) == {PINNED}


def test_the_cpu_profile_runs_and_compares_every_cell() -> None:
    found = jobs("cpu", memory_bytes=8 * GIB)
    assert {job.unsupported for entries in found.values() for _, job in entries} == {None}
    assert {job.request["compare"] for entries in found.values() for _, job in entries} == {True}


def test_work_and_memory_follow_from_the_model_s_own_numbers() -> None:
    model: Model = next(iter(engineplan.models_of(gptq(), "cpu", None).values()))
    assert model.facts == facts_of(model.config)
    cell = Cell(kind="engine", subject="generate", provider="any", axes=AXES, seed=0)
    need = enginerules.memory("vllm", LIMITS, model.facts, cell, 10**9)
    assert need.cache == 1024 * 2 * 4 * 2 * 64 * 2
    assert need.activations == 3 * 768 * 128 * 2
    dense = enginerules.memory("transformers", LIMITS, model.facts, cell, 10**9)
    assert dense.weights - need.weights == 2 * model.facts.linear_parameters - model.facts.weight_bytes("float16")
    assert not replace(need, device=need.needed).fits
    assert replace(need, device=2 * need.needed).fits
