"""The paged HSTU kernels compile for every architecture: default configurations, shared memory, no spills."""

from __future__ import annotations

import sys

import pytest
import torch

from smbench_kernels import hardware
from smbench_kernels import hstu_paged_attention as paged
from smbench_kernels.compile import compile_for, resources
from smbench_kernels.hstu_graphs import PaddedShape, empty_batch
from smbench_kernels.hstu_paged import PagedBatch
from smbench_kernels.launch import Call

CPU = torch.device("cpu")
TOKENS, HEADS, MAX_SEQLEN = 64, 4, 4352


def batch_of(page_size: int, rows: int) -> PagedBatch:
    return empty_batch(PaddedShape(8, rows), page_size, MAX_SEQLEN, CPU)


def tensors(head_dim: int, page_size: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """v, q, k as views of one tensor, as in a layer, and a cache."""
    vqk = torch.empty(TOKENS, 3 * HEADS * head_dim, dtype=dtype)
    cache = torch.empty(16, 2, page_size, HEADS, head_dim, dtype=dtype)
    return *(part.unflatten(1, (HEADS, head_dim)) for part in vqk.split(HEADS * head_dim, 1)), cache


def attend_call(
    head_dim: int,
    capability: int,
    page_size: int = 32,
    rows: int = 384,
    dtype: torch.dtype = torch.bfloat16,
    splits: int = 1,
) -> Call:
    v, q, k, cache = tensors(head_dim, page_size, dtype)
    out = torch.empty(TOKENS, HEADS, head_dim, dtype=dtype if splits == 1 else torch.float32)
    config = {**paged.default_config(head_dim, rows, capability), "SPLITS": splits}
    return paged.attend_call(q, k, v, cache, out, batch_of(page_size, rows), head_dim**-0.5, config)


@pytest.mark.parametrize(
    ("capability", "head_dim"),
    [(80, 64), (80, 128), (80, 256), (86, 256), (89, 128), (89, 256), (90, 64), (90, 128), (90, 256)],
)
def test_default_configurations_spill_nothing(capability: int, head_dim: int) -> None:
    compiled = compile_for(attend_call(head_dim, capability), capability)
    found = resources(compiled)
    sys.stderr.write(f"{capability} {head_dim} {found.shared_bytes} {found.registers} {found.stack_bytes}\n")
    assert found.shared_bytes <= hardware.TYPICAL[capability].shared_bytes_per_program
    assert found.stack_bytes == 0
    if capability == 90:
        assert "wgmma.mma_async" in compiled.asm["ptx"]


@pytest.mark.parametrize("capability", [80, 89, 90])
def test_histories_cut_into_ranges_spill_nothing(capability: int) -> None:
    found = resources(compile_for(attend_call(256, capability, splits=5), capability))
    sums, out = torch.empty(5, TOKENS, HEADS, 256), torch.empty(TOKENS, HEADS, 256, dtype=torch.bfloat16)
    adding = resources(compile_for(paged.combine_call(sums, out, batch_of(32, 384)), capability))
    sys.stderr.write(f"{capability} attend {found.registers} {found.stack_bytes}, combine {adding.registers}\n")
    assert (found.stack_bytes, adding.stack_bytes) == (0, 0)


@pytest.mark.parametrize("page_size", [16, 128])
def test_other_pages_spill_nothing(page_size: int) -> None:
    found = resources(compile_for(attend_call(256, 90, page_size=page_size), 90))
    assert found.stack_bytes == 0


def test_padded_heads_and_float16_compile() -> None:
    assert resources(compile_for(attend_call(80, 90, dtype=torch.float16), 90)).stack_bytes == 0


@pytest.mark.parametrize("capability", [80, 86, 89, 90])
def test_appending_needs_no_shared_memory(capability: int) -> None:
    v, _, k, cache = tensors(256, 32, torch.bfloat16)
    found = resources(compile_for(paged.append_call(cache, k, v, batch_of(32, 384)), capability))
    assert (found.shared_bytes, found.stack_bytes) == (0, 0)


def test_rows_are_bounded_by_what_a_sequence_has() -> None:
    assert paged.default_config(64, 20, 90)["ROWS"] == 32
    assert paged.default_config(256, 4352, 90) == {"ROWS": 64, "COLUMNS": 64, "STAGES": 2, "WARPS": 8}
    # a card with less memory for a program
    assert paged.default_config(256, 4352, 86)["COLUMNS"] == 32
