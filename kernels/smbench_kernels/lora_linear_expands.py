"""The expands with which a pair of lora_linear may end: where each runs, what it costs, how it is compiled and bound.

Owns which there are, not what is chosen. The configuration of an expand is written as bgmv_expand's is, and `KERNEL` in
it says which it is:

- missing (AHEAD): the decode kernel, which loads its first B and y while shrink runs, and then waits for it;
- PORTABLE: bgmv_expand's kernel in Triton, for one slice and one token a sequence. It starts when shrink has ended;
- WAITING: the decode kernel as bgmv_expand has it. It is made ready while shrink ends, and waits before it loads;
- WIDE: that of `lora_prefill` over a plan of its own, which loads ahead too.

In the configuration of a pair all names have the prefix `E_` (`lora_linear_space`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from smbench_kernels import (
    bgmv_expand,
    hardware,
    lora_decode,
    lora_decode_ops,
    lora_decode_space,
    lora_decode_wide,
    lora_prefill,
    lora_prefill_space,
    nvrtc,
)
from smbench_kernels.launch import ceil_div
from smbench_kernels.lora_decode import Launch
from smbench_kernels.lora_decode_ops import Plans
from smbench_kernels.lora_linear import LinearSizes, plain_op, plain_point
from smbench_kernels.lora_linear_shapes import (
    LEAST_PREFILL,
    asking_s,
    problem_of,
    rows_alone,
    shape_of,
    tokens_of_lora,
)
from smbench_kernels.lora_prefill_kernels import CAPABILITY, COLUMNS, FEATURES, DoesNotFit, Expand, source
from smbench_kernels.op import Config, Point, UnsupportedPoint
from smbench_kernels.own import KERNEL

AHEAD, PORTABLE = 0, 1
WAITING, WIDE = lora_decode_ops.NUMBER, lora_decode_wide.NUMBER
"""Values of KERNEL; AHEAD stands for its absence."""
OVERLAP_S = 1.3e-6
"""What the second of two launches saves by loading early: its launch and part of its first loads. 102 tuned pairs of an
H200 saved 1.3 us against both kernels tuned alone (median; 0.9 to 1.8 in the middle four fifths), those of 20 to 66 MB
of B and y 1.1 us (-0.1 to 2.0)."""
FACTS = hardware.TYPICAL[CAPABILITY].facts()


@dataclass(frozen=True, slots=True)
class Handed:
    """What an expand works on."""

    point: Point
    h: torch.Tensor
    """[slices, T, r] float32, which shrink writes."""
    b: Sequence[torch.Tensor]
    """[L, n, r] of each slice."""
    y: torch.Tensor
    """[T, sum of n], accumulated."""
    indices: torch.Tensor
    """[sequences] int32."""
    plans: Plans
    capability: int


@dataclass(frozen=True, slots=True)
class Part:
    """One kernel of a call, bound to its tensors."""

    run: Callable[[], None]
    """Enqueues it on the current stream."""
    kernels: Callable[[], Mapping[str, Mapping[str, int]]]
    """Compiled facts by name, after a first run."""
    fills: Sequence[Callable[[], None]] = ()
    """What fills the plans that it reads; parts with the same plan have the same function."""


class PairedExpand(Protocol):
    """y[t, slice s] += h[s, t] . B_s[lora(t)]^T behind a decode shrink that writes h."""

    @property
    def fitted(self) -> bool:
        """Whether `predict` was fitted to times of pairs: a default is chosen among these alone."""

    def unsupported(self, point: Point, capability: int) -> str | None:
        """Why it cannot run a point on a card of this capability, on which the shrink runs; or None."""

    def space(self, point: Point) -> list[Config]:
        """What the tuner may pick, the likeliest first; none where it does not run on an H200 or has no chance."""

    def predict(self, point: Point, config: Config, device: Mapping[str, float]) -> float:
        """Modelled seconds that it adds to those of the shrink in front."""

    def binary(self, point: Point, config: Config) -> str:
        """What distinguishes compiled kernels."""

    def precompile(self, point: Point, config: Config, capability: int) -> None:
        """Compile into the cache folder for a capability that runs it; needs no GPU."""

    def bind(self, handed: Handed, config: Config) -> Part:
        """The kernel on these tensors. UnsupportedPoint where it does not fit the device."""


@dataclass(frozen=True, slots=True)
class DecodeExpand:
    """The decode kernel, which loads its first B and y before it waits for shrink, or waits at once.

    Its modelled time is that of the kernel alone. One that loads ahead saves OVERLAP_S of it; that it takes bandwidth
    from shrink meanwhile is not modelled. One that waits neither saves nor takes anything, which is a prediction.
    """

    ahead: bool

    @property
    def fitted(self) -> bool:
        return self.ahead

    def unsupported(self, point: Point, capability: int) -> str | None:
        return None

    def space(self, point: Point) -> list[Config]:
        shape = shape_of(LinearSizes.of(point))
        found = lora_decode_space.expand_space(shape)
        found.sort(key=lambda config: lora_decode_space.expand_seconds(shape, config, FACTS))
        return found if self.ahead else [{KERNEL: WAITING, **config} for config in found]

    def predict(self, point: Point, config: Config, device: Mapping[str, float]) -> float:
        shape = shape_of(LinearSizes.of(point), int(device.get("capability", CAPABILITY)))
        saved_s = OVERLAP_S if self.ahead and shape.clusters else 0.0
        return lora_decode_space.expand_seconds(shape, config, device) - saved_s

    def binary(self, point: Point, config: Config) -> str:
        return self._launch(point, config, CAPABILITY).binary()

    def precompile(self, point: Point, config: Config, capability: int) -> None:
        launch = self._launch(point, config, capability)
        nvrtc.compiled(launch.source, launch.macros, capability)

    def bind(self, handed: Handed, config: Config) -> Part:
        plan, fill = handed.plans.of(config["CHUNK"])
        shape = shape_of(LinearSizes.of(handed.point), handed.capability)
        arguments = lora_decode.expand_arguments(shape, handed.h, handed.b, handed.y, plan)
        run, kernel = self._launch(handed.point, config, handed.capability).bind(handed.y.device, arguments)
        return Part(run, lambda: {kernel.name: kernel.facts()}, (fill,))

    def _launch(self, point: Point, config: Config, capability: int) -> Launch:
        shape = shape_of(LinearSizes.of(point), capability)
        return lora_decode.expand_launch(shape, config, ahead=self.ahead and shape.clusters)


class WideExpand:
    """The kernel of `lora_prefill` over a plan, which fetches B and y before it waits for shrink.

    Its modelled time is that behind prefill's shrink, OVERLAP_S saved; behind decode's this is a prediction.
    """

    @property
    def fitted(self) -> bool:
        return False

    def unsupported(self, point: Point, capability: int) -> str | None:
        sizes = LinearSizes.of(point)
        return lora_prefill.unsupported(0, sizes.rank, sizes.outputs, capability)

    def space(self, point: Point) -> list[Config]:
        sizes = LinearSizes.of(point)
        if self.unsupported(point, CAPABILITY) or tokens_of_lora(sizes) < LEAST_PREFILL:
            return []
        found = lora_prefill_space.expand_space(problem_of(sizes))
        found.sort(key=lambda config: self.predict(point, config, FACTS))
        return [{KERNEL: WIDE, **config} for config in found]

    def predict(self, point: Point, config: Config, device: Mapping[str, float]) -> float:
        sizes = LinearSizes.of(point)
        problem, tokens = problem_of(sizes), config["TOKENS"]
        scattered = min(problem.tiles(tokens), problem.used_loras * ceil_div(rows_alone(sizes), tokens))
        blocks = int(device["sm_count"]) * config["PER_SM"]
        rows_s = asking_s(sizes) * scattered * sum(sizes.outputs) / COLUMNS / blocks
        return max(lora_prefill_space.expand_seconds(problem, config, device), rows_s) - OVERLAP_S

    def binary(self, point: Point, config: Config) -> str:
        kernel = _wide(point, config)
        return f"{kernel.name} {sorted(kernel.macros.items())}"

    def precompile(self, point: Point, config: Config, capability: int) -> None:
        kernel = _wide(point, config)
        nvrtc.compiled(source(kernel), kernel.macros, f"{capability}{FEATURES}")

    def bind(self, handed: Handed, config: Config) -> Part:
        plan, fill = handed.plans.of(config["TOKENS"])
        try:
            run = lora_prefill.expand(handed.h, handed.b, handed.y, plan, config, dependent=True)
        except DoesNotFit as reason:
            raise UnsupportedPoint(f"expand {dict(config)}: {reason}") from reason
        kernel, device = _wide(handed.point, config), handed.y.device
        return Part(run, lambda: lora_prefill.facts(kernel, device), (fill,))


def _wide(point: Point, config: Config) -> Expand:
    return problem_of(LinearSizes.of(point)).expand(config)


class PortableExpand:
    """bgmv_expand's kernel in Triton, one program or more for each token: no plan, and h is not rounded.

    Its modelled time is that of `bgmv_expand` alone, by another model than shrink's, so that a sum of both is no more
    than an order. The few configurations and what is tried first of them are bgmv_expand's as well.
    """

    @property
    def fitted(self) -> bool:
        return False

    def unsupported(self, point: Point, capability: int) -> str | None:
        return None if plain_op(point) == "bgmv" else "the portable expand takes one slice and one token a sequence"

    def space(self, point: Point) -> list[Config]:
        if self.unsupported(point, CAPABILITY):
            return []
        plain = plain_point(point)
        first = bgmv_expand.preferred(plain)
        found = [config for config in bgmv_expand.contenders(plain) if KERNEL not in config]
        found.sort(key=lambda config: config != first)
        return [{KERNEL: PORTABLE, **config} for config in found]

    def predict(self, point: Point, config: Config, device: Mapping[str, float]) -> float:
        return bgmv_expand.KERNEL.predict(plain_point(point), _portable(config), device)

    def binary(self, point: Point, config: Config) -> str:
        return bgmv_expand.KERNEL.binary(plain_point(point), _portable(config))

    def precompile(self, point: Point, config: Config, capability: int) -> None:
        bgmv_expand.KERNEL.precompile(plain_point(point), _portable(config), capability)

    def bind(self, handed: Handed, config: Config) -> Part:
        inputs = {"x": handed.h[0], "weights": handed.b[0], "y": handed.y, "indices": handed.indices}
        bound = bgmv_expand.KERNEL.binding(plain_point(handed.point), inputs)(_portable(config), "given")
        return Part(bound.run, bound.kernels)


def _portable(config: Config) -> Config:
    """As bgmv_expand has it, where no KERNEL means its kernel in Triton."""
    return {name: value for name, value in config.items() if name != KERNEL}


EXPANDS: Mapping[int, PairedExpand] = {
    AHEAD: DecodeExpand(ahead=True),
    WAITING: DecodeExpand(ahead=False),
    WIDE: WideExpand(),
    PORTABLE: PortableExpand(),
}


def as_part(config: Config) -> list[Config]:
    """A configuration of bgmv_expand as one or two of ours: the decode kernel may load ahead too."""
    if KERNEL not in config:
        return [{KERNEL: PORTABLE, **config}]
    return [_portable(config), config] if config[KERNEL] == WAITING else [config]


def expand_of(config: Config) -> PairedExpand:
    """The expand that a configuration is of. ValueError for an unknown KERNEL."""
    number = config.get(KERNEL, AHEAD)
    if number not in EXPANDS:
        known = ", ".join(str(value) for value in sorted(EXPANDS) if value != AHEAD)
        raise ValueError(f"no expand has {KERNEL} {number}; known: {known}, or no {KERNEL}")
    return EXPANDS[number]
