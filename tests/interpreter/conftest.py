"""Runs kernels in Triton's interpreter: this folder needs a pytest process of its own."""

from __future__ import annotations

import os
import sys

import pytest

if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError("Triton is already imported without its interpreter: run `pytest tests/interpreter` alone")
os.environ["TRITON_INTERPRET"] = "1"
