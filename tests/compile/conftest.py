"""Compiles kernels for GPUs that need not be there: this folder needs a pytest process of its own."""

from __future__ import annotations

import os

import pytest

from smbench_kernels import nvrtc

if os.environ.get("TRITON_INTERPRET") == "1":
    raise pytest.UsageError("TRITON_INTERPRET=1 compiles nothing: run `pytest tests/compile` alone, without it")


@pytest.fixture(scope="session")
def compiler() -> None:
    """Skips without libnvrtc, which CUDA builds of PyTorch bring along and CI installs."""
    try:
        nvrtc._nvrtc()
    except OSError as error:
        pytest.skip(f"no NVRTC: {error}")
