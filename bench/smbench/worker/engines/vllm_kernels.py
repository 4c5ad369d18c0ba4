"""What runs each layer of a model that vLLM has loaded. Owns what is read from modules and from vLLM's log.

Also runs within vLLM's worker processes, where layers are shared between GPUs. Does not own how vLLM is driven
(`vllm`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

SAID = re.compile(r"Using (\w+Kernel) for |Using (?:AttentionBackendEnum\.)?(\w+) (?:attention )?backend")
"""Log lines that name what was selected: (linear kernel, attention backend)."""


def look(model: nn.Module) -> tuple[dict[str, dict[str, int]], int]:
    """Kernels by role, and bytes of weights, of the part of a model that one process has."""
    weights_bytes = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    return kernels_of(model), weights_bytes


def kernels_of(model: nn.Module, said: Sequence[str] = ()) -> dict[str, dict[str, int]]:
    """What runs each layer, from the loaded model: role, name, number of layers.

    A linear layer runs its method's kernel, or the method itself where that has none, as for layers that are not
    quantized.
    """
    found: dict[str, Counter[str]] = {"linear": Counter(), "attention": Counter(), "head": Counter()}
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        names = {base.__name__ for base in type(module).__mro__}
        if "LinearBase" in names and method is not None:
            found["linear"][_kernel_name(method)] += 1
        elif "ParallelLMHead" in names and method is not None:
            found["head"][_kernel_name(method)] += 1
        backend = getattr(module, "attn_backend", None)
        if isinstance(backend, type) and hasattr(backend, "get_name"):
            version = getattr(getattr(module, "impl", None), "vllm_flash_attn_version", None)
            found["attention"][f"{backend.get_name()}{'' if version is None else f' {version}'}"] += 1
    return with_log({role: dict(counts) for role, counts in found.items()}, said)


def with_log(kernels: Mapping[str, Mapping[str, int]], said: Sequence[str]) -> dict[str, dict[str, int]]:
    """A name that the log has and the model has not appears with no layer: then one of the two is wrong."""
    found = {role: dict(counts) for role, counts in kernels.items()}
    for line in said:
        if match := SAID.search(line):
            role, name = ("linear", match[1]) if match[1] else ("attention", match[2])
            if not any(known.split()[0] == name for known in found.setdefault(role, {})):
                found[role][name] = 0
    return {role: counts for role, counts in found.items() if counts}


def _kernel_name(method: Any) -> str:
    kernel = getattr(method, "kernel", None)
    return type(method if kernel is None else kernel).__name__
