"""Linear probes: the post's one-vs-rest logistic regression, and a multinomial one.

Both fit in float64: 3,968 x 512 features in .16 s on one core, for which liblinear takes .76 s.
Letters: N samples, D features, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastbyol.errors import UsageError
from fastbyol.evaluation.features import check_finite
from fastbyol.evaluation.trust_region import Problem, Sigmoid, Softmax, minimise, minimise_whitened

# liblinear's default for primal solvers, as scikit-learn passes it: LogisticRegression(tol=1e-4).
LIBLINEAR_TOLERANCE = 1e-4
# Work, in products with X times its N x D elements, after which a fit is finished in whitened
# coordinates. Ordinary features of 5,000 x 512 take 5 to 300 products of 780; with norms in the
# thousands liblinear takes minutes.
MAX_ELEMENTS = 2e9
# |dF/dW| in whitened features, over its length at the start. Accuracies at 1e-4 and 1e-8 differ by
# at most .02 points on eleven synthetic sets (5,000 x 512); at 1e-3 by .04.
MULTINOMIAL_TOLERANCE = 1e-4


@dataclass(frozen=True)
class LinearClassifier:
    """A classifier by the largest of ((x - shift) / scale) weights' + bias, the first of equals.

    ``weights`` (K, D), ``bias`` (K,), ``shift`` and ``scale`` (D,) are float64, ``classes`` (K,)
    the labels, int64, ascending. ``converged``: the solver met its tolerance.
    """

    weights: Tensor
    bias: Tensor
    shift: Tensor
    scale: Tensor
    classes: Tensor
    converged: bool

    def decision(self, x: Tensor) -> Tensor:
        """Return float64 decision values (N, K) of features (N, D).

        Raises FastbyolError for features that are not finite.
        """
        check_finite(x)
        return ((x.double() - self.shift) / self.scale) @ self.weights.T + self.bias

    def predict(self, x: Tensor) -> Tensor:
        """Return the labels, int64 (N,), of features (N, D)."""
        return self.classes[self.decision(x).argmax(1)]

    def score(self, x: Tensor, y: Tensor) -> float:
        """Return the accuracy in percent on features (N, D) with labels ``y`` (N,)."""
        return 100.0 * float((self.predict(x) == y.to(self.classes)).double().mean())


def logistic_one_vs_rest(
    x: Tensor, y: Tensor, *, c: float = 1.0, tolerance: float = LIBLINEAR_TOLERANCE
) -> LinearClassifier:
    """Fit the post's probe, one-vs-rest LogisticRegression(solver="liblinear", C=c).

    Per class, on unscaled features ``x`` (N, D) with integer labels ``y`` (N,): min 1/2 (|w|^2 +
    b^2) + c sum log(1 + exp(-s (w x + b))), s = 1 for the class, else -1; the intercept is
    penalised like a weight (intercept_scaling = 1). Two classes are one problem. Iterates and so
    the result of stopping early are liblinear's, whose tolerance on the gradient is ``tolerance`` x
    min(positives, negatives) / N of its length at the start.

    Raises FastbyolError for features that are not finite, UsageError for fewer than two classes.
    """
    classes, targets = _targets(x, y)
    targets = targets[1:] if len(targets) == 2 else targets
    ones = torch.ones(x.shape[1] + 1, dtype=torch.float64, device=x.device)
    problem = Problem(_with_ones(x.double()), Sigmoid(targets), penalty=ones, c=c)
    positives = targets.sum(1, keepdim=True)
    limit = tolerance * torch.minimum(positives, len(x) - positives).clamp_min(1.0) / len(x)
    initial = ones.new_zeros(len(targets), len(ones))
    solution = minimise(
        problem, initial, limit, max_products=max(20, int(MAX_ELEMENTS / problem.x.numel()))
    )
    if not solution.converged:
        solution = minimise_whitened(problem, solution.weights, limit)
    return _classifier(
        solution.weights, ones.new_zeros(x.shape[1]), ones[:-1], classes, solution.converged
    )


def logistic_multinomial(
    x: Tensor, y: Tensor, *, c: float = 1.0, tolerance: float = MULTINOMIAL_TOLERANCE
) -> LinearClassifier:
    """Fit multinomial logistic regression on features of mean 0 and variance 1 over ``x``.

    min c sum cross-entropy(W x + b) + 1/2 |W|^2 with a free intercept, which is scikit-learn's
    make_pipeline(StandardScaler(), LogisticRegression(C=c)); two classes are one sigmoid there,
    too. Arguments and errors are those of ``logistic_one_vs_rest``.
    """
    classes, targets = _targets(x, y)
    shift, scale = _standardisation(x.double())
    targets = targets[1:] if len(targets) == 2 else targets
    loss = Sigmoid(targets) if len(targets) == 1 else Softmax(targets)
    penalty = torch.ones(x.shape[1] + 1, dtype=torch.float64, device=x.device)
    penalty[-1] = 0.0
    problem = Problem(_with_ones((x.double() - shift) / scale), loss, penalty, c)
    solution = minimise_whitened(
        problem, penalty.new_zeros(len(targets), len(penalty)), penalty.new_full((1, 1), tolerance)
    )
    return _classifier(solution.weights, shift, scale, classes, solution.converged)


def linear_head(head: nn.Linear, classes: Tensor) -> LinearClassifier:
    """Return a trained layer as the classifier of ``classes`` (K,), ascending int64 labels."""
    weights, bias = head.weight.detach().double(), head.bias.detach().double()
    ones = weights.new_ones(head.in_features)
    return LinearClassifier(
        weights, bias, torch.zeros_like(ones), ones, classes.to(weights.device), converged=True
    )


def _targets(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the labels that occur, int64 (K,), and one-hot rows, float64 (K, N).

    Raises as ``logistic_one_vs_rest`` says.
    """
    if x.ndim != 2 or y.shape != x.shape[:1]:
        raise ValueError(
            f"features must be (N, D) and labels (N,), got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    check_finite(x)
    classes, index = torch.unique(y.to(x.device, torch.int64), return_inverse=True)
    if len(classes) < 2:
        present = f"only class {int(classes[0])}" if len(classes) else "no samples"
        raise UsageError(
            f"labels: a probe needs at least two classes to tell apart, found {present}: give it "
            "more labelled images"
        )
    return classes, (index == torch.arange(len(classes), device=x.device)[:, None]).double()


def _standardisation(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation (D,) of x (N, D), 1 if rounding explains a feature's."""
    mean = x.mean(0)
    std = x.std(0, correction=0)
    rounding = len(x) * torch.finfo(x.dtype).eps * mean.abs()
    return mean, torch.where(std > rounding, std, 1.0)


def _with_ones(x: Tensor) -> Tensor:
    return torch.cat((x, x.new_ones(len(x), 1)), dim=1)


def _classifier(
    weights: Tensor, shift: Tensor, scale: Tensor, classes: Tensor, converged: bool
) -> LinearClassifier:
    """Split off the intercept. A single row gets a row of zeros, whose decision value is 0."""
    if len(weights) == 1:
        weights = torch.cat((torch.zeros_like(weights), weights))
    return LinearClassifier(weights[:, :-1], weights[:, -1], shift, scale, classes, converged)
