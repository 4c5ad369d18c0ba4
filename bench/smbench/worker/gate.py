"""The correctness gate: a provider's outputs against their references, on fresh random inputs. Owns the verdict.

What it must catch: wrong values, unwritten elements, inputs changed in place, outputs cached from an earlier call, and
work that is not on the stream it was asked for (`tests/` has a cheating provider for each).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from smbench_kernels.op import Inputs, Op, Point, Tolerance


@dataclass(frozen=True, slots=True)
class Expected:
    """What one output must be."""

    value: torch.Tensor
    """float64, the shape of the output."""
    rms: float
    """Root mean square of the change that the call makes to it."""
    norm: float

    @classmethod
    def of(cls, value: torch.Tensor, before: torch.Tensor) -> Expected:
        """The value that an output must have, which was `before`."""
        norm = float(torch.linalg.vector_norm(value - initial(before)))
        return cls(value, norm / math.sqrt(max(1, value.numel())), norm)


@dataclass(slots=True)
class Truth:
    """One set of input values of a point, with the outputs that are right for it."""

    inputs: Inputs
    """Pristine, outputs included: nothing but the reference ever reads them."""
    outputs: Mapping[str, Expected]

    @classmethod
    def of(cls, op: Op, point: Point, inputs: Inputs) -> Truth:
        """Compute the reference of these inputs."""
        expected = op.expected(point, inputs)
        return cls(inputs, {name: Expected.of(expected[name], inputs[name]) for name in op.outputs})


@dataclass(slots=True)
class Verdict:
    """What the gate saw so far."""

    tolerance: Tolerance
    rounds: int = 0
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    """By output, the worst of all rounds: relative error, largest single error in units of the root mean square."""
    faults: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return self.rounds > 0 and not self.faults

    def record(self) -> dict[str, object]:
        """The `check` of a result. Errors by output only where there is more than one."""
        relative = functools.reduce(_worse, (relative for relative, _ in self.errors.values()), 0.0)
        elementwise = functools.reduce(_worse, (worst for _, worst in self.errors.values()), 0.0)
        outputs = {
            name: {"relative_error": _finite(relative), "elementwise_error": _finite(worst)}
            for name, (relative, worst) in self.errors.items()
        }
        return {
            "passed": self.passed,
            "rounds": self.rounds,
            "relative_error": _finite(relative),
            "relative_bound": self.tolerance.relative,
            "elementwise_error": _finite(elementwise),
            "elementwise_bound": self.tolerance.elementwise,
            "reference": "float64",
            **({"outputs": outputs} if len(outputs) > 1 else {}),
        }


def initial(y: torch.Tensor) -> torch.Tensor:
    """What `y` counts as before the call, in float64: an element poisoned with NaN is one to be overwritten."""
    return torch.nan_to_num(y.double(), nan=0.0)


def restore(buffers: Inputs, truth: Truth) -> None:
    """Put the pristine values of every floating tensor into a provider's buffers, in place.

    Integer tensors are left: a provider may have built its metadata from them before the timed call, as engines do.
    """
    for name, buffer in buffers.items():
        if buffer.is_floating_point():
            buffer.copy_(truth.inputs[name])


def replace_integers(buffers: Inputs, truth: Truth) -> None:
    """Put the pristine values of every tensor that is not floating into a provider's buffers, in place.

    Whoever bound a provider to the old values has to bind it anew.
    """
    for name, buffer in buffers.items():
        if not buffer.is_floating_point():
            buffer.copy_(truth.inputs[name])


def examine(
    verdict: Verdict,
    call: Callable[[], None],
    buffers: Inputs,
    truth: Truth,
    what: str,
    finish: Callable[[], None] | None = None,
) -> None:
    """Run a call on buffers that hold the truth's inputs and note every fault. Synchronizes the current stream only.

    `finish`, which no time covers, runs without the inputs: it can move results into outputs but not compute them.
    """
    call()
    _wait(buffers)
    verdict.rounds += 1
    inputs = {name: buffer for name, buffer in buffers.items() if name not in truth.outputs}
    for name, buffer in inputs.items():
        if not torch.equal(buffer, truth.inputs[name]):
            verdict.faults.append(f"{what}: input {name!r} was changed in place")
    if finish is not None:
        for buffer in inputs.values():
            if buffer.is_floating_point():
                buffer.fill_(math.nan)
        finish()
        _wait(buffers)
        restore(inputs, truth)
    for name, expected in truth.outputs.items():
        # an only output needs no name
        place = what if len(truth.outputs) == 1 else f"{what}, {name}"
        _compare(verdict, name, buffers[name], truth.inputs[name], expected, place)


def _compare(
    verdict: Verdict, name: str, output: torch.Tensor, given: torch.Tensor, expected: Expected, what: str
) -> None:
    """Note how far an output is from what it must be. `given` is what was there for the provider to write to."""
    if output.shape != given.shape or output.dtype != given.dtype:
        verdict.faults.append(
            f"{what}: {name} became {output.dtype}{list(output.shape)}, it was {given.dtype}{list(given.shape)}"
        )
        return
    error = output.double() - expected.value
    relative = float(torch.linalg.vector_norm(error))
    relative = relative / expected.norm if expected.norm else relative
    worst = float(error.abs_().max()) if error.numel() else 0.0
    worst = worst / expected.rms if expected.rms else worst
    seen = verdict.errors.get(name, (0.0, 0.0))
    verdict.errors[name] = _worse(seen[0], relative), _worse(seen[1], worst)
    bound = verdict.tolerance
    # written so that NaN fails
    if not relative <= bound.relative:
        verdict.faults.append(f"{what}: relative error {relative:.3g} exceeds {bound.relative:.3g}")
    elif not worst <= bound.elementwise:
        verdict.faults.append(f"{what}: largest error {worst:.3g} rms exceeds {bound.elementwise:.3g}")


def _wait(buffers: Inputs) -> None:
    """Wait for the current stream alone: what a provider does elsewhere is not waited for by its user either."""
    device = next(iter(buffers.values())).device
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def _worse(seen: float, new: float) -> float:
    return new if math.isnan(new) else max(seen, new)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
