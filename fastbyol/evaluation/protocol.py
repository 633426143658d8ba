"""The three ways to put a number on an encoder: which rows are fitted, which are scored, and by what.

``blog``    the post's: one-vs-rest logistic regression within the test set. Its code ran through the test set in batches of
            256, dropped the last, incomplete one, fitted the first half of what was left and scored the second. For STL-10's
            8,000 images: 8000 // 256 * 256 = 7936 kept, rows 0..3967 fitted, rows 3968..7935 scored. Sets under 512 images
            are kept whole.
``linear``  multinomial logistic regression on standardised features, fitted on the training set and scored on the test set.
``knn``     weighted nearest neighbours of the test set in the training set.

Rows with a negative label are unlabelled and left out. Without a labelled training set, ``linear`` and ``knn`` split the test
set as ``blog`` does. Where one half would hold classes that the other does not (files sorted by class), the split takes
alternate rows of each class instead. ``split`` in the result says what was done.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastbyol.config import ViewsConfig
from fastbyol.errors import UsageError, check_choice
from fastbyol.evaluation.features import agreeing_dtype, embed
from fastbyol.evaluation.knn import knn_accuracy
from fastbyol.evaluation.probe import logistic_multinomial, logistic_one_vs_rest
from fastbyol.evaluation.rank import effective_rank

PROTOCOLS = ("blog", "linear", "knn")
BLOG_BATCH = 256


class LabelledImages(Protocol):
    """What ``data.loader.read_all`` returns: uint8 (N, H, W, 3) and int64 (N,) or None, on the CPU; names of the labels."""

    @property
    def images(self) -> Tensor: ...
    @property
    def labels(self) -> Tensor | None: ...
    @property
    def class_names(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class _Rows:
    """Labelled images to fit on, to score on, and how they were chosen."""

    fit_images: Tensor
    fit_labels: Tensor
    score_images: Tensor
    score_labels: Tensor
    split: str
    from_two_sets: bool = False


def evaluate(
    protocol: str,
    encoder: nn.Module,
    *,
    test: LabelledImages,
    train: LabelledImages | None,
    views: ViewsConfig,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Accuracy of ``encoder``, which is on ``device``, under ``protocol``; see the head of this file.

    Images are embedded in ``dtype`` where that agrees with the encoder's own (``features.agreeing_dtype``).

    Returns ``protocol``, ``accuracy`` and ``train_accuracy`` in percent (the latter None for ``knn``), ``num_train``,
    ``num_test``, ``num_classes`` (of the fitted rows), ``num_repeated`` (scored images that are among the fitted, same bytes;
    None within one set, where nobody looks), ``notes`` (lines on what keeps the accuracy from saying much), ``dim``, ``rank``
    (the effective rank of the scored rows' embeddings), ``split`` and ``seconds``. Raises UsageError for data that the
    protocol cannot use and FastbyolError for an encoder whose embeddings are not finite.
    """
    check_choice("protocol", protocol, PROTOCOLS)
    began = time.perf_counter()
    rows = _choose(protocol, test, train)
    repeated = _num_repeated(rows) if rows.from_two_sets else None
    dtype = agreeing_dtype(encoder, rows.fit_images, views, dtype, device=device)
    fit, score = (embed(encoder, images, views, device=device, dtype=dtype) for images in (rows.fit_images, rows.score_images))
    accuracy, train_accuracy = _accuracies(protocol, fit, rows.fit_labels, score, rows.score_labels)
    return {
        "protocol": protocol,
        "accuracy": accuracy,
        "train_accuracy": train_accuracy,
        "num_train": len(fit),
        "num_test": len(score),
        "num_classes": len(torch.unique(rows.fit_labels)),
        "num_repeated": repeated,
        "notes": list(_notes(rows, repeated or 0)),
        "dim": fit.shape[1],
        "rank": effective_rank(score),
        "split": rows.split,
        "seconds": time.perf_counter() - began,
    }


def check(protocol: str, *, test: LabelledImages, train: LabelledImages | None) -> None:
    """Raise the UsageError that ``evaluate`` would raise for these data, before an encoder was trained for nothing."""
    check_choice("protocol", protocol, PROTOCOLS)
    _choose(protocol, test, train)


def split_rows(labels: Tensor) -> tuple[Tensor, Tensor, str]:
    """Split rows with ``labels`` (N,) as the head of this file says: rows to fit, rows to score, int64, and a description."""
    total = len(labels)
    kept = total // BLOG_BATCH * BLOG_BATCH if total >= 2 * BLOG_BATCH else total
    half = kept // 2
    if torch.equal(torch.unique(labels[:half]), torch.unique(labels[half : 2 * half])):
        rows = torch.arange(2 * half)
        return rows[:half], rows[half:], "halves of the test set by row"
    order = labels.argsort(stable=True)
    counts = torch.unique(labels, return_counts=True)[1]
    rank = torch.empty_like(order)
    rank[order] = torch.cat([torch.arange(int(count)) for count in counts])
    even = rank % 2 == 0
    return even.nonzero()[:, 0], (~even).nonzero()[:, 0], "alternate rows of each class of the test set"


def _accuracies(protocol: str, fit: Tensor, fit_labels: Tensor, score: Tensor, labels: Tensor) -> tuple[float, float | None]:
    if protocol == "knn":
        return knn_accuracy(fit, fit_labels, score, labels), None
    classifier = (logistic_one_vs_rest if protocol == "blog" else logistic_multinomial)(fit, fit_labels)
    return classifier.score(score, labels), classifier.score(fit, fit_labels)


def _notes(rows: _Rows, repeated: int) -> Iterator[str]:
    """Yield what keeps the accuracy on ``rows`` from saying much, a line each."""
    total, classes = len(rows.score_labels), torch.unique(rows.score_labels)
    if len(classes) == 1:
        yield f"the {total} scored images all have label {int(classes[0])}: accuracy says nothing of telling classes apart"
    if unknown := int((~torch.isin(rows.score_labels, rows.fit_labels)).sum()):
        yield f"{unknown} of {total} scored images have a label that no fitted image has: they can only be wrong"
    if repeated:
        yield f"{repeated} of {total} scored images are among those fitted: accuracy on them says nothing of images not seen"


def _num_repeated(rows: _Rows) -> int:
    """How many of the scored images are among the fitted, by a hash of 64 bits of their pixels."""
    if rows.fit_images.shape[1:] != rows.score_images.shape[1:]:
        return 0
    fitted, scored = ([hash(image.tobytes()) for image in part.numpy()] for part in (rows.fit_images, rows.score_images))
    known = set(fitted)
    return sum(key in known for key in scored)


def _choose(protocol: str, test: LabelledImages, train: LabelledImages | None) -> _Rows:
    """Choose the rows. Raises UsageError where there are too few, or one class alone, of which any encoder is right."""
    rows = _chosen(protocol, test, train)
    if bool((rows.fit_labels == rows.fit_labels[0]).all()):
        what, flag = ("training", "--train-data") if rows.from_two_sets else ("test", "--test-data")
        raise UsageError(
            f"{what} data: the {len(rows.fit_labels)} images to fit the probe on all have label {int(rows.fit_labels[0])}: "
            f"name a {what} set of two classes or more with {flag}"
        )
    return rows


def _chosen(protocol: str, test: LabelledImages, train: LabelledImages | None) -> _Rows:
    images, labels = _labelled(test, "test data")
    if not len(labels):
        raise UsageError(
            f"test data: no labelled images, and the {protocol} protocol scores against labels: "
            "name a labelled beton with --test-data"
        )
    if protocol != "blog" and train is not None:
        fit_images, fit_labels = _labelled(train, "training data")
        if len(fit_labels):
            labels = _renumbered(labels, test.class_names, train.class_names)
            return _Rows(fit_images, fit_labels, images, labels, "training set and test set", from_two_sets=True)
    fit, score, split = split_rows(labels)
    if not len(fit) or not len(score):
        raise UsageError(
            f"test data: {len(labels)} labelled images are too few to split in two, as no class has one to fit "
            "and one to score: name a larger set with --test-data"
        )
    return _Rows(images[fit], labels[fit], images[score], labels[score], split)


def _renumbered(labels: Tensor, names: tuple[str, ...], fitted: tuple[str, ...]) -> Tensor:
    """``labels`` (N,) of classes ``names`` in the numbers of the ``fitted`` names: folders that lack a class count otherwise.

    Classes that are not among those fitted come after them. Where the sets share no name (one has none, or has numbers for
    names) numbers are all there is.
    """
    if names == fitted or not set(names) & set(fitted):
        return labels
    numbers = {name: number for number, name in enumerate(fitted)}
    highest = max(len(names), int(labels.max()) + 1)
    told = [numbers.get(name, len(fitted) + k) for k, name in enumerate(names)]
    return torch.tensor([*told, *range(len(fitted) + len(names), len(fitted) + highest)])[labels]


def _labelled(data: LabelledImages, name: str) -> tuple[Tensor, Tensor]:
    """The rows whose label is not negative; none where there are no labels."""
    images, labels = data.images, data.labels
    if labels is None:
        return images[:0], torch.empty(0, dtype=torch.int64)
    if len(labels) != len(images):
        raise UsageError(f"{name}: {len(images)} images but {len(labels)} labels: convert it again from a sound source")
    known = labels >= 0
    return (images, labels) if bool(known.all()) else (images[known], labels[known])
