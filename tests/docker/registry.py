"""A registry for tests: as much of the OCI distribution protocol as docker needs to push and to pull, in memory.

Owns no storage and no authentication; listens on the loopback address, which docker takes without TLS.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit


class Registry(ThreadingHTTPServer):
    """Blobs and manifests by digest, tags by name."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Api)
        self.blobs: dict[str, bytes] = {}
        self.uploads: dict[str, bytes] = {}
        self.manifests: dict[str, tuple[str, bytes]] = {}
        """Media type and content, by digest and by tag."""

    @property
    def name(self) -> str:
        """As it is written before an image's name."""
        return f"127.0.0.1:{self.server_address[1]}"


@contextmanager
def running() -> Iterator[Registry]:
    """A registry while the block runs."""
    with Registry() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def digest_of(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


class _Api(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Registry

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        what, _, name = self.path.rpartition("/")
        if self.path == "/v2/":
            self._say(200)
        elif what.endswith("/blobs") and name in self.server.blobs:
            self._say(200, self.server.blobs[name], {"Docker-Content-Digest": name})
        elif what.endswith("/manifests") and name in self.server.manifests:
            kind, content = self.server.manifests[name]
            self._say(200, content, {"Content-Type": kind, "Docker-Content-Digest": digest_of(content)})
        else:
            self._say(404)

    def do_POST(self) -> None:
        self._body()
        upload = str(len(self.server.uploads))
        self.server.uploads[upload] = b""
        self._say(202, headers={"Location": f"{urlsplit(self.path).path}{upload}"})

    def do_PATCH(self) -> None:
        upload = self.path.rpartition("/")[2]
        self.server.uploads[upload] += self._body()
        end = len(self.server.uploads[upload]) - 1
        self._say(202, headers={"Location": self.path, "Range": f"0-{end}"})

    def do_PUT(self) -> None:
        parts = urlsplit(self.path)
        what, _, name = parts.path.rpartition("/")
        content = self._body()
        if what.endswith("/manifests"):
            digest = digest_of(content)
            entry = self.headers["Content-Type"], content
            self.server.manifests |= {name: entry, digest: entry}
        else:
            (digest,) = parse_qs(parts.query)["digest"]
            self.server.blobs[digest] = self.server.uploads.pop(name) + content
        self._say(201, headers={"Location": parts.path, "Docker-Content-Digest": digest})

    def _body(self) -> bytes:
        if re.search("chunked", self.headers.get("Transfer-Encoding", "")):
            content = b""
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return content
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _say(self, code: int, content: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
