"""bgmv_expand for many tokens of one LoRA: the decode kernel, and beside it that of `lora_prefill` over a plan.

A CudaKernel of `own`. With a hundred tokens of one LoRA y is most of the traffic, and rows of 64 or 128 outputs by the
copy engine suit device memory better than the decode kernel's 32. Owns neither kernel and not what is chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from smbench_kernels import lora_decode_ops, lora_prefill, lora_prefill_space, nvrtc
from smbench_kernels.lora import Sizes
from smbench_kernels.lora_decode_ops import Plans
from smbench_kernels.lora_prefill_kernels import CAPABILITY, FEATURES, DoesNotFit, Expand, source
from smbench_kernels.op import Config, Inputs, Point, Prepared, UnsupportedPoint
from smbench_kernels.own import KERNEL

NUMBER = 4
"""Value of KERNEL for the kernel of `lora_prefill`, as in `lora_linear_space`."""
LEAST_TOKENS = 48
"""Tokens of a LoRA from which it is tried."""


@dataclass(frozen=True, slots=True)
class WideExpand:
    """Both kernels behind bgmv_expand."""

    decode: lora_decode_ops.DecodeKernel

    def takes(self, point: Point, capability: int) -> bool:
        """Any point that the decode kernel takes."""
        return self.decode.takes(point, capability)

    def space(self, point: Point) -> list[Config]:
        """The decode kernel's configurations, then the other's where a LoRA has tokens enough."""
        found = self.decode.space(point)
        sizes = Sizes.of(point)
        enough = sizes.tokens >= LEAST_TOKENS * min(sizes.loras, sizes.tokens)
        if enough and not lora_prefill.unsupported(0, sizes.rank, (sizes.hidden,), CAPABILITY):
            found += [{KERNEL: NUMBER, **config} for config in lora_prefill_space.expand_space(_problem(sizes))]
        return found

    def predict(self, point: Point, config: Config, device: Mapping[str, float]) -> float:
        """Modelled seconds of one call; the kernel of `lora_prefill` runs on Hopper alone."""
        if config[KERNEL] != NUMBER:
            return self.decode.predict(point, config, device)
        if int(device.get("capability", CAPABILITY)) != CAPABILITY:
            return float("inf")
        return lora_prefill_space.expand_seconds(_problem(Sizes.of(point)), config, device)

    def binary(self, point: Point, config: Config) -> str:
        """What distinguishes compiled kernels."""
        if config[KERNEL] != NUMBER:
            return self.decode.binary(point, config)
        kernel = _kernel(point, config)
        return f"{kernel.name} {sorted(kernel.macros.items())}"

    def precompile(self, point: Point, config: Config, capability: int) -> None:
        """Compile into the cache folder; nothing for a capability that cannot run the kernel."""
        if config[KERNEL] != NUMBER:
            self.decode.precompile(point, config, capability)
        elif capability == CAPABILITY:
            kernel = _kernel(point, config)
            nvrtc.compiled(source(kernel), kernel.macros, f"{capability}{FEATURES}")

    def bind(self, point: Point, inputs: Inputs) -> Callable[[Config, str], Prepared]:
        """What binds a configuration to these inputs, all of them to the same plans."""
        sizes, device = Sizes.of(point), inputs["y"].device
        decode = self.decode.bind(point, inputs)
        plans = Plans(sizes.tokens, sizes.loras, inputs["indices"])
        capability = torch.cuda.get_device_capability(device)

        def prepare(config: Config, source: str) -> Prepared:
            if config[KERNEL] != NUMBER:
                return decode(config, source)
            if reason := lora_prefill.unsupported(0, sizes.rank, (sizes.hidden,), 10 * capability[0] + capability[1]):
                raise UnsupportedPoint(f"the CUDA C++ kernels: {reason}")
            plan, fill = plans.of(config["TOKENS"])
            x, weights, y = inputs["x"].unsqueeze(0), [inputs["weights"]], inputs["y"]
            try:
                run = lora_prefill.expand(x, weights, y, plan, config)
            except DoesNotFit as why:
                raise UnsupportedPoint(f"configuration {dict(config)}: {why}") from why
            kernel = _kernel(point, config)
            return Prepared(run, config, source, kernels=lambda: lora_prefill.facts(kernel, device), begin=fill)

        return prepare


def _kernel(point: Point, config: Config) -> Expand:
    return _problem(Sizes.of(point)).expand(config)


def _problem(sizes: Sizes) -> lora_prefill_space.Problem:
    used, outputs = min(sizes.loras, sizes.tokens), (sizes.hidden,)
    return lora_prefill_space.over_plan(
        sizes.tokens, sizes.hidden, sizes.rank, outputs, used, sizes.dtype, dependent=False
    )


EXPAND = WideExpand(lora_decode_ops.EXPAND)
