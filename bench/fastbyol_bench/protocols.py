"""The tables of docs/evaluation.md: protocols on the same runs, over seeds, and one's classes.

    python -m fastbyol_bench.protocols measure FOLDER  # train and measure what FOLDER lacks, docs
    python -m fastbyol_bench.protocols docs            # write the tables

Measuring takes a quarter of an hour on one core. What was measured is kept after each measurement.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastbyol.evaluation.intervals import accuracy_text
from fastbyol.runs.durable import write_text
from fastbyol_bench.demo_seeds import span
from fastbyol_bench.readme import DOCS, RESULTS, filled, markdown

DOCUMENT = DOCS / "evaluation.md"
KEPT = RESULTS / "evaluation" / "protocols.json"
BEGIN, END = "<!-- protocols: made by fastbyol_bench.protocols -->", "<!-- protocols: end -->"
BEGIN_CLASSES, END_CLASSES = (f"<!-- classes: {word} -->" for word in ("as above", "end"))
SEEDS = range(2)
DATA = "fashion-mnist"
# Of a result, what the table needs.
FIELDS = (
    *("accuracy", "accuracy_low", "accuracy_high", "top5_accuracy", "num_train", "num_test"),
    "num_classes",
)


class Case(NamedTuple):
    """A measurement of a run: the protocol, its weights, the share of labels and another set."""

    protocol: str
    weights: str = "trained"
    labels: float = 1.0
    data: str | None = None

    def in_words(self) -> str:
        """Return the row's name."""
        labels = "" if self.labels == 1.0 else f", {100 * self.labels:g} % of the labels"
        weights = "" if self.weights == "trained" else ", from random weights"
        return f"{self.protocol}{labels}{'' if self.data is None else f', {self.data}'}{weights}"


LINEAR, FINETUNE = Case("linear"), Case("finetune")
# Whose classes are shown.
BY_CLASS = SEEDS[0], LINEAR
CASES = (
    *(Case("knn"), LINEAR, FINETUNE),
    *(Case("linear", labels=0.1), Case("finetune", labels=0.1)),
    *(Case("linear", "random"), Case("finetune", "random"), Case("finetune", "random", 0.1)),
    *(Case("linear", data="textures"), Case("linear", "random", data="textures")),
)


def measure(folder: Path) -> dict[str, Any]:
    """Return the record with every seed and case, measured where the kept one lacks it."""
    from fastbyol import api, config_io
    from fastbyol.runs.environment import cpu_name

    kept = folder / KEPT.name
    record: dict[str, Any] = (
        json.loads(kept.read_text("utf-8"))
        if kept.exists()
        else {"cpu": cpu_name(), "data": DATA, "rows": []}
    )
    for seed in SEEDS:
        config = config_io.load(
            preset="demo",
            sets=[
                f"train.seed={seed}", f"data.train={DATA}", "train.device=cpu",
                "probe.every_epochs=0",
            ],
        ).config  # fmt: skip
        run = folder / f"seed{seed}"
        _ = api.resume(run) if run.exists() else api.train(config, run)
        for case in CASES:
            if any(row["seed"] == seed and row["case"] == list(case) for row in record["rows"]):
                continue
            test = DATA if case.data is None else None  # all of its 10,000 images
            result = api.evaluate(
                run, case.protocol, weights=case.weights, labels=case.labels, data=case.data,
                test_data=test, device="cpu",
            )  # fmt: skip
            fields = (*FIELDS, "classes") if (seed, case) == BY_CLASS else FIELDS
            row = {"seed": seed, "case": list(case), **{name: result[name] for name in fields}}
            record["rows"].append(row)
            write_text(kept, json.dumps(record, indent=1) + "\n")
    return record


def block(record: Mapping[str, Any]) -> str:
    """Return the block, marks included."""
    rows = {case: _rows(record, case) for case in CASES}
    seeds = sorted({row["seed"] for row in record["rows"]})
    table = markdown(
        ("protocol", "fitted", "scored", f"seed {seeds[0]}, 95 % interval", "all seeds", "top-5"),
        [_cells(case, of_seeds) for case, of_seeds in rows.items() if of_seeds],
    )
    apart = [
        tuned["accuracy_low"] > probed["accuracy_high"]
        for probed, tuned in zip(rows[LINEAR], rows[FINETUNE], strict=True)
    ]
    sentence = (
        f"{record['cpu']}, seeds: {len(seeds)}. The interval of finetune lies above that of linear "
        f"in {sum(apart)} of {len(apart)} runs."
    )
    return "\n".join([BEGIN, sentence, "", table, END])


def class_block(record: Mapping[str, Any]) -> str:
    """Return the block of the classes, marks included."""
    (row,) = (row for row in _rows(record, BY_CLASS[1]) if row["seed"] == BY_CLASS[0])
    table = markdown(
        ("class", "images", "accuracy", "mostly mistaken for"),
        [
            (
                each["name"],
                f"{each['num_test']:,}",
                accuracy_text(each["accuracy"], each["num_test"]),
                f"{each['mistaken_for']} ({each['num_mistaken']})",
            )
            for each in row["classes"]
        ],
    )
    return "\n".join([BEGIN_CLASSES, table, END_CLASSES])


def _rows(record: Mapping[str, Any], case: Case) -> list[Mapping[str, Any]]:
    """Return the rows of ``case`` by seed."""
    rows = (row for row in record["rows"] if Case(*row["case"]) == case)
    return sorted(rows, key=lambda row: int(row["seed"]))


def _cells(case: Case, rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    first = rows[0]
    return (
        case.in_words(),
        f"{first['num_train']:,}",
        f"{first['num_test']:,}",
        accuracy_text(first["accuracy"], first["num_test"]),
        span(row["accuracy"] for row in rows),
        span(row["top5_accuracy"] for row in rows),
    )


def fresh(text: str) -> str:
    """Return the document's ``text`` with its blocks made anew from bench/results."""
    record = json.loads(KEPT.read_text("utf-8"))
    text = filled(text, BEGIN_CLASSES, END_CLASSES, class_block(record))
    return filled(text, BEGIN, END, block(record))


def main() -> None:
    """Do what the first word of the command line says."""
    word, *where = sys.argv[1:]
    if word == "measure":
        record = measure(Path(*where))
        KEPT.parent.mkdir(parents=True, exist_ok=True)
        write_text(KEPT, json.dumps(record, indent=1) + "\n")
    write_text(DOCUMENT, fresh(DOCUMENT.read_text("utf-8")))


if __name__ == "__main__":
    main()
