"""Kernels that an image ships compiled: where they lie, and how Triton finds them.

Owns the place and the reading. Does not own the filling (`smbench.worker.bake`) nor the user's cache, which stays where
`TRITON_CACHE_DIR` says and gets whatever was not shipped.

Triton keeps one folder of files a kernel, named by a key of everything that the kernel depends on: source, options,
target, the compiler and its assembler. It has one cache only, which it also writes; and the files of a kernel are
listed by absolute path. So the shipped folder is read by a cache manager of our own (`bakedcache`): it takes what the
folder holds by its name, from wherever the folder lies, read-only or not, and hands everything else on. Nothing is
copied at start, and a hit writes nothing. Kernels in CUDA C++ are one file each beside those folders, which
`smbench_kernels.nvrtc` reads by name.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

VARIABLE = "SMBENCH_BAKED"
"""Environment variable that names the folder in place of the default one."""
FACTS = "baked.json"
"""File of the folder that says what was compiled, and with what."""


def folder() -> Path:
    """Where this Python's shipped kernels lie, there or not: a folder of the environment itself."""
    named = os.environ.get(VARIABLE)
    return Path(named) if named else Path(sys.prefix) / "share" / "smbench" / "triton"


def use() -> bool:
    """Have Triton and NVRTC's users look among the shipped kernels first, if there are any; whether there are.

    A cache manager that was chosen otherwise (`TRITON_CACHE_MANAGER`) stays.
    """
    if not (folder() / FACTS).is_file():
        return False
    # here and not above, since a worker may have no Triton
    from triton import knobs
    from triton.runtime.cache import FileCacheManager

    from smbench.worker.bakedcache import BakedCacheManager
    from smbench_kernels import nvrtc

    nvrtc.SHIPPED[:] = [folder()]
    if knobs.cache.manager_class in (None, FileCacheManager):
        knobs.cache.manager_class = BakedCacheManager
    return True
