"""The points of a whole ranking request: embeddings, HSTU layers, ranking head, for a batch of users. Owns no kernel.

A history interleaves items and actions, a request adds `new` tokens and asks for the scores of `targets` candidates in
TASKS tasks (document 003, "End-to-end inference performance"; tables and head as in `inference_benchmark.py` of
NVIDIA/recsys-examples). Truth is computed from whole histories in float64.
"""

from __future__ import annotations

import itertools

import torch

from smbench_kernels import hstu
from smbench_kernels import hstu_block_definition as block
from smbench_kernels.hstu_definition import PARAMETERS
from smbench_kernels.op import Axis, Inputs, Point, Tolerance, Work

ITEMS, ACTIONS = 10_000, 128
"""Rows of the two embedding tables; in one tensor, actions after items."""
TASKS = 3
HEAD = (128, 10, 1)
"""Widths of each task's multilayer perceptron."""
SOURCES = ("device", "host", "nowhere")

AXES = {
    **block.AXES,
    "source": Axis(
        "where keys and values of earlier steps are when a request comes: on the device, on the host, or nowhere",
        choices=SOURCES,
    ),
    "chunk_tokens": Axis("tokens of a chunk of the host's store, whole pages"),
}

TOLERANCES = {
    "float32": Tolerance(relative=1e-2, elementwise=0.2),
    "float16": Tolerance(relative=2e-2, elementwise=0.3),
    "bfloat16": Tolerance(relative=8e-2, elementwise=1.0),
}
"""Those of the block, and three more linear maps with what is left of their inputs after ReLU."""


Sizes = block.Sizes
"""A point in types; `source` is one of SOURCES."""


def make_inputs(point: Point, seed: int, device: torch.device) -> Inputs:
    """`ids` int64 [batch, total + targets], rows of `table` [ITEMS + ACTIONS, E]; the parameters, each [layers, …];
    the heads' `head0` [TASKS, E, 128], `head1` [TASKS, 128, 10], `head2` [TASKS, 10, 1]; `y` [batch * targets, TASKS]
    NaN.
    """
    sizes = Sizes.of(point)
    generator = torch.Generator(device=device).manual_seed(seed)
    embedding = sizes.shape.embedding

    def normal(*size: int, scale: float) -> torch.Tensor:
        return (torch.randn(size, generator=generator, device=device) * scale).to(sizes.dtype)

    drawn = [hstu.parameters(sizes.shape, seed + 1 + layer, device, sizes.dtype) for layer in range(sizes.layers)]
    widths = (embedding, *HEAD)
    heads = {
        f"head{i}": normal(TASKS, widths[i], widths[i + 1], scale=(2 / widths[i]) ** 0.5) for i in range(len(HEAD))
    }
    return {
        "ids": drawn_ids(sizes, seed, device),
        "table": normal(ITEMS + ACTIONS, embedding, scale=1.0),
        **{name: torch.stack([layer[name] for layer in drawn]) for name in PARAMETERS},
        **heads,
        "y": torch.full((sizes.batch * sizes.targets, TASKS), torch.nan, dtype=sizes.dtype, device=device),
    }


def drawn_ids(sizes: block.Sizes, seed: int, device: torch.device) -> torch.Tensor:
    """Items at even places of a history and as candidates, actions at odd places."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, ITEMS, (sizes.batch, sizes.length), generator=generator)
    actions = torch.randint(ITEMS, ITEMS + ACTIONS, (sizes.batch, sizes.length), generator=generator)
    odd = (torch.arange(sizes.length) % 2 == 1) & (torch.arange(sizes.length) < sizes.total)
    return torch.where(odd, actions, ids).to(device)


def redraw(point: Point, inputs: Inputs, seed: int) -> Inputs:
    """The same model asked about other histories and candidates."""
    return {**inputs, "ids": drawn_ids(Sizes.of(point), seed, inputs["ids"].device)}


def reference(point: Point, inputs: Inputs) -> torch.Tensor:
    """`y` in float64 from whole histories, one user at a time."""
    sizes = Sizes.of(point)
    batch = block.whole(sizes, 1, inputs["ids"].device)
    params = [{name: inputs[name][layer].double() for name in PARAMETERS} for layer in range(sizes.layers)]
    heads = [inputs[f"head{i}"].double() for i in range(len(HEAD))]
    found = []
    for ids in inputs["ids"]:
        x = inputs["table"][ids].double()
        for layer in params:
            x = hstu.layer_reference(x, layer, batch, sizes.shape)
        found.append(scores(x[sizes.total :], heads))
    return torch.cat(found)


def scores(x: torch.Tensor, heads: list[torch.Tensor]) -> torch.Tensor:
    """[rows, TASKS] of candidates' rows x [rows, E]: each task's perceptron, ReLU between its maps."""
    h = x.expand(TASKS, *x.shape)
    for index, weight in enumerate(heads):
        h = torch.bmm(h, weight)
        if index + 1 < len(heads):
            h = torch.relu(h)
    return h[:, :, 0].T


def work(point: Point, inputs: Inputs) -> Work:
    """The block's with what is around it: rows of the table read once, the heads' weights and operations.

    Where nothing is cached anywhere, the whole history is new.
    """
    sizes = Sizes.of(point)
    inner = block.work({**point, "new": point["total"]} if sizes.source == "nowhere" else point, inputs)
    widths = (sizes.shape.embedding, *HEAD)
    elements = sum(a * b for a, b in itertools.pairwise(widths))
    flops = 2 * sizes.batch * sizes.targets * TASKS * elements
    return Work(inner.bytes + TASKS * elements * sizes.dtype.itemsize, inner.flops + flops)


def tolerance(point: Point) -> Tolerance:
    """The bound of the point's dtype."""
    return TOLERANCES[str(point["dtype"])]
