"""What an HSTU layer is: jagged batches, the mask, truth in PyTorch, parameters, operation counts. Owns no kernel.

HSTU (hierarchical sequential transduction unit, arXiv 2402.17152) as document 003 runs it: the weight of a key is
`silu(alpha * q . k) / N`, without a softmax, so that no row depends on a maximum or a sum. The definitions were held
against the PyTorch paths of NVIDIA/recsys-examples (`ops/pt_ops/pt_hstu_attention.py`, `modules/native_hstu_layer.py`)
and of Meta's generative-recommenders (`ops/pytorch/pt_hstu_attention.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

EPS = 1e-5
"""Added to the variance in both layer norms, as in the document's configuration."""


@dataclass(frozen=True, slots=True)
class Jagged:
    """A batch of sequences laid end to end: the tokens of sequence b are the rows offsets[b] … offsets[b + 1] - 1.

    A sequence is context, then history, then candidates; `num_contextuals[b] + num_targets[b]` is at most its length.
    """

    offsets: torch.Tensor
    """int32 [batch + 1] on the device, from 0 to the number of tokens; a sequence may be empty."""
    max_seqlen: int
    """Longest sequence that the batch may have: the N of `silu(alpha q k^T) / N` and the bound of a kernel's grid."""
    num_targets: torch.Tensor | None = None
    """int32 [batch]: how many of a sequence's last tokens are candidates; None: none."""
    num_contextuals: torch.Tensor | None = None
    """int32 [batch]: how many of a sequence's first tokens are context; None: none."""
    causal: bool = True

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return self.offsets.numel() - 1

    def sequences(self) -> list[Span]:
        """The batch's sequences as plain integers. Waits for the device: for references and bookkeeping only."""
        offsets = self.offsets.tolist()
        targets = self.num_targets.tolist() if self.num_targets is not None else [0] * self.batch
        contextuals = self.num_contextuals.tolist() if self.num_contextuals is not None else [0] * self.batch
        return [Span(offsets[b], offsets[b + 1] - offsets[b], targets[b], contextuals[b]) for b in range(self.batch)]


@dataclass(frozen=True, slots=True)
class Span:
    """One sequence of a batch: its first row and its counts of tokens."""

    start: int
    length: int
    targets: int
    contextuals: int

    @property
    def rows(self) -> slice:
        """Its rows in the tensors of the batch."""
        return slice(self.start, self.start + self.length)


UVQK, U = "uvqk", "u"
"""What of u, v, q and k a layer applies SiLU to: all, as document 003 and NVIDIA do, or u alone, as Meta does."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a layer. u, v, q and k are `heads * head_dim` wide each. ValueError where `silu` is neither of two."""

    embedding: int
    heads: int
    head_dim: int
    silu: str = UVQK
    """UVQK or U."""

    def __post_init__(self) -> None:
        if self.silu not in (UVQK, U):
            msg = f"silu is {self.silu!r}; known: {UVQK}, {U}"
            raise ValueError(msg)

    @property
    def width(self) -> int:
        """Columns of each of u, v, q, k and of the attention's output: heads * head_dim."""
        return self.heads * self.head_dim

    @property
    def alpha(self) -> float:
        """Factor of the scores in the layer: 1 / sqrt(head_dim)."""
        return float(self.head_dim**-0.5)


def visible(length: int, targets: int, contextuals: int, causal: bool, device: torch.device | str) -> torch.Tensor:
    """Which key (column) each query (row) of one sequence sees: bool [length, length].

    - history sees all context and, if causal, history up to and with itself; else everything;
    - context sees all context and all history, if causal not the candidates;
    - a candidate sees context, history and itself, never another candidate.

    Equal to `_get_valid_attn_mask` of both public PyTorch paths for `target_group_size` 1 and no window. Those map all
    context to id 0 and all candidates to one id (Meta clamps, NVIDIA masks unlike groups): a row sees smaller ids and
    itself, not causal also larger ones, and id 0 sees every id below the candidates'. Raises ValueError where
    candidates and context are more than the sequence has.
    """
    if targets < 0 or contextuals < 0 or targets + contextuals > length:
        msg = f"a sequence of {length} tokens cannot have {targets} candidates and {contextuals} contextual tokens"
        raise ValueError(msg)
    token = torch.arange(length, device=device)
    history_end = length - targets
    candidate = token >= history_end
    row, column = token[:, None], token[None, :]
    other_candidate = candidate[:, None] & candidate[None, :] & (row != column)
    if not causal:
        return ~other_candidate
    of_context = (row < contextuals) & (column < history_end)
    return ((column <= row) | of_context) & ~other_candidate


def attention_reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Jagged, alpha: float) -> torch.Tensor:
    """`silu(alpha * q k^T) / max_seqlen`, 0 where a key is not visible, `@ v`; sequence by sequence, head by head.

    q, k, v: [tokens, heads, head_dim], any strides, float32 or float64 (the truth); returns the same shape and dtype,
    contiguous. Differentiable. Holds the scores of one head of one sequence at a time, and where gradients are wanted
    those of all: `attention_gradients` does not.
    """
    if q.shape[0] == 0:
        return q * k * v
    outputs = []
    for sequence in batch.sequences():
        mask = visible(sequence.length, sequence.targets, sequence.contextuals, batch.causal, q.device)
        heads = [
            _attend(q[sequence.rows, h], k[sequence.rows, h], v[sequence.rows, h], mask, alpha, batch.max_seqlen)
            for h in range(q.shape[1])
        ]
        outputs.append(torch.stack(heads, dim=1))
    return torch.cat(outputs)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, alpha: float, scaling: int
) -> torch.Tensor:
    """One head of one sequence: q, k, v [length, head_dim]."""
    weights = F.silu(q @ k.T * alpha) / scaling
    return weights.masked_fill(~mask, 0.0) @ v


def attention_gradients(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Jagged, alpha: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of `attention_reference` by the chain rule, one head of one sequence at a time: (dq, dk, dv).

    All tensors [tokens, heads, head_dim] of one dtype, float32 or float64. With s = alpha q k^T and sigma its logistic
    function: dv = (silu(s) / N)^T dout and ds = (dout v^T) * sigma * (1 + s (1 - sigma)) / N, each masked;
    dq = alpha ds k, dk = alpha ds^T q. A derivation apart from autograd's, so that each checks the other in tests.
    """
    dq, dk, dv = (torch.zeros(q.shape, dtype=q.dtype, device=q.device) for _ in range(3))
    for sequence in batch.sequences():
        hidden = ~visible(sequence.length, sequence.targets, sequence.contextuals, batch.causal, q.device)
        rows = sequence.rows
        for h in range(q.shape[1]):
            scores = q[rows, h] @ k[rows, h].T * alpha
            sigma = torch.sigmoid(scores)
            weights = (scores * sigma / batch.max_seqlen).masked_fill_(hidden, 0.0)
            dv[rows, h] = weights.T @ dout[rows, h]
            slope = sigma.mul_(1 + scores * (1 - sigma)).div_(batch.max_seqlen).masked_fill_(hidden, 0.0)
            dscores = slope.mul_(dout[rows, h] @ v[rows, h].T).mul_(alpha)
            dq[rows, h] = dscores @ k[rows, h]
            dk[rows, h] = dscores.T @ q[rows, h]
    return dq, dk, dv


def parameters(shape: Shape, seed: int, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The parameters of a layer, weights stored as [in, out] (an NN GEMM), drawn in float32 and rounded to `dtype`.

    norm_weight [E], norm_bias [E], uvqk_weight [E, 4 * H * D], uvqk_bias [4 * H * D], out_norm_weight [H * D],
    out_norm_bias [H * D], out_weight [H * D, E]. Weights are normal with variance 1 / in, so that what goes in with
    variance 1 comes out with it; norms are near 1 and 0 but not there, so that a forgotten one shows.
    """
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(*sizes: int, scale: float, mean: float = 0.0) -> torch.Tensor:
        drawn = torch.randn(sizes, generator=generator, device=device, dtype=torch.float32)
        return (drawn * scale + mean).to(dtype)

    e, w = shape.embedding, shape.width
    return {
        "norm_weight": normal(e, scale=0.1, mean=1.0),
        "norm_bias": normal(e, scale=0.1),
        "uvqk_weight": normal(e, 4 * w, scale=e**-0.5),
        "uvqk_bias": normal(4 * w, scale=0.1),
        "out_norm_weight": normal(w, scale=0.1, mean=1.0),
        "out_norm_bias": normal(w, scale=0.1),
        "out_weight": normal(w, e, scale=w**-0.5),
    }


def split_uvqk(uvqk: torch.Tensor, shape: Shape) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """u [T, H * D] and v, q, k [T, H, D], views of `uvqk` [T, 4 * H * D] whose columns are u, v, q, k in this order."""
    u, v, q, k = uvqk.split(shape.width, dim=1)
    heads = (shape.heads, shape.head_dim)
    return u, v.unflatten(1, heads), q.unflatten(1, heads), k.unflatten(1, heads)


def activated(uvqk: torch.Tensor, shape: Shape) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`split_uvqk`, SiLU applied to what the layer applies it to."""
    if shape.silu == UVQK:
        return split_uvqk(F.silu(uvqk), shape)
    u, v, q, k = split_uvqk(uvqk, shape)
    return F.silu(u), v, q, k


Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Jagged, float], torch.Tensor]
"""What computes y [T, H, D] from q, k, v [T, H, D], a batch and alpha."""
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""The same, of a batch and an alpha that it knows."""


def layer_reference(
    x: torch.Tensor,
    params: Mapping[str, torch.Tensor],
    batch: Jagged,
    shape: Shape,
    eps: float = EPS,
    dropout: torch.Tensor | None = None,
    attention: Attention | None = None,
) -> torch.Tensor:
    """One HSTU layer on x [tokens, embedding] in the dtype of its inputs, for truth float32 or float64; differentiable.

    x -> LayerNorm -> @ uvqk_weight + uvqk_bias -> split into u, v, q, k, SiLU -> attention -> LayerNorm * u
    -> * dropout [tokens, H * D] (a mask that already holds 1 / (1 - p), or None) -> @ out_weight -> + x. `attention`
    stands for `attention_reference`, with the same arguments.
    """
    attend = attention or attention_reference
    return layer_around(x, params, shape, lambda q, k, v: attend(q, k, v, batch, shape.alpha), eps, dropout)


def layer_around(
    x: torch.Tensor,
    params: Mapping[str, torch.Tensor],
    shape: Shape,
    attend: Attend,
    eps: float = EPS,
    dropout: torch.Tensor | None = None,
) -> torch.Tensor:
    """`layer_reference` with everything about its attention in one function of q, k and v."""
    normed = F.layer_norm(x, (shape.embedding,), params["norm_weight"], params["norm_bias"], eps)
    u, v, q, k = activated(normed @ params["uvqk_weight"] + params["uvqk_bias"], shape)
    attended = attend(q, k, v).flatten(1)
    gated = F.layer_norm(attended, (shape.width,), params["out_norm_weight"], params["out_norm_bias"], eps) * u
    if dropout is not None:
        gated = gated * dropout
    return gated @ params["out_weight"] + x


def attention_flops(
    lengths: Sequence[int], targets: Sequence[int] | None, heads: int, head_dim: int, causal: bool = True
) -> int:
    """Floating-point operations of the attention's forward pass by the formula of the document's repository (perf.py).

    Per sequence of s tokens, h of them no candidates: `4 H D s h + 4 H D (s - h)`, causal less `2 H D h^2`, which
    without candidates is `4 H D s^2 / 2`: half the square although the diagonal makes it a little more. The backward
    pass is `BACKWARD_ATTENTION` times as much: a convention (five products against two), whatever a kernel does.
    """
    total = 0
    for length, candidates in zip(lengths, targets or [0] * len(lengths), strict=True):
        history = length - candidates
        total += 4 * length * history + 4 * candidates - (2 * history * history if causal else 0)
    return total * heads * head_dim


def gemm_flops(tokens: int, shape: Shape) -> int:
    """Operations of the layer's linear maps, forward: `2 T (4 H D) E + 2 T (H D) E`; with backward three times it."""
    return 2 * tokens * 5 * shape.width * shape.embedding


BACKWARD_ATTENTION = 2.5
"""The backward pass of the attention relative to its forward pass, by convention: 3.5 for both."""
BACKWARD_GEMM = 2
"""The same of the linear maps: gradients of input and weight, 3 for both."""
