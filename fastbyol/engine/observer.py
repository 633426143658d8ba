"""What a run tells while it works. The trainer calls these; the command line draws them; a library user may ignore them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Start:
    """Said once, before the first step of this process."""

    run: str
    device: str
    data: str
    num_samples: int
    num_parameters: int
    steps_per_epoch: int
    epochs: int
    first_step: int


@dataclass(frozen=True)
class Progress:
    """Said every time that metrics came off the device. ``metrics`` are the newest step's."""

    step: int
    epoch: int
    img_s: float
    eta_s: float
    state: str
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class EpochEnd:
    """Said at every epoch's end. ``metrics`` are means over the epoch, ``accuracy`` is in percent or None."""

    epoch: int
    epochs: int
    step: int
    img_s: float
    eta_s: float
    state: str
    accuracy: float | None
    metrics: Mapping[str, float]


class Observer(Protocol):
    """Four calls, each with its whole message."""

    def start(self, message: Start) -> None: ...
    def progress(self, message: Progress) -> None: ...
    def epoch_end(self, message: EpochEnd) -> None: ...
    def note(self, text: str) -> None: ...


class Silent:
    """The observer that says nothing."""

    def start(self, message: Start) -> None:
        """Ignore."""

    def progress(self, message: Progress) -> None:
        """Ignore."""

    def epoch_end(self, message: EpochEnd) -> None:
        """Ignore."""

    def note(self, text: str) -> None:
        """Ignore."""
