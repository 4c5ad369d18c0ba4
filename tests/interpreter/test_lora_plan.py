"""The plan of a LoRA batch: every token once, in order, whatever the LoRAs are; under the interpreter."""

from __future__ import annotations

import pytest
import torch

import lora_plans
from smbench_kernels import lora
from smbench_kernels.lora_plan import Plan, capacity, filler

CPU = torch.device("cpu")


def same(plan: Plan, expected: Plan) -> None:
    used = int(expected.count)
    assert int(plan.count) == used
    assert torch.equal(plan.order, expected.order)
    assert torch.equal(plan.segments[:used], expected.segments[:used])
    assert not plan.segments[used:, 1].any(), "a segment that is not needed has tokens"
    for number, count in enumerate(plan.segments[:used, 1].tolist()):
        assert torch.equal(plan.members[number, :count], expected.members[number, :count])
    assert -1 <= int(plan.members.min()) <= int(plan.members.max()) < plan.tokens


@pytest.mark.parametrize(("tokens", "loras", "chunk"), [(1, 1, 8), (5, 3, 8), (70, 3, 16), (257, 33, 8), (2100, 5, 64)])
def test_every_token_is_in_one_segment_of_its_lora(tokens: int, loras: int, chunk: int, seed: int) -> None:
    plan = Plan.allocate(tokens, loras, chunk, CPU)
    indices = lora.draw_indices(tokens, loras, 0, seed)
    fill = filler(plan, indices)
    # the same plan again: other indices may come with every step
    for without in (tokens // 3, tokens, 0):
        indices.copy_(lora.draw_indices(tokens, loras, without, seed + without))
        fill()
        same(plan, lora_plans.plain(indices, loras, chunk))


def test_sequences_bring_their_tokens_in_order(seed: int) -> None:
    lengths = torch.tensor([3, 0, 40, 1, 1, 17], dtype=torch.int32)
    starts = (lengths.cumsum(0) - lengths).to(torch.int32)
    indices = torch.tensor([2, 0, 1, -1, 2, 1], dtype=torch.int32)
    plan = Plan.allocate(62, 3, 16, CPU)
    filler(plan, indices, starts, lengths)()
    same(plan, lora_plans.plain(torch.repeat_interleave(indices, lengths.long()), 3, 16))


def test_no_indices_need_more_segments_than_a_plan_has(seed: int) -> None:
    """The worst case: every LoRA but one has one token."""
    for tokens, loras, chunk in ((40, 8, 8), (8, 8, 8), (3, 9, 8), (100, 7, 16)):
        used = min(tokens, loras)
        indices = torch.cat([torch.arange(used), torch.zeros(tokens - used)]).to(torch.int32)
        needed = int(lora_plans.plain(indices, loras, chunk).count)
        assert needed <= capacity(tokens, loras, chunk)


def test_indices_that_do_not_fit_are_refused() -> None:
    plan = Plan.allocate(7, 2, 8, CPU)
    with pytest.raises(ValueError, match="3 indices for 7 tokens"):
        filler(plan, torch.zeros(3, dtype=torch.int32))
