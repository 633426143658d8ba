"""What the jobs of preemption.py do: count slowly, save at a signal, go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any


def note(file: Path, *words: object) -> None:
    """Append a line: SLURM's count of restarts, and the words."""
    with file.open("a") as lines:
        print(os.environ.get("SLURM_RESTART_COUNT", "0"), *words, file=lines)


class Counter:
    """A callable for submitit that counts to ``total`` and notes each start, save and end."""

    def __init__(self, file: Path, total: int, at: int = 0) -> None:
        self.file, self.total, self.at = file, total, at

    def __call__(self) -> int:
        note(self.file, "start", self.at)
        while self.at < self.total:
            self.at += 1
            time.sleep(0.1)
        note(self.file, "end", self.at)
        return self.at

    def checkpoint(self) -> Any:
        """Return what submitit runs after the restart."""
        import submitit

        note(self.file, "save", self.at)
        return submitit.helpers.DelayedSubmission(Counter(self.file, self.total, self.at))


def main(file: Path, total: int) -> None:
    """Count without submitit: at SIGTERM save, ask SLURM for a restart, and fail.

    A job that succeeded would not be queued again.
    """
    saved = file.with_suffix(".saved")
    counter = Counter(file, total, int(saved.read_text()) if saved.exists() else 0)

    def save(number: int, frame: FrameType | None) -> None:
        note(file, signal.Signals(number).name, counter.at)
        saved.write_text(str(counter.at))
        # Its own answer to the request is SIGTERM once more.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=True)
        sys.exit(1)

    signal.signal(signal.SIGTERM, save)
    counter()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
