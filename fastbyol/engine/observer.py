"""The messages of a run at work: the trainer sends them, the command line shows them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Start:
    """The message before the first step of this process."""

    run: str
    device: str
    data: str
    num_samples: int
    num_parameters: int
    steps_per_epoch: int
    epochs: int
    first_step: int


@dataclass(frozen=True)
class StepReport:
    """The message when metrics have come off the device; ``metrics`` are the newest step's."""

    step: int
    epoch: int
    img_s: float
    eta_s: float
    state: str
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class EpochEnd:
    """The message at an epoch's end; ``metrics`` are its means.

    ``accuracy`` is in percent of ``num_scored`` images, both None where nothing was probed.
    """

    epoch: int
    epochs: int
    step: int
    img_s: float
    eta_s: float
    state: str
    accuracy: float | None
    num_scored: int | None
    metrics: Mapping[str, float]


class Observer(Protocol):
    """A receiver of a run's messages."""

    def start(self, message: Start) -> None: ...
    def progress(self, message: StepReport) -> None: ...
    def epoch_end(self, message: EpochEnd) -> None: ...
    def note(self, text: str) -> None: ...


class Silent:
    """An observer that ignores all messages."""

    def start(self, message: Start) -> None:
        """Ignore the message."""

    def progress(self, message: StepReport) -> None:
        """Ignore the message."""

    def epoch_end(self, message: EpochEnd) -> None:
        """Ignore the message."""

    def note(self, text: str) -> None:
        """Ignore the message."""
