"""A plan says beforehand what becomes of every cell: timed, verified only or unsupported, and how long it takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from small_runs import cpu_plan, recipe_text
from smbench import plan, recipe
from smbench.errors import UsageError
from smbench.plan import INTERPRETED, VERIFY_ONLY, Here, Plan
from smbench.stacks import NONE, Stacks

ROOT = Path("home")


def made(
    profile: str | None = None,
    gpu_present: bool = False,
    stacks: Stacks = NONE,
    only: tuple[str, ...] = (),
    in_profile: tuple[str, ...] = ("torch", "ours", "cuda-only", "absent"),
) -> Plan:
    text = recipe_text(providers=in_profile)
    here = Here("NVIDIA H200" if gpu_present else None, "sm90" if gpu_present else None, stacks=stacks)
    return plan.make(recipe.parse(text, "small.toml"), text, profile, here, only)


def outcomes(chosen: Plan) -> dict[str, tuple[str | None, str | None, bool]]:
    return {entry.cell.provider: (entry.unsupported, entry.untimed, entry.interpreted) for entry in chosen.entries}


def test_without_a_profile_the_machine_decides() -> None:
    assert made(gpu_present=True).profile_name == "full"
    assert made(gpu_present=False).profile_name == "cpu"
    assert made("cpu", gpu_present=True).profile_name == "cpu"


def test_a_gpu_profile_without_a_gpu_says_what_to_do() -> None:
    with pytest.raises(UsageError) as caught:
        made("full")
    assert str(caught.value) == (
        "profile 'full' of recipe 'small' needs an NVIDIA GPU and none is visible; run PROFILE=cpu, "
        "or see `smbench doctor`"
    )


def test_an_unknown_profile_or_provider_lists_those_that_exist() -> None:
    with pytest.raises(UsageError, match="recipe 'small' has no profile 'fast'; known: cpu, full"):
        made("fast")
    with pytest.raises(UsageError) as caught:
        made(only=("tourch",))
    assert str(caught.value) == ("unknown provider 'tourch' in profile 'cpu'; known: torch, ours, cuda-only, absent")


def test_every_cell_on_a_cpu_has_its_outcome_and_reason() -> None:
    assert outcomes(made()) == {
        "torch": (None, None, False),
        "ours": (None, INTERPRETED, True),
        "cuda-only": ("needs a device of kind cuda, this profile runs on cpu", None, False),
        "absent": ("the Python package 'no_such_package_anywhere' is not installed here", None, False),
    }


def test_on_a_gpu_kernels_are_compiled_and_a_provider_may_still_be_verified_only() -> None:
    assert outcomes(made(gpu_present=True)) == {
        "torch": (None, None, False),
        "ours": (None, None, False),
        "cuda-only": (None, VERIFY_ONLY, False),
    }


def test_a_narrowed_plan_holds_the_named_providers_only() -> None:
    assert {entry.cell.provider for entry in made(only=("ours",)).entries} == {"ours"}


def test_the_estimate_counts_a_start_for_each_kind_of_worker_and_leaves_out_what_is_done_or_impossible() -> None:
    # two cells each of torch and ours, in two workers; the others cannot run here
    chosen = made()
    assert chosen.estimate_s() == 2 * 2.0 + 4 * 0.25
    ours = {entry.cell.cell_id for entry in chosen.entries if entry.cell.provider == "ours"}
    assert chosen.estimate_s(done=ours) == 2.0 + 2 * 0.25
    assert chosen.estimate_s(done={entry.cell.cell_id for entry in chosen.entries}) == 0.0


def test_folders_are_named_after_recipe_and_device() -> None:
    assert plan.default_folder(cpu_plan(), None, ROOT) == ROOT / "runs" / "small-cpu"
    # a CPU profile on a machine with a card measures the CPU
    assert plan.default_folder(made("cpu", gpu_present=True), "NVIDIA H200", ROOT) == ROOT / "runs" / "small-cpu"
    assert plan.default_folder(made(gpu_present=True), "NVIDIA H200", ROOT) == ROOT / "runs" / "small-h200"


def test_a_profile_that_the_machine_would_not_choose_is_part_of_the_folder_name() -> None:
    text = recipe_text().replace(b"profile.full", b"profile.quick")
    chosen = plan.make(recipe.parse(text, "small.toml"), text, "quick", Here("NVIDIA H200"))
    assert plan.default_folder(chosen, "NVIDIA L40", ROOT) == ROOT / "runs" / "small-l40-quick"


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA A100-SXM4-80GB", "a100-sxm4-80gb"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx-6000-ada-generation"),
        ("NVIDIA GPU", "gpu"),
        ("../etc", "etc"),
        ("///", "gpu"),
    ],
)
def test_a_device_name_becomes_a_safe_part_of_a_file_name(device: str, expected: str) -> None:
    assert plan.slug(device) == expected
