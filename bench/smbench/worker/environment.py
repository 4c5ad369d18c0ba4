"""What a result was measured in: card, driver, machine, software, source, as JSON-able facts.

Owns which facts are taken and that none names a person or a machine: no host name, user, serial number, UUID, bus
address or path; environment variables by name and by the grammar of their values. Does not own facts that change
while measuring (telemetry.py). A fact that cannot be had is None and `missing` says why; nothing is guessed.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from smbench import __version__, machine
from smbench.identity import environment_id, files_sha256
from smbench.nvml import NvmlUnavailable, fixed_facts, open_gpu

FORMAT = 1
"""Version of the record. History: 1 = first."""

IMAGE_FILE = Path("/etc/smbench/image.json")
"""Written into every image by its build: what the image is, since a container cannot see its own digest."""

LIBRARIES = (
    "auto-gptq",
    "flash-attn",
    "flashinfer-python",
    "gptqmodel",
    "lmdeploy",
    "numpy",
    "nvidia-cublas",
    "nvidia-cublas-cu12",
    "nvidia-cuda-nvrtc",
    "nvidia-cuda-nvrtc-cu12",
    "nvidia-cuda-runtime",
    "nvidia-cuda-runtime-cu12",
    "nvidia-cudnn-cu12",
    "nvidia-cudnn-cu13",
    "nvidia-ml-py",
    "nvidia-nccl-cu12",
    "nvidia-nccl-cu13",
    "scipy",
    "sgl-kernel",
    "sglang",
    "tensorrt-llm",
    "torch",
    "transformers",
    "triton",
    "vllm",
    "xformers",
)
"""Distributions whose version can move a number."""

_FLAG = r"(?i:0|1|true|false|on|off|yes|no)"
_NUMBER = r"-?\d+"
_SETTINGS = r"[a-z0-9_]+:[A-Za-z0-9.]+(,[a-z0-9_]+:[A-Za-z0-9.]+)*"
_WORD = r"[A-Z][A-Z0-9_]*"
# TRITON_INTERPRET is missing on purpose: the host sets it for some workers of a run, and their results say so
VARIABLES: Mapping[str, str] = {
    "CUBLAS_WORKSPACE_CONFIG": r":?\d+(:\d+)*",
    "CUDA_CACHE_DISABLE": _FLAG,
    "CUDA_DEVICE_MAX_CONNECTIONS": _NUMBER,
    "CUDA_DEVICE_ORDER": r"FASTEST_FIRST|PCI_BUS_ID",
    "CUDA_DISABLE_PTX_JIT": _FLAG,
    "CUDA_FORCE_PTX_JIT": _FLAG,
    "CUDA_LAUNCH_BLOCKING": _FLAG,
    "CUDA_MODULE_LOADING": r"LAZY|EAGER|DEFAULT",
    "CUDA_VISIBLE_DEVICES": r"(-?\d+(,-?\d+)*)?",
    "DISABLE_PTXAS_OPT": _FLAG,
    "LD_PRELOAD": r"",
    "MKL_NUM_THREADS": _NUMBER,
    "NCCL_NVLS_ENABLE": _NUMBER,
    "NCCL_P2P_DISABLE": _FLAG,
    "NVIDIA_TF32_OVERRIDE": _FLAG,
    "OMP_NUM_THREADS": _NUMBER,
    "OPENBLAS_NUM_THREADS": _NUMBER,
    "PYTHONHASHSEED": r"random|\d+",
    "PYTHONOPTIMIZE": _NUMBER,
    "PYTORCH_ALLOC_CONF": _SETTINGS,
    "PYTORCH_CUDA_ALLOC_CONF": _SETTINGS,
    "PYTORCH_NO_CUDA_MEMORY_CACHING": _FLAG,
    "SGLANG_ENABLE_TORCH_COMPILE": _FLAG,
    "TORCHDYNAMO_DISABLE": _FLAG,
    "TORCHINDUCTOR_MAX_AUTOTUNE": _FLAG,
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": _FLAG,
    "TORCH_BLAS_PREFER_CUBLASLT": _FLAG,
    "TORCH_COMPILE_DISABLE": _FLAG,
    "TRITON_ALWAYS_COMPILE": _FLAG,
    "TRITON_DEBUG": _FLAG,
    "TRITON_DEFAULT_FP_FUSION": _FLAG,
    "TRITON_F32_DEFAULT": r"ieee|tf32|tf32x3",
    "TRITON_LIBCUDA_PATH": r"",
    "TRITON_OVERRIDE_ARCH": r"sm\d+a?",
    "TRITON_PTXAS_PATH": r"",
    "VLLM_ATTENTION_BACKEND": _WORD,
    "VLLM_BATCH_INVARIANT": _FLAG,
    "VLLM_ENABLE_V1_MULTIPROCESSING": _FLAG,
    "VLLM_FLASH_ATTN_VERSION": _NUMBER,
    "VLLM_USE_FLASHINFER_SAMPLER": _FLAG,
    "VLLM_USE_V1": _FLAG,
}
"""Environment variables that can move a number, and what their values look like. Any other value is only "set"."""


def capture(environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """The environment of this process. Every group is a dict and every fact is there, None where it is unknown.

    Initializes CUDA where torch has it, since the card is the one that torch calls device 0.
    """
    missing: list[str] = []
    torch_gpu, torch_runtime = _torch_facts(missing)
    facts = {
        "format": FORMAT,
        "gpu": _gpu(torch_gpu, environ, missing),
        "runtime": torch_runtime | _triton_facts(missing),
        "cpu": {
            "model": machine.cpu_model(),
            "architecture": platform.machine() or None,
            "cores_usable": machine.cores_usable(),
            "quota_cores": machine.cpu_quota_cores(),
        },
        "memory": {"total_bytes": machine.memory_total_bytes()},
        "os": {"system": platform.system(), "kernel": platform.release(), "container": machine.container()},
        "python": {"version": platform.python_version(), "implementation": platform.python_implementation()},
        "libraries": library_versions(),
        "variables": variables(environ),
        "source": source_checkout(Path(__file__).resolve().parent, missing),
        "smbench": {
            "version": __version__,
            "bench_sha256": package_sha256("smbench"),
            "kernels_sha256": package_sha256("smbench_kernels"),
        },
        "image": image(IMAGE_FILE, missing, environ),
    }
    missing.extend(f"{path}: unknown" for path in _unknown(facts) if not _explained(path, missing))
    return {**facts, "missing": sorted(missing)}


def library_versions() -> dict[str, str]:
    """Versions of the installed ones among LIBRARIES, from their metadata: nothing is imported."""
    versions = {name: _installed_version(name) for name in LIBRARIES}
    return {name: version for name, version in versions.items() if version is not None}


def variables(environ: Mapping[str, str]) -> dict[str, str]:
    """The set ones among VARIABLES. A value outside its grammar could be a path or a secret: it becomes "set"."""
    return {
        name: environ[name] if re.fullmatch(grammar, environ[name]) else "set"
        for name, grammar in VARIABLES.items()
        if name in environ
    }


def source_checkout(folder: Path, missing: list[str]) -> dict[str, Any]:
    """`commit` and `dirty` (tracked files changed) of the git checkout that holds `folder` among its tracked files.

    Both None elsewhere: an installed package that only lies below somebody's repository is not of that repository.
    """
    unknown = {"commit": None, "dirty": None}
    if shutil.which("git") is None:
        missing.append("source: git is not installed")
        return unknown
    if not _git(folder, "ls-files", "--", "."):
        missing.append("source: not a git checkout, or one of another user that git refuses to read")
        return unknown
    commit, status = _git(folder, "rev-parse", "HEAD"), _git(folder, "status", "--porcelain", "--untracked-files=no")
    if commit is None or status is None:
        missing.append("source: git gives no commit")
        return unknown
    return {"commit": commit, "dirty": bool(status)}


def package_sha256(name: str) -> str | None:
    """SHA-256 over all files of an importable package, shipped configurations included; None when there is none.

    Hashed are, in order of relative path: the path, the length and the content. The package is not imported.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(next(iter(spec.submodule_search_locations)))
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return files_sha256((path, files[path].read_bytes()) for path in sorted(files) if "__pycache__" not in path)


def image(file: Path, missing: list[str], environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """What the build wrote into the image, and `digest`, by which it was started; empty outside of an image.

    `forced_arch` is there, and true, where the image is of another arch than the card and the user wanted that.
    """
    if not file.exists():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        missing.append(f"image: {file.name} is unreadable ({type(error).__name__})")
        return {}
    facts = found if isinstance(found, dict) else {"value": found}
    digest: str | None = environ.get("SMBENCH_IMAGE_DIGEST", "")
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", digest or ""):
        digest = None
        missing.append("image.digest: not told; SMBENCH_IMAGE_DIGEST=sha256:… says what the container was started by")
    return {**facts, "digest": digest, **({"forced_arch": True} if environ.get("SMBENCH_FORCED_ARCH") == "1" else {})}


def _gpu(torch_gpu: Mapping[str, Any], environ: Mapping[str, str], missing: list[str]) -> dict[str, Any]:
    """Facts of the card that torch uses, or that NVML shows where torch uses none. Empty without a card."""
    uuid = torch_gpu.get("uuid")
    public = {name: value for name, value in torch_gpu.items() if name != "uuid"}
    try:
        gpu = open_gpu(uuid=uuid, environ=environ)
    except NvmlUnavailable as error:
        missing.append(f"gpu: {error}")
        return public
    facts = fixed_facts(gpu)
    missing.extend(f"gpu.{name}: {reason}" for name, reason in gpu.missing.items())
    return dict.fromkeys(gpu.missing) | facts | public


def _torch_facts(missing: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(facts of CUDA device 0 with its uuid, versions that torch runs with)."""
    runtime: dict[str, Any] = {"cuda": None, "cudnn": None}
    try:
        torch: Any = importlib.import_module("torch")
    except ImportError as error:
        missing.append(f"runtime: torch cannot be imported ({type(error).__name__})")
        return {}, runtime
    runtime["cuda"] = torch.version.cuda
    if not torch.cuda.is_available():
        missing.append("runtime: torch sees no CUDA device")
        return {}, runtime
    runtime["cudnn"] = torch.backends.cudnn.version()
    card = torch.cuda.get_device_properties(0)
    found = {
        "name": card.name,
        "compute_capability": [card.major, card.minor],
        "sm_count": card.multi_processor_count,
        "l2_bytes": getattr(card, "L2_cache_size", None),
        "usable_memory_bytes": card.total_memory,
    }
    uuid = getattr(card, "uuid", None)
    return {**found, "uuid": None if uuid is None else f"GPU-{uuid}"}, runtime


def _triton_facts(missing: list[str]) -> dict[str, Any]:
    """Version of the assembler that Triton compiles with: it is part of the kernel's speed and of its correctness."""
    try:
        knobs: Any = importlib.import_module("triton.knobs")
        return {"ptxas": knobs.nvidia.ptxas.version}
    except (ImportError, AttributeError, RuntimeError, OSError) as error:
        missing.append(f"runtime.ptxas: Triton does not tell ({type(error).__name__})")
        return {"ptxas": None}


def _installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(folder: Path, *arguments: str) -> str | None:
    """The output of a git command, None when git refuses or hangs. Never takes git's locks."""
    command = ["git", "-C", str(folder), *arguments]
    environ = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, env=environ, check=False)
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _unknown(tree: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """Paths of the facts that are None."""
    for key, value in tree.items():
        here = f"{path}.{key}" if path else key
        if isinstance(value, Mapping):
            yield from _unknown(value, here)
        elif value is None and here not in ("cpu.quota_cores", "os.container"):
            # for these two None is the fact: no quota, no container
            yield here


def _explained(path: str, missing: list[str]) -> bool:
    """Whether a reason names this fact or the group that it is in."""
    prefixes = [path, path.rpartition(".")[0]]
    return any(reason.partition(":")[0] in prefixes for reason in missing)


if __name__ == "__main__":
    record = capture()
    json.dump({"environment_id": environment_id(record), **record}, sys.stdout, indent=2)
    sys.stdout.write("\n")
