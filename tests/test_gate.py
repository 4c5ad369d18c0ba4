"""The worker on the CPU: honest work gets its number, and no way of cheating gets one. Timing keeps every sample."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from cheating_providers import OPS
from small_runs import REPOSITORY
from smbench import recipe
from smbench.worker import op as worker_op
from smbench.worker import timing
from smbench.worker.op import Job, OpRunner
from smbench.worker.timing import Spec, measure_wall
from smbench_kernels import registry

WALL = Spec("wall", "wall", "none", calls=2, replays=1, warmup=2, samples=6, min_samples=3, window_s=10.0)
CPU = torch.device("cpu")
RECIPES = REPOSITORY / "recipes"


@pytest.fixture(autouse=True)
def operations(monkeypatch: pytest.MonkeyPatch) -> None:
    def find(name: str) -> Any:
        if name not in OPS:
            raise KeyError(f"unknown op {name!r}; known: {', '.join(OPS)}")
        return OPS[name]

    monkeypatch.setattr(worker_op, "find_op", find)


def job(provider: str, subject: str = "scale", untimed_reason: str | None = None, **axes: int | str) -> Job:
    point: dict[str, int | str] = {"n": 1000, "dtype": "float32"}
    return Job("0123456789abcdef", subject, provider, point | axes, 5, untimed_reason)


def runner() -> OpRunner:
    return OpRunner(CPU, [WALL], io.StringIO())


@pytest.mark.parametrize(
    ("provider", "subject"), [("honest", "scale"), ("honest_add", "add"), ("honest_finish", "add")]
)
def test_honest_work_is_measured(provider: str, subject: str) -> None:
    result = runner().run(job(provider, subject))
    assert (result["status"], result["reason"]) == ("ok", None)
    assert (result["check"]["passed"], result["check"]["rounds"]) == (True, 2)
    assert result["check"]["relative_error"] < 1e-6
    assert result["work"] == {"bytes": 12_000, "flops": 1000}
    assert result["selection"] == {"source": "library", "config": {}, "kernels": {}}
    (measurement,) = result["measurements"]
    assert (measurement["name"], measurement["method"], measurement["l2"]) == ("wall", "wall", "none")
    assert measurement["calls_per_sample"] == 2
    assert (len(measurement["warmup_s"]), len(measurement["samples_s"])) == (2, 6)
    assert min(measurement["samples_s"]) > 0
    assert {"inputs", "check", "compile", "total"} <= result["phases_s"].keys()


def test_an_untimed_cell_is_verified_and_has_no_number() -> None:
    result = runner().run(job("honest", untimed_reason="interpreted"))
    assert (result["status"], result["reason"]) == ("verified", "interpreted")
    assert (result["check"]["passed"], result["check"]["rounds"]) == (True, 2)
    assert "measurements" not in result


CHEATS = {
    "constant": "first inputs: relative error ",
    "zero": "first inputs: relative error 1 exceeds 0.01",
    "nothing": "first inputs: relative error nan exceeds 0.01",
    "computed_while_preparing": "second inputs: relative error nan exceeds 0.01",
    "cached_by_address": "second inputs: relative error 1.",
    "only_the_first_call": "second inputs: relative error nan",
    "wrong_on_other_inputs": "second inputs: relative error 0.5 exceeds 0.01",
    "one_element_missing": "first inputs: relative error nan",
    "one_element_off": "first inputs: largest error 0.2",
    "not_a_number": "first inputs: relative error nan",
    "zeroes_its_input": "first inputs: input 'x' was changed in place",
    "sorts_its_indices": "first inputs: input 'index' was changed in place",
    "computed_in_finish": "first inputs: relative error nan",
    "replaces_the_output": "first inputs: relative error nan",
    "resizes_the_output": "first inputs: y became torch.float32[1], it was torch.float32[1000]",
    "retypes_the_output": "first inputs: y became torch.float64[1000], it was torch.float32[1000]",
}


@pytest.mark.parametrize("untimed_reason", [None, "interpreted"], ids=["timed", "verified only"])
@pytest.mark.parametrize(("provider", "told"), CHEATS.items(), ids=CHEATS.keys())
def test_a_cheat_is_caught_and_gets_no_number(provider: str, told: str, untimed_reason: str | None) -> None:
    result = runner().run(job(provider, untimed_reason=untimed_reason))
    assert result["status"] == "incorrect"
    assert result["reason"].startswith(told)
    assert result["check"]["passed"] is False
    assert "measurements" not in result


@pytest.mark.parametrize("provider", ["one_element_not_added", "overwritten_not_added", "nothing"])
def test_where_the_output_accumulates_what_was_there_must_count(provider: str) -> None:
    result = runner().run(job(provider, "add"))
    assert result["status"] == "incorrect"
    assert result["reason"].startswith("first inputs: ")
    assert "measurements" not in result


def test_an_error_that_is_no_number_is_stored_as_none() -> None:
    check = runner().run(job("not_a_number"))["check"]
    assert (check["relative_error"], check["elementwise_error"]) == (None, None)


@pytest.mark.parametrize(
    ("provider", "status", "reason"),
    [
        ("declines", "unsupported", "n = 1000 is no multiple of 64"),
        ("declines_when_run", "unsupported", "only found out at the launch"),
        ("fails_to_prepare", "crashed", "RuntimeError: CUDA error: invalid argument"),
        ("fails_to_run", "crashed", "ValueError: no kernel image is available"),
        ("out_of_memory", "oom", "CUDA out of memory. Tried to allocate 2.00 TiB"),
    ],
)
def test_what_a_provider_raises_is_its_outcome(provider: str, status: str, reason: str) -> None:
    log = io.StringIO()
    result = OpRunner(CPU, [WALL], log).run(job(provider))
    assert (result["status"], result["reason"]) == (status, reason)
    assert "measurements" not in result
    # the traceback of a crash is kept where the host keeps it
    assert ("Traceback" in log.getvalue()) == (status == "crashed")


@pytest.mark.parametrize("provider", [name for name in OPS["scale"].providers if name != "on_another_stream"])
def test_whatever_one_provider_did_the_next_one_has_clean_inputs(provider: str) -> None:
    one = runner()
    one.run(job(provider))
    result = one.run(job("honest"))
    assert (result["status"], result["reason"]) == ("ok", None)


def test_inputs_depend_on_the_seed_alone_and_are_made_once_for_a_point() -> None:
    made: list[tuple[int, int]] = []
    original = OPS["scale"].make_inputs

    def counted(point: Any, seed: int, device: torch.device) -> Any:
        made.append((point["n"], seed))
        return original(point, seed, device)

    one = runner()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(OPS, "scale", replace(OPS["scale"], make_inputs=counted))
        for provider in ("honest", "constant", "honest"):
            one.run(job(provider))
        one.run(job("honest", n=16))
    assert made == [(1000, 5), (1000, 5 + worker_op.CHECK_SEED), (16, 5), (16, 5 + worker_op.CHECK_SEED)]


def test_integer_inputs_are_the_same_in_both_rounds() -> None:
    """Engines build metadata from them once, before the timed call; values of floating inputs do change."""
    data = runner()._inputs(OPS["scale"], job("honest"))
    first, second = (truth.inputs for truth in data.truths)
    assert torch.equal(first["index"], second["index"])
    assert not torch.equal(first["x"], second["x"])


def test_a_request_that_cannot_be_is_refused_as_a_whole_with_what_is_known() -> None:
    jobs = [
        job("honest"),
        job("hones"),
        job("honest", subject="scael"),
        job("honest", dtype="float8"),
        job("honest", n=4),
        job("honest", n="many"),
        job("honest", batch=8),
        Job("0", "scale", "honest", {"n": 1000}, 5, None),
    ]
    known = ", ".join(OPS["scale"].providers)
    assert runner().refusals(jobs) == [
        f"op 'scale' has no provider 'hones'; known: {known}",
        "unknown op 'scael'; known: scale, add",
        "op 'scale': dtype = 'float8' is none of float32, float16",
        "op 'scale': n = 4 is no integer of at least 8",
        "op 'scale': n = 'many' is no integer of at least 8",
        "op 'scale': axis 'batch' is unknown; its axes: n, dtype",
        "op 'scale': axis 'dtype' is missing; its axes: n, dtype",
    ]
    assert runner().refusals(jobs[:1]) == []


@pytest.mark.parametrize("name", [n for n in recipe.names(RECIPES) if recipe.load(RECIPES / f"{n}.toml").kind == "op"])
def test_no_shipped_recipe_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Axes, choices and providers fit the operations: nobody learns otherwise on a rented GPU."""
    monkeypatch.setattr(worker_op, "find_op", registry.op)
    loaded = recipe.load(recipe.find(name, RECIPES))
    for profile in loaded.profile:
        jobs = [
            Job(cell.cell_id, cell.subject, cell.provider, cell.axes, cell.seed, None) for cell in loaded.cells(profile)
        ]
        assert runner().refusals(jobs) == []


class Clock:
    """Time that passes only while a call runs."""

    def __init__(self) -> None:
        self.now = 100.0
        self.calls = 0

    def perf_counter(self) -> float:
        return self.now

    def call(self, seconds: Callable[[int], float]) -> Callable[[], None]:
        def run() -> None:
            self.now += seconds(self.calls)
            self.calls += 1

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    return clock


def spec(**changes: Any) -> Spec:
    fields = {"calls": 1, "replays": 1, "warmup": 2, "samples": 10, "min_samples": 3, "window_s": 100.0}
    return Spec("wall", "wall", "none", **(fields | changes))


def test_wall_timing_keeps_warm_ups_apart_and_every_sample_in_order(clock: Clock) -> None:
    taken = measure_wall(spec(), clock.call(lambda i: 0.5 if i == 0 else 0.125 if i != 7 else 4.0))
    assert taken.warmup_s == [0.5, 0.125]
    assert taken.samples_s == [0.125] * 5 + [4.0] + [0.125] * 4
    assert taken.busy_s == sum(taken.warmup_s) + sum(taken.samples_s)


def test_a_sample_is_the_time_of_one_call(clock: Clock) -> None:
    taken = measure_wall(spec(calls=4, replays=2), clock.call(lambda i: 0.25))
    assert taken.calls_per_sample == 8
    assert taken.samples_s == [0.25] * 10
    assert clock.calls == 8 * 12


def test_the_window_ends_sampling_but_not_before_the_least_samples(clock: Clock) -> None:
    # warm-ups of two seconds and then samples of one second: the window of 5.5 s has room for four
    taken = measure_wall(spec(window_s=5.5), clock.call(lambda i: 1.0))
    assert (len(taken.warmup_s), len(taken.samples_s)) == (2, 4)
    taken = measure_wall(spec(window_s=0.001, min_samples=7), clock.call(lambda i: 1.0))
    assert (len(taken.warmup_s), len(taken.samples_s)) == (2, 7)


def on_a_gpu() -> OpRunner:
    graph = Spec("graph", "graph", "warm", calls=4, replays=1, warmup=1, samples=5, min_samples=3, window_s=0.1)
    one = OpRunner(torch.device("cuda"), [graph], io.StringIO())
    # a first use loads kernels, which waits for the device and would hide what is not waited for
    assert one.run(job("honest"))["status"] == "ok"
    return one


@pytest.mark.gpu
def test_work_on_another_stream_is_caught() -> None:
    one = on_a_gpu()
    result = one.run(job("on_another_stream"))
    assert (result["status"], "measurements" in result) == ("incorrect", False)
    assert result["reason"].startswith("first inputs: relative error nan")
    assert one.run(job("honest"))["status"] == "ok"


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")
@pytest.mark.parametrize("provider", [name for name in CHEATS if name != "wrong_on_other_inputs"])
def test_a_cheat_is_caught_through_a_graph(provider: str) -> None:
    one = on_a_gpu()
    result = one.run(job(provider))
    assert (result["status"], "measurements" in result) == ("incorrect", False)
    assert result["reason"].startswith(CHEATS[provider])
    assert one.run(job("honest"))["status"] == "ok"


@pytest.mark.gpu
def test_what_a_graph_cannot_hold_is_a_crash_of_that_cell_alone() -> None:
    """It compares on the host, which waits for the device while a graph is captured."""
    one = on_a_gpu()
    result = one.run(job("wrong_on_other_inputs"))
    assert (result["status"], "measurements" in result, one.broken) == ("crashed", False, None)
    assert one.run(job("honest"))["status"] == "ok"
