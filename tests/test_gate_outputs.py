"""The gate with several outputs and a call in two halves: each output has a truth of its own, each half is checked."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from smbench.result import Check, Measurement, Memory
from smbench.worker import op as worker_op
from smbench.worker.op import Job, OpRunner
from smbench.worker.timing import Spec
from smbench_kernels.op import Axis, Inputs, Op, Passes, Point, Prepared, Tolerance, Work

N = 600
SPEC: Any = {"method": "wall", "l2": "none", "calls": 1, "replays": 1, "warmup": 1}
SPECS = [
    Spec("step", **SPEC, samples=3, min_samples=1, window_s=1.0),
    Spec("forward", **SPEC, samples=4, min_samples=1, window_s=1.0, part="forward"),
    Spec("backward", **SPEC, samples=5, min_samples=1, window_s=1.0, part="backward"),
]


def inputs_of(point: Point, seed: int, device: torch.device) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    x, w = torch.randn(N, generator=generator), torch.randn(N, generator=generator)
    return {"x": x, "w": w, **{name: torch.full((N,), torch.nan) for name in ("y", "dx", "dw")}}


def truth(point: Point, inputs: Inputs) -> Mapping[str, torch.Tensor]:
    """y = x * w * |w|, and the gradients of its sum: each on a scale of its own."""
    x, w = inputs["x"].double(), inputs["w"].double()
    return {"y": x * w * w.abs(), "dx": w * w.abs(), "dw": 2e-6 * x * w.abs() * 1e6}


class Step:
    """An honest training step, by autograd."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.leaves = [inputs[name].detach().requires_grad_() for name in ("x", "w")]
        self.y: torch.Tensor | None = None
        self.gradients: tuple[torch.Tensor, ...] = ()

    def forward(self) -> None:
        x, w = self.leaves
        self.y = x * w * w.abs()

    def backward(self) -> None:
        assert self.y is not None
        self.y.sum().backward()
        self.gradients = tuple(leaf.grad for leaf in self.leaves if leaf.grad is not None)

    def reset(self) -> None:
        self.y, self.gradients = None, ()
        for leaf in self.leaves:
            leaf.grad = None

    def run(self) -> None:
        self.reset()
        self.forward()
        self.backward()

    def finish(self) -> None:
        assert self.y is not None
        for name, tensor in zip(("y", "dx", "dw"), (self.y.detach(), *self.gradients), strict=True):
            self.inputs[name].copy_(tensor)

    def prepared(self) -> Prepared:
        return Prepared(
            self.run, {}, "default", finish=self.finish, passes=Passes(self.forward, self.backward, self.reset)
        )


def honest(point: Point, inputs: Inputs) -> Prepared:
    return Step(inputs).prepared()


def _after(change: Callable[[Step], object]) -> Callable[[Point, Inputs], Prepared]:
    """The honest step, and then something."""

    def provider(point: Point, inputs: Inputs) -> Prepared:
        step = Step(inputs)

        def finish() -> None:
            step.finish()
            change(step)

        return replace(step.prepared(), finish=finish)

    return provider


one_gradient_off = _after(lambda step: step.inputs["dw"].mul_(1.05))
one_gradient_not_written = _after(lambda step: step.inputs["dx"].fill_(torch.nan))
one_element_of_a_gradient = _after(lambda step: step.inputs["dx"][7:8].fill_(torch.nan))
gradients_swapped = _after(
    lambda step: [step.inputs[n].copy_(g) for n, g in zip(("dw", "dx"), step.gradients, strict=True)]
)


def gradient_of_the_first_call(point: Point, inputs: Inputs) -> Prepared:
    """Keeps a gradient that it computed once."""
    step, kept = Step(inputs), []

    def finish() -> None:
        step.finish()
        kept.append(inputs["dw"].clone())
        inputs["dw"].copy_(kept[0])

    return replace(step.prepared(), finish=finish)


def backward_does_nothing(point: Point, inputs: Inputs) -> Prepared:
    """The whole call is honest, the half that is timed alone is not."""
    step = Step(inputs)

    def backward() -> None:
        assert step.y is not None
        step.gradients = tuple(torch.zeros_like(leaf) for leaf in step.leaves)

    return replace(step.prepared(), passes=Passes(step.forward, backward, step.reset))


def gradients_pile_up(point: Point, inputs: Inputs) -> Prepared:
    """A step that forgets to reset: the second is wrong."""
    step = Step(inputs)

    def run() -> None:
        step.forward()
        step.backward()

    return replace(step.prepared(), run=run, passes=None)


PROVIDERS = {name: f"{__name__}:{name}" for name, value in list(globals().items()) if callable(value) and "_" in name}
PROVIDERS["honest"] = f"{__name__}:honest"
OP = Op(
    name="step",
    doc="a training step",
    axes={"n": Axis("elements")},
    make_inputs=inputs_of,
    reference=truth,
    work=lambda point, inputs: Work(3, 3),
    tolerance=lambda point: Tolerance(1e-2, 0.5),
    providers=PROVIDERS,
    baseline="honest",
    outputs=("y", "dx", "dw"),
    pass_work={"forward": lambda point, inputs: Work(1, 1), "backward": lambda point, inputs: Work(2, 2)},
)


@pytest.fixture(autouse=True)
def operation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_op, "find_op", lambda _name: OP)
    monkeypatch.setattr("smbench_kernels.op.load", lambda target: globals()[target.partition(":")[2]])


def outcome(provider: str, untimed_reason: str | None = None) -> dict[str, Any]:
    return OpRunner(torch.device("cpu"), SPECS, io.StringIO()).run(
        Job("cell", "step", provider, {"n": N}, 3, untimed_reason)
    )


def test_an_honest_step_has_errors_by_output_times_by_half_and_its_memory() -> None:
    found = outcome("honest")
    assert (found["status"], found["reason"]) == ("ok", None)
    check = Check.model_validate(found["check"])
    # first inputs, by halves, second inputs
    assert check.rounds == 3 and set(check.outputs) == {"y", "dx", "dw"}
    assert check.relative_error == max(errors.relative_error or 0.0 for errors in check.outputs.values())
    measured = {m.name: m for m in (Measurement.model_validate(row) for row in found["measurements"])}
    assert {name: len(m.samples_s) for name, m in measured.items()} == {"step": 3, "forward": 4, "backward": 5}
    assert measured["step"].work is None
    works = {name: m.work.flops for name, m in measured.items() if m.work}
    assert works == {"forward": 1, "backward": 2}
    memory = Memory.model_validate(found["memory"])
    # autograd keeps x * w and |w|; x and w themselves are inputs
    assert memory.method == "saved-tensors" and memory.peak_bytes is None
    assert memory.saved_bytes == 2 * N * 4


CAUGHT = {
    "one_gradient_off": "first inputs, dw: relative error 0.05 exceeds 0.01",
    "one_gradient_not_written": "first inputs, dx: relative error nan exceeds 0.01",
    "one_element_of_a_gradient": "first inputs, dx: relative error nan exceeds 0.01",
    "gradients_swapped": "first inputs, dx: relative error ",
    "gradient_of_the_first_call": "second inputs, dw: relative error ",
    "backward_does_nothing": "by halves, dx: relative error 1 exceeds 0.01; by halves, dw: relative error 1 ",
    "gradients_pile_up": "second inputs, dx: relative error ",
}


@pytest.mark.parametrize("untimed_reason", [None, "interpreted"], ids=["timed", "verified only"])
@pytest.mark.parametrize(("provider", "told"), CAUGHT.items(), ids=CAUGHT.keys())
def test_a_wrong_output_among_right_ones_is_named(provider: str, told: str, untimed_reason: str | None) -> None:
    found = outcome(provider, untimed_reason)
    assert found["status"] == "incorrect" and "measurements" not in found
    assert found["reason"].startswith(told)


def test_right_outputs_do_not_hide_a_wrong_one() -> None:
    """Each has a scale of its own, however small it is beside the others."""
    check = Check.model_validate(outcome("one_gradient_off")["check"])
    assert not check.passed
    assert check.outputs["dw"].relative_error == pytest.approx(0.05, rel=1e-3)
    assert check.outputs["y"].relative_error == pytest.approx(0.0, abs=1e-6)


def test_a_reference_that_forgets_an_output_is_a_fault_of_the_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    forgetful = replace(OP, reference=lambda point, inputs: {"y": truth(point, inputs)["y"]})
    monkeypatch.setattr(worker_op, "find_op", lambda _name: forgetful)
    found = outcome("honest")
    assert found["status"] == "crashed"
    assert "the reference gives y; its outputs: y, dx, dw" in found["reason"]


def test_an_operation_without_halves_is_not_timed_by_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_op, "find_op", lambda _name: replace(OP, pass_work={}))
    assert [row["name"] for row in outcome("honest")["measurements"]] == ["step"]
