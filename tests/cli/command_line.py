"""The command ``fastbyol`` in the process of a test."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import pytest

# What the first command on a machine says besides, whichever test that is.
COMPILING = re.compile(r"compil(ing kernels for this cpu, once|ed \d+ kernels in \d+ s)\n")


class Command:
    """Types ``fastbyol``, the words ``first`` and the arguments, in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *first: str) -> None:
        self.capsys, self.first = capsys, first

    def __call__(self, *arguments: object) -> tuple[int, str, str]:
        """Run it; return (exit code, stdout, stderr)."""
        from fastbyol.cli import main

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(sys, "argv", ["fastbyol", *self.first, *map(str, arguments)])
            with pytest.raises(SystemExit) as ended:
                main.main()
        printed = self.capsys.readouterr()
        return int(ended.value.code or 0), printed.out, COMPILING.sub("", printed.err)

    def output(self, *arguments: object) -> str:
        """Run it; it must exit with 0. Return stdout."""
        code, out, err = self(*arguments)
        assert code == 0, err
        return out

    def json(self, *arguments: object) -> Any:
        """Run it with --json; return what it printed."""
        return json.loads(self.output(*arguments, "--json"))

    def refusal(self, *arguments: object, code: int = 2) -> str:
        """Run what is refused; return its error, which is all of stderr and one line."""
        ended, out, err = self(*arguments)
        assert ended == code, err
        # A run may say what it trains on before its end.
        assert not out or {"train", "run"} & set(arguments), out
        assert "error" not in out
        assert err.startswith("fastbyol: error: "), err
        assert err.count("\n") == 1, err
        assert "Traceback" not in err
        return err
