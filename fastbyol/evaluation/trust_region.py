"""Trust-region Newton for penalised linear classifiers: all classes at once, in float64, on the features' device.

Minimises over W (K, D), with X (N, D) and margins M = W X' (K, N),

    F(W) = C * loss(M) + 1/2 <W, P W>

The method is Lin, Weng and Keerthi, "Trust region Newton method for large-scale logistic regression", JMLR 9 (2008), which is
what liblinear runs: Steihaug's conjugate gradients inside a trust region whose radius follows Lin and More's rules. Each class
has its own radius, step and stopping test, so that every class goes through the iterates that liblinear would give it, while
a product with X, where the time goes, is shared by all. It stops where liblinear stops, too: that decides the accuracy where
features are nearly equal and small, as after a collapse (see ``tests/evaluation/test_probe.py``).

N samples, D features, K classes. Per-class numbers have shape (K, 1), or (1, 1) where the classes are one problem.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

# Lin, Weng and Keerthi, section 2: a step is accepted above ETA_0 of the predicted reduction; the others move the radius.
ETA_0, ETA_1, ETA_2 = 1e-4, 0.25, 0.75
SIGMA_1, SIGMA_2, SIGMA_3 = 0.25, 0.5, 4.0
# The same: conjugate gradients stop at this share of the gradient.
FORCING = 0.1
# Both reductions under this share of F: nothing is left but rounding.
ROUNDING = 1e-12
MAX_CONJUGATE_GRADIENTS = 1000


class Loss(Protocol):
    """A convex loss of margins (K, N). ``dot`` sums over whatever shares one trust region."""

    def value(self, margins: Tensor) -> Tensor:
        """The loss, (K, 1) or (1, 1)."""

    def residual(self, margins: Tensor) -> Tensor:
        """Its derivative, (K, N)."""

    def curvature(self, margins: Tensor) -> Tensor:
        """What ``times`` needs of the margins, (K, N)."""

    def times(self, curvature: Tensor, v: Tensor) -> Tensor:
        """Its Hessian applied to ``v`` (K, N)."""

    def mean_curvature(self, margins: Tensor) -> Tensor:
        """The classes' mean of the Hessian's diagonal, (N,)."""

    def dot(self, a: Tensor, b: Tensor) -> Tensor:
        """Inner product of two tensors (K, any), (K, 1) or (1, 1)."""


@dataclass(frozen=True)
class Sigmoid:
    """K separate binary problems: sum log(1 + exp(-s m)), s = 2 t - 1, for ``targets`` t in {0, 1}, (K, N)."""

    targets: Tensor

    def value(self, margins: Tensor) -> Tensor:
        return F.softplus(torch.where(self.targets > 0.0, -margins, margins)).sum(1, keepdim=True)

    def residual(self, margins: Tensor) -> Tensor:
        return torch.sigmoid(margins) - self.targets

    def curvature(self, margins: Tensor) -> Tensor:
        return torch.sigmoid(margins) * torch.sigmoid(-margins)

    def times(self, curvature: Tensor, v: Tensor) -> Tensor:
        return curvature * v

    def mean_curvature(self, margins: Tensor) -> Tensor:
        return self.curvature(margins).mean(0)

    def dot(self, a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(1, keepdim=True)


@dataclass(frozen=True)
class Softmax:
    """One problem: the cross-entropy of softmax(m) over the classes, ``targets`` one-hot, (K, N)."""

    targets: Tensor

    def value(self, margins: Tensor) -> Tensor:
        return (torch.logsumexp(margins, 0) - (self.targets * margins).sum(0)).sum().reshape(1, 1)

    def residual(self, margins: Tensor) -> Tensor:
        return torch.softmax(margins, 0) - self.targets

    def curvature(self, margins: Tensor) -> Tensor:
        return torch.softmax(margins, 0)

    def times(self, curvature: Tensor, v: Tensor) -> Tensor:
        weighted = curvature * v
        return weighted - curvature * weighted.sum(0, keepdim=True)

    def mean_curvature(self, margins: Tensor) -> Tensor:
        p = self.curvature(margins)
        return (p * (1.0 - p)).mean(0)

    def dot(self, a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum().reshape(1, 1)


@dataclass(frozen=True)
class Problem:
    """F above. ``x`` (N, D) float64; ``penalty`` P, a diagonal (D,) or a matrix (D, D), float64; ``c`` the loss's weight."""

    x: Tensor
    loss: Loss
    penalty: Tensor
    c: float

    def penalised(self, w: Tensor) -> Tensor:
        """P w, (K, D)."""
        return w * self.penalty if self.penalty.ndim == 1 else w @ self.penalty

    def value(self, w: Tensor, margins: Tensor) -> Tensor:
        """F."""
        return self.c * self.loss.value(margins) + 0.5 * self.loss.dot(w, self.penalised(w))

    def gradient(self, w: Tensor, margins: Tensor) -> Tensor:
        """dF/dW, (K, D)."""
        return self.c * (self.loss.residual(margins) @ self.x) + self.penalised(w)

    def norm(self, a: Tensor) -> Tensor:
        """Euclidean length of each problem's part of ``a``."""
        return self.loss.dot(a, a).sqrt()


@dataclass(frozen=True)
class Solution:
    """``weights`` (K, D) float64; |dF/dW| over its length at W = 0 and Newton steps, per problem; products with X and X'.

    ``converged``: every problem met its tolerance, or has nothing but rounding left.
    """

    weights: Tensor
    gradient: Tensor
    steps: Tensor
    num_products: int
    converged: bool


def minimise(
    problem: Problem,
    initial: Tensor,
    tolerance: Tensor,
    *,
    max_steps: int = 100,
    max_products: int = 100_000,
    exact_products: int = 0,
) -> Solution:
    """Start at W = ``initial`` (K, D) and stop where |dF/dW| is at most ``tolerance`` (K, 1) or (1, 1) of its length at W = 0.

    Also stops, not converged, after ``max_steps`` Newton steps of a problem or, between steps, ``max_products`` of all.
    Conjugate gradients only have to leave a tenth of the gradient, so their products go through float32, in a quarter to half
    the time, once ``exact_products`` have been done in float64. Deterministic on one machine with one number of threads.
    """
    x, loss = problem.x, problem.loss
    w, margins = initial, initial @ x.T
    start = problem.norm(problem.gradient(torch.zeros_like(w), torch.zeros_like(margins)))
    value, gradient = problem.value(w, margins), problem.gradient(w, margins)
    radius = problem.norm(gradient)
    done = radius <= tolerance * start
    x_rounded, steps, num_products = x.float(), torch.zeros_like(start), 0
    while num_products < max_products and bool((active := ~done & (steps < max_steps)).any()):
        x_step = x if num_products < exact_products else x_rounded
        step, left, count = _trial_step(problem, x_step, margins, gradient, radius, active)
        num_products += count
        moved = step @ x.T
        new_value = problem.value(w + step, margins + moved)
        slope = loss.dot(gradient, step)
        predicted, actual, length = -0.5 * (slope - loss.dot(step, left)), value - new_value, problem.norm(step)
        radius = torch.where(steps == 0.0, torch.minimum(radius, length), radius)
        radius = torch.where(active, _next_radius(radius, length, slope, predicted, actual), radius)
        accepted = active & (actual > ETA_0 * predicted)
        w, margins = torch.where(accepted, w + step, w), torch.where(accepted, margins + moved, margins)
        value, steps, gradient = torch.where(accepted, new_value, value), steps + accepted, problem.gradient(w, margins)
        flat = torch.maximum(actual.abs(), predicted.abs()) <= ROUNDING * value.abs()
        done = done | (problem.norm(gradient) <= tolerance * start) | (active & flat)
    relative = torch.where(start > 0.0, problem.norm(gradient) / start, 0.0)
    return Solution(w, relative, steps, num_products, bool(done.all()))


def minimise_whitened(problem: Problem, initial: Tensor, tolerance: Tensor, *, max_products: int = 1000) -> Solution:
    """As ``minimise``, in coordinates where the Hessian at ``initial``, averaged over the classes, is the identity.

    ``problem.penalty`` must be a diagonal. Features that are all but collinear, as a network's are, then cost no more conjugate
    gradients than independent ones. ``tolerance`` is on the gradient in the new coordinates. At W = 0 the whitening is
    Boehning's bound on the Hessian (Ann. Inst. Stat. Math. 44, 1992).
    """
    x, loss = problem.x, problem.loss
    weight = (problem.c * loss.mean_curvature(initial @ x.T))[:, None]
    factor = torch.linalg.cholesky(problem.penalty.diag() + (weight * x).T @ x)
    whitened = torch.linalg.solve_triangular(factor, x.T, upper=False).T.contiguous()
    root = torch.linalg.solve_triangular(factor, problem.penalty.sqrt().diag(), upper=False)
    inner = Problem(whitened, loss, penalty=root @ root.T, c=problem.c)
    solution = minimise(inner, initial @ factor, tolerance, max_products=max_products)
    weights = torch.linalg.solve_triangular(factor, solution.weights, upper=False, left=False)
    return replace(solution, weights=weights)


def _trial_step(
    problem: Problem, x: Tensor, margins: Tensor, gradient: Tensor, radius: Tensor, active: Tensor
) -> tuple[Tensor, Tensor, int]:
    """Steihaug's conjugate gradients on H s = -gradient, cut off at the trust region's border.

    ``x`` is the problem's, in the precision to compute in. Returns s (K, D), 0 where not ``active``, what is left of the
    equation, -gradient - H s, and the number of products.
    """
    loss, dot = problem.loss, problem.loss.dot
    curvature = loss.curvature(margins).to(x.dtype)
    s, left = torch.zeros_like(gradient), -gradient
    direction, squared = left, dot(left, left)
    goal, running, count = FORCING * squared.sqrt(), active & (squared > 0.0), 0
    while count < MAX_CONJUGATE_GRADIENTS and bool(running.any()):
        curved = loss.times(curvature, direction.to(x.dtype) @ x.T) @ x
        curved = problem.c * curved.double() + problem.penalised(direction)
        bend = dot(direction, curved)
        alpha = squared / bend
        leaving = (problem.norm(s + alpha * direction) > radius) | (bend <= 0.0)
        alpha = torch.where(leaving, _to_border(dot(s, direction), dot(s, s), dot(direction, direction), radius), alpha)
        alpha = torch.where(running, alpha, 0.0)
        s, left = s + alpha * direction, left - alpha * curved
        next_squared = dot(left, left)
        running = running & ~leaving & (next_squared.sqrt() > goal)
        direction = torch.where(running, left + next_squared / squared * direction, direction)
        squared, count = torch.where(running, next_squared, squared), count + 1
    return s, left, count


def _to_border(sd: Tensor, ss: Tensor, dd: Tensor, radius: Tensor) -> Tensor:
    """The alpha >= 0 with |s + alpha d| = radius, from the inner products of s and d, without cancellation."""
    room = radius.square() - ss
    root = (sd.square() + dd * room).clamp_min(0.0).sqrt()
    return torch.where(sd >= 0.0, room / (sd + root), (root - sd) / dd)


def _next_radius(radius: Tensor, length: Tensor, slope: Tensor, predicted: Tensor, actual: Tensor) -> Tensor:
    """Lin and More's rules: the better the quadratic model did, the larger the next trust region."""
    excess = -actual - slope
    alpha = torch.where(excess <= 0.0, SIGMA_3, (-0.5 * slope / excess).clamp_min(SIGMA_1))
    scaled = alpha * length
    poor, fair, good = SIGMA_2 * radius, SIGMA_3 * radius, torch.minimum(scaled, SIGMA_3 * radius)
    return torch.where(
        actual < ETA_0 * predicted,
        torch.minimum(scaled, poor),
        torch.where(
            actual < ETA_1 * predicted,
            torch.maximum(SIGMA_1 * radius, torch.minimum(scaled, poor)),
            torch.where(
                actual < ETA_2 * predicted,
                torch.maximum(SIGMA_1 * radius, torch.minimum(scaled, fair)),
                torch.maximum(radius, good),
            ),
        ),
    )
