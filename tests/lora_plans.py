"""Plans of LoRA batches by plain Python: what the kernel has to fill, and what emulated kernels are given."""

from __future__ import annotations

import torch

from smbench_kernels.lora_plan import Plan


def plain(indices: torch.Tensor, loras: int, chunk: int) -> Plan:
    """The plan of tokens with these LoRAs, on the CPU."""
    plan = Plan.allocate(len(indices), loras, chunk, torch.device("cpu"))
    by_lora = [[token for token, lora in enumerate(indices.tolist()) if lora == wanted] for wanted in range(loras)]
    without = [token for token, lora in enumerate(indices.tolist()) if lora < 0]
    sorted_tokens = [token for tokens in (*by_lora, without) for token in tokens]
    plan.order.copy_(torch.tensor(sorted_tokens, dtype=torch.int32))
    place, number = 0, 0
    for lora, tokens in enumerate(by_lora):
        for begin in range(0, len(tokens), chunk):
            part = tokens[begin : begin + chunk]
            consecutive = part == list(range(part[0], part[0] + len(part)))
            facts = (place + begin, len(part), lora, part[0] if consecutive else -1)
            plan.segments[number] = torch.tensor(facts, dtype=torch.int32)
            plan.members[number, : len(part)] = torch.tensor(part, dtype=torch.int32)
            number += 1
        place += len(tokens)
    plan.count.fill_(number)
    return plan
