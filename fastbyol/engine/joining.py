"""What ranks other than the first do before the first step, while that one prepares the run.

They read data and nothing of the run's folder, which may be on another machine.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from functools import partial

from fastbyol.data import beton, embedded
from fastbyol.engine import ranks as ranking
from fastbyol.engine.device import pick_device
from fastbyol.engine.observer import Silent
from fastbyol.engine.ranks import Ranks
from fastbyol.engine.session import (
    Beginning,
    Progress,
    Session,
    Terms,
    hand_over,
    open_batches,
    read_test,
    ready_engine,
)
from fastbyol.engine.step import TrainState
from fastbyol.errors import UsageError
from fastbyol.runs.inputs import Inputs


def join(ranks: Ranks, opened: ExitStack) -> tuple[Session, Progress]:
    """Open the data, build the networks, and take over the first rank's state.

    ``opened`` closes all of it. Raises UsageError where the data here are not the first rank's.
    """
    terms: Terms = ranking.from_first(ranks, None)
    config, data = terms.config, terms.config.data
    device = pick_device(config.train.device)
    inspect = partial(beton.inspect, image_field=data.image_field, label_field=data.label_field)
    train_file, test_file = embedded.training_file(data), embedded.held_out_file(data)
    train = inspect(train_file, may_lack_labels=True)
    test = None if test_file is None else inspect(test_file)
    own = Inputs.of(train, test, terms.made_from.decoder)
    for name, file in (("train", train_file), ("test", test_file)):
        if getattr(own, name) != getattr(terms.made_from, name):
            raise UsageError(
                f"{file}: rank {ranks.rank} has other images under this name than the first rank: "
                "copy that one's file here"
            )
    batches = opened.enter_context(
        open_batches(config, train, own.decoder, terms.cache, device, ranks)
    )
    images = read_test(config, test, own.decoder, device, ranks)
    state = TrainState.create(
        config, steps_per_epoch=batches.steps_per_epoch, device=device, ranks=ranks
    )
    start: Beginning = ranking.from_first(ranks, None)
    if start.rates is not None and state.rate_override is not None:
        state = replace(state, rate_override=state.rate_override.replay(start.rates))
    hand_over(state)
    session = Session(
        path=terms.run,
        folder=None,
        config=config,
        observer=Silent(),
        batches=batches,
        test=images,
        state=state,
        take_step=ready_engine(config, batches, state, start.mode, start.progress.step),
        ranks=ranks,
    )
    return session, start.progress
