"""What a classifier answered on images with labels: accuracy, top-5, and class by class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastbyol.evaluation.intervals import Accuracy


@dataclass(frozen=True)
class Answers:
    """The ``values`` (M, K), the larger the likelier, of ``classes`` (K,) for M images.

    ``classes`` are ascending labels and ``labels`` (M,) the true ones, all int64 on one device. A
    class whose value is -inf is no answer.
    """

    values: Tensor
    classes: Tensor
    labels: Tensor

    def predicted(self) -> Tensor:
        """Return the labels (M,) of the largest values, of equals the smallest."""
        return self.classes[self.values.argmax(1)]

    def right(self, k: int) -> Tensor:
        """Return whether the true label is among the ``k`` largest values, bool (M,).

        Of equal values those of the smaller labels count as larger.
        """
        column = torch.searchsorted(self.classes, self.labels).clamp_max(len(self.classes) - 1)
        own = self.values.gather(1, column[:, None])
        is_before = torch.arange(len(self.classes), device=column.device) < column[:, None]
        better = (self.values > own) | ((self.values == own) & is_before)
        is_answer = (self.classes[column] == self.labels) & (own[:, 0] > -torch.inf)
        return is_answer & (better.sum(1) < k)

    def accuracy(self, k: int = 1) -> Accuracy:
        """Return the top-``k`` accuracy."""
        return Accuracy(100.0 * float(self.right(k).double().mean()), len(self.labels))

    def by_class(self, names: Mapping[int, str]) -> list[dict[str, Any]]:
        """Return a row a label: how many images, accuracy, and what it is mostly mistaken for.

        ``names`` of labels may lack some. Of labels that are mistaken for as often the smallest
        is named.
        """
        predicted, rows = self.predicted(), []
        for label in torch.unique(self.labels).tolist():
            answers = predicted[self.labels == label]
            wrong, counts = torch.unique(answers[answers != label], return_counts=True)
            most = int(counts.argmax()) if len(wrong) else None
            right = Accuracy(100.0 * (1.0 - int(counts.sum()) / len(answers)), len(answers))
            rows.append(
                {
                    "label": label,
                    "name": _name(names, label),
                    "num_test": len(answers),
                    **right.fields(),
                    "mistaken_for": None if most is None else _name(names, int(wrong[most])),
                    "num_mistaken": 0 if most is None else int(counts[most]),
                }
            )
        return rows


def _name(names: Mapping[int, str], label: int) -> str:
    return names.get(label, str(label))
