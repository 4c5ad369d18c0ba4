"""lora_linear: what a layer adds for its LoRAs, in one call: shrink, then expand, for one projection or fused ones.

Owns the definition: axes, inputs, float64 truth, least work. Owns no kernel. With T tokens, h hidden, r rank, L LoRAs,
S slices of n_i outputs each, and the LoRA of token t in `lora(t)`, where -1 stands for none and leaves the token's row:

    y[t, slice i] += SCALE * (x[t] . A_i[lora(t)]^T) . B_i[lora(t)]^T        A_i is [L, r, h], B_i is [L, n_i, r]

A slice is one of the projections that engines compute together from one input: query, key and value; gate and up. The
batch may mix sequences that prefill with sequences that decode one token each.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import partial

import torch

from smbench_kernels import lora
from smbench_kernels.lora import SCALE, Sizes, draw_indices, present, token_indices
from smbench_kernels.op import Axis, Inputs, Op, Point, Work

PROJECTIONS = {
    "square": (Fraction(1),),
    "qkv": (Fraction(1), Fraction(1, 4), Fraction(1, 4)),
    "gate-up": (Fraction(7, 2), Fraction(7, 2)),
}
"""Outputs of each slice in units of the hidden size, in Llama 3 8B's proportions: at 4096 they are 4096 + 1024 + 1024
and 14336 + 14336."""

PREFILLS = ("all", "half", "one")
"""Which sequences have `seq_len` tokens: all, the first half, or the first alone. The others decode: one token each."""

AXES = {
    **lora.AXES,
    "seq_len": Axis("tokens of each sequence that prefills"),
    "hidden_size": Axis("input size; output sizes follow from it and `projection`"),
    "num_loras": Axis("LoRAs that are loaded; all of them are drawn if there are as many sequences"),
    "dtype": Axis("type of x, y and all weights", choices=tuple(lora.DTYPES)),
    "projection": Axis("what is fused, and with it the output sizes", choices=tuple(PROJECTIONS)),
    "prefill": Axis("which sequences have seq_len tokens; the others have one", choices=PREFILLS),
}


@dataclass(frozen=True, slots=True)
class LinearSizes:
    """A point's axes as numbers."""

    hidden: int
    rank: int
    loras: int
    dtype: torch.dtype
    outputs: tuple[int, ...]
    """Of each slice."""
    lengths: tuple[int, ...]
    """Tokens of each sequence."""

    @classmethod
    def of(cls, point: Point) -> LinearSizes:
        """The sizes of a point. KeyError for a missing axis; ValueError for a hidden size that no slice divides."""
        sizes = Sizes.of(point)
        long = {"all": sizes.batch, "half": -(-sizes.batch // 2), "one": 1}[str(point["prefill"])]
        lengths = (sizes.seq_len,) * long + (1,) * (sizes.batch - long)
        return cls(sizes.hidden, sizes.rank, sizes.loras, sizes.dtype, slices_of(point), lengths)

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def out(self) -> int:
        """Width of y: the outputs of all slices side by side."""
        return sum(self.outputs)


def slices_of(point: Point) -> tuple[int, ...]:
    """Output sizes of the slices of a point. ValueError where the hidden size cannot be divided so."""
    hidden = int(point["hidden_size"])
    found = [hidden * part for part in PROJECTIONS[str(point["projection"])]]
    if any(size.denominator != 1 for size in found):
        raise ValueError(f"hidden_size {hidden} has no whole slices for projection {point['projection']!r}")
    return tuple(int(size) for size in found)


def plain_op(point: Point) -> str | None:
    """`bgmv` or `sgmv`, whose shrink and expand together do what this point does; None for slices and mixed batches."""
    if point["projection"] != "square" or (point["prefill"] != "all" and int(point["seq_len"]) > 1):
        return None
    return "bgmv" if int(point["seq_len"]) == 1 else "sgmv"


def plain_point(point: Point) -> Point:
    """The point of those two operations."""
    return {axis: value for axis, value in point.items() if axis not in ("projection", "prefill")}


def make_inputs(point: Point, seed: int, device: torch.device, *, no_lora: int = 0) -> Inputs:
    """Inputs of a point; the same for every provider, drawn on `device`.

    - `x` [T, h] dtype;
    - `a0`, `a1`, … [L, r, h] and `b0`, `b1`, … [L, n_i, r] dtype, contiguous, one of each for every slice;
    - `y` [T, sum of n_i] dtype, random, since the operation accumulates;
    - `indices`, `seq_lens`, `seq_starts` [sequences] int32; `no_lora` of the indices are -1.

    Values as in `lora.make_inputs`: what the call adds to `y` is about 1 everywhere.
    """
    sizes = LinearSizes.of(point)
    generator = torch.Generator(device=device).manual_seed(seed)
    normal = partial(torch.randn, generator=generator, device=device, dtype=sizes.dtype)
    lengths = torch.tensor(sizes.lengths, dtype=torch.int32)
    inputs = {"x": normal(sizes.tokens, sizes.hidden)}
    for number, width in enumerate(sizes.outputs):
        inputs[f"a{number}"] = normal(sizes.loras, sizes.rank, sizes.hidden).mul_(sizes.hidden**-0.5)
        inputs[f"b{number}"] = normal(sizes.loras, width, sizes.rank).mul_(sizes.rank**-0.5)
    return {
        **inputs,
        "indices": draw_indices(len(sizes.lengths), sizes.loras, no_lora, seed).to(device),
        "seq_lens": lengths.to(device),
        "seq_starts": (lengths.cumsum(0, dtype=torch.int32) - lengths).to(device),
        "y": normal(sizes.tokens, sizes.out).mul_(0.25),
    }


def weights(inputs: Inputs) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A and B of each slice."""
    slices = sum(name.startswith("a") for name in inputs)
    return [(inputs[f"a{number}"], inputs[f"b{number}"]) for number in range(slices)]


def reference(point: Point, inputs: Inputs) -> torch.Tensor:
    """`y` after one call, in float64: two matrix products for each LoRA that is present and each slice."""
    x, y = inputs["x"], inputs["y"].double()
    by_token = token_indices(inputs)
    for index in present(inputs):
        rows = (by_token == index).nonzero().squeeze(1)
        mine, column = x[rows].double(), 0
        for a, b in weights(inputs):
            change = (mine @ a[index].double().T) @ b[index].double().T
            y[rows, column : column + b.shape[1]] += SCALE * change
            column += b.shape[1]
    return y


def work(point: Point, inputs: Inputs) -> Work:
    """A and B of each LoRA present once; x read, y read and written for the tokens that have a LoRA. No intermediate:
    an implementation may keep it on the chip."""
    x, y = inputs["x"], inputs["y"]
    tokens = int((token_indices(inputs) >= 0).sum())
    element = x.element_size()
    numbers = sum(a[0].numel() + b[0].numel() for a, b in weights(inputs))
    index_bytes = inputs["indices"].numel() * inputs["indices"].element_size()
    return Work(
        bytes=element * (len(present(inputs)) * numbers + tokens * (x.shape[1] + 2 * y.shape[1])) + index_bytes,
        flops=2 * tokens * numbers,
    )


OP = Op(
    name="lora_linear",
    doc="y[T, n] += (x[T, h] . A[lora(t)]^T) . B[lora(t)]^T for each slice, one LoRA index per sequence",
    axes=AXES,
    make_inputs=make_inputs,
    reference=reference,
    work=work,
    tolerance=lora.tolerance,
    providers={
        "torch": "smbench_kernels.lora_torch:lora_linear",
        "smbench": "smbench_kernels.lora_linear_own:default",
        "smbench-tuned": "smbench_kernels.lora_linear_own:tuned",
        **lora.peers("lora_linear"),
    },
    baseline="torch",
    tunable="smbench_kernels.lora_linear_own:TUNABLE",
    peer_tunables=lora.peer_tunables("lora_linear"),
)
