"""What the providers over other projects' paged-attention kernels share. Owns no kernel and no timed call."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os

import torch

from smbench_kernels.op import Inputs, Point, UnsupportedPoint


def installed_version(package: str, inputs: Inputs, *, triton: bool, distribution: str | None = None) -> str:
    """The version of an installed package, whose distribution may have another name.

    UnsupportedPoint where it is missing, or the inputs are not on a GPU and nothing interprets its kernels.
    """
    if importlib.util.find_spec(package) is None:
        raise UnsupportedPoint(f"{package} is not installed in this stack")
    interpreted = triton and os.environ.get("TRITON_INTERPRET") == "1"
    if not inputs["y"].is_cuda and not interpreted:
        raise UnsupportedPoint(f"{package}'s attention kernels need an NVIDIA GPU")
    try:
        return importlib.metadata.version(distribution or package)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def require_table(point: Point, package: str) -> None:
    """UnsupportedPoint unless the physical blocks come from the table: no library computes them."""
    if point["address"] != "table":
        raise UnsupportedPoint(f"{package} takes physical blocks from a table, not by the rule {point['address']!r}")


def incompatible(package: str, version: str, expected: str, error: object) -> UnsupportedPoint:
    """The reason to give where a package is there but not as this provider knows it."""
    return UnsupportedPoint(f"{package} {version} is installed, but this provider expects {expected}: {error}")


def token_rows(inputs: Inputs, sequence: int) -> torch.Tensor:
    """The cache row of each token of a sequence by the block table, [length] int64."""
    block_size = inputs["k_cache"].shape[1]
    tokens = torch.arange(int(inputs["seq_lens"][sequence]), device=inputs["q"].device)
    return inputs["block_tables"][sequence].long()[tokens // block_size] * block_size + tokens % block_size


def starts(counts: torch.Tensor) -> torch.Tensor:
    """Running sums [n + 1] int32, from 0, of counts [n]."""
    sums: torch.Tensor = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
    return sums
