"""lora_linear by our kernels: the providers `smbench` and `smbench-tuned`, and what the tuner searches.

Owns which kernels serve a point. A configuration names them by `KERNEL`: FUSED is shrink and expand in one launch of
clusters, PAIR the decode kernel of shrink and one of the expands of `lora_linear_expands` (`E_…` is its part), PREFILL
the two of `lora_prefill`. All take the batch as a plan, so that sequences that prefill and tokens that decode may be
mixed; without the key it is the portable pair in Triton. Plans are made before any timed call, and anew by `begin`.
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
from smbench_kernels.lora_decode import Launch
from smbench_kernels.lora_decode_ops import CLUSTERS_FROM, Plans
from smbench_kernels.lora_linear import LinearSizes, plain_op, plain_point, weights
from smbench_kernels.lora_linear_expands import Handed, Part, as_part, expand_of
from smbench_kernels.lora_linear_shapes import shape_of
from smbench_kernels.lora_linear_space import FUSED, PAIR, PREFILL, expand_part, predict, unsupported
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
    """The configuration with the least modelled time on a device; the portable one where no other runs.

    Of what the model was fitted to: kinds of expand that were never timed in a pair are left to the tuner.
    """
    return _ranked(tuple(sorted(point.items())), device)


@lru_cache(maxsize=4096)
def _ranked(point: tuple[tuple[str, int | str], ...], device: Hardware) -> Config:
    axes, facts = dict(point), device.facts()
    found = [config for config in lora_linear_space.space(axes) if not unsupported(axes, config, device.capability)]
    if not found:
        return lora_linear_triton.CONFIG
    # what a search would refine, the model refines at once
    best = min(found, key=lambda config: predict(axes, config, facts))
    around = [config for config in lora_linear_space.refine(axes, best) if lora_linear_space.fitted(config)]
    return min([best, *around], key=lambda config: predict(axes, config, facts))


def binding(point: Point, inputs: Inputs) -> Callable[[Config, str], Prepared]:
    """What binds a configuration and its source to inputs, all configurations to the same plans."""
    return _Batch.of(point, inputs).prepared


@dataclass(frozen=True, slots=True)
class _Batch:
    """Inputs with their plans, to which configurations are bound."""

    point: Point
    inputs: Inputs
    sizes: LinearSizes
    plans: Plans

    @classmethod
    def of(cls, point: Point, inputs: Inputs) -> _Batch:
        sizes = LinearSizes.of(point)
        decodes = set(sizes.lengths) == {1}
        sequences = () if decodes else (inputs["seq_starts"], inputs["seq_lens"])
        return cls(point, inputs, sizes, Plans(sizes.tokens, sizes.loras, inputs["indices"], *sequences))

    def prepared(self, config: Config, source: str) -> Prepared:
        """A configuration of any kernel. UnsupportedPoint where the device does not run it."""
        if KERNEL not in config:
            return self._portable(config, source)
        if self._device.type != "cuda" or not nvrtc.available():
            raise UnsupportedPoint("the CUDA C++ kernels need an NVIDIA GPU and libnvrtc")
        major, minor = torch.cuda.get_device_capability(self._device)
        capability = 10 * major + minor
        if reason := unsupported(self.point, config, capability):
            raise UnsupportedPoint(f"configuration {dict(config)}: {reason}")
        bind = {FUSED: self._fused, PAIR: self._pair, PREFILL: self._prefill}[config[KERNEL]]
        return bind(config, source, capability)

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

    def _fused(self, config: Config, source: str, capability: int) -> Prepared:
        shape = shape_of(self.sizes, capability)
        plan, fill = self.plans.of(config["CHUNK"])
        arguments = lora_decode.fused_arguments(shape, config, *self._tensors(), plan, SCALE)
        run, kernel = lora_decode.fused_launch(shape, config).bind(self._device, arguments)
        return Prepared(run, config, source, kernels=lambda: {kernel.name: kernel.facts()}, begin=fill)

    def _pair(self, config: Config, source: str, capability: int) -> Prepared:
        x, a, b, y = self._tensors()
        h, part = self._intermediate(), expand_part(config)
        shrink = self._shrink(config, x, a, h, capability)
        handed = Handed(self.point, h, b, y, self.inputs["indices"], self.plans, capability)
        expand = expand_of(part).bind(handed, part)

        def both() -> None:
            shrink.run()
            expand.run()

        def begin() -> None:
            # once where both have the same plan
            for fill in dict.fromkeys([*shrink.fills, *expand.fills]):
                fill()

        return Prepared(both, config, source, kernels=lambda: {**shrink.kernels(), **expand.kernels()}, begin=begin)

    def _shrink(self, config: Config, x: torch.Tensor, a: list[torch.Tensor], h: torch.Tensor, capability: int) -> Part:
        shape = shape_of(self.sizes, capability)
        launch = lora_decode.shrink_launch(shape, config)
        plan, fill = self.plans.of(config["CHUNK"])
        workspace = Workspace.allocate(launch.partials, launch.counters, self._device)
        arguments = lora_decode.shrink_arguments(shape, config, x, a, plan, h, workspace, SCALE)
        run, kernel = launch.bind(self._device, arguments)
        return Part(run, lambda: {kernel.name: kernel.facts()}, (fill,))

    def _prefill(self, config: Config, source: str, _capability: int) -> Prepared:
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


def _launch(point: Point, config: Config, capability: int) -> Launch:
    """The one launch for both, or shrink's of a pair."""
    shape = shape_of(LinearSizes.of(point), capability)
    return (lora_decode.fused_launch if config[KERNEL] == FUSED else lora_decode.shrink_launch)(shape, config)


def binary(point: Point, config: Config) -> str:
    """What distinguishes compiled kernels: those of a pair stand in one string."""
    sizes = LinearSizes.of(point)
    if KERNEL not in config:
        return " ".join(call.binary() for call in _portable_calls(sizes))
    if config[KERNEL] == PREFILL:
        return " ".join(
            f"{k.name} {sorted(k.macros.items())}" for k in lora_linear_space.prefill_kernels(sizes, config)
        )
    first = _launch(point, config, CLUSTERS_FROM).binary()
    if config[KERNEL] == FUSED:
        return first
    part = expand_part(config)
    return f"{first} {expand_of(part).binary(point, part)}"


def precompile(point: Point, config: Config, capability: int) -> str:
    """Compile for a capability into the cache folder without a GPU; the same string as `binary`.

    Nothing for a capability that cannot run the kernels.
    """
    sizes = LinearSizes.of(point)
    if KERNEL not in config:
        for call in _portable_calls(sizes):
            compile_for(call, capability)
    elif unsupported(point, config, capability):
        pass
    elif config[KERNEL] == PREFILL:
        for kernel in lora_linear_space.prefill_kernels(sizes, config):
            nvrtc.compiled(source(kernel), kernel.macros, f"{capability}{FEATURES}")
    else:
        launch = _launch(point, config, capability)
        nvrtc.compiled(launch.source, launch.macros, capability)
        if config[KERNEL] == PAIR:
            part = expand_part(config)
            expand_of(part).precompile(point, part, capability)
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


def starts(point: Point, device: torch.device) -> list[Config]:
    """Pairs of the tuned shrink and the tuned expand alone, where the two together do what this call does."""
    if plain_op(point) != "bgmv":
        return []
    try:
        alone = [configs.tuned_config(name, plain_point(point), device)[0] for name in ("bgmv_shrink", "bgmv_expand")]
    except UnsupportedPoint:
        return []
    shrink = {name: value for name, value in alone[0].items() if name != KERNEL}
    return [lora_linear_space.joined(shrink, part) for part in as_part(alone[1])]


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
    admits=lora_linear_space.admits,
    starts=starts,
)
