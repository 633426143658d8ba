"""The suite of the training step: ours in both precisions against the peers.

Ours includes drawing the views. The peers' views are resident, which favours the peers.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace

from fastbyol_bench import waterfall
from fastbyol_bench.ceilings import floor
from fastbyol_bench.eager_peer import step_flop
from fastbyol_bench.harness import Variant, clock_of
from fastbyol_bench.own_step import METHODS, OwnStep
from fastbyol_bench.peer_process import PeerProcess, Recipe
from fastbyol_bench.peers import Post, Tuned
from fastbyol_bench.results import Row
from fastbyol_bench.suite import Setting, fast_precision, missing

SUITE = "step"
EAGER = "tuned eager PyTorch, bf16, channels-last, foreach"
COMPILED = "torch.compile of the same, bf16"
BLOG = "the post's code path, fp32, a pass per view"
FAST = "ours, fastest"
FP32 = "ours, fp32"
OURS_COMPILED = "ours, torch.compile"
APART = "in a process of its own"


def rows(setting: Setting) -> Iterator[Row]:
    """Measure the steps of both methods, of two networks, and the parts of ours."""
    size, batch = (32, 2) if setting.quick else (96, 256 if setting.on_gpu else 64)
    yield from _bn(setting, size, batch)
    yield from _one_peer(setting, "GN + WS, LARS", "gn_ws", size, batch)
    yield from _one_peer(setting, "ResNet-50, BN, SGD", "bn", size, batch, "resnet50")
    yield from _one_peer(setting, "ResNet-50, GN + WS, LARS", "gn_ws", size, batch, "resnet50")
    setting.note("step: waterfall")
    setting.waterfall = waterfall.measured(setting, size=size, batch=batch)


def _bn(setting: Setting, size: int, batch: int) -> list[Row]:
    name = f"BN, SGD: step of {batch} images of {size} px"
    fast = fast_precision(setting.device)
    sets = {FAST: [f"train.precision={fast}"], FP32: ["train.precision=fp32"]}
    peers: dict[str, Recipe] = {EAGER: Tuned(size, batch), BLOG: Post(size, batch)}
    absent = _no_compiler(setting)
    if not absent:
        sets[OURS_COMPILED] = [f"train.precision={fast}", "engine.mode=compile"]
        peers = {COMPILED: Tuned(size, batch, compiled=True), **peers}
    measured = _measured(setting, name, sets, peers, size, batch)
    return [
        *measured,
        *(missing(SUITE, name, variant, absent) for variant in (OURS_COMPILED, COMPILED) if absent),
    ]


def _one_peer(
    setting: Setting, title: str, method: str, size: int, batch: int, network: str = "resnet18"
) -> list[Row]:
    name = f"{title}: step of {batch} images of {size} px"
    fast = [f"train.precision={fast_precision(setting.device)}", f"model.encoder={network}"]
    tuned = Tuned(size, batch, network=network)
    if method == "gn_ws":
        tuned = replace(tuned, norm="gn", ws=True, optimizer="lars")
    sets = {FAST: [*fast, *METHODS[method]]}
    return _measured(setting, name, sets, {EAGER: tuned}, size, batch, network)


def _measured(
    setting: Setting,
    name: str,
    sets: Mapping[str, list[str]],
    peers: Mapping[str, Recipe],
    size: int,
    batch: int,
    network: str = "resnet18",
) -> list[Row]:
    """Measure our step with each of ``sets``, FAST first, against ``peers``, in turns."""
    calls = setting.calls_per_reading
    ceiling = setting.ceiling()  # before the peers start and use cores
    with ExitStack() as opened:
        # Peers first: they start up while ours is compiled.
        started = {
            key: opened.enter_context(PeerProcess(key, peer, setting.device))
            for key, peer in peers.items()
        }
        ours = {
            key: OwnStep.create(values, size=size, batch=batch, device=setting.device)
            for key, values in sets.items()
        }
        variants = [Variant(key, step, batch) for key, step in ours.items()]
        variants += [
            Variant(key, peer.caller("step", calls), batch) for key, peer in started.items()
        ]
        flop = step_flop(size, network) * batch
        floors = {
            v.name: floor(ceiling, flop=flop, bf16=v.name not in (FP32, BLOG)) for v in variants
        }
        if setting.on_gpu:
            # torch's default for convolutions is TF32, for which no ceiling was measured.
            floors.pop(BLOG, None)
        notes = {key: f"{step.mode}; views drawn in the step" for key, step in ours.items()}
        notes[FAST] += (
            f"; precision {fast_precision(setting.device)}; the floor counts operations alone"
        )
        notes |= dict.fromkeys(peers, APART)
        clock, plan = clock_of(setting.device, calls), setting.plan(8, 60.0, warmup=2)
        return setting.rows(SUITE, name, variants, plan, floors=floors, notes=notes, clock=clock)


def _no_compiler(setting: Setting) -> str | None:
    """Return the reason why torch.compile is not measured, or None."""
    if setting.quick:
        return "a run without --quick: it compiles for half a minute"
    if not setting.on_gpu and not shutil.which("g++"):
        return "g++"
    return None
