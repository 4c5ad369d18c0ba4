"""Compiles kernels for GPUs that need not be there: this folder needs a pytest process of its own."""

from __future__ import annotations

import os

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    raise pytest.UsageError("TRITON_INTERPRET=1 compiles nothing: run `pytest tests/compile` alone, without it")
