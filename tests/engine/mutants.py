"""Runs in an engine's Python: checks outputs of models that are wrong on purpose. `mutants.py FOLDER` prints JSON.

FOLDER gets a checkpoint and broken copies of it. Owns the faults; the test says which must be noticed.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from smbench.shapes import SHAPES
from smbench.worker import checkpoint, outputs
from smbench.worker.engines import Completion, Engine, Limits, Setup, driver
from smbench.worker.prompts import prompt

LAYER = "model.layers.1.mlp.down_proj"
LENGTH, OUTPUT = 128, 8


def swapped(words: torch.Tensor) -> torch.Tensor:
    """The two nibbles of every byte the other way round."""
    return ((words & 0x0F0F0F0F) << 4) | ((words >> 4) & 0x0F0F0F0F)


MUTANTS: Mapping[str, Callable[[dict[str, torch.Tensor]], Mapping[str, torch.Tensor]]] = {
    "scales": lambda t: {f"{LAYER}.scales": t[f"{LAYER}.scales"].roll(1, 0)},
    "nibbles": lambda t: {f"{LAYER}.qweight": swapped(t[f"{LAYER}.qweight"])},
    "zeros": lambda t: {f"{LAYER}.qzeros": torch.full_like(t[f"{LAYER}.qzeros"], 0x66666666)},
}


class Truncating:
    """Answers a prompt without its first token, and counts it all the same."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def generate(self, tokens: Sequence[int], output_len: int, top_logprobs: int = 0) -> Completion:
        return self._engine.generate(tokens[1:], output_len, top_logprobs)


def examined(engine: Any, setup: Setup) -> dict[str, Any]:
    prompts = [prompt(0, SHAPES["tiny"].vocab_size, LENGTH, index) for index in range(2)]
    return outputs.check(engine, setup, [(tokens, engine.generate(tokens, OUTPUT).token_ids) for tokens in prompts])


def setup(folder: Path) -> Setup:
    limits = Limits(1024, 4, 0.5)
    return Setup("cpu", folder, "float16", LENGTH, OUTPUT, "chunked", 64, "default", "eager", 0, limits, {})


def main(folder: Path) -> dict[str, Any]:
    right = folder / "right"
    checkpoint.write(SHAPES["tiny"], 0, right, torch.device("cpu"))
    transformers = driver("transformers")
    engine = transformers.start(setup(right))
    found = {"right": examined(engine, setup(right)), "truncated": examined(Truncating(engine), setup(right))}
    for name, change in MUTANTS.items():
        wrong = folder / name
        shutil.copytree(right, wrong)
        (file,) = wrong.glob("*.safetensors")
        tensors = load_file(file)
        save_file({**tensors, **change(tensors)}, file, {"format": "pt"})
        # the engine reads the wrong weights, the reference the right ones
        found[name] = examined(transformers.start(setup(wrong)), setup(right))
    return found


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(Path(sys.argv[1]))))
