"""Several ranks train the run that one would have trained, and the same number of them the same
bits in threads or processes.
"""

from __future__ import annotations

import itertools
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import run_rig
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastbyol import api, views
from fastbyol.data import loader
from fastbyol.engine import capture
from fastbyol.engine import ranks as ranking
from fastbyol.engine.digest import differing
from fastbyol.engine.exchange import Exchange
from fastbyol.engine.ranks import Alone, Ranks, agree, current, from_first, shares, tree
from fastbyol.engine.step import TrainState, forward, share_of
from fastbyol.errors import FastbyolError, LostRankError, UsageError
from fastbyol.model.byol import OnlineOutput
from fastbyol.model.norm import BatchNorm, BatchRenorm, share_statistics
from fastbyol.model.objective import Objective, merge, moments, observe
from tiny import beton_files, tiny_config
from together import (
    BATCH,
    end_well,
    images,
    in_order,
    in_threads,
    small,
    start,
    tensors,
    train,
)

NORMS = ("bn", "gn", "ln", "brn", "none")
LOSSES = (
    ("method.name=contrastive", "method.queue=0"),
    ("method.name=contrastive", "method.queue=48"),
    ("method.name=simsiam",),
)


def network(norm: str, opt: str, *, ws: bool) -> tuple[str, ...]:
    """The settings of a network; batch renorm is for heads only."""
    encoder = "bn" if norm == "brn" else norm
    heads = (f"model.projector.norm={norm}", f"model.predictor.norm={norm}")
    return (f"model.norm={encoder}", *heads, f"optim.name={opt}", f"model.ws={str(ws).lower()}")


CASES = [
    *(network(*case, ws=ws) for case in itertools.product(NORMS, ("sgd", "lars")) for ws in (0, 1)),
    *((*network("bn", "sgd", ws=False), *loss) for loss in LOSSES),
    *((*network(norm, "lars", ws=True), "model.encoder=resnet50") for norm in ("bn", "gn")),
]


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference, relative to a tensor's largest value."""
    return max(
        float((one[name].double() - tensor.double()).abs().max() / tensor.double().abs().max())
        for name, tensor in other.items()
        if tensor.is_floating_point() and tensor.abs().max() > 0
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case).replace("model.", ""))
def test_a_step_of_several_ranks_is_that_of_one(case: tuple[str, ...]) -> None:
    """In fp64, with shares of 6, of 4, and of 2 and 3 images.

    Momentum is compared where a gradient is more than rounding: a bias in front of a batch norm has
    none, and LARS divides it by its length.
    """
    config = small(*case)
    state, metrics = train(config, Alone())
    alone, names = tensors(state), state.segment_names
    gradients = state.arena.named(state.arena.gradient)
    most = max(float(gradients[name].norm()) for name in names)
    noise = [name for name in names if gradients[name].norm() < 1e-12 * most]
    for name in noise:
        state.arena.named(alone["arena.momentum"])[name].zero_()
    for count in (2, 3, 5):
        results = in_threads(count, lambda ranks: train(config, ranks))
        first, own = results[0]
        own_tensors = tensors(first)
        assert all(
            torch.equal(tensor, own_tensors[name])
            for other, _ in results
            for name, tensor in other.tensors().items()
        )
        for name in noise:
            first.arena.named(own_tensors["arena.momentum"])[name].zero_()
        assert distance(own_tensors, alone) < 1e-10, count
        torch.testing.assert_close(own[0].values, metrics[0].values, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(own[0].layers, metrics[0].layers, rtol=1e-5, atol=1e-7)


def three_steps(ranks: Ranks) -> dict[str, Tensor]:
    """Three fp32 steps of a network with batch norm, by the kernels that training takes."""
    return tensors(train(small("train.precision=fp32"), ranks, steps=3)[0])


def _keep(folder: Path) -> None:
    torch.set_num_threads(1)
    with ranking.joined() as processes, current(processes):
        torch.save(three_steps(processes), folder / f"{processes.rank}.pt")
        big = torch.arange(10.0) * (processes.rank + 1)
        processes.sum_(big)
        assert big.tolist() == (torch.arange(10.0) * 3).tolist()
        assert agree(processes, 7 * processes.rank) == 7
        assert from_first(processes, {"of": processes.rank}) == {"of": 0}
        first = torch.full((2, 3), float(processes.rank)).T
        processes.copy_first_(first)
        assert not first.any()

        def fill(into: Tensor) -> None:
            # Without a name: nothing stays of it, whoever is killed.
            assert "/dev/shm/" in (maps := Path("/proc/self/maps").read_text())
            assert all("(deleted)" in line for line in maps.splitlines() if "/dev/shm/" in line)
            into.fill_(9)

        shared = processes.share((4, 5), fill, torch.device("cpu"))
        assert shared.shape == (4, 5)
        assert (shared == 9).all()


def test_processes_have_the_bits_of_threads(tmp_path: Path) -> None:
    """Two processes over gloo and two threads, after three fp32 steps; and gloo's messages."""
    started = start(2, _keep, tmp_path)
    torch.set_num_threads(1)
    expected = in_threads(2, three_steps)
    end_well(started)
    for rank in range(2):
        own = torch.load(tmp_path / f"{rank}.pt")
        assert own.keys() == expected[rank].keys()
        assert all(torch.equal(own[name], tensor) for name, tensor in expected[rank].items())


@given(parts=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=9))
def test_a_tree_of_parts_is_that_of_its_branches(parts: list[float]) -> None:
    """Which is why a process may sum its own ranks first, if they are a power of two."""
    whole = [torch.tensor([part]) for part in parts]
    assert abs(float(tree(whole)) - sum(parts)) <= 1e-6 * sum(map(abs, parts)) + 1e-30
    for size in (1, 2, 4, 8):
        branches = [tree(whole[start : start + size]) for start in range(0, len(whole), size)]
        assert torch.equal(tree(branches), tree(whole))


@given(total=st.integers(1, 500), count=st.integers(1, 40))
def test_shares_are_the_whole_and_differ_by_one_at_most(total: int, count: int) -> None:
    counts = shares(total, count)
    assert len(counts) == count
    assert sum(counts) == total
    assert max(counts) - min(counts) <= 1


@settings(max_examples=25)
@given(
    counts=st.lists(st.integers(1, 6), min_size=1, max_size=5).filter(
        lambda counts: sum(counts) > 1
    ),
    spread=st.sampled_from((1.0, 1e-6)),
    seed=st.integers(0, 99),
)
def test_merged_moments_are_the_measures_of_the_whole(
    counts: list[int], spread: float, seed: int
) -> None:
    """Also where all rows are nearly the same, as after a collapse."""
    generator, total = torch.Generator().manual_seed(seed), sum(counts)

    def rows(dim: int) -> Tensor:
        noise = torch.randn(2 * total, dim, generator=generator, dtype=torch.float64)
        return torch.ones(dim, dtype=torch.float64) + spread * noise

    y, z, projections = rows(6).relu(), rows(4), rows(4)
    y[:, 2] = 0
    whole = torch.stack(observe(OnlineOutput(y, z, z), projections))
    parts, start = [], 0
    for count in counts:
        own = [*range(start, start + count), *range(total + start, total + start + count)]
        parts.append(moments(OnlineOutput(y[own], z[own], z[own]), projections[own]))
        start += count
    merged = merge(torch.stack(parts), torch.tensor(counts), dim_z=4)
    torch.testing.assert_close(merged, whole, rtol=1e-7, atol=1e-12)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return beton_files(tmp_path_factory.mktemp("files"))


@pytest.mark.parametrize("cache", ["device", "none"])
def test_the_ranks_batches_joined_are_the_single_loaders(
    files: tuple[Path, Path], cache: Any
) -> None:
    """Ids, images and views, for one to seven ranks and from the middle of an epoch on."""
    config = tiny_config(files)

    def batches(ranks: Ranks) -> list[tuple[Tensor, Tensor, Tensor]]:
        share = share_of(8, ranks)
        with loader.open_loader(
            files[0], batch_size=8, seed=3, device="cpu", cache=cache, workers=1, size=16,
            columns=slice(share.first, share.first + share.count),
            shared=ranks.share if ranks.count > 1 else None,
        ) as opened:  # fmt: skip
            return [
                (
                    batch.ids,
                    batch.images if batch.rows is None else batch.images[batch.rows],
                    views.two_views(
                        config.views, batch.images, batch.ids, rows=batch.rows, seed=3, epoch=2
                    ),
                )
                for batch in opened.epoch(2, start_step=4)
            ]

    whole = batches(Alone())
    assert len(whole) == 2
    for count in range(1, 8):
        joined = zip(*in_order(count, batches), strict=True)
        for steps, (ids, pixels, pair) in zip(joined, whole, strict=True):
            assert torch.equal(torch.cat([step[0] for step in steps]), ids)
            assert torch.equal(torch.cat([step[1] for step in steps]), pixels)
            assert torch.equal(torch.cat([step[2] for step in steps], dim=1), pair)


def test_a_norm_of_a_ranks_own_share_keeps_the_mean_of_the_statistics() -> None:
    config = small("model.norm_scope=rank")
    halves = in_threads(2, lambda ranks: train(config, ranks))
    # Alone, on a half of the batch, the first norm has that half's statistics.
    own = [TrainState.create(config, steps_per_epoch=4) for _ in range(2)]
    for half, state in enumerate(own):
        ids = torch.arange(6) + 6 * half
        pair = views.two_views(
            config.views, images()[ids], ids, seed=0, epoch=0, dtype=torch.float64
        )
        state.online(pair.flatten(0, 1))
    name = "encoder.bn1.running_mean"
    expected = sum(dict(state.online.named_buffers())[name] for state in own) / 2
    for state, _ in halves:
        torch.testing.assert_close(dict(state.online.named_buffers())[name], expected)


def test_a_flipped_bit_is_named() -> None:
    """In weights, momentum, the target and a norm's buffer; the ranks agree on what they say."""

    def broken(ranks: Ranks, where: str, name: str) -> str | None:
        state, _ = train(small(), ranks)
        assert differing(state) is None
        if ranks.rank == 1:
            tensor = state.tensors()[where]
            part = state.arena.named(tensor)[name] if where.startswith("arena") else tensor
            bits = part.view(torch.int64)
            bits[(0,) * bits.ndim] ^= 1
        return differing(state)

    for where, name in (
        ("arena.online", "encoder.layer1.0.conv1.weight"),
        ("arena.momentum", "projector.linear1.weight"),
        ("arena.target", "encoder.bn1.bias"),
        ("target.encoder.bn1.running_var", ""),
    ):
        said = in_threads(2, lambda ranks, w=where, n=name: broken(ranks, w, n))
        assert said[0] == said[1]
        assert f"{where.removeprefix('arena.')} {name}".strip() in str(said[0])
    three = in_threads(3, lambda ranks: broken(ranks, "arena.online", "encoder.bn1.weight"))
    assert set(three) == {"rank 1's online encoder.bn1.weight is not most ranks'"}


def test_a_run_whose_ranks_differ_stops_unsaved(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second rank's weights go astray after its ninth step."""
    step = capture.Eager.__call__

    def faulty(self: capture.Eager, batch: Any, epoch: int) -> Any:
        metrics = step(self, batch, epoch)
        if self.state.ranks.rank == 1 and int(self.state.step) == 9:
            self.state.arena.online[5] += 1e-3
        return metrics

    monkeypatch.setattr(capture.Eager, "__call__", faulty)
    with pytest.raises(FastbyolError, match="step 12: one rank's online encoder") as raised:
        api.train(tiny_config(files, "train.ranks=2"), tmp_path / "run")
    assert "resume" in str(raised.value)
    assert [path.name for path in run_rig.checkpoints(tmp_path / "run")] == [
        "ckpt-000000006.safetensors"
    ]
    monkeypatch.undo()
    assert api.resume(tmp_path / "run").finished


def test_one_rank_that_fails_ends_the_others(files: tuple[Path, Path], tmp_path: Path) -> None:
    """Its error is raised, and no thread is left."""

    def fail(ranks: Ranks) -> int:
        if ranks.rank == 2:
            raise ValueError("no")
        return agree(ranks, 1)

    with pytest.raises((ValueError, LostRankError)):
        in_threads(3, fail)
    none = ("model.norm=none", "model.projector.norm=none", "model.predictor.norm=none")
    config = tiny_config(
        files, *none, "train.ranks=2", "train.max_skipped_steps=0", "optim.sgd_lr=1000",
        "train.loss_scale=1e6",
    )  # fmt: skip
    before = threading.active_count()
    with pytest.raises(FastbyolError, match="not finite") as raised:
        api.train(config, tmp_path / "run")
    assert not isinstance(raised.value, LostRankError)
    assert threading.active_count() == before


class Small(torch.nn.Module):
    """A network that is compiled in seconds, with both norms that send messages."""

    def __init__(self, ranks: Ranks) -> None:
        super().__init__()
        self.conv, self.bn = torch.nn.Conv2d(3, 4, 3), BatchNorm(4, 2)
        self.linear, self.brn = torch.nn.Linear(4, 8), BatchRenorm(8, 2)
        share_statistics(self, ranking.gather_of(ranks.count))

    def forward(self, x: Tensor) -> OnlineOutput:
        y = self.bn(self.conv(x)).relu().mean((2, 3))
        z = self.brn(self.linear(y))
        return OnlineOutput(y, z, z)


class SmallTarget(Small):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x).z


class Doubles(Alone):
    """The first of two ranks that have the same: threads cannot compile."""

    count = 2

    def gather(self, x: Tensor) -> Tensor:
        return torch.stack([x.detach()] * self.count)


@pytest.mark.skipif(not capture.compiles_messages(), reason="torch 2.11 drops their gradient")
@pytest.mark.parametrize("name", ["byol", "contrastive"])
def test_a_compiled_step_of_ranks_is_one_graph(name: Any) -> None:
    """Messages are nodes of it, forward and backward; the gradients are those of the eager step."""
    compiled = torch.compile(forward, fullgraph=True, dynamic=False, backend="aot_eager")
    ranks = Doubles()
    share = share_of(BATCH, ranks)
    objective = Objective(name, share.count / share.total, 0.2, share)

    def gradients(work: Any) -> list[Tensor]:
        torch.manual_seed(0)
        nets = Small(ranks).double(), SmallTarget(ranks).double()
        own = torch.randn(2 * share.count, 3, 6, 6, dtype=torch.float64)
        with current(ranks):
            loss, measured, _ = work(*nets, own, objective)
            loss.backward()
        return [loss.detach(), measured, *(p.grad for p in nets[0].parameters())]

    torch.testing.assert_close(gradients(compiled), gradients(forward), rtol=1e-10, atol=1e-12)


def test_a_lost_rank_is_told_without_torchs_sources() -> None:
    words = "[/pytorch/third_party/gloo/tcp/pair.cc:542] Connection closed by peer [::1]:33345"
    with pytest.raises(LostRankError) as raised, ranking._reaching():
        raise RuntimeError(words)
    peer = "Connection closed by peer [::1]:33345"
    assert str(raised.value) == f"another rank is gone ({peer}): see what it said"


def test_the_message_operator_is_sound() -> None:
    x = torch.arange(6.0).view(2, 3)
    torch.library.opcheck(torch.ops.fastbyol.gather.default, (x, 1))
    with pytest.raises(RuntimeError, match="outside of them"):
        ranking.gather_of(3)(x)


def test_a_gpus_flag_is_read_late_and_by_all_alike() -> None:
    """On a cpu at once: what ranks wish in a step, to stop or to save, all know after the next."""

    def asked(ranks: Ranks) -> list[tuple[bool, bool]]:
        state, answers = TrainState.create(small(), steps_per_epoch=4, ranks=ranks), []
        exchange = state.exchange
        assert isinstance(exchange, Exchange)
        zero = torch.zeros((), dtype=torch.float64)
        for step in range(6):
            exchange.sum_(zero, torch.zeros(exchange.layout.moments), None, None)
            stops, saves = ranks.rank >= 1 and step in (1, 3), ranks.rank == 0 and step in (2, 3)
            answers.append(exchange.wishes(stops, saves))
        return answers

    neither, both = (False, False), (True, True)
    answers = [neither, neither, (True, False), (False, True), both, neither]
    assert in_threads(3, asked) == [answers] * 3


def test_counts_that_cannot_be_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = small("train.ranks=4")
    assert ranking.count_ranks(config, 2) == 4
    assert ranking.count_ranks(small(), 3) == 3
    assert ranking.count_ranks(config, 3, ranks=3) == 3
    with pytest.raises(UsageError, match="4 ranks cannot be spread evenly over 3 processes"):
        ranking.count_ranks(config, 3)
    with pytest.raises(UsageError, match="13 ranks need 13 images a batch or more"):
        ranking.count_ranks(small(), 13)
    with pytest.raises(UsageError, match="7 ranks need 14 images"):
        ranking.count_ranks(small("model.norm_scope=rank"), 7)
    cpu, modes = torch.device("cpu"), config.engine
    five = Doubles()
    five.count = 5
    compiled = modes.model_copy(update={"mode": "compile"})
    with pytest.raises(UsageError, match="5 ranks do not divide 12 images"):
        capture.choose(compiled, cpu, ranks=five, batch_size=BATCH)
    assert capture.choose(modes, cpu, ranks=five, batch_size=BATCH).mode == "eager"
    gpu = torch.device("cuda")
    monkeypatch.setattr(capture, "compiles_messages", lambda: True)
    assert capture.choose(modes, gpu, ranks=five, batch_size=10).mode == "graph"
    monkeypatch.setattr(capture, "compiles_messages", lambda: False)
    assert capture.choose(modes, gpu, ranks=five, batch_size=10).mode == "eager"
    with pytest.raises(UsageError, match=r"needs torch 2\.15"):
        capture.choose(compiled, cpu, ranks=five, batch_size=10)
    threads = in_threads(2, lambda ranks: ranks)[0]
    for mode in ("compile", "graph"):
        asked = modes.model_copy(update={"mode": mode})
        with pytest.raises(UsageError, match=f"{mode} needs a process for each rank"):
            capture.choose(asked, gpu, ranks=threads, batch_size=BATCH)
    assert capture.choose(modes, gpu, ranks=threads, batch_size=BATCH).mode == "eager"


def test_a_pinned_number_of_ranks_is_kept(files: tuple[Path, Path], tmp_path: Path) -> None:
    """And another one is taken when it is asked for."""
    run = tmp_path / "run"
    api.train(tiny_config(files, "train.ranks=2", "train.epochs=1"), run)
    assert "ranks = 2" in (run / "config.toml").read_text()
    assert json.loads((run / "env.json").read_text())["ranks"] == "2"
    with pytest.raises(UsageError, match="9 ranks need 9 images"):
        api.resume(run, ranks=9)
    assert api.resume(run, ranks=3).finished
