"""What a search over lora_linear tries: every expand behind a decode shrink where it runs, and nothing twice."""

from __future__ import annotations

import math

import pytest
import torch

from smbench_kernels import configs, hardware, lora_decode_space, lora_linear_space, tune
from smbench_kernels.lora_linear import LinearSizes, plain_op, plain_point
from smbench_kernels.lora_linear_expands import AHEAD, EXPANDS, PORTABLE, WAITING, WIDE, expand_of
from smbench_kernels.lora_linear_shapes import shape_of
from smbench_kernels.lora_linear_space import FUSED, PAIR, PREFILL, expand_part, joined, shrink_part
from smbench_kernels.op import Config, Point, load
from smbench_kernels.own import KERNEL

TUNABLE = load("smbench_kernels.lora_linear_own:TUNABLE")
H200 = hardware.TYPICAL[90].facts()


def point_of(batch: int, rank: int, loras: int, **axes: int | str) -> Point:
    sizes: Point = {"batch": batch, "seq_len": 1, "hidden_size": 4096, "rank": rank, "num_loras": loras}
    return {**sizes, "dtype": "bfloat16", "projection": "square", "prefill": "all", **axes}


EVERY = point_of(64, 16, 2)
"""Few enough tokens and ranks for the portable expand, enough of a LoRA for that of prefill."""
RUNNING: list[tuple[Point, set[int]]] = [
    (EVERY, {AHEAD, WAITING, WIDE, PORTABLE}),
    (point_of(16, 16, 32), {AHEAD, WAITING, PORTABLE}),
    (point_of(256, 64, 1), {AHEAD, WAITING, WIDE}),
    (point_of(64, 16, 2, projection="qkv"), {AHEAD, WAITING, WIDE}),
    (point_of(8, 16, 2, seq_len=20, prefill="one"), {AHEAD, WAITING}),
    # rows of B are no multiples of 16 bytes
    (point_of(256, 12, 1), {AHEAD, WAITING}),
]


EACH = pytest.mark.parametrize(
    ("point", "kinds"), RUNNING, ids=["every", "many LoRAs", "one LoRA", "slices", "mixed", "odd rank"]
)


def kind(config: Config) -> int:
    return expand_part(config).get(KERNEL, AHEAD)


def key(config: Config) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(config.items()))


def a_pair(point: Point, number: int) -> Config:
    shrink = next(config for config in TUNABLE.space(point) if config[KERNEL] == PAIR)
    return joined(shrink_part(shrink), EXPANDS[number].space(point)[-1])


@EACH
def test_each_expand_is_offered_where_it_runs(point: Point, kinds: set[int]) -> None:
    assert {number for number, expand in EXPANDS.items() if expand.space(point)} == kinds
    for number in kinds:
        assert all(config.get(KERNEL, AHEAD) == number for config in EXPANDS[number].space(point))


@EACH
def test_a_search_begins_with_the_expand_that_loads_ahead(point: Point, kinds: set[int]) -> None:
    assert {kind(config) for config in TUNABLE.space(point) if config[KERNEL] == PAIR} == {AHEAD}


@EACH
def test_around_a_pair_are_all_expands_of_its_kind_and_some_of_each_other(point: Point, kinds: set[int]) -> None:
    for number in kinds:
        config = a_pair(point, number)
        around = TUNABLE.refine(point, config)
        assert len({key(other) for other in around}) == len(around), "something is tried twice"
        assert config in around
        mine = [expand_part(other) for other in around if shrink_part(other) == shrink_part(config)]
        assert all(expand in mine for expand in EXPANDS[number].space(point))
        for other in kinds - {number}:
            tried = [expand for expand in mine if expand.get(KERNEL, AHEAD) == other]
            assert len(tried) == min(lora_linear_space.OTHERS, len(EXPANDS[other].space(point)))
        assert {kind(other) for other in around} == kinds
        # what is tried besides has the same expand and another shrink
        rest = [other for other in around if shrink_part(other) != shrink_part(config)]
        assert rest and all(expand_part(other) == expand_part(config) for other in rest)


def test_the_other_decode_expand_is_tried_with_the_same_numbers() -> None:
    for number, other in ((AHEAD, WAITING), (WAITING, AHEAD)):
        config = a_pair(EVERY, number)
        numbers = {name: value for name, value in expand_part(config).items() if name != KERNEL}
        twin = next(expand for expand in EXPANDS[other].space(EVERY) if numbers.items() <= expand.items())
        assert joined(shrink_part(config), twin) in TUNABLE.refine(EVERY, config)


def test_around_a_pair_are_the_shrinks_that_differ_in_one_thing() -> None:
    """Also those that are not among the likeliest: a search goes there step by step."""
    config = a_pair(EVERY, AHEAD)
    mine, around = shrink_part(config), TUNABLE.refine(EVERY, config)
    for name in ("CHUNK", "TILES", "WARPS", "PARTS"):
        space = lora_decode_space.shrink_space(shape_of(LinearSizes.of(EVERY)))
        for shrink in space:
            if {other for other in shrink if shrink[other] != mine.get(other, 0)} == {name}:
                assert joined(shrink, expand_part(config)) in around


@EACH
def test_pairs_of_every_kind_stand_against_one_launch(point: Point, kinds: set[int]) -> None:
    one = next(config for config in TUNABLE.space(point) if config[KERNEL] == FUSED)
    around = TUNABLE.refine(point, one)
    assert len({key(other) for other in around}) == len(around)
    assert {kind(config) for config in around} == kinds
    assert sum(kind(config) != AHEAD for config in around) <= 12
    # and shrinks that the first space does not have: the model may be wrong about a whole kind of blocks
    known = [shrink_part(config) for config in TUNABLE.space(point) if config[KERNEL] == PAIR]
    assert any(shrink_part(config) not in known for config in around)


@EACH
def test_what_a_search_may_end_with_is_admitted_and_modelled(point: Point, kinds: set[int]) -> None:
    for config in [*TUNABLE.space(point)[::60], *(a_pair(point, number) for number in kinds)]:
        for other in TUNABLE.refine(point, config)[::9]:
            assert TUNABLE.admits(point, other)
            assert 0 < TUNABLE.predict(point, other, H200) < 1e-3


def test_what_cannot_be_tuned_to_is_not_admitted() -> None:
    config = a_pair(EVERY, AHEAD)
    part = EXPANDS[PORTABLE].space(EVERY)[0]
    assert TUNABLE.admits(EVERY, joined(shrink_part(config), part))
    assert not TUNABLE.admits(point_of(64, 64, 2), joined(shrink_part(config), part))
    assert not TUNABLE.admits(EVERY, {**config, "WARPS": 3})
    assert not TUNABLE.admits(EVERY, {**config, "E_WARPS": 3})
    assert not TUNABLE.admits(EVERY, {**config, "E_KERNEL": 9})
    assert not TUNABLE.admits(EVERY, {"CHUNK": 16, "BLOCK_K": 128, "BLOCK_N": 128, "num_warps": 4})


def test_shipped_configurations_are_admitted() -> None:
    """So that a repeated search starts from them."""
    for path in configs.ROOT.glob("*/lora_linear.json"):
        for entry in configs.load(path).entries:
            assert TUNABLE.admits(entry.point, entry.config), entry.point


def test_a_search_starts_from_a_pair_that_won_before() -> None:
    """Though the first space has no such pair."""
    kept, asked = a_pair(EVERY, PORTABLE), []

    def clock(config: Config, samples: int) -> float:
        asked.append(config)
        return 1e-6 if config == kept else 2e-6

    found = tune.search(EVERY, TUNABLE, H200, clock, [kept])
    assert found is not None and found.config == asked[0] == kept


def test_a_search_starts_from_the_kernels_that_are_tuned_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever kernel is the best expand; nothing where shrink is none of a pair's."""
    monkeypatch.setattr(configs, "device_name", lambda _: "NVIDIA H200")
    device, seen = torch.device("cpu"), set()
    for entry in configs.load(configs.path_of("NVIDIA H200", "lora_linear")).entries:
        if plain_op(entry.point) == "bgmv":
            found = [pair for pair in TUNABLE.starts(entry.point, device) if TUNABLE.admits(entry.point, pair)]
            seen |= {kind(pair) for pair in found}
            alone, _ = configs.tuned_config("bgmv_shrink", plain_point(entry.point), device)
            assert bool(found) == (KERNEL in alone)
    assert seen == set(EXPANDS)
    assert TUNABLE.starts(point_of(64, 16, 2, projection="qkv"), device) == []


@pytest.mark.parametrize("number", [WAITING, WIDE, PORTABLE])
def test_a_search_ends_with_any_kind_of_pair(number: int) -> None:
    """With the one of all its configurations that is fastest, from a first space that has none."""
    best = EXPANDS[number].space(EVERY)[-1]

    def clock(config: Config, samples: int) -> float:
        if config[KERNEL] != PAIR:
            return 9e-6
        return 3e-6 - 1e-6 * (kind(config) == number) - 1e-6 * (expand_part(config) == best)

    found = tune.search(EVERY, TUNABLE, H200, clock)
    assert found is not None and expand_part(found.config) == best


@pytest.mark.parametrize("capability", [80, 86, 90])
def test_defaults_have_nothing_that_was_never_timed_and_run_on_their_card(capability: int) -> None:
    long = point_of(4, 16, 1, seq_len=2048)
    for point in (*(point for point, _ in RUNNING), long):
        config = TUNABLE.default(point, hardware.TYPICAL[capability])
        if KERNEL in config:
            assert lora_linear_space.unsupported(point, config, capability) is None
            assert config[KERNEL] != PAIR or kind(config) == AHEAD
        else:
            assert capability < 90 and point is long


def test_what_needs_hopper_is_modelled_to_take_for_ever_elsewhere() -> None:
    a100 = hardware.TYPICAL[80].facts()
    runs = {number: TUNABLE.predict(EVERY, a_pair(EVERY, number), a100) < math.inf for number in EXPANDS}
    assert runs == {AHEAD: True, WAITING: True, WIDE: False, PORTABLE: True}
    for other in (FUSED, PREFILL):
        config = next(config for config in TUNABLE.space(EVERY) if config[KERNEL] == other)
        assert TUNABLE.predict(EVERY, config, a100) == math.inf


def test_an_unknown_expand_is_named_with_those_that_there_are() -> None:
    with pytest.raises(ValueError, match=r"no expand has KERNEL 9; known: 1, 2, 4, or no KERNEL"):
        expand_of({KERNEL: 9})
