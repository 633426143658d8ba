"""The protocols that score an encoder: which rows are fitted, which are scored, and by what.

``blog`` fits the post's probe to a part of the test set and scores the rest. ``linear``, ``knn``
and ``finetune`` fit the training set; if it has no labels, they split the test set as ``blog``
does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastbyol.config import ViewsConfig
from fastbyol.errors import UsageError, check_choice
from fastbyol.evaluation.alpha import alpha_req
from fastbyol.evaluation.answers import Answers
from fastbyol.evaluation.features import agreeing_dtype, embed
from fastbyol.evaluation.finetune import Recipe, finetune, labels_of_each_class
from fastbyol.evaluation.knn import knn_votes
from fastbyol.evaluation.probe import (
    LinearClassifier,
    logistic_multinomial,
    logistic_one_vs_rest,
)
from fastbyol.evaluation.rank import effective_rank

PROTOCOLS = ("blog", "linear", "knn", "finetune")
# With more classes than these the top-5 accuracy is measured, too.
TOP = 5
NO_TOP = ("top5_accuracy", "top5_accuracy_low", "top5_accuracy_high")
BLOG_BATCH = 256


class LabelledImages(Protocol):
    """The result of ``data.loader.read_all``: uint8 (N, H, W, 3), int64 (N,) on the cpu or None.

    A negative label means no label; such rows are left out.
    """

    @property
    def images(self) -> Tensor: ...
    @property
    def labels(self) -> Tensor | None: ...
    @property
    def class_names(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class Embedded:
    """The embeddings to fit and to score, float32 (N, D), of ``rows`` under a protocol.

    ``classifier`` is ``finetune``'s, trained with the encoder. ``began``: when, by
    ``time.perf_counter``.
    """

    protocol: str
    rows: _Rows
    repeated: int | None
    fit: Tensor
    score: Tensor
    classifier: LinearClassifier | None
    began: float


@dataclass(frozen=True)
class _Rows:
    """The labelled images to fit and to score, and a description of their choice.

    ``names`` are those of labels.
    """

    fit_images: Tensor
    fit_labels: Tensor
    score_images: Tensor
    score_labels: Tensor
    split: str
    names: Mapping[int, str] = field(default_factory=dict)
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
    recipe: Recipe | None = None,
    labels: float = 1.0,
    note: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure the accuracy of ``encoder``, which is on ``device``, under ``protocol``.

    Images are embedded in ``dtype`` if that agrees with the encoder's own. ``recipe`` is
    ``finetune``'s, which trains a copy of the encoder and calls ``note`` with a line an epoch. The
    share ``labels`` of each class's images to fit is used, chosen by the recipe's seed.

    Accuracies are in percent, those that end in ``_low`` and ``_high`` the ends of their 95 %
    intervals. ``top5_accuracy`` is None for five classes or fewer, ``train_accuracy`` for ``knn``.
    ``classes`` has a row for each label among the scored images. ``num_classes`` counts the fitted
    rows' classes, ``num_repeated`` the scored images with the bytes of a fitted one (None within
    one set), ``notes`` say what makes the accuracy meaningless. ``rank`` is the scored embeddings'
    effective rank, ``alpha``, ``alpha_r2`` and ``alpha_range`` are their ``PowerLaw``. Raises
    UsageError for data that the protocol cannot use and FastbyolError for embeddings that are not
    finite.
    """
    recipe = recipe or Recipe()
    return score(
        embed_rows(
            protocol, encoder, test=test, train=train, views=views, device=device, dtype=dtype,
            recipe=recipe, labels=labels, note=note,
        )
    )  # fmt: skip


def embed_rows(
    protocol: str,
    encoder: nn.Module,
    *,
    test: LabelledImages,
    train: LabelledImages | None,
    views: ViewsConfig,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    recipe: Recipe | None = None,
    labels: float = 1.0,
    note: Callable[[str], None] = lambda _: None,
    embed: Callable[..., Tensor] = embed,
) -> Embedded:
    """Do the first half of ``evaluate``, with ``embed`` in place of ``features.embed``."""
    check_choice("protocol", protocol, PROTOCOLS)
    began = time.perf_counter()
    recipe, classifier = recipe or Recipe(), None
    rows = _choose(protocol, test, train)
    if labels != 1.0:
        rows = _with_labels(rows, labels, recipe.seed)
    repeated = _num_repeated(rows) if rows.from_two_sets else None
    if protocol == "finetune":
        images, targets = rows.fit_images, rows.fit_labels
        encoder, classifier = finetune(encoder, images, targets, views, recipe, note)
    dtype = agreeing_dtype(encoder, rows.fit_images, views, dtype, device=device)
    fit, score = (
        embed(encoder, images, views, device=device, dtype=dtype)
        for images in (rows.fit_images, rows.score_images)
    )
    return Embedded(protocol, rows, repeated, fit, score, classifier, began)


def score(embedded: Embedded) -> dict[str, Any]:
    """Do the second half of ``evaluate``: fit, score, and describe."""
    rows, repeated, fit, score = embedded.rows, embedded.repeated, embedded.fit, embedded.score
    answers, train_accuracy = _answers(embedded)
    top = answers.accuracy(TOP) if len(answers.classes) > TOP else None
    return {
        "protocol": embedded.protocol,
        **answers.accuracy().fields(),
        **(top.fields("top5_accuracy") if top else dict.fromkeys(NO_TOP)),
        "train_accuracy": train_accuracy,
        "num_train": len(fit),
        "num_test": len(score),
        "num_classes": len(answers.classes),
        "num_repeated": repeated,
        "notes": list(_notes(rows, repeated or 0)),
        "dim": fit.shape[1],
        "rank": effective_rank(score),
        **alpha_req(score).as_json(),
        "split": rows.split,
        "classes": answers.by_class(rows.names),
        "seconds": time.perf_counter() - embedded.began,
    }


def check(protocol: str, *, test: LabelledImages, train: LabelledImages | None) -> None:
    """Raise the UsageError that ``evaluate`` would raise for these data, before a long training."""
    check_choice("protocol", protocol, PROTOCOLS)
    _choose(protocol, test, train)


def split_rows(labels: Tensor) -> tuple[Tensor, Tensor, str]:
    """Split rows with ``labels`` (N,) into rows to fit and to score, int64, and describe the split.

    The post's code ran through the test set in batches of 256, dropped the last, incomplete one,
    fitted the first half of the rest and scored the second: of STL-10's 8,000 images rows 0..3967
    and 3968..7935. Sets under 512 images are kept whole. If one half would hold classes that the
    other lacks (files sorted by class), alternate rows of each class are taken instead.
    """
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
    return (
        even.nonzero()[:, 0],
        (~even).nonzero()[:, 0],
        "alternate rows of each class of the test set",
    )


def _answers(embedded: Embedded) -> tuple[Answers, float | None]:
    """Fit what is not fitted yet; return its answers and its accuracy on the fitted rows."""
    rows, fit, score = embedded.rows, embedded.fit, embedded.score
    labels = rows.score_labels.to(score.device)
    if embedded.protocol == "knn":
        votes, classes = knn_votes(fit, rows.fit_labels, score)
        return Answers(torch.where(votes > 0.0, votes, -torch.inf), classes, labels), None
    classifier = embedded.classifier
    if classifier is None:
        solve = logistic_one_vs_rest if embedded.protocol == "blog" else logistic_multinomial
        classifier = solve(fit, rows.fit_labels)
    answers = Answers(classifier.decision(score), classifier.classes, labels)
    return answers, classifier.score(fit, rows.fit_labels)


def _with_labels(rows: _Rows, share: float, seed: int) -> _Rows:
    """Return ``rows`` with ``share`` of those to fit, of each class."""
    kept = labels_of_each_class(rows.fit_labels, share, seed)
    return replace(
        rows, fit_images=_select(rows.fit_images, kept), fit_labels=rows.fit_labels[kept]
    )


def _notes(rows: _Rows, repeated: int) -> Iterator[str]:
    """Yield what makes the accuracy on ``rows`` meaningless, a line each."""
    total, classes = len(rows.score_labels), torch.unique(rows.score_labels)
    if len(classes) == 1:
        yield (
            f"the {total} scored images all have label {int(classes[0])}: accuracy says nothing "
            "of telling classes apart"
        )
    if unknown := int((~torch.isin(rows.score_labels, rows.fit_labels)).sum()):
        yield (
            f"{unknown} of {total} scored images have a label that no fitted image has: they "
            "can only be wrong"
        )
    if repeated:
        yield (
            f"{repeated} of {total} scored images are among those fitted: accuracy on them says "
            "nothing of images not seen"
        )


def _num_repeated(rows: _Rows) -> int:
    """Count the scored images that are among the fitted, by a hash of 64 bits of their pixels."""
    if rows.fit_images.shape[1:] != rows.score_images.shape[1:]:
        return 0
    fitted = {hash(image.tobytes()) for image in rows.fit_images.numpy()}
    return sum(hash(image.tobytes()) in fitted for image in rows.score_images.numpy())


def _choose(protocol: str, test: LabelledImages, train: LabelledImages | None) -> _Rows:
    """Choose the rows. Raises UsageError for too few of them or for a single class to fit."""
    rows = _chosen(protocol, test, train)
    if bool((rows.fit_labels == rows.fit_labels[0]).all()):
        what, flag = ("training", "--train-data") if rows.from_two_sets else ("test", "--test-data")
        raise UsageError(
            f"{what} data: the {len(rows.fit_labels)} images to fit the probe on all have label "
            f"{int(rows.fit_labels[0])}: "
            f"name a {what} set of two classes or more with {flag}"
        )
    return rows


def _chosen(protocol: str, test: LabelledImages, train: LabelledImages | None) -> _Rows:
    images, labels = labelled_rows(test, "test data")
    if not len(labels):
        raise UsageError(
            f"test data: no labelled images, and the {protocol} protocol scores against labels: "
            "name a labelled beton with --test-data"
        )
    if protocol != "blog" and train is not None:
        fit_images, fit_labels = labelled_rows(train, "training data")
        if len(fit_labels):
            numbers = _numbers(test.class_names, train.class_names)
            if numbers is not None:
                labels = _renumbered(labels, numbers, len(train.class_names))
            return _Rows(
                fit_images,
                fit_labels,
                images,
                labels,
                "training set and test set",
                dict(enumerate(train.class_names))
                | dict(zip(numbers or range(len(test.class_names)), test.class_names, strict=True)),
                from_two_sets=True,
            )
    fit, score, split = split_rows(labels)
    if not len(fit) or not len(score):
        raise UsageError(
            f"test data: {len(labels)} labelled images are too few to split in two, as no class "
            "has one to fit "
            "and one to score: name a larger set with --test-data"
        )
    names = dict(enumerate(test.class_names))
    return _Rows(
        _select(images, fit), labels[fit], _select(images, score), labels[score], split, names
    )


def _select(images: Tensor, rows: Tensor) -> Tensor:
    """Return ``images[rows]`` without a copy where the rows are consecutive."""
    first, count = int(rows[0]), len(rows)
    if torch.equal(rows, torch.arange(first, first + count)):
        return images[first : first + count]
    return images[rows.to(images.device)]


def _numbers(names: tuple[str, ...], fitted: tuple[str, ...]) -> list[int] | None:
    """Return the labels of classes ``names`` by the numbers of the ``fitted`` names.

    A folder that lacks a class numbers the others differently. Classes that were not fitted come
    after those that were. None for sets that share no name, which are compared by number.
    """
    if names == fitted or not set(names) & set(fitted):
        return None
    numbers = {name: number for number, name in enumerate(fitted)}
    return [numbers.get(name, len(fitted) + k) for k, name in enumerate(names)]


def _renumbered(labels: Tensor, numbers: list[int], num_fitted: int) -> Tensor:
    """Translate ``labels`` (N,) by ``numbers``; those beyond them come after all of them."""
    first, more = num_fitted + len(numbers), max(0, int(labels.max()) + 1 - len(numbers))
    return torch.tensor([*numbers, *range(first, first + more)])[labels]


def labelled_rows(data: LabelledImages, name: str) -> tuple[Tensor, Tensor]:
    """Return the rows whose label is not negative; none without labels."""
    images, labels = data.images, data.labels
    if labels is None:
        return images[:0], torch.empty(0, dtype=torch.int64)
    if len(labels) != len(images):
        raise UsageError(
            f"{name}: {len(images)} images but {len(labels)} labels: convert it again from a "
            "sound source"
        )
    labelled = labels >= 0
    return (images, labels) if bool(labelled.all()) else (images[labelled], labels[labelled])
