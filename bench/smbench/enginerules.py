"""What each engine takes and what not, as rows: known before anything is loaded, each from its own documented rules.

Owns the rules and the arithmetic of memory. Does not own what a driver finds out when it starts, nor what a kernel may
refuse for a shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from smbench.cell import Cell
from smbench.recipe import EngineLimits, ProviderRow
from smbench.workloads import FLOAT_BYTES, WORKLOADS, ModelFacts, gpus_of, prompts_of

SGLANG_RESERVED_TOKENS = 2
"""sglang shortens an output, without an error, that would come closer to the context limit."""
SGLANG_RESERVED_AFTER_PROMPT = 6
"""And a prompt that would come this close."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What an engine offers of the axes of workloads, by kind of device."""

    dtypes: tuple[str, ...]
    """Of activations on top of GPTQ weights."""
    attention: Mapping[str, tuple[str, ...]]
    graphs: Mapping[str, tuple[str, ...]]
    """A device that is not here cannot run the engine."""
    schedulings: tuple[str, ...] = ("chunked", "whole")
    plain_dtypes: tuple[str, ...] = ("float16", "bfloat16")
    """Of models that are not quantized."""
    plain_only: tuple[str, ...] = ()
    """Devices on which it runs no quantized model."""
    workloads: tuple[str, ...] = tuple(WORKLOADS)
    parallel: Mapping[str, bool] = field(default_factory=lambda: {"cuda": True, "cpu": False})
    """Whether it shares layers between devices, by kind of device."""
    dequantizes: bool = False
    """It holds the weights in the dtype of the activations, not packed."""
    more: Callable[[EngineLimits, ProviderRow, Cell], Iterator[str]] | None = None
    """Faults that follow from more than one axis."""


@dataclass(frozen=True, slots=True)
class Memory:
    """The least that an engine must hold, in bytes, and what it may take."""

    weights: int
    cache: int
    cache_tokens: int
    activations: int
    step_tokens: int
    device: int
    fraction: float
    gpus: int = 1
    """That share everything evenly; the numbers are of one of them."""

    @property
    def needed(self) -> int:
        """All of it."""
        return self.weights + self.cache + self.activations

    @property
    def fits(self) -> bool:
        """Whether the device can hold it."""
        return self.needed <= self.device * self.fraction

    def arithmetic(self) -> str:
        """The sum in words."""
        each = f"on each of {self.gpus} GPUs " if self.gpus > 1 else ""
        return (
            f"{each}weights {_gb(self.weights)} + KV cache of {self.cache_tokens} tokens {_gb(self.cache)} "
            f"+ activations of a step of {self.step_tokens} tokens {_gb(self.activations)} = {_gb(self.needed)}, and "
            f"{self.fraction:.0%} of this device's {_gb(self.device)} is {_gb(self.device * self.fraction)}"
        )


def faults(
    engine: str, device: str, limits: EngineLimits, provider: ProviderRow, cell: Cell, quantized: bool = True
) -> Iterator[str]:
    """Why an engine cannot run a cell on a kind of device; nothing where it can, as far as is known before trying."""
    rules = ENGINES[engine]
    weights = "GPTQ weights" if quantized else "weights that are not quantized"
    devices = [name for name in rules.graphs if not quantized or name not in rules.plain_only]
    if device not in devices:
        if not devices:
            yield f"{engine} takes no GPTQ weights: give it a model that is not quantized"
            return
        what = "GPTQ" if quantized else "such models"
        yield f"{engine} runs {what} on {' or '.join(devices)} only, this profile runs on {device}"
        return
    if cell.subject not in rules.workloads:
        yield f"{engine} here does {', '.join(rules.workloads)}, not {cell.subject}{NO_SERVER.get(engine, '')}"
        return
    offers = {
        "dtype": rules.dtypes if quantized else rules.plain_dtypes,
        "attention": rules.attention[device],
        "graphs": rules.graphs[device],
        "scheduling": rules.schedulings,
    }
    for axis, offered in offers.items():
        if axis in cell.axes and (value := cell.axes[axis]) not in offered:
            yield f"{engine} on {device} with {weights} offers {axis} {' or '.join(offered)}, not {value}"
    if gpus_of(cell.axes) > 1 and not rules.parallel[device]:
        yield f"{engine} shares no layers between devices of kind {device} here, so tensor_parallel is 1"
    if cell.axes.get("scheduling") == "whole" and int(cell.axes["chunk_tokens"]) < limits.max_model_len:
        yield (
            f"whole prompts need steps as long as the context limit: chunk_tokens {cell.axes['chunk_tokens']} is less "
            f"than max_model_len {limits.max_model_len}"
        )
    if rules.more is not None:
        yield from rules.more(limits, provider, cell)


def memory(engine: str, limits: EngineLimits, facts: ModelFacts, cell: Cell, device_bytes: int) -> Memory:
    """What a cell needs at least on each GPU: weights, the cache of its prompts, the widest activations of one step.

    The real need is larger: work space of kernels, CUDA graphs, the engine's own tables. Weights, cache and activations
    are shared evenly between the GPUs of a cell.
    """
    dtype = str(cell.axes["dtype"])
    held = replace(facts, bits=None, group=None) if ENGINES[engine].dequantizes else facts
    tokens, step = _cache_tokens(limits, cell), _step_tokens(limits, cell)
    token_bytes = facts.kv_token_bytes(dtype)
    gpus = gpus_of(cell.axes)
    return Memory(
        weights=held.resident_bytes(dtype) // gpus,
        cache=(tokens * token_bytes if limits.kv_cache_bytes is None else limits.kv_cache_bytes) // gpus,
        cache_tokens=tokens if limits.kv_cache_bytes is None else limits.kv_cache_bytes // token_bytes,
        # gate and up beside their product
        activations=3 * facts.intermediate * step * FLOAT_BYTES[dtype] // gpus,
        step_tokens=step,
        device=device_bytes,
        fraction=limits.memory_fraction,
        gpus=gpus,
    )


def _cache_tokens(limits: EngineLimits, cell: Cell) -> int:
    """Tokens that the cache must hold at a time: one context, or a whole batch that must stay together."""
    if cell.subject != "static_batch":
        return limits.max_model_len
    return prompts_of(cell.subject, cell.axes) * (int(cell.axes["input_len"]) + int(cell.axes["output_len"]))


def _step_tokens(limits: EngineLimits, cell: Cell) -> int:
    """Most tokens of one step that the cell itself asks for."""
    if cell.subject == "static_batch":
        return prompts_of(cell.subject, cell.axes) * int(cell.axes["input_len"])
    return min(int(cell.axes.get("chunk_tokens", cell.axes["input_len"])), limits.max_model_len)


def _vllm(limits: EngineLimits, provider: ProviderRow, cell: Cell) -> Iterator[str]:
    chunk = int(cell.axes.get("chunk_tokens", limits.max_num_seqs))
    if chunk < limits.max_num_seqs:
        yield f"vLLM needs max_num_batched_tokens ({chunk}) of at least max_num_seqs ({limits.max_num_seqs})"
    if provider.settings.get("linear_kernel") == "exllama" and cell.axes["dtype"] != "float16":
        yield f"Exllama takes float16 activations only, not {cell.axes['dtype']}"


def _sglang(limits: EngineLimits, provider: ProviderRow, cell: Cell) -> Iterator[str]:
    chunk, page = _step_tokens(limits, cell), int(provider.settings.get("page_size", 1))
    # where the engine schedules as it likes, it also chooses its chunks
    chosen = cell.axes.get("scheduling") == "chunked" or cell.subject == "static_batch"
    if chosen and chunk % page:
        yield f"sglang needs chunked_prefill_size ({chunk}) to be a multiple of page_size ({page})"
    prompt, output = int(cell.axes["input_len"]), int(cell.axes["output_len"])
    if prompt + output > limits.max_model_len - SGLANG_RESERVED_TOKENS:
        yield (
            f"sglang would silently shorten the output: it keeps {SGLANG_RESERVED_TOKENS} tokens of the context limit "
            f"({limits.max_model_len}) free, and the request has {prompt + output}"
        )
    if prompt > limits.max_model_len - SGLANG_RESERVED_AFTER_PROMPT:
        yield (
            f"sglang takes prompts of at most {limits.max_model_len - SGLANG_RESERVED_AFTER_PROMPT} tokens with a "
            f"context limit of {limits.max_model_len}, not {prompt}"
        )


def _lmdeploy(limits: EngineLimits, provider: ProviderRow, cell: Cell) -> Iterator[str]:
    if provider.settings.get("backend", "turbomind") == "turbomind" and cell.axes["graphs"] == "eager":
        yield "TurboMind decides itself what it captures: graphs = eager is for lmdeploy's PyTorch engine"


_GPTQ_DTYPES = ("float16", "bfloat16")
_ON_A_GPU = ("default", "flash-attention", "flashinfer", "triton")
_BATCHES = ("generate", "static_batch", "offline")
NO_SERVER: Mapping[str, str] = {"transformers": ": it has no OpenAI-compatible server that is compared here"}

ENGINES: Mapping[str, Rules] = {
    # without a GPU there are no CUDA graphs, and one attention backend
    "vllm": Rules(
        dtypes=_GPTQ_DTYPES,
        plain_dtypes=tuple(FLOAT_BYTES),
        attention={"cuda": _ON_A_GPU, "cpu": ("default",)},
        graphs={"cuda": ("default", "full", "eager"), "cpu": ("default", "eager")},
        more=_vllm,
    ),
    # its CPU backend has no GPTQ
    "sglang": Rules(
        dtypes=_GPTQ_DTYPES,
        attention={"cuda": _ON_A_GPU, "cpu": ("default",)},
        graphs={"cuda": ("default", "full", "eager"), "cpu": ("eager",)},
        plain_only=("cpu",),
        more=_sglang,
    ),
    # TurboMind and its PyTorch engine both need a GPU, and choose attention themselves
    "lmdeploy": Rules(
        dtypes=_GPTQ_DTYPES,
        attention={"cuda": ("default",)},
        graphs={"cuda": ("default", "eager")},
        schedulings=("chunked",),
        more=_lmdeploy,
    ),
    # its PyTorch backend reads no GPTQ
    "trtllm": Rules(
        dtypes=(),
        plain_only=("cuda",),
        attention={"cuda": ("default", "flashinfer")},
        graphs={"cuda": ("default", "eager")},
        schedulings=("chunked",),
    ),
    "transformers": Rules(
        dtypes=tuple(FLOAT_BYTES),
        plain_dtypes=tuple(FLOAT_BYTES),
        attention={"cuda": ("default",), "cpu": ("default",)},
        graphs={"cuda": ("default", "eager"), "cpu": ("default", "eager")},
        dequantizes=True,
        workloads=_BATCHES,
        parallel={"cuda": False, "cpu": False},
    ),
    # answers without a model, for tests of everything around an engine
    "fake": Rules(
        dtypes=tuple(FLOAT_BYTES),
        plain_dtypes=tuple(FLOAT_BYTES),
        attention={"cuda": _ON_A_GPU, "cpu": _ON_A_GPU},
        graphs={"cuda": ("default", "full", "eager"), "cpu": ("default", "full", "eager")},
        parallel={"cuda": True, "cpu": True},
    ),
}
"""Engine to its rules; the names are those of the drivers (`worker.engines`)."""


def _gb(count: float) -> str:
    """Bytes as gigabytes, of 10**9."""
    return f"{count / 1e9:.2f} GB" if count < 1e10 else f"{count / 1e9:.1f} GB"
