"""An image's kernels are compiled ahead: what is listed, and that a worker then compiles nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from smbench import baking, recipe, resources
from smbench.arch import load as load_archs
from smbench.errors import UsageError
from smbench.worker.bake import main as bake_main
from smbench.worker.bake import wanted
from smbench_kernels import configs, hardware, nvrtc
from smbench_kernels.registry import OPS
from smbench_kernels.registry import op as find_op

PYTHON_PATH = os.pathsep.join(str(Path(place).resolve()) for place in ("bench", "kernels"))
SMALL = {"batch": 1, "seq_len": 1, "hidden_size": 256, "rank": 16, "num_loras": 2, "dtype": "float16"}
LARGE = {**SMALL, "batch": 8, "hidden_size": 4096}
UNLISTED = {**SMALL, "dtype": "bfloat16"}
# by default in CUDA C++, while the others are in Triton
LINEAR = {**LARGE, "projection": "square", "prefill": "all"}
LISTED = [("bgmv_shrink", SMALL), ("bgmv_shrink", LARGE), ("lora_linear", LINEAR)]

# compiles for sm90 with the stand-in driver, as a worker does on a card, and says what it compiled
COUNT = """
import json, sys
from smbench.worker import baked
from smbench.worker.compilations import Compilations
from smbench_kernels import hardware
from smbench_kernels.registry import op
used = baked.use()
counter = Compilations()
for name, point in json.loads(sys.argv[1]):
    tunable = op(name).tuning()
    tunable.precompile(point, tunable.default(point, hardware.TYPICAL[90]), 90)
print(json.dumps({"used": used, "compiled": counter.count}))
"""


def the_list(arch: str, stack: str = "kernels") -> dict[str, Any]:
    folder = resources.recipes_dir()
    recipes = [recipe.load(recipe.find(name, folder)) for name in recipe.names(folder)]
    return baking.bake_list(recipes, load_archs(resources.archs_file()), arch, stack)


def run(program: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """A process that compiles: under the interpreter of other tests nothing would be."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    return subprocess.run(
        [sys.executable, *program],
        env={**inherited, "PYTHONPATH": PYTHON_PATH, **environment},
        capture_output=True,
        text=True,
        check=True,
    )


def count(points: list[tuple[str, dict[str, Any]]], baked: Path, cache: Path) -> dict[str, Any]:
    """What a process compiles for points of operations, with shipped kernels in one place, the user's in another."""
    done = run(["-c", COUNT, json.dumps(points)], SMBENCH_BAKED=str(baked), TRITON_CACHE_DIR=str(cache))
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kernels of three points, baked in one folder and moved to another, as a layer of an image is."""
    if not nvrtc.available():
        pytest.skip("no NVRTC, which CUDA builds of PyTorch bring along and CI installs")
    folder = tmp_path_factory.mktemp("image")
    request = {
        "format": 1,
        "arch": "sm90",
        "capability": 90,
        "stack": "kernels",
        "devices": [{"name": "NVIDIA H200", "sm_count": 132, "l2_bytes": None}],
        "points": {"bgmv_shrink": [SMALL, LARGE], "lora_linear": [LINEAR]},
    }
    (folder / "list.json").write_text(json.dumps(request))
    run(["-m", "smbench.worker.bake", str(folder / "list.json"), "--output", str(folder / "built")])
    (folder / "built").rename(folder / "shipped")
    return folder / "shipped"


def test_a_listed_point_compiles_nothing_from_a_moved_and_read_only_folder(shipped: Path, tmp_path: Path) -> None:
    facts = json.loads((shipped / "baked.json").read_text())
    assert (facts["arch"], facts["points"]) == ("sm90", 3)
    of_triton, of_nvrtc = list(shipped.glob("*/*.cubin")), list(shipped.glob("*.cubin"))
    assert len(of_triton) >= 2 and len(of_nvrtc) >= 1
    assert facts["kernels"] == len(of_triton) + len(of_nvrtc)
    before = sorted(path.relative_to(shipped) for path in shipped.rglob("*"))
    subprocess.run(["chmod", "-R", "a-w", str(shipped)], check=True)

    found = count(LISTED, shipped, tmp_path / "user")

    assert found == {"used": True, "compiled": 0}
    # a hit writes neither here nor there, so that a read-only file system will do
    assert not (tmp_path / "user").exists()
    assert sorted(path.relative_to(shipped) for path in shipped.rglob("*")) == before


def test_what_is_not_shipped_goes_to_the_users_cache(shipped: Path, tmp_path: Path) -> None:
    cache = tmp_path / "user"
    unlisted = [("bgmv_shrink", UNLISTED), ("lora_linear", {**LINEAR, "dtype": "bfloat16"})]
    compiled = count([*LISTED, *unlisted], shipped, cache)["compiled"]
    # of both kinds
    assert compiled == len(list(cache.rglob("*.cubin"))) >= 2
    assert list(cache.glob("*/*.cubin")) and list(cache.glob("*.cubin"))


@pytest.mark.parametrize("kernels", ["*/*.cubin", "*.cubin"])
def test_a_damaged_kernel_is_compiled_again(kernels: str, shipped: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(shipped, damaged)
    subprocess.run(["chmod", "-R", "u+w", str(damaged)], check=True)
    for kernel in damaged.glob(kernels):
        kernel.unlink()
    assert count(LISTED, damaged, tmp_path / "user")["compiled"] >= 1


def test_the_module_that_calls_the_driver_is_shipped_too(shipped: Path) -> None:
    """Else the first launch of a cold container would wait for a C compiler."""
    assert len(list(shipped.glob("*/cuda_utils*.so"))) == 1


def test_a_cache_manager_that_was_chosen_otherwise_stays(shipped: Path) -> None:
    program = (
        "from smbench.worker import baked; from triton import knobs; baked.use(); "
        "print(knobs.cache.manager_class.__name__)"
    )
    chosen = "triton.runtime.cache:RemoteCacheManager"
    done = run(["-c", program], TRITON_CACHE_MANAGER=chosen, SMBENCH_BAKED=str(shipped))
    assert done.stdout.strip() == "RemoteCacheManager"


@pytest.mark.parametrize("arch", ["sm80", "sm86", "sm89", "sm90"])
def test_every_recipe_with_kernels_of_ours_is_listed(arch: str) -> None:
    found = the_list(arch)
    assert found["capability"] == int(arch.removeprefix("sm"))
    table = load_archs(resources.archs_file())
    assert [row["name"] for row in found["devices"]] == sorted(n for n, d in table.device.items() if d.arch == arch)
    folder = resources.recipes_dir()
    for name in recipe.names(folder):
        one = recipe.load(recipe.find(name, folder))
        for profile_name, profile in one.profile.items():
            if one.kind != "op" or profile.device != "cuda":
                continue
            for cell in one.cells(profile_name):
                row = one.providers[cell.provider]
                if row.selection != "library" and (row.stack or one.stack) == "kernels":
                    excused = any(rule.matches(cell) for rule in one.unsupported)
                    assert excused or dict(cell.axes) in found["points"][cell.subject]


def test_a_stack_without_kernels_of_ours_has_nothing_to_compile() -> None:
    assert the_list("sm90", "lmdeploy")["points"] == {}


def test_defaults_of_every_card_and_shipped_configurations_are_wanted() -> None:
    request = the_list("sm90")
    points = request["points"]["bgmv_shrink"]
    request["points"] = {"bgmv_shrink": points[:: max(1, len(points) // 12)]}
    tunable = find_op("bgmv_shrink").tuning()
    assert tunable.default is not None
    found = {tunable.binary(one.point, one.config) for one in wanted(request)}
    table = configs.load(configs.path_of("NVIDIA H200", "bgmv_shrink"))
    for point in request["points"]["bgmv_shrink"]:
        assert tunable.binary(point, tunable.default(point, hardware.TYPICAL[90])) in found
        # a point of another type than any that was tuned has no shipped configuration
        if point["dtype"] in {entry.point["dtype"] for entry in table.entries}:
            assert tunable.binary(point, configs.lookup(table, point)[0]) in found


@pytest.mark.parametrize("name", OPS)
def test_every_kernel_that_can_be_tuned_says_its_default(name: str) -> None:
    op = find_op(name)
    if op.tunable is not None:
        assert op.tuning().default is not None, f"op {name}: images could not ship it compiled"


def test_an_operation_that_names_no_kernels_does_not_stop_the_others() -> None:
    """A layer is made of many kernels, of which it chooses by itself."""
    points = the_list("sm90")["points"]
    request = {**the_list("sm90"), "points": {name: points[name][:1] for name in ("hstu_layer", "bgmv_shrink")}}
    assert find_op("hstu_layer").tunable is None
    assert {one.op for one in wanted(request)} == {"bgmv_shrink"}


def test_mistakes_of_the_caller_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="unknown arch 'sm12'; known: sm80"):
        the_list("sm12")
    with pytest.raises(UsageError, match="nothing to compile"):
        the_list("cpu")
    assert baking.main(["--arch", "sm12", "--stack", "kernels"]) == 2
    assert bake_main([str(tmp_path / "absent.json")]) == 2
    assert "absent.json" in capsys.readouterr().err
    (tmp_path / "odd.json").write_text('{"format": 99}')
    assert bake_main([str(tmp_path / "odd.json")]) == 3
    assert "smbench.baking" in capsys.readouterr().err
    (tmp_path / "list.json").write_text(json.dumps({**the_list("sm90"), "points": {}}))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("mine")
    assert bake_main([str(tmp_path / "list.json"), "--output", str(tmp_path / "home")]) == 2
    assert (tmp_path / "home" / "thesis.txt").exists()
