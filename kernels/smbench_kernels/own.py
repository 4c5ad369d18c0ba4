"""Makes the kernels of an operation of our own into the providers `smbench` and `smbench-tuned` and into a Tunable.

Owns how a configuration is chosen and bound; the kernels own what a configuration means. An operation has a portable
kernel in Triton, which the interpreter runs too, and may have faster ones in CUDA C++ besides; a configuration with the
key `KERNEL` is one of theirs. By default a GPU gets the latter where they take the point.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Protocol

import torch

from smbench_kernels import configs, hardware, lora, model, nvrtc
from smbench_kernels.compile import compile_for
from smbench_kernels.hardware import Hardware
from smbench_kernels.launch import Call, Launcher, Workspace
from smbench_kernels.op import Config, Inputs, Op, Point, Prepared, Tunable, UnsupportedPoint

KERNEL = "KERNEL"
"""The key that names a kernel in CUDA C++; a configuration of the portable kernel has none."""


class CudaKernel(Protocol):
    """Kernels in CUDA C++ that do what a portable one does."""

    def takes(self, point: Point, capability: int) -> bool:
        """Whether they can run a point on a card of this capability."""

    def space(self, point: Point) -> list[Config]:
        """Configurations that the tuner may pick for a point, each with the key `KERNEL`; none where it takes none."""

    def predict(self, point: Point, config: Config, device: Mapping[str, float]) -> float:
        """Modelled seconds of one call."""

    def binary(self, point: Point, config: Config) -> str:
        """What distinguishes compiled kernels."""

    def precompile(self, point: Point, config: Config, capability: int) -> None:
        """Compile into the cache folder; needs no GPU."""

    def bind(self, point: Point, inputs: Inputs) -> Callable[[Config, str], Prepared]:
        """What binds a configuration and its source to these inputs."""


def _none(_point: Point) -> list[Config]:
    return []


def _nothing(_point: Point) -> Config | None:
    return None


@dataclass(frozen=True, eq=False)
class OwnKernel:
    """What the module of a kernel provides."""

    op: Op
    space: Callable[[Point], list[Config]]
    """Configurations of the portable kernel that the tuner may pick for a point."""
    plan: Callable[[Point, Config], model.Plan]
    """What a configuration of the portable kernel does, for the time model."""
    workspace_sizes: Callable[[Point, Config], tuple[int, int]]
    """Partial sums and counters of a configuration of the portable kernel."""
    call: Callable[[Point, Mapping[str, Any], Workspace, Config], Call]
    """The launch of a configuration of the portable kernel; tensors may be given as dtypes."""
    expands: bool
    cuda: CudaKernel | None = None
    contenders: Callable[[Point], list[Config]] = _none
    """What the tuner tries beside the CUDA kernels' space where these run, and no default is: configurations of the
    portable kernel that may be faster, and of kernels that were never timed at such points."""
    preferred: Callable[[Point], Config | None] = _nothing
    """The one of them that was measured to be faster than the CUDA kernels' best at such points, if any."""

    def default(self, point: Point, inputs: Inputs) -> Prepared:
        """Provider `smbench`: the configuration that the time model ranks first for this device."""
        device = inputs["y"].device
        choose = self.default_config if device.type == "cuda" and nvrtc.available() else self.portable_config
        return self.binding(point, inputs)(choose(point, hardware.of(device)), "default")

    def tuned(self, point: Point, inputs: Inputs) -> Prepared:
        """Provider `smbench-tuned`: the tuned configuration of this device for the point, or for the nearest one."""
        config, source = configs.tuned_config(self.op.name, point, inputs["y"].device)
        return self.binding(point, inputs)(config, source)

    def default_config(self, point: Point, device: Hardware) -> Config:
        """The configuration with the least modelled time, the first of equals; the CUDA kernels' where they run.

        `preferred` goes before these: the two models are not so exact that their times could be compared.
        """
        if self.cuda is None or not self.cuda.takes(point, device.capability):
            return self.portable_config(point, device)
        return self.preferred(point) or self.cuda_config(point, device)

    def cuda_config(self, point: Point, device: Hardware) -> Config:
        """The CUDA kernels' configuration with the least modelled time. ValueError where they take no such point."""
        return self._ranked(tuple(sorted(point.items())), device, True)

    def portable_config(self, point: Point, device: Hardware) -> Config:
        """The configuration of the portable kernel with the least modelled time; the first of equals."""
        return self._ranked(tuple(sorted(point.items())), device, False)

    @cached_property
    def tunable(self) -> Tunable:
        """The search space for the tuner."""
        return Tunable(
            space=self.tuning_space,
            prepare=lambda point, inputs, config: self._given(point, inputs)(config),
            predict=self.predict,
            binary=self.binary,
            precompile=self.precompile,
            default=self.default_config,
            bind=self._given,
        )

    def _given(self, point: Point, inputs: Inputs) -> Callable[[Config], Prepared]:
        bind = self.binding(point, inputs)
        return lambda config: bind(config, "given")

    def tuning_space(self, point: Point) -> list[Config]:
        """What the tuner searches: the CUDA kernels and their contenders, or the portable kernel."""
        found = self.cuda.space(point) if self.cuda else []
        return [*found, *self.contenders(point)] if found else self.space(point)

    def predict(self, point: Point, config: Config, device: Mapping[str, float]) -> float:
        """Modelled seconds of one call."""
        if self.cuda and KERNEL in config:
            return self.cuda.predict(point, config, device)
        return model.seconds(self.plan(point, config), device)

    def precompile(self, point: Point, config: Config, capability: int) -> str:
        """Compile for a capability without a GPU; the key under which the kernel lies in Triton's cache."""
        if self.cuda and KERNEL in config:
            self.cuda.precompile(point, config, capability)
            return self.cuda.binary(point, config)
        return str(self.compiled(point, config, capability).hash)

    def compiled(self, point: Point, config: Config, capability: int) -> Any:
        """Triton's CompiledKernel of a configuration of the portable kernel for a capability."""
        return compile_for(self._without_tensors(point, config), capability)

    def binary(self, point: Point, config: Config) -> str:
        """What distinguishes compiled kernels."""
        if self.cuda and KERNEL in config:
            return self.cuda.binary(point, config)
        return f"{self.op.name} {self._without_tensors(point, config).binary()}"

    def binding(self, point: Point, inputs: Inputs) -> Callable[[Config, str], Prepared]:
        """What binds a configuration and its source (`config_source`) to inputs.

        What it returns raises UnsupportedPoint for a configuration of the CUDA kernels where they can't run.
        """
        cuda: list[Callable[[Config, str], Prepared]] = []

        def prepare(config: Config, source: str) -> Prepared:
            if KERNEL not in config:
                return self._bind_portable(point, inputs, config, source)
            if self.cuda is None or not inputs["y"].is_cuda or not nvrtc.available():
                raise UnsupportedPoint("the CUDA C++ kernels need an NVIDIA GPU and libnvrtc")
            if not cuda:
                cuda.append(self.cuda.bind(point, inputs))
            return cuda[0](config, source)

        return prepare

    def _without_tensors(self, point: Point, config: Config) -> Call:
        dtypes = lora.input_dtypes(point, expands=self.expands)
        return self.call(point, dtypes, Workspace(torch.float32, torch.int32), config)

    def _bind_portable(self, point: Point, inputs: Inputs, config: Config, source: str) -> Prepared:
        workspace = Workspace.allocate(*self.workspace_sizes(point, config), inputs["y"].device)
        launcher = Launcher(self.call(point, inputs, workspace, config))
        return Prepared(run=launcher, config=config, config_source=source, kernels=launcher.kernels)

    @lru_cache(maxsize=4096)  # noqa: B019 - kernels live as long as the process
    def _ranked(self, point: tuple[tuple[str, int | str], ...], device: Hardware, cuda: bool) -> Config:
        axes, facts = dict(point), device.facts()
        found = self.cuda.space(axes) if cuda and self.cuda else self.space(axes)
        return min(found, key=lambda config: self.predict(axes, config, facts))
