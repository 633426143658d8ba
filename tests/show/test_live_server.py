"""A run's live page serves two routes to this machine, whoever asks and however."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from processes import wait_until

from fastbyol.errors import UsageError
from fastbyol.runs.metrics import METRICS_FILE
from fastbyol.show import live_server
from fastbyol.show.live_server import Server

OLD_RUN = Path(__file__).parent.parent / "runs" / "old" / "finished"
CLIENTS = 50


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished run whose name has markup, in a folder that has a secret, too."""
    (tmp_path / "secret").write_text("SECRET")
    return Path(shutil.copytree(OLD_RUN, tmp_path / "<img src=x>"))


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    with Server(folder, 0) as server:
        # Not half a second until it is told to end.
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(
    server: Server, target: str = "/data", method: str = "GET", **headers: str
) -> tuple[int, Any, bytes]:
    """Return status, headers and body of a request as typed."""
    connection = http.client.HTTPConnection(*server.server_address, timeout=60)
    with_host = {"Host": f"localhost:{server.server_address[1]}"} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    connection.putrequest(method, "/", skip_host=True, skip_accept_encoding=True)
    connection._buffer[0] = f"{method} {target} HTTP/1.1".encode("latin-1")  # type: ignore[attr-defined]
    for name, value in with_host.items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, answer.headers, body


def raw(server: Server, request: bytes) -> bytes:
    """Return all that comes back for the bytes ``request``."""
    with socket.create_connection(server.server_address, timeout=60) as client:
        client.sendall(request)
        parts = []
        try:
            while part := client.recv(1 << 16):
                parts.append(part)
        except ConnectionResetError:  # it did not read all of the request
            pass
        return b"".join(parts)


def test_the_page_and_its_data(server: Server) -> None:
    for target in ("/", "/?x=1"):
        code, headers, body = ask(server, target)
        assert (code, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
        assert int(headers["Content-Length"]) == len(body)
    code, headers, body = ask(server, "/data")
    shown = json.loads(body)
    assert (code, shown["name"], shown["status"]) == (200, "<img src=x>", "done")
    assert shown["curves"]["steps"]
    code, headers, empty = ask(server, "/data", If_None_Match=headers["ETag"])
    assert (code, empty) == (304, b"")
    code, headers, empty = ask(server, "/data", "HEAD")
    assert (code, int(headers["Content-Length"]), empty) == (200, len(body), b"")


def test_the_page_takes_nothing_from_elsewhere(server: Server) -> None:
    _, headers, body = ask(server, "/")
    links: list[tuple[str, str | None]] = []
    inline: dict[str, str] = {}

    class Links(HTMLParser):
        def handle_data(self, data: str) -> None:
            tag = self.cdata_elem or ""  # script and style, whose content is no markup
            inline[tag] = inline.get(tag, "") + data

        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            links.extend(
                (name, value)
                for name, value in attributes
                if name in ("src", "href", "style") or name.startswith("on")
            )

    Links().feed(body.decode())
    assert links == []
    # Names of formats, not addresses.
    assert set(re.findall(rb"https?://[^\"' ]*", body)) == {b"http://www.w3.org/2000/svg"}
    # No text becomes markup or code.
    assert not re.search(rb"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", body)
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; ")
    for tag in ("script", "style"):
        digest = base64.b64encode(hashlib.sha256(inline[tag].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy
    for name, value in {
        "X-Content-Type-Options": "nosniff", "Cache-Control": "no-store",
        "Referrer-Policy": "no-referrer", "Cross-Origin-Resource-Policy": "same-origin",
    }.items():  # fmt: skip
        assert headers[name] == value
    assert "Access-Control-Allow-Origin" not in headers


@pytest.mark.parametrize(
    "target",
    [
        "/../secret", "/..", "/%2e%2e/secret", "/..%2fsecret", "/%2e%2e%2fsecret", "//secret",
        "//etc/passwd", "/./data", "/data/", "/data/../../secret", "/data%00", "/%64ata",
        "/..\\secret", "/%c0%ae%c0%ae/secret", "/metrics.jsonl", "/config.toml", "/env.json",
        "/checkpoints/", "/report.html", "/link", "/data#x", "/data;x", "http://localhost/data",
        "http://elsewhere.example/", "file:///etc/passwd", "secret", "*", "/" + "a" * 60_000,
        "/\x00", "/\xff",
    ],
)  # fmt: skip
def test_nothing_else_is_there(server: Server, folder: Path, target: str) -> None:
    (folder / "link").symlink_to(folder.parent / "secret")
    code, headers, body = ask(server, target)
    assert (code, body) == (404, b"there are / and /data\n")
    assert headers["Content-Type"] == "text/plain; charset=utf-8"
    assert "Content-Security-Policy" in headers


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "CONNECT", "TRACE", "get"])
def test_other_methods_are_refused(server: Server, method: str) -> None:
    code, headers, _ = ask(server, "/data", method)
    assert (code, headers["Allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize(
    ("host", "code"),
    [
        ("127.0.0.1", 200), ("localhost:6007", 200), ("LOCALHOST:1", 200), ("[::1]:8000", 200),
        ("elsewhere.example", 403), ("127.0.0.1.elsewhere.example", 403), ("", 403),
        ("localhost@elsewhere.example", 403), ("0.0.0.0", 403), ("localhost:x", 403),
        ("localhost\t", 200), ("10.0.0.1:6007", 403),
    ],
)  # fmt: skip
def test_a_page_of_another_name_is_refused(server: Server, host: str, code: int) -> None:
    for target in ("/", "/data"):
        assert ask(server, target, Host=host)[0] == code


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\r\n", b"\n", b"GET\r\n\r\n", b"GET /data\r\n\r\n", b"GET /data HTTP/9.9\r\n\r\n",
        b"GET /data HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n",
        b"GET /data HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 5000 + b"\r\n",
        b"GET / HTTP/1.1\r\nX: " + b"y" * 100_000 + b"\r\n\r\n",
        b"GET / data HTTP/1.1\r\n\r\n", b"GET /data HTTP/1.x\r\nHost: localhost\r\n\r\n",
    ],
    ids=range(13),
)  # fmt: skip
def test_malformed_requests_are_refused(
    server: Server, request_bytes: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    answer = raw(server, request_bytes)
    assert b"curves" not in answer
    assert not answer or re.match(rb"HTTP/1\.0 [45]\d\d ", answer), answer[:80]
    assert ask(server)[0] == 200
    assert capfd.readouterr() == ("", "")


def test_slow_clients_end_and_others_are_served_meanwhile(
    server: Server, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(live_server, "MOST_CLIENTS", 20)
    before = threading.active_count()
    with ExitStack() as stack:
        slow = [
            stack.enter_context(socket.create_connection(server.server_address)) for _ in range(60)
        ]
        for client in slow[-9:]:
            client.sendall(b"GET / HT")
        slow[-1].close()
        assert ask(server)[0] == 200
        wait_until(lambda: threading.active_count() <= before + 20)  # though there are 60 clients
        monkeypatch.setattr(live_server, "MOST_S", 0.2)
        while threading.active_count() > before:
            for client in slow[-9:-1]:  # a byte at a time does not help
                with suppress(OSError):
                    client.sendall(b"x")
            time.sleep(0.05)
        assert ask(server)[0] == 200
    assert capfd.readouterr() == ("", "")


def test_fifty_clients_at_once_while_the_run_grows_is_cut_and_removed(
    server: Server, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path, before = folder / METRICS_FILE, threading.active_count()
    lines = path.read_text().splitlines(keepends=True)
    is_over = threading.Event()
    waits: list[float] = []

    def steps(lines: list[str]) -> int:
        rows = [json.loads(line) for line in lines]
        return 1 + max((row["step"] for row in rows if "event" not in row), default=-1)

    def client(number: int) -> list[tuple[float, float, dict[str, Any]]]:
        """Ask until the run is removed; return when each answer was asked for and came."""
        answers, tag = [], ""
        while not is_over.is_set() or not answers or answers[-1][2]["status"] != "gone":
            began = time.monotonic()
            code, headers, body = ask(server, "/data", If_None_Match=tag)
            waits.append(time.monotonic() - began)
            assert code in (200, 304)
            if code == 200:
                tag = headers["ETag"]
                answers.append((began, time.monotonic(), json.loads(body)))
            if number % 10 == 0:
                assert ask(server, "/")[0] == 200
            time.sleep(0.05)
        return answers

    half = len(lines) // 2
    path.write_text("")
    wait_until(lambda: not json.loads(ask(server)[2])["step"])
    with ThreadPoolExecutor(CLIENTS) as pool:
        futures = [pool.submit(client, number) for number in range(CLIENTS)]
        for count in range(1, half):  # it grows
            with path.open("a") as file:
                file.write(lines[count - 1])
            time.sleep(1.0 / half)
        cut = time.monotonic()
        path.write_text("".join(lines[: half // 2]))
        time.sleep(0.8)
        shutil.rmtree(folder)
        is_over.set()
        every = [future.result(timeout=60) for future in futures]
    for answers in every:
        grown = [shown["step"] for _, end, shown in answers if end < cut]
        assert grown == sorted(grown)
        last = answers[-1][2]
        assert (last["status"], last["step"]) == ("gone", steps(lines[: half // 2]))
    # Nobody waits for others: the slowest of some thousands of answers.
    print(f"{len(waits)} answers, slowest {max(waits):.3f} s")
    out, err = capfd.readouterr()
    assert err == ""
    assert max(waits) < 10.0, out
    wait_until(lambda: threading.active_count() <= before)


def test_a_port_in_use(server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port = server.server_address[1]
    with pytest.raises(UsageError, match=f"--port {port}: cannot be used: Address already in use"):
        live_server.server(folder, port)
    monkeypatch.setattr(live_server, "PORT", port)
    with live_server.server(folder, None) as other:
        assert other.server_address[1] != port
    assert server.server_address[0] == "127.0.0.1"
