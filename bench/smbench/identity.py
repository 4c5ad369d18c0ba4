"""Identities: short hashes of canonical JSON. Owns how a value becomes bytes and bytes an identity; host and worker
share it, so it needs nothing but the standard library.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces; NaN and infinities raise ValueError."""
    return _ENCODER.encode(value)


def short_hash(value: Any) -> str:
    """First 16 hex digits of the SHA-256 of a value's canonical JSON in UTF-8."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:16]


def environment_id(environment: Mapping[str, Any]) -> str:
    """The identity of an environment record, equal for two machines that are alike in every recorded fact.

    The reasons in `missing` do not count.
    """
    return short_hash({key: value for key, value in environment.items() if key != "missing"})


def files_sha256(files: Iterable[tuple[str, bytes]]) -> str:
    """SHA-256 over files given in order of their relative paths: each one's path, length and content."""
    digest = hashlib.sha256()
    for path, content in files:
        digest.update(f"{path}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()
