"""Folders that look like checkpoints, with a few bytes of weights: what tests of finding and checking models read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from smbench.shapes import SHAPES

TENSORS = ("model.layers.0.mlp.up_proj.qweight", "model.layers.0.mlp.up_proj.scales")
ONE_FILE = {"model.safetensors": TENSORS}


def tiny_config(**changes: Any) -> dict[str, Any]:
    """The tiny shape's `config.json`, with other keys; None removes one."""
    config = {**SHAPES["tiny"].config, **changes}
    return {key: value for key, value in config.items() if value is not None}


def quantized(**changes: Any) -> dict[str, Any]:
    """A `config.json` whose `quantization_config` has other keys."""
    return tiny_config(quantization_config={**SHAPES["tiny"].config["quantization_config"], **changes})


def write_checkpoint(
    folder: Path, config: Mapping[str, Any], files: Mapping[str, Sequence[str]] = ONE_FILE, fill: bytes = b"\1"
) -> Path:
    """A folder with a configuration and files of tensors of four bytes each, and an index if there are several."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for name, tensors in files.items():
        (folder / name).write_bytes(safetensors_bytes(tensors, fill))
    if len(files) > 1:
        places = {tensor: name for name, tensors in files.items() for tensor in tensors}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}), encoding="utf-8")
    return folder


def safetensors_bytes(tensors: Sequence[str], fill: bytes = b"\1") -> bytes:
    """A file of the safetensors format, each tensor one int32."""
    entries = {
        name: {"dtype": "I32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]} for i, name in enumerate(tensors)
    }
    header = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    return len(header).to_bytes(8, "little") + header + fill * 4 * len(tensors)
