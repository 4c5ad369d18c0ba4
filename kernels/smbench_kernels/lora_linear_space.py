"""Search space and time model of lora_linear by our kernels. Owns no launch; `lora_linear_own` says what is chosen.

A pair of launches has too many configurations to try all, so that a search goes in steps: shrink's, each with the
expand that the model likes best, then expand's for the best shrink and shrink's for the best expand, in turns. The
first space has the decode kernels alone that load ahead; what else a pair may end with (`lora_linear_expands`) is tried
around the winner, a few of each at first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from smbench_kernels import lora_decode_space, lora_prefill, lora_prefill_space
from smbench_kernels.launch import ceil_div
from smbench_kernels.lora_decode import FUSED_RANK, Shape
from smbench_kernels.lora_decode_ops import LOWEST
from smbench_kernels.lora_linear import LinearSizes
from smbench_kernels.lora_linear_expands import AHEAD, EXPANDS, FACTS, WIDE, PairedExpand, expand_of
from smbench_kernels.lora_linear_shapes import LEAST_PREFILL, asking_s, problem_of, shape_of, tokens_of_lora
from smbench_kernels.lora_prefill_kernels import CAPABILITY, COLUMNS, Expand, Shrink
from smbench_kernels.op import Config, Point
from smbench_kernels.own import KERNEL

FUSED, PAIR, PREFILL = 2, 3, WIDE
"""Values of KERNEL. The kernels of `lora_prefill` have the same as where expand alone is one of them."""
MOST_DECODE, MOST_MIXED = 256, 128
"""Tokens of a LoRA up to which the decode kernels are tried, and with sequences that prefill among them."""
PAIRS = 24
"""Configurations of shrink that a search tries at first, and as many around a pair."""
CROSSED, FARTHER = (4, 7), 21
"""Shrinks and expands that are tried with each other against one launch, and how many less likely shrinks."""
OTHERS, CROSSED_OTHERS = 4, (2, 2)
"""Expands of each other kind that are tried for the shrink of a pair, and how many of both parts with each other."""
PREFIX = "E_"


def shrink_part(config: Config) -> Config:
    """The configuration of shrink in that of a pair; all of it where one launch or `lora_prefill` has both."""
    return {name: value for name, value in config.items() if name != KERNEL and not name.startswith(PREFIX)}


def expand_part(config: Config) -> Config:
    """The configuration of expand in that of a pair, as `lora_linear_expands` has it."""
    return {name.removeprefix(PREFIX): value for name, value in config.items() if name.startswith(PREFIX)}


def joined(shrink: Config, expand: Config) -> Config:
    """The configuration of a pair."""
    return {KERNEL: PAIR, **shrink, **{PREFIX + name: value for name, value in expand.items()}}


def space(point: Point) -> list[Config]:
    """Everything in one launch, pairs with one expand each, and the prefill kernels, by tokens of a LoRA."""
    sizes = LinearSizes.of(point)
    shape, each = shape_of(sizes), tokens_of_lora(sizes)
    found: list[Config] = []
    if each >= LEAST_PREFILL:
        found += _prefill_space(sizes)
    if each <= (MOST_DECODE if set(sizes.lengths) == {1} else MOST_MIXED) or not found:
        found += [{KERNEL: FUSED, **config} for config in lora_decode_space.fused_space(shape)]
        expand = EXPANDS[AHEAD].space(point)[0]
        found += [joined(shrink, expand) for shrink in _likeliest_shrinks(shape)]
    return found


def refine(point: Point, config: Config) -> list[Config]:
    """What differs in one part: the expands for a pair's or the prefill kernels' shrink, the shrinks for its expand.

    The expands for a pair are all of the kind that it has and the likeliest of each other kind, the same numbers first;
    the shrinks those that differ in one thing, then the likeliest. One launch has no parts: pairs stand against it,
    some likely shrinks with some likely expands, and shrinks that the first space left out.
    """
    if config[KERNEL] == PREFILL:
        problem = problem_of(LinearSizes.of(point))
        return [{KERNEL: PREFILL, **other} for other in lora_prefill_space.around(problem, config)]
    shape = shape_of(LinearSizes.of(point))
    if config[KERNEL] == FUSED:
        return _pairs_against_one(point, shape)
    mine, part = shrink_part(config), expand_part(config)
    own = expand_of(part)
    found = [joined(mine, expand) for expand in own.space(point)]
    found += [joined(shrink, part) for shrink in _likeliest_shrinks(shape, mine)]
    for kind in EXPANDS.values():
        found += [joined(mine, expand) for expand in _nearest(kind, point, part)] if kind is not own else []
    return _once(found)


def admits(point: Point, config: Config) -> bool:
    """Whether a search may end with a configuration: it is one of the space or of what refining leads to."""
    sizes = LinearSizes.of(point)
    number = config.get(KERNEL)
    if number == FUSED:
        return shrink_part(config) in lora_decode_space.fused_space(shape_of(sizes))
    if number == PREFILL and not _no_prefill(sizes, CAPABILITY):
        return shrink_part(config) in _every_prefill(sizes)
    part = expand_part(config)
    if number != PAIR or part.get(KERNEL, AHEAD) not in EXPANDS or part not in expand_of(part).space(point):
        return False
    return shrink_part(config) in lora_decode_space.shrink_space(shape_of(sizes))


def unsupported(point: Point, config: Config, capability: int) -> str | None:
    """Why a card of this capability cannot run a point with a configuration of the CUDA kernels, or None."""
    if capability < LOWEST:
        return f"the CUDA C++ kernels need compute capability {LOWEST / 10}, not {capability / 10}"
    sizes = LinearSizes.of(point)
    if config[KERNEL] == PAIR:
        return expand_of(expand_part(config)).unsupported(point, capability)
    if config[KERNEL] == PREFILL:
        return _no_prefill(sizes, capability)
    if capability != CAPABILITY:
        return f"one launch for both needs compute capability {CAPABILITY / 10}, not {capability / 10}"
    return f"one launch for both takes ranks up to {FUSED_RANK}, not {sizes.rank}" if sizes.rank > FUSED_RANK else None


def fitted(config: Config) -> bool:
    """Whether the model was fitted to times of such configurations, so that a default may be chosen by it."""
    return config[KERNEL] != PAIR or expand_of(expand_part(config)).fitted


def predict(point: Point, config: Config, device: Mapping[str, float]) -> float:
    """Modelled seconds of one call; infinite where the device cannot run it.

    A pair takes what its shrink takes alone and what its expand adds to that: `lora_linear_expands` says what is
    modelled of each kind, and what of that was never measured.
    """
    capability = int(device.get("capability", CAPABILITY))
    if unsupported(point, config, capability):
        return float("inf")
    sizes = LinearSizes.of(point)
    shape = shape_of(sizes, capability)
    if config[KERNEL] == FUSED:
        return lora_decode_space.fused_seconds(shape, config, device)
    if config[KERNEL] == PAIR:
        part = expand_part(config)
        return lora_decode_space.shrink_seconds(shape, config, device) + expand_of(part).predict(point, part, device)
    return _prefill_seconds(point, config, device)


def prefill_kernels(sizes: LinearSizes, config: Config) -> tuple[Shrink, Expand]:
    """The two kernels of `lora_prefill`. DoesNotFit, as their `stages` do."""
    problem = problem_of(sizes)
    return problem.shrink(config), problem.expand(lora_prefill.expand_config(config))


def _pairs_against_one(point: Point, shape: Shape) -> list[Config]:
    shrinks, found = _ranked_shrinks(shape), []
    for number, kind in EXPANDS.items():
        first, many = CROSSED if number == AHEAD else CROSSED_OTHERS
        expands = kind.space(point)[:many]
        found += [joined(shrink, expand) for shrink in shrinks[:first] for expand in expands]
    # the model may be wrong about a whole kind of blocks, of which the first space then had none
    blocks = {(one["CHUNK"], one["TILES"], one["WARPS"]): one for one in reversed(shrinks[PAIRS:])}
    farther = [shrink for shrink in shrinks[PAIRS:] if shrink in blocks.values()][:FARTHER]
    return found + [joined(shrink, EXPANDS[AHEAD].space(point)[0]) for shrink in farther]


def _likeliest_shrinks(shape: Shape, around: Config | None = None) -> list[Config]:
    """The likeliest; what differs from one of them in one thing comes first, since the tuned shrink may be farther off.

    On an H200 the tuned shrink of bgmv_shrink was among the 24 likeliest at 152 of 198 points of a layer's sizes, and
    at 40 more in one thing different from one of these.
    """
    found = _ranked_shrinks(shape)
    if around is not None:
        found.sort(key=lambda config: not _neighbours(config, around))
    return found[:PAIRS]


def _ranked_shrinks(shape: Shape) -> list[Config]:
    found = lora_decode_space.shrink_space(shape)
    return sorted(found, key=lambda config: lora_decode_space.shrink_seconds(shape, config, FACTS))


def _neighbours(one: Config, other: Config) -> bool:
    """Whether two configurations of shrink differ in one thing; how loads are under way is one, of two numbers."""
    names = {name for name in {*one, *other} if one.get(name, 0) != other.get(name, 0)}
    return len(names) == 1 or names == {"STAGES", "STEPS"}


def _nearest(kind: PairedExpand, point: Point, part: Config) -> list[Config]:
    """The likeliest of a kind, first of all what differs from an expand of another kind in nothing else."""
    same = {name: value for name, value in part.items() if name != KERNEL}

    def differs(config: Config) -> bool:
        return {name: value for name, value in config.items() if name != KERNEL} != same

    return sorted(kind.space(point), key=differs)[:OTHERS]


def _once(found: Iterable[Config]) -> list[Config]:
    return list({tuple(sorted(config.items())): config for config in found}.values())


def _no_prefill(sizes: LinearSizes, capability: int) -> str | None:
    return lora_prefill.unsupported(sizes.hidden, sizes.rank, sizes.outputs, capability)


def _prefill_space(sizes: LinearSizes) -> list[Config]:
    if _no_prefill(sizes, CAPABILITY):
        return []
    return [{KERNEL: PREFILL, **config} for config in lora_prefill_space.linear_space(problem_of(sizes), FACTS)]


def _every_prefill(sizes: LinearSizes) -> list[Config]:
    problem = problem_of(sizes)
    expands = lora_prefill_space.expand_space(problem)
    return [
        lora_prefill_space.linear_config(shrink, expand)
        for shrink in lora_prefill_space.shrink_space(problem)
        for expand in expands
        if expand["TOKENS"] == shrink["TOKENS"]
    ]


def _prefill_seconds(point: Point, config: Config, device: Mapping[str, float]) -> float:
    sizes = LinearSizes.of(point)
    problem, cluster = problem_of(sizes), config["CLUSTER"]
    # tokens that decode have no neighbours of the same LoRA: each of the warps that copy asks for their rows one by one
    clusters = int(device["sm_count"]) * config["PER_SM"] // cluster
    rounds = ceil_div(problem.tiles(config["TOKENS"]), max(1, clusters))
    rows_s = asking_s(sizes) * ceil_div(sizes.hidden, COLUMNS * cluster) * rounds
    shrink_s = max(lora_prefill_space.shrink_seconds(problem, config, device), rows_s)
    return shrink_s + EXPANDS[WIDE].predict(point, lora_prefill.expand_config(config), device)
