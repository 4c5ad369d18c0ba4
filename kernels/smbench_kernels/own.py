"""Makes a kernel of our own into the providers `smbench` and `smbench-tuned` and into a Tunable.

Owns how a configuration is chosen and bound; the kernels own what a configuration means.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any

import torch

from smbench_kernels import configs, hardware, lora, model
from smbench_kernels.compile import compile_for
from smbench_kernels.hardware import Hardware
from smbench_kernels.launch import Call, Launcher, Workspace
from smbench_kernels.op import Config, Inputs, Op, Point, Prepared, Tunable


@dataclass(frozen=True, eq=False)
class OwnKernel:
    """What the module of a kernel provides."""

    op: Op
    space: Callable[[Point], list[Config]]
    """Configurations that the tuner may pick for a point."""
    plan: Callable[[Point, Config], model.Plan]
    """What a configuration does, for the time model."""
    workspace_sizes: Callable[[Point, Config], tuple[int, int]]
    """Partial sums and counters of a configuration."""
    call: Callable[[Point, Mapping[str, Any], Workspace, Config], Call]
    """The launch of a configuration; tensors may be given as dtypes."""
    expands: bool

    def default(self, point: Point, inputs: Inputs) -> Prepared:
        """Provider `smbench`: the configuration that the time model ranks first for this device."""
        config = self.default_config(point, hardware.of(inputs["y"].device))
        return self._bind(point, inputs, config, "default")

    def tuned(self, point: Point, inputs: Inputs) -> Prepared:
        """Provider `smbench-tuned`: the tuned configuration of this device for the point, or for the nearest one."""
        config, source = configs.tuned_config(self.op.name, point, inputs["y"].device)
        return self._bind(point, inputs, config, source)

    def default_config(self, point: Point, device: Hardware) -> Config:
        """The configuration of the space with the least modelled time; the first of equals."""
        return self._ranked(tuple(sorted(point.items())), device)

    @cached_property
    def tunable(self) -> Tunable:
        """The search space for the tuner."""
        return Tunable(
            space=self.space,
            prepare=partial(self._bind, source="given"),
            predict=self.predict,
            binary=self.binary,
            precompile=self.precompile,
            default=self.default_config,
        )

    def predict(self, point: Point, config: Config, device: Mapping[str, float]) -> float:
        """Modelled seconds of one call."""
        return model.seconds(self.plan(point, config), device)

    def precompile(self, point: Point, config: Config, capability: int) -> str:
        """Compile for a capability without a GPU; the key under which the kernel lies in Triton's cache."""
        return str(self.compiled(point, config, capability).hash)

    def compiled(self, point: Point, config: Config, capability: int) -> Any:
        """Triton's CompiledKernel of a configuration for a capability."""
        return compile_for(self._without_tensors(point, config), capability)

    def binary(self, point: Point, config: Config) -> str:
        """What distinguishes compiled kernels."""
        return f"{self.op.name} {self._without_tensors(point, config).binary()}"

    def _without_tensors(self, point: Point, config: Config) -> Call:
        dtypes = lora.input_dtypes(point, expands=self.expands)
        return self.call(point, dtypes, Workspace(torch.float32, torch.int32), config)

    def _bind(self, point: Point, inputs: Inputs, config: Config, source: str) -> Prepared:
        workspace = Workspace.allocate(*self.workspace_sizes(point, config), inputs["y"].device)
        launcher = Launcher(self.call(point, inputs, workspace, config))
        return Prepared(run=launcher, config=config, config_source=source, kernels=launcher.kernels)

    @lru_cache(maxsize=4096)  # noqa: B019 - kernels live as long as the process
    def _ranked(self, point: tuple[tuple[str, int | str], ...], device: Hardware) -> Config:
        axes, facts = dict(point), device.facts()
        return min(self.space(axes), key=lambda config: self.predict(axes, config, facts))
