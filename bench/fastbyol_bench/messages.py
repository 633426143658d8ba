"""What ranks send in a step, and what that costs: the tables of docs/ranks.md.

    python -m fastbyol_bench.messages              # count, measure, write both files
    python -m fastbyol_bench.messages --json FILE  # write FILE instead, and print the tables
    python -m fastbyol_bench.messages --quick      # tiny sizes: print the tables
    python -m fastbyol_bench.messages --docs       # write docs/ranks.md from the last result

Messages are counted in real steps; ``rank_times`` measures, which needs a quiet machine with two
cores.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError
from torch import Tensor

from fastbyol import load_config
from fastbyol.config import Resolved
from fastbyol.engine.ranks import Alone, Team, Threads, run_threads
from fastbyol.engine.step import TrainState, forward, share_of, train_step
from fastbyol.errors import UsageError
from fastbyol.runs.durable import write_text
from fastbyol_bench import rank_times
from fastbyol_bench.readme import DOCS, RESULTS, filled, markdown, sentence
from fastbyol_bench.results import Frozen, Result, Row

DOCUMENT, KEPT = DOCS / "ranks.md", RESULTS / "ranks.json"
BEGIN, END = "<!-- ranks: made by fastbyol_bench.messages -->", "<!-- ranks: end -->"
RANKS = 2
PRESETS = ("blog", "demo")
NETWORKS: Mapping[str, tuple[str, ...]] = {
    "bn": (),
    "bn, `norm_scope` rank": ("model.norm_scope=rank",),
    "bn, MLPs none": ("model.projector.norm=none", "model.predictor.norm=none"),
    "gn": ("model.norm=gn",),
    "gn + ws": ("model.norm=gn", "model.ws=true"),
    "gn + ws, MLPs none": (
        "model.norm=gn", "model.ws=true", "model.projector.norm=none", "model.predictor.norm=none",
    ),
    "ln": ("model.norm=ln",),
    "none": ("model.norm=none",),
    "bn, contrastive with a queue": ("method.name=contrastive",),
    "bn, contrastive without one": ("method.name=contrastive", "method.queue=0"),
}  # fmt: skip
# Messages do not depend on the images' size: small ones are quick.
SIZE = 32
QUICK = ("model.width=4", "train.batch_size=4", "method.queue=8")


class Tally(Frozen):
    """A number of messages, and the bytes that one rank puts into them."""

    messages: NonNegativeInt
    bytes: NonNegativeInt


class Count(Frozen):
    """The messages of one rank of ``ranks`` in a step.

    ``forward`` and ``backward`` are tensors of which each rank gets every other's, ``summed`` one
    that each gets the sum of; its first ``gradient`` bytes are the gradient.
    """

    preset: str
    network: str
    batch_size: PositiveInt
    ranks: PositiveInt
    forward: Tally
    backward: Tally
    summed: Tally
    gradient: NonNegativeInt


class Kept(Frozen):
    """The content of ``KEPT``."""

    schema_: Literal["fastbyol-ranks/1"] = Field("fastbyol-ranks/1", alias="schema")
    counts: tuple[Count, ...]
    times: Result


class Counted(Threads):
    """A rank that remembers the bytes of what it sends, by ``phase``."""

    def __init__(self, index: int, team: Team) -> None:
        super().__init__(index, team)
        self.phase = "before"
        self._sent: list[tuple[str, int]] = []

    def gather(self, x: Tensor) -> Tensor:
        """Stack ``x`` of every rank, and remember its size."""
        self._sent.append((self.phase, x.numel() * x.element_size()))
        return super().gather(x)

    def sum_(self, flat: Tensor) -> None:
        """Sum ``flat`` over the ranks, in place, and remember its size."""
        self._sent.append(("sum", flat.numel() * flat.element_size()))
        super().sum_(flat)

    def tally(self, phase: str) -> Tally:
        """Return what was sent in ``phase``: forward, backward or, of any, sum."""
        sizes = [size for name, size in self._sent if name == phase]
        return Tally(messages=len(sizes), bytes=sum(sizes))


def count(preset: str, network: str, sets: Sequence[str] = ()) -> Count:
    """Take a step of ``RANKS`` ranks with the preset's batch, and return what each of them sent.

    ``network`` is a name in ``NETWORKS``; ``sets`` (KEY=VALUE) come before its own settings.
    """
    settings = [f"views.size={SIZE}", "train.device=cpu", "train.precision=fp32", *sets]
    config = load_config(preset, [*settings, *NETWORKS[network]])
    team = Team(RANKS, Alone())
    ranks = [Counted(index, team) for index in range(RANKS)]
    gradients = run_threads(ranks, partial(_step, config))
    first, *others = (
        Count(
            preset=preset,
            network=network,
            batch_size=config.train.batch_size,
            ranks=RANKS,
            forward=own.tally("forward"),
            backward=own.tally("backward"),
            summed=own.tally("sum"),
            gradient=gradient,
        )
        for own, gradient in zip(ranks, gradients, strict=True)
    )
    assert all(other == first for other in others), "ranks with equal shares send the same"
    return first


def _step(config: Resolved, ranks: Counted) -> int:
    """Take a step as one of ``ranks``, and return the bytes of a gradient."""
    state = TrainState.create(config, steps_per_epoch=1, ranks=ranks)
    share, size = share_of(config.train.batch_size, ranks), config.views.size

    def phased(*arguments: object) -> tuple[Tensor, Tensor, Tensor | None]:
        ranks.phase = "forward"
        outputs = forward(*arguments)  # type: ignore[arg-type]
        ranks.phase = "backward"
        return outputs

    train_step(state, torch.zeros(2, share.count, 3, size, size), phased)
    gradient = state.arena.gradient
    return gradient.numel() * gradient.element_size()


def counts(*, quick: bool = False) -> Iterator[Count]:
    """Yield the count of each of ``NETWORKS`` in each of ``PRESETS``; ``quick``: of tiny ones."""
    for preset in PRESETS:
        for network in NETWORKS:
            yield count(preset, network, QUICK if quick else ())


def block(kept: Kept) -> str:
    """Return the document's block, marks included."""
    return "\n".join((BEGIN, *_counted(kept.counts), "", *_timed(kept.times), END))


def _counted(rows: Sequence[Count]) -> Iterator[str]:
    batches = ", ".join(
        dict.fromkeys(f"{row.batch_size} images (preset {row.preset})" for row in rows)
    )
    yield (
        f"Counted in a step of {rows[0].ranks} ranks, with batches of {batches}: messages, and the "
        "bytes that one rank puts into them. Only those of the contrastive loss depend on the size "
        "of a batch."
    )
    heads = ("preset", "network", "gathered forward", "backward", "summed", "of it the gradient")
    yield ""
    yield markdown(
        heads,
        (
            (
                row.preset,
                row.network,
                _tally(row.forward),
                _tally(row.backward),
                _tally(row.summed),
                f"{100 * row.gradient / row.summed.bytes:.2f} %",
            )
            for row in rows
        ),
    )


def _tally(tally: Tally) -> str:
    return f"{tally.messages}: {_size(tally.bytes)}" if tally.messages else "none"


def _size(num_bytes: int) -> str:
    for unit, size in (("MB", 10**6), ("kB", 10**3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes} bytes"


def _timed(times: Result) -> Iterator[str]:
    yield sentence(times)
    yield ""
    yield markdown(
        ("a step", "how", "time, one rank's on two threads = 1", "its spread", "rounds"),
        (_ratio(row) for row in times.rows if row.timing is not None),
    )


def _ratio(row: Row) -> tuple[str, ...]:
    assert row.timing is not None
    if row.ratio is None:
        return row.name, row.variant, "1", "", str(row.timing.runs)
    median, spread = f"{row.ratio.median:.2f}", f"{row.ratio.spread:.2f}"
    return row.name, row.variant, median, spread, str(row.timing.runs)


def dumps(kept: Kept) -> str:
    """Return ``kept`` as JSON text."""
    return json.dumps(kept.model_dump(mode="json", by_alias=True), indent=1) + "\n"


def read(path: Path = KEPT) -> Kept:
    """Read a file that this module wrote. Raises UsageError if it is missing or anything else."""
    with suppress(OSError, ValidationError):
        return Kept.model_validate_json(path.read_text("utf-8"))
    raise UsageError(
        f"{path}: no counts of messages: python -m fastbyol_bench.messages writes them"
    )


def fresh(text: str, kept: Kept) -> str:
    """Return the document's ``text`` with its block made anew."""
    return filled(text, BEGIN, END, block(kept))


def main(arguments: Sequence[str]) -> None:
    """Count and measure, or write the document, as the head of this module says."""
    parser = argparse.ArgumentParser(prog="python -m fastbyol_bench.messages")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, whose times say nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the result goes")
    parser.add_argument("--docs", action="store_true", help="write docs/ranks.md, measure nothing")
    asked = parser.parse_args(arguments)
    kept = read() if asked.docs else measured(quick=asked.quick)
    if not asked.docs and (asked.json or not asked.quick):
        write_text(asked.json or KEPT, dumps(kept))
    if asked.docs or not (asked.quick or asked.json):
        write_text(DOCUMENT, fresh(DOCUMENT.read_text("utf-8"), kept))
    else:
        print(block(kept))


def measured(*, quick: bool) -> Kept:
    """Return the counts and the times, made now."""
    return Kept(
        schema="fastbyol-ranks/1",
        counts=tuple(counts(quick=quick)),
        times=rank_times.measured(quick=quick, note=lambda line: print(line, file=sys.stderr)),
    )


if __name__ == "__main__":
    main(sys.argv[1:])
