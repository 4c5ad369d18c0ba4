"""Is this image what it says, and does it fit the card? `python3 /opt/smbench/smoke.py`: exit status 0, or 1 and why.

Checks, in this order: each stack's engine can be imported and has the versions of its row in archs.toml; the card is of
the image's arch; and one of our kernels, launched in each stack, computes what its float64 reference says. An image for
machines without a GPU runs that kernel under Triton's interpreter. Owns no version and no arch: the image's own table
has them. Standard library alone, since it must work where an environment is broken.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HOME = Path("/opt/smbench")
IMAGE = Path("/etc/smbench/image.json")
PROBE_LIMIT_S = 600

VERSIONS = """
import importlib, importlib.metadata, json, sys
importlib.import_module(sys.argv[1])
print(json.dumps({name: importlib.metadata.version(name) for name in sys.argv[2:]}))
"""
CARD = """
import json, torch
found = None
if torch.cuda.is_available():
    card = torch.cuda.get_device_properties(0)
    found = {"name": card.name, "capability": [card.major, card.minor]}
print(json.dumps({"cuda": torch.version.cuda, "card": found}))
"""
KERNEL = """
import json, torch
from smbench_kernels.registry import op
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
shrink = op("bgmv_shrink")
point = {"batch": 4, "seq_len": 1, "hidden_size": 512, "rank": 16, "num_loras": 2, "dtype": "float16"}
inputs = shrink.make_inputs(point, 0, device)
expected = shrink.reference(point, inputs)
before = inputs["y"].double()
shrink.provider("smbench")(point, inputs).run()
change = torch.linalg.vector_norm(expected - before)
error = torch.linalg.vector_norm(inputs["y"].double() - expected) / change
print(json.dumps({"error": float(error), "bound": shrink.tolerance(point).relative}))
"""


class Unfit(Exception):
    """What is wrong, and what to do."""


def ask(stack: str, program: str, *arguments: str, **environment: str) -> Any:
    """The JSON that a program prints last, run by the stack's Python. Unfit with its last words where it fails."""
    done = subprocess.run(
        [HOME / "stacks" / stack / "bin" / "python", "-c", program, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=PROBE_LIMIT_S,
        check=False,
    )
    if done.returncode != 0:
        words = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise Unfit(f"stack {stack}: {words[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def check_versions(stack: str, row: Mapping[str, Any], build: Mapping[str, Any]) -> str:
    """The stack's engine can be imported, and what the row pins is installed in that very version."""
    pinned = dict(requirement.split("==") for requirement in build["requires"] if "==" in requirement)
    pinned["torch"] = build["torch"]
    found = ask(stack, VERSIONS, row["module"], *pinned)
    for name, version in pinned.items():
        # the part after the plus sign names the build: +cpu
        if found[name].partition("+")[0] != version:
            raise Unfit(f"stack {stack}: {name} is {found[name]}, the image's table says {version}; build it anew")
    return ", ".join(f"{name} {version}" for name, version in found.items())


def check_card(stack: str, arch: str, archs: Mapping[str, Any], force: bool) -> str:
    """torch is of the right build, and the card is the one that the image is for."""
    wanted = archs[arch].get("compute_capability")
    found = ask(stack, CARD)
    if (found["cuda"] is None) != (wanted is None):
        raise Unfit(f"stack {stack}: torch is built for CUDA {found['cuda']}, which does not fit an image for {arch}")
    if wanted is None:
        return "no GPU needed"
    if found["card"] is None:
        raise Unfit(
            f"this image is for {arch}, and no NVIDIA GPU is visible here: start it with `--gpus all`, where there are "
            "a GPU, its driver and nvidia-container-toolkit; `make image ARCH=cpu` builds one for machines without"
        )
    card = found["card"]
    if card["capability"] != wanted and not force:
        fits = next((name for name, row in archs.items() if row.get("compute_capability") == card["capability"]), None)
        remedy = f"use the image for {fits}" if fits else "no image is made for that"
        raise Unfit(
            f"this image is for {arch}, the card is {card['name']} of compute capability "
            f"{card['capability'][0]}.{card['capability'][1]}: {remedy}, or go on with --force"
        )
    return f"{card['name']}, CUDA {found['cuda']}"


def check_kernel(stack: str, interpreted: bool) -> str:
    """One launch of our kernel is right."""
    found = ask(stack, KERNEL, TRITON_INTERPRET="1") if interpreted else ask(stack, KERNEL)
    # written so that a NaN fails as well
    if not found["error"] <= found["bound"]:
        raise Unfit(
            f"stack {stack}: the kernel's relative error is {found['error']:.2g}, allowed is {found['bound']:.2g}"
        )
    return f"kernel {'interpreted' if interpreted else 'launched'}, relative error {found['error']:.1e}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--force", action="store_true", help="go on where the card is of another arch")
    force = parser.parse_args().force
    if not IMAGE.exists():
        sys.stderr.write(f"smoke: this is no image of smbench: no {IMAGE}; `smbench doctor` looks at machines\n")
        return 1
    image = json.loads(IMAGE.read_text(encoding="utf-8"))
    table = tomllib.loads(next(HOME.glob("venv/lib/python3*/site-packages/smbench/data/archs.toml")).read_text())
    arch = image["arch"]
    variant = "cuda" if "compute_capability" in table["arch"][arch] else "cpu"
    try:
        for stack in image["stacks"]:
            row = table["stack"][stack]
            for said in (
                check_versions(stack, row, row["build"][variant]),
                check_card(stack, arch, table["arch"], force),
                check_kernel(stack, interpreted=variant == "cpu"),
            ):
                sys.stdout.write(f"{stack}: {said}\n")
                sys.stdout.flush()
    except Unfit as unfit:
        sys.stderr.write(f"smoke: {unfit}\n")
        return 1
    sys.stdout.write(f"image {image['name']} for {arch}: fine\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
