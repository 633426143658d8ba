"""The process that draws the picture of views: it alone of a logger's imports torch."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from fastbyol import config_io
from fastbyol.data import embedded
from fastbyol.errors import FastbyolError
from fastbyol.runs.folder import CONFIG
from fastbyol.runs.lock import InUseError, Lock
from fastbyol.show import contact_sheet

PAUSE_S = 0.2


def main() -> None:
    """Draw views of the run that the arguments name into the file behind it, unless it is there."""
    run, file = map(Path, sys.argv[1:])
    try:
        lock = _locked(file.parent)
        try:
            if not file.exists():
                config = config_io.read_run(run / CONFIG)
                data = embedded.training_file(config.data)
                contact_sheet.write(data, file, config, count=config.log.pictures)
        finally:
            lock.release()
    except FastbyolError as error:
        sys.exit(f"no picture of views: {error}")


def _locked(folder: Path) -> Lock:
    """Return the folder's lock, for which other loggers' processes are waited."""
    while True:
        try:
            return Lock(folder)
        except InUseError:
            time.sleep(PAUSE_S)


if __name__ == "__main__":
    main()
