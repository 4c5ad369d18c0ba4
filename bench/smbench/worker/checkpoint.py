"""Writes a checkpoint of a Qwen2 shape from a seed: `python -m smbench.worker.checkpoint SHAPE --out FOLDER`.

Speed does not need trained weights. These are random, but quantized in earnest where the shape is, and scaled so that a
forward pass is one: attention looks at few tokens, activations stay near one through all layers, and logits spread.
Equal seeds give equal tensors on every device. Owns what is in a checkpoint and how it gets onto the disk; not the
arithmetic of packing (`gptq`), not the shapes (`shapes`), and not where checkpoints lie (`models`).

What it takes: a GPU draws and packs 32B weights in seconds, so the disk decides: 19.3 GB in 19 s beside an H200 with
16 cores. On a CPU drawing takes some 50 ns a weight and core.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smbench.shapes import BITS, GROUP, SHAPES, Shape
from smbench.worker import wordtokenizer
from smbench.worker.gptq import Packed, quantize
from smbench.worker.noise import SPREAD, bell

FORMAT = 2
"""Raised whenever equal seeds give other bytes. History: 1 = first; 2 = with a tokenizer."""

SHARD_BYTES = 1 << 30
"""A shard ends with the first part that makes it this large."""
WRITERS = 4
"""Shards that are written at a time; each waits in memory until it is on the disk."""

CHUNK = {"cpu": 1 << 20, "cuda": 1 << 27}
"""Numbers drawn at a time: what a core's cache holds, and what a small GPU has room for."""

EMBEDDING_DEVIATION = 1.0
"""As much as all blocks together add to the stream: the next token follows from the last one and from the context."""
TIED_DEVIATION = 0.05
"""Where the embeddings are the head too. So small that a token in the stream does not elect itself again."""
HEAD_GAIN = 2.0
"""Deviation of the logits, where the head is not the embeddings."""
QUERY_KEY_GAIN = 1.7
"""Deviation of queries and keys: scores then have a deviation of three, and attention looks at few tokens. More would
make it a choice that rounding decides: at 2.0 bfloat16 is off by a third more."""
GATED_DEVIATION = 0.6
"""Of silu(g) * u, for g and u of deviation one."""
BIAS_DEVIATION = 0.1
NORM_DEVIATION = 0.1
"""Around one."""


@dataclass(frozen=True, slots=True)
class Linear:
    """A layer whose weights are quantized where the shape's are."""

    name: str
    rows: int
    """Inputs."""
    columns: int
    """Outputs."""
    deviation: float
    """Of its weights before they are quantized."""
    packed: bool
    """By GPTQ; else one tensor in bfloat16, [columns, rows]."""


@dataclass(frozen=True, slots=True)
class Plain:
    """A tensor that no quantization touches."""

    name: str
    shape: tuple[int, ...]
    mean: float
    deviation: float
    dtype: torch.dtype


Part = Linear | Plain


def parts(shape: Shape) -> Iterator[list[Part]]:
    """Everything in a checkpoint, in groups that lie in one file: embeddings, each layer, what follows the layers."""
    hidden, vocabulary, dtype = shape.hidden_size, shape.vocab_size, _dtype(shape)
    deviation = TIED_DEVIATION if shape.tie_word_embeddings else EMBEDDING_DEVIATION
    yield [Plain("model.embed_tokens.weight", (vocabulary, hidden), 0.0, deviation, dtype)]
    for i in range(shape.num_hidden_layers):
        yield _layer(shape, f"model.layers.{i}")
    last: list[Part] = [Plain("model.norm.weight", (hidden,), 1.0, NORM_DEVIATION, dtype)]
    if not shape.tie_word_embeddings:
        last.append(Plain("lm_head.weight", (vocabulary, hidden), 0.0, HEAD_GAIN / math.sqrt(hidden), dtype))
    yield last


def _dtype(shape: Shape) -> torch.dtype:
    """Of everything that is not packed."""
    return torch.float16 if shape.weights == "gptq" else torch.bfloat16


def _layer(shape: Shape, name: str) -> list[Part]:
    """One block. Each of its two outputs adds about 1 / (2 * layers) to the variance of the stream."""
    dtype = _dtype(shape)
    hidden, inner = shape.hidden_size, shape.intermediate_size
    kv = hidden // shape.num_attention_heads * shape.num_key_value_heads
    residual = 1 / math.sqrt(2 * shape.num_hidden_layers)

    def linear(module: str, rows: int, columns: int, gain: float) -> Linear:
        return Linear(f"{name}.{module}", rows, columns, gain / math.sqrt(rows), shape.weights == "gptq")

    return [
        Plain(f"{name}.input_layernorm.weight", (hidden,), 1.0, NORM_DEVIATION, dtype),
        linear("self_attn.q_proj", hidden, hidden, QUERY_KEY_GAIN),
        linear("self_attn.k_proj", hidden, kv, QUERY_KEY_GAIN),
        linear("self_attn.v_proj", hidden, kv, 1.0),
        Plain(f"{name}.self_attn.q_proj.bias", (hidden,), 0.0, BIAS_DEVIATION, dtype),
        Plain(f"{name}.self_attn.k_proj.bias", (kv,), 0.0, BIAS_DEVIATION, dtype),
        Plain(f"{name}.self_attn.v_proj.bias", (kv,), 0.0, BIAS_DEVIATION, dtype),
        linear("self_attn.o_proj", hidden, hidden, residual),
        Plain(f"{name}.post_attention_layernorm.weight", (hidden,), 1.0, NORM_DEVIATION, dtype),
        linear("mlp.gate_proj", hidden, inner, 1.0),
        linear("mlp.up_proj", hidden, inner, 1.0),
        linear("mlp.down_proj", inner, hidden, residual / GATED_DEVIATION),
    ]


def tensor_bytes(part: Part) -> int:
    """Bytes of a part in the file, headers aside."""
    if isinstance(part, Plain):
        return part.dtype.itemsize * math.prod(part.shape)
    if not part.packed:
        return tensor_bytes(_unpacked(part))
    groups = part.rows // GROUP
    weights, zeros = part.rows * part.columns * BITS // 8, groups * part.columns * BITS // 8
    return weights + zeros + 2 * groups * part.columns + 4 * part.rows


def draw(part: Part, seed: int, device: torch.device) -> Mapping[str, Tensor]:
    """The tensors of a part by name, on the device that drew them."""
    if isinstance(part, Plain):
        return {part.name: _plain(part, seed, device)}
    if not part.packed:
        return draw(_unpacked(part), seed, device)
    packed = _linear(part, seed, device)
    return {
        f"{part.name}.qweight": packed.qweight,
        f"{part.name}.qzeros": packed.qzeros,
        f"{part.name}.scales": packed.scales,
        f"{part.name}.g_idx": packed.g_idx,
    }


def _unpacked(part: Linear) -> Plain:
    """A layer as the one tensor that it is where nothing is quantized."""
    return Plain(f"{part.name}.weight", (part.columns, part.rows), 0.0, part.deviation, torch.bfloat16)


def _plain(part: Plain, seed: int, device: torch.device) -> Tensor:
    count = math.prod(part.shape)
    drawn = torch.empty(count, dtype=part.dtype, device=device)
    for places in _chunks(count, CHUNK[device.type]):
        numbers = bell(seed, part.name, places, device).to(torch.float32)
        drawn[places.start : places.stop] = numbers.mul_(part.deviation / SPREAD).add_(part.mean)
    return drawn.reshape(part.shape)


def _linear(part: Linear, seed: int, device: torch.device) -> Packed:
    pieces = []
    # whole groups, since each has scales of its own
    rows = max(1, CHUNK[device.type] // (GROUP * part.columns)) * GROUP
    for piece in _chunks(part.rows, rows):
        places = range(piece.start * part.columns, piece.stop * part.columns)
        weight = bell(seed, part.name, places, device).to(torch.float32).mul_(part.deviation / SPREAD)
        pieces.append(quantize(weight.reshape(-1, part.columns), GROUP))
    return Packed(
        qweight=torch.cat([piece.qweight for piece in pieces]),
        qzeros=torch.cat([piece.qzeros for piece in pieces]),
        scales=torch.cat([piece.scales for piece in pieces]),
        g_idx=torch.arange(part.rows, dtype=torch.int32, device=device) // GROUP,
    )


def _chunks(count: int, size: int) -> Iterator[range]:
    return (range(start, min(start + size, count)) for start in range(0, count, size))


def shards(shape: Shape) -> list[list[Part]]:
    """The parts of each file."""
    found: list[list[Part]] = [[]]
    for group in parts(shape):
        if sum(map(tensor_bytes, found[-1])) >= SHARD_BYTES:
            found.append([])
        found[-1] += group
    return found


def write(shape: Shape, seed: int, folder: Path, device: torch.device) -> int:
    """Write a checkpoint, whole or not at all, and return the bytes of its tensors.

    OSError, before anything is drawn, where the disk has not the room; FileExistsError where the folder is there.
    What an earlier call left half-made beside it is removed: one writer at a time is the caller's business.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} is there")
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    files = shards(shape)
    total = sum(tensor_bytes(part) for file in files for part in file)
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < total + SHARD_BYTES // 8:
        raise OSError(
            f"{folder.parent} has {free / 1e9:.1f} GB free, and the checkpoint takes {total / 1e9:.1f} GB "
            f"in {len(files)} files"
        )
    unfinished.mkdir()
    _write_tensors(files, seed, unfinished, device, total)
    _write_json(unfinished / "config.json", shape.config)
    tokens = {"bos_token_id": shape.bos_token_id, "eos_token_id": shape.eos_token_id, "do_sample": False}
    _write_json(unfinished / "generation_config.json", tokens)
    context = shape.max_position_embeddings
    for name, content in wordtokenizer.files(shape.vocab_size, shape.bos_token_id, shape.eos_token_id, context).items():
        _write_json(unfinished / name, content)
    unfinished.rename(folder)
    return total


def _write_tensors(files: list[list[Part]], seed: int, folder: Path, device: torch.device, total: int) -> None:
    """Draw on one thread, since the device is one, and write on several, since a disk's queue is deep."""
    # only who writes needs it
    from safetensors.torch import save_file

    places: dict[str, str] = {}
    with ThreadPoolExecutor(WRITERS) as pool:
        writing: list[Future[None]] = []
        for i, file in enumerate(files, start=1):
            name = f"model-{i:05d}-of-{len(files):05d}.safetensors"
            tensors = {key: tensor.cpu() for part in file for key, tensor in draw(part, seed, device).items()}
            places |= dict.fromkeys(tensors, name)
            if len(writing) == WRITERS:
                writing.pop(0).result()
            writing.append(pool.submit(save_file, tensors, folder / name, {"format": "pt"}))
        for future in writing:
            future.result()
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main(arguments: list[str]) -> int:
    """The command. Exit code 2, with one line, for what the user can mend."""
    parser = argparse.ArgumentParser(prog="smbench.worker.checkpoint", description="Write a checkpoint.")
    parser.add_argument("shape", choices=list(SHAPES))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        written = write(SHAPES[given.shape], given.seed, given.out, device)
    except OSError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(f"{written}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
