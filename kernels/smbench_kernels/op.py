"""What an operation is: axes, inputs, truth, work and providers.

Owns the vocabulary that kernels and the measuring worker share. Does not own timing, tolerances of a run or any file.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

if TYPE_CHECKING:
    import torch

    from smbench_kernels.hardware import Hardware

Point: TypeAlias = Mapping[str, int | str]
"""One resolved point of an operation's axes, e.g. `{"batch": 8, "hidden_size": 4096, "dtype": "float16"}`."""

Config: TypeAlias = Mapping[str, int]
"""Launch parameters of a kernel, e.g. `{"BLOCK_K": 256, "SPLIT_K": 8, "num_warps": 4}`."""

Inputs: TypeAlias = "Mapping[str, torch.Tensor]"
"""Named tensors of one point; a provider writes those that the operation calls its outputs, mostly `y` alone."""


class UnsupportedPoint(Exception):
    """This provider cannot run this point here. The message is the reason that a report prints."""


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of an operation. An axis with `choices` takes one of those strings, any other an integer."""

    doc: str
    minimum: int = 1
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Work:
    """The least that any implementation must do for one call."""

    bytes: int
    """Bytes that must cross device memory: every touched input element once, every written output element once."""
    flops: int
    """Floating-point operations of the definition (a multiply-add counts two)."""


@dataclass(frozen=True, slots=True)
class Tolerance:
    """What separates rounding from a wrong answer."""

    relative: float
    """Bound on the relative error in the 2-norm, of the change that the call makes to an output."""
    elementwise: float
    """Bound on the largest single error, in units of the root mean square of the reference."""


def _nothing() -> None:
    """What is left to do around a call that takes the inputs and writes `y` itself."""


def _cloned(_point: Point, inputs: Inputs) -> Inputs:
    return {name: tensor.clone() for name, tensor in inputs.items()}


@dataclass(frozen=True, slots=True)
class Passes:
    """The two halves of a call that trains, to be timed and weighed apart. Each enqueues on the current stream.

    After `reset`, `forward` and `backward`, a `Prepared.finish` brings the same outputs as after `run`.
    """

    forward: Callable[[], None]
    """Computes the output and keeps, until `backward` or `reset`, what the backward pass needs."""
    backward: Callable[[], None]
    """Uses what the last `forward` kept up. Gradients add to those of earlier calls, as PyTorch's do: none is reset."""
    reset: Callable[[], None]
    """Forgets gradients, output and whatever was kept."""


PASSES = ("forward", "backward")
"""The names of the halves."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A provider bound to one set of inputs."""

    run: Callable[[], None]
    """Enqueues one call on the current stream: no synchronization, no allocation that a CUDA graph cannot capture."""
    config: Config
    """Launch parameters that `run` really passes; empty where a library chooses for itself."""
    config_source: str
    """`default`, `tuned-exact`, `tuned-nearest: <point>`, `given` or `library`."""
    kernels: Callable[[], Mapping[str, Mapping[str, int]]] = dict
    """After a first run: compiled facts by kernel name (num_warps, num_stages, shared_bytes, registers, spills)."""
    begin: Callable[[], None] = _nothing
    """Brings the inputs to the form in which a library's kernels hand them to each other: called once after the inputs
    were written, before a `run`, never in a timed interval."""
    finish: Callable[[], None] = _nothing
    """Brings `y` to what the operation defines, where a library leaves its result in a buffer of its own: called once
    after a `run`, before the comparison, never in a timed interval. An engine reads that buffer where it is, so that it
    would be wrong to charge the library for this."""
    passes: Passes | None = None
    """The call in two halves, for an operation that has `pass_work`."""
    capturable: bool = True
    """Whether a CUDA graph can hold `run`: not one that replays graphs of its own or decides on the host each time."""
    counts: Callable[[], Mapping[str, int]] = dict
    """What calls have moved and met since the provider was bound, by its own names, e.g. bytes from the host."""


class Provider(Protocol):
    """Binds an implementation to inputs. Raises UnsupportedPoint where it cannot run the point."""

    def __call__(self, point: Point, inputs: Inputs) -> Prepared: ...


@dataclass(frozen=True, slots=True)
class Tunable:
    """The search space of a provider's kernel: our own, or one of a library whose launch parameters we search."""

    space: Callable[[Point], list[Config]]
    """Every configuration that the tuner may pick for a point; empty where the provider takes what other operations'
    points were given, so that there is nothing to search."""
    prepare: Callable[[Point, Inputs, Config], Prepared]
    """Like a provider, with the configuration given (`config_source` is `given`)."""
    predict: Callable[[Point, Config, Mapping[str, float]], float]
    """Modelled seconds of one call on a device (keys `sm_count`, `memory_bytes_per_s`, `l2_bytes`), for pruning."""
    binary: Callable[[Point, Config], str]
    """What distinguishes compiled kernels: points and configurations with equal strings share all their binaries."""
    precompile: Callable[[Point, Config, int], str]
    """Compile for a compute capability (80, 86, 89, 90) without a GPU, into Triton's cache; returns the cache key."""
    default: Callable[[Point, Hardware], Config] | None = None
    """The configuration that the provider `smbench` takes on a device of these facts; an image ships it compiled."""
    bind: Callable[[Point, Inputs], Callable[[Config], Prepared]] | None = None
    """`prepare` in two steps, where a part is common to all configurations: what a library makes once a batch."""
    refine: Callable[[Point, Config], list[Config]] | None = None
    """A second space around the winner of the first, for a call of several kernels: the product would be too large."""
    admits: Callable[[Point, Config], bool] | None = None
    """Whether a configuration that `space` does not hold may win at a point all the same, as one that `refine` leads
    to: a search tries it if it won here or nearby before. None: only what `space` holds is tried."""
    starts: Callable[[Point, torch.device], list[Config]] | None = None
    """What files of other operations suggest for a point, to be tried first as far as it is admitted: a call of several
    kernels, where each is tuned alone."""
    exhaustive: bool = False
    """Every configuration is tried, whatever `predict` says: for a library's kernel, lest our model starve it."""
    library: Callable[[], str] | None = None
    """Name and version of the library that the kernel is of, such as `vllm 0.26.0`. UnsupportedPoint where it is not
    installed. None for kernels of our own."""

    def binding(self, point: Point, inputs: Inputs) -> Callable[[Config], Prepared]:
        """What prepares any configuration on these inputs. UnsupportedPoint where the provider cannot run here."""
        if self.bind is not None:
            return self.bind(point, inputs)
        return lambda config: self.prepare(point, inputs, config)


@dataclass(frozen=True, slots=True)
class Op:
    """An operation: one definition of what is computed, many providers of it."""

    name: str
    doc: str
    axes: Mapping[str, Axis]
    make_inputs: Callable[[Point, int, torch.device], Inputs]
    """Inputs of a point from a seed, on a device, outputs among them. Accumulating operations get a `y` with random
    content. Shapes follow from the point alone."""
    reference: Callable[[Point, Inputs], torch.Tensor | Mapping[str, torch.Tensor]]
    """The value that `y`, or that each output by its name, must have after one call on these inputs, in float64. Never
    reads what a provider wrote."""
    work: Callable[[Point, Inputs], Work]
    tolerance: Callable[[Point], Tolerance]
    providers: Mapping[str, str]
    """Provider name to `module:attribute`, imported on demand."""
    baseline: str
    """The provider that speed-ups are relative to. It says nothing about correctness."""
    tunable: str | None = None
    """`module:attribute` of the Tunable of our own kernel."""
    peer_tunables: Mapping[str, str] = field(default_factory=dict)
    """Provider name to `module:attribute` of the Tunable of a library's kernel."""
    place: Callable[[Point, Inputs], Inputs] = _cloned
    """A copy of inputs in memory of its own, in the kind of memory that the point asks for: what a provider gets."""
    redraw: Callable[[Point, Inputs, int], Inputs | None] | None = None
    """The same inputs with other integers from a seed. The gate binds each provider to these as well, so that a result
    that does not follow from them is seen; None where `make_inputs` is all that there is to vary, in all points or in
    the one that is asked for."""
    outputs: tuple[str, ...] = ("y",)
    """The inputs that a call writes. Each is compared with its own reference, within its own scale."""
    pass_work: Mapping[str, Callable[[Point, Inputs], Work]] = field(default_factory=dict)
    """The work of each of PASSES, for operations whose providers give `Prepared.passes`; else empty."""

    def provider(self, name: str) -> Provider:
        """The provider of that name. KeyError lists the known names; ImportError passes through."""
        if name not in self.providers:
            msg = f"op {self.name!r} has no provider {name!r}; known: {', '.join(self.providers)}"
            raise KeyError(msg)
        provider: Provider = load(self.providers[name])
        return provider

    def expected(self, point: Point, inputs: Inputs) -> Mapping[str, torch.Tensor]:
        """The reference of every output. ValueError where the operation does not give each its own."""
        found = self.reference(point, inputs)
        if not isinstance(found, Mapping):
            found = {self.outputs[0]: found}
        if found.keys() != set(self.outputs):
            msg = f"op {self.name!r}: the reference gives {', '.join(found)}; its outputs: {', '.join(self.outputs)}"
            raise ValueError(msg)
        return found

    def tuning(self, provider: str | None = None) -> Tunable:
        """The search space of our own kernel, or of a library's provider. LookupError where there is none."""
        target = self.peer_tunables.get(provider or "", self.tunable)
        if target is None:
            msg = f"op {self.name!r} has nothing to tune"
            raise LookupError(msg)
        tunable: Tunable = load(target)
        return tunable


def load(target: str) -> Any:
    """The attribute that `module:attribute` names."""
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)
