"""Every LoRA kernel compiles for every supported architecture, within its shared memory and without spilling."""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Iterator

import pytest
import torch

from smbench_kernels import configs, hardware, lora
from smbench_kernels.compile import compile_for, resources
from smbench_kernels.launch import Workspace
from smbench_kernels.op import Config, Point, load
from smbench_kernels.own import KERNEL, OwnKernel

CAPABILITIES = (80, 86, 89, 90)
OPS = ("bgmv_shrink", "bgmv_expand", "sgmv_shrink", "sgmv_expand")
SPILL_LIMIT_BYTES = 16
"""Of one thread: ptxas parks a value or two outside of loops though registers are left, which costs nothing."""
CARDS = {"NVIDIA_H200": 90}
"""Capability of the cards that shipped configurations are for; those of a card with no row are compiled for all."""
SAMPLE = 3
"""Configurations of each search space that one run compiles, besides defaults and shipped ones."""


def kernel_of(name: str) -> OwnKernel:
    kernel: OwnKernel = load(f"smbench_kernels.{name}:KERNEL")
    return kernel


def point_of(name: str, batch: int, hidden: int, rank: int, dtype: str) -> Point:
    seq_len = 1 if name.startswith("bgmv") else 128
    return {
        "batch": batch,
        "seq_len": seq_len,
        "hidden_size": hidden,
        "rank": rank,
        "num_loras": 8,
        "dtype": dtype,
    }


def chosen(name: str, capability: int) -> Iterator[tuple[Point, Config]]:
    """What is compiled for an operation and a capability: defaults, what is shipped for it, a sample of the space.

    All of the portable kernels; those in CUDA C++ have files of their own.
    """
    kernel = kernel_of(name)
    device = hardware.TYPICAL[capability]
    for point in (
        point_of(name, 16, 4096, 16, "float16"),
        point_of(name, 56, 128256, 64, "bfloat16"),
        point_of(name, 3, 127, 5, "float16"),
        point_of(name, 40, 3424, 256, "float16"),
    ):
        yield point, kernel.portable_config(point, device)
    for path in sorted(configs.ROOT.glob(f"*/{name}.json")):
        for entry in configs.load(path).entries if CARDS.get(path.parent.name, capability) == capability else ():
            if KERNEL not in entry.config:
                yield entry.point, entry.config
    point = point_of(name, 16, 14336, 64, "float16")
    for config in random.sample(kernel.space(point), SAMPLE):
        yield point, config


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", OPS)
def test_compiles_within_the_limits(name: str, capability: int) -> None:
    kernel = kernel_of(name)
    distinct = {kernel.binary(point, config): (point, config) for point, config in chosen(name, capability)}
    for point, config in distinct.values():
        sys.stderr.write(f"{dict(point)} {dict(config)}\n")
        found = resources(kernel.compiled(point, config, capability))
        assert found.shared_bytes <= hardware.TYPICAL[capability].shared_bytes_per_program
        assert found.stack_bytes <= SPILL_LIMIT_BYTES


def test_tiles_for_hopper_alone_fit_it_and_are_no_default() -> None:
    kernel, capability = kernel_of("sgmv_shrink"), 90
    room = hardware.TYPICAL[capability].shared_bytes_per_program
    for hidden, rank in ((4096, 64), (11008, 8), (14336, 64)):
        point = {**point_of("sgmv_shrink", 16, hidden, rank, "bfloat16"), "seq_len": 512, "num_loras": 8}
        found = kernel.contenders(point)
        assert any(config["SPLIT_K"] == 1 and config["num_stages"] == 4 for config in found)
        for config in random.sample(found, 1):
            sys.stderr.write(f"{point} {config}\n")
            used = resources(kernel.compiled(point, config, capability))
            assert used.shared_bytes <= room and used.stack_bytes <= SPILL_LIMIT_BYTES
        for card in hardware.TYPICAL.values():
            assert kernel.default_config(point, card) not in found


@pytest.mark.parametrize("name", OPS)
def test_precompiling_fills_the_cache_entry_that_a_launch_looks_up(name: str) -> None:
    """Tensors and plain dtypes, other batches and splits: one key wherever `binary` says one kernel."""
    kernel = kernel_of(name)
    point = point_of(name, 3, 256, 16, "float16")
    config = kernel.portable_config(point, hardware.TYPICAL[90])
    key = kernel.tunable.precompile(point, config, 90)
    for batch in (3, 16):
        other = {**point, "batch": batch, "hidden_size": 512}
        inputs = lora.make_inputs(
            other, 0, torch.device("cpu"), expands=name.endswith("expand"), per_token=name.startswith("bgmv")
        )
        workspace = Workspace.allocate(*kernel.workspace_sizes(other, config), torch.device("cpu"))
        assert kernel.binary(other, config) == kernel.binary(point, config)
        assert compile_for(kernel.call(other, inputs, workspace, config), 90).hash == key


@pytest.mark.parametrize("name", OPS)
def test_equal_binary_means_equal_key(name: str) -> None:
    kernel = kernel_of(name)
    points = [point_of(name, *sizes, "float16") for sizes in ((1, 256, 16), (4, 512, 16), (4, 200, 16), (4, 256, 1))]
    pairs = []
    for point in points:
        for config in kernel.space(point)[:2]:
            pairs.append((kernel.binary(point, config), kernel.tunable.precompile(point, config, 90)))
    assert len(set(pairs)) == len({binary for binary, _ in pairs}) == len({key for _, key in pairs})


def test_capabilities_have_keys_of_their_own() -> None:
    kernel = kernel_of("bgmv_expand")
    point = point_of("bgmv_expand", 3, 256, 16, "float16")
    config = kernel.portable_config(point, hardware.TYPICAL[90])
    keys = [kernel.tunable.precompile(point, config, capability) for capability in (*CAPABILITIES, *CAPABILITIES)]
    assert len(set(keys)) == len(CAPABILITIES)
    assert keys[: len(CAPABILITIES)] == keys[len(CAPABILITIES) :]


@pytest.mark.parametrize("block_m", [16, 32, 64])
def test_shrink_keeps_clear_of_register_operands_of_wgmma(block_m: int) -> None:
    """ptxas before 13.3 may miscompile them in pipelined loops."""
    kernel = kernel_of("sgmv_shrink")
    config = {"BLOCK_M": block_m, "BLOCK_N": 16, "BLOCK_K": 128, "SPLIT_K": 2, "num_warps": 4, "num_stages": 3}
    ptx = kernel.compiled(point_of("sgmv_shrink", 16, 4096, 16, "float16"), config, 90).asm["ptx"]
    products = re.findall(r"wgmma\.mma_async[^;]*?\{[^}]*\}\s*,\s*(.)", ptx)
    assert bool(products) == (block_m == 64)
    assert "{" not in products
