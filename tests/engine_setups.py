"""What engines are started with in tests. Owns values only."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from smbench.worker.engines import Limits, Setup

LIMITS = Limits(max_model_len=9000, max_num_seqs=4, memory_fraction=0.9)


def setup(folder: Path = Path("model"), **changes: Any) -> Setup:
    given = Setup(
        device="cuda",
        model=folder,
        dtype="float16",
        input_len=8000,
        output_len=16,
        scheduling="chunked",
        chunk_tokens=256,
        attention="default",
        graphs="default",
        seed=3,
        limits=LIMITS,
        settings={},
    )
    return dataclasses.replace(given, **changes)
