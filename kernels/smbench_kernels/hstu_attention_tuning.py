"""What the tuner may choose for the Triton HSTU attention, and the model that orders it. Owns no kernel and no default.

**Model.** A program multiplies a tile of rows that it owns by all that it walks over. A product takes 2 D operations an
element at PRODUCT_FLOPS, loads 2 bytes an element of every streamed operand at L2_BYTES_PER_S; both overlap except in a
loop of one stage. dS, where kept, crosses device memory once for each kernel that writes or reads it. The figures are
of one multiprocessor and round: the model orders candidates, it predicts no time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import torch

from smbench_kernels import hstu_attention, hstu_attention_triton
from smbench_kernels import hstu_attention_configs as configurations
from smbench_kernels import hstu_definition as definition
from smbench_kernels.compile import compile_for
from smbench_kernels.hardware import Hardware
from smbench_kernels.hstu import Jagged
from smbench_kernels.hstu_attention_configs import APART, COPY_ENGINE, KEPT, POINTERS, RECOMPUTED, Tile
from smbench_kernels.launch import Call
from smbench_kernels.op import Config, Inputs, Point, Prepared, Tunable, UnsupportedPoint

SHARED_BYTES = 227 * 1024
"""Of one program, on the architecture that has most: what does not fit elsewhere does not launch there."""
PRODUCT_FLOPS, L2_BYTES_PER_S = 4e12, 50e9
LAUNCH_S = 5e-6
ELEMENT_BYTES = 2


def tiles(head_dim: int, owned: Sequence[int], walked: Sequence[int], resident: int, streamed: int) -> list[Tile]:
    """(owned, walked) tiles with warps and stages, 16 or 32 owned rows a warp, that fit the shared memory.

    `resident` and `streamed` count the operands of `head_dim` columns that are held and that are walked over.
    """
    size = hstu_attention_triton.padded_dim(head_dim) * ELEMENT_BYTES
    return [
        (own, walk, own // share, stages, masked)
        for own, walk, share, stages, masked in product(owned, walked, (16, 32), (1, 2, 3, 4), (1, 2))
        if own // share >= 4 and masked <= stages and (resident * own + streamed * walk * stages) * size <= SHARED_BYTES
    ]


def turned(rows: Sequence[Tile]) -> list[Tile]:
    """The same for a kernel that owns columns: a configuration names rows first."""
    return [(walk, own, warps, stages, masked) for own, walk, warps, stages, masked in rows]


def forward_space(point: Point) -> list[Config]:
    """Every configuration of the forward pass that the tuner may pick."""
    found = tiles(int(point["head_dim"]), (64, 128), (32, 64, 128), 1, 2)
    return [configurations.forward_config(values, tma) for values, tma in product(found, (COPY_ENGINE, POINTERS))]


def backward_space(point: Point) -> list[Config]:
    """Every configuration of the backward pass: each way through it, with the kernels' tiles varied one at a time."""
    head_dim = int(point["head_dim"])
    columns = [tile for tile in turned(tiles(head_dim, (64, 128), (16, 32, 64), 2, 2)) if tile[3] <= 2]
    rows = [tile for tile in tiles(head_dim, (64, 128), (16, 32, 64), 2, 2) if tile[3] <= 2]
    read = [tile for tile in tiles(head_dim, (64, 128), (32, 64), 0, 1) if tile[3] >= 2 and tile[4] == 2]
    space = []
    for capability, kept in product((80, 86, 90), (RECOMPUTED, KEPT)):
        plain = dict(configurations.default_backward(capability, head_dim, kept == KEPT))
        if plain["KEPT"] != kept:
            continue
        space.append(plain)
        apart = plain["KERNELS"] == APART
        for prefix, choices in (
            ("V_", columns),
            *((("K_", turned(read) if kept == KEPT else columns),) if apart else ()),
            ("Q_", read if kept == KEPT else rows),
        ):
            space += [{**plain, **configurations.tile(prefix, values)} for values in choices]
    return list({tuple(sorted(config.items())): config for config in space}.values())


def forward_prepare(point: Point, inputs: Inputs, config: Config) -> Prepared:
    """The forward pass with a configuration given."""
    q, k, v, batch, alpha = _problem(point, inputs)

    def run() -> None:
        hstu_attention.portable_forward(q, k, v, batch, alpha, inputs["y"], config)

    return Prepared(run, config, "given")


def backward_prepare(point: Point, inputs: Inputs, config: Config) -> Prepared:
    """The backward pass with a configuration given. UnsupportedPoint where dS does not fit its workspace."""
    q, k, v, batch, alpha = _problem(point, inputs)
    problem = hstu_attention_triton.Problem(batch, q.shape[1], q.shape[2], alpha)
    if config["KEPT"] == KEPT and hstu_attention_triton.turn(problem, ELEMENT_BYTES) == 0:
        raise UnsupportedPoint(f"dS of {batch.max_seqlen} tokens is larger than the workspace")
    dq, dk, dv = (inputs[name] for name in ("dq", "dk", "dv"))

    def run() -> None:
        hstu_attention.portable_backward(inputs["dout"], q, k, v, batch, alpha, dq, dk, dv, config)

    return Prepared(run, config, "given")


def _problem(point: Point, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Jagged, float]:
    if definition.Sizes.of(point).dtype not in hstu_attention.DTYPES:
        raise UnsupportedPoint(f"the Triton kernels take bfloat16 and float16, not {point['dtype']}")
    q, k, v = definition.split(point, inputs["uvqk"])
    return q, k, v, definition.batch_of(point, inputs), definition.Sizes.of(point).shape.alpha


def forward_default(point: Point, device: Hardware) -> Config:
    """What the portable forward pass takes on a device."""
    return configurations.default_forward(device.capability, int(point["head_dim"]))


def backward_default(point: Point, device: Hardware) -> Config:
    """What the portable backward pass takes on a device."""
    problem = _small(point)[0]
    fits = hstu_attention_triton.turn(problem, ELEMENT_BYTES) > 0
    return configurations.default_backward(device.capability, int(point["head_dim"]), fits)


def _small(point: Point) -> tuple[hstu_attention_triton.Problem, dict[str, torch.Tensor]]:
    """The point with one sequence of one token, for what depends on no length: strides, masks and types are its own."""
    sizes = definition.Sizes.of(point)
    one = torch.ones(1, dtype=torch.int32)
    batch = Jagged(
        torch.tensor([0, 1], dtype=torch.int32),
        sizes.seq_len,
        num_targets=None if sizes.mask == "causal" else one,
        num_contextuals=one if sizes.mask == "contextual" else None,
        causal=sizes.mask != "noncausal",
    )
    width = sizes.shape.width
    uvqk, gradients = (torch.empty(1, 4 * width, dtype=sizes.dtype) for _ in range(2))
    names = ("v", "q", "k")
    tensors = {
        **{
            name: x.unflatten(1, (sizes.shape.heads, -1))
            for name, x in zip(names, uvqk.split(width, 1)[1:], strict=True)
        },
        **{
            f"d{name}": x.unflatten(1, (sizes.shape.heads, -1))
            for name, x in zip(names, gradients.split(width, 1)[1:], strict=True)
        },
        "y": torch.empty(1, sizes.shape.heads, sizes.shape.head_dim, dtype=sizes.dtype),
    }
    return hstu_attention_triton.Problem(batch, sizes.shape.heads, sizes.shape.head_dim, sizes.shape.alpha), tensors


def forward_calls(point: Point, config: Config) -> list[Call]:
    """The launch of the forward pass, without the point's memory."""
    problem, x = _small(point)
    return [hstu_attention_triton.forward_call(problem, x["q"], x["k"], x["v"], x["y"], config)]


def backward_calls(point: Point, config: Config) -> list[Call]:
    """The launches of one turn of the backward pass, without the point's memory."""
    problem, x = _small(point)
    kept = torch.empty(problem.items * problem.kept_elements(), dtype=x["q"].dtype) if config["KEPT"] == KEPT else None
    return list(
        hstu_attention_triton.backward_calls(
            problem, x["y"], x["q"], x["k"], x["v"], x["dq"], x["dk"], x["dv"], kept, config
        )
    )


def forward_predict(point: Point, config: Config, device: Mapping[str, float]) -> float:
    """Modelled seconds of the forward pass."""
    return LAUNCH_S + _seconds(point, config, "", 2, 2, config["ROWS"], config["COLUMNS"], device)


def backward_predict(point: Point, config: Config, device: Mapping[str, float]) -> float:
    """Modelled seconds of the backward pass."""
    apart, kept = config["KERNELS"] == APART, config["KEPT"] == KEPT
    kernels = [("V_", 2 + (not apart) * 2 + (apart and kept), 2, True)]
    if apart:
        kernels.append(("K_", 1 if kept else 3, 1 if kept else 2, True))
    kernels.append(("Q_", 1 if kept else 3, 1 if kept else 2, False))
    total = 0.0
    for prefix, products, streamed, columns in kernels:
        own, walk = (config[f"{prefix}{key}"] for key in (("COLUMNS", "ROWS") if columns else ("ROWS", "COLUMNS")))
        total += LAUNCH_S + _seconds(point, config, prefix, products, streamed, own, walk, device)
    passes = (2 + apart) * kept
    return total + passes * _elements(point) * ELEMENT_BYTES / device["memory_bytes_per_s"]


def _elements(point: Point) -> float:
    """Scores of a point that are not masked, roughly."""
    sizes = definition.Sizes.of(point)
    return sizes.batch * sizes.shape.heads * sizes.seq_len**2 / (1 if sizes.mask == "noncausal" else 2)


def _seconds(
    point: Point,
    config: Config,
    prefix: str,
    products: int,
    streamed: int,
    own: int,
    walk: int,
    device: Mapping[str, float],
) -> float:
    """One kernel: `own` rows held, tiles of `walk` rows of `streamed` operands walked over."""
    head_dim = hstu_attention_triton.padded_dim(int(point["head_dim"]))
    elements = _elements(point) / device["sm_count"]
    # the tile at the diagonal is done whole
    waste = 1 + (own + walk) / int(point["seq_len"])
    compute = products * 2 * head_dim * elements / PRODUCT_FLOPS
    loads = streamed * head_dim * ELEMENT_BYTES * elements / own / L2_BYTES_PER_S
    return waste * (compute + loads if config[f"{prefix}STAGES"] == 1 else max(compute, loads))


def _tunable(name: str, space: Any, prepare: Any, predict: Any, calls: Any, default: Any) -> Tunable:
    """A Tunable whose binaries are those of all its launches."""

    def binary(point: Point, config: Config) -> str:
        parts = [f"{call.kernel.__name__} {call.binary()}" for call in calls(point, config)]
        return f"{name} {point['dtype']} {'; '.join(parts)}"

    def precompile(point: Point, config: Config, capability: int) -> str:
        return "+".join(str(compile_for(call, capability).hash) for call in calls(point, config))

    return Tunable(space, prepare, predict, binary, precompile, default)


FORWARD = _tunable("forward", forward_space, forward_prepare, forward_predict, forward_calls, forward_default)
BACKWARD = _tunable("backward", backward_space, backward_prepare, backward_predict, backward_calls, backward_default)
