"""The optimizer's sweep against torch.optim.SGD and against each dialect written for one tensor with Python floats."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastbyol_kernels.lars_ema import LAYER_METRICS, Rule, SegmentTable, lars_ema

RULES: tuple[Rule, ...] = ("sgd", "blog", "deepmind", "bolts")
DIALECTS = RULES[1:]
NUMELS = (5, 1, 12, 7)
NUM_TARGET = 3
PAD = 32


def table(adapt: Sequence[bool], decay: Sequence[float], lr_mult: Sequence[float]) -> SegmentTable:
    return SegmentTable(
        offsets=tuple(PAD * i for i in range(len(adapt))),
        numels=NUMELS[: len(adapt)],
        adapt=torch.tensor(list(adapt)),
        decay=torch.tensor(list(decay), dtype=torch.float64),
        lr_mult=torch.tensor(list(lr_mult), dtype=torch.float64),
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
    rule: Rule, w: Tensor, g: Tensor, m: Tensor, wd: float, k: float, adapt: bool, lr: float, eta: float, mu: float
) -> tuple[Tensor, Tensor, float]:
    """One tensor, one dialect: new w, new m, rate."""
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


@settings(max_examples=60, deadline=None)
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
        layers = lars_ema(online, flat(g), momentum, target, table(adapt, decay, mult), scalar(0.2), scalar(tau), **kwargs)
        for i in range(4):
            new_w, m[i], rate = by_hand(rule, w[i], g[i], m[i], decay[i], mult[i], adapt[i], 0.2, 1e-2, 0.9)
            if i < NUM_TARGET:
                averages[i] = tau * averages[i] + (1 - tau) * (w[i] if ema_first else new_w)
            row = dict(zip(LAYER_METRICS, layers[i].tolist(), strict=True))
            assert row["weight_norm"] == pytest.approx(w[i].norm().item(), rel=1e-12, abs=1e-15)
            assert row["grad_norm"] == pytest.approx(g[i].norm().item(), rel=1e-12, abs=1e-15)
            assert row["rate"] == pytest.approx(rate, rel=1e-12, abs=1e-15)
            assert row["rate"] == pytest.approx(0.2 * mult[i] * row["trust_ratio"], rel=1e-12, abs=1e-15)
            assert row["update_norm"] == pytest.approx((new_w - w[i]).norm().item(), rel=1e-6, abs=1e-12)
            w[i] = new_w
    for got, expected in ((online, flat(w)), (momentum, flat(m)), (target, flat(averages))):
        # Zeros between the segments included.
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("rule", RULES)
def test_without_adaptation_every_rule_is_torchs_sgd(rule: Rule) -> None:
    """The blog's momentum buffer holds rates as well as gradients, so it agrees while lr does not change."""
    w = [p.requires_grad_() for p in draws(0)]
    groups = [{"params": [p], "weight_decay": wd} for p, wd in zip(w, (0.1, 0.0, 1e-3, 0.0), strict=True)]
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
            online, flat(g), momentum, target, segments, scalar(0.1), scalar(1.0), rule=rule, eta=1.0, mu=0.9, ema_first=True
        )
    torch.testing.assert_close(online, flat([p.detach() for p in w]), rtol=1e-13, atol=1e-14)


def test_a_blog_rate_never_exceeds_lr_eta_over_wd() -> None:
    """Whatever the gradient: the bound that tells which weight decay the post's plotted rates were made with."""
    segments = table([True] * 4, [1.5e-6] * 4, [1.0] * 4)
    for scale in (1.0, 1e-6, 1e-12, 1e-40, 0.0):
        online = flat(draws(0))
        layers = lars_ema(
            online, flat(draws(1, scale)), torch.zeros_like(online), online[:PAD].clone(), segments, scalar(0.1), scalar(0.9),
            rule="blog", eta=1e-3, mu=0.9, ema_first=True,
        )  # fmt: skip
        assert layers[:, 3].max() <= 0.1 * 1e-3 / 1.5e-6 * (1 + 1e-12)
    torch.testing.assert_close(layers[:, 3], torch.full((4,), 0.1 * 1e-3 / 1.5e-6, dtype=torch.float64))


@pytest.mark.parametrize("rule", DIALECTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_to_divide_by_stays_finite(rule: Rule, dtype: torch.dtype) -> None:
    """Zero weights, zero gradients and no decay, alone and together."""
    segments = table([True] * 4, [0.0] * 4, [1.0] * 4)
    segments = SegmentTable(
        segments.offsets, segments.numels, segments.adapt, segments.decay.to(dtype), segments.lr_mult.to(dtype)
    )
    w, g = draws(0), draws(1)
    w[0].zero_()
    g[1].zero_()
    w[2].zero_()
    g[2].zero_()
    online = flat(w).to(dtype)
    momentum, target = torch.zeros_like(online), online[:PAD].clone()
    layers = lars_ema(
        online, flat(g).to(dtype), momentum, target, segments, scalar(0.1).to(dtype), scalar(0.9).to(dtype),
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
        segments = table([False] * 4, [0.0] * 4, [1.0] * 4)
        segments = SegmentTable(
            segments.offsets, segments.numels, segments.adapt, segments.decay.float(), segments.lr_mult.float()
        )
        lars_ema(
            online, zeros, zeros.clone(), target, segments, torch.tensor(0.1), torch.tensor(tau),
            rule="sgd", eta=1.0, mu=0.9, ema_first=True,
        )  # fmt: skip
        assert torch.equal(target, before if tau == 1.0 else online[:PAD])
