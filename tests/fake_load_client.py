"""Stands for `vllm bench serve` in tests: the same arguments, words and file, without importing vLLM, which takes 8 s.

Sends real requests to a server, one after the other at most `--max-concurrency` at a time, and writes what the real
client writes. The real one is tested in tests/engine.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


def send(url: str, model: str, prompt: Any, tokens: int) -> dict[str, Any]:
    """One request; what the real client's lists say of it."""
    found: dict[str, Any] = {"input": 0, "output": 0, "ttft": 0.0, "itl": [], "latency": 0.0, "error": "", "text": ""}
    place = urlsplit(url)
    began = last = time.perf_counter()
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }
    try:
        connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=60)
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            return {**found, "error": answer.reason}
        for line in answer:
            if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
                continue
            chunk = json.loads(line[6:])
            now = time.perf_counter()
            if chunk["choices"]:
                if found["ttft"]:
                    found["itl"].append(now - last)
                else:
                    found["ttft"] = now - began
                last = now
                found["text"] += chunk["choices"][0]["text"]
            else:
                found |= {"input": chunk["usage"]["prompt_tokens"], "output": chunk["usage"]["completion_tokens"]}
    except (OSError, http.client.HTTPException) as error:
        words = f'Traceback (most recent call last):\n  File "{__file__}", line 1\n'
        return {**found, "output": 0, "error": f"{words}aiohttp.client_exceptions.{type(error).__name__}: {error}\n"}
    return {**found, "latency": last - began}


def main() -> int:
    """Do what the real client does."""
    parser = argparse.ArgumentParser()
    for name in ("base-url", "model", "dataset-path", "result-dir", "result-filename", "request-rate"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--num-prompts", type=int, required=True)
    parser.add_argument("--num-warmups", type=int, default=0)
    parser.add_argument("--max-concurrency", type=int)
    given, _ = parser.parse_known_args([word for word in sys.argv[1:] if word.startswith("--")])
    if leaked := [name for name in (*PROXIES, "OPENAI_API_KEY", "HF_TOKEN") if name in os.environ]:
        sys.exit(f"the environment has {', '.join(leaked)}")
    rows = [json.loads(line) for line in Path(given.dataset_path).read_text(encoding="utf-8").splitlines()]
    assert len(rows) == given.num_prompts
    for _ in range(given.num_warmups):
        send(given.base_url, given.model, rows[0]["prompt"], rows[0]["output_tokens"])
    sys.stderr.write("Starting main benchmark run...\n")
    lock, done = threading.Lock(), 0

    def one(row: dict[str, Any]) -> dict[str, Any]:
        nonlocal done
        found = send(given.base_url, given.model, row["prompt"], row["output_tokens"])
        with lock:
            done += 1
            sys.stderr.write(f"\r{done}/{len(rows)} [00:00<00:00,  1.00it/s]")
            sys.stderr.flush()
        return found

    began = time.perf_counter()
    with ThreadPoolExecutor(given.max_concurrency or len(rows)) as pool:
        found = list(pool.map(one, rows))
    duration = time.perf_counter() - began
    good = [entry for entry in found if entry["output"]]
    rate = float(given.request_rate)
    result = {
        "backend": "openai",
        "model_id": given.model,
        "tokenizer_id": ".",
        "num_prompts": len(rows),
        "client": "vllm bench serve 0.0-fake",
        "request_rate": rate if rate != float("inf") else "inf",
        "burstiness": 1.0,
        "max_concurrency": given.max_concurrency,
        "duration": duration,
        "completed": len(good),
        "failed": len(found) - len(good),
        "input_lens": [entry["input"] for entry in found],
        "output_lens": [entry["output"] for entry in found],
        "ttfts": [entry["ttft"] for entry in found],
        "itls": [entry["itl"] for entry in found],
        "latencies": [entry["latency"] for entry in found],
        "generated_texts": [entry["text"] for entry in found],
        "errors": [entry["error"] for entry in found],
    }
    (Path(given.result_dir) / given.result_filename).write_text(json.dumps(result), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
