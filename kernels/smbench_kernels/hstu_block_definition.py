"""The points of HSTU inference: a block of layers on a step of new history and candidates. Owns no kernel.

One point is one step of a batch of users: `total` tokens of history each, the last `new` of them not seen before, and
`targets` candidates. Truth is what the whole sequences give in float64, so that whoever keeps a cache is compared with
whoever has none (document 003, "HSTU block performance").
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from smbench_kernels import hstu
from smbench_kernels.hstu import Jagged, Shape
from smbench_kernels.hstu_definition import DTYPES, PARAMETERS
from smbench_kernels.hstu_paged import PagedSequence, paged_attention_flops
from smbench_kernels.launch import ceil_div
from smbench_kernels.op import Axis, Inputs, Point, Tolerance, Work

AXES = {
    "batch": Axis("users of a step"),
    "total": Axis("tokens of each user's history, the new ones among them"),
    "new": Axis("tokens of history that no earlier step has seen, at most total"),
    "targets": Axis("candidates of each user", minimum=0),
    "source": Axis("where keys and values of earlier steps are when the step begins", choices=("device", "host")),
    "page_size": Axis("tokens of a page of the cache"),
    "max_seqlen": Axis("the N that scores are divided by, at least total + targets: a constant of a model"),
    "layers": Axis("layers one after the other"),
    "embedding": Axis("width of what goes through the layers", minimum=8),
    "heads": Axis("heads of u, v, q and k each"),
    "head_dim": Axis("elements of a head", minimum=8),
    "dtype": Axis("of everything", choices=tuple(DTYPES)),
}

TOLERANCES = {
    "float32": Tolerance(relative=5e-3, elementwise=0.1),
    "float16": Tolerance(relative=1e-2, elementwise=0.15),
    "bfloat16": Tolerance(relative=4e-2, elementwise=0.6),
}
"""Rounding adds up over the layers. Leaving the cached tokens out, the fault of the published benchmark, changes the
output by tens of per cent."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """A point in types."""

    batch: int
    total: int
    new: int
    targets: int
    source: str
    page_size: int
    max_seqlen: int
    layers: int
    shape: Shape
    dtype: torch.dtype

    @classmethod
    def of(cls, point: Point) -> Sizes:
        """Of a point. ValueError for one that cannot be."""
        sizes = cls(
            int(point["batch"]),
            int(point["total"]),
            int(point["new"]),
            int(point["targets"]),
            str(point["source"]),
            int(point["page_size"]),
            int(point["max_seqlen"]),
            int(point["layers"]),
            Shape(int(point["embedding"]), int(point["heads"]), int(point["head_dim"])),
            DTYPES[str(point["dtype"])],
        )
        if sizes.new > sizes.total:
            raise ValueError(f"new = {sizes.new} of a history of total = {sizes.total} tokens")
        if sizes.length > sizes.max_seqlen:
            raise ValueError(f"total + targets = {sizes.length} exceeds max_seqlen = {sizes.max_seqlen}")
        return sizes

    @property
    def cached(self) -> int:
        """Tokens of each history that an earlier step has seen."""
        return self.total - self.new

    @property
    def rows(self) -> int:
        """Rows of each user in a step: new history and candidates."""
        return self.new + self.targets

    @property
    def length(self) -> int:
        """Tokens of each user's whole sequence."""
        return self.total + self.targets

    @property
    def pages(self) -> int:
        """Pages of each user's history."""
        return ceil_div(self.total, self.page_size)


def whole(sizes: Sizes, users: int, device: torch.device) -> Jagged:
    """So many users' whole sequences as a batch."""
    offsets = torch.arange(users + 1, dtype=torch.int32, device=device) * sizes.length
    return Jagged(offsets, sizes.max_seqlen, torch.full((users,), sizes.targets, dtype=torch.int32, device=device))


def step_rows(sizes: Sizes, x: torch.Tensor) -> torch.Tensor:
    """The rows of a step, a view [batch, new + targets, columns] of whole sequences [batch * (total + targets), …]."""
    users: torch.Tensor = x.unflatten(0, (sizes.batch, sizes.length))
    return users[:, sizes.cached :]


def make_inputs(point: Point, seed: int, device: torch.device) -> Inputs:
    """`x` [batch * (total + targets), E] standard normal, sequence after sequence, candidates last; the parameters,
    each [layers, …] of `hstu.parameters`; `y` [batch * (new + targets), E] NaN."""
    sizes = Sizes.of(point)
    generator = torch.Generator(device=device).manual_seed(seed)
    size = (sizes.batch * sizes.length, sizes.shape.embedding)
    drawn = [hstu.parameters(sizes.shape, seed + 1 + layer, device, sizes.dtype) for layer in range(sizes.layers)]
    out = (sizes.batch * sizes.rows, sizes.shape.embedding)
    return {
        "x": torch.randn(size, dtype=sizes.dtype, generator=generator, device=device),
        **{name: torch.stack([layer[name] for layer in drawn]) for name in PARAMETERS},
        "y": torch.full(out, torch.nan, dtype=sizes.dtype, device=device),
    }


def reference(point: Point, inputs: Inputs) -> torch.Tensor:
    """`y` in float64 from whole sequences, one user at a time."""
    sizes = Sizes.of(point)
    users = inputs["x"].unflatten(0, (sizes.batch, sizes.length))
    batch = whole(sizes, 1, users.device)
    params = [{name: inputs[name][layer].double() for name in PARAMETERS} for layer in range(sizes.layers)]
    found = []
    for user in users:
        y = user.double()
        for layer in params:
            y = hstu.layer_reference(y, layer, batch, sizes.shape)
        found.append(y[sizes.cached :])
    return torch.cat(found)


def work(point: Point, _inputs: Inputs) -> Work:
    """The least with a cache at hand on the device: parameters, cached keys and values and the step's rows read once,
    new keys and values and y written once; operations of the step's rows alone."""
    sizes = Sizes.of(point)
    shape, rows = sizes.shape, sizes.batch * sizes.rows
    sequences = [PagedSequence(0, sizes.new, sizes.targets, sizes.total, 0)] * sizes.batch
    flops = hstu.gemm_flops(rows, shape) + paged_attention_flops(sequences, shape.heads, shape.head_dim)
    layer_elements = (
        5 * shape.width * shape.embedding  # the weights
        + 2 * shape.width * sizes.batch * sizes.total  # keys and values: the cached read, the new written
    )
    elements = sizes.layers * layer_elements + 2 * rows * shape.embedding
    return Work(elements * sizes.dtype.itemsize, sizes.layers * flops)


def tolerance(point: Point) -> Tolerance:
    """The bound of the point's dtype."""
    return TOLERANCES[str(point["dtype"])]
