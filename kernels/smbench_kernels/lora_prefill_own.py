"""The Hopper prefill kernels behind operations of one slice, and `sgmv_shrink` and `sgmv_expand` by them.

Owns neither the kernels nor how a configuration is chosen. The space of the latter holds the portable kernel's
configurations too, since small batches may be faster with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from smbench_kernels import hardware, lora_prefill, lora_prefill_space, model, nvrtc
from smbench_kernels.launch import ceil_div
from smbench_kernels.lora import SCALE, Sizes
from smbench_kernels.lora_plan import Plan
from smbench_kernels.lora_prefill_kernels import CAPABILITY, FEATURES, DoesNotFit, Expand, Shrink, source
from smbench_kernels.lora_prefill_space import Problem
from smbench_kernels.op import Config, Inputs, Point, Prepared, UnsupportedPoint

LONG_TOKENS, PORTABLES = 1024, 32
"""From how many tokens on, and how many: the search should come to all of ours before it loses patience."""
FACTS = hardware.TYPICAL[CAPABILITY].facts()


@dataclass(frozen=True, slots=True)
class OneSlice:
    """Shrink or expand of one slice, whether sequences or a plan tell which tokens have which LoRA."""

    expands: bool

    def unsupported(self, sizes: Sizes, capability: int) -> str | None:
        """Why a card of this capability cannot run such sizes, or None."""
        if self.expands:
            return lora_prefill.unsupported(0, sizes.rank, (sizes.hidden,), capability)
        return lora_prefill.unsupported(sizes.hidden, sizes.rank, (), capability)

    def kernel(self, problem: Problem, config: Config) -> Shrink | Expand:
        """The kernel of a configuration. Whether it fits, its `stages` tell."""
        return problem.expand(config) if self.expands else problem.shrink(config)

    def binary(self, problem: Problem, config: Config) -> str:
        """What distinguishes compiled kernels."""
        kernel = self.kernel(problem, config)
        return f"{kernel.name} {sorted(kernel.macros.items())}"

    def precompile(self, problem: Problem, config: Config, capability: int) -> None:
        """Compile into Triton's cache folder; the capability is one that `unsupported` takes."""
        kernel = self.kernel(problem, config)
        nvrtc.compiled(source(kernel), kernel.macros, f"{capability}{FEATURES}")

    def prepared(
        self,
        problem: Problem,
        inputs: Inputs,
        batch: lora_prefill.Sequences | Plan,
        config: Config,
        config_source: str,
    ) -> Prepared:
        """A configuration bound to inputs and what tells their LoRAs. UnsupportedPoint where it does not fit."""
        x, weights, y = inputs["x"], [inputs["weights"]], inputs["y"]
        try:
            if self.expands:
                run = lora_prefill.expand(x.unsqueeze(0), weights, y, batch, config)
            else:
                run = lora_prefill.shrink(x, weights, batch, y.unsqueeze(0), SCALE, config, accumulate=True)
        except DoesNotFit as reason:
            raise UnsupportedPoint(f"configuration {dict(config)}: {reason}") from reason
        kernel = self.kernel(problem, config)
        return Prepared(run, config, config_source, kernels=lambda: lora_prefill.facts(kernel, y.device))


@dataclass(frozen=True)
class Prefill:
    """One of the two kernels behind the operation of that name; a `CudaKernel` of `own`."""

    expands: bool
    portable: Callable[[Point], list[Config]]
    """The space of the portable kernel."""
    portable_plan: Callable[[Point, Config], model.Plan]
    """What one of its configurations does."""

    def takes(self, point: Point, capability: int) -> bool:
        """Whether a card of this capability can run the point."""
        return self._ours.unsupported(Sizes.of(point), capability) is None

    def space(self, point: Point) -> list[Config]:
        """Ours and the portable kernel's, for long batches its likeliest; none where ours do not take the point."""
        if not self.takes(point, CAPABILITY):
            return []
        problem = self._problem(point)
        found = lora_prefill_space.expand_space(problem) if self.expands else lora_prefill_space.shrink_space(problem)
        portable = self.portable(point)
        if problem.tokens >= LONG_TOKENS:
            portable.sort(key=lambda config: model.seconds(self.portable_plan(point, config), FACTS))
            portable = portable[:PORTABLES]
        return [{"KERNEL": 2, **config} for config in found] + portable

    def predict(self, point: Point, config: Config, device: Mapping[str, float]) -> float:
        """Modelled seconds of one call."""
        seconds = lora_prefill_space.expand_seconds if self.expands else lora_prefill_space.shrink_seconds
        return seconds(self._problem(point), config, device)

    def bind(self, point: Point, inputs: Inputs) -> Callable[[Config, str], Prepared]:
        """What binds a configuration and its source. UnsupportedPoint where device or sizes are not for the kernels."""
        device, sizes = inputs["y"].device, Sizes.of(point)
        major, minor = torch.cuda.get_device_capability(device)
        if reason := self._ours.unsupported(sizes, 10 * major + minor):
            raise UnsupportedPoint(f"the CUDA C++ kernels: {reason}")
        batch = lora_prefill.Sequences(inputs["indices"], inputs["seq_lens"], inputs["seq_starts"], sizes.seq_len)
        problem = self._problem(point)
        return lambda config, source: self._ours.prepared(problem, inputs, batch, config, source)

    def binary(self, point: Point, config: Config) -> str:
        """What distinguishes compiled kernels."""
        return self._ours.binary(self._problem(point), config)

    def precompile(self, point: Point, config: Config, capability: int) -> None:
        """Compile into Triton's cache folder; nothing for a capability that cannot run them."""
        if self.takes(point, capability):
            self._ours.precompile(self._problem(point), config, capability)

    def kernel(self, point: Point, config: Config) -> Shrink | Expand:
        """The kernel of a configuration. Whether it fits, its `stages` tell."""
        return self._ours.kernel(self._problem(point), config)

    @property
    def _ours(self) -> OneSlice:
        return OneSlice(self.expands)

    def _problem(self, point: Point) -> Problem:
        sizes = Sizes.of(point)
        return Problem(
            tokens=sizes.tokens,
            hidden=sizes.hidden,
            rank=sizes.rank,
            outputs=(sizes.hidden,),
            used_loras=min(sizes.loras, sizes.batch),
            dtype=sizes.dtype,
            longest=sizes.seq_len,
            tiles=lambda tokens: sizes.batch * ceil_div(sizes.seq_len, tokens),
            planned=False,
            accumulate=True,
            dependent=False,
        )
