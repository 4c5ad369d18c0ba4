"""Before a run in place: the recipe's own stack is made where it is missing, and no other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from smbench import plan, recipe, stacksetup
from smbench.errors import UsageError
from smbench.plan import Here, Plan
from smbench.stacks import Stacks

RECIPES = Path(__file__).resolve().parents[1] / "recipes"


class Without(Stacks):
    """Stacks that lack some packages, whatever is installed here."""

    absent: Sequence[str] = ()

    def missing(self, stack: str, packages: Sequence[str]) -> list[str]:
        return [package for package in packages if package in type(self).absent]


class WithoutVllm(Without):
    absent = ("vllm",)


class WithoutSglang(Without):
    absent = ("sglang",)


def planned(name: str, profile: str, here: Here) -> Plan:
    path = RECIPES / f"{name}.toml"
    return plan.make(
        recipe.load(path), path.read_bytes(), profile, here, (), "synthetic:tiny" if name == "gptq" else None
    )


def test_the_engine_that_a_recipe_is_about_is_made() -> None:
    stacks = WithoutVllm(())
    assert stacksetup.missing_stack(planned("gptq", "cpu", Here(stacks=stacks)), stacks) == "vllm"


def test_an_engine_that_is_merely_compared_with_is_not() -> None:
    stacks = WithoutSglang(())
    assert stacksetup.missing_stack(planned("gptq", "cpu", Here(stacks=stacks)), stacks) is None


def test_operations_run_in_the_environment_that_is_there() -> None:
    stacks = WithoutVllm(())
    assert stacksetup.missing_stack(planned("lora", "cpu", Here(stacks=stacks)), stacks) is None


def test_an_image_is_never_added_to() -> None:
    stacks = WithoutVllm((), complete=True)
    assert stacksetup.missing_stack(planned("gptq", "cpu", Here(stacks=stacks)), stacks) is None


def test_a_set_up_that_fails_ends_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "setup.py"
    script.write_text("raise SystemExit(3)")
    monkeypatch.setattr(stacksetup, "SETUP", script)
    with pytest.raises(UsageError, match=r"stack 'vllm' could not be made; .* `make stack STACK=vllm` tries again"):
        stacksetup.make("vllm")
