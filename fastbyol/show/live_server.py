"""A server of one run's live page on the loopback address, for people on this machine.

It has two routes, the page and its data, and no files: whatever else is asked for is not there.
"""

from __future__ import annotations

import logging
import re
import socket
import socketserver
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from fastbyol.errors import UsageError
from fastbyol.show import figures
from fastbyol.show.live import Watched

ADDRESS, PORT = "127.0.0.1", 6007
# A client of this machine that has not sent its request by then never will.
MOST_S = 10.0
# Connections at once. One more ends the oldest: others last milliseconds.
MOST_CLIENTS = 128
# The names under which a browser reaches this machine, also by a tunnel, which has its own port. A
# page of another name whose address was turned to this machine is refused (DNS rebinding).
_HOST = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d{1,5})?", re.IGNORECASE)
_log = logging.getLogger(__name__)


class Server(socketserver.ThreadingTCPServer):
    """A server of the page of ``run`` on ``port`` of the loopback address; 0 is any free one.

    Raises OSError where the port cannot be used. ``serve_forever`` serves until it is interrupted.
    """

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 256

    def __init__(self, run: Path, port: int) -> None:
        self.watched = Watched(run)
        self.page = figures.page("watch.html.j2", title="fastbyol watch").encode()
        self.policy = _policy(self.page.decode())
        self._open: dict[socket.socket, float] = {}  # since when, oldest first
        self._guard = threading.Lock()
        super().__init__((ADDRESS, port), Handler)

    @property
    def url(self) -> str:
        """The page's address."""
        return f"http://{ADDRESS}:{self.server_address[1]}/"

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start the thread of a connection; of too many, end the oldest."""
        with self._guard:
            if len(self._open) >= MOST_CLIENTS:
                _end(next(iter(self._open)))
            self._open[request] = time.monotonic()
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection."""
        with self._guard:
            self._open.pop(request, None)
            super().shutdown_request(request)

    def service_actions(self) -> None:
        """End connections that are older than ``MOST_S``, twice a second."""
        with self._guard:
            for request, since in self._open.items():
                if time.monotonic() - since > MOST_S:
                    _end(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Leave a client that went away alone, and log an error of our own in a line."""
        error = sys.exception()
        if not isinstance(error, OSError):
            _log.warning("watch: a request failed: %r", error)


def _end(request: socket.socket) -> None:
    """Let the thread that reads from a connection, or writes to it, go on with an error."""
    try:
        request.shutdown(socket.SHUT_RDWR)
    except OSError:  # the client was faster
        return


def _policy(page: str) -> str:
    """Return the Content-Security-Policy of a page: its own script, style and data, and no more."""
    sources = []
    for tag in ("script", "style"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        sources.append(f"{tag}-src {figures.source_of(content)}")
    return (
        f"default-src 'none'; {'; '.join(sources)}; connect-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    )


class Handler(BaseHTTPRequestHandler):
    """An answer to one request; a connection has no second one."""

    server: Server
    server_version, sys_version = "fastbyol", ""
    timeout = MOST_S

    def do_GET(self) -> None:
        """Answer with the page or its data."""
        hosts = self.headers.get_all("Host", [])
        if len(hosts) != 1 or not _HOST.fullmatch(hosts[0].strip()):
            self.send_error(403, "ask for 127.0.0.1 or localhost")
        elif (route := self.path.partition("?")[0]) == "/":
            self._send(200, "text/html; charset=utf-8", self.server.page)
        elif route == "/data":
            body, digest = self.server.watched.answer()
            tag = f'"{digest}"'
            if self.headers.get("If-None-Match") == tag:
                self._send(304, None, b"", tag)
            else:
                self._send(200, "application/json", body, tag)
        else:
            self.send_error(404, "there are / and /data")

    do_HEAD = do_GET  # noqa: N815

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer with a line of text, and no word of the request."""
        if code == 501:
            code, message = 405, "GET and HEAD are served"
        text = message if code in (403, 404, 405) else self.responses[code][0]
        self._send(code, "text/plain; charset=utf-8", f"{text}\n".encode())

    def _send(self, code: int, kind: str | None, body: bytes, tag: str | None = None) -> None:
        self.close_connection = True
        self.request_version = "HTTP/1.0"  # also where the request has none: headers are for all
        self.send_response(code)
        if kind:
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
        if tag:
            self.send_header("ETag", tag)
        if code == 405:
            self.send_header("Allow", "GET, HEAD")
        for name, value in (
            ("Content-Security-Policy", self.server.policy),
            ("X-Content-Type-Options", "nosniff"),
            ("X-Frame-Options", "DENY"),
            ("Cross-Origin-Resource-Policy", "same-origin"),
            ("Referrer-Policy", "no-referrer"),
            ("Cache-Control", "no-store"),
            ("Connection", "close"),
        ):
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002
        """Print nothing: a page asks every second."""


def server(run: Path, port: int | None) -> Server:
    """Return a server of ``run`` on ``port``; None is ``PORT``, or a free one where it is in use.

    Raises UsageError where a port that was asked for cannot be used.
    """
    try:
        return Server(run, PORT if port is None else port)
    except OSError as error:
        if port is None:
            return Server(run, 0)
        raise UsageError(
            f"--port {port}: cannot be used: {error.strerror}; leave it out for a free one"
        ) from None
