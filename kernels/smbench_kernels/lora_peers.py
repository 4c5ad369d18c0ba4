"""What the providers over other projects' LoRA kernels share: versions, and how searched launch parameters are used.

Owns no kernel and no timed call. A library's kernels are providers twice: with the parameters that it chooses itself,
and (`-tuned`) with the best that our tuner found for the point among those that the library takes, so that ours are
compared with theirs at their best.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from smbench_kernels import configs, model
from smbench_kernels.compile import compile_for
from smbench_kernels.launch import Call
from smbench_kernels.lora_linear import plain_op, plain_point
from smbench_kernels.op import Config, Inputs, Point, Prepared, Tunable, UnsupportedPoint

Bind = Callable[[Point, Inputs], Callable[[Config | None, str], Prepared]]
"""What a library makes once a batch, and then the call with given parameters, or with the library's own for None."""

PARTS = ("shrink", "expand")
"""The two kernels of a layer's call; their parameters carry the name in front."""


@dataclass(frozen=True, eq=False)
class PeerKernel:
    """A library's kernel for one operation."""

    op: str
    package: str
    bind: Bind
    space: Callable[[Point], list[Config]]
    """Parameters that the library's kernel takes and that are worth a try for a point."""
    plan: Callable[[Point, Config], model.Plan]
    """What they do, for the order of the search."""
    calls: Callable[[Point, Config], list[Call]]
    """The launches, with dtypes in place of tensors: what is compiled ahead."""

    def default(self, point: Point, inputs: Inputs) -> Prepared:
        """The provider with the parameters that the library chooses."""
        return self.bind(point, inputs)(None, "library")

    def tuned(self, point: Point, inputs: Inputs) -> Prepared:
        """The provider with parameters that were searched for this version of the library on this device."""
        bound = self.bind(point, inputs)
        config, source = configs.tuned_config(self.op, point, inputs["y"].device, library=library(self.package))
        return bound(config, source)

    @property
    def tunable(self) -> Tunable:
        """The search space for the tuner."""
        return Tunable(
            space=self.space,
            prepare=lambda point, inputs, config: self.bind(point, inputs)(config, "given"),
            predict=lambda point, config, device: model.seconds(self.plan(point, config), device),
            binary=lambda point, config: _binary(self.package, self.calls(point, config)),
            precompile=lambda point, config, capability: _precompile(self.calls(point, config), capability),
            bind=lambda point, inputs: _given(self.bind(point, inputs)),
            exhaustive=True,
            library=lambda: library(self.package),
        )


@dataclass(frozen=True, eq=False)
class PeerLinear:
    """A library's two kernels as one call of a layer.

    Where the point is what `bgmv` or `sgmv` is too, each kernel takes what was found for it there: the call is the sum
    of the two tuned kernels. Fused slices and mixed batches are searched here, first the shrink, then the expand.
    """

    package: str
    bind: Bind
    parts: Mapping[str, PeerKernel]
    """The kernels of PARTS; their spaces, plans and launches take points of `lora_linear` as well."""

    def default(self, point: Point, inputs: Inputs) -> Prepared:
        """The provider with the parameters that the library chooses."""
        return self.bind(point, inputs)(None, "library")

    def tuned(self, point: Point, inputs: Inputs) -> Prepared:
        """The provider with parameters that were searched for this version of the library on this device."""
        bound = self.bind(point, inputs)
        device, version = inputs["y"].device, library(self.package)
        family = plain_op(point)
        if family is None:
            return bound(*configs.tuned_config("lora_linear", point, device, library=version))
        found = {
            part: configs.tuned_config(f"{family}_{part}", plain_point(point), device, library=version)
            for part in PARTS
        }
        inexact = [f"{part}: {source}" for part, (_, source) in found.items() if source != "tuned-exact"]
        source = f"tuned-nearest: {'; '.join(inexact)}" if inexact else "tuned-exact"
        return bound(joined({part: config for part, (config, _) in found.items()}), source)

    @property
    def tunable(self) -> Tunable:
        """The search space for the tuner: none where `bgmv` or `sgmv` has been searched."""
        return Tunable(
            space=self.space,
            prepare=lambda point, inputs, config: self.bind(point, inputs)(config, "given"),
            predict=self.predict,
            binary=lambda point, config: _binary(self.package, self.calls(point, config)),
            precompile=lambda point, config, capability: _precompile(self.calls(point, config), capability),
            bind=lambda point, inputs: _given(self.bind(point, inputs)),
            refine=self.refine,
            exhaustive=True,
            library=lambda: library(self.package),
        )

    def space(self, point: Point) -> list[Config]:
        """Parameters of the shrink, each with one choice for the expand."""
        if plain_op(point) is not None:
            return []
        expand = self.parts["expand"].space(point)[0]
        return [joined({"shrink": config, "expand": expand}) for config in self.parts["shrink"].space(point)]

    def refine(self, point: Point, config: Config) -> list[Config]:
        """Parameters of the expand with the given ones of the shrink."""
        kept = part_of(config, "shrink")
        return [joined({"shrink": kept, "expand": other}) for other in self.parts["expand"].space(point)]

    def predict(self, point: Point, config: Config, device: Mapping[str, float]) -> float:
        """Modelled seconds of both kernels."""
        return sum(
            model.seconds(kernel.plan(point, part_of(config, part)), device) for part, kernel in self.parts.items()
        )

    def calls(self, point: Point, config: Config) -> list[Call]:
        """The launches of both kernels."""
        return [call for part, kernel in self.parts.items() for call in kernel.calls(point, part_of(config, part))]


def joined(configs_by_part: Mapping[str, Config]) -> Config:
    """One configuration of several kernels'."""
    return {f"{part}_{name}": value for part, config in configs_by_part.items() for name, value in config.items()}


def part_of(config: Config, part: str) -> Config:
    """One kernel's configuration of a joined one."""
    return {name.removeprefix(f"{part}_"): value for name, value in config.items() if name.startswith(f"{part}_")}


def library(package: str) -> str:
    """Name and version of an installed package, such as `vllm 0.26.0`. UnsupportedPoint where it is missing."""
    if importlib.util.find_spec(package) is None:
        raise UnsupportedPoint(f"{package} is not installed in this stack")
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{package} of unknown version"


def installed_version(package: str, inputs: Inputs) -> str:
    """The version of an installed package. UnsupportedPoint where it is missing or the inputs are not on a GPU."""
    found = library(package)
    if not inputs["y"].is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise UnsupportedPoint(f"{package}'s LoRA kernels need an NVIDIA GPU")
    return found.removeprefix(f"{package} ")


def incompatible(package: str, version: str, expected: str, error: object) -> UnsupportedPoint:
    """The reason to give where a package is there but not as this provider knows it."""
    return UnsupportedPoint(f"{package} {version} is installed, but this provider expects {expected}: {error}")


def _given(bound: Callable[[Config | None, str], Prepared]) -> Callable[[Config], Prepared]:
    return lambda config: bound(config, "given")


def _binary(package: str, calls: Sequence[Call]) -> str:
    return " + ".join([package, *(f"{call.kernel.__name__} {call.binary()}" for call in calls)])


def _precompile(calls: Sequence[Call], capability: int) -> str:
    return " ".join(str(compile_for(call, capability).hash) for call in calls)
