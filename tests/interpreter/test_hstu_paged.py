"""The paged HSTU kernels compute their definition in every region of the mask, whatever lies around it."""

from __future__ import annotations

import random
import sys

import pytest
import torch

from smbench_kernels import hstu
from smbench_kernels import hstu_paged_attention as paged
from smbench_kernels.hstu_block import layer_by_kernels
from smbench_kernels.hstu_paged import PagedBatch, append_reference, paged_attention_reference
from smbench_kernels.op import Config

SMALL: Config = {"ROWS": 16, "COLUMNS": 16, "STAGES": 1, "WARPS": 4}
WIDE: Config = {"ROWS": 32, "COLUMNS": 16, "STAGES": 2, "WARPS": 4}
# (cached, new, candidates) of each sequence
CASES: dict[str, list[tuple[int, int, int]]] = {
    "cached, new and candidates": [(37, 9, 5), (64, 16, 16)],
    "no cache": [(0, 20, 4), (0, 1, 0)],
    "candidates only": [(33, 0, 17)],
    "new only": [(16, 33, 0), (5, 1, 0)],
    "nothing at all": [(0, 0, 0), (7, 3, 2), (0, 0, 3)],
    "padding at the end": [(20, 4, 3), (0, 0, 0)],
}


@pytest.fixture
def generator() -> torch.Generator:
    seed = random.randrange(2**31)
    sys.stderr.write(f"seed {seed}\n")
    return torch.Generator().manual_seed(seed)


def batch_of(sequences: list[tuple[int, int, int]], page_size: int, generator: torch.Generator) -> PagedBatch:
    """Histories in pages of random order among pages of nobody."""
    totals = [cached + new for cached, new, _ in sequences]
    counts = [-(-total // page_size) for total in totals]
    rows = [new + targets for _, new, targets in sequences]
    ids = torch.randperm(sum(counts) + 3, generator=generator)[: sum(counts)].int()
    return PagedBatch(
        torch.tensor([0, *rows]).cumsum(0).int(),
        torch.tensor([targets for *_, targets in sequences], dtype=torch.int32),
        torch.tensor(totals, dtype=torch.int32),
        torch.tensor([0, *counts]).cumsum(0).int(),
        torch.cat([ids, torch.zeros(1, dtype=torch.int32)]),
        page_size,
        max(max(rows), 1),
        128,
    )


def uvqk_of(rows: int, heads: int, head_dim: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """[rows + 2, 4 * heads * head_dim]: the last rows belong to no sequence and are no numbers."""
    uvqk = torch.randn((rows + 2, 4 * heads * head_dim), generator=generator)
    uvqk[rows:] = torch.nan
    return uvqk.to(dtype)


def check(
    sequences: list[tuple[int, int, int]],
    generator: torch.Generator,
    page_size: int = 8,
    heads: int = 2,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float16,
    config: Config = SMALL,
) -> None:
    batch = batch_of(sequences, page_size, generator)
    rows = int(batch.offsets[-1])
    uvqk = uvqk_of(rows, heads, head_dim, dtype, generator)
    _, v, q, k = (part.unflatten(1, (heads, head_dim)) for part in uvqk.split(heads * head_dim, dim=1))
    pages = int(batch.page_offsets[-1]) + 3
    truth = torch.full((pages, 2, page_size, heads, head_dim), torch.nan)
    for (cached, _, _), sequence in zip(sequences, batch.sequences(), strict=True):
        token = torch.arange(cached)
        at = batch.page_ids[sequence.first_page + token // page_size].long()
        truth[at, :, token % page_size] = torch.randn((cached, 2, heads, head_dim), generator=generator)
    cache = truth.to(dtype)
    truth = cache.double()

    append_reference(truth, k.double(), v.double(), batch)
    paged.append(cache, k, v, batch)
    # every page bit by bit, the rows of nobody included
    assert torch.equal(cache.double().nan_to_num(7.0), truth.nan_to_num(7.0))

    alpha = head_dim**-0.5
    expected = paged_attention_reference(q.double(), k.double(), v.double(), truth, batch, alpha)
    out = torch.full(q.shape, torch.nan, dtype=dtype)
    paged.attend(q, k, v, cache, batch, alpha, out, config)
    assert out[rows:].isnan().all(), "a row of no sequence was written"
    error = (out[:rows].double() - expected[:rows]).norm()
    bound = 2e-3 if dtype == torch.float16 else 1e-2
    assert error <= bound * expected[:rows].norm()


@pytest.mark.parametrize("case", CASES)
def test_every_region_of_the_mask(case: str, generator: torch.Generator) -> None:
    check(CASES[case], generator)


@pytest.mark.parametrize("page_size", [1, 3, 32, 128])
def test_every_page_size(page_size: int, generator: torch.Generator) -> None:
    check([(37, 9, 5), (3, 20, 2)], generator, page_size=page_size)


@pytest.mark.parametrize("head_dim", [8, 48, 64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_head_sizes_and_types(head_dim: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    check([(37, 9, 5), (3, 20, 2)], generator, heads=3, head_dim=head_dim, dtype=dtype, config=WIDE)


@pytest.mark.parametrize("splits", [2, 5])
@pytest.mark.parametrize("case", CASES)
def test_histories_cut_into_ranges(case: str, splits: int, generator: torch.Generator) -> None:
    """With more ranges than tiles too, and masked tiles in several of them."""
    check(CASES[case], generator, config={**SMALL, "SPLITS": splits})


def test_ranges_add_up_alike_every_time(generator: torch.Generator) -> None:
    batch = batch_of([(150, 4, 30)], 8, generator)
    q, k, v = (torch.randn((34, 1, 16), generator=generator).half() for _ in range(3))
    cache = torch.randn((23, 2, 8, 1, 16), generator=generator).half()
    found = [paged.attend(q, k, v, cache, batch, 0.25, config={**SMALL, "SPLITS": 3}) for _ in range(2)]
    assert torch.equal(*found)


def test_ranges_fill_a_card_that_few_rows_leave_idle() -> None:
    assert paged.default_splits(24, 132) == 5
    assert paged.default_splits(192, 132) == 2
    # two waves and more
    assert paged.default_splits(264, 132) == paged.default_splits(2176, 132) == 1
    assert 1 < paged.default_splits(1, 132) <= paged.MOST_SPLITS


def test_what_is_cached_is_attended_to(generator: torch.Generator) -> None:
    """The fault of the published benchmark: a kernel that takes the history for as long as what is new."""
    batch = batch_of([(40, 4, 3)], 8, generator)
    q, k, v = (torch.randn((7, 1, 16), generator=generator).half() for _ in range(3))
    cache = torch.randn((9, 2, 8, 1, 16), generator=generator).half()
    paged.append(cache, k, v, batch)
    before = paged.attend(q, k, v, cache, batch, 0.25, config=SMALL).clone()
    cache[int(batch.page_ids[0]), 1] += 1
    after = paged.attend(q, k, v, cache, batch, 0.25, config=SMALL)
    assert (after != before).flatten(1).any(dim=1).all(), "a row did not follow the first page"


def test_a_layer_by_kernels_is_the_layer(generator: torch.Generator) -> None:
    """The very calls that a card makes, on a processor: everything around the attention, and the attention."""
    shape = hstu.Shape(embedding=32, heads=2, head_dim=16)
    batch = batch_of([(20, 9, 5), (0, 7, 3)], 8, generator)
    rows = int(batch.offsets[-1])
    params = hstu.parameters(shape, 3, torch.device("cpu"), torch.float16)
    x = torch.randn((rows, shape.embedding), generator=generator).half()
    cache = torch.randn((int(batch.page_offsets[-1]) + 3, 2, 8, 2, 16), generator=generator).half()
    truth = cache.double()

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        paged.append(cache, k, v, batch)
        return paged.attend(q, k, v, cache, batch, shape.alpha, config=SMALL)

    def attend_exactly(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        append_reference(truth, k, v, batch)
        return paged_attention_reference(q, k, v, truth, batch, shape.alpha)

    y = layer_by_kernels(x, params, shape, attend)
    exact = {name: value.double() for name, value in params.items()}
    expected = hstu.layer_around(x.double(), exact, shape, attend_exactly)
    assert (y.double() - expected).norm() <= 5e-3 * expected.norm()
