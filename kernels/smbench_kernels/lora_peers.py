"""What the providers over other projects' LoRA kernels share. Owns no kernel and no timed call."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os

from smbench_kernels.op import Inputs, UnsupportedPoint


def installed_version(package: str, inputs: Inputs) -> str:
    """The version of an installed package. UnsupportedPoint where it is missing or the inputs are not on a GPU."""
    if importlib.util.find_spec(package) is None:
        raise UnsupportedPoint(f"{package} is not installed in this stack")
    if not inputs["y"].is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise UnsupportedPoint(f"{package}'s LoRA kernels need an NVIDIA GPU")
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def incompatible(package: str, version: str, expected: str, error: object) -> UnsupportedPoint:
    """The reason to give where a package is there but not as this provider knows it."""
    return UnsupportedPoint(f"{package} {version} is installed, but this provider expects {expected}: {error}")
