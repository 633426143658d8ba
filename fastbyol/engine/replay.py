"""The rates of one run, used step by step in another: what LARS's rates do without the feedback that made them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from fastbyol.engine.step import TrainState
from fastbyol.errors import UsageError
from fastbyol.optim.rate_override import check_recorded
from fastbyol.runs.durable import new_digest
from fastbyol.runs.layers import read_layers


def with_replayed_rates(state: TrainState, run: Path, *, total_steps: int) -> tuple[TrainState, str]:
    """``state`` with the rates of each step that the run folder ``run`` recorded, fp32 as they were, and their digest.

    Raises UsageError: no such run, other layers, too few steps, or a configuration whose rates cannot be given.
    """
    if state.rate_override is None:
        raise UsageError("optim.replay_rates: the state was made without it")
    layers = read_layers(run)
    steps = np.asarray(layers.steps).tolist()
    check_recorded(run, steps, layers.names, own_names=state.segment_names, total_steps=total_steps)
    rates = np.ascontiguousarray(layers.values[:total_steps, :, layers.metrics.index("rate")])
    digest = new_digest()
    digest.update(json.dumps([*layers.names, *rates.shape]).encode())
    digest.update(rates.astype("<f4").tobytes())
    return replace(state, rate_override=state.rate_override.replay(torch.from_numpy(rates))), digest.hexdigest()
