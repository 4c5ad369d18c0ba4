"""The work list of a batch: tokens sorted by LoRA and cut into segments. Owns its form and the kernels that fill it.

An engine needs it once per step, for all layers, so that filling it is no part of a timed call; it is enqueued like
any kernel, synchronizes nothing and can be captured, so that LoRA indices may change between replays of a graph. No
float is touched and no order is left to chance: the same indices give the same plan.

One program for each LoRA and one for the tokens without: each counts all indices, which tells where its own tokens
begin, then writes those in their order. Tokens of sequences get their indices by a first kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton.language as tl

from smbench_kernels.launch import Call, Launcher, ceil_div, jit, next_power_of_two

BLOCK = 1024
"""Indices that a program looks at together."""
FACTS = 4
"""Numbers of a segment, see `Plan.segments`."""


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """Segments of at most `chunk` tokens with one LoRA. All tensors are int32, on one device."""

    tokens: int
    loras: int
    chunk: int
    order: torch.Tensor
    """[tokens]: tokens sorted stably by LoRA, those without one last."""
    segments: torch.Tensor
    """[capacity, 4]: place of the first token in `order`; tokens, 0 for a segment that is not needed; LoRA; the first
    token if the segment's tokens are consecutive numbers, else -1."""
    members: torch.Tensor
    """[capacity, chunk]: the tokens of a segment, for kernels that can't wait for two loads; beyond its tokens any
    number from -1 to tokens - 1."""
    count: torch.Tensor
    """[1]: segments that are needed; they come first."""

    @property
    def capacity(self) -> int:
        """Most segments that any indices need, and so the size of a grid."""
        return len(self.segments)

    @classmethod
    def allocate(cls, tokens: int, loras: int, chunk: int, device: torch.device) -> Plan:
        """An empty plan: no segment is needed."""
        most = capacity(tokens, loras, chunk)
        return cls(
            tokens,
            loras,
            chunk,
            torch.arange(tokens, dtype=torch.int32, device=device),
            torch.zeros((most, FACTS), dtype=torch.int32, device=device),
            torch.full((most, chunk), -1, dtype=torch.int32, device=device),
            torch.zeros(1, dtype=torch.int32, device=device),
        )


def capacity(tokens: int, loras: int, chunk: int) -> int:
    """Most segments that tokens of so many LoRAs can need: whole ones, and one more for each LoRA that has a rest."""
    rests = min(loras, tokens)
    # a rest takes at least one token
    return max(1, rests + (tokens - rests) // chunk)


@jit(do_not_specialize=["tokens"])
def _spread(
    token_loras_ptr: tl.tensor,
    indices_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    lengths_ptr: tl.tensor,
    tokens: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """The LoRA of each token, by its sequence."""
    sequence = tl.program_id(0)
    lora = tl.load(indices_ptr + sequence)
    start = tl.load(starts_ptr + sequence)
    length = tl.load(lengths_ptr + sequence)
    for begin in range(0, length, BLOCK):
        place = begin + tl.arange(0, BLOCK)
        token = start + place
        tl.store(
            token_loras_ptr + token, tl.full([BLOCK], 0, tl.int32) + lora, mask=(place < length) & (token < tokens)
        )


@jit(do_not_specialize=["tokens", "loras", "capacity"])
def _fill(
    token_loras_ptr: tl.tensor,
    order_ptr: tl.tensor,
    segments_ptr: tl.tensor,
    members_ptr: tl.tensor,
    count_ptr: tl.tensor,
    tokens: tl.tensor,
    loras: tl.tensor,
    capacity: tl.tensor,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
) -> None:
    # the last program has the tokens without a LoRA
    mine = tl.program_id(0)
    bins = tl.arange(0, BINS)
    inside = tl.arange(0, BLOCK)
    counts = tl.zeros([BINS], dtype=tl.int32)
    for begin in range(0, tokens, BLOCK):
        lora = tl.load(token_loras_ptr + begin + inside, mask=begin + inside < tokens, other=-1)
        counts += tl.histogram(tl.where(lora < 0, loras, lora), BINS)
    # this one also counted what is past the end, and is the last: nobody comes after it
    own = tl.sum(tl.where(bins == mine, counts, 0), axis=0)
    first = tl.sum(tl.where(bins < mine, counts, 0), axis=0)
    needed = tl.where(bins < loras, (counts + CHUNK - 1) // CHUNK, 0)
    base = tl.sum(tl.where(bins < mine, needed, 0), axis=0)

    done = first * 0
    for begin in range(0, tokens, BLOCK):
        token = begin + inside
        lora = tl.load(token_loras_ptr + token, mask=token < tokens, other=loras + 1)
        same = tl.where(lora < 0, loras, lora) == mine
        place = done + tl.cumsum(same.to(tl.int32), axis=0) - 1
        tl.store(order_ptr + first + place, token, mask=same)
        tl.store(members_ptr + (base + place // CHUNK) * CHUNK + place % CHUNK, token, mask=same & (mine < loras))
        done += tl.sum(same.to(tl.int32), axis=0)
    # what other threads of this program stored is read below
    tl.debug_barrier()

    if mine < loras:
        for begin in range(0, (own + CHUNK - 1) // CHUNK, BLOCK):
            number = begin + inside
            ok = number * CHUNK < own
            size = tl.minimum(own - number * CHUNK, CHUNK)
            start = tl.load(order_ptr + first + number * CHUNK, mask=ok, other=0)
            end = tl.load(order_ptr + first + number * CHUNK + size - 1, mask=ok, other=0)
            at = segments_ptr + (base + number) * 4
            tl.store(at, first + number * CHUNK, mask=ok)
            tl.store(at + 1, size, mask=ok)
            tl.store(at + 2, tl.zeros([BLOCK], dtype=tl.int32) + mine, mask=ok)
            tl.store(at + 3, tl.where(end - start == size - 1, start, -1), mask=ok)
    else:
        tl.store(count_ptr, base)
        for begin in range(0, capacity, BLOCK):
            number = begin + inside
            surplus = (number >= base) & (number < capacity)
            for fact in tl.static_range(4):
                tl.store(segments_ptr + number * 4 + fact, tl.zeros([BLOCK], dtype=tl.int32), mask=surplus)


def filler(
    plan: Plan,
    indices: torch.Tensor,
    seq_starts: torch.Tensor | None = None,
    seq_lens: torch.Tensor | None = None,
) -> Callable[[], None]:
    """A function that enqueues filling the plan from the indices as they are then.

    `indices` int32: a LoRA for each of the plan's tokens, or for each sequence, of which `seq_starts` and `seq_lens`
    (int32, as many) then tell the tokens; -1 is none, and no index may be beyond the plan's LoRAs. ValueError where the
    numbers do not fit together.
    """
    token_loras, steps = indices, []
    if seq_lens is not None and seq_starts is not None:
        token_loras = torch.full((plan.tokens,), -1, dtype=torch.int32, device=indices.device)
        block = min(BLOCK, next_power_of_two(ceil_div(plan.tokens, max(1, len(indices)))))
        arguments = (token_loras, indices, seq_starts, seq_lens, plan.tokens, block)
        steps.append(Launcher(Call(_spread, (len(indices), 1, 1), arguments, {"num_warps": 4})))
    elif len(indices) != plan.tokens:
        raise ValueError(f"{len(indices)} indices for {plan.tokens} tokens need seq_starts and seq_lens")
    steps.append(Launcher(fill_call(plan, token_loras)))

    def fill() -> None:
        for step in steps:
            step()

    return fill


def fill_call(plan: Plan, token_loras: torch.Tensor) -> Call:
    """The launch that fills a plan from the LoRA of each token."""
    tensors = (token_loras, plan.order, plan.segments, plan.members, plan.count)
    numbers = (plan.tokens, plan.loras, plan.capacity)
    constants = (plan.chunk, min(BLOCK, next_power_of_two(plan.tokens)), next_power_of_two(plan.loras + 1))
    return Call(_fill, (plan.loras + 1, 1, 1), (*tensors, *numbers, *constants), {"num_warps": 4})
