"""bgmv_shrink and bgmv_expand by the decode kernels: what `own.OwnKernel` wants of kernels in CUDA C++.

Owns how a point of these operations becomes a shape. The plan of a batch is made once for all configurations with the
same chunk, and anew by `begin`: once per step, in no timed call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from smbench_kernels import lora_decode, lora_decode_space, nvrtc
from smbench_kernels.launch import Workspace
from smbench_kernels.lora import SCALE, Sizes
from smbench_kernels.lora_decode import Launch, Shape
from smbench_kernels.lora_plan import Plan, filler
from smbench_kernels.op import Config, Inputs, Point, Prepared
from smbench_kernels.own import KERNEL

LOWEST = 80
"""Compute capability of the tensor-core products."""
CLUSTERS_FROM = 90
NUMBER = 2
"""The kernels of version 2."""


class Plans:
    """The plans of one batch, by chunk, made when first asked for."""

    def __init__(
        self,
        tokens: int,
        loras: int,
        indices: torch.Tensor,
        seq_starts: torch.Tensor | None = None,
        seq_lens: torch.Tensor | None = None,
    ) -> None:
        self._tokens, self._loras, self._indices = tokens, loras, indices
        self._sequences = (seq_starts, seq_lens)
        self._known: dict[int, tuple[Plan, Callable[[], None]]] = {}

    def of(self, chunk: int) -> tuple[Plan, Callable[[], None]]:
        """A plan that holds the indices as they were when it was made, and what fills it again."""
        if chunk not in self._known:
            plan = Plan.allocate(self._tokens, self._loras, chunk, self._indices.device)
            fill = filler(plan, self._indices, *self._sequences)
            fill()
            self._known[chunk] = (plan, fill)
        return self._known[chunk]


@dataclass(frozen=True, slots=True)
class DecodeKernel:
    """Shrink or expand of one slice, one LoRA for each token."""

    expands: bool

    def shape(self, point: Point, capability: int = CLUSTERS_FROM) -> Shape:
        """What the kernels are compiled for."""
        sizes = Sizes.of(point)
        return Shape(
            tokens=sizes.tokens,
            hidden=sizes.hidden,
            rank=sizes.rank,
            outputs=(sizes.hidden,),
            loras=sizes.loras,
            bfloat16=sizes.dtype == torch.bfloat16,
            accumulate=True,
            clusters=capability >= CLUSTERS_FROM,
        )

    def takes(self, point: Point, capability: int) -> bool:
        """Any point, on a card with tensor cores of this kind."""
        return capability >= LOWEST

    def space(self, point: Point) -> list[Config]:
        """Configurations that the tuner may pick."""
        shape = self.shape(point)
        found = lora_decode_space.expand_space(shape) if self.expands else lora_decode_space.shrink_space(shape)
        return [{KERNEL: NUMBER, **config} for config in found]

    def predict(self, point: Point, config: Config, device: Mapping[str, float]) -> float:
        """Modelled seconds of one call."""
        shape = self.shape(point, int(device.get("capability", CLUSTERS_FROM)))
        if self.expands:
            return lora_decode_space.expand_seconds(shape, config, device)
        return lora_decode_space.shrink_seconds(shape, config, device)

    def binary(self, point: Point, config: Config) -> str:
        """What distinguishes compiled kernels."""
        return self.launch(self.shape(point), config).binary()

    def precompile(self, point: Point, config: Config, capability: int) -> None:
        """Compile into the cache folder; needs no GPU."""
        launch = self.launch(self.shape(point, capability), config)
        nvrtc.compiled(launch.source, launch.macros, capability)

    def bind(self, point: Point, inputs: Inputs) -> Callable[[Config, str], Prepared]:
        """What binds a configuration to these inputs, all of them to the same plans."""
        device = inputs["y"].device
        major, minor = torch.cuda.get_device_capability(device)
        shape = self.shape(point, 10 * major + minor)
        plans = Plans(shape.tokens, shape.loras, inputs["indices"])

        def prepare(config: Config, source: str) -> Prepared:
            launch = self.launch(shape, config)
            plan, fill = plans.of(config["CHUNK"])
            if self.expands:
                arguments = lora_decode.expand_arguments(shape, inputs["x"], [inputs["weights"]], inputs["y"], plan)
            else:
                workspace = Workspace.allocate(launch.partials, launch.counters, device)
                tensors = (inputs["x"], [inputs["weights"]], plan, inputs["y"], workspace)
                arguments = lora_decode.shrink_arguments(shape, config, *tensors, SCALE)
            run, kernel = launch.bind(device, arguments)
            return Prepared(run, config, source, kernels=lambda: {kernel.name: kernel.facts()}, begin=fill)

        return prepare

    def launch(self, shape: Shape, config: Config) -> Launch:
        """The launch of a configuration."""
        if self.expands:
            return lora_decode.expand_launch(shape, config)
        return lora_decode.shrink_launch(shape, config)


SHRINK = DecodeKernel(expands=False)
EXPAND = DecodeKernel(expands=True)
