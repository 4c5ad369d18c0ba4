"""Two small operations with an honest provider and every way of cheating that the correctness gate must catch.

`scale`: y = 2·x[index], into a `y` of NaN. `add`: y += x[index], into a `y` with content.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from smbench_kernels.op import Axis, Inputs, Op, Point, Prepared, Tolerance, UnsupportedPoint, Work

Compute = Callable[[Inputs], torch.Tensor]


def scaled(inputs: Inputs) -> torch.Tensor:
    return 2 * inputs["x"][inputs["index"]]


def added(inputs: Inputs) -> torch.Tensor:
    return inputs["y"] + inputs["x"][inputs["index"]]


def library(work: Callable[[], object]) -> Prepared:
    def run() -> None:
        work()

    return Prepared(run=run, config={}, config_source="library")


def honest(point: Point, inputs: Inputs) -> Prepared:
    return library(lambda: inputs["y"].copy_(scaled(inputs)))


def honest_add(point: Point, inputs: Inputs) -> Prepared:
    return library(lambda: inputs["y"].copy_(added(inputs)))


def honest_finish(point: Point, inputs: Inputs) -> Prepared:
    """A library that leaves its result in a buffer of its own, as engines' kernels do."""
    own = torch.empty_like(inputs["y"])

    def run() -> None:
        own.copy_(inputs["x"][inputs["index"]])

    def finish() -> None:
        inputs["y"].add_(own)

    return replace(library(run), finish=finish)


def computed_in_finish(point: Point, inputs: Inputs) -> Prepared:
    """Does its work where nothing is timed."""

    def finish() -> None:
        inputs["y"].copy_(scaled(inputs))

    return replace(library(lambda: None), finish=finish)


def constant(point: Point, inputs: Inputs) -> Prepared:
    return library(lambda: inputs["y"].fill_(0.5))


def zero(point: Point, inputs: Inputs) -> Prepared:
    """Right for inputs of zeros, which a lazy test would use."""
    return library(lambda: inputs["y"].zero_())


def nothing(point: Point, inputs: Inputs) -> Prepared:
    return library(lambda: None)


def computed_while_preparing(point: Point, inputs: Inputs) -> Prepared:
    inputs["y"].copy_(scaled(inputs))
    return library(lambda: None)


def cached_by_address(point: Point, inputs: Inputs) -> Prepared:
    cache: dict[int, torch.Tensor] = {}

    def run() -> None:
        address = inputs["x"].data_ptr()
        if address not in cache:
            cache[address] = scaled(inputs)
        inputs["y"].copy_(cache[address])

    return library(run)


def only_the_first_call(point: Point, inputs: Inputs) -> Prepared:
    calls: list[None] = []

    def run() -> None:
        if not calls:
            inputs["y"].copy_(scaled(inputs))
        calls.append(None)

    return library(run)


def wrong_on_other_inputs(point: Point, inputs: Inputs) -> Prepared:
    first = inputs["x"].clone()

    def run() -> None:
        inputs["y"].copy_(scaled(inputs) if torch.equal(inputs["x"], first) else 3 * inputs["x"][inputs["index"]])

    return library(run)


def one_element_missing(point: Point, inputs: Inputs) -> Prepared:
    return library(lambda: inputs["y"][:-1].copy_(scaled(inputs)[:-1]))


def one_element_not_added(point: Point, inputs: Inputs) -> Prepared:
    return library(lambda: inputs["y"][:-1].copy_(added(inputs)[:-1]))


def overwritten_not_added(point: Point, inputs: Inputs) -> Prepared:
    return library(lambda: inputs["y"].copy_(inputs["x"][inputs["index"]]))


def one_element_off(point: Point, inputs: Inputs) -> Prepared:
    """Too little to show in the norm of the whole."""

    def run() -> None:
        inputs["y"].copy_(scaled(inputs))
        inputs["y"][7] += 0.5

    return library(run)


def not_a_number(point: Point, inputs: Inputs) -> Prepared:
    def run() -> None:
        inputs["y"].copy_(scaled(inputs))
        inputs["y"][3] = float("nan")

    return library(run)


def zeroes_its_input(point: Point, inputs: Inputs) -> Prepared:
    def run() -> None:
        inputs["y"].copy_(scaled(inputs))
        inputs["x"].zero_()

    return library(run)


def sorts_its_indices(point: Point, inputs: Inputs) -> Prepared:
    def run() -> None:
        inputs["y"].copy_(scaled(inputs))
        inputs["index"].copy_(inputs["index"].sort().values)

    return library(run)


def replaces_the_output(point: Point, inputs: Inputs) -> Prepared:
    """An output of its own, in a precision of its own, in place of the one it was given."""
    mutable = dict(inputs) if not isinstance(inputs, dict) else inputs

    def run() -> None:
        mutable["y"] = scaled(inputs).double()

    return library(run)


def resizes_the_output(point: Point, inputs: Inputs) -> Prepared:
    return library(lambda: inputs["y"].resize_(1).fill_(0.0))


def retypes_the_output(point: Point, inputs: Inputs) -> Prepared:
    def run() -> None:
        inputs["y"].data = scaled(inputs).double()

    return library(run)


def fails_to_prepare(point: Point, inputs: Inputs) -> Prepared:
    raise RuntimeError("CUDA error: invalid argument\nCompile with TORCH_USE_CUDA_DSA")


def fails_to_run(point: Point, inputs: Inputs) -> Prepared:
    def run() -> None:
        inputs["index"].zero_()
        raise ValueError("no kernel image is available")

    return library(run)


def declines(point: Point, inputs: Inputs) -> Prepared:
    raise UnsupportedPoint(f"n = {point['n']} is no multiple of 64")


def declines_when_run(point: Point, inputs: Inputs) -> Prepared:
    def run() -> None:
        raise UnsupportedPoint("only found out at the launch")

    return library(run)


def out_of_memory(point: Point, inputs: Inputs) -> Prepared:
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 TiB\nGPU 0 has …")


def on_another_stream(point: Point, inputs: Inputs) -> Prepared:
    side = torch.cuda.Stream()

    def run() -> None:
        with torch.cuda.stream(side):
            # long enough that a gate which does not wait for it sees nothing
            torch.cuda._sleep(50_000_000)
            inputs["y"].copy_(scaled(inputs))

    return library(run)


def make_inputs(point: Point, seed: int, device: torch.device, y: Callable[[int], torch.Tensor]) -> Inputs:
    n = int(point["n"])
    torch.manual_seed(seed)
    inputs = {"x": torch.randn(n), "index": torch.randperm(n), "y": y(n)}
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def operation(name: str, compute: Compute, y: Callable[[int], torch.Tensor], providers: tuple[str, ...]) -> Op:
    return Op(
        name=name,
        doc=name,
        axes={"n": Axis("elements", minimum=8), "dtype": Axis("of x", choices=("float32", "float16"))},
        make_inputs=lambda point, seed, device: make_inputs(point, seed, device, y),
        reference=lambda point, inputs: compute({k: t.double() if k != "index" else t for k, t in inputs.items()}),
        work=lambda point, inputs: Work(bytes=12 * int(point["n"]), flops=int(point["n"])),
        tolerance=lambda point: Tolerance(relative=1e-2, elementwise=1e-1),
        providers={provider: f"{__name__}:{provider}" for provider in providers},
        baseline=providers[0],
    )


OPS = {
    "scale": operation(
        "scale",
        scaled,
        lambda n: torch.full((n,), float("nan")),
        (
            "honest",
            "constant",
            "zero",
            "nothing",
            "computed_while_preparing",
            "cached_by_address",
            "only_the_first_call",
            "wrong_on_other_inputs",
            "one_element_missing",
            "one_element_off",
            "not_a_number",
            "computed_in_finish",
            "zeroes_its_input",
            "sorts_its_indices",
            "replaces_the_output",
            "resizes_the_output",
            "retypes_the_output",
            "fails_to_prepare",
            "fails_to_run",
            "declines",
            "declines_when_run",
            "out_of_memory",
            "on_another_stream",
        ),
    ),
    "add": operation(
        "add",
        added,
        torch.randn,
        ("honest_add", "honest_finish", "one_element_not_added", "overwritten_not_added", "nothing"),
    ),
}
