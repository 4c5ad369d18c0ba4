"""What a running server tells of itself: over HTTP, in its log, and by the counts of an answer. Owns the questions.

Which engine has which path is found by asking: a path that a server has not costs a millisecond and says nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smbench.worker import loopback
from smbench.worker.engines import sglang
from smbench.worker.engines.plain import plain
from smbench.worker.engines.vllm_kernels import SAID
from smbench.worker.loadclient import ENDPOINT
from smbench.worker.server import Server

PATHS: Mapping[str, tuple[str, ...]] = {
    "version": ("/version",),
    "settings": ("/server_info", "/get_server_info"),
}
"""Name of a fact to the paths that may have it, the first answer counts: vLLM and TensorRT-LLM say their version,
sglang all that it resolved, the older path being deprecated."""
NO_SETTING = frozenset(
    {"internal_states", "launch_command", "startup_time", "host", "port", "api_key", "admin_api_key"}
)
LIMIT_S = 30.0
CACHE_TOKENS = re.compile(r"KV cache size: ([\d,]+) tokens|max_total_num_tokens=(\d+)")
"""How vLLM and sglang log the tokens that their cache holds."""


@dataclass(frozen=True, slots=True)
class Probe:
    """How a server counts one request."""

    prompt_tokens: int | None
    completion_tokens: int | None
    cached_tokens: int | None
    """Prompt tokens from a cache of prefixes; None where it does not say."""


def told(server: Server) -> dict[str, Any]:
    """What the server says of itself, in its own keys: JSON, no absolute path."""
    found: dict[str, Any] = {}
    for name, paths in PATHS.items():
        for path in paths:
            try:
                said = loopback.ask(server.port, path, LIMIT_S)
            except loopback.NoAnswer:
                continue
            found[name] = plain({key: value for key, value in said.items() if key not in NO_SETTING})
            break
    models = loopback.ask(server.port, "/v1/models", LIMIT_S)["data"]
    lengths = [model["max_model_len"] for model in models if model.get("max_model_len") is not None]
    return {**found, **({"max_model_len": lengths[0]} if lengths else {})}


def kernels(log: Path, facts: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """What runs, by role. Layers are 0: a log names a kernel and not how many layers run it."""
    found: dict[str, dict[str, int]] = sglang.kernels_of(facts.get("settings", {}))
    for match in SAID.finditer(log.read_text(encoding="utf-8", errors="replace")):
        role, name = ("linear", match[1]) if match[1] else ("attention", match[2])
        found.setdefault(role, {})[name] = 0
    return found


def memory(log: Path) -> dict[str, int]:
    """Tokens that the cache holds, where the log says so."""
    found = CACHE_TOKENS.search(log.read_text(encoding="utf-8", errors="replace"))
    return {"kv_cache_tokens": int((found[1] or found[2]).replace(",", ""))} if found else {}


def probe(server: Server, prompt: Sequence[int] | str, output_len: int, limit_s: float) -> Probe:
    """One request, answered as a whole. loopback.NoAnswer where it fails."""
    body = {
        "model": server.command.model,
        "prompt": prompt,
        "max_tokens": output_len,
        "temperature": 0.0,
        "ignore_eos": True,
    }
    usage = loopback.ask(server.port, ENDPOINT, limit_s, body).get("usage")
    if not isinstance(usage, dict):
        raise loopback.NoAnswer(f"{ENDPOINT}: the answer counts no tokens")
    details = usage.get("prompt_tokens_details") or {}
    return Probe(usage.get("prompt_tokens"), usage.get("completion_tokens"), details.get("cached_tokens"))
