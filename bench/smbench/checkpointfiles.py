"""A checkpoint's folder as engines will find it: config.json, index, safetensors headers. Reads; loads no weights.

Owns what a checkpoint must be so that every engine of a recipe takes it, and its hash. Does not own where
checkpoints lie nor how they come there (`models`). Every UsageError begins with the path that it is about.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smbench.errors import UsageError
from smbench.shapes import ARCHITECTURES, BITS
from smbench.workloads import ModelFacts, facts_of

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

EDGE_BYTES = 1 << 16
"""Read of the weights at both ends of each file, for the hash."""
MOST_HEADER_BYTES = 100_000_000
"""The format's own limit."""


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a checkpoint's folder. UsageError where there is none."""
    if not folder.is_dir():
        what = "is no folder" if folder.exists() else "does not exist"
        raise UsageError(f"{folder}: {what}; MODEL= takes the folder of a checkpoint, with {CONFIG} in it")
    if not (folder / CONFIG).is_file():
        raise UsageError(f"{folder}: holds no {CONFIG}, so it is no checkpoint in the format of Hugging Face")
    return _json(folder / CONFIG)


def checked_facts(config: Mapping[str, Any], where: str, plain: bool = False) -> ModelFacts:
    """What the work follows from. UsageError for a model that is not GPTQ as the engines take it.

    `plain` takes weights that are not quantized too.
    """
    names = config.get("architectures") or [config.get("model_type", "unknown")]
    if not set(names) & set(ARCHITECTURES):
        raise UsageError(
            f"{where}: architecture {', '.join(map(str, names))} is not supported; "
            f"supported: {', '.join(ARCHITECTURES)}"
        )
    quantization = config.get("quantization_config")
    taken = plain and quantization is None
    if not taken and (fault := _quantization_fault(quantization)):
        raise UsageError(f"{where}: {fault}")
    try:
        return facts_of(config)
    except KeyError as error:
        raise UsageError(f"{where}: {CONFIG} lacks {error.args[0]!r}") from error
    except (ValueError, TypeError) as error:
        raise UsageError(f"{where}: {CONFIG}: {error}") from error


def _quantization_fault(found: Any) -> str | None:
    """Why engines do not take a `quantization_config`; None where they do."""
    if not isinstance(found, dict):
        return f"not a GPTQ checkpoint: {CONFIG} has no quantization_config; take one whose name ends in GPTQ-Int4"
    method = found.get("quant_method")
    if method != "gptq":
        return f"not a GPTQ checkpoint: quant_method is {method!r}"
    if found.get("bits") != BITS:
        return f"bits is {found.get('bits')!r}, and the kernels compared here are for {BITS} bits"
    if found.get("desc_act", False) is not False:
        return (
            "desc_act is true: rows in order of activation are supported neither by Machete nor by present vLLM; "
            "take a checkpoint that was quantized with desc_act=False"
        )
    if found.get("sym", True) is not True:
        return "sym is false, and Marlin and Machete take symmetric GPTQ only"
    group = found.get("group_size")
    if not isinstance(group, int) or group <= 0:
        return f"group_size is {group!r}, and Exllama needs groups of rows, such as 128"
    if (form := found.get("checkpoint_format", "gptq")) != "gptq":
        return f"checkpoint_format is {form!r}, and only 'gptq' is read the same way by all engines"
    if found.get("lm_head"):
        return "lm_head is quantized, which the recipe's estimate of work does not describe"
    if found.get("dynamic"):
        return "dynamic gives layers settings of their own, which the recipe's estimate of work does not describe"
    return None


def faults(folder: Path) -> list[str]:
    """What is missing or cut short of the weights that the index names; empty where all is there."""
    try:
        promised = read_config(folder).get("quantization_config") is not None
        names = weight_files(folder)
    except UsageError as error:
        return [str(error)]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        return [f"{folder}: {len(missing)} of {len(names)} files of weights are missing: {shown}"]
    found = []
    quantized = False
    for name in names:
        try:
            header, end = read_header(folder / name)
        except UsageError as error:
            found.append(str(error))
            continue
        size = (folder / name).stat().st_size
        if size != end:
            found.append(f"{folder / name}: has {size} bytes, and its header promises {end}: it did not arrive whole")
        quantized = quantized or any(key.endswith(".qweight") for key in header)
    if not found and promised and not quantized:
        found.append(
            f"{folder}: holds no packed weights (tensors named *.qweight), so it is not GPTQ, whatever {CONFIG} says"
        )
    if not found and quantized and not promised:
        found.append(f"{folder}: holds packed weights (tensors named *.qweight), and {CONFIG} does not say how")
    return found


def weight_files(folder: Path) -> list[str]:
    """Names of the files of weights, from the index where there is one. UsageError where there are none."""
    if (folder / INDEX).is_file():
        places = _json(folder / INDEX).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()) or not places:
            raise UsageError(f"{folder / INDEX}: has no weight_map of tensors and files")
        return sorted(set(places.values()))
    if (folder / SINGLE).is_file():
        return [SINGLE]
    raise UsageError(f"{folder}: holds neither {INDEX} nor {SINGLE}; weights in other formats are not read")


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and the bytes that the whole file must have. UsageError where it has none.

    Format: eight bytes of length, little endian; that much JSON of name to dtype, shape and offsets; the tensors.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        raw = file.read(length) if length <= MOST_HEADER_BYTES else b""
    try:
        header = json.loads(raw) if len(raw) == length else None
        assert isinstance(header, dict)
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        return tensors, 8 + length + max((int(entry["data_offsets"][1]) for entry in tensors.values()), default=0)
    except (ValueError, KeyError, TypeError, IndexError, AssertionError) as error:
        raise UsageError(f"{path}: has no header of the safetensors format: it did not arrive whole") from error


def content_hash(folder: Path) -> str:
    """64 hexadecimal digits that stand for a checkpoint, from its config.json and its weights.

    Of the weights every header counts, and 64 KiB at both ends of each file: reading all of a large model would take
    minutes.
    """
    digest = hashlib.sha256((folder / CONFIG).read_bytes())
    for name in weight_files(folder):
        _, end = read_header(folder / name)
        digest.update(f"\0{name}\0{end}\0".encode())
        with (folder / name).open("rb") as file:
            digest.update(file.read(8 + int.from_bytes(file.read(8), "little") + EDGE_BYTES))
            file.seek(max(0, end - EDGE_BYTES))
            digest.update(file.read())
    return digest.hexdigest()


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise UsageError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path}: holds no JSON object")
    return content
