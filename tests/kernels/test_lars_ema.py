"""The optimizer against torch.optim.SGD, each dialect in Python floats, and itself in fp64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastbyol_kernels.lars_ema import (
    LAYER_METRICS,
    RULES,
    Reversible,
    Rule,
    SegmentTable,
    bytes_moved,
    lars_ema,
    scheduled_step,
)
from fastbyol_kernels.lars_ema import triton as on_gpu

DIALECTS = RULES[1:]
NUMELS = (5, 1, 12, 7)
NUM_TARGET = 3
PAD = 32


def table(
    adapt: Sequence[bool],
    decay: Sequence[float],
    lr_mult: Sequence[float],
    dtype: torch.dtype = torch.float64,
) -> SegmentTable:
    return SegmentTable(
        offsets=tuple(PAD * i for i in range(len(adapt))),
        numels=NUMELS[: len(adapt)],
        adapt=torch.tensor(list(adapt)),
        decay=torch.tensor(list(decay), dtype=dtype),
        lr_mult=torch.tensor(list(lr_mult), dtype=dtype),
    )


def flat(parts: Sequence[Tensor]) -> Tensor:
    out = torch.zeros(PAD * len(parts), dtype=torch.float64)
    for i, part in enumerate(parts):
        out[PAD * i : PAD * i + len(part)] = part
    return out


def draws(seed: int, scale: float = 1.0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(n, generator=g, dtype=torch.float64) for n in NUMELS]


def scalar(x: float) -> Tensor:
    return torch.tensor(x, dtype=torch.float64)


def by_hand(
    rule: Rule,
    w: Tensor,
    g: Tensor,
    m: Tensor,
    wd: float,
    k: float,
    adapt: bool,
    lr: float,
    eta: float,
    mu: float,
) -> tuple[Tensor, Tensor, float]:
    """Return the new w, the new m and the rate of one tensor in one dialect."""
    wn, gn = math.sqrt((w * w).sum().item()), math.sqrt((g * g).sum().item())
    u = g + wd * w
    if rule == "sgd" or not adapt:
        trust = 1.0
    elif rule == "blog":
        trust = eta * wn / (gn + wd * wn) if gn + wd * wn > 0 else 0.0
    elif rule == "deepmind":
        un = math.sqrt((u * u).sum().item())
        trust = eta * wn / un if wn > 0 and un > 0 else 1.0
    elif wn > 0 and gn > 0:
        trust = eta * wn / (gn + wd * wn + 1e-8)
    else:
        trust, u = 1.0, g
    if rule == "blog":
        m = mu * m + lr * k * trust * u
        return w - m, m, lr * k * trust
    m = mu * m + trust * u
    return w - lr * k * m, m, lr * k * trust


@settings(max_examples=60)
@given(
    rule=st.sampled_from(RULES),
    adapt=st.lists(st.booleans(), min_size=4, max_size=4),
    decay=st.lists(st.sampled_from([0.0, 1e-4, 0.1]), min_size=4, max_size=4),
    mult=st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=4, max_size=4),
    ema_first=st.booleans(),
    tau=st.sampled_from([0.0, 0.5, 0.996, 1.0]),
    scale=st.sampled_from([1e-9, 1e-3, 1.0]),
    zero_w=st.integers(0, 4),
    zero_g=st.integers(0, 4),
)
def test_equals_each_tensor_by_hand(
    rule: Rule,
    adapt: list[bool],
    decay: list[float],
    mult: list[float],
    ema_first: bool,
    tau: float,
    scale: float,
    zero_w: int,
    zero_g: int,
) -> None:
    w, m = draws(0), draws(1, 0.1)
    if zero_w < 4:
        w[zero_w].zero_()
    online, momentum = flat(w), flat(m)
    target = flat(draws(2))[: PAD * NUM_TARGET]
    averages = [target[PAD * i : PAD * i + NUMELS[i]].clone() for i in range(NUM_TARGET)]
    for step in range(3):
        g = draws(10 + step, scale)
        if zero_g < 4:
            g[zero_g].zero_()
        kwargs = {"rule": rule, "eta": 1e-2, "mu": 0.9, "ema_first": ema_first}
        layers = lars_ema(
            online,
            flat(g),
            momentum,
            target,
            table(adapt, decay, mult),
            scalar(0.2),
            scalar(tau),
            **kwargs,
        )
        for i in range(4):
            new_w, m[i], rate = by_hand(
                rule, w[i], g[i], m[i], decay[i], mult[i], adapt[i], 0.2, 1e-2, 0.9
            )
            if i < NUM_TARGET:
                averages[i] = tau * averages[i] + (1 - tau) * (w[i] if ema_first else new_w)
            row = dict(zip(LAYER_METRICS, layers[i].tolist(), strict=True))
            assert row["weight_norm"] == pytest.approx(w[i].norm().item(), rel=1e-12, abs=1e-15)
            assert row["grad_norm"] == pytest.approx(g[i].norm().item(), rel=1e-12, abs=1e-15)
            assert row["rate"] == pytest.approx(rate, rel=1e-12, abs=1e-15)
            assert row["rate"] == pytest.approx(
                0.2 * mult[i] * row["trust_ratio"], rel=1e-12, abs=1e-15
            )
            assert row["update_norm"] == pytest.approx(
                (new_w - w[i]).norm().item(), rel=1e-6, abs=1e-12
            )
            w[i] = new_w
    for got, expected in ((online, flat(w)), (momentum, flat(m)), (target, flat(averages))):
        # Zeros between the segments included.
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("rule", RULES)
def test_without_adaptation_every_rule_is_torchs_sgd(rule: Rule) -> None:
    """Use a constant lr, since the blog's momentum buffer contains rates as well as gradients."""
    w = [p.requires_grad_() for p in draws(0)]
    groups = [
        {"params": [p], "weight_decay": wd} for p, wd in zip(w, (0.1, 0.0, 1e-3, 0.0), strict=True)
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    online, momentum = flat([p.detach() for p in w]), torch.zeros(PAD * 4, dtype=torch.float64)
    target = online[:PAD].clone()
    segments = table([False] * 4, (0.1, 0.0, 1e-3, 0.0), [1.0] * 4)
    for step in range(5):
        g = draws(10 + step)
        for p, grad in zip(w, g, strict=True):
            p.grad = grad
        optimizer.step()
        lars_ema(
            online,
            flat(g),
            momentum,
            target,
            segments,
            scalar(0.1),
            scalar(1.0),
            rule=rule,
            eta=1.0,
            mu=0.9,
            ema_first=True,
        )
    torch.testing.assert_close(online, flat([p.detach() for p in w]), rtol=1e-13, atol=1e-14)


def test_a_blog_rate_never_exceeds_lr_eta_over_wd() -> None:
    """Check the bound that reveals the weight decay behind the post's plotted rates."""
    segments = table([True] * 4, [1.5e-6] * 4, [1.0] * 4)
    for scale in (1.0, 1e-6, 1e-12, 1e-40, 0.0):
        online = flat(draws(0))
        layers = lars_ema(
            online, flat(draws(1, scale)), torch.zeros_like(online), online[:PAD].clone(),
            segments, scalar(0.1), scalar(0.9),
            rule="blog", eta=1e-3, mu=0.9, ema_first=True,
        )  # fmt: skip
        assert layers[:, 3].max() <= 0.1 * 1e-3 / 1.5e-6 * (1 + 1e-12)
    torch.testing.assert_close(
        layers[:, 3], torch.full((4,), 0.1 * 1e-3 / 1.5e-6, dtype=torch.float64)
    )


@pytest.mark.parametrize("rule", DIALECTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_to_divide_by_stays_finite(rule: Rule, dtype: torch.dtype) -> None:
    """Use zero weights, zero gradients and no decay, separately and together."""
    segments = table([True] * 4, [0.0] * 4, [1.0] * 4, dtype)
    w, g = draws(0), draws(1)
    w[0].zero_()
    g[1].zero_()
    w[2].zero_()
    g[2].zero_()
    online = flat(w).to(dtype)
    momentum, target = torch.zeros_like(online), online[:PAD].clone()
    layers = lars_ema(
        online, flat(g).to(dtype), momentum, target, segments, scalar(0.1).to(dtype),
        scalar(0.9).to(dtype),
        rule=rule, eta=1e-3, mu=0.9, ema_first=False,
    )  # fmt: skip
    assert all(t.isfinite().all() for t in (online, momentum, target, layers))
    assert torch.equal(online[PAD : 2 * PAD], flat(w).to(dtype)[PAD : 2 * PAD])


def test_tau_of_one_and_zero_are_exact() -> None:
    for tau in (0.0, 1.0):
        online = flat(draws(0)).float()
        target = flat(draws(2)).float()[:PAD]
        before = target.clone()
        zeros = torch.zeros_like(online)
        segments = table([False] * 4, [0.0] * 4, [1.0] * 4, torch.float32)
        lars_ema(
            online, zeros, zeros.clone(), target, segments, torch.tensor(0.1), torch.tensor(tau),
            rule="sgd", eta=1.0, mu=0.9, ema_first=True,
        )  # fmt: skip
        assert torch.equal(target, before if tau == 1.0 else online[:PAD])


# The Triton kernels, on fp32 buffers. Chunks of 64 elements, so that short segments have several,
# and sums in several passes.

CHUNK = 64
ODD = (5, 1, 200, 64, 129, 63, 300)
# One rounding of fp32. Each sum of squares is a tree over a chunk and then over the chunks, below
# 40 additions deep, and the root halves its relative error: 20 roundings, a few more for the ratio,
# and room for another order of additions on a GPU.
ROUNDING = 2.0**-24
NORM_RTOL = 64 * ROUNDING


@dataclass
class Problem:
    """The arguments of one call in one precision."""

    buffers: list[Tensor]  # online, gradient, momentum, target
    table: SegmentTable
    lr: Tensor
    tau: Tensor

    def to(self, dtype: torch.dtype) -> Problem:
        t = self.table
        table = SegmentTable(
            t.offsets, t.numels, t.adapt, t.decay.to(dtype), t.lr_mult.to(dtype), t.chunk
        )
        return Problem(
            [b.to(dtype, copy=True) for b in self.buffers],
            table,
            self.lr.to(dtype),
            self.tau.to(dtype),
        )

    def step(self, rule: Rule, *, ema_first: bool = False, **kwargs: Any) -> Tensor:
        return lars_ema(
            *self.buffers,
            self.table,
            self.lr,
            self.tau,
            rule=rule,
            eta=1e-2,
            mu=0.9,
            ema_first=ema_first,
            **kwargs,
        )

    def scheduled_step(
        self,
        reversible: Reversible | None = None,
        *,
        rates: Tensor | None = None,
        step: int = 0,
        ema_first: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Return the measures and the step as counted up, of ``rates`` or those of the problem."""
        rates = torch.stack((self.lr, self.tau)).view(1, 2) if rates is None else rates
        number = torch.tensor(step, device=rates.device)
        loss = torch.tensor(2.5, device=rates.device)
        measures = scheduled_step(
            *self.buffers, self.table, rates, number, loss, torch.arange(5.0, device=rates.device),
            reversible, rule="blog", eta=1e-2, mu=0.9, ema_first=ema_first, **kwargs,
        )  # fmt: skip
        return measures, number


def problem(
    device: torch.device,
    numels: Sequence[int] = ODD,
    *,
    num_target: int = 5,
    chunk: int = CHUNK,
    seed: int = 0,
    grad_scale: float = 1e-3,
    tau: float = 0.996,
) -> Problem:
    """Return random fp32 buffers with zeros between segments, and every combination of flags."""
    g = torch.Generator().manual_seed(seed)
    starts = [0]
    for n in numels:
        starts.append(starts[-1] + -(-n // 64) * 64)
    buffers = []
    for scale in (1.0, grad_scale, 1e-2, 1.0):
        buffer = torch.zeros(starts[-1])
        for start, n in zip(starts, numels, strict=False):
            buffer[start : start + n] = scale * torch.randn(n, generator=g)
        buffers.append(buffer.to(device))
    buffers[3] = buffers[3][: starts[num_target]].clone()
    count = len(numels)
    segments = SegmentTable(
        tuple(starts[:-1]),
        tuple(numels),
        torch.tensor([i % 3 != 1 for i in range(count)], device=device),
        torch.tensor([(0.0, 1e-4, 0.1)[(i // 2) % 3] for i in range(count)], device=device),
        torch.tensor([(1.0, 0.5, 3.0)[(i + i // 3) % 3] for i in range(count)], device=device),
        chunk,
    )
    return Problem(
        buffers, segments, torch.tensor(0.2, device=device), torch.tensor(tau, device=device)
    )


def assert_as_fp64(
    got: Problem, layers: Tensor, start: Problem, rule: Rule, *, ema_first: bool, **kwargs: Any
) -> None:
    """Compare every element within fp32's rounding of the terms that it is the sum of."""
    exact = start.to(torch.float64)
    w, g, m, t = (b.clone() for b in exact.buffers)
    expected = exact.step(rule, ema_first=ema_first, kernels="reference", **kwargs)
    torch.testing.assert_close(layers.double(), expected, rtol=NORM_RTOL, atol=1e-30)
    per_element = torch.zeros(3, len(w), dtype=torch.float64, device=w.device)
    table = exact.table
    for i, (offset, numel) in enumerate(zip(table.offsets, table.numels, strict=True)):
        trust, rate = expected[i, 2], expected[i, 3]
        a, b = (rate, 1.0) if rule == "blog" else (trust, exact.lr * table.lr_mult[i])
        for row, value in enumerate((a, b, table.decay[i])):
            per_element[row, offset : offset + numel] = value
    a, b, d = per_element
    m_bound = NORM_RTOL * (0.9 * m.abs() + a * (g.abs() + d * w.abs()))
    w_bound = ROUNDING * w.abs() + 4 * ROUNDING * b * exact.buffers[2].abs() + b * m_bound
    k = len(t)
    t_bound = 4 * ROUNDING * (t.abs() + w[:k].abs() + exact.buffers[0][:k].abs()) + w_bound[:k]
    for name, index, bound in (
        ("online", 0, w_bound),
        ("momentum", 2, m_bound),
        ("target", 3, t_bound),
    ):
        off = (got.buffers[index].double() - exact.buffers[index]).abs() - bound
        assert (off <= 0).all(), (name, int(off.argmax()), off.max().item())
    assert torch.equal(got.buffers[1], start.buffers[1])


def assert_padding_is_zero(p: Problem) -> None:
    for buffer in p.buffers:
        rest = buffer.clone()
        for offset, numel in zip(p.table.offsets, p.table.numels, strict=True):
            rest[offset : offset + numel] = 0
        assert not rest.any()


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("kernels", ["triton", "auto"])
@pytest.mark.parametrize("ema_first", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_kernels_equal_fp64(
    device: torch.device, rule: Rule, ema_first: bool, kernels: str
) -> None:
    start = problem(device)
    got = start.to(torch.float32)
    layers = got.step(rule, ema_first=ema_first, kernels=kernels)
    assert_as_fp64(got, layers, start, rule, ema_first=ema_first)
    assert_padding_is_zero(got)


@pytest.mark.parametrize("rule", ["sgd", "deepmind"])
def test_kernels_neither_count_nor_touch_what_lies_between(
    device: torch.device, rule: Rule
) -> None:
    """Check also the padding that 16-byte accesses reach."""
    clean, dirty = problem(device), problem(device)
    between = torch.ones(len(dirty.buffers[0]), dtype=torch.bool, device=device)
    for segment in dirty.table.split(between):
        segment.fill_(False)
    for buffer, junk in zip(dirty.buffers, (7.0, math.nan, 3.0, -2.0), strict=True):
        buffer[between[: len(buffer)]] = junk
    before = [b.clone() for b in dirty.buffers]
    assert torch.equal(clean.step(rule, kernels="triton"), dirty.step(rule, kernels="triton"))
    for got, expected, old in zip(dirty.buffers, clean.buffers, before, strict=True):
        gaps = between[: len(got)]
        assert torch.equal(got[~gaps], expected[~gaps])
        torch.testing.assert_close(got[gaps], old[gaps], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("rule", ["blog", "deepmind"])
def test_kernels_equal_fp64_in_the_shipped_chunk(device: torch.device, rule: Rule) -> None:
    start = problem(device, (9408, 64, 4096, 4097, 1), num_target=3, chunk=SegmentTable.chunk)
    got = start.to(torch.float32)
    assert_as_fp64(got, got.step(rule, kernels="triton"), start, rule, ema_first=False)
    assert_padding_is_zero(got)


@pytest.mark.parametrize("rule", RULES)
def test_kernels_equal_fp64_over_steps_with_sums_in_passes(
    device: torch.device, rule: Rule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Carry the momentum over steps, with tables longer than one pass of the sums."""
    monkeypatch.setattr(on_gpu, "MAX_LANES", 16)
    got = problem(device, (1300, 70), num_target=1)
    for seed in (1, 2):
        got.buffers[1] = problem(device, (1300, 70), num_target=1, seed=seed).buffers[1]
        start = got.to(torch.float32)
        assert_as_fp64(got, got.step(rule, kernels="triton"), start, rule, ema_first=False)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    numels=st.lists(st.integers(1, 3000), min_size=1, max_size=6),
    followed=st.integers(0, 6),
    rule=st.sampled_from(RULES),
    ema_first=st.booleans(),
    seed=st.integers(0, 99),
    grad_scale=st.sampled_from([1e-8, 1e-3, 10.0]),
    tau=st.sampled_from([0.0, 0.3, 0.996, 1.0]),
)
def test_kernels_on_any_table(
    device: torch.device,
    numels: list[int],
    followed: int,
    rule: Rule,
    ema_first: bool,
    seed: int,
    grad_scale: float,
    tau: float,
) -> None:
    start = problem(
        device,
        numels,
        num_target=min(followed, len(numels)),
        chunk=1024,
        seed=seed,
        grad_scale=grad_scale,
        tau=tau,
    )
    got = start.to(torch.float32)
    layers = got.step(rule, ema_first=ema_first, kernels="triton")
    assert_as_fp64(got, layers, start, rule, ema_first=ema_first)
    assert_padding_is_zero(got)
    if tau == 1.0:
        assert torch.equal(got.buffers[3], start.buffers[3])
    if tau == 0.0:
        assert torch.equal(
            got.buffers[3], (start if ema_first else got).buffers[0][: len(got.buffers[3])]
        )


@pytest.mark.parametrize("rule", DIALECTS)
def test_kernels_in_a_collapsed_state(device: torch.device, rule: Rule) -> None:
    """Use |g| / |w| of 1e-6, where the rate depends on the gradient's last digits."""
    start = problem(device, grad_scale=1e-6)
    got = start.to(torch.float32)
    layers = got.step(rule, kernels="triton")
    assert ((layers[:, 1] / layers[:, 0] > 1e-8) & (layers[:, 1] / layers[:, 0] < 1e-4)).all()
    assert_as_fp64(got, layers, start, rule, ema_first=False)


@pytest.mark.parametrize("rule", RULES)
def test_kernels_with_nothing_to_divide_by(device: torch.device, rule: Rule) -> None:
    """Use zero weights, zero gradients, and both, with and without decay."""
    start = problem(device, (70, 70, 70, 70, 70, 70), num_target=4)
    w, g = (start.table.split(b) for b in start.buffers[:2])
    for i in (0, 2, 5):
        w[i].zero_()
    for i in (1, 2, 3):
        g[i].zero_()
    got = start.to(torch.float32)
    layers = got.step(rule, kernels="triton")
    assert all(t.isfinite().all() for t in (*got.buffers, layers))
    assert_as_fp64(got, layers, start, rule, ema_first=False)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("kernels", "dtype"),
    [("triton", torch.float32), ("reference", torch.float32), ("auto", torch.float64)],
)
def test_a_gradient_that_is_not_finite_moves_nothing(
    device: torch.device, kernels: str, dtype: torch.dtype, rule: Rule, bad: float
) -> None:
    p = problem(device).to(dtype)
    culprit = len(ODD) - 1
    p.table.split(p.buffers[1])[culprit][-1] = bad
    before = [b.clone() for b in p.buffers]
    layers = p.step(rule, ema_first=bad < 0, kernels=kernels)
    assert all(torch.equal(p.buffers[i], before[i]) for i in (0, 2, 3))
    finite = layers[:, 1].isfinite()
    assert finite.sum() == len(ODD) - 1
    assert not finite[culprit]
    assert layers[:, 0].isfinite().all()
    assert not layers[:, 2:].any()
    p.table.split(p.buffers[1])[culprit][-1] = 0
    assert p.step(rule, kernels=kernels).isfinite().all()


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_a_norm_that_overflows_over_chunks_moves_nothing(device: torch.device) -> None:
    """Use two chunks whose sums of squares, 2.25e38 each, fit in fp32 while their sum does not."""
    p = problem(device)
    segment = p.table.split(p.buffers[1])[6]
    segment[0] = segment[100] = 1.5e19
    before = [b.clone() for b in p.buffers]
    layers = p.step("sgd", kernels="triton")
    assert all(torch.equal(a, b) for a, b in zip(p.buffers, before, strict=True))
    assert not layers[:, 2:].any()


@pytest.mark.parametrize("kernels", ["reference", "auto", "triton"])
@pytest.mark.parametrize("ema_first", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_the_sign_of_a_zero_gradient_dies_in_the_momentum(
    device: torch.device, rule: Rule, ema_first: bool, kernels: str
) -> None:
    """From a momentum of zeros, of either sign of w, with and without decay: no bit depends on it.

    The backward pass leaves zeros of both signs, and ``torch.autograd.grad`` does not add them to a
    zero, as ``backward`` does.
    """
    runs = [problem(device), problem(device)]
    for p, zero in zip(runs, (0.0, -0.0), strict=True):
        for gradient in p.table.split(p.buffers[1]):
            gradient[::2] = zero
        p.buffers[2].zero_()
    for _ in range(3):
        layers = [p.step(rule, ema_first=ema_first, kernels=kernels) for p in runs]
        assert torch.equal(*(t.view(torch.int32) for t in layers))
        for index in (0, 2, 3):
            assert torch.equal(*(p.buffers[index].view(torch.int32) for p in runs))


@pytest.mark.parametrize("rule", RULES)
def test_two_runs_agree_bit_for_bit(device: torch.device, rule: Rule) -> None:
    runs = [problem(device), problem(device)]
    layers = [p.step(rule, kernels="triton") for p in runs]
    assert torch.equal(*layers)
    assert all(torch.equal(a, b) for a, b in zip(runs[0].buffers, runs[1].buffers, strict=True))


def test_opcheck(device: torch.device) -> None:
    p = problem(device, (5, 70), num_target=1)
    t = p.table
    tables = (t.chunks, t.spans, t.adapt, t.decay, t.lr_mult)
    numbers = (p.lr, p.tau, t.chunk, t.longest, "blog", 1e-2, 0.9, False)
    arguments = (*p.buffers, *tables, *numbers)
    torch.library.opcheck(torch.ops.fastbyol.lars_ema.default, arguments)


@pytest.mark.parametrize("kernels", ["triton", "auto", "reference"])
@pytest.mark.parametrize("ema_first", [False, True])
@pytest.mark.parametrize("bad", [False, True])
def test_copies_are_the_new_weights_rounded(
    device: torch.device, kernels: str, ema_first: bool, bad: bool
) -> None:
    """Whatever they held before, and also after a step that is left out; the step is the same.

    Triton's interpreter cuts digits off where a GPU rounds to the nearest.
    """
    alone, p = problem(device), problem(device)
    for each in (alone, p):
        if bad:
            each.table.split(each.buffers[1])[2][7] = math.nan
    copies = [torch.full_like(p.buffers[i], math.nan).bfloat16() for i in (0, 3)]
    p.scheduled_step(
        ema_first=ema_first, kernels=kernels, online_copy=copies[0], target_copy=copies[1]
    )
    alone.step("blog", ema_first=ema_first, kernels=kernels)
    interpreted = kernels == "triton" and device.type == "cpu"
    for index, copy in zip((0, 3), copies, strict=True):
        assert torch.equal(p.buffers[index], alone.buffers[index])
        for offset, numel in zip(p.table.offsets, p.table.numels, strict=True):
            got, exact = (t[offset : offset + numel] for t in (copy, p.buffers[index]))
            rtol = 2.0**-7 if interpreted else 0
            torch.testing.assert_close(
                got.float(), exact if interpreted else exact.bfloat16().float(), rtol=rtol, atol=0
            )


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("override", [None, 1.0])
@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.parametrize("kernels", ["triton", "auto", "reference"])
def test_a_scheduled_step_is_a_step_at_its_rates_and_its_measures(
    device: torch.device, kernels: str, bad: bool, override: float | None
) -> None:
    """One step inside the schedule, one past its end; a tensor of one block, of several, of one
    number, which keep their new values if the step is taken and get back their old ones if not.
    """
    rates = torch.tensor([[0.1, 0.9], [0.2, 0.99], [0.3, 0.999]], device=device)
    tensors = [torch.arange(n, dtype=torch.float32, device=device) for n in (5, 2100, 1)]
    for number, row in ((1, 1), (7, 2)):
        p, alone = problem(device), problem(device)
        for each in (p, alone):
            if bad:
                each.table.split(each.buffers[1])[2][7] = math.nan
        lr = None if override is None else torch.tensor(override, device=device)
        alone.lr, alone.tau = rates[row, 0] if lr is None else lr, rates[row, 1]
        layers = alone.step("blog", kernels=kernels)
        before = [tensor.clone() for tensor in tensors]
        reversible = Reversible.of(tensors)
        for tensor in tensors:
            tensor.mul_(2).add_(1)
        after = [tensor.clone() for tensor in tensors]
        values, step = p.scheduled_step(
            reversible, rates=rates, step=number, kernels=kernels, lr=lr
        )
        norm = p.buffers[1].double().norm().item()
        expected = [2.5, *range(5), norm, *rates[row].tolist(), float(bad)]
        assert values[:10].tolist() == pytest.approx(expected, rel=NORM_RTOL, nan_ok=True)
        torch.testing.assert_close(
            values[10:].view_as(layers), layers, rtol=0, atol=0, equal_nan=True
        )
        for got, buffer in zip(p.buffers, alone.buffers, strict=True):
            torch.testing.assert_close(got, buffer, rtol=0, atol=0, equal_nan=True)
        assert step == number + 1
        for tensor, old, new in zip(tensors, before, after, strict=True):
            assert torch.equal(tensor, old if bad else new)
        assert reversible is not None
        assert torch.equal(reversible.saved, torch.cat(before if bad else after))


def test_compiled_in_one_graph(device: torch.device) -> None:
    def run(p: Problem, step: Callable[..., Tensor]) -> list[Tensor]:
        layers = []
        for i in range(2):
            p.lr.fill_(0.1 * (i + 1))
            layers.append(step(p.buffers, p.table, p.lr, p.tau).clone())
        return [*layers, *p.buffers]

    def step(buffers: list[Tensor], t: SegmentTable, lr: Tensor, tau: Tensor) -> Tensor:
        return 2 * lars_ema(
            *buffers, t, lr, tau, rule="blog", eta=1e-2, mu=0.9, ema_first=True, kernels="triton"
        )

    expected = run(problem(device), step)
    got = run(problem(device), torch.compile(step, fullgraph=True, backend="aot_eager"))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.gpu(only=True)
def test_in_a_cuda_graph_reads_its_scalars_anew(device: torch.device) -> None:
    captured, eager = problem(device), problem(device)
    keep = [b.clone() for b in captured.buffers]
    captured.step("blog")
    for buffer, value in zip(captured.buffers, keep, strict=True):
        buffer.copy_(value)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layers = captured.step("blog")
    for lr in (0.1, 0.3):
        for p in (captured, eager):
            p.lr.fill_(lr)
        graph.replay()
        assert torch.equal(layers, eager.step("blog"))
    assert all(torch.equal(a, b) for a, b in zip(captured.buffers, eager.buffers, strict=True))


def test_bad_arguments_are_named(device: torch.device) -> None:
    def calls(**changes: Any) -> Callable[[], object]:
        p = problem(device)
        names = ("online", "gradient", "momentum", "target")
        arguments = dict(zip(names, p.buffers, strict=True)) | {
            "table": p.table,
            "lr": p.lr,
            "tau": p.tau,
        }
        fixed = {"rule": "blog", "eta": 1e-2, "mu": 0.9, "ema_first": False, "kernels": "triton"}
        return lambda: lars_ema(**arguments | fixed | changes)

    p = problem(device)
    online, target = p.buffers[0], p.buffers[3]
    strided = torch.zeros(2 * len(online), device=device)[::2]
    meta = torch.zeros_like(online, device="meta")
    for changes, message in (
        ({"online": online.half()}, "online must be flat"),
        ({"online": strided}, "online must be flat"),
        ({"online": online[:-64]}, "online has"),
        ({"gradient": strided}, "gradient must be"),
        ({"gradient": meta}, "gradient must be"),
        ({"momentum": online[:-4]}, "momentum must be"),
        ({"momentum": online.double()}, "momentum must be"),
        ({"target": target[:-200]}, "target's .* inside the segment"),
        ({"target": torch.cat((online, online))}, "target must be"),
        ({"lr": torch.tensor(0.1, device=device).double()}, "lr must be"),
        ({"tau": torch.zeros(1, device=device)}, "tau must be"),
        ({"rule": "adam"}, "rule must be"),
        ({"kernels": "cuda"}, "kernels must be"),
        ({"table": p.to(torch.float64).table}, "table.decay must be"),
    ):
        with pytest.raises(ValueError, match=message):
            calls(**changes)()
    for options, message in (
        ({"online_copy": online}, "online_copy must be contiguous torch.bfloat16"),
        ({"target_copy": online.bfloat16()}, "target_copy must be contiguous torch.bfloat16"),
        ({"rates": torch.zeros(3, 3, device=device)}, "rates must be"),
    ):
        with pytest.raises(ValueError, match=message):
            p.scheduled_step(kernels="triton", **options)
    odd = SegmentTable(
        (0, 66), (5, 5), *(t[:2] for t in (p.table.adapt, p.table.decay, p.table.lr_mult))
    )
    with pytest.raises(ValueError, match="table: segment 1 starts at 66"):
        calls(table=odd, target=target[:64])()


def test_a_bad_table_is_refused() -> None:
    flags, numbers = torch.tensor([True, False]), torch.ones(2)
    for arguments, message in (
        (((0,), (3, 4), flags, numbers, numbers), "numels must be as many"),
        (((0, 64), (3, 0), flags, numbers, numbers), "numels must be positive"),
        (((0, 64), (65, 3), flags, numbers, numbers), "offsets: segment 1 starts at 64"),
        (((0, 64), (3, 2**31), flags, numbers, numbers), "offsets: the last segment ends"),
        (((0, 64), (3, 3), numbers, numbers, numbers), "adapt must be bool"),
        (((0, 64), (3, 3), flags, numbers[:1], numbers), "decay must be"),
        (((0, 64), (3, 3), flags, numbers, torch.ones(3)), "lr_mult must be"),
        (((0, 64), (3, 3), flags, numbers, numbers, 48), "chunk must be a power of two"),
    ):
        with pytest.raises(ValueError, match=message):
            SegmentTable(*arguments)


def test_triton_on_a_cpu_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastbyol_kernels.dispatch.TRITON_ON_CPU", False)
    with pytest.raises(ValueError, match="needs CUDA, online is on cpu"):
        problem(torch.device("cpu")).step("sgd", kernels="triton")


def test_bytes_moved_counts_every_buffer() -> None:
    """Count reads of w, m, target and twice g, and writes of w, m, target. ResNet-18: 371 MB."""
    online, target = torch.zeros(96), torch.zeros(64)
    assert (
        bytes_moved(96, 64) == 4 * online.nbytes + target.nbytes + 2 * online.nbytes + target.nbytes
    )
    assert round(bytes_moved(11_638_592, 11_505_856) / 1e6) == 371
