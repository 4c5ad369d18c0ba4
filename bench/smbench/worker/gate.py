"""The correctness gate: a provider's output against the reference, on fresh random inputs. Owns the verdict.

What it must catch: wrong values, unwritten elements, inputs changed in place, outputs cached from an earlier call, and
work that is not on the stream it was asked for (`tests/` has a cheating provider for each).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from smbench_kernels.op import Inputs, Op, Point, Tolerance


@dataclass(slots=True)
class Truth:
    """One set of input values of a point, with the output that is right for it."""

    inputs: Inputs
    """Pristine: nothing but the reference ever reads them."""
    expected: torch.Tensor
    """float64, the shape of `y`."""
    rms: float
    """Root mean square of the change that the call makes."""
    norm: float

    @classmethod
    def of(cls, op: Op, point: Point, inputs: Inputs) -> Truth:
        """Compute the reference of these inputs."""
        expected = op.reference(point, inputs)
        change = expected - initial(inputs["y"])
        norm = float(torch.linalg.vector_norm(change))
        return cls(inputs, expected, norm / math.sqrt(max(1, change.numel())), norm)


@dataclass(slots=True)
class Verdict:
    """What the gate saw so far."""

    tolerance: Tolerance
    rounds: int = 0
    relative_error: float = 0.0
    elementwise_error: float = 0.0
    faults: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return self.rounds > 0 and not self.faults

    def record(self) -> dict[str, object]:
        """The `check` of a result."""
        return {
            "passed": self.passed,
            "rounds": self.rounds,
            "relative_error": _finite(self.relative_error),
            "relative_bound": self.tolerance.relative,
            "elementwise_error": _finite(self.elementwise_error),
            "elementwise_bound": self.tolerance.elementwise,
            "reference": "float64",
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

    `finish`, which no time covers, runs without the inputs: it can move a result into `y` but not compute one.
    """
    call()
    _wait(buffers)
    verdict.rounds += 1
    inputs = {name: buffer for name, buffer in buffers.items() if name != "y"}
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
    y, given = buffers["y"], truth.inputs["y"]
    if y.shape != given.shape or y.dtype != given.dtype:
        verdict.faults.append(f"{what}: y became {y.dtype}{list(y.shape)}, it was {given.dtype}{list(given.shape)}")
        return
    error = y.double() - truth.expected
    relative = float(torch.linalg.vector_norm(error))
    relative = relative / truth.norm if truth.norm else relative
    worst = float(error.abs().max()) if error.numel() else 0.0
    worst = worst / truth.rms if truth.rms else worst
    verdict.relative_error = _worse(verdict.relative_error, relative)
    verdict.elementwise_error = _worse(verdict.elementwise_error, worst)
    bound = verdict.tolerance
    # written so that NaN fails
    if not relative <= bound.relative:
        verdict.faults.append(f"{what}: relative error {relative:.3g} exceeds {bound.relative:.3g}")
    elif not worst <= bound.elementwise:
        verdict.faults.append(f"{what}: largest error {worst:.3g} rms exceeds {bound.elementwise:.3g}")


def _wait(buffers: Inputs) -> None:
    """Wait for the current stream alone: what a provider does elsewhere is not waited for by its user either."""
    if buffers["y"].is_cuda:
        torch.cuda.current_stream(buffers["y"].device).synchronize()


def _worse(seen: float, new: float) -> float:
    return new if math.isnan(new) else max(seen, new)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
