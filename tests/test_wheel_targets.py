"""What the locked wheels hold, as docker/wheel_targets.toml says it: every stack has machine code for every card."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
CARDS = ("sm80", "sm86", "sm89", "sm90")
MUST_RUN = {
    "torch": "libtorch_cuda.so",
    "nvidia_cublas": "libcublas.so.13",
    "vllm": "_moe_C_stable_libtorch.abi3.so",
    "sglang_kernel": "common_ops.abi3.so",
    "lmdeploy": "_turbomind.cpython-311-x86_64-linux-gnu.so",
}
"""The library of a wheel without which its stack is of no use on a card."""


def surveyed() -> list[dict[str, Any]]:
    table: list[dict[str, Any]] = tomllib.loads((ROOT / "docker" / "wheel_targets.toml").read_text())["wheel"]
    return table


@pytest.mark.parametrize("stack", ["kernels", "vllm", "sglang", "lmdeploy"])
def test_the_locked_wheels_are_the_surveyed_ones(stack: str) -> None:
    """Whoever locks other versions has to look at what they hold: `python -m smbench.fatbin survey`."""
    lock = (ROOT / "docker" / "locks" / f"{stack}.txt").read_text()
    known = {(wheel["name"].replace("_", "-"), wheel["version"]): wheel for wheel in surveyed()}
    for name in MUST_RUN:
        if found := re.search(rf"^{name.replace('_', '-')}==(\S+)", lock, flags=re.MULTILINE):
            wheel = known.get((name.replace("_", "-"), found[1]))
            assert wheel is not None, f"{name} {found[1]} is locked and not in docker/wheel_targets.toml"
            assert f"sha256:{wheel['sha256']}" in lock


@pytest.mark.parametrize("name", MUST_RUN)
def test_what_a_stack_lives_on_has_machine_code_for_every_card(name: str) -> None:
    wheels = [wheel for wheel in surveyed() if wheel["name"] == name]
    assert wheels
    for wheel in wheels:
        for file in wheel["file"]:
            if Path(file["path"]).name != MUST_RUN[name]:
                continue
            for card in CARDS:
                loaded = file["executes"][card]
                major = card.removeprefix("sm")[0]
                machine_code = sum(count for target, count in loaded.items() if target.startswith(f"sm_{major}"))
                assert machine_code > 0, f"{name} {wheel['version']} has no machine code for {card}: {loaded}"
