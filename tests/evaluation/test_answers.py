"""Accuracy, top-k and the table of classes, against scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix, recall_score, top_k_accuracy_score

from fastbyol.evaluation.answers import Answers
from fastbyol.evaluation.intervals import wilson

CLASSES = torch.tensor([2, 3, 5, 7, 11, 13, 17, 19])


def drawn(seed: int, *, levels: int | None = None, num: int = 200) -> Answers:
    """Answers with values that hint at the true label; of ``levels`` whole numbers, many equal."""
    g = torch.Generator().manual_seed(seed)
    column = torch.randint(len(CLASSES), (num,), generator=g)
    values = torch.randn(num, len(CLASSES), generator=g, dtype=torch.float64)
    values[torch.arange(num), column] += 1.0
    if levels is not None:
        values = (values * levels).round() / levels
    return Answers(values, CLASSES, CLASSES[column])


@given(seed=st.integers(0, 2**31), k=st.integers(1, 7))
def test_top_k_is_scikit_learns(seed: int, k: int) -> None:
    answers = drawn(seed)
    theirs = top_k_accuracy_score(answers.labels, answers.values, k=k, labels=CLASSES)
    assert answers.accuracy(k).percent == pytest.approx(100.0 * theirs)


@given(seed=st.integers(0, 2**31), k=st.integers(1, 7), levels=st.integers(1, 2))
def test_of_equal_values_the_smaller_label_comes_first(seed: int, k: int, levels: int) -> None:
    """Scikit-learn takes the larger one first: the same with the columns turned round."""
    answers = drawn(seed, levels=levels)
    column = len(CLASSES) - 1 - torch.searchsorted(CLASSES, answers.labels)
    theirs = top_k_accuracy_score(column, answers.values.flip(1), k=k, labels=range(len(CLASSES)))
    assert answers.accuracy(k).percent == pytest.approx(100.0 * theirs)
    right = (answers.predicted() == answers.labels).double().mean()
    assert answers.accuracy().percent == pytest.approx(100.0 * float(right))


def test_no_vote_is_no_answer_and_a_label_without_a_class_is_wrong() -> None:
    values = torch.tensor([[0.3, -torch.inf, 0.7], [-torch.inf, -torch.inf, 1.0], [3.0, 2.0, 1.0]])
    answers = Answers(values, torch.tensor([0, 1, 4]), torch.tensor([1, 4, 2]))
    assert answers.right(3).tolist() == [False, True, False]
    # A label beyond the last class, too.
    assert (
        Answers(values, torch.tensor([0, 1, 4]), torch.tensor([9, 9, 9])).accuracy(3).percent == 0
    )


@given(seed=st.integers(0, 2**31))
def test_classes_are_the_rows_of_scikit_learns_confusion_matrix(seed: int) -> None:
    answers = drawn(seed, num=60)
    names = {2: "two", 3: "three"}
    y, predicted = answers.labels.numpy(), answers.predicted().numpy()
    matrix = confusion_matrix(y, predicted, labels=CLASSES)
    recall = recall_score(y, predicted, labels=CLASSES, average=None, zero_division=0.0)
    rows = {row["label"]: row for row in answers.by_class(names)}
    assert list(rows) == sorted(set(y.tolist()))
    for k, label in enumerate(CLASSES.tolist()):
        if label not in rows:
            assert matrix[k].sum() == 0
            continue
        row = rows[label]
        assert row["name"] == names.get(label, str(label))
        assert row["num_test"] == matrix[k].sum()
        assert row["accuracy"] == pytest.approx(100.0 * recall[k])
        ends = [100.0 * end for end in wilson(int(matrix[k, k]), int(matrix[k].sum()))]
        assert [row["accuracy_low"], row["accuracy_high"]] == pytest.approx(ends)
        wrong = np.where(np.arange(len(CLASSES)) == k, 0, matrix[k])
        most = int(CLASSES[int(wrong.argmax())]) if wrong.max() else None
        assert row["num_mistaken"] == wrong.max()
        assert row["mistaken_for"] == (None if most is None else names.get(most, str(most)))
