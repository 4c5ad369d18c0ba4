"""What the Hopper attention kernels refuse, which needs no GPU, and on one that they compute the definition."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from smbench_kernels import hstu, hstu_attention_sm90
from smbench_kernels import hstu_attention_sm90_kernels as kernels
from smbench_kernels.hstu import Jagged
from smbench_kernels.hstu_attention_sm90 import Stream

HEADS, HEAD_DIM, ALPHA = 2, 256, 1 / 16
LENGTHS = (0, 1, 63, 64, 65, 127, 128, 129, 257, 500)
TARGETS = (0, 0, 10, 30, 0, 64, 70, 3, 100, 90)
CONTEXTUALS = (0, 1, 5, 0, 65, 10, 3, 100, 2, 140)
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 6e-4}
FEW_TOKENS, FEW_TOKENS_FACTOR = 8, 3

DEFAULT = hstu_attention_sm90.DEFAULT
CONFIGS = {
    "kept": DEFAULT,
    # parts of a few pairs of sequence and head
    "parts": replace(DEFAULT, workspace_bytes=1 << 21),
    "made again": replace(DEFAULT, workspace_bytes=0),
}


def jagged(device: torch.device | str, targets: bool = False, contextuals: bool = False, causal: bool = True) -> Jagged:
    def counts(values: tuple[int, ...]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    offsets = torch.tensor((0, *LENGTHS), dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
    return Jagged(
        offsets, 512, counts(TARGETS) if targets else None, counts(CONTEXTUALS) if contextuals else None, causal
    )


Four = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def tensors(device: torch.device | str, dtype: torch.dtype = torch.bfloat16) -> Four:
    """dout, and q, k, v that are views of one tensor."""
    shape = hstu.Shape(1024, HEADS, HEAD_DIM)
    uvqk = torch.randn(sum(LENGTHS), 4 * shape.width, device=device).to(dtype)
    _, v, q, k = hstu.split_uvqk(uvqk, shape)
    return torch.randn(q.shape, device=device).to(dtype), q, k, v


def test_a_processor_is_not_supported_and_the_reason_says_so() -> None:
    _, q, _, _ = tensors("cpu")
    assert "9.0" in str(hstu_attention_sm90.supports(q, jagged("cpu")))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda q: (q, q[:, :, :128], 1.0), "k is"),
        (lambda q: (q, q.half(), 1.0), "k is torch.float16"),
        (lambda q: (q, q.transpose(1, 2).contiguous().transpose(1, 2), 1.0), "16 bytes"),
        (lambda q: (q, q, 0.0), "alpha must be positive"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change: object, words: str) -> None:
    assert callable(change)
    _, q, _, _ = tensors("cpu")
    q, k, alpha = change(q)
    with pytest.raises(ValueError, match=words):
        hstu_attention_sm90.forward(q, k, q, jagged("cpu"), alpha)


def test_wide_offsets_are_refused() -> None:
    _, q, k, v = tensors("cpu")
    batch = replace(jagged("cpu"), offsets=jagged("cpu").offsets.long())
    with pytest.raises(ValueError, match="offsets must be contiguous int32"):
        hstu_attention_sm90.forward(q, k, v, batch, ALPHA)


def test_a_batch_without_tokens_is_done_at_once() -> None:
    empty = torch.empty(0, HEADS, HEAD_DIM, dtype=torch.bfloat16)
    batch = Jagged(torch.zeros(3, dtype=torch.int32), 64)
    assert hstu_attention_sm90.forward(empty, empty, empty, batch, ALPHA).shape == empty.shape
    assert all(d.shape == empty.shape for d in hstu_attention_sm90.backward(empty, empty, empty, empty, batch, ALPHA))


@dataclass
class Launches:
    """Stands in for the compiled kernels: what was to be launched, in order."""

    made: list[tuple[str, tuple[int, int, int], list[Any]]] = field(default_factory=list)

    def compiled(self, name: str, stream: Stream, dtype: torch.dtype, keeps: bool, device: torch.device) -> Named:
        del stream, dtype, keeps, device
        return Named(name, self)

    def names(self) -> list[str]:
        return [name for name, _, _ in self.made]


@dataclass
class Named:
    name: str
    launches: Launches

    def launcher(
        self, grid: tuple[int, int, int], threads: int, shared: int, arguments: list[Any]
    ) -> Callable[[], None]:
        del threads, shared
        return lambda: self.launches.made.append((self.name, grid, arguments))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    found = Launches()
    monkeypatch.setattr(kernels, "compiled", found.compiled)
    monkeypatch.setattr(hstu_attention_sm90, "tensor_map", lambda tensor, rows: (ctypes.c_char * 128)())
    return found


def declared(name: str) -> list[str]:
    """The kinds of a kernel's parameters, as its source has them."""
    found = re.search(rf"\n{name}\((.*?)\)\n", kernels.SOURCES[name], re.DOTALL)
    assert found
    return [kind(parameter) for parameter in found[1].split(",")]


def kind(parameter: str) -> str:
    if "TensorMap" in parameter:
        return "map"
    if "*" in parameter:
        return "pointer"
    return "long" if "long long" in parameter else parameter.split()[0]


def passed(argument: object) -> str:
    if isinstance(argument, torch.Tensor | ctypes.c_uint64):
        return "pointer"
    if isinstance(argument, ctypes.Array):
        return "map" if ctypes.sizeof(argument) == 128 else "?"
    return "long" if isinstance(argument, ctypes.c_int64) else type(argument).__name__


@pytest.mark.parametrize("targets", [False, True])
def test_kernels_get_the_parameters_that_they_declare(launches: Launches, targets: bool) -> None:
    """The driver takes an address a parameter and believes the kernel about what is there."""
    dout, q, k, v = tensors("cpu")
    batch = jagged("cpu", targets=targets)
    hstu_attention_sm90.forward(q, k, v, batch, ALPHA)
    for config in CONFIGS.values():
        hstu_attention_sm90.backward(dout, q, k, v, batch, ALPHA, config=config)
    assert set(launches.names()) == set(kernels.SOURCES)
    for name, _, arguments in launches.made:
        assert [passed(argument) for argument in arguments] == declared(name)


def test_parts_take_every_pair_once_and_each_is_used_before_the_next(launches: Launches) -> None:
    dout, q, k, v = tensors("cpu")
    batch = jagged("cpu")
    hstu_attention_sm90.backward(dout, q, k, v, batch, ALPHA, config=CONFIGS["parts"])
    names, pairs = launches.names(), len(LENGTHS) * HEADS
    assert names == [kernels.DKDV, kernels.DQ_KEPT] * (len(names) // 2)
    for name in set(names):
        taken: list[int] = []
        for made, grid, arguments in launches.made:
            if made == name:
                # heads, first pair, workspace, bytes of a pair, pitch
                heads, first, workspace, pair_bytes, _ = arguments[-5:]
                assert heads == HEADS
                assert workspace.numel() == pair_bytes.value * max(g[1] for _, g, _ in launches.made) <= 1 << 21
                taken += range(first, first + grid[1])
        assert taken == list(range(pairs))


def test_nothing_is_kept_without_a_workspace(launches: Launches) -> None:
    dout, q, k, v = tensors("cpu")
    hstu_attention_sm90.backward(dout, q, k, v, jagged("cpu"), ALPHA, config=CONFIGS["made again"])
    assert launches.names() == [kernels.DKDV, kernels.DQ]


MASKS = [{}, {"targets": True}, {"targets": True, "contextuals": True}, {"targets": True, "causal": False}]


def poisoned(like: torch.Tensor) -> torch.Tensor:
    """NaN everywhere, as a strided view."""
    return torch.full((like.shape[0], HEADS + 1, HEAD_DIM), float("nan"), dtype=like.dtype, device=like.device)[:, 1:]


def check(found: torch.Tensor, expected: torch.Tensor, batch: Jagged) -> None:
    """Sequence by sequence: a short one's error would drown in a long one's norm.

    A gradient of one token is a product or two whose roundings nothing averages: of 4000 that were rounded where the
    kernel rounds, for two heads of one token, one in a hundred is above the bound for many, the worst 2.2 times it.
    """
    for sequence in batch.sequences():
        part, truth = found[sequence.rows].double(), expected[sequence.rows]
        bound = TOLERANCE[found.dtype] * (FEW_TOKENS_FACTOR if sequence.length < FEW_TOKENS else 1)
        assert (part - truth).norm() <= bound * truth.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: "-".join(mask) or "plain")
class TestOnHopper:
    """Against float64, outputs poisoned, twice for the same bits."""

    @pytest.fixture(autouse=True)
    def hopper(self) -> None:
        _, q, _, _ = tensors("cuda")
        if reason := hstu_attention_sm90.supports(q, jagged("cuda")):
            pytest.skip(reason)

    def test_forward(self, mask: dict[str, bool], dtype: torch.dtype) -> None:
        batch, (_, q, k, v) = jagged("cuda", **mask), tensors("cuda", dtype)
        first, second = poisoned(q), poisoned(q)
        hstu_attention_sm90.forward(q, k, v, batch, ALPHA, first)
        hstu_attention_sm90.forward(q, k, v, batch, ALPHA, second)
        check(first, hstu.attention_reference(q.double(), k.double(), v.double(), batch, ALPHA), batch)
        assert torch.equal(first, second)

    @pytest.mark.parametrize("config", CONFIGS)
    def test_backward(self, mask: dict[str, bool], dtype: torch.dtype, config: str) -> None:
        batch, (dout, q, k, v) = jagged("cuda", **mask), tensors("cuda", dtype)

        def gradients() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            dq, dk, dv = poisoned(q), poisoned(q), poisoned(q)
            return hstu_attention_sm90.backward(dout, q, k, v, batch, ALPHA, dq, dk, dv, CONFIGS[config])

        first, second = gradients(), gradients()
        expected = hstu.attention_gradients(dout.double(), q.double(), k.double(), v.double(), batch, ALPHA)
        for found, again, truth in zip(first, second, expected, strict=True):
            check(found, truth, batch)
            assert torch.equal(found, again)
