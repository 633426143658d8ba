"""The recorded rates of one run, replayed step by step in another: LARS without its feedback."""

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


def with_replayed_rates(
    state: TrainState, run: Path, *, total_steps: int
) -> tuple[TrainState, str]:
    """Return ``state`` with the fp32 rates recorded in the run folder ``run``, and their digest.

    Raises UsageError for no such run, other layers, too few steps or a state without an override.
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
    return replace(
        state, rate_override=state.rate_override.replay(torch.from_numpy(rates))
    ), digest.hexdigest()
