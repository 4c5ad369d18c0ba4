"""The decode kernels in CUDA C++ compute their definition: run on a processor, cluster by cluster."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import emulated_cuda
import lora_plans
from smbench_kernels import lora_decode
from smbench_kernels.launch import Workspace
from smbench_kernels.lora_decode import Launch, Shape
from smbench_kernels.lora_plan import Plan, capacity
from smbench_kernels.op import Config

pytestmark = pytest.mark.skipif(emulated_cuda.COMPILER is None, reason="no C++ compiler: neither g++ nor clang++")
SMALL: Config = {
    "CHUNK": 8,
    "WARPS": 2,
    "STAGES": 0,
    "STEPS": 1,
    "TILES": 1,
    "PARTS": 4,
    "CLUSTER": 1,
    "BLOCKS": 1,
}
RELATIVE = {False: 1.5e-3, True: 1e-2}
SCALE = 2.0
CASES: list[tuple[Shape, Config, int]] = [
    # one slice; the last columns of a row are of no whole round
    (Shape(5, 264, 16, (96,), 2, False), {"STAGES": 3}, 0),
    # half a tile of ranks; parts without columns
    (Shape(19, 136, 8, (64, 40), 3, True), {"CHUNK": 16, "PARTS": 7}, 3),
    # rows of 4 and 2 elements; partial sums through memory
    (Shape(19, 100, 12, (50,), 3, False, clusters=False), {"CHUNK": 16, "STEPS": 2, "BLOCKS": 2}, 2),
    # nothing is a multiple of anything
    (Shape(37, 127, 5, (33, 7, 11), 2, False), {"CHUNK": 32, "PARTS": 3}, 4),
    # a whole rank in two blocks; more tokens than a segment has
    (
        Shape(70, 320, 64, (256,), 1, True),
        {"CHUNK": 48, "TILES": 2, "PARTS": 2, "STAGES": 2, "BLOCKS": 2},
        1,
    ),
    # more ranks than expand takes at once, and a rest of them that is no tile
    (Shape(40, 264, 76, (128, 72), 4, True), {"CHUNK": 24, "TILES": 4, "PARTS": 1, "STAGES": 4, "BLOCKS": 4}, 0),
]


class Problem:
    """Random tensors of a shape with the results that they must lead to."""

    def __init__(self, shape: Shape, chunk: int, without: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        dtype = torch.bfloat16 if shape.bfloat16 else torch.float16

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator)

        indices = torch.randint(0, shape.loras, (shape.tokens,), generator=generator, dtype=torch.int32)
        indices[torch.randperm(shape.tokens, generator=generator)[:without]] = -1
        self.used = indices >= 0
        self.x = normal(shape.tokens, shape.hidden).to(dtype)
        self.a = [(normal(shape.loras, shape.rank, shape.hidden) / shape.hidden**0.5).to(dtype) for _ in shape.outputs]
        self.b = [(normal(shape.loras, n, shape.rank) / shape.rank**0.5).to(dtype) for n in shape.outputs]
        self.y = normal(shape.tokens, sum(shape.outputs)).to(dtype)
        self.y[~self.used] = torch.nan
        # what the unused rows of a tile lead to must not matter
        self.x[~self.used] = torch.nan
        self.plan: Plan = lora_plans.plain(indices, shape.loras, chunk)
        which = indices[self.used].long()
        wide = self.x[self.used].double()
        self.h = torch.stack([SCALE * torch.einsum("th,trh->tr", wide, a.double()[which]) for a in self.a])
        changes = [torch.einsum("tr,tnr->tn", h, b.double()[which]) for h, b in zip(self.h, self.b, strict=True)]
        self.change = torch.cat(changes, dim=1)

    def check_y(self, y: torch.Tensor, relative: float) -> None:
        error = y[self.used].double() - self.y[self.used].double() - self.change
        assert error.norm() <= relative * self.change.norm()
        assert y[~self.used].isnan().all(), "a row of a token without a LoRA was written"


def run(launch: Launch, arguments: list[object]) -> None:
    emulated_cuda.launch(
        *(launch.source, launch.name, launch.macros, launch.grid, launch.threads, launch.shared_bytes),
        arguments,
        cluster=launch.cluster,
    )


def shrunk(shape: Shape, problem: Problem, config: Config, out: torch.Tensor, started: int | None = None) -> None:
    launch = lora_decode.shrink_launch(shape, config)
    if started is not None:
        launch = replace(launch, grid=(config["PARTS"] * started, *launch.grid[1:]))
    workspace = Workspace(
        torch.full((max(1, launch.partials),), torch.nan), torch.zeros(max(1, launch.counters), dtype=torch.int32)
    )
    arguments = lora_decode.shrink_arguments(shape, config, problem.x, problem.a, problem.plan, out, workspace, SCALE)
    run(launch, arguments)
    assert not workspace.counters.any(), "a counter is not ready for the next launch"


@pytest.mark.parametrize(("shape", "changes", "without"), CASES, ids=lambda value: str(value)[:60])
def test_shrink_and_expand(shape: Shape, changes: Config, without: int, seed: int) -> None:
    config = {**SMALL, **changes}
    problem = Problem(shape, config["CHUNK"], without, seed)
    h = torch.full((len(shape.outputs), shape.tokens, shape.rank), torch.nan)
    shrunk(shape, problem, config, h)
    assert (h[:, problem.used].double() - problem.h).norm() <= 1e-5 * problem.h.norm()
    assert h[:, ~problem.used].isnan().all(), "a row of a token without a LoRA was written"
    shrunk(replace(shape, accumulate=True), problem, config, h)
    assert (h[:, problem.used].double() - 2 * problem.h).norm() <= 1e-5 * problem.h.norm()

    h[:, problem.used] = problem.h.float()
    y = problem.y.clone()
    run(lora_decode.expand_launch(shape, config), lora_decode.expand_arguments(shape, h, problem.b, y, problem.plan))
    problem.check_y(y, RELATIVE[shape.bfloat16])


@pytest.mark.parametrize(
    ("shape", "changes", "without"),
    [
        case
        for case in CASES
        if case[0].clusters and case[0].rank <= lora_decode.FUSED_RANK and case[1].get("CHUNK") != 64
    ],
    ids=lambda value: str(value)[:60],
)
def test_both_in_one_launch(shape: Shape, changes: Config, without: int, seed: int) -> None:
    config = {**SMALL, **changes}
    problem = Problem(shape, config["CHUNK"], without, seed)
    y = problem.y.clone()
    tensors = (problem.x, problem.a, problem.b, y, problem.plan)
    run(lora_decode.fused_launch(shape, config), lora_decode.fused_arguments(shape, config, *tensors, SCALE))
    problem.check_y(y, RELATIVE[shape.bfloat16])


@pytest.mark.parametrize("clusters", [True, False])
def test_the_order_of_blocks_does_not_change_a_bit(clusters: bool, seed: int) -> None:
    """Blocks come in random order here, so another one adds the sums each time."""
    shape = Shape(11, 264, 12, (40,), 3, False, clusters=clusters)
    problem = Problem(shape, 8, 2, seed)
    results = []
    for _ in range(3):
        h = torch.zeros(1, shape.tokens, shape.rank)
        shrunk(shape, problem, SMALL, h)
        results.append(h)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize(("cluster", "parts"), [(0, 4), (1, 4), (1, 7)])
def test_a_block_takes_several_segments_where_more_are_needed_than_usual(cluster: int, parts: int, seed: int) -> None:
    """LoRAs drawn unevenly need more segments than the grid is for; others leave segments without tokens.

    Of a segment with few tokens, some of 7 parts add nothing and wait for nobody's sums.
    """
    shape = Shape(45, 264, 12, (40, 70), 3, False)
    config = {**SMALL, "CLUSTER": cluster, "PARTS": parts}
    for without, started in ((0, 1), (0, 2), (0, 5), (40, 3), (45, 1)):
        problem = Problem(shape, 8, without, seed)
        h = torch.full((2, shape.tokens, shape.rank), torch.nan)
        shrunk(shape, problem, config, h, started)
        assert (h[:, problem.used].double() - problem.h).norm() <= 1e-5 * problem.h.norm()
        assert h[:, ~problem.used].isnan().all()


def test_grids_are_for_the_segments_that_there_usually_are() -> None:
    generator = torch.Generator().manual_seed(0)
    for tokens, loras, chunk in ((256, 8, 48), (256, 8, 24), (256, 32, 16), (32, 8, 8), (256, 1, 32), (32, 32, 8)):
        shape = Shape(tokens, 64, 16, (64,), loras, False)
        started = lora_decode.typical_segments(shape, chunk)
        needed = []
        for _ in range(200):
            drawn = torch.cat([torch.arange(loras), torch.randint(0, loras, (tokens - loras,), generator=generator)])
            needed.append(int((-(-torch.bincount(drawn) // chunk)).sum()))
        assert sum(needed) / len(needed) <= started + 0.5 <= capacity(tokens, loras, chunk) + 0.5
        assert sum(count > started for count in needed) <= 80
