"""The solver: losses against autograd, minima against their definition, classes that do not touch
each other.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fastbyol.evaluation import trust_region
from fastbyol.evaluation.trust_region import Problem, Sigmoid, Softmax, minimise, minimise_whitened

NUM_CLASSES, NUM_SAMPLES = 4, 60
CASES = pytest.mark.parametrize("kind", [Sigmoid, Softmax])


def one_hot(seed: int) -> Tensor:
    labels = torch.randint(
        NUM_CLASSES, (NUM_SAMPLES,), generator=torch.Generator().manual_seed(seed)
    )
    return F.one_hot(labels, NUM_CLASSES).double().T.contiguous()


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def zeros(x: Tensor) -> Tensor:
    return x.new_zeros(NUM_CLASSES, x.shape[1])


def written_out(kind: type[Sigmoid] | type[Softmax], targets: Tensor, margins: Tensor) -> Tensor:
    """Compute the losses by torch's own functionals: (K, 1) or (1, 1)."""
    if kind is Softmax:
        return F.cross_entropy(margins.T, targets.argmax(0), reduction="sum").reshape(1, 1)
    return F.binary_cross_entropy_with_logits(margins, targets, reduction="none").sum(
        1, keepdim=True
    )


@CASES
def test_value_residual_and_hessian_are_autograds(kind: type[Sigmoid] | type[Softmax]) -> None:
    targets, margins, v = (
        one_hot(0),
        3.0 * normal(NUM_CLASSES, NUM_SAMPLES, seed=1),
        normal(NUM_CLASSES, NUM_SAMPLES, seed=2),
    )
    loss = kind(targets)
    torch.testing.assert_close(
        loss.value(margins), written_out(kind, targets, margins), rtol=1e-13, atol=0.0
    )

    def total(m: Tensor) -> Tensor:
        return written_out(kind, targets, m).sum()

    product = torch.autograd.functional.vhp(total, margins, v)[1]
    torch.testing.assert_close(
        loss.residual(margins), torch.func.grad(total)(margins), rtol=1e-12, atol=1e-13
    )
    torch.testing.assert_close(
        loss.times(loss.curvature(margins), v), product, rtol=1e-11, atol=1e-13
    )
    diagonal = (
        torch.autograd.functional.hessian(total, margins)
        .reshape(margins.numel(), -1)
        .diagonal()
        .reshape(margins.shape)
    )
    torch.testing.assert_close(
        loss.mean_curvature(margins), diagonal.mean(0), rtol=1e-11, atol=1e-13
    )


@CASES
@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([1e-4, 1e-2, 1.0, 1e2, 1e4]),
    c=st.sampled_from([1e-3, 1.0, 1e3]),
    offset=st.sampled_from([0.0, 10.0]),
)
def test_finds_the_minimum(
    kind: type[Sigmoid] | type[Softmax], seed: int, scale: float, c: float, offset: float
) -> None:
    """At the minimum the gradient, by autograd, is zero: and F being convex, nothing else needs to
    be checked.
    """
    x = scale * (normal(NUM_SAMPLES, 5, seed=seed) + offset)
    targets = one_hot(seed + 1)
    problem = Problem(x, kind(targets), torch.ones(5, dtype=torch.float64), c)
    loss = problem.loss
    rows = len(loss.dot(targets, targets))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trust_region, "MAX_STEPS", 1000)
        solution = minimise(problem, zeros(x), torch.full((rows, 1), 1e-7, dtype=torch.float64))
    assert solution.converged

    def objective(w: Tensor) -> Tensor:
        return c * written_out(kind, targets, w @ x.T).sum() + 0.5 * w.square().sum()

    start, end = (
        torch.func.grad(objective)(torch.zeros_like(solution.weights)),
        torch.func.grad(objective)(solution.weights),
    )
    left = loss.dot(end, end).sqrt() / loss.dot(start, start).sqrt()
    hessian = torch.autograd.functional.hessian(objective, solution.weights).reshape(20, 20)
    decrement = 0.5 * end.flatten() @ torch.linalg.solve(hessian, end.flatten())
    # Either the tolerance of 1e-7 is met, or only rounding of F is left to gain.
    assert bool((left <= 1.01e-7).all()) or float(decrement) <= 4e-12 * float(
        objective(solution.weights)
    )


def test_a_matrix_penalty_is_a_change_of_variables() -> None:
    """With x = z A' and P = A A', the minimum in the weights of z is the one in those of x, times
    A.
    """
    z, a = (
        normal(NUM_SAMPLES, 5, seed=3),
        normal(5, 5, seed=4) + 3.0 * torch.eye(5, dtype=torch.float64),
    )
    targets, tolerance = one_hot(5), torch.full((NUM_CLASSES, 1), 1e-10, dtype=torch.float64)
    plain = minimise(
        Problem(z, Sigmoid(targets), torch.ones(5, dtype=torch.float64), 1.0), zeros(z), tolerance
    )
    mixed = minimise(Problem(z @ a.T, Sigmoid(targets), a @ a.T, 1.0), zeros(z), tolerance)
    # F stops resolving at 1e-12 of itself, so the weights do near the root of that.
    torch.testing.assert_close(mixed.weights @ a, plain.weights, rtol=1e-5, atol=1e-6)


@CASES
def test_whitening_changes_the_way_not_the_end(kind: type[Sigmoid] | type[Softmax]) -> None:
    """All but collinear features: the same minimum, for fewer products, from W = 0 and from
    elsewhere.
    """
    x = normal(NUM_SAMPLES, 1, seed=11) + 0.03 * normal(NUM_SAMPLES, 12, seed=12)
    loss = kind(one_hot(13))
    penalty = torch.full((12,), 1e-3, dtype=torch.float64)
    penalty[-1] = 0.0
    problem = Problem(x, loss, penalty, 1.0)
    tolerance = torch.full_like(loss.dot(zeros(x), zeros(x)), 1e-8)
    plain = minimise(problem, zeros(x), tolerance)
    whitened = minimise_whitened(problem, zeros(x), tolerance)
    elsewhere = minimise_whitened(problem, normal(NUM_CLASSES, 12, seed=14), tolerance)
    assert whitened.num_products < plain.num_products
    for solution in (whitened, elsewhere):
        assert solution.converged
        torch.testing.assert_close(
            loss.residual(solution.weights @ x.T),
            loss.residual(plain.weights @ x.T),
            rtol=0.0,
            atol=1e-5,
        )


def test_stops_at_its_budget() -> None:
    x = 1e3 * normal(NUM_SAMPLES, 5, seed=15)
    problem = Problem(x, Sigmoid(one_hot(16)), torch.ones(5, dtype=torch.float64), 1.0)
    tolerance = torch.full((NUM_CLASSES, 1), 1e-9, dtype=torch.float64)
    cut = minimise(problem, zeros(x), tolerance, max_products=3)
    assert not cut.converged
    # Between steps: the last one is finished, in at most as many conjugate gradients as there are
    # features, and a few.
    assert 3 <= cut.num_products <= 3 + 10
    rest = minimise(problem, cut.weights, tolerance)
    whole = minimise(problem, zeros(x), tolerance)
    torch.testing.assert_close(rest.weights, whole.weights, rtol=1e-5, atol=1e-9)


def test_classes_do_not_touch_each_other() -> None:
    """Fitted together or alone, a class takes the same steps to the same weights: each has its own
    trust region.
    """
    x, targets = 5.0 * normal(NUM_SAMPLES, 8, seed=6) + 2.0, one_hot(7)
    ones, tolerance = (
        torch.ones(8, dtype=torch.float64),
        torch.tensor([[1e-2], [1e-4], [1e-6], [1e-8]], dtype=torch.float64),
    )
    together = minimise(Problem(x, Sigmoid(targets), ones, 1.0), zeros(x), tolerance)
    for k in range(NUM_CLASSES):
        alone = minimise(
            Problem(x, Sigmoid(targets[k : k + 1]), ones, 1.0), zeros(x)[:1], tolerance[k : k + 1]
        )
        assert int(alone.steps) == int(together.steps[k])
        # Products are rounded by the shape that they are computed in.
        torch.testing.assert_close(alone.weights[0], together.weights[k], rtol=1e-5, atol=1e-7)


def test_says_when_it_ran_out_of_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    x, targets = 1e3 * normal(NUM_SAMPLES, 5, seed=8), one_hot(9)
    problem = Problem(x, Softmax(targets), torch.ones(5, dtype=torch.float64), 1.0)
    tolerance = torch.full((1, 1), 1e-9, dtype=torch.float64)
    assert minimise(problem, zeros(x), tolerance).converged
    monkeypatch.setattr(trust_region, "MAX_STEPS", 2)
    short = minimise(problem, zeros(x), tolerance)
    assert not short.converged
    assert int(short.steps) == 2


def test_nothing_to_learn_ends_at_zero() -> None:
    """Features of zeros: the gradient is zero at the start, whatever the labels."""
    x = torch.zeros(NUM_SAMPLES, 3, dtype=torch.float64)
    problem = Problem(x, Sigmoid(one_hot(10)), torch.ones(3, dtype=torch.float64), 1.0)
    solution = minimise(problem, zeros(x), torch.full((NUM_CLASSES, 1), 1e-6, dtype=torch.float64))
    assert torch.equal(solution.weights, zeros(x))
    assert solution.converged
