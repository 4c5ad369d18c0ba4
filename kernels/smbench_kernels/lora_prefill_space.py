"""Search space and time model of the Hopper prefill kernels. Owns no launch and not what is chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from smbench_kernels import model
from smbench_kernels.launch import ceil_div, next_power_of_two
from smbench_kernels.lora_decode_space import SMALL_GROUP
from smbench_kernels.lora_plan import capacity
from smbench_kernels.lora_prefill_kernels import COLUMNS, TOKENS, DoesNotFit, Expand, Shrink
from smbench_kernels.op import Config

CLUSTERS = (1, 2, 4, 8)
NOTHING: Config = {}
FEW_TILES_CLUSTERS, FEW_TILES_SPLITS = (4, 8, 10, 12, 16), (1, 2, 3, 4)
"""Where tiles are so few that multiprocessors are left without a block. An H200 holds 15 clusters of 8 and 7 of 16, so
that 6 or 7 of 16 or 8 of fewer blocks give work to the most of it."""
CHUNKS = (1, 2)
PER_SM = (1, 2)
RUNS = (2, 4, 8, 16)
"""Copies in a row: more of them load x less often, fewer keep all blocks on one part of y and share it more equally."""
MEETING_S = 0.5e-6
"""What a cluster costs for each of its blocks: for 2048 tokens of hidden size 4096 and rank 16 clusters of 8 took
12.6 us on an H200, where the rest of the model says 6."""
EXCHANGE_S = 1.2e-6
"""On paper: launching clusters, an arrival at the others and loads from them (NOTES-lora-prefill.md)."""
LEAST_RING_BYTES = 64 * 1024
"""Of all blocks of a multiprocessor: some 40 KB have to be in flight, and as much again is being used."""


@dataclass(frozen=True)
class Problem:
    """What decides which configuration is good."""

    tokens: int
    hidden: int
    """Columns of x."""
    rank: int
    outputs: tuple[int, ...]
    """Columns of each slice of y; as many slices of A."""
    used_loras: int
    """LoRAs that the batch needs."""
    dtype: torch.dtype
    longest: int
    """No tile is of use that is longer."""
    tiles: Callable[[int], int]
    """How many tiles of so many tokens there are."""
    planned: bool
    accumulate: bool
    """Whether shrink adds to its output."""
    dependent: bool
    """Whether expand reads what the kernel in front writes."""

    def shrink(self, config: Config) -> Shrink:
        """The kernel of a configuration. Whether it fits, its `stages` tell."""
        return Shrink(
            *(config["TOKENS"], self.rank, len(self.outputs), config["CLUSTER"], config["CHUNKS"], config["PER_SM"]),
            *(self.accumulate, self.planned, self.dtype, config.get("SPLIT", 1)),
        )

    def expand(self, config: Config) -> Expand:
        """The same for expand."""
        return Expand(
            *(config["TOKENS"], self.rank, len(self.outputs), config["CHUNKS"], config["PER_SM"]),
            *(self.dependent, self.planned, self.dtype),
        )


def over_plan(
    tokens: int,
    hidden: int,
    rank: int,
    outputs: tuple[int, ...],
    used_loras: int,
    dtype: torch.dtype,
    *,
    dependent: bool,
    accumulate: bool = False,
) -> Problem:
    """The problem of a batch whose tokens a plan has sorted by LoRA, spread evenly over these."""

    def tiles(length: int) -> int:
        each = used_loras * ceil_div(ceil_div(tokens, used_loras), length)
        return min(capacity(tokens, used_loras, length), each)

    return Problem(
        tokens=tokens,
        hidden=hidden,
        rank=rank,
        outputs=outputs,
        used_loras=used_loras,
        dtype=dtype,
        longest=tokens,
        tiles=tiles,
        planned=True,
        accumulate=accumulate,
        dependent=dependent,
    )


def shrink_space(problem: Problem, clusters: Sequence[int] = CLUSTERS, also: Config = NOTHING) -> list[Config]:
    """Tiles as long as sequences are, columns shared by up to 8 blocks, one or two blocks to a multiprocessor.

    Each configuration has what `also` has.
    """
    return [
        config
        for tokens in _tiles_of(problem)
        for cluster in clusters
        for chunks in CHUNKS
        for per_sm in PER_SM
        if cluster * chunks * COLUMNS < problem.hidden + chunks * COLUMNS
        and _fits(
            problem.shrink,
            config := {"TOKENS": tokens, "CLUSTER": cluster, "CHUNKS": chunks, "PER_SM": per_sm, **also},
        )
    ]


def few_tiles_shrink_space(problem: Problem) -> list[Config]:
    """For fewer tiles than multiprocessors: columns shared by up to 16 blocks, and ranks by as many as make more."""
    any_config = {"TOKENS": TOKENS[0], "CLUSTER": 1, "CHUNKS": 1, "PER_SM": 1}
    # shares of ranks are multiples of 8, so that small ranks have fewer; large ones are shared anyway
    splits = {problem.shrink({**any_config, "SPLIT": n}).rank_tiles: n for n in reversed(FEW_TILES_SPLITS)}
    return [
        config
        for split in sorted(splits.values())
        for config in shrink_space(problem, FEW_TILES_CLUSTERS, {"SPLIT": split})
    ]


def expand_space(problem: Problem) -> list[Config]:
    """Tiles as long as sequences are, one or two blocks to a multiprocessor, runs that are no longer than a slice."""
    return [
        config
        for tokens in _tiles_of(problem)
        for chunks in CHUNKS
        for per_sm in PER_SM
        for run in RUNS
        if (run == RUNS[0] or run * chunks * COLUMNS < 2 * max(problem.outputs))
        and _fits(problem.expand, config := {"TOKENS": tokens, "CHUNKS": chunks, "PER_SM": per_sm, "RUN": run})
    ]


def shrink_plan(problem: Problem, config: Config, sms: int) -> model.Plan:
    """What a shrink does. The tile at a sequence's end counts as a whole one."""
    kernel = problem.shrink(config)
    tiles, cluster = problem.tiles(kernel.tokens) * kernel.rank_tiles, kernel.cluster
    blocks = min(tiles, kernel.places(sms)) * cluster
    steps = ceil_div(tiles * cluster, blocks) * ceil_div(problem.hidden, cluster * kernel.chunks * COLUMNS)
    slices = len(problem.outputs)
    x, out = 2.0 * problem.tokens * problem.hidden, 4.0 * problem.tokens * problem.rank * slices
    a = 2.0 * problem.rank * problem.hidden * slices
    written = (2 if problem.accumulate else 1) * out
    return model.Plan(
        programs=blocks,
        threads=kernel.threads,
        rounds=1 + (steps - 1) / (kernel.stages - 1),
        device_bytes=x + written + problem.used_loras * a,
        cache_bytes=kernel.rank_tiles * x + written + tiles / kernel.rank_tiles * a,
        operations=0.0,
        shared_bytes=kernel.shared_bytes,
        exchange_s=MEETING_S * cluster if cluster > 1 else 0.0,
    )


def expand_plan(problem: Problem, config: Config, sms: int) -> model.Plan:
    """What an expand does."""
    kernel, run = problem.expand(config), config["RUN"]
    tiles = problem.tiles(kernel.tokens)
    runs = tiles * sum(ceil_div(count, run * kernel.chunks * COLUMNS) for count in problem.outputs)
    blocks = min(runs, kernel.per_sm * sms)
    turns = ceil_div(runs, blocks)
    width = sum(problem.outputs)
    y, x = 4.0 * problem.tokens * width, 4.0 * problem.tokens * problem.rank * len(problem.outputs)
    b = 2.0 * problem.rank * width
    # what the busiest block moves, as if all did
    busy = turns * run * kernel.chunks * COLUMNS * blocks / (tiles * max(1, width))
    return model.Plan(
        programs=blocks,
        threads=kernel.threads,
        # x of the first run comes before its first product
        rounds=2 + (turns * run - 1) / (kernel.stages - 1),
        device_bytes=y + x + problem.used_loras * b,
        cache_bytes=max(1.0, busy) * (y + tiles * b) + runs * 4.0 * kernel.tokens * problem.rank,
        operations=0.0,
        shared_bytes=kernel.shared_bytes,
    )


def shrink_seconds(problem: Problem, config: Config, device: Mapping[str, float]) -> float:
    """Modelled time of a shrink."""
    return model.seconds(shrink_plan(problem, config, int(device["sm_count"])), device)


def few_tiles_shrink_seconds(problem: Problem, config: Config, device: Mapping[str, float]) -> float:
    """The same where no cluster has more than one tile or two, as far as can be told on paper.

    MEETING_S is of clusters of 8 in two waves: with it the search would try none of these before it has lost patience.
    Clusters that do not all have multiprocessors of their own share these or take turns: what the busiest of them
    loads counts.
    """
    sms, kernel = int(device["sm_count"]), problem.shrink(config)
    plan, clusters = shrink_plan(problem, config, sms), problem.tiles(kernel.tokens) * kernel.rank_tiles
    turns = ceil_div(clusters, _clusters_apart(kernel.cluster, sms))
    busiest = turns * plan.cache_bytes / (clusters * kernel.cluster)
    fetched = 4.0 * kernel.tokens * kernel.ranks * kernel.slices
    exchange_s = EXCHANGE_S + fetched / model.REDUCE_BYTES_PER_S if kernel.cluster > 1 else 0.0
    cache_bytes = busiest * min(sms, plan.programs)
    return model.seconds(replace(plan, cache_bytes=cache_bytes, exchange_s=exchange_s), device)


def expand_seconds(problem: Problem, config: Config, device: Mapping[str, float]) -> float:
    """Modelled time of an expand."""
    return model.seconds(expand_plan(problem, config, int(device["sm_count"])), device)


def linear_config(shrink: Config, expand: Config) -> Config:
    """The configuration of `lora_prefill.linear`, of two that have tiles of the same length."""
    return {**shrink, "RUN": expand["RUN"], **{f"EXPAND_{name}": expand[name] for name in ("CHUNKS", "PER_SM")}}


def linear_space(problem: Problem, device: Mapping[str, float]) -> list[Config]:
    """Every shrink, with the expand that the model likes best."""
    found: list[Config] = []
    for shrink in shrink_space(problem):
        expands = [config for config in expand_space(problem) if config["TOKENS"] == shrink["TOKENS"]]
        if expands:
            best = min(expands, key=lambda config: expand_seconds(problem, config, device))
            found.append(linear_config(shrink, best))
    return found


def around(problem: Problem, config: Config) -> list[Config]:
    """Configurations of `lora_prefill.linear` with the same shrink and every expand, and the other way round."""
    shrink = {name: config[name] for name in ("TOKENS", "CLUSTER", "CHUNKS", "PER_SM")}
    expand = {"RUN": config["RUN"], "CHUNKS": config["EXPAND_CHUNKS"], "PER_SM": config["EXPAND_PER_SM"]}
    expands = [other for other in expand_space(problem) if other["TOKENS"] == shrink["TOKENS"]]
    shrinks = [other for other in shrink_space(problem) if other["TOKENS"] == shrink["TOKENS"] and other != shrink]
    return [linear_config(shrink, other) for other in expands] + [linear_config(other, expand) for other in shrinks]


def _clusters_apart(cluster: int, sms: int) -> int:
    """Clusters that share no multiprocessor: an H200's 132 are groups of 16 and 18, and one of fewer."""
    return max(1, sms // 18 * (16 // cluster) + SMALL_GROUP // cluster)


def _tiles_of(problem: Problem) -> list[int]:
    return [tokens for tokens in TOKENS if tokens <= max(TOKENS[0], next_power_of_two(problem.longest))]


def _fits(kernel: Callable[[Config], Shrink | Expand], config: Config) -> bool:
    try:
        built = kernel(config)
        return config["PER_SM"] * built.stages * built.stage_bytes >= LEAST_RING_BYTES
    except DoesNotFit:
        return False
