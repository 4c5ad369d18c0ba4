"""lora_linear by our kernels: the providers `smbench` and `smbench-tuned`, and what the tuner searches.

Owns which kernels serve a point. A configuration names them by `KERNEL`: FUSED is shrink and expand in one launch of
clusters, PAIR two launches of the decode kernels of which the second starts while the first runs (`E_…` is expand's
part), PREFILL the two of `lora_prefill`. All take the batch as a plan, so that sequences that prefill and tokens that
decode may be mixed; without the key it is the portable pair in Triton. The plan is made before any timed call, and anew
by `begin`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch

from smbench_kernels import (
    configs,
    hardware,
    lora_decode,
    lora_linear_space,
    lora_linear_triton,
    lora_prefill,
    nvrtc,
)
from smbench_kernels.compile import compile_for
from smbench_kernels.hardware import Hardware
from smbench_kernels.launch import Call, Workspace
from smbench_kernels.lora import SCALE
from smbench_kernels.lora_decode import Launch, Shape
from smbench_kernels.lora_decode_ops import CLUSTERS_FROM, LOWEST, Plans
from smbench_kernels.lora_linear import LinearSizes, weights
from smbench_kernels.lora_linear_space import FUSED, PAIR, PREFILL, expand_part, shape_of
from smbench_kernels.lora_plan import capacity
from smbench_kernels.lora_prefill_kernels import FEATURES, DoesNotFit, source
from smbench_kernels.op import Config, Inputs, Point, Prepared, Tunable, UnsupportedPoint
from smbench_kernels.own import KERNEL


def default(point: Point, inputs: Inputs) -> Prepared:
    """Provider `smbench`: the configuration that the time models rank first for this device."""
    device = inputs["y"].device
    config = lora_linear_triton.CONFIG
    if device.type == "cuda" and nvrtc.available():
        config = default_config(point, hardware.of(device))
    return binding(point, inputs)(config, "default")


def tuned(point: Point, inputs: Inputs) -> Prepared:
    """Provider `smbench-tuned`: the tuned configuration of this device for the point, or for the nearest one."""
    config, source_of_config = configs.tuned_config("lora_linear", point, inputs["y"].device)
    return binding(point, inputs)(config, source_of_config)


def default_config(point: Point, device: Hardware) -> Config:
    """The configuration with the least modelled time on a device; the portable one below compute capability 8.0."""
    return _ranked(tuple(sorted(point.items())), device)


@lru_cache(maxsize=4096)
def _ranked(point: tuple[tuple[str, int | str], ...], device: Hardware) -> Config:
    axes, facts = dict(point), device.facts()
    if device.capability < LOWEST:
        return lora_linear_triton.CONFIG
    found = [config for config in lora_linear_space.space(axes) if _runs(config, device.capability)]
    # what a search would refine, the model refines at once
    best = min(found, key=lambda config: predict(axes, config, facts))
    return min([best, *lora_linear_space.refine(axes, best)], key=lambda config: predict(axes, config, facts))


def _runs(config: Config, capability: int) -> bool:
    """Clusters, and with them one launch for both and the kernels of `lora_prefill`, are Hopper's."""
    return config[KERNEL] == PAIR or capability == CLUSTERS_FROM


def predict(point: Point, config: Config, device: Mapping[str, float]) -> float:
    """Modelled seconds of one call."""
    return lora_linear_space.predict(point, config, device)


def binding(point: Point, inputs: Inputs) -> Callable[[Config, str], Prepared]:
    """What binds a configuration and its source to inputs, all configurations to the same plans."""
    sizes = LinearSizes.of(point)
    decodes = set(sizes.lengths) == {1}
    sequences = () if decodes else (inputs["seq_starts"], inputs["seq_lens"])
    return _Batch(inputs, sizes, Plans(sizes.tokens, sizes.loras, inputs["indices"], *sequences)).prepared


@dataclass(frozen=True, slots=True)
class _Batch:
    """Inputs with their plans, to which configurations are bound."""

    inputs: Inputs
    sizes: LinearSizes
    plans: Plans

    def prepared(self, config: Config, source: str) -> Prepared:
        """A configuration of any kernel. UnsupportedPoint where the device does not run it."""
        if KERNEL not in config:
            return self._portable(config, source)
        if self._device.type != "cuda" or not nvrtc.available():
            raise UnsupportedPoint("the CUDA C++ kernels need an NVIDIA GPU and libnvrtc")
        major, minor = torch.cuda.get_device_capability(self._device)
        capability = 10 * major + minor
        if capability < LOWEST or not _runs(config, capability):
            raise UnsupportedPoint(f"configuration {dict(config)} is not for compute capability {major}.{minor}")
        bind = {FUSED: self._fused, PAIR: self._pair, PREFILL: self._prefill}[config[KERNEL]]
        return bind(config, source, shape_of(self.sizes, capability))

    @property
    def _device(self) -> torch.device:
        return self.inputs["y"].device

    def _tensors(self) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
        pairs = weights(self.inputs)
        return self.inputs["x"], [a for a, _ in pairs], [b for _, b in pairs], self.inputs["y"]

    def _intermediate(self) -> torch.Tensor:
        size = (len(self.sizes.outputs), self.sizes.tokens, self.sizes.rank)
        return torch.empty(size, dtype=torch.float32, device=self._device)

    def _portable(self, config: Config, source: str) -> Prepared:
        plan, fill = self.plans.of(config["CHUNK"])
        run, launchers = lora_linear_triton.linear(*self._tensors(), self._intermediate(), plan, SCALE)

        def facts() -> Mapping[str, Mapping[str, int]]:
            return {name: fact for launcher in launchers for name, fact in launcher.kernels().items()}

        return Prepared(run, config, source, kernels=facts, begin=fill)

    def _fused(self, config: Config, source: str, shape: Shape) -> Prepared:
        plan, fill = self.plans.of(config["CHUNK"])
        arguments = lora_decode.fused_arguments(shape, config, *self._tensors(), plan, SCALE)
        run, kernel = lora_decode.fused_launch(shape, config).bind(self._device, arguments)
        return Prepared(run, config, source, kernels=lambda: {kernel.name: kernel.facts()}, begin=fill)

    def _pair(self, config: Config, source: str, shape: Shape) -> Prepared:
        x, a, b, y = self._tensors()
        h = self._intermediate()
        first, second = _pair(shape, config)
        plans = [self.plans.of(config["CHUNK"]), self.plans.of(config["E_CHUNK"])]
        workspace = Workspace.allocate(first.partials, first.counters, self._device)
        arguments = lora_decode.shrink_arguments(shape, config, x, a, plans[0][0], h, workspace, SCALE)
        shrink, shrinks = first.bind(self._device, arguments)
        expand, expands = second.bind(self._device, lora_decode.expand_arguments(shape, h, b, y, plans[1][0]))

        def both() -> None:
            shrink()
            expand()

        def begin() -> None:
            for fill in {id(fill): fill for _, fill in plans}.values():
                fill()

        def facts() -> Mapping[str, Mapping[str, int]]:
            return {kernel.name: kernel.facts() for kernel in (shrinks, expands)}

        return Prepared(both, config, source, kernels=facts, begin=begin)

    def _prefill(self, config: Config, source: str, _shape: Shape) -> Prepared:
        plan, fill = self.plans.of(config["TOKENS"])
        try:
            run = lora_prefill.linear(*self._tensors(), plan, SCALE, config, self._intermediate())
        except DoesNotFit as reason:
            raise UnsupportedPoint(f"configuration {dict(config)}: {reason}") from reason
        kernels = lora_linear_space.prefill_kernels(self.sizes, config)

        def facts() -> Mapping[str, Mapping[str, int]]:
            found = (lora_prefill.facts(kernel, self._device) for kernel in kernels)
            return {name: fact for each in found for name, fact in each.items()}

        return Prepared(run, config, source, kernels=facts, begin=fill)


def _pair(shape: Shape, config: Config) -> tuple[Launch, Launch]:
    """Shrink, and the expand that starts before it ends."""
    return (
        lora_decode.shrink_launch(shape, config),
        lora_decode.expand_launch(shape, expand_part(config), ahead=shape.clusters),
    )


def _launches(point: Point, config: Config, capability: int) -> list[Launch]:
    shape = shape_of(LinearSizes.of(point), capability)
    if config[KERNEL] == FUSED:
        return [lora_decode.fused_launch(shape, config)]
    return list(_pair(shape, config))


def binary(point: Point, config: Config) -> str:
    """What distinguishes compiled kernels: those of a pair stand in one string."""
    sizes = LinearSizes.of(point)
    if KERNEL not in config:
        return " ".join(call.binary() for call in _portable_calls(sizes))
    if config[KERNEL] == PREFILL:
        return " ".join(
            f"{k.name} {sorted(k.macros.items())}" for k in lora_linear_space.prefill_kernels(sizes, config)
        )
    return " ".join(launch.binary() for launch in _launches(point, config, CLUSTERS_FROM))


def precompile(point: Point, config: Config, capability: int) -> str:
    """Compile for a capability into the cache folder without a GPU; the same string as `binary`."""
    sizes = LinearSizes.of(point)
    if KERNEL not in config:
        for call in _portable_calls(sizes):
            compile_for(call, capability)
    elif config[KERNEL] == PREFILL:
        for kernel in lora_linear_space.prefill_kernels(sizes, config):
            nvrtc.compiled(source(kernel), kernel.macros, f"{capability}{FEATURES}")
    else:
        for launch in _launches(point, config, capability):
            nvrtc.compiled(launch.source, launch.macros, capability)
    return binary(point, config)


def _portable_calls(sizes: LinearSizes) -> list[Call]:
    numbers = {
        "hidden": sizes.hidden,
        "rank": sizes.rank,
        "outputs": sizes.outputs,
        "capacity": capacity(sizes.tokens, sizes.loras, lora_linear_triton.CONFIG["CHUNK"]),
    }
    each = [sizes.dtype] * len(sizes.outputs)
    return lora_linear_triton.calls(sizes.dtype, each, each, sizes.dtype, torch.float32, torch.int32, numbers, SCALE)


def _given(point: Point, inputs: Inputs) -> Callable[[Config], Prepared]:
    bind = binding(point, inputs)
    return lambda config: bind(config, "given")


TUNABLE = Tunable(
    space=lora_linear_space.space,
    prepare=lambda point, inputs, config: _given(point, inputs)(config),
    predict=predict,
    binary=binary,
    precompile=precompile,
    default=default_config,
    bind=_given,
    refine=lora_linear_space.refine,
)
