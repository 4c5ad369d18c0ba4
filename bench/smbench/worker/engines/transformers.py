"""transformers on dequantized weights: an engine that everybody can check, and the truth that outputs are held against.

Owns reading a GPTQ checkpoint into plain linear layers, a greedy loop with a KV cache, and the reference's one pass. It
shares no code with the engines that it judges: unpacking is ours, the layers are torch's.
"""

from __future__ import annotations

import json
import resource
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smbench.worker.engines import BatchAnswer, Completion, ServeCommand, Setup, UnsupportedByEngine
from smbench.worker.engines.plain import plain

if TYPE_CHECKING:
    from torch import Tensor

ENVIRONMENT: Mapping[str, str] = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    # cells are forked after importing, so nothing may ask CUDA itself whether there is a GPU
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
}
SETTINGS: Mapping[str, str] = {"prefix_caching": "known for the sake of other engines: there is no such cache here"}

ATTENTION = "sdpa"
"""torch's own scaled_dot_product_attention."""


def preload() -> None:
    """Import torch and transformers' models."""
    import safetensors  # noqa: F401
    import torch  # noqa: F401
    from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache  # noqa: F401
    from transformers.models.qwen2 import modeling_qwen2  # noqa: F401


def start(setup: Setup) -> Transformers:
    """A loaded model."""
    if setup.attention != "default":
        raise UnsupportedByEngine(f"transformers runs torch's attention only, not attention = {setup.attention!r}")
    if setup.graphs == "full":
        raise UnsupportedByEngine("transformers captures no CUDA graphs here")
    if setup.scheduling == "v0-default":
        raise UnsupportedByEngine("the scheduler of vLLM 0.6 is not in transformers")
    return Transformers(setup)


def serve_command(setup: Setup, host: str, port: int) -> ServeCommand:
    """There is none: transformers is the baseline that everybody can check, not a server to compare."""
    raise UnsupportedByEngine("transformers has no OpenAI-compatible server that is compared here")


class Transformers:
    """Greedy decoding, the prompt of a request in chunks, the prompts of a batch in one step."""

    def __init__(self, setup: Setup) -> None:
        import torch
        import transformers

        self._setup = setup
        self._device = torch.device(setup.device)
        self._model = load(setup.model, getattr(torch, setup.dtype), self._device)
        self.version = str(transformers.__version__)
        self.kernels = kernels_of(self._model)
        self.settings = {
            "max_model_len": setup.limits.max_model_len,
            "dtype": setup.dtype,
            "kv_cache_dtype": setup.dtype,
            "enable_prefix_caching": False,
            "chunk_tokens": self._chunk_tokens,
            "threads": torch.get_num_threads(),
            "config": plain(self._model.config.to_dict()),
        }

    @property
    def _chunk_tokens(self) -> int:
        """Most tokens of a request that one step takes; a batch takes as many at once as its cell says."""
        return self._setup.chunk_tokens if self._setup.scheduling == "chunked" else self._setup.limits.max_model_len

    def generate(self, prompt: Sequence[int], output_len: int, top_logprobs: int = 0) -> Completion:
        """Prefill by chunks, then a step for each token."""
        import torch
        from transformers import DynamicCache

        began = time.perf_counter()
        ttft_s = None
        tokens: list[int] = []
        logprobs: list[Mapping[int, float]] = []
        cache = DynamicCache(config=self._model.config)
        with torch.inference_mode():
            ids = torch.tensor([prompt], device=self._device)
            logits = None
            for chunk in ids.split(self._chunk_tokens, dim=1):
                logits = self._step(chunk, cache)
            assert logits is not None
            while True:
                chosen = logits.argmax(dim=-1, keepdim=True)
                # on a GPU this waits for the step
                tokens.append(int(chosen.item()))
                ttft_s = time.perf_counter() - began if ttft_s is None else ttft_s
                if top_logprobs:
                    logprobs.append(_top(logits[0], top_logprobs, tokens[-1]))
                if len(tokens) == output_len:
                    break
                logits = self._step(chosen, cache)
        return Completion(
            token_ids=tokens,
            prompt_tokens=int(ids.shape[1]),
            finish_reason="length",
            cached_tokens=0,
            ttft_s=ttft_s,
            logprobs=logprobs if top_logprobs else None,
        )

    def batch(self, prompts: Sequence[Sequence[int]], output_len: int, stepwise: bool) -> BatchAnswer:
        """Batches of at most max_num_seqs prompts one after the other; prompts of unlike length never share one.

        Stepwise there is one batch, and its steps are timed.
        """
        groups = [list(range(len(prompts)))] if stepwise else _groups(prompts, self._setup.limits.max_num_seqs)
        tokens: dict[int, list[int]] = {}
        step_s: list[float] = []
        for members in groups:
            answered, step_s = self._batch([prompts[i] for i in members], output_len)
            tokens.update(zip(members, answered, strict=True))
        return BatchAnswer(
            token_ids=[tokens[i] for i in range(len(prompts))],
            prompt_tokens=[len(prompt) for prompt in prompts],
            finish_reasons=["length"] * len(prompts),
            cached_tokens=0,
            prefill_s=step_s[0] if stepwise else None,
            step_s=step_s[1:] if stepwise else (),
            step_clock="engine-step" if stepwise else "none",
        )

    def _batch(self, prompts: Sequence[Sequence[int]], output_len: int) -> tuple[list[list[int]], list[float]]:
        """Tokens of each of some prompts of one length, and seconds of each step, the prompts' own first."""
        import torch
        from transformers import DynamicCache

        step_s: list[float] = []
        steps: list[list[int]] = []
        began = time.perf_counter()
        cache = DynamicCache(config=self._model.config)
        with torch.inference_mode():
            ids = torch.tensor(prompts, device=self._device)
            while len(steps) < output_len:
                ids = self._step(ids, cache).argmax(dim=-1, keepdim=True)
                # on a GPU this waits for the step
                steps.append(ids[:, 0].tolist())
                now = time.perf_counter()
                step_s.append(now - began)
                began = now
        return [list(row) for row in zip(*steps, strict=True)], step_s

    def tracer(self, folder: Path) -> None:
        """Nothing of its own: everything is computed in this process."""

    def memory(self) -> Mapping[str, int]:
        """Weights, and the most that was in use."""
        import torch

        weights = sum(tensor.nbytes for tensor in [*self._model.parameters(), *self._model.buffers()])
        on_gpu = self._device.type == "cuda"
        # Linux counts in KiB
        peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        return {"weights_bytes": weights, "peak_bytes": peak}

    def close(self) -> None:
        """Nothing was started."""

    def _step(self, ids: Tensor, cache: Any) -> Tensor:
        """Logits [b, vocabulary] after the last of `ids` [b, n], whose keys and values go into the cache."""
        out = self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits: Tensor = out.logits[:, -1]
        return logits


class Reference:
    """The truth about a checkpoint: float32, on the CPU, no cache, no chunks."""

    name = "transformers, dequantized weights, float32, one pass"

    def __init__(self, folder: Path) -> None:
        import torch

        self._model = load(folder, torch.float32, torch.device("cpu"))

    def logprobs(self, prompt: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """Log-probabilities, float32 [len(tokens), vocabulary]: row i is what follows the prompt and tokens[:i]."""
        import torch

        ids = torch.tensor([[*prompt, *tokens[:-1]]])
        with torch.inference_mode():
            logits = self._model(input_ids=ids, use_cache=False, logits_to_keep=len(tokens)).logits[0]
            return torch.log_softmax(logits.float(), dim=-1)


def load(folder: Path, dtype: Any, device: Any) -> Any:
    """The model of a checkpoint with quantized layers made plain ones of `dtype`.

    UnsupportedByEngine for a quantization that is not unpacked here.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    config = AutoConfig.from_pretrained(folder)
    quantization = config.to_dict().get("quantization_config")
    if quantization is not None:
        del config.quantization_config
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=ATTENTION)
    state = dict(_weights(folder, quantization, dtype))
    # the tensors themselves instead of copies
    found = model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    # a layer that the checkpoint does not have would be random, and the reference no truth
    if wrong := {*found.missing_keys, *found.unexpected_keys} - tied:
        raise ValueError(f"checkpoint and model differ in {len(wrong)} tensors, such as {min(wrong)}")
    return model.to(device).eval()


def kernels_of(model: Any) -> Mapping[str, Mapping[str, int]]:
    """Linear layers but the head by their class, and the attention of each layer."""
    from torch import nn

    head = model.get_output_embeddings()
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    attention = str(model.config._attn_implementation)
    return {
        "linear": dict(Counter(f"torch {type(module).__name__}" for module in linear if module is not head)),
        "attention": {attention: int(model.config.num_hidden_layers)},
        "head": {f"torch {type(head).__name__}": 1},
    }


def _groups(prompts: Sequence[Sequence[int]], most: int) -> list[list[int]]:
    """Places of prompts that make a batch: of one length, at most so many, in their order."""
    found: dict[int, list[list[int]]] = {}
    for i, prompt in enumerate(prompts):
        of_length = found.setdefault(len(prompt), [[]])
        if len(of_length[-1]) == most:
            of_length.append([])
        of_length[-1].append(i)
    return [group for groups in found.values() for group in groups]


def _weights(folder: Path, quantization: Mapping[str, Any] | None, dtype: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a checkpoint by its name in the model; those of a quantized layer as its one weight."""
    from safetensors import safe_open

    from smbench.worker.gptq import dequantize

    bits = _bits(quantization) if quantization is not None else None
    packed: dict[str, dict[str, Tensor]] = {}
    for file in _files(folder):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                layer, _, part = name.rpartition(".")
                if part in ("qweight", "qzeros", "scales", "g_idx"):
                    packed.setdefault(layer, {})[part] = tensors.get_tensor(name)
                else:
                    yield name, tensors.get_tensor(name).to(dtype)
    for layer, parts in packed.items():
        if bits is None:
            raise UnsupportedByEngine(f"{layer} is packed, and config.json has no quantization_config")
        yield f"{layer}.weight", dequantize(**parts, bits=bits).to(dtype)


def _bits(quantization: Mapping[str, Any]) -> int:
    """The width of packed weights. UnsupportedByEngine for another format than the one that we unpack."""
    method, layout = quantization.get("quant_method"), quantization.get("checkpoint_format", "gptq")
    if (method, layout, quantization.get("bits")) != ("gptq", "gptq", 4):
        raise UnsupportedByEngine(
            f"weights of quant_method {method!r}, checkpoint_format {layout!r}, {quantization.get('bits')} bits are "
            f"not unpacked here: only GPTQ of 4 bits"
        )
    return 4


def _files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [folder / name for name in dict.fromkeys(names)]
    return sorted(folder.glob("*.safetensors"))


def _top(logits: Tensor, count: int, chosen: int) -> dict[int, float]:
    import torch

    logprobs = torch.log_softmax(logits.float(), dim=-1)
    ids = [*logprobs.topk(count).indices.tolist(), chosen]
    return {int(token): float(logprobs[token]) for token in ids}
