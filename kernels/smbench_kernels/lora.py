"""What the four multi-LoRA operations share: axes, inputs, float64 truth, least work, tolerance.

Does not own any kernel. The definition, with T tokens, h hidden, r rank, L LoRAs and the LoRA of token t in
`lora(t)`, where -1 stands for none and leaves the token's row of `y` untouched:

    shrink: y[T, r] (float32) += SCALE * x[T, h] . A[lora(t)][r, h]^T          A is [L, r, h]
    expand: y[T, h] (dtype)   += x[T, r] (float32) . B[lora(t)][h, r]^T        B is [L, h, r]

`bgmv` has one LoRA index per token, `sgmv` one per sequence of `seq_len` tokens. The input of expand is float32
because it is the output of shrink, as in the serving engines.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from smbench_kernels.op import Axis, Inputs, Op, Point, Tolerance, Work

SCALE = 1.0
"""Factor of shrink, as in the document."""

PEERS = ("vllm", "sglang")
"""Other projects whose multi-LoRA kernels are providers."""

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}

AXES = {
    "batch": Axis("sequences in the batch"),
    "seq_len": Axis("tokens of each sequence"),
    "hidden_size": Axis("input size of shrink, output size of expand"),
    "rank": Axis("LoRA rank"),
    "num_loras": Axis("LoRAs that are loaded; all of them are drawn if there are as many indices"),
    "dtype": Axis("type of the weights, of shrink's x and of expand's y", choices=tuple(DTYPES)),
}

TOLERANCES = {
    # a provider may round a result or the input of a product to dtype once (unit roundoff 2**-11 and 2**-8); a dropped
    # term of a sum of n shows as 1/sqrt(n): 0.28 % at the largest hidden size of the document
    "float16": Tolerance(relative=1.5e-3, elementwise=0.02),
    "bfloat16": Tolerance(relative=1e-2, elementwise=0.16),
}


@dataclass(frozen=True, slots=True)
class Sizes:
    """A point's axes as numbers."""

    batch: int
    seq_len: int
    hidden: int
    rank: int
    loras: int
    dtype: torch.dtype

    @classmethod
    def of(cls, point: Point) -> Sizes:
        """The sizes of a point. KeyError for a missing axis or an unknown dtype."""
        return cls(
            batch=int(point["batch"]),
            seq_len=int(point["seq_len"]),
            hidden=int(point["hidden_size"]),
            rank=int(point["rank"]),
            loras=int(point["num_loras"]),
            dtype=DTYPES[str(point["dtype"])],
        )

    @property
    def tokens(self) -> int:
        return self.batch * self.seq_len


def make_op(name: str, doc: str, *, expands: bool, per_token: bool) -> Op:
    """One of the four operations. Its module has `default`, `tuned` and `TUNABLE`."""
    return Op(
        name=name,
        doc=doc,
        axes=AXES,
        make_inputs=partial(make_inputs, expands=expands, per_token=per_token),
        reference=reference,
        work=work,
        tolerance=tolerance,
        providers={
            "torch": f"smbench_kernels.lora_torch:{name}",
            "smbench": f"smbench_kernels.{name}:default",
            "smbench-tuned": f"smbench_kernels.{name}:tuned",
            **peers(name),
        },
        baseline="torch",
        tunable=f"smbench_kernels.{name}:TUNABLE",
        peer_tunables=peer_tunables(name),
    )


def peers(name: str) -> dict[str, str]:
    """Providers over other projects' kernels: with the parameters that they choose, and with those that we searched."""
    found = {}
    for library in PEERS:
        found[library] = f"smbench_kernels.lora_{library}:{name}"
        found[f"{library}-tuned"] = f"smbench_kernels.lora_{library}:{name}_tuned"
    return found


def peer_tunables(name: str) -> dict[str, str]:
    """What the tuner searches for each of the latter."""
    return {f"{library}-tuned": f"smbench_kernels.lora_{library}:{name.upper()}" for library in PEERS}


def make_inputs(
    point: Point,
    seed: int,
    device: torch.device,
    *,
    expands: bool,
    per_token: bool,
    no_lora: int = 0,
) -> Inputs:
    """Inputs of a point; the same for every provider, drawn on `device`.

    - `x` [T, h] dtype (shrink) or [T, r] float32 (expand), `weights` [L, r, h] or [L, h, r] dtype, both contiguous;
    - `y` [T, r] float32 or [T, h] dtype, random, since the operations accumulate;
    - `indices` [S] int32, the LoRA of each of the S sequences, -1 for none; `seq_lens` and `seq_starts` [S] int32.
      bgmv's sequences are its tokens: S = T and every length is 1;
    - `no_lora` of the S indices are -1.

    Values are normal with variance 1 for `x` and 1/n for weights of a sum of n terms, so that a call changes `y` by
    about 1 everywhere; `y` starts at a quarter of that, lest its rounding hide the change. However often calls
    accumulate into float16, `y` cannot overflow: beyond 2**15 its spacing is 32, and a change below 16 rounds away. In
    bfloat16 and float32 the range is out of reach.
    """
    sizes = Sizes.of(point)
    generator = torch.Generator(device=device).manual_seed(seed)
    normal = partial(torch.randn, generator=generator, device=device)
    count = sizes.tokens if per_token else sizes.batch
    length = 1 if per_token else sizes.seq_len
    indices = draw_indices(count, sizes.loras, no_lora, seed)
    width_in, width_out = (sizes.rank, sizes.hidden) if expands else (sizes.hidden, sizes.rank)
    dtypes = input_dtypes(point, expands=expands)
    return {
        "x": normal(sizes.tokens, width_in, dtype=dtypes["x"]),
        "weights": normal(sizes.loras, width_out, width_in, dtype=dtypes["weights"]).mul_(width_in**-0.5),
        "indices": indices.to(device),
        "seq_lens": torch.full((count,), length, dtype=dtypes["seq_lens"], device=device),
        "seq_starts": torch.arange(0, count * length, length, dtype=dtypes["seq_starts"], device=device),
        "y": normal(sizes.tokens, width_out, dtype=dtypes["y"]).mul_(0.25),
    }


def input_dtypes(point: Point, *, expands: bool) -> dict[str, torch.dtype]:
    """The dtype of each input, all that compiling a kernel needs of them."""
    dtype = Sizes.of(point).dtype
    return {
        "x": torch.float32 if expands else dtype,
        "weights": dtype,
        "indices": torch.int32,
        "seq_lens": torch.int32,
        "seq_starts": torch.int32,
        "y": dtype if expands else torch.float32,
    }


def draw_indices(count: int, loras: int, no_lora: int, seed: int) -> torch.Tensor:
    """`count` LoRA indices [count] int32 on the CPU, the same on every device.

    `no_lora` of them are -1; the others hold every LoRA at least once, or `count - no_lora` different ones if there are
    fewer indices than LoRAs. The document's script drew from one LoRA too few.
    """
    if not 0 <= no_lora <= count:
        raise ValueError(f"no_lora is {no_lora}, outside 0..{count}")
    generator = torch.Generator().manual_seed(seed)
    used = count - no_lora
    every = torch.randperm(loras, generator=generator)[:used]
    more = torch.randint(0, loras, (max(0, used - loras),), generator=generator)
    none = torch.full((no_lora,), -1)
    drawn = torch.cat([every, more, none])
    return drawn[torch.randperm(count, generator=generator)].to(torch.int32)


def reference(point: Point, inputs: Inputs) -> torch.Tensor:
    """`y` after one call, in float64: one matrix product for each LoRA that is present."""
    x, weights, y = inputs["x"], inputs["weights"], inputs["y"].double()
    scale = SCALE if inputs["x"].dtype == weights.dtype else 1.0
    by_token = token_indices(inputs)
    for lora in present(inputs):
        rows = (by_token == lora).nonzero().squeeze(1)
        y[rows] += scale * (x[rows].double() @ weights[lora].double().T)
    return y


def work(point: Point, inputs: Inputs) -> Work:
    """Weights of each LoRA present once; x read, y read and written for the tokens that have a LoRA."""
    x, weights, y = inputs["x"], inputs["weights"], inputs["y"]
    tokens = int((token_indices(inputs) >= 0).sum())
    weight_bytes = len(present(inputs)) * weights[0].numel() * weights.element_size()
    token_bytes = x.shape[1] * x.element_size() + 2 * y.shape[1] * y.element_size()
    index_bytes = inputs["indices"].numel() * inputs["indices"].element_size()
    return Work(
        bytes=weight_bytes + tokens * token_bytes + index_bytes,
        flops=2 * tokens * x.shape[1] * y.shape[1],
    )


def tolerance(point: Point) -> Tolerance:
    """The bound of the point's dtype."""
    return TOLERANCES[str(point["dtype"])]


def token_indices(inputs: Inputs) -> torch.Tensor:
    """The LoRA index of each token, [T] int32."""
    return torch.repeat_interleave(inputs["indices"], inputs["seq_lens"].long())


def present(inputs: Inputs) -> list[int]:
    """The LoRAs that at least one token uses, ascending."""
    return [index for index in inputs["indices"].unique().tolist() if index >= 0]
