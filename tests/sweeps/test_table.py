"""The table's rows, and the CSV read back."""

from __future__ import annotations

import csv
from pathlib import Path

from fastbyol.sweeps import results, table
from made_sweep import SQUARE, ask, finish


def test_rows_say_what_is_done_and_how_far_seeds_lie_apart(tmp_path: Path) -> None:
    out = tmp_path / "out"
    ask(SQUARE.replace("[optim]", "[train]\nepochs = 1\n[optim]", 1), out, seeds=2)
    finish(out, "lr=0.1,weight_decay=0.0/seed0", ["healthy"], {"accuracy": 40.0})
    finish(out, "lr=0.1,weight_decay=0.0/seed1", ["collapsed"], {"accuracy": 15.0})
    finish(out, "lr=0.5,weight_decay=1.5e-06/seed0", ["healthy"], {"accuracy": 61.25})
    sweep = results.read(out)
    assert table.header(sweep, "accuracy") == [
        "lr", "weight_decay", "seeds", "ends", "accuracy", "least to most", "",
    ]  # fmt: skip
    assert table.rows(sweep, "accuracy") == [
        ["0.1", "0.0", "2", "1 healthy, 1 collapsed", "27.5", "15.0 to 40.0", ""],
        ["0.1", "1.5e-06", "0 of 2", "", "", "", "2 new"],
        ["0.5", "0.0", "0 of 2", "", "", "", "2 new"],
        ["0.5", "1.5e-06", "1 of 2", "healthy", "61.2", "", "1 new"],
    ]
    # A share has the interval in which it lies, also of one run (Wilson, 1 of 1: 1 / (1 + z^2)).
    assert table.header(sweep, "leaves")[-2] == "95 % interval"
    assert table.rows(sweep, "collapsed")[0][-3:] == ["0.50", "0.09 to 0.91", ""]
    assert table.rows(sweep, "collapsed")[3][-3:] == ["0.00", "0.00 to 0.79", "1 new"]
    rows = list(csv.DictReader(table.as_csv(sweep).splitlines()))
    assert len(rows) == 8
    assert rows[1] | {"neg_cos": ""} == {
        "optim.lr": "0.1", "optim.weight_decay": "0.0", "seed": "1", "status": "done",
        "state": "collapsed", "collapsed": "1.0", "recovered": "0.0", "epochs_collapsed": "1.0",
        "collapses": "1.0", "leaves": "0.0",
        "accuracy": "15.0", "neg_cos": "", "folder": "runs/lr=0.1,weight_decay=0.0/seed1",
    }  # fmt: skip
    assert (rows[2]["status"], rows[2]["accuracy"], rows[2]["state"]) == ("new", "", "")
