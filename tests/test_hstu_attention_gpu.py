"""On a GPU: the Triton HSTU attention computes its definition, follows its inputs in graphs, repeats its bits."""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Sequence

import pytest
import torch

from smbench_kernels import hstu_attention, hstu_attention_triton
from smbench_kernels import hstu_attention_configs as configurations
from smbench_kernels.hstu import Jagged, Shape, attention_gradients, attention_reference, split_uvqk

pytestmark = pytest.mark.gpu
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 5e-3}
LENGTHS = (0, 1, 300, 513, 1000, 129)
TARGETS, CONTEXTS = (0, 1, 20, 0, 64, 100), (0, 0, 100, 3, 300, 29)
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def batch_of(lengths: Sequence[int], masks: bool, causal: bool = True) -> Jagged:
    def integers(values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device="cuda")

    offsets = integers([0, *itertools.accumulate(lengths)])
    targets, contexts = (integers(TARGETS), integers(CONTEXTS)) if masks else (None, None)
    return Jagged(offsets, max(lengths), targets, contexts, causal)


def drawn(tokens: int, heads: int, head_dim: int, dtype: torch.dtype, seed: int) -> Tensors:
    """dout, and q, k, v as views of one tensor."""
    sys.stderr.write(f"seed {seed}\n")
    generator = torch.Generator(device="cuda").manual_seed(seed)
    shape = Shape(1, heads, head_dim)
    uvqk = torch.randn(tokens, 4 * shape.width, generator=generator, device="cuda").to(dtype)
    _, v, q, k = split_uvqk(uvqk, shape)
    return torch.randn(tokens, heads, head_dim, generator=generator, device="cuda").to(dtype), q, k, v


def errors(found: Sequence[torch.Tensor], inputs: Tensors, batch: Jagged, alpha: float) -> list[float]:
    dout, q, k, v = (x.double() for x in inputs)
    truths = (attention_reference(q, k, v, batch, alpha), *attention_gradients(dout, q, k, v, batch, alpha))
    return [float((x.double() - truth).norm() / truth.norm()) for x, truth in zip(found, truths, strict=True)]


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize(("masks", "causal"), [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [(32, torch.float16), (64, torch.bfloat16), (96, torch.float16), (128, torch.bfloat16), (256, torch.bfloat16)],
)
def test_the_definition_is_computed(
    head_dim: int, dtype: torch.dtype, masks: bool, causal: bool, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, alpha = batch_of(LENGTHS, masks, causal), head_dim**-0.5
    inputs = drawn(sum(LENGTHS), 3, head_dim, dtype, random.randrange(2**31))
    if not kept:
        monkeypatch.setattr(hstu_attention_triton, "KEPT_BYTES", 0)
    out, dq, dk, dv = (torch.full_like(inputs[0], torch.nan) for _ in range(4))
    for _ in range(2):
        hstu_attention.portable_forward(*inputs[1:], batch, alpha, out)
        hstu_attention.portable_backward(*inputs, batch, alpha, dq, dk, dv)
    assert max(errors((out, dq, dk, dv), inputs, batch, alpha)) <= TOLERANCE[dtype]


def test_dq_is_as_right_in_long_sequences_as_in_short_ones() -> None:
    """A sum that is rounded to bfloat16 once per tile would be off by 0.5 % at 2048 tokens and 0.96 % at 8192."""
    for length in (512, 4096):
        batch = batch_of((length,), masks=False)
        inputs = drawn(length, 1, 256, torch.bfloat16, random.randrange(2**31))
        found = (
            hstu_attention.portable_forward(*inputs[1:], batch, 1 / 16),
            *hstu_attention.portable_backward(*inputs, batch, 1 / 16),
        )
        assert max(errors(found, inputs, batch, 1 / 16)) <= 2.6e-3


def test_a_replayed_graph_follows_its_inputs_and_repeats_its_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """In turns, over a workspace of the graph's own."""
    batch, alpha = batch_of(LENGTHS, masks=True), 1 / 16
    dout, q, k, v = drawn(sum(LENGTHS), 2, 256, torch.bfloat16, random.randrange(2**31))
    monkeypatch.setattr(hstu_attention_triton, "KEPT_BYTES", 5 * 8 * 8 * 128 * 128 * 2)
    outputs = out, dq, dk, dv = tuple(torch.empty_like(dout) for _ in range(4))

    def run() -> None:
        hstu_attention.portable_forward(q, k, v, batch, alpha, out)
        hstu_attention.portable_backward(dout, q, k, v, batch, alpha, dq, dk, dv)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        run()
        graph.capture_end()
        results = []
        for change in (True, False):
            if change:
                q.copy_(torch.randn_like(q))
            for x in outputs:
                x.fill_(torch.nan)
            graph.replay()
            stream.synchronize()
            assert max(errors(outputs, (dout, q, k, v), batch, alpha)) <= TOLERANCE[torch.bfloat16]
            results.append([x.clone() for x in outputs])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_pointers_compute_what_the_copy_engine_does() -> None:
    batch, alpha = batch_of(LENGTHS, masks=True), 1 / 16
    inputs = drawn(sum(LENGTHS), 2, 256, torch.bfloat16, random.randrange(2**31))
    capability = hstu_attention.capability(inputs[0].device)
    plain = {"TMA": configurations.POINTERS}
    forward = {**configurations.default_forward(capability, 256), **plain}
    backward = {**configurations.default_backward(capability, 256, kept=True), **plain}
    found = (
        hstu_attention.portable_forward(*inputs[1:], batch, alpha, config=forward),
        *hstu_attention.portable_backward(*inputs, batch, alpha, config=backward),
    )
    assert max(errors(found, inputs, batch, alpha)) <= TOLERANCE[torch.bfloat16]


def test_the_entry_agrees_with_the_portable_kernels() -> None:
    batch, alpha = batch_of(LENGTHS, masks=True), 1 / 16
    dout, q, k, v = drawn(sum(LENGTHS), 2, 256, torch.bfloat16, random.randrange(2**31))
    found = (hstu_attention.forward(q, k, v, batch, alpha), *hstu_attention.backward(dout, q, k, v, batch, alpha))
    assert max(errors(found, (dout, q, k, v), batch, alpha)) <= TOLERANCE[torch.bfloat16]
