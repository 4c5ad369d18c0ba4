"""An OpenAI-compatible server whose answers and faults are known in advance: `python -m …fakeserver --port N …`.

What tests of servers and load clients are run against. Owns its scripts; a recipe for measuring never names it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "fake"
SCRIPTS = frozenset(
    {
        "cached",
        "crash",
        "errors",
        "exit",
        "hang",
        "never-ready",
        "oom-at-start",
        "server",
        "short",
        "stubborn",
        "truncated",
    }
)
ERROR_EVERY = 10


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    # every token is a packet of its own
    disable_nagle_algorithm = True
    server: Server

    def do_GET(self) -> None:
        """Health, models and version."""
        answers: dict[str, tuple[int, dict[str, Any]]] = {
            "/health": (503 if self.server.script == "never-ready" else 200, {}),
            "/v1/models": (
                200,
                {"object": "list", "data": [{"id": MODEL, "max_model_len": 2048, "root": "/models/x"}]},
            ),
            "/version": (200, {"version": "1.0"}),
        }
        self._json(*answers.get(self.path, (404, {"error": "no such path"})))

    def do_POST(self) -> None:
        """A completion, as a whole or in pieces of one token."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        index = next(self.server.served)
        if index >= self.server.at:
            strike(self.server.script)
        if self.server.script == "errors" and index % ERROR_EVERY == self.server.at % ERROR_EVERY:
            self._json(500, {"error": "scripted"})
            return
        prompt = body["prompt"]
        length = len(prompt) if isinstance(prompt, list) else len(prompt.split())
        tokens = int(body["max_tokens"]) - (self.server.script == "short" and index >= self.server.at)
        usage = {
            "prompt_tokens": length // 2 if self.server.script == "truncated" else length,
            "completion_tokens": tokens,
            "prompt_tokens_details": {"cached_tokens": length - 1 if self.server.script == "cached" and index else 0},
        }
        if not body.get("stream"):
            self._json(200, {"choices": [{"text": " w" * tokens}], "usage": usage})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for _ in range(tokens):
            time.sleep(self.server.step_s)
            self._event(json.dumps({"choices": [{"text": " w"}]}))
        self._event(json.dumps({"choices": [], "usage": usage}))
        self._event("[DONE]")
        self.wfile.write(b"0\r\n\r\n")

    def _json(self, code: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _event(self, words: str) -> None:
        data = f"data: {words}\n\n".encode()
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()


class Server(ThreadingHTTPServer):
    """The server and its script."""

    daemon_threads = True
    # a load comes all at once
    request_queue_size = 512

    def __init__(self, host: str, port: int, script: str, at: int, step_s: float) -> None:
        super().__init__((host, port), Handler)
        self.script = script
        self.at = at
        self.step_s = step_s
        self.served = itertools.count()


def strike(script: str) -> None:
    """What a script does at a request."""
    if script == "crash":
        sys.stderr.write("the fake server's last words\n")
        sys.stderr.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    if script == "exit":
        sys.stderr.write("torch.OutOfMemoryError: CUDA out of memory.\n")
        sys.stderr.flush()
        os._exit(3)
    if script == "hang":
        time.sleep(600)


def main(arguments: list[str]) -> int:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--script", default="", choices=["", *sorted(SCRIPTS)])
    parser.add_argument("--at", type=int, default=0)
    parser.add_argument("--step-ms", type=int, default=0)
    given = parser.parse_args(arguments)
    if given.script == "oom-at-start":
        sys.stderr.write("RuntimeError: CUDA out of memory. Tried to allocate 2.00 TiB.\n")
        return 1
    if given.script in ("server", "stubborn"):
        # somebody who leaves the group and ignores the end of it, as workers of engines do
        subprocess.Popen(["sleep", "600"], start_new_session=True)
    server = Server(given.host, given.port, given.script, given.at, given.step_ms / 1000)
    signal.signal(signal.SIGTERM, signal.SIG_IGN if given.script == "stubborn" else lambda *_: os._exit(0))
    sys.stderr.write(f"fake server {os.getpid()} listens on {given.port}\n")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    while True:
        signal.pause()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
