"""The Hopper prefill kernels compute their definition: run on a processor, thread by thread, where no GPU is needed."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

import emulated_cuda
import emulated_sm90
from smbench_kernels import lora_plan, lora_prefill
from smbench_kernels.lora_prefill import Sequences
from smbench_kernels.lora_prefill_kernels import Expand, Shrink
from smbench_kernels.lora_prefill_source import TILES

pytestmark = [
    pytest.mark.skipif(emulated_cuda.COMPILER is None, reason="no C++ compiler: neither g++ nor clang++"),
    pytest.mark.usefixtures("seed"),
]
CPU = torch.device("cpu")
LORAS, SCALE = 3, 0.5
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@dataclass
class Batch:
    """Tokens, the LoRA of each, and how a kernel is told of them."""

    loras: torch.Tensor
    given: Sequences | lora_plan.Plan


def sequences(*lengths: int) -> Batch:
    """Sequences one behind the other, the second without a LoRA."""
    indices = torch.randint(0, LORAS, (len(lengths),), dtype=torch.int32)
    indices[1] = -1
    counts = torch.tensor(lengths, dtype=torch.int32)
    starts = (counts.cumsum(0) - counts).to(torch.int32)
    return Batch(indices.repeat_interleave(counts), Sequences(indices, counts, starts, max(lengths)))


def planned(chunk: int, loras: torch.Tensor) -> Batch:
    """A plan as the device makes it, with garbage where nothing may be read."""
    order = torch.cat([(loras == lora).nonzero().flatten() for lora in (*range(LORAS), -1)]).to(torch.int32)
    plan = lora_plan.Plan.allocate(len(loras), LORAS, chunk, CPU)
    plan.members.fill_(1 << 30)
    place = used = 0
    for lora in range(LORAS):
        mine = order[place : place + int((loras == lora).sum())]
        for tokens in mine.split(chunk) if len(mine) else ():
            neighbours = bool((tokens.diff() == 1).all())
            start = int(tokens[0]) if neighbours else -1
            plan.segments[used] = torch.tensor([place, len(tokens), lora, start])
            plan.members[used, : len(tokens)] = tokens
            place += len(tokens)
            used += 1
    plan.count.fill_(used)
    return Batch(loras, plan)


def mixed(chunk: int) -> Batch:
    """Long sequences, and single tokens of all LoRAs between them."""
    runs = [random.choice((1, 1, 1, 20, 90)) for _ in range(14)]
    return planned(chunk, torch.cat([torch.full((run,), random.randrange(-1, LORAS)) for run in runs]))


def launched(bound: lora_prefill.Bound) -> None:
    """Run a kernel with few buffers, so that all of them are used again."""
    kernel = bound.kernel
    macros = {**kernel.macros, "STAGES": 2}
    emulated_sm90.launch(
        *(TILES + kernel.kernel, kernel.name, macros, bound.grid, kernel.threads, kernel.shared_bytes),
        *(bound.arguments, bound.cluster),
    )


def scattered(chunk: int, *counts: int) -> Batch:
    """So many tokens of each LoRA, then without one, in any order."""
    loras = torch.cat([torch.full((count,), which) for which, count in zip((0, 1, 2, -1), counts, strict=True)])
    return planned(chunk, loras[torch.randperm(len(loras))])


Make = Callable[[], Batch]
SHRINKS: dict[str, tuple[Make, Shrink, int]] = {
    "one block": (lambda: sequences(70, 40, 130), Shrink(64, 8, 1, 1, 1, 1, True, False, torch.bfloat16), 136),
    "columns shared": (lambda: sequences(128, 5, 200), Shrink(128, 19, 1, 4, 2, 1, True, False, torch.float16), 1096),
    "more blocks than columns": (lambda: sequences(10, 3), Shrink(64, 8, 1, 3, 1, 1, True, False, torch.float16), 72),
    "slices of a plan": (lambda: mixed(64), Shrink(64, 5, 3, 3, 1, 2, False, True, torch.float16), 264),
    # ranks in shares of 16 and 8; two blocks have a second piece of the columns
    "sixteen blocks": (
        lambda: scattered(64, 0, 99, 0, 5),
        Shrink(64, 24, 1, 16, 1, 2, True, True, torch.bfloat16, 2),
        1144,
    ),
    # shares of 8, 8 and 3 ranks; most blocks have no columns
    "fewer tokens than a tile": (
        lambda: scattered(128, 3, 0, 41, 7),
        Shrink(128, 19, 1, 12, 2, 1, True, True, torch.float16, 4),
        520,
    ),
}


@pytest.mark.parametrize("case", SHRINKS)
def test_shrink(case: str) -> None:
    make, kernel, hidden = SHRINKS[case]
    batch = make()
    tokens = len(batch.loras)
    with_lora = batch.loras >= 0
    x = torch.randn(tokens, hidden).to(kernel.dtype)
    # what the unused rows of a tile lead to must not matter
    x[~with_lora] = torch.nan
    a = [(torch.randn(LORAS, kernel.rank, hidden) / hidden**0.5).to(kernel.dtype) for _ in range(kernel.slices)]
    out = torch.randn(kernel.slices, tokens, kernel.rank)
    expected = out.double()
    out[:, ~with_lora if kernel.accumulate else slice(None)] = torch.nan
    for which, weights in enumerate(a):
        for lora in range(LORAS):
            rows = (batch.loras == lora).nonzero().flatten()
            change = SCALE * (x[rows].double() @ weights[lora].double().T)
            expected[which, rows] = change + (expected[which, rows] if kernel.accumulate else 0)
    # fewer clusters than tiles: each takes several
    launched(lora_prefill.bound_shrink(kernel, x, a, batch.given, out, SCALE, 2, emulated_sm90.tensor_map))
    assert out[:, ~with_lora].isnan().all(), "a row of a token without a LoRA was written"
    torch.testing.assert_close(out[:, with_lora].double(), expected[:, with_lora], rtol=0, atol=1e-5)


EXPANDS: dict[str, tuple[Make, Expand, tuple[int, ...]]] = {
    "narrow rank": (lambda: sequences(70, 40, 130), Expand(64, 16, 1, 2, 1, False, False, torch.bfloat16), (328,)),
    "rank between": (lambda: sequences(128, 5, 200), Expand(128, 24, 1, 1, 1, False, False, torch.float16), (200,)),
    "rank of three pieces": (lambda: sequences(128, 40), Expand(128, 136, 1, 1, 1, False, False, torch.float16), (72,)),
    "slices of a plan": (lambda: mixed(64), Expand(64, 72, 3, 1, 1, True, True, torch.float16), (264, 72, 40)),
}


@pytest.mark.parametrize("case", EXPANDS)
def test_expand(case: str) -> None:
    make, kernel, outputs = EXPANDS[case]
    batch = make()
    tokens = len(batch.loras)
    h = torch.randn(kernel.slices, tokens, kernel.rank)
    b = [(torch.randn(LORAS, count, kernel.rank) / kernel.rank**0.5).to(kernel.dtype) for count in outputs]
    y = torch.randn(tokens, sum(outputs)).to(kernel.dtype)
    before, expected = y.clone(), y.double()
    begin = 0
    for which, (count, weights) in enumerate(zip(outputs, b, strict=True)):
        for lora in range(LORAS):
            rows = (batch.loras == lora).nonzero().flatten()
            change = h[which, rows].to(kernel.dtype).double() @ weights[lora].double().T
            expected[rows, begin : begin + count] += change
        begin += count
    launched(lora_prefill.bound_expand(kernel, h, b, y, batch.given, 2, 5, emulated_sm90.tensor_map))
    assert torch.equal(y[batch.loras < 0], before[batch.loras < 0])
    torch.testing.assert_close(y.double(), expected, rtol=ROUNDING[kernel.dtype], atol=1e-5)
