"""Stripping what nvcc makes: what is left is what NVIDIA's own cuobjdump finds."""

from __future__ import annotations

import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from smbench.fatbin.sharedobject import rewritable
from smbench.fatbin.strip import strip_file, targets

KERNEL = """
__global__ void twice(float *x) { x[threadIdx.x] *= 2.f; }
extern "C" int answer() { return 42; }
extern "C" void launch(float *x) { twice<<<1, 32>>>(x); }
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shared object as nvcc makes it, for several targets, some of its code compressed."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc to make a real shared object")
    folder = tmp_path_factory.mktemp("nvcc")
    (folder / "k.cu").write_text(KERNEL)
    codes = ["80,code=sm_80", "86,code=sm_86", "90,code=[sm_90,compute_90]", "90a,code=sm_90a"]
    flags = [word for code in codes for word in ("-gencode", f"arch=compute_{code}")]
    path = folder / "real.so"
    subprocess.run(
        [nvcc, "-shared", "-Xcompiler", "-fPIC", "-cudart", "none", *flags, "-o", str(path), str(folder / "k.cu")],
        check=True,
        capture_output=True,
    )
    return path


@pytest.mark.parametrize(
    ("capability", "expected"),
    [(80, {"sm_80": 1}), (86, {"sm_86": 1}), (89, {"sm_86": 1}), (90, {"sm_90": 1, "sm_90a": 1})],
)
def test_what_is_left_of_a_real_one_is_what_cuobjdump_finds(
    compiled: Path, tmp_path: Path, capability: int, expected: dict[str, int]
) -> None:
    triton = pytest.importorskip("triton")
    cuobjdump = triton.knobs.nvidia.cuobjdump.path
    path = Path(shutil.copy(compiled, tmp_path / "real.so"))
    raw = path.read_bytes()
    ours, _, _ = targets(raw, rewritable(raw))
    assert ours == {"sm_80": 1, "sm_86": 1, "sm_90": 1, "sm_90a": 1, "compute_90": 1}
    done = strip_file(path, capability)
    assert done is not None and done.kept == expected
    listing = subprocess.run([cuobjdump, "-lelf", "-lptx", str(path)], capture_output=True, text=True, check=True)
    found = Counter(line.split(".")[-2] for line in listing.stdout.splitlines() if line.endswith((".cubin", ".ptx")))
    assert found == expected
    sass = subprocess.run([cuobjdump, "-sass", str(path)], capture_output=True, text=True, check=True).stdout
    assert sass.count("Function : ") == sum(expected.values())


def test_cuobjdump_finds_no_function_in_a_placeholder(compiled: Path, tmp_path: Path) -> None:
    triton = pytest.importorskip("triton")
    path = Path(shutil.copy(compiled, tmp_path / "real.so"))
    strip_file(path, 86)
    done = strip_file(path, 90)
    assert done is not None and (done.placeholders, done.kept) == (1, {})
    command = [triton.knobs.nvidia.cuobjdump.path, "-sass", str(path)]
    sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "sm_86" in sass
    assert "Function : " not in sass
