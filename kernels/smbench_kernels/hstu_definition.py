"""The points of the HSTU operations: axes, inputs, truth, work, tolerance. Owns no kernel and no provider.

What is computed is in `hstu`. Truth is taken sequence by sequence in float64, so that the memory for it is that of one
sequence and the outputs: the whole output is compared at every length, and no sequence is left to a sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from smbench_kernels import hstu
from smbench_kernels.hstu import Jagged, Shape, Span
from smbench_kernels.op import Axis, Inputs, Point, Tolerance, Work

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ATTENTION_AXES = {
    "batch": Axis("sequences"),
    "seq_len": Axis("longest sequence that a batch may have, and the N that scores are divided by"),
    "lengths": Axis(
        "all sequences of seq_len tokens, or jagged: seq_len, 1, 0, then random", choices=("full", "jagged")
    ),
    "mask": Axis(
        "causal alone, with candidates at the end, with context at the start as well, or not causal with candidates",
        choices=("causal", "targets", "contextual", "noncausal"),
    ),
    "heads": Axis("heads of u, v, q and k each"),
    "head_dim": Axis("elements of a head, a multiple of 16", minimum=16),
    "dtype": Axis("of everything but the offsets", choices=tuple(DTYPES)),
}
LAYER_AXES = {
    **ATTENTION_AXES,
    "embedding": Axis("width of what goes through the layer", minimum=16),
    "layers": Axis("layers one after the other, each with parameters of its own"),
}
PARAMETERS = ("norm_weight", "norm_bias", "uvqk_weight", "uvqk_bias", "out_norm_weight", "out_norm_bias", "out_weight")
GRADIENTS = tuple(f"d{name}" for name in PARAMETERS)
LENGTHS_SEED = 20240717
"""Jagged lengths follow from the point alone: shapes may not change with the seed."""
CANDIDATES = 16
"""With candidates, a sequence has up to a sixteenth of seq_len of them; the same of context."""

ATTENTION_TOLERANCES = {
    "float32": Tolerance(relative=5e-3, elementwise=0.1),
    "float16": Tolerance(relative=5e-3, elementwise=0.1),
    "bfloat16": Tolerance(relative=1.5e-2, elementwise=0.25),
}
"""Tensor cores take 8 (bfloat16) or 11 significant bits (float16, and TF32 of float32). Measured on an H200, bfloat16:
0.24 % where float32 is summed up, 0.96 % at 8192 tokens where dq is summed up in bfloat16. What is wrong is off by far
more: one of 128 tiles left out is 9 %, one head of four 50 %."""
LAYER_TOLERANCES = {
    "float32": Tolerance(relative=5e-3, elementwise=0.1),
    "float16": Tolerance(relative=1e-2, elementwise=0.1),
    "bfloat16": Tolerance(relative=3e-2, elementwise=0.4),
}
"""Every tensor between the operations of a layer is rounded once more, and of two layers twice as many: PyTorch's own
operations in bfloat16 come to 1.9 % with two small layers."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """A point in types."""

    batch: int
    seq_len: int
    lengths: str
    mask: str
    shape: Shape
    layers: int
    dtype: torch.dtype

    @classmethod
    def of(cls, point: Point) -> Sizes:
        """Of a point of the attention, whose layer takes as much as its heads make, or of the layer."""
        heads, head_dim = int(point["heads"]), int(point["head_dim"])
        shape = Shape(int(point.get("embedding", heads * head_dim)), heads, head_dim)
        return cls(
            int(point["batch"]),
            int(point["seq_len"]),
            str(point["lengths"]),
            str(point["mask"]),
            shape,
            int(point.get("layers", 1)),
            DTYPES[str(point["dtype"])],
        )

    def token_counts(self) -> list[int]:
        """The length of each sequence."""
        if self.lengths == "full":
            return [self.seq_len] * self.batch
        generator = torch.Generator().manual_seed(LENGTHS_SEED)
        drawn = torch.randint(1, self.seq_len + 1, (self.batch,), generator=generator).tolist()
        return [self.seq_len, 1, 0, *drawn][: self.batch]

    @property
    def tokens(self) -> int:
        """Rows of x."""
        return sum(self.token_counts())


def batch_of(point: Point, inputs: Inputs) -> Jagged:
    """The batch that the integers among the inputs describe."""
    return Jagged(
        inputs["offsets"],
        int(point["seq_len"]),
        inputs.get("num_targets"),
        inputs.get("num_contextuals"),
        causal=point["mask"] != "noncausal",
    )


def integers(
    sizes: Sizes, lengths: list[int], generator: torch.Generator, device: torch.device
) -> dict[str, torch.Tensor]:
    """`offsets`, and where the mask has them `num_targets` and `num_contextuals`, all int32."""

    def counts(most: torch.Tensor) -> torch.Tensor:
        drawn = torch.randint(0, max(2, sizes.seq_len // CANDIDATES), most.shape, generator=generator)
        return torch.minimum(drawn, most)

    tokens = torch.tensor(lengths)
    found = {"offsets": torch.nn.functional.pad(tokens.cumsum(0), (1, 0))}
    if sizes.mask != "causal":
        found["num_targets"] = counts(tokens)
    if sizes.mask == "contextual":
        found["num_contextuals"] = counts(tokens - found["num_targets"])
    return {name: values.to(torch.int32).to(device) for name, values in found.items()}


def redraw(point: Point, inputs: Inputs, seed: int) -> Inputs | None:
    """The same tokens cut into sequences in another order, with other candidates; None where nothing can differ."""
    sizes = Sizes.of(point)
    lengths = sizes.token_counts()
    if sizes.mask == "causal" and len(set(lengths)) == 1:
        return None
    drawn = integers(sizes, lengths[::-1], torch.Generator().manual_seed(seed), inputs["offsets"].device)
    return {**inputs, **drawn}


def forward_inputs(point: Point, seed: int, device: torch.device) -> Inputs:
    """`uvqk` [tokens, 4 * H * D] standard normal, of which q, k and v are views; integers; `y` [tokens, H, D] NaN."""
    return {**_attention_inputs(point, seed, device), **_unwritten(point, device, ("y",))}


def backward_inputs(point: Point, seed: int, device: torch.device) -> Inputs:
    """As `forward_inputs`, with `dout` [tokens, H, D] standard normal; `dq`, `dk`, `dv` [tokens, H, D] NaN."""
    given = _attention_inputs(point, seed, device)
    shape = Sizes.of(point).shape
    generator = torch.Generator(device=device).manual_seed(seed + 1)
    size = (given["uvqk"].shape[0], shape.heads, shape.head_dim)
    dout = torch.randn(size, dtype=given["uvqk"].dtype, generator=generator, device=device)
    return {**given, "dout": dout, **_unwritten(point, device, ("dq", "dk", "dv"))}


def _attention_inputs(point: Point, seed: int, device: torch.device) -> dict[str, torch.Tensor]:
    sizes = Sizes.of(point)
    generator = torch.Generator(device=device).manual_seed(seed)
    columns = 4 * sizes.shape.width
    uvqk = torch.randn((sizes.tokens, columns), dtype=sizes.dtype, generator=generator, device=device)
    cpu = torch.Generator().manual_seed(seed)
    return {"uvqk": uvqk, **integers(sizes, sizes.token_counts(), cpu, device)}


def _unwritten(point: Point, device: torch.device, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    sizes = Sizes.of(point)
    size = (sizes.tokens, sizes.shape.heads, sizes.shape.head_dim)
    return {name: torch.full(size, torch.nan, dtype=sizes.dtype, device=device) for name in names}


def layer_inputs(point: Point, seed: int, device: torch.device) -> Inputs:
    """`x` and `dy` [tokens, E] standard normal; PARAMETERS, each [layers, …] of `hstu.parameters`; integers.

    Outputs, NaN: `y` and `dx` [tokens, E], GRADIENTS in the shapes and the dtype of the parameters.
    """
    sizes = Sizes.of(point)
    generator = torch.Generator(device=device).manual_seed(seed)
    size = (sizes.tokens, sizes.shape.embedding)
    x, dy = (torch.randn(size, dtype=sizes.dtype, generator=generator, device=device) for _ in range(2))
    drawn = [hstu.parameters(sizes.shape, seed + 1 + layer, device, sizes.dtype) for layer in range(sizes.layers)]
    params = {name: torch.stack([layer[name] for layer in drawn]) for name in PARAMETERS}
    outputs = {"y": x, "dx": x, **{f"d{name}": params[name] for name in PARAMETERS}}
    cpu = torch.Generator().manual_seed(seed)
    return {
        "x": x,
        "dy": dy,
        **params,
        **integers(sizes, sizes.token_counts(), cpu, device),
        **{name: torch.full_like(like, torch.nan) for name, like in outputs.items()},
    }


def split(point: Point, uvqk: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v [tokens, H, D], views."""
    _, v, q, k = hstu.split_uvqk(uvqk, Sizes.of(point).shape)
    return q, k, v


def alone(batch: Jagged, span: Span) -> Jagged:
    """A batch of one of a batch's sequences."""

    def one(count: int, of: torch.Tensor | None) -> torch.Tensor | None:
        return None if of is None else of.new_tensor([count])

    return Jagged(
        batch.offsets.new_tensor([0, span.length]),
        batch.max_seqlen,
        one(span.targets, batch.num_targets),
        one(span.contextuals, batch.num_contextuals),
        batch.causal,
    )


def forward_reference(point: Point, inputs: Inputs) -> torch.Tensor:
    """`y` in float64."""
    q, k, v = split(point, inputs["uvqk"])
    batch, alpha = batch_of(point, inputs), Sizes.of(point).shape.alpha
    y = torch.empty(q.shape, dtype=torch.float64, device=q.device)
    for span in batch.sequences():
        of_span = [part[span.rows].double() for part in (q, k, v)]
        y[span.rows] = hstu.attention_reference(of_span[0], of_span[1], of_span[2], alone(batch, span), alpha)
    return y


def backward_reference(point: Point, inputs: Inputs) -> Mapping[str, torch.Tensor]:
    """`dq`, `dk` and `dv` in float64."""
    q, k, v = split(point, inputs["uvqk"])
    parts = (inputs["dout"], q, k, v)
    batch, alpha = batch_of(point, inputs), Sizes.of(point).shape.alpha
    found = {n: torch.empty(parts[0].shape, dtype=torch.float64, device=parts[0].device) for n in ("dq", "dk", "dv")}
    for span in batch.sequences():
        dout, q, k, v = (part[span.rows].double() for part in parts)
        gradients = hstu.attention_gradients(dout, q, k, v, alone(batch, span), alpha)
        for gradient, of_span in zip(found.values(), gradients, strict=True):
            gradient[span.rows] = of_span
    return found


class _Attention(torch.autograd.Function):
    """The attention for truth, whose backward pass computes its scores again instead of keeping them all."""

    @staticmethod
    def forward(ctx, q, k, v, batch, alpha):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(q, k, v)
        ctx.batch, ctx.alpha = batch, alpha
        return hstu.attention_reference(q, k, v, batch, alpha)

    @staticmethod
    def backward(ctx, dout):  # type: ignore[no-untyped-def]
        q, k, v = ctx.saved_tensors
        return *hstu.attention_gradients(dout, q, k, v, ctx.batch, ctx.alpha), None, None


def layer_shape(point: Point, silu: str = hstu.UVQK) -> Shape:
    """The shape of a point's layer; what SiLU is applied to is no axis, but tells two operations apart."""
    return replace(Sizes.of(point).shape, silu=silu)


def layer_reference(point: Point, inputs: Inputs, silu: str = hstu.UVQK) -> Mapping[str, torch.Tensor]:
    """`y`, `dx` and the gradient of every parameter in float64. Parameters' gradients add up over the sequences."""
    sizes, shape, batch = Sizes.of(point), layer_shape(point, silu), batch_of(point, inputs)
    params = {name: inputs[name].double().requires_grad_() for name in PARAMETERS}
    y, dx = (torch.empty(inputs["x"].shape, dtype=torch.float64, device=inputs["x"].device) for _ in range(2))
    for span in batch.sequences():
        x = inputs["x"][span.rows].double().requires_grad_()
        of_span = x
        for layer in range(sizes.layers):
            of_layer = {name: values[layer] for name, values in params.items()}
            of_span = hstu.layer_reference(of_span, of_layer, alone(batch, span), shape, attention=_Attention.apply)
        of_span.backward(inputs["dy"][span.rows].double())
        y[span.rows] = of_span.detach()
        dx[span.rows] = x.grad if x.grad is not None else 0.0
    gradients = {
        f"d{name}": torch.zeros_like(values) if values.grad is None else values.grad for name, values in params.items()
    }
    return {"y": y, "dx": dx, **gradients}


def forward_work(point: Point, inputs: Inputs) -> Work:
    """q, k and v read once, y written once; operations by the document's formula."""
    return Work(_bytes(inputs["y"]) * 4, _attention_flops(point, inputs))


def backward_work(point: Point, inputs: Inputs) -> Work:
    """q, k, v and dout read once, three gradients written once; operations by the document's formula."""
    return Work(_bytes(inputs["dout"]) * 7, int(hstu.BACKWARD_ATTENTION * _attention_flops(point, inputs)))


def layer_forward_work(point: Point, inputs: Inputs) -> Work:
    """x and the parameters read once, y written once: what lies between may stay on the chip."""
    sizes = Sizes.of(point)
    flops = sizes.layers * (hstu.gemm_flops(sizes.tokens, sizes.shape) + _attention_flops(point, inputs))
    return Work(2 * _bytes(inputs["x"]) + _parameter_bytes(inputs), flops)


def layer_backward_work(point: Point, inputs: Inputs) -> Work:
    """x, dy and the parameters read once, every gradient written once."""
    sizes = Sizes.of(point)
    gemm = hstu.BACKWARD_GEMM * hstu.gemm_flops(sizes.tokens, sizes.shape)
    attention = int(hstu.BACKWARD_ATTENTION * _attention_flops(point, inputs))
    return Work(3 * _bytes(inputs["x"]) + 2 * _parameter_bytes(inputs), sizes.layers * (gemm + attention))


def layer_work(point: Point, inputs: Inputs) -> Work:
    """x, dy and the parameters read once, y and every gradient written once."""
    forward, backward = layer_forward_work(point, inputs), layer_backward_work(point, inputs)
    return Work(4 * _bytes(inputs["x"]) + 2 * _parameter_bytes(inputs), forward.flops + backward.flops)


def attention_tolerance(point: Point) -> Tolerance:
    """The bound of the point's dtype."""
    return ATTENTION_TOLERANCES[str(point["dtype"])]


def layer_tolerance(point: Point) -> Tolerance:
    """The bound of the point's dtype."""
    return LAYER_TOLERANCES[str(point["dtype"])]


def _attention_flops(point: Point, inputs: Inputs) -> int:
    spans = batch_of(point, inputs).sequences()
    shape = Sizes.of(point).shape
    lengths, targets = [span.length for span in spans], [span.targets for span in spans]
    return hstu.attention_flops(lengths, targets, shape.heads, shape.head_dim, causal=point["mask"] != "noncausal")


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _parameter_bytes(inputs: Inputs) -> int:
    return sum(_bytes(inputs[name]) for name in PARAMETERS)
