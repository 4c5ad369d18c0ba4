"""Recipes load strictly: a fault is named by file, key path and the names that exist. Cells keep their identity."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from small_runs import RECIPE, REPOSITORY, recipe_text, small_recipe
from smbench import recipe
from smbench.cell import AxisValue, Cell
from smbench.errors import CorruptError, UsageError

RECIPES = REPOSITORY / "recipes"
PROVIDERS = "known: torch, ours, cuda-only, absent"


def refusal(text: bytes) -> str:
    with pytest.raises(UsageError) as caught:
        recipe.parse(text, "small.toml")
    return str(caught.value)


def edited(old: str, new: str) -> bytes:
    """The small recipe with one edit."""
    text = recipe_text().decode()
    assert old in text
    return text.replace(old, new, 1).encode()


FAULTS = {
    "unknown key": (
        "verify_only = [",
        "verify_onyl = [",
        "profile.full.verify_onyl: unknown key; known keys here: device, engine, estimate, grid, measure, providers, "
        "template, time_limit_s, verify_only; did you mean 'verify_only'?",
    ),
    "unknown key of a row": (
        "samples = 5",
        "sampels = 5",
        "profile.cpu.measure[0].sampels: unknown key; known keys here: calls, l2, method, min_samples, name, part, "
        "replays, samples, title, warmup, window_s; did you mean 'samples'?",
    ),
    "unknown key at the top": (
        "seed = 5",
        "seed = 5\nsede = 6",
        "sede: unknown key; known keys here: baseline, document, format, headline, kind, name, profile, "
        "protocol_version, providers, published, seed, stack, template, title, unsupported, values; "
        "did you mean 'seed'?",
    ),
    "missing key": ("seed = 5\n", "", "seed: this key is missing"),
    "missing table": ("[profile.cpu.estimate]", "[estimate]", "profile.cpu.estimate: this key is missing"),
    "unknown provider": (
        "providers = ['torch']",
        "providers = ['trch']",
        f"profile.cpu.providers: unknown provider 'trch'; {PROVIDERS}; did you mean 'torch'?",
    ),
    "unknown verify_only": (
        'verify_only = ["cuda-only"]',
        'verify_only = ["nobody"]',
        f"profile.full.verify_only: unknown provider 'nobody'; {PROVIDERS}",
    ),
    "unknown baseline": ('baseline = "torch"', 'baseline = "x"', f"baseline: unknown provider 'x'; {PROVIDERS}"),
    "unknown headline": ('headline = "wall"', 'headline = "x"', "headline: unknown measure 'x'; known: wall"),
    "unknown op": (
        'ops = ["bgmv_shrink"]',
        'ops = ["bgmv_shrnk"]',
        "profile.cpu.grid[0].ops: unknown op 'bgmv_shrnk'; known: bgmv_shrink, ",
    ),
    "unknown list": (
        'hidden_size = "sizes"',
        'hidden_size = "size"',
        "profile.cpu.grid[0].axes.hidden_size: unknown list of [values] 'size'; known: sizes; did you mean 'sizes'?",
    ),
    "text for a number": ("seed = 5", 'seed = "5"', "seed: Input should be a valid integer, found '5'"),
    "number for text": ('title = "ours"', "title = 3", "providers.ours.title: Input should be a valid string, found 3"),
    "fraction for a count": (
        "samples = 5",
        "samples = 5.5",
        "profile.cpu.measure[0].samples: Input should be a valid integer, ",
    ),
    "no samples": ("samples = 5", "samples = 0", "profile.cpu.measure[0].samples: Input should be greater than"),
    "no time": ("time_limit_s = 60.0", "time_limit_s = 0.0", "profile.cpu.time_limit_s: Input should be greater than"),
    "wrong choice": (
        'selection = "default"',
        'selection = "defalt"',
        "providers.ours.selection: Input should be 'default', 'tuned', 'library' or 'library-tuned', found 'defalt'",
    ),
    "axis with no values": (
        'hidden_size = "sizes"',
        "hidden_size = []",
        "profile.cpu.grid[0].axes.hidden_size: an axis needs at least one value",
    ),
    "list with no values": ("sizes = [100, 200]", "sizes = []", "values.sizes: List should have at least 1 item"),
    "fraction on an axis": (
        'hidden_size = "sizes"',
        "hidden_size = [128, 1.5]",
        "profile.cpu.grid[0].axes.hidden_size: an axis takes integers and strings, found 1.5",
    ),
    "truth value on an axis": (
        "sizes = [100, 200]",
        "sizes = [true]",
        "values.sizes: an axis takes integers and strings, found True",
    ),
    "bare value for an axis": (
        'hidden_size = "sizes"',
        "hidden_size = 128",
        "profile.cpu.grid[0].axes.hidden_size: an axis is a list of values or the name of a list in [values], "
        "found 128",
    ),
    "no ops": ('ops = ["bgmv_shrink"]', "ops = []", "profile.cpu.grid[0].ops: List should have at least 1 item"),
    "fewer samples than the least": (
        "samples = 5",
        "samples = 5\nmin_samples = 6",
        "profile.cpu.measure[0]: min_samples 6 exceeds samples 5",
    ),
    "wall clock with a cache state": (
        'l2 = "none"',
        'l2 = "warm"',
        "profile.cpu.measure[0]: method 'wall' cannot have l2 'warm': only wall-clock timing has l2 'none'",
    ),
    "events without a cache state": (
        'method = "wall"',
        'method = "event"',
        "profile.cpu.measure[0]: method 'event' cannot have l2 'none'",
    ),
    "no TOML": ("[values]", "[values", "not valid TOML: "),
}


@pytest.mark.parametrize(("old", "new", "message"), FAULTS.values(), ids=FAULTS.keys())
def test_a_fault_is_named_by_file_key_path_and_known_names(old: str, new: str, message: str) -> None:
    assert f"small.toml: {message}" in refusal(edited(old, new))


def test_a_fault_takes_one_line_and_every_fault_is_named() -> None:
    assert len(refusal(edited("sizes = [100, 200]", "sizes = [true]")).splitlines()) == 1
    both = edited("seed = 5", 'seed = "5"').replace(b'title = "ours"', b"title = 3")
    assert len(refusal(both).splitlines()) == 2


def test_a_measure_name_that_repeats_is_refused() -> None:
    row = RECIPE[RECIPE.index("[[profile.cpu.measure]]") : RECIPE.index("[[profile.cpu.grid]]")]
    assert refusal(edited(row, row + row)) == "small.toml: profile.cpu.measure: names repeat: wall, wall"


def test_a_file_that_is_no_text_is_refused() -> None:
    assert refusal(recipe_text() + b"# \xff\n").startswith("small.toml: not valid TOML: 'utf-8' codec can't decode")


def test_a_newer_format_is_refused_as_such_whatever_else_it_holds() -> None:
    with pytest.raises(CorruptError) as caught:
        recipe.parse(b'format = 2\nnew_key = "x"', "small.toml")
    assert str(caught.value) == "small.toml: format 2 is newer than this smbench reads (1); update smbench"


def test_an_unknown_recipe_lists_those_that_exist(tmp_path: Path) -> None:
    for name in ("lora", "gptq"):
        (tmp_path / f"{name}.toml").write_bytes(recipe_text())
    with pytest.raises(UsageError) as caught:
        recipe.find("lroa", tmp_path)
    assert str(caught.value) == "unknown recipe 'lroa'; known: gptq, lora; did you mean 'lora'?"


@pytest.mark.parametrize("name", ["../recipes/lora", "", "lora.toml"])
def test_a_recipe_is_asked_for_by_name_never_by_path(name: str) -> None:
    with pytest.raises(UsageError, match="unknown recipe"):
        recipe.find(name, RECIPES)


def test_an_unknown_profile_lists_those_that_exist() -> None:
    with pytest.raises(UsageError) as caught:
        recipe.profile_named(small_recipe(), "quick")
    assert str(caught.value) == "recipe 'small' has no profile 'quick'; known: cpu, full"


@pytest.mark.parametrize("name", recipe.names(RECIPES))
def test_every_shipped_recipe_loads_under_its_own_name_with_unique_cells(name: str) -> None:
    loaded = recipe.load(recipe.find(name, RECIPES))
    assert loaded.name == name
    for profile in loaded.profile:
        cells = loaded.cells(profile)
        assert len({cell.cell_id for cell in cells}) == len(cells) > 0
        assert {cell.provider for cell in cells} == set(loaded.profile[profile].providers)


def test_cells_are_the_product_of_the_axes_providers_side_by_side() -> None:
    text = edited('hidden_size = "sizes"', 'hidden_size = "sizes"\nbatch = [1, 8]').replace(
        b"providers = ['torch']", b"providers = ['torch', 'ours']"
    )
    cells = recipe.parse(text, "small.toml").cells("cpu")
    assert [(cell.axes["hidden_size"], cell.axes["batch"], cell.provider) for cell in cells] == [
        (size, batch, provider) for size in (100, 200) for batch in (1, 8) for provider in ("torch", "ours")
    ]


def test_grids_that_overlap_give_a_cell_once() -> None:
    grid = RECIPE[RECIPE.index("[[profile.cpu.grid]]") : RECIPE.index("[profile.full]")]
    text = edited(grid, grid + grid.replace('"sizes"', "[200, 300]"))
    assert [cell.axes["hidden_size"] for cell in recipe.parse(text, "small.toml").cells("cpu")] == [100, 200, 300]


def cell(axes: dict[str, AxisValue], seed: int = 0, subject: str = "bgmv_shrink", provider: str = "torch") -> Cell:
    return Cell(kind="op", subject=subject, provider=provider, axes=axes, seed=seed)


def test_cell_id_is_pinned() -> None:
    """Results of different months and machines are joined by it: a change here orphans every bundle there is."""
    assert cell({"batch": 8, "hidden_size": 4096, "dtype": "float16"}).cell_id == "7a3056d133d193a4"


def test_cell_id_does_not_depend_on_the_order_of_axes() -> None:
    assert cell({"batch": 8, "rank": 16}).cell_id == cell({"rank": 16, "batch": 8}).cell_id
    assert cell({"batch": 8, "rank": 16}).point == cell({"rank": 16, "batch": 8}, provider="vllm").point


def test_a_number_and_its_digits_are_different_points() -> None:
    assert cell({"batch": 8}).cell_id != cell({"batch": "8"}).cell_id


NAMES = st.sampled_from(["batch", "rank", "bätch", 'a"b', "a,b"])
VALUES = st.one_of(st.integers(-3, 3), st.sampled_from(["", "1", "2", "float16", 'x":1,"y']))
CELLS = st.builds(
    cell, st.dictionaries(NAMES, VALUES, max_size=3), st.integers(0, 1), st.sampled_from("ab"), st.sampled_from("ab")
)


@given(CELLS, CELLS)
def test_cells_have_equal_ids_exactly_when_they_are_equal(one: Cell, other: Cell) -> None:
    assert (one.cell_id == other.cell_id) == (one == other)


@given(CELLS)
def test_a_cell_survives_its_json(one: Cell) -> None:
    again = Cell.model_validate_json(one.model_dump_json())
    assert again == one
    assert again.cell_id == one.cell_id


def test_a_plan_says_which_model_stands_for_those_of_the_recipe() -> None:
    gptq = recipe.load(Path(__file__).resolve().parents[1] / "recipes" / "gptq.toml")
    another = {"model": "synthetic:qwen2.5-7b"}
    assert gptq.instead("full", gptq.cells("full", another)) == another
    assert gptq.instead("full", gptq.cells("full")) == {}
    assert {cell.axes["model"] for cell in gptq.cells("full", another)} == {"synthetic:qwen2.5-7b"}
