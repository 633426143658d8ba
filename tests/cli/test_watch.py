"""``fastbyol watch`` as typed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from command_line import Command

COMMAND = ["watch"]
OLD_RUN = Path(__file__).parent.parent / "runs" / "old" / "finished"


@pytest.mark.parametrize(
    ("number", "code", "error"),
    [
        (signal.SIGINT, 0, ""),
        (signal.SIGTERM, -signal.SIGTERM, "fastbyol: error: ended by SIGTERM\n"),
    ],
)
def test_a_signal_ends_it_also_with_clients(
    tmp_path: Path, number: signal.Signals, code: int, error: str
) -> None:
    shutil.copytree(OLD_RUN, tmp_path / "run")
    program = "import sys; from fastbyol.cli.main import main; sys.argv[1:] = {}; main()"
    program = program.format(["watch", "run", "--port", "0"])
    # A shell's background would have it ignore Ctrl-C.
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=tmp_path, text=True, stdout=-1, stderr=-1,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, restore_signals=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:  # fmt: skip
        assert process.stdout is not None
        line = process.stdout.readline()
        url = re.fullmatch(r"run: (http://127\.0\.0\.1:\d+/) shows it until Ctrl-C\n", line)[1]  # type: ignore[index]
        with urllib.request.urlopen(f"{url}data", timeout=60) as answer:
            assert json.load(answer)["name"] == "run"
        port = int(url.rpartition(":")[2].rstrip("/"))
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(b"GET /")  # and no more
            process.send_signal(number)
            out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (code, "", error)


def test_bad_input_is_one_line(run: Command) -> None:
    assert "x: no run here (no config.toml)" in run.refusal("x")
    shutil.copytree(OLD_RUN, "run")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert f"--port {port}: cannot be used" in run.refusal("run", "--port", port)
    run.refusal("run", "--port", 65536)
    run.refusal("run", "--port", "x")
