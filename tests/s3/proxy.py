"""A proxy in front of an S3 server that records what is asked of it, and can be slow, overloaded or broken.

Requests are passed on as they come, the Host header too: the signature covers it.
"""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import unquote, urlsplit

#: Of one hop, and set anew.
_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length"}
_ERROR = "<Error><Code>{code}</Code><Message>{code}, as the test wants</Message></Error>"


@dataclass(frozen=True)
class Request:
    """What was asked, and how much of it went over the line."""

    method: str
    path: str
    """`/bucket/key`, without what follows a question mark."""
    query: str
    range: str
    """The header, such as `bytes=0-99`; empty if the whole object is asked for."""
    sent: int
    """Bytes of the request's body."""
    received: int
    """Bytes of the answer's body that were passed on."""
    status: int
    """Of the answer; 0 if there was none."""


@dataclass
class Fault:
    """What happens instead of an answer, to the next `times` requests of the method with the text in their
    path."""

    kind: Literal["error", "reset", "cut", "stall", "stall inside"]
    """An answer with `status` and `code`; the connection closed before the answer, or in the middle of its
    body; silence before the answer, or from the middle of its body on."""
    times: int = 1
    method: str = ""
    path: str = ""
    status: int = 503
    code: str = "SlowDown"
    passes: int = 0
    """How many such requests are passed on before."""
    met: int = 0
    """How many requests have met it."""

    def meets(self, method: str, path: str) -> bool:
        """Whether it happens to a request; counts it."""
        if self.met >= self.times or self.method not in ("", method) or self.path not in path:
            return False
        if self.passes:
            self.passes -= 1
            return False
        self.met += 1
        return True


@dataclass
class Proxy:
    """Where it is, what it was asked, and what it shall do."""

    endpoint: str
    requests: list[Request] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    closing: threading.Event = field(default_factory=threading.Event)

    def add(self, fault: Fault) -> Fault:
        """From now on this happens too."""
        self.faults.append(fault)
        return fault

    def take(self, method: str, path: str) -> Fault | None:
        """The fault that a request meets."""
        with self.lock:
            return next((fault for fault in self.faults if fault.meets(method, path)), None)

    def read(self, path: str = "") -> int:
        """Bytes of objects whose path has the text that were read so far."""
        gets = (one for one in self.requests if one.method == "GET" and path in one.path and not one.query)
        return sum(one.received for one in gets)


@contextmanager
def proxy(upstream: str) -> Iterator[Proxy]:
    """A proxy of the server at the URL `upstream`, for the length of the block."""
    host = urlsplit(upstream).netloc

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            body = self.body()
            at = urlsplit(self.path)
            path = unquote(at.path)
            fault = place.take(self.command, path)
            status, received = self.broken(fault) if fault else (0, 0)
            if not fault or fault.kind in ("cut", "stall inside"):
                status, received = self.passed_on(body, fault)
            found = self.headers.get("Range", "")
            one = Request(self.command, path, at.query, found, len(body), received, status)
            with place.lock:
                place.requests.append(one)

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding", "") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def broken(self, fault: Fault) -> tuple[int, int]:
            """Does what is wanted instead of an answer."""
            if fault.kind == "error":
                text = b"" if self.command == "HEAD" else _ERROR.format(code=fault.code).encode()
                self.send_response(fault.status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)
                return fault.status, 0
            self.close_connection = True
            if fault.kind == "stall":
                place.closing.wait()
            return 0, 0

        def passed_on(self, body: bytes, fault: Fault | None) -> tuple[int, int]:
            """Asks the server, and passes its answer on; half of its body if there is a fault."""
            server = http.client.HTTPConnection(host, timeout=60)
            server.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in _HOP:
                    server.putheader(name, value)
            if body or self.command in ("PUT", "POST"):
                server.putheader("Content-Length", str(len(body)))
            server.endheaders(body)
            answer = server.getresponse()
            content = answer.read()
            server.close()
            self.send_response_only(answer.status)
            for name, value in answer.headers.items():
                if name.lower() not in _HOP:
                    self.send_header(name, value)
            length = answer.headers.get("Content-Length", "0") if self.command == "HEAD" else len(content)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            if fault:
                content = content[: len(content) // 2]
            self.wfile.write(content)
            if fault:
                self.wfile.flush()
                self.close_connection = True
                if fault.kind == "stall inside":
                    place.closing.wait()
            return answer.status, len(content)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_any

        def log_message(self, format: str, *args: object) -> None:
            """Nothing: the record is in `requests`."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        server.block_on_close = False
        place = Proxy(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield place
        finally:
            place.closing.set()
            server.shutdown()
            thread.join()
