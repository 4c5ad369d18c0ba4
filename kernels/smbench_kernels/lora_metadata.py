"""lora_metadata: what is done once per step, for all layers, before LoRA kernels run: tokens sorted by LoRA.

Owns the definition and the calls; ours is `lora_plan`'s, the others are vLLM's and sglang's. No call of `bgmv`, `sgmv`
or `lora_linear` contains it, neither ours nor theirs, so that it is an operation with times of its own. With T tokens,
of which n have a LoRA:

    y[i] = the i-th token in the stable order by LoRA, for i < n; 0 from there on            y is [T] float32

vLLM's waits for the device, and sglang's runs on the host and copies, as in their engines: no graph can hold either.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import torch

from smbench_kernels import lora, lora_plan, lora_sglang, lora_vllm
from smbench_kernels.lora import draw_indices, token_indices
from smbench_kernels.lora_peers import incompatible, library
from smbench_kernels.lora_shapes import MANY
from smbench_kernels.op import Inputs, Op, Point, Prepared, Tolerance, Work

AXES = {name: lora.AXES[name] for name in ("batch", "seq_len", "num_loras")}


def make_inputs(point: Point, seed: int, device: torch.device, *, no_lora: int = 0) -> Inputs:
    """`indices`, `seq_lens`, `seq_starts` [sequences] int32 as elsewhere, and `y` [T] float32, all NaN."""
    batch, length = int(point["batch"]), int(point["seq_len"])
    return {
        "indices": draw_indices(batch, int(point["num_loras"]), no_lora, seed).to(device),
        "seq_lens": torch.full((batch,), length, dtype=torch.int32, device=device),
        "seq_starts": torch.arange(0, batch * length, length, dtype=torch.int32, device=device),
        "y": torch.full((batch * length,), torch.nan, device=device),
    }


def redraw(point: Point, inputs: Inputs, seed: int) -> Inputs:
    """The same with other LoRAs, and some sequences without one."""
    batch = len(inputs["indices"])
    drawn = draw_indices(batch, int(point["num_loras"]), batch // 4, seed)
    return {**inputs, "indices": drawn.to(inputs["indices"].device)}


def reference(point: Point, inputs: Inputs) -> torch.Tensor:
    """The order, in float64."""
    return _placed(inputs, _sorted(inputs)).double()


def work(point: Point, inputs: Inputs) -> Work:
    """Every index and length read, every place written."""
    read = sum(inputs[name].numel() * 4 for name in ("indices", "seq_lens", "seq_starts"))
    return Work(bytes=read + 4 * inputs["y"].numel(), flops=0)


def baseline(point: Point, inputs: Inputs) -> Prepared:
    """A stable sort of the tokens' LoRAs: the order alone, without segments."""
    lengths, tokens = inputs["seq_lens"].long(), inputs["y"].numel()
    order = torch.zeros(tokens, dtype=torch.int64, device=inputs["y"].device)

    def run() -> None:
        by_token = torch.repeat_interleave(inputs["indices"], lengths, output_size=tokens)
        order.copy_(torch.argsort(torch.where(by_token < 0, torch.iinfo(torch.int32).max, by_token), stable=True))

    return Prepared(run, {}, "library", finish=partial(_finish, inputs, lambda: order))


def ours(point: Point, inputs: Inputs) -> Prepared:
    """The work list of our kernels, in segments as decode or prefill wants them."""
    chunk = 16 if inputs["y"].numel() < MANY else 128
    plan = lora_plan.Plan.allocate(inputs["y"].numel(), int(point["num_loras"]), chunk, inputs["y"].device)
    sequences = () if int(point["seq_len"]) == 1 else (inputs["seq_starts"], inputs["seq_lens"])
    fill = lora_plan.filler(plan, inputs["indices"], *sequences)
    return Prepared(fill, {"CHUNK": chunk}, "default", finish=partial(_finish, inputs, lambda: plan.order))


def vllm(point: Point, inputs: Inputs) -> Prepared:
    """`LoRAKernelMeta.prepare_tensors`, of tokens whose LoRAs are on the device."""
    used = lora_vllm.load(inputs)
    adapters = token_indices(inputs)
    meta = used.make_metadata(int(point["num_loras"]), adapters.numel(), adapters.device)

    def order() -> torch.Tensor:
        found: torch.Tensor = meta.token_indices_sorted_by_lora_ids[: adapters.numel()]
        # tokens without a LoRA come first there
        return found.roll(-int((adapters < 0).sum()))

    return Prepared(
        lambda: meta.prepare_tensors(adapters), {}, "library", finish=partial(_finish, inputs, order), capturable=False
    )


def sglang(point: Point, inputs: Inputs) -> Prepared:
    """The permutation and the segments of `prepare_lora_batch`, of sequences whose LoRAs the host knows, and their
    copies to the device."""
    lora_sglang.load(inputs)
    try:
        backend = importlib.import_module("sglang.srt.lora.backend.chunked_backend").ChunkedSgmvLoRABackend
        permute, cut = backend._get_permutation, object.__new__(backend)._get_segments_info
    except (ImportError, AttributeError) as error:
        version = library("sglang").removeprefix("sglang ")
        raise incompatible("sglang", version, lora_sglang.EXPECTED, error) from error
    device, tokens, loras = inputs["y"].device, inputs["y"].numel(), int(point["num_loras"])
    # a sequence without a LoRA has one more adapter, of rank 0
    slots = torch.where(inputs["indices"] < 0, loras, inputs["indices"]).tolist()
    lengths = inputs["seq_lens"].cpu()
    decodes = int(point["seq_len"]) == 1
    mode = SimpleNamespace(
        is_idle=lambda: False,
        is_decode=lambda: decodes,
        is_target_verify=lambda: False,
        is_extend=lambda: not decodes,
    )
    batch = SimpleNamespace(
        forward_mode=mode, batch_size=len(slots), extend_seq_lens=lengths, extend_seq_lens_cpu=lengths.tolist()
    )
    buffers = [torch.zeros(tokens + loras + 2, dtype=torch.int32, device=device) for _ in range(3)]

    def run() -> None:
        permutation, reordered = permute(seq_weight_indices=slots, forward_batch=batch)
        for buffer, values in zip(buffers, (permutation, *cut(reordered, lora_sglang.CHUNK)), strict=True):
            buffer[: len(values)].copy_(values, non_blocking=True)

    finish = partial(_finish, inputs, lambda: buffers[0][:tokens])
    return Prepared(run, {"CHUNK": lora_sglang.CHUNK}, "library", finish=finish, capturable=False)


def _sorted(inputs: Inputs) -> torch.Tensor:
    """All tokens in the stable order by LoRA, those without one last."""
    by_token = token_indices(inputs)
    return torch.argsort(torch.where(by_token < 0, torch.iinfo(torch.int32).max, by_token), stable=True)


def _placed(inputs: Inputs, order: torch.Tensor) -> torch.Tensor:
    """[T] float32: the order of the tokens that have a LoRA, then zeros."""
    having = int((token_indices(inputs) >= 0).sum())
    places = torch.arange(order.numel(), device=order.device)
    return torch.where(places < having, order, 0).float()


def _finish(inputs: Inputs, order: Callable[[], torch.Tensor]) -> None:
    inputs["y"].copy_(_placed(inputs, order()))


OP = Op(
    name="lora_metadata",
    doc="y[T] = tokens in the stable order by LoRA: what is done once per step, outside of every other call",
    axes=AXES,
    make_inputs=make_inputs,
    reference=reference,
    work=work,
    # whole numbers below 2**24
    tolerance=lambda _: Tolerance(relative=1e-6, elementwise=1e-6),
    providers={
        "torch": "smbench_kernels.lora_metadata:baseline",
        "smbench": "smbench_kernels.lora_metadata:ours",
        "vllm": "smbench_kernels.lora_metadata:vllm",
        "sglang": "smbench_kernels.lora_metadata:sglang",
    },
    baseline="torch",
    redraw=redraw,
)
