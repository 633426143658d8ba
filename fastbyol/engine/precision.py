"""The choice of precision ``auto``: bf16 if the device multiplies it natively and gradients agree.

The gate takes one step of a narrow copy of the network in bf16 and in fp64, from a healthy and from
a collapsed state, and compares each layer's gradient. LARS divides by |g|, so its length matters.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import fastbyol_kernels
from fastbyol.config import Config, Resolved, resolve
from fastbyol.engine.device import pick_device
from fastbyol.engine.step import TrainState, train_step
from fastbyol.errors import check_choice
from fastbyol.files import cache_folder
from fastbyol.model.heads import Head
from fastbyol.runs.durable import new_digest, write_text
from fastbyol.runs.environment import cpu_name, package_version

# The narrow copy and its batch. A 64 px view leaves 2x2 pixels in the last stage.
WIDTH, HIDDEN, OUT, BATCH, SIZE = 16, 64, 32, 16, 64
# Below this share of the largest gradient even fp64 has only rounding; a collapsed network's early
# layers have 1e-8.
ZERO = 1e-12
CPU_UNITS = ("amx_bf16", "avx512_bf16")


class Choice(NamedTuple):
    """A precision (fp32 or bf16) and the reason for it, in words."""

    value: str
    why: str


class Gap(NamedTuple):
    """The largest | |g| / |exact| - 1 | and |g - exact| / |exact| of weight matrices and kernels.

    Vectors, of a few numbers each, scatter twice as far and do not count.
    """

    length: float
    error: float


# Rounding turns a gradient more than it stretches it: noise of e times its length, across it, makes
# it longer by e^2 / 2, and at e = 1 half of it is noise. At width 16 and 16 images, over the norms
# of encoder and heads and both states, lengths were off by .02 to .10 and differences .16 to .75,
# but with group norm in the heads over standardized weights .31 and 1.6.
MOST = Gap(length=0.2, error=0.9)
STATES = ("healthy", "collapsed")


def choose_precision(config: Resolved, note: Callable[[str], None] = lambda _: None) -> Resolved:
    """Replace ``train.precision`` auto in ``config`` by this device's choice, and ``note`` it.

    Call it when a run is made: the run's configuration then names a precision that a resume keeps.
    """
    if config.train.precision != "auto":
        return config
    chosen = decide(config, pick_device(config.train.device))
    note(f"precision auto is {chosen.value}: {chosen.why}")
    return config.model_copy(
        update={"train": config.train.model_copy(update={"precision": chosen.value})}
    )


def decide(config: Config, device: torch.device) -> Choice:
    """Choose bf16 or fp32 for the network of ``config`` on ``device``.

    The answer is kept in the user's cache folder: on a GPU the gate compiles for 10 to 20 s.
    """
    unit = native_unit(device)
    if unit is None:
        return Choice(
            "fp32", f"{device.type} has no unit for bf16 products ({', '.join(CPU_UNITS)})"
        )
    asked = question(config, device)
    answer = kept_answer(asked)
    if answer is None:
        answer = _measured(config, device, unit)
        _keep(asked, answer)
    return answer


def question(config: Config, device: torch.device) -> dict[str, str]:
    """Return everything that the gate's answer depends on: part -> text."""
    library = None if config.model.foreign is None else config.model.foreign[0]
    properties = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return {
        "device": properties.name if properties else cpu_name(),
        "capability": f"{properties.major}.{properties.minor}"
        if properties
        else str(native_unit(device)),
        "torch": torch.__version__,
        "triton": str(package_version("triton")),
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),  # type: ignore[no-untyped-call]
        "fastbyol": f"{package_version('fastbyol')} {_sources()}",
        "network": _narrow(config, "bf16").model_dump_json(),
        **({} if library is None else {library: str(package_version(library))}),
    }


def kept_answer(asked: Mapping[str, str]) -> Choice | None:
    """Return the stored answer to the same question, or None if there is none or it is damaged."""
    try:
        kept = json.loads(_answer_file(asked).read_text("utf-8"))
        value, why = kept["value"], kept["why"]
    except (
        OSError,
        RuntimeError,
        ValueError,
        LookupError,
        TypeError,
    ):  # RuntimeError: no home folder
        return None
    sound = kept.get("asked") == asked and value in ("bf16", "fp32") and isinstance(why, str)
    return Choice(value, why) if sound else None


def _keep(asked: Mapping[str, str], answer: Choice) -> None:
    """Store ``answer`` for ``kept_answer``; if that fails, the gate runs again."""
    with suppress(OSError, RuntimeError):
        path = _answer_file(asked)
        path.parent.mkdir(parents=True, exist_ok=True)
        own = path.with_suffix(f".{os.getpid()}")  # of two processes the last rename wins
        write_text(own, json.dumps({**answer._asdict(), "asked": asked}, indent=2) + "\n")
        own.replace(path)


def _answer_file(asked: Mapping[str, str]) -> Path:
    digest = new_digest()
    digest.update(json.dumps(asked, sort_keys=True).encode())
    return cache_folder() / "precision" / f"{digest.hexdigest()}.json"


def _sources() -> str:
    """Return a digest of the packages' code: a changed kernel makes a stored answer invalid."""
    digest = new_digest()
    for package in (Path(__file__).parents[1], Path(str(fastbyol_kernels.__file__)).parent):
        for path in sorted(package.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _measured(config: Config, device: torch.device, unit: str) -> Choice:
    for state in STATES:
        gap = gradient_gap(config, device, state)
        if not (gap.length <= MOST.length and gap.error <= MOST.error):
            return Choice(
                "fp32",
                f"{unit}, but in a {state} state bf16 gradients are off: length {gap.length:.2g} "
                f"(at most {MOST.length:g}), "
                f"difference {gap.error:.2g} (at most {MOST.error:g})",
            )
    return Choice(
        "bf16", f"{unit}, and gradients agree with fp64 in a healthy and a collapsed state"
    )


def native_unit(device: torch.device) -> str | None:
    """Return the name of the unit that multiplies bf16 on ``device``, or None if it is emulated."""
    if device.type == "cuda":
        return "CUDA bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else None
    has = torch.cpu.get_capabilities()
    return next((unit for unit in CPU_UNITS if has.get(unit)), None)


def gradient_gap(config: Config, device: torch.device, state: str) -> Gap:
    """Measure the gap of one step's bf16 gradients from fp64's in ``state``, one of ``STATES``."""
    check_choice("state", state, STATES)
    exact, rounded = (
        _gradients(config, device, precision, state == "collapsed")
        for precision in ("fp64", "bf16")
    )
    floor = ZERO * max(float(g.norm()) for g in exact.values())
    measured = {name: g for name, g in exact.items() if g.ndim > 1 and float(g.norm()) > floor}
    return Gap(
        max(abs(float(rounded[name].norm() / g.norm()) - 1) for name, g in measured.items()),
        max(float((rounded[name] - g).norm() / g.norm()) for name, g in measured.items()),
    )


def _gradients(
    config: Config, device: torch.device, precision: str, collapsed: bool
) -> dict[str, Tensor]:
    """Return the gradients of one step from the seed's weights, by name, fp64 on the cpu."""
    state = TrainState.create(_narrow(config, precision), steps_per_epoch=1, device=device)
    if collapsed:
        _collapse(state)
    size = SIZE if config.model.foreign is None else config.views.size
    train_step(state, _views(size).to(device))
    return {name: g.double().cpu() for name, g in state.arena.named(state.arena.gradient).items()}


def _narrow(config: Config, precision: str) -> Resolved:
    """Return the configuration of a narrow network with the same kinds of layers.

    A library's network has one width, and may work at the size of the run's views alone.
    """
    model = config.model
    own = model.foreign is None
    heads = {
        name: head.model_copy(update={"hidden": HIDDEN, "out": OUT})
        for name, head in (("projector", model.projector), ("predictor", model.predictor))
    }
    narrow = Config.model_validate(
        {
            "model": model.model_copy(
                update={**({"width": WIDTH} if own else {}), **heads}
            ).model_dump(),
            "views": {} if own else {"size": config.views.size, "blur_kernel": 1},
            "method": config.method.model_copy(
                update={"queue": min(config.method.queue, 1) * BATCH}
            ).model_dump(),
            "train": {"precision": precision},
            # Triton's have no fp64.
            "engine": {}
            if precision == "fp64"
            else {"kernels": config.engine.kernels, "heads": config.engine.heads},
        }
    )
    return resolve(narrow)


@torch.no_grad()
def _collapse(state: TrainState) -> None:
    """Move all projections and predictions to within 1e-3 of one direction."""
    direction = torch.randn(OUT, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for head in (state.online.projector, state.online.predictor, state.target.projector):
        if isinstance(head, Head):  # there may be no predictor
            head.linear2.weight *= 1e-3
            head.linear2.bias.copy_(direction)


def _views(size: int) -> Tensor:
    """Draw two noisy copies of random images (2, BATCH, 3, size, size), fp64."""
    g = torch.Generator().manual_seed(0)
    images = torch.randn(1, BATCH, 3, size, size, generator=g, dtype=torch.float64)
    return images + 0.5 * torch.randn(2, BATCH, 3, size, size, generator=g, dtype=torch.float64)
