"""Weighs a training step: what the forward pass leaves for the backward pass, and the most memory of both.

On a GPU the caching allocator counts, and its own history of the step goes into a file that PyTorch's viewer takes
(https://pytorch.org/memory_viz). On a CPU nobody counts, so what autograd saves is added up instead. Owns no file name.
"""

from __future__ import annotations

import gc
import hashlib
from pathlib import Path
from typing import Any

import torch

from smbench.errors import CorruptError
from smbench.memorysnapshot import LARGEST_BYTES, Timeline, read, timeline
from smbench_kernels.op import Inputs, Passes

MOST_POINTS = 4000
"""Entries of a timeline that a record keeps: a step of two layers has a few hundred."""


def weigh(passes: Passes, buffers: Inputs, stream: torch.cuda.Stream | None, snapshot: Path | None) -> dict[str, Any]:
    """The `memory` of a result: one forward and one backward pass that nobody times, gradients not there before.

    `saved_bytes` counts everything that the forward pass leaves behind, its output included and its inputs not: in a
    stack of layers each output is the next one's input, so that nothing is counted twice. `peak_bytes` counts the
    gradients, too. Both are beyond what was allocated before.
    """
    passes.reset()
    gc.collect()
    try:
        return _saved_tensors(passes, buffers) if stream is None else _allocator(passes, stream, snapshot)
    finally:
        passes.reset()


def _saved_tensors(passes: Passes, buffers: Inputs) -> dict[str, Any]:
    """By autograd's own hooks: storages that are saved and are no input, each once."""
    ours = {tensor.untyped_storage().data_ptr() for tensor in buffers.values()}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ours:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        passes.forward()
    return {"method": "saved-tensors", "saved_bytes": sum(saved.values()), "peak_bytes": None}


def _allocator(passes: Passes, stream: torch.cuda.Stream, snapshot: Path | None) -> dict[str, Any]:
    device = stream.device
    stream.synchronize()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    # without stack traces: they are most of a file, and name the folders of this machine
    torch.cuda.memory._record_memory_history(enabled="all", context=None, max_entries=100_000)
    try:
        passes.forward()
        # freed blocks count once the stream has passed them
        stream.synchronize()
        saved_bytes = torch.cuda.memory_allocated(device) - before
        forward_entries = _entries(torch.cuda.memory._snapshot(), device)
        passes.backward()
        stream.synchronize()
        peak_bytes = torch.cuda.max_memory_allocated(device) - before
        kept = _keep(snapshot, device) if snapshot else {}
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    if "timeline_bytes" in kept:
        kept["backward_at"] = min(forward_entries, len(kept["timeline_bytes"]))
    return {"method": "allocator", "saved_bytes": saved_bytes, "peak_bytes": peak_bytes, **kept}


def _entries(snapshot: Any, device: torch.device) -> int:
    """Allocations and releases in a snapshot at hand."""
    return len(timeline(snapshot["device_traces"][device.index or 0]).bytes)


def _keep(path: Path, device: torch.device) -> dict[str, Any]:
    """Write the allocator's snapshot, read it back, and say what it is. A file that is too large is not kept."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.cuda.memory._dump_snapshot(str(path))
    data = path.read_bytes()
    if len(data) > LARGEST_BYTES:
        path.unlink()
        return {}
    try:
        found: Timeline = read(data, path.name, device.index or 0)
    except CorruptError:
        # nothing that we can read is nothing that a report should draw; the file is PyTorch's and stays
        return {}
    place = {"snapshot": f"{path.parent.name}/{path.name}", "snapshot_sha256": hashlib.sha256(data).hexdigest()}
    return {**place, "timeline_bytes": list(found.bytes)} if len(found.bytes) <= MOST_POINTS else place
