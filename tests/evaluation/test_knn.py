"""Weighted nearest neighbours against a plain numpy account of the paper and scikit-learn's
classifier.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from fastbyol.errors import FastbyolError, UsageError
from fastbyol.evaluation import knn
from fastbyol.evaluation.knn import knn_votes


def knn_predict(bank: Tensor, labels: Tensor, queries: Tensor, **options: Any) -> Tensor:
    """The label with most votes; of equals the smallest."""
    votes, classes = knn_votes(bank, labels, queries, **options)
    return classes[votes.argmax(1)]


def clusters(seed: int, num: int, dim: int = 16, num_classes: int = 7) -> tuple[Tensor, Tensor]:
    g = np.random.default_rng(seed)
    centres, y = (
        np.random.default_rng(99).normal(size=(num_classes, dim)),
        g.integers(0, num_classes, num),
    )
    return torch.from_numpy(centres[y] + 1.5 * g.normal(size=(num, dim))), torch.from_numpy(y)


def written_out(
    bank: np.ndarray, labels: np.ndarray, queries: np.ndarray, k: int, temperature: float
) -> list[int]:
    """Predict by section 3.4 of the paper, one query at a time, in float64."""
    predicted = []
    for query in queries:
        cosine = bank @ query / np.linalg.norm(bank, axis=1) / np.linalg.norm(query)
        nearest = np.argsort(-cosine, kind="stable")[:k]
        votes = {
            c: sum(np.exp(cosine[i] / temperature) for i in nearest if labels[i] == c)
            for c in sorted(set(labels))
        }
        predicted.append(max(votes, key=lambda c: votes[c]))
    return predicted


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.1), (5, 0.07), (200, 0.1), (1000, 1.0)])
def test_is_the_paper(k: int, temperature: float) -> None:
    (bank, labels), (queries, _) = clusters(0, 300), clusters(1, 200)
    ours = knn_predict(bank, labels, queries, k=k, temperature=temperature)
    theirs = written_out(bank.numpy(), labels.numpy(), queries.numpy(), k, temperature)
    assert ours.tolist() == theirs


def test_is_scikit_learns() -> None:
    (bank, labels), (queries, query_labels) = clusters(2, 500), clusters(3, 300)
    model = KNeighborsClassifier(
        20, metric="cosine", weights=lambda distance: np.exp((1.0 - distance) / 0.1)
    )
    model.fit(bank.numpy(), labels.numpy())
    shares = model.predict_proba(queries.numpy())
    votes, classes = knn_votes(bank, labels, queries, k=20)
    assert classes.tolist() == model.classes_.tolist()
    np.testing.assert_allclose(votes / votes.sum(1, keepdim=True), shares, atol=1e-6)
    assert 0.4 < float((classes[votes.argmax(1)] == query_labels).double().mean()) < 0.95


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    (bank, labels), (queries, _) = clusters(4, 100), clusters(5, 64)
    whole = knn_predict(bank, labels, queries, k=10)
    monkeypatch.setattr(knn, "_CHUNK_ELEMENTS", 700)
    assert torch.equal(knn_predict(bank, labels, queries, k=10), whole)


@settings(max_examples=30)
@given(seed=st.integers(0, 2**31), factor=st.floats(1e-6, 1e6), k=st.integers(1, 60))
def test_lengths_and_names_do_not_matter(seed: int, factor: float, k: int) -> None:
    """Only directions count; a change of label names renames the prediction; a query's own row is
    its nearest.
    """
    bank, labels = clusters(seed, 50)
    predicted = knn_predict(bank, labels, bank, k=k)
    names = torch.tensor([40, 3, 17, 99, 0, 1, 60])
    order = names.argsort()
    monotone = torch.empty_like(names)
    monotone[order] = names[order].sort().values
    assert torch.equal(knn_predict(bank, monotone[labels], factor * bank, k=k), monotone[predicted])
    assert torch.equal(knn_predict(bank, labels, bank, k=1), labels)


def test_a_small_temperature_does_not_overflow() -> None:
    bank, labels = clusters(6, 50)
    assert torch.equal(knn_predict(bank, labels, bank, k=50, temperature=1e-4), labels)


def test_rows_of_zeros_are_near_nothing() -> None:
    bank, labels = torch.tensor([[1.0, 0.0], [0.0, 0.0], [-1.0, 0.0]]), torch.tensor([2, 1, 0])
    assert knn_predict(bank, labels, torch.tensor([[3.0, 0.0], [-3.0, 0.1]])).tolist() == [2, 0]


def test_refuses_what_is_not_finite_or_not_there() -> None:
    bank, labels = clusters(7, 20)
    bad = bank.clone()
    bad[4, 2] = float("nan")
    for pair in ((bad, bank), (bank, bad)):
        with pytest.raises(FastbyolError, match="1 of 20 rows"):
            knn_predict(pair[0], labels, pair[1])
    with pytest.raises(UsageError, match="labelled images"):
        knn_predict(bank[:0], labels[:0], bank)
