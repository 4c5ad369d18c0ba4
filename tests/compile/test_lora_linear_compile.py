"""Pairs of lora_linear compile ahead, each kind of expand where it runs."""

from __future__ import annotations

import random
import sys

import pytest

from smbench_kernels import lora_linear_own, nvrtc
from smbench_kernels.lora_linear import plain_point
from smbench_kernels.lora_linear_expands import AHEAD, EXPANDS, PORTABLE, WAITING, WIDE
from smbench_kernels.lora_linear_space import PAIR, joined
from smbench_kernels.op import Config, Point, load
from smbench_kernels.own import KERNEL, OwnKernel

pytestmark = pytest.mark.usefixtures("compiler")
TUNABLE = lora_linear_own.TUNABLE
POINT: Point = {
    **{"batch": 64, "seq_len": 1, "hidden_size": 4096, "rank": 16, "num_loras": 2, "dtype": "bfloat16"},
    **{"projection": "square", "prefill": "all"},
}
SHRINK: Config = {"CHUNK": 32, "TILES": 1, "WARPS": 4, "STAGES": 0, "STEPS": 2, "PARTS": 8, "CLUSTER": 1}
NAMES = {AHEAD: "ahead", PORTABLE: "portable", WAITING: "waiting", WIDE: "wide"}


@pytest.mark.parametrize("number", EXPANDS, ids=NAMES.get)
def test_a_pair_is_compiled_as_it_is_bound(number: int) -> None:
    """On Hopper, and before it unless the expand needs it: then nothing is compiled."""
    config = joined(SHRINK, random.choice(EXPANDS[number].space(POINT)))
    sys.stderr.write(f"{config}\n")
    compiled: list[float] = []
    nvrtc.LISTENERS.append(compiled.append)
    try:
        for capability in (80, 90):
            assert TUNABLE.precompile(POINT, config, capability) == TUNABLE.binary(POINT, config)
            compiled.clear()
            TUNABLE.precompile(POINT, config, capability)
            assert not compiled, "a second time finds it in the cache"
    finally:
        nvrtc.LISTENERS.remove(compiled.append)


def test_what_a_card_cannot_run_is_not_compiled_for_it() -> None:
    """One launch for both and the prefill kernels are Hopper's: the tuner of an older card passes them by."""
    for config in TUNABLE.space(POINT)[::40]:
        if config[KERNEL] != PAIR:
            assert TUNABLE.precompile(POINT, config, 86) == TUNABLE.binary(POINT, config)
    assert KERNEL in TUNABLE.space(POINT)[0]


def test_expands_that_stand_alone_too_are_the_same_binaries() -> None:
    own: OwnKernel = load("smbench_kernels.bgmv_expand:KERNEL")
    for number in (WAITING, PORTABLE):
        part = EXPANDS[number].space(POINT)[0]
        alone = {name: value for name, value in part.items() if name != KERNEL or number == WAITING}
        assert EXPANDS[number].binary(POINT, part) == own.binary(plain_point(POINT), alone)
    parts = [EXPANDS[number].space(POINT)[0] for number in EXPANDS]
    assert len({TUNABLE.binary(POINT, joined(SHRINK, part)) for part in parts}) == len(parts)
