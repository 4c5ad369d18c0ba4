"""bgmv_shrink and bgmv_expand for many tokens of one LoRA: the decode kernels, and beside them those of `lora_prefill`.

CudaKernels of `own`; a plan tells prefill's kernels the tokens. With a hundred tokens of one LoRA y of expand is most
of the traffic, and rows of 64 or 128 outputs by the copy engine suit device memory better than the decode kernel's 32;
shrink reads A once for 64 or 128 tokens instead of 32. Owns no kernel and not what is chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from smbench_kernels import hardware, lora_decode_ops, lora_prefill_space
from smbench_kernels.lora import Sizes
from smbench_kernels.lora_decode_ops import Plans
from smbench_kernels.lora_prefill_kernels import CAPABILITY
from smbench_kernels.lora_prefill_own import OneSlice
from smbench_kernels.op import Config, Inputs, Point, Prepared, UnsupportedPoint
from smbench_kernels.own import KERNEL

NUMBER = 4
"""Value of KERNEL for the kernels of `lora_prefill`, as in `lora_linear_space`."""
LEAST_TOKENS = 48
"""Tokens of a LoRA from which they are tried."""
MOST_CONTENDERS = 16
FACTS = hardware.TYPICAL[CAPABILITY].facts()


@dataclass(frozen=True, slots=True)
class WideKernel:
    """Both kernels behind an operation."""

    decode: lora_decode_ops.DecodeKernel
    by_default: bool
    """Whether the model alone may choose prefill's kernel; else it is a contender, for the tuner to time."""

    def takes(self, point: Point, capability: int) -> bool:
        """Any point that the decode kernel takes."""
        return self.decode.takes(point, capability)

    def space(self, point: Point) -> list[Config]:
        """The decode kernel's configurations, then the other's where it is no contender."""
        return self.decode.space(point) + (self._wide_space(point) if self.by_default else [])

    def contenders(self, point: Point) -> list[Config]:
        """The other kernel's likeliest configurations where it is not in `space`."""
        found = [] if self.by_default else self._wide_space(point)
        return sorted(found, key=lambda config: self.predict(point, config, FACTS))[:MOST_CONTENDERS]

    def predict(self, point: Point, config: Config, device: Mapping[str, float]) -> float:
        """Modelled seconds of one call; the kernels of `lora_prefill` run on Hopper alone."""
        if config[KERNEL] != NUMBER:
            return self.decode.predict(point, config, device)
        if int(device.get("capability", CAPABILITY)) != CAPABILITY:
            return float("inf")
        expand, shrink = lora_prefill_space.expand_seconds, lora_prefill_space.few_tiles_shrink_seconds
        return (expand if self._wide.expands else shrink)(_problem(point), config, device)

    def binary(self, point: Point, config: Config) -> str:
        """What distinguishes compiled kernels."""
        if config[KERNEL] != NUMBER:
            return self.decode.binary(point, config)
        return self._wide.binary(_problem(point), config)

    def precompile(self, point: Point, config: Config, capability: int) -> None:
        """Compile into the cache folder; nothing for a capability that cannot run the kernel."""
        if config[KERNEL] != NUMBER:
            self.decode.precompile(point, config, capability)
        elif capability == CAPABILITY:
            self._wide.precompile(_problem(point), config, capability)

    def bind(self, point: Point, inputs: Inputs) -> Callable[[Config, str], Prepared]:
        """What binds a configuration to these inputs, all of them to the same plans."""
        sizes, problem = Sizes.of(point), _problem(point)
        decode = self.decode.bind(point, inputs)
        plans = Plans(sizes.tokens, sizes.loras, inputs["indices"])
        major, minor = torch.cuda.get_device_capability(inputs["y"].device)

        def prepare(config: Config, source: str) -> Prepared:
            if config[KERNEL] != NUMBER:
                return decode(config, source)
            if reason := self._wide.unsupported(sizes, 10 * major + minor):
                raise UnsupportedPoint(f"the CUDA C++ kernels: {reason}")
            plan, fill = plans.of(config["TOKENS"])
            return replace(self._wide.prepared(problem, inputs, plan, config, source), begin=fill)

        return prepare

    @property
    def _wide(self) -> OneSlice:
        return OneSlice(self.decode.expands)

    def _wide_space(self, point: Point) -> list[Config]:
        """The other kernel's configurations where a LoRA has tokens enough and it takes the sizes."""
        sizes = Sizes.of(point)
        enough = sizes.tokens >= LEAST_TOKENS * min(sizes.loras, sizes.tokens)
        if not enough or self._wide.unsupported(sizes, CAPABILITY):
            return []
        expand, shrink = lora_prefill_space.expand_space, lora_prefill_space.few_tiles_shrink_space
        found = (expand if self._wide.expands else shrink)(_problem(point))
        return [{KERNEL: NUMBER, **config} for config in found]


def _problem(point: Point) -> lora_prefill_space.Problem:
    sizes = Sizes.of(point)
    used, outputs = min(sizes.loras, sizes.tokens), (sizes.hidden,)
    return lora_prefill_space.over_plan(
        *(sizes.tokens, sizes.hidden, sizes.rank, outputs, used, sizes.dtype), dependent=False, accumulate=True
    )


SHRINK = WideKernel(lora_decode_ops.SHRINK, by_default=False)
EXPAND = WideKernel(lora_decode_ops.EXPAND, by_default=True)
