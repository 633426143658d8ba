"""The processes of loggers, as those who start them see them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from fastbyol.config import LoggerName
from fastbyol.errors import quoted
from fastbyol.loggers.sink import FOLDER
from fastbyol.runs.durable import writing
from fastbyol.text import printable

# The exit code of a process that has sent everything: a library may end it with 0 at any time.
ALL_SENT = 90


class Child:
    """The process of one logger.

    It runs in a session of its own, so that Ctrl-C stops the training alone. The run's end is the
    end of a pipe, which the system closes if this process dies.
    """

    def __init__(self, run: Path, name: LoggerName, limit_s: float) -> None:
        self.run, self.name = run, name
        self._rest = b""
        self.log = run / FOLDER / name / "log.txt"
        with writing(self.log):
            self.log.parent.mkdir(parents=True, exist_ok=True)
            log = self.log.open("ab")
        # A library's temporary files, which it does not remove where it is ended.
        self._scratch = tempfile.mkdtemp(prefix="fastbyol-log-")
        reading, self._end = os.pipe()
        arguments = [str(run), name, str(reading), str(os.getpid()), str(limit_s), self._scratch]
        try:
            with log:
                self.process = subprocess.Popen(
                    program("fastbyol.loggers.follow", *arguments),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=environment(),
                    pass_fds=(reading,),
                    start_new_session=True,
                )
        except BaseException:
            self.finish()
            shutil.rmtree(self._scratch, ignore_errors=True)
            raise
        finally:
            os.close(reading)
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), False)

    def lines(self) -> list[str]:
        """Return what the process has said since."""
        assert self.process.stdout is not None
        content = b""
        with suppress(BlockingIOError):
            while piece := os.read(self.process.stdout.fileno(), 1 << 16):
                content += piece
        *lines, self._rest = (self._rest + content).split(b"\n")
        return [printable(line.decode("utf-8", "replace")) for line in lines]

    def finish(self) -> None:
        """Tell the process that nothing more is written."""
        if self._end >= 0:
            os.close(self._end)
            self._end = -1

    def close(self) -> None:
        """End the process, and those that it started: until it is waited for, its number is its."""
        self.finish()
        if self.process.poll() is None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        shutil.rmtree(self._scratch, ignore_errors=True)

    @property
    def command(self) -> str:
        """The command that sends what is missing."""
        return f"fastbyol log {quoted(self.run)} --to {self.name}"


def program(module: str, *arguments: str) -> list[str]:
    """Return the command that runs ``main`` of a module, whatever lies in the working folder."""
    return [sys.executable, "-P", "-c", f"from {module} import main; main()", *arguments]


def environment() -> dict[str, str]:
    """Return this process's variables for one that imports from where this one does."""
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path),
        # One core is enough, and the training has the others.
        **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
    }
