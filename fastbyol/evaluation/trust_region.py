"""Trust-region Newton for penalised linear classifiers: all classes at once, in float64.

3,968 x 512 take .16 s on one core (liblinear .76 s, LBFGS 1.66 s). Source: Lin, Weng, Keerthi,
"Trust region Newton method for large-scale logistic regression", JMLR 9 (2008), as in liblinear.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

# Letters: N samples, D features, K classes; numbers per problem are (K, 1), or (1, 1) under
# Softmax.

# Section 2: a step is accepted above ETA_0 of the predicted reduction; the others move the radius.
ETA_0, ETA_1, ETA_2 = 1e-4, 0.25, 0.75
SIGMA_1, SIGMA_2, SIGMA_3 = 0.25, 0.5, 4.0
FORCING = 0.1  # conjugate gradients stop at this share of the gradient (section 2)
ROUNDING = 1e-12  # if both reductions are below this share of F, only rounding is left
MAX_STEPS = 100  # liblinear's max_iter in the post's probe
MAX_CONJUGATE_GRADIENTS = 1000


@dataclass(frozen=True)
class Sigmoid:
    """K binary problems: sum log(1 + exp(-s m)), s = 2 t - 1, ``targets`` t in {0, 1} (K, N)."""

    targets: Tensor

    def value(self, margins: Tensor) -> Tensor:
        """Return the loss of ``margins`` (K, N)."""
        return F.softplus(torch.where(self.targets > 0.0, -margins, margins)).sum(1, keepdim=True)

    def residual(self, margins: Tensor) -> Tensor:
        """Return the loss's derivative, (K, N)."""
        return torch.sigmoid(margins) - self.targets

    def curvature(self, margins: Tensor) -> Tensor:
        """Return what ``times`` needs of the margins, (K, N)."""
        return torch.sigmoid(margins) * torch.sigmoid(-margins)

    def times(self, curvature: Tensor, v: Tensor) -> Tensor:
        """Apply the Hessian to ``v`` (K, N)."""
        return curvature * v

    def mean_curvature(self, margins: Tensor) -> Tensor:
        """Return the classes' mean of the Hessian's diagonal, (N,)."""
        return self.curvature(margins).mean(0)

    def dot(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the inner product of each problem's part of ``a`` and ``b`` (K, any)."""
        return (a * b).sum(1, keepdim=True)


@dataclass(frozen=True)
class Softmax:
    """One problem: the cross-entropy of softmax(m) with one-hot ``targets`` (K, N).

    The methods are ``Sigmoid``'s.
    """

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
    """The objective F(W) = c loss(W X') + 1/2 <W, P W> over W (K, D).

    ``x`` is X (N, D), ``penalty`` P as a diagonal (D,) or a matrix (D, D), both float64.
    """

    x: Tensor
    loss: Sigmoid | Softmax
    penalty: Tensor
    c: float

    def penalised(self, w: Tensor) -> Tensor:
        """Return P w, (K, D)."""
        return w * self.penalty if self.penalty.ndim == 1 else w @ self.penalty

    def value(self, w: Tensor, margins: Tensor) -> Tensor:
        """Return F(w)."""
        return self.c * self.loss.value(margins) + 0.5 * self.loss.dot(w, self.penalised(w))

    def gradient(self, w: Tensor, margins: Tensor) -> Tensor:
        """Return dF/dW, (K, D)."""
        return self.c * (self.loss.residual(margins) @ self.x) + self.penalised(w)

    def norm(self, a: Tensor) -> Tensor:
        """Return the length of each problem's part of ``a``."""
        return self.loss.dot(a, a).sqrt()


@dataclass(frozen=True)
class Solution:
    """A minimum's ``weights`` (K, D), Newton ``steps`` per problem and products with X and X'.

    ``converged``: every problem met its tolerance or has only rounding left.
    """

    weights: Tensor
    steps: Tensor
    num_products: int
    converged: bool


def minimise(
    problem: Problem, initial: Tensor, tolerance: Tensor, *, max_products: int = 100_000
) -> Solution:
    """Minimise F from ``initial`` (K, D) until |dF/dW| is ``tolerance`` times its length at W = 0.

    Also stops, not converged, after ``MAX_STEPS`` Newton steps of a problem or, between steps,
    ``max_products``. Deterministic on one machine with one number of threads.
    """
    # Each class has its own radius, step and stopping test, so it takes liblinear's iterates and
    # stops where liblinear stops. That decides the accuracy where features are nearly equal and
    # small, as after a collapse (tests/evaluation/test_probe.py). Products with X, where the time
    # goes, are shared by all classes.
    x, loss = problem.x, problem.loss
    w, margins = initial, initial @ x.T
    start = problem.norm(problem.gradient(torch.zeros_like(w), torch.zeros_like(margins)))
    value, gradient = problem.value(w, margins), problem.gradient(w, margins)
    radius = problem.norm(gradient)
    done = radius <= tolerance * start
    steps, num_products = torch.zeros_like(start), 0
    while num_products < max_products and bool((active := ~done & (steps < MAX_STEPS)).any()):
        step, left, count = _trial_step(problem, margins, gradient, radius, active)
        num_products += count
        moved = step @ x.T
        new_value = problem.value(w + step, margins + moved)
        slope = loss.dot(gradient, step)
        predicted, actual, length = (
            -0.5 * (slope - loss.dot(step, left)),
            value - new_value,
            problem.norm(step),
        )
        radius = torch.where(steps == 0.0, torch.minimum(radius, length), radius)
        radius = torch.where(active, _next_radius(radius, length, slope, predicted, actual), radius)
        accepted = active & (actual > ETA_0 * predicted)
        w, margins = (
            torch.where(accepted, w + step, w),
            torch.where(accepted, margins + moved, margins),
        )
        value, steps, gradient = (
            torch.where(accepted, new_value, value),
            steps + accepted,
            problem.gradient(w, margins),
        )
        flat = torch.maximum(actual.abs(), predicted.abs()) <= ROUNDING * value.abs()
        done = done | (problem.norm(gradient) <= tolerance * start) | (active & flat)
    return Solution(w, steps, num_products, bool(done.all()))


def minimise_whitened(
    problem: Problem, initial: Tensor, tolerance: Tensor, *, max_products: int = 1000
) -> Solution:
    """Minimise F in coordinates where the Hessian at ``initial``, averaged over classes, is I.

    Nearly collinear features, like a network's, then need no more conjugate gradients than
    independent ones. ``problem.penalty`` must be a diagonal; ``tolerance`` is on the gradient in
    the new coordinates. At W = 0 the whitening is Boehning's bound (Ann. Inst. Stat. Math. 44,
    1992).
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
    problem: Problem, margins: Tensor, gradient: Tensor, radius: Tensor, active: Tensor
) -> tuple[Tensor, Tensor, int]:
    """Solve H s = -gradient by Steihaug's conjugate gradients within the trust region.

    Returns s (K, D), 0 where not ``active``, the rest -gradient - H s and the number of products.
    """
    x, loss, dot = problem.x, problem.loss, problem.loss.dot
    curvature = loss.curvature(margins)
    s, left = torch.zeros_like(gradient), -gradient
    direction, squared = left, dot(left, left)
    goal, running, count = FORCING * squared.sqrt(), active & (squared > 0.0), 0
    while count < MAX_CONJUGATE_GRADIENTS and bool(running.any()):
        curved = problem.c * (loss.times(curvature, direction @ x.T) @ x) + problem.penalised(
            direction
        )
        bend = dot(direction, curved)
        alpha = squared / bend
        leaving = (problem.norm(s + alpha * direction) > radius) | (bend <= 0.0)
        alpha = torch.where(
            leaving,
            _to_border(dot(s, direction), dot(s, s), dot(direction, direction), radius),
            alpha,
        )
        alpha = torch.where(running, alpha, 0.0)
        s, left = s + alpha * direction, left - alpha * curved
        next_squared = dot(left, left)
        running = running & ~leaving & (next_squared.sqrt() > goal)
        direction = torch.where(running, left + next_squared / squared * direction, direction)
        squared, count = torch.where(running, next_squared, squared), count + 1
    return s, left, count


def _to_border(sd: Tensor, ss: Tensor, dd: Tensor, radius: Tensor) -> Tensor:
    """Return the alpha >= 0 with |s + alpha d| = radius, without cancellation."""
    room = radius.square() - ss
    root = (sd.square() + dd * room).clamp_min(0.0).sqrt()
    return torch.where(sd >= 0.0, room / (sd + root), (root - sd) / dd)


def _next_radius(
    radius: Tensor, length: Tensor, slope: Tensor, predicted: Tensor, actual: Tensor
) -> Tensor:
    """Return the next radius by Lin and More's rules: the better the model was, the larger."""
    excess = -actual - slope
    alpha = torch.where(excess <= 0.0, SIGMA_3, (-0.5 * slope / excess).clamp_min(SIGMA_1))
    scaled, least, most = alpha * length, SIGMA_1 * radius, SIGMA_3 * radius
    shrunk = torch.minimum(scaled, SIGMA_2 * radius)
    grown = torch.minimum(scaled, most)
    fair = torch.maximum(least, torch.where(actual < ETA_1 * predicted, shrunk, grown))
    good = torch.where(actual < ETA_2 * predicted, fair, torch.maximum(radius, grown))
    return torch.where(actual < ETA_0 * predicted, shrunk, good)
