"""Search space and time model of lora_linear by our kernels. Owns no launch; `lora_linear_own` says what is chosen.

A pair of launches has too many configurations to try all, so that a search goes in steps: shrink's, each with the
expand that the model likes best, then expand's for the best shrink and shrink's for the best expand, in turns.
"""

from __future__ import annotations

from collections.abc import Mapping

from smbench_kernels import hardware, lora_decode_space, lora_prefill, lora_prefill_space
from smbench_kernels.launch import ceil_div
from smbench_kernels.lora_decode import Shape
from smbench_kernels.lora_linear import LinearSizes
from smbench_kernels.lora_prefill_kernels import COLUMNS, Expand, Shrink
from smbench_kernels.op import Config, Point
from smbench_kernels.own import KERNEL

FUSED, PAIR, PREFILL = 2, 3, 4
"""Values of KERNEL."""
MOST_DECODE, MOST_MIXED = 256, 128
"""Tokens of a LoRA up to which the decode kernels are tried, and with sequences that prefill among them."""
LEAST_PREFILL = 16
"""Tokens of a LoRA from which those of `lora_prefill` are tried."""
PAIRS, CROSSED = 24, 7
"""Configurations of shrink that a search tries, and how many of both parts it tries with each other."""
OVERLAP_S = 1.3e-6
"""What the second of two launches saves by starting early: its launch and part of its first loads."""
NEIGHBOURS = 4
"""Tokens of a sequence from which most of its rows have neighbours."""
BOX_S, ROWS_OF_WARP = 50e-9, 32
"""Asking for a row of 64 columns by itself (H200, NOTES-lora-prefill.md), and how many of a tile one warp asks for."""
PREFIX = "E_"
FACTS = hardware.TYPICAL[90].facts()


def shape_of(sizes: LinearSizes, capability: int = 90) -> Shape:
    """What the decode kernels are compiled for."""
    return Shape(
        tokens=sizes.tokens,
        hidden=sizes.hidden,
        rank=sizes.rank,
        outputs=sizes.outputs,
        loras=sizes.loras,
        bfloat16=str(sizes.dtype) == "torch.bfloat16",
        clusters=capability >= 90,
    )


def expand_part(config: Config) -> Config:
    """The configuration of expand in that of a pair."""
    return {name.removeprefix(PREFIX): value for name, value in config.items() if name.startswith(PREFIX)}


def joined(shrink: Config, expand: Config) -> Config:
    """The configuration of a pair."""
    return {KERNEL: PAIR, **shrink, **{PREFIX + name: value for name, value in expand.items()}}


def space(point: Point) -> list[Config]:
    """Everything in one launch, pairs with one expand each, and the prefill kernels, by tokens of a LoRA."""
    sizes = LinearSizes.of(point)
    shape = shape_of(sizes)
    each = shape.tokens / min(shape.tokens, shape.loras)
    found: list[Config] = []
    if each >= LEAST_PREFILL:
        found += _prefill_space(sizes)
    if each <= (MOST_DECODE if set(sizes.lengths) == {1} else MOST_MIXED) or not found:
        found += [{KERNEL: FUSED, **config} for config in lora_decode_space.fused_space(shape)]
        expand = _expands(shape)[0]
        found += [joined(shrink, expand) for shrink in _likeliest_shrinks(shape)]
    return found


def refine(point: Point, config: Config) -> list[Config]:
    """What differs in one part: the expands for a pair's or the prefill kernels' shrink, the shrinks for its expand.

    One launch has no parts: the likeliest pairs stand against it, each of some shrinks with each of some expands.
    """
    if config[KERNEL] == PREFILL:
        return [
            {KERNEL: PREFILL, **other} for other in lora_prefill_space.around(_problem(LinearSizes.of(point)), config)
        ]
    shape = shape_of(LinearSizes.of(point))
    shrinks, expands = _likeliest_shrinks(shape), _expands(shape)
    if config[KERNEL] == FUSED:
        return [joined(shrink, expand) for shrink in shrinks[:CROSSED] for expand in expands[:CROSSED]]
    mine = {name: value for name, value in config.items() if name != KERNEL and not name.startswith(PREFIX)}
    found = [joined(mine, expand) for expand in expands]
    return found + [pair for shrink in shrinks if (pair := joined(shrink, expand_part(config))) not in found]


def _likeliest_shrinks(shape: Shape) -> list[Config]:
    found = lora_decode_space.shrink_space(shape)
    return sorted(found, key=lambda config: lora_decode_space.shrink_seconds(shape, config, FACTS))[:PAIRS]


def _expands(shape: Shape) -> list[Config]:
    """All of them, the likeliest first."""
    found = lora_decode_space.expand_space(shape)
    return sorted(found, key=lambda config: lora_decode_space.expand_seconds(shape, config, FACTS))


def predict(point: Point, config: Config, device: Mapping[str, float]) -> float:
    """Modelled seconds of one call."""
    sizes = LinearSizes.of(point)
    shape = shape_of(sizes, int(device.get("capability", 90)))
    if config[KERNEL] == FUSED:
        return lora_decode_space.fused_seconds(shape, config, device)
    if config[KERNEL] == PAIR:
        shrink = lora_decode_space.shrink_seconds(shape, config, device)
        overlap = OVERLAP_S if shape.clusters else 0.0
        return shrink + lora_decode_space.expand_seconds(shape, expand_part(config), device) - overlap
    return _prefill_seconds(sizes, config, device)


def prefill_kernels(sizes: LinearSizes, config: Config) -> tuple[Shrink, Expand]:
    """The two kernels of `lora_prefill`. DoesNotFit, as their `stages` do."""
    problem = _problem(sizes)
    return problem.shrink(config), problem.expand(lora_prefill.expand_config(config))


def _problem(sizes: LinearSizes) -> lora_prefill_space.Problem:
    used = min(sizes.loras, len(sizes.lengths))
    return lora_prefill_space.over_plan(
        sizes.tokens, sizes.hidden, sizes.rank, sizes.outputs, used, sizes.dtype, dependent=True
    )


def _prefill_space(sizes: LinearSizes) -> list[Config]:
    if lora_prefill.unsupported(sizes.hidden, sizes.rank, sizes.outputs, 90):
        return []
    return [{KERNEL: PREFILL, **config} for config in lora_prefill_space.linear_space(_problem(sizes), FACTS)]


def _prefill_seconds(sizes: LinearSizes, config: Config, device: Mapping[str, float]) -> float:
    problem, shrink, expand = _problem(sizes), config, lora_prefill.expand_config(config)
    sms = int(device["sm_count"])
    # tokens that decode have no neighbours of the same LoRA: each of the warps that copy asks for their rows one by one
    alone = sum(length for length in sizes.lengths if length < NEIGHBOURS)
    each = ceil_div(alone, min(problem.used_loras, max(1, alone)))
    rows_s = BOX_S * min(ROWS_OF_WARP, each)
    tiles, cluster = problem.tiles(shrink["TOKENS"]), shrink["CLUSTER"]
    rounds = ceil_div(tiles, max(1, sms * shrink["PER_SM"] // cluster))
    asking_s = rows_s * ceil_div(sizes.hidden, COLUMNS * cluster) * rounds
    shrink_s = max(lora_prefill_space.shrink_seconds(problem, shrink, device), asking_s)
    scattered = min(tiles, problem.used_loras * ceil_div(each, shrink["TOKENS"]))
    asking_s = rows_s * scattered * sum(sizes.outputs) / COLUMNS / (sms * expand["PER_SM"])
    expand_s = max(lora_prefill_space.expand_seconds(problem, expand, device), asking_s)
    return shrink_s + expand_s - OVERLAP_S
