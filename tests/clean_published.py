"""Published files with honest made-up numbers, one for each kind of document. Owns values; tests own what they assert.

Every time is its physical floor times a factor of its provider, with noise, so an audit has nothing to find.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping
from typing import Any

from smbench.arch import Device
from smbench.audit_bounds import floor_s
from smbench.observations import Observation, of_published
from smbench.published import Published

NOISE = 0.01
CARD = Device(
    name="Test card",
    arch="sm90",
    memory_bytes=2**35,
    memory_bandwidth_bytes_per_s=1e12,
    l2_bytes=50_000_000,
    tensor_flops_per_s={"float16": 1e14},
    source="made up",
)
"""1 GB takes 1 ms, and 1 TFLOP takes 10 ms."""

HEAD: Mapping[str, Any] = {
    "format": 2,
    "document": "000",
    "title": "made up",
    "device": "Test card",
    "arch": "sm90",
    "notes": [],
    "versions": {"engine": "1.0"},
    "source": {"repository": "none", "commit": "none", "licence": "none"},
    "protocol": {"method": "wall", "l2": "cold", "statistic": "median"},
    "legend": {},
    "at": {"dtype": "float16"},
    "settings": [{"section": "s", "headers": ["Item", "Value"], "rows": [["layers", "64"]], "found": {"layers": "64"}}],
}


def column(metric: str = "duration", unit: str = "ms", digits: int | None = 4, **rest: Any) -> dict[str, Any]:
    """A column; what is neither its digits nor its definition is a coordinate."""
    definition = {"definition": rest.pop("definition")} if "definition" in rest else {}
    return {
        "metric": metric,
        "unit": unit,
        "at": rest,
        **({"digits": digits} if digits is not None else {}),
        **definition,
    }


def table(at: Mapping[str, Any], axes: list[str], columns: list[Any], points: list[Any], **rest: Any) -> dict[str, Any]:
    """A table whose values are still to be filled in."""
    rows = [[*(point if isinstance(point, tuple) else (point,)), *[1.0] * len(columns)] for point in points]
    return {"path": "p", "at": dict(at), "axes": axes, "columns": columns, "rows": rows, **rest}


def requests() -> dict[str, Any]:
    """Whole requests of an engine, in chunks and by method."""
    work = {
        "where": {"kind": "request"},
        "metric": "e2e_latency",
        "dtype": "float16",
        "phases": [
            {"name": "prefill", "bytes": "ceil(input_len / chunk) * weights", "flops": "8 * weights * input_len"},
            {"name": "decode step", "times": "output_len - 1", "bytes": "weights"},
        ],
    }
    engines = [column("e2e_latency", "s", provider=name) for name in ("one", "two", "three")]
    at = {"kind": "request", "input_len": 8000, "output_len": 16}
    methods = ["eager", "graphs", "other kernel"]
    effective = {name: {"mode": name} for name in methods}
    return {
        **HEAD,
        "facts": {"layers": 64, "weights": "layers * 250e6"},
        "work": [work],
        "table": [
            table(at, ["chunk"], engines, [1024, 512, 256, 128, 64, 32], title="prefills"),
            table(
                {**at, "output_len": 512, "chunk": 8000}, ["method"], [column("e2e_latency", "s")], methods,
                title="decoding", effective=effective,
            ),
        ],
    }  # fmt: skip


def histories() -> dict[str, Any]:
    """A block whose time depends on new and on cached tokens, read off a plot, with a cache that does fill."""
    work = {
        "where": {"kind": "block"},
        "metric": "duration",
        "dtype": "float16",
        "phases": [{"name": "block", "flops": "batch * 2e5 * (new * 200 + new * total)"}],
    }
    points = [(total, total >> i) for total in (256, 512, 1024, 2048) for i in range((total // 128).bit_length())]
    plot = {"read_off_plot": True, "uncertainty": 0.02}
    feature = {
        "name": "eviction", "needs": "users * 2048", "exceeds": "pool_tokens", "unit": "tokens", "because": "it fills",
    }  # fmt: skip
    expectation = {
        "text": "with most of it cached the block is at least twice as fast", "stated": True, "metric": "duration",
        "where": {"total": 2048}, "numerator": {"new": 2048}, "denominator": {"new": 128}, "low": 2.0,
    }  # fmt: skip
    return {
        **HEAD,
        "facts": {"pages": 1024, "pool_tokens": "pages * 32", "users": 64},
        "work": [work],
        "feature": [feature],
        "expectation": [expectation],
        "table": [
            table({"kind": "block", "batch": b}, ["total", "new"], [column(digits=None)], points, title=f"b{b}", **plot)
            for b in (1, 8)
        ],
    }


def blocks() -> dict[str, Any]:
    """Block sizes of a cache whose size in tokens is constant, with and without a lookup."""
    work = {
        "where": {"kind": "attention"},
        "metric": "duration",
        "dtype": "float16",
        "phases": [{"name": "attention", "bytes": "seq_len * batch * 16384 * (1 + 4 / block)"}],
    }
    quantity = {
        "name": "pool", "formula": "pool_tokens * 4096", "unit": "B", "along": "block", "limit": "device_l2_bytes",
    }  # fmt: skip
    expectation = {
        "text": "leaving out the lookup takes no more time", "stated": False, "metric": "duration",
        "numerator": {"mode": "table"}, "denominator": {"mode": "contiguous"}, "low": 1.0,
    }  # fmt: skip
    columns = [column(digits=6, seq_len=4096), column(digits=6, seq_len=1024)]
    sizes = [1, 2, 4, 8, 16, 32]
    return {
        **HEAD,
        "facts": {"pool_tokens": 65536},
        "work": [work],
        "quantity": [quantity],
        "expectation": [expectation],
        "missing": {"blank": {"reason": "left blank", "kind": "unmeasured"}},
        "table": [
            table({"kind": "attention", "batch": 16, "mode": mode}, ["block"], columns, sizes, title=mode)
            for mode in ("table", "contiguous")
        ],
    }


def log() -> dict[str, Any]:
    """A log of batches with derived rates whose definition is stated, and one whose cell cannot have a number."""
    work = {
        "where": {"kind": "batch"},
        "metric": "e2e_latency",
        "dtype": "float16",
        "phases": [
            {"name": "prefill", "flops": "1e10 * batch * input_len"},
            {"name": "decode step", "times": "output_len - 1", "bytes": "1e9"},
        ],
    }
    columns = [
        column("e2e_latency", "s", 6),
        column("overall_throughput", "token/s", 3, definition="input and output tokens"),
        column("decode_latency", "s", 6),
        column("decode_throughput", "token/s", 3, definition="tokens of the batch"),
    ]
    points = [(batch, 1024, length) for batch in (4, 8, 16) for length in (1, 512)]
    return {
        **HEAD,
        "work": [work],
        "missing": {"none": {"reason": "no decode step", "kind": "inapplicable"}},
        "table": [table({"kind": "batch"}, ["batch", "input_len", "output_len"], columns, points, title="log")],
    }


def kernels() -> dict[str, Any]:
    """Kernels by batch and size, default and tuned for the very points, every digit there."""
    work = {
        "where": {"op": "shrink"},
        "metric": "duration",
        "dtype": "float16",
        "phases": [{"name": "shrink", "bytes": "1e6 * batch * hidden"}],
    }
    points = [(batch, hidden) for batch in (1, 2, 4, 8) for hidden in range(1, 25)]
    columns = [column(digits=None, provider=name) for name in ("ours", "theirs")]
    return {
        **HEAD,
        "at": {"dtype": "float16", "rank": 16},
        "work": [work],
        "tuned": [{"where": {"config": "tuned"}, "at": {"rank": 16}}],
        "table": [
            table({"op": "shrink", "config": config}, ["batch", "hidden"], columns, points, title=config)
            for config in ("default", "tuned")
        ],
    }


KINDS: Mapping[str, Callable[[], dict[str, Any]]] = {
    "requests": requests,
    "histories": histories,
    "blocks": blocks,
    "log": log,
    "kernels": kernels,
}

FACTORS: Mapping[str, float] = {
    "one": 1.2, "two": 1.5, "three": 2.1, "eager": 1.9, "graphs": 1.3, "other kernel": 1.6, "table": 1.5,
    "contiguous": 1.3, "ours": 1.2, "theirs": 1.7, "default": 1.4, "tuned": 1.15,
}  # fmt: skip
"""Time over floor by the words among a point's coordinates."""


def honest(kind: str, seed: int = 0) -> dict[str, Any]:
    """The file of a kind with its numbers, as plain data: plant a defect, then `Published.model_validate`."""
    data = copy.deepcopy(KINDS[kind]())
    rng = random.Random(seed)
    for seen in of_published("clean", Published.model_validate(data), CARD).observations:
        row = data["table"][seen.table]["rows"][seen.index]
        row[len(data["table"][seen.table]["axes"]) + seen.column] = _value(seen, rng)
    if kind == "log":
        _derive(data["table"][0])
    for entry in data["table"]:
        for row in entry["rows"]:
            for i, spec in enumerate(entry["columns"], start=len(entry["axes"])):
                if "digits" in spec and not isinstance(row[i], str):
                    row[i] = round(row[i], spec["digits"])
    return data


def _value(seen: Observation, rng: random.Random) -> float:
    factor = 1.0
    for value in seen.at.values():
        factor *= FACTORS.get(str(value), 1.0)
    floor = floor_s(seen, CARD, 0.0) if seen.work else 1.0
    return floor * max(factor, 1.2) * (1 + rng.uniform(-NOISE, NOISE)) / (1e-3 if seen.metric == "duration" else 1.0)


def _derive(entry: dict[str, Any]) -> None:
    """Rates from times, by their stated definitions; without output there is no decode step."""
    for row in entry["rows"]:
        batch, prompt, output, total = row[:4]
        row[3] = total = round(total, 6)
        row[4] = (prompt + output) * batch / total
        step = round(total / (output + 50), 6)
        row[5:] = [step, batch / step] if output > 1 else ["none", "none"]
