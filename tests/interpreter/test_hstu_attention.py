"""The Triton HSTU attention computes its definition and gradients: jagged lengths, every mask, views, any tiles."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch

from smbench_kernels import hstu_attention, hstu_attention_triton
from smbench_kernels import hstu_attention_configs as configurations
from smbench_kernels.hstu import Jagged, Shape, attention_gradients, attention_reference, split_uvqk
from smbench_kernels.hstu_attention_configs import KEPT, RECOMPUTED, backward_config, forward_config
from smbench_kernels.op import Config

ALPHA = 0.3
TOLERANCE = {torch.float16: 6e-4, torch.bfloat16: 5e-3}
LENGTHS = (0, 1, 33, 64, 101)
TARGETS, CONTEXTS = (0, 1, 0, 40, 10), (0, 0, 33, 5, 70)
PADDING = 3
"""Rows after the last sequence, which hold no number and stay as they are."""
# rows outside of a sequence are multiplied, but never stored
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The workspace holds no number before a call."""
    plain = hstu_attention_triton.workspace
    monkeypatch.setattr(hstu_attention_triton, "workspace", lambda problem, q: plain(problem, q).fill_(torch.nan))


@dataclass(frozen=True)
class Case:
    """Inputs as a layer has them, views of one tensor, and outputs that hold no number."""

    batch: Jagged
    dout: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor
    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor
    gradients: torch.Tensor

    def run(self, forward: Config | None = None, backward: Config | None = None) -> None:
        arguments = (self.q, self.k, self.v, self.batch, ALPHA)
        hstu_attention.forward(*arguments, out=self.out, config=forward)
        hstu_attention.backward(self.dout, *arguments, dq=self.dq, dk=self.dk, dv=self.dv, config=backward)

    def outputs(self) -> tuple[torch.Tensor, ...]:
        return self.out, self.dq, self.dk, self.dv

    def check(self) -> None:
        tokens = int(self.batch.offsets[-1])
        dout, q, k, v = (x[:tokens].double() for x in (self.dout, self.q, self.k, self.v))
        expected = (
            attention_reference(q, k, v, self.batch, ALPHA),
            *attention_gradients(dout, q, k, v, self.batch, ALPHA),
        )
        for found, truth in zip(self.outputs(), expected, strict=True):
            error = found[:tokens].double() - truth
            assert error.norm() <= TOLERANCE[self.q.dtype] * truth.norm()
            assert error.abs().max() <= 30 * TOLERANCE[self.q.dtype] * truth.square().mean().sqrt()
            assert found[tokens:].isnan().all(), "rows of no sequence were written"


def case_of(
    seed: int,
    lengths: Sequence[int] = LENGTHS,
    targets: Sequence[int] | None = None,
    contexts: Sequence[int] | None = None,
    causal: bool = True,
    heads: int = 1,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float16,
    max_seqlen: int | None = None,
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    counts = [None if x is None else torch.tensor(x, dtype=torch.int32) for x in (targets, contexts)]
    batch = Jagged(offsets, max_seqlen or max(lengths), counts[0], counts[1], causal)
    tokens = sum(lengths) + PADDING
    shape = Shape(embedding=1, heads=heads, head_dim=head_dim)

    def drawn(*sizes: int) -> torch.Tensor:
        x = torch.randn(sizes, generator=generator).to(dtype)
        x[tokens - PADDING :] = torch.nan
        return x

    _, v, q, k = split_uvqk(drawn(tokens, 4 * shape.width), shape)
    gradients = torch.full((tokens, 4 * shape.width), torch.nan, dtype=dtype)
    _, dv, dq, dk = split_uvqk(gradients, shape)
    out = torch.full((tokens, heads, head_dim), torch.nan, dtype=dtype)
    return Case(batch, drawn(tokens, heads, head_dim), q, k, v, out, dq, dk, dv, gradients)


FINE, SMALL, WIDE, TALL = (16, 16, 1, 2, 1), (16, 64, 4, 2, 1), (32, 64, 4, 2, 1), (64, 16, 4, 2, 1)
"""The fine one writes less of dS than the others read."""
FORWARD = {"tall": forward_config(TALL, 1), "wide": forward_config(WIDE, 1)}
BACKWARD = {
    "recomputed, dv with dk": backward_config(RECOMPUTED, SMALL, None, TALL, 1),
    "recomputed, apart": backward_config(RECOMPUTED, WIDE, TALL, SMALL, 1),
    "kept, dv with dk": backward_config(KEPT, FINE, None, TALL, 1),
    "kept, apart": backward_config(KEPT, FINE, TALL, SMALL, 1),
    "kept, coarse": backward_config(KEPT, WIDE, TALL, TALL, 1),
}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("targets", "contexts", "forward", "backward"),
    [
        (None, None, "wide", "recomputed, dv with dk"),
        (TARGETS, None, "tall", "kept, coarse"),
        (None, CONTEXTS, "wide", "recomputed, dv with dk"),
        (TARGETS, CONTEXTS, "tall", "kept, coarse"),
        (TARGETS, CONTEXTS, "wide", "recomputed, dv with dk"),
    ],
)
def test_every_mask(
    targets: Sequence[int] | None,
    contexts: Sequence[int] | None,
    forward: str,
    backward: str,
    causal: bool,
    seed: int,
) -> None:
    """Empty sequences, one token, odd lengths, a sequence of context alone; max_seqlen above the longest."""
    if targets is not None and contexts is not None:
        contexts = [min(c, n - t) for c, n, t in zip(contexts, LENGTHS, targets, strict=True)]
    case = case_of(seed, targets=targets, contexts=contexts, causal=causal, max_seqlen=104)
    case.run(FORWARD[forward], BACKWARD[backward])
    case.check()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("backward", BACKWARD)
def test_every_way_through_the_backward_pass(backward: str, causal: bool, seed: int) -> None:
    """A sequence of more than one block of the workspace."""
    case = case_of(seed, lengths=(140, 5), targets=(9, 1), causal=causal)
    case.run(backward=BACKWARD[backward])
    case.check()


@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [
        *((32, torch.float16), (100, torch.float16), (256, torch.float16)),
        *((16, torch.bfloat16), (40, torch.bfloat16), (128, torch.bfloat16)),
    ],
)
def test_head_sizes_and_types_with_default_configurations(head_dim: int, dtype: torch.dtype, seed: int) -> None:
    case = case_of(seed, lengths=(37, 50), head_dim=head_dim, dtype=dtype, heads=2 if head_dim < 64 else 1)
    case.run()
    case.check()


@pytest.mark.parametrize(("causal", "backward"), [(True, "kept, coarse"), (False, "recomputed, apart")])
def test_descriptors_compute_what_pointers_do(causal: bool, backward: str, seed: int) -> None:
    """Tiles that the copy engine reads end in the next sequence, or where there is no number."""
    case = case_of(seed, targets=TARGETS, causal=causal)
    assert hstu_attention_triton.describable(case.q, case.k, case.v, case.dout)
    engine = {"TMA": configurations.COPY_ENGINE}
    case.run({**FORWARD["tall"], **engine}, {**BACKWARD[backward], **engine})
    case.check()


def test_dS_in_turns(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for two of six (sequence, head) pairs: three turns over one workspace."""
    case = case_of(seed, lengths=(90, 50, 1), heads=2)
    monkeypatch.setattr(hstu_attention_triton, "KEPT_BYTES", 2 * 128 * 128 * 2 + 1)
    case.run(backward=BACKWARD["kept, coarse"])
    case.check()


def test_without_room_for_dS_it_is_made_twice(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of(seed, lengths=(30, 9), head_dim=100)
    monkeypatch.setattr(hstu_attention_triton, "KEPT_BYTES", 1000)
    case.run()
    case.check()
    with pytest.raises(ValueError, match="1000 may be kept"):
        case.run(backward=BACKWARD["kept, apart"])


def test_same_bits_every_time_and_nothing_else_is_written(seed: int) -> None:
    case = case_of(seed, lengths=(70, 20), heads=2)
    inputs = (case.dout, case.q, case.k, case.v)
    before = [x.clone() for x in inputs]
    case.run()
    first = [x.clone() for x in case.outputs()]
    case.run()
    for found, earlier in zip((*case.outputs(), *inputs), (*first, *before), strict=True):
        assert torch.equal(found.nan_to_num(), earlier.nan_to_num())
    # the columns of u belong to somebody else
    assert case.gradients[:, : case.gradients.shape[1] // 4].isnan().all()


def test_new_outputs_and_expanded_gradients(seed: int) -> None:
    """What autograd hands over for a sum: one number for all."""
    case = case_of(seed, lengths=(20, 9))
    q, k, v = (x[:29] for x in (case.q, case.k, case.v))
    dout = torch.ones(1, dtype=q.dtype).expand(q.shape)
    found = hstu_attention.backward(dout, q, k, v, case.batch, ALPHA)
    expected = attention_gradients(dout.double(), q.double(), k.double(), v.double(), case.batch, ALPHA)
    for x, truth in zip(found, expected, strict=True):
        assert (x.double() - truth).norm() <= 6e-4 * truth.norm()


def test_no_tokens_at_all() -> None:
    batch = Jagged(torch.zeros(3, dtype=torch.int32), 0)
    empty = torch.empty(0, 2, 32, dtype=torch.float16)
    assert hstu_attention.forward(empty, empty, empty, batch, ALPHA).shape == empty.shape
    assert all(x.shape == empty.shape for x in hstu_attention.backward(empty, empty, empty, empty, batch, ALPHA))


def test_what_cannot_be_run_says_why(seed: int) -> None:
    case = case_of(seed, lengths=(4, 5))
    q, k, v = case.q, case.k, case.v
    with pytest.raises(ValueError, match=r"k has strides .* contiguous"):
        hstu_attention.forward(q, k.transpose(0, 2).contiguous().transpose(0, 2), v, case.batch, ALPHA)
    with pytest.raises(ValueError, match=r"q is torch.float32"):
        hstu_attention.forward(q.float(), k.float(), v.float(), case.batch, ALPHA)
    with pytest.raises(ValueError, match=r"v is \(12, 1, 8\)"):
        hstu_attention.forward(q, k, v[:, :, :8], case.batch, ALPHA)
    wide = torch.empty(2, 1, 300, dtype=torch.float16)
    with pytest.raises(ValueError, match="head_dim 1 to 256"):
        hstu_attention.forward(wide, wide, wide, case.batch, ALPHA)
    with pytest.raises(ValueError, match="below the lowest supported, 80"):
        configurations.default_forward(75, 64)
