"""The rows that each protocol fits and scores, its results and its errors."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fastbyol import views as view_ops
from fastbyol.config import ViewsConfig
from fastbyol.errors import FastbyolError, UsageError
from fastbyol.evaluation.features import embed
from fastbyol.evaluation.knn import knn_votes
from fastbyol.evaluation.probe import logistic_multinomial, logistic_one_vs_rest
from fastbyol.evaluation.protocol import PROTOCOLS, check, embed_rows, evaluate, split_rows

VIEWS = ViewsConfig(size=8, blur_kernel=3)
KEYS = {
    "protocol",
    "accuracy",
    "accuracy_low",
    "accuracy_high",
    "top5_accuracy",
    "top5_accuracy_low",
    "top5_accuracy_high",
    "train_accuracy",
    "num_train",
    "num_test",
    "num_classes",
    "num_repeated",
    "notes",
    "dim",
    "rank",
    "alpha",
    "alpha_r2",
    "alpha_range",
    "split",
    "classes",
    "seconds",
}


class Images(NamedTuple):
    images: Tensor
    labels: Tensor | None
    class_names: tuple[str, ...] = ()


def labelled(num: int, seed: int, num_classes: int = 5) -> Images:
    """Draw noise whose mean colour hints at the class."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (num,), generator=g)
    colours = torch.randint(60, 196, (num_classes, 3), generator=torch.Generator().manual_seed(7))
    noise = 60.0 * torch.randn(num, 1, 1, 3, generator=g) + 20.0 * torch.randn(
        num, 8, 8, 3, generator=g
    )
    return Images((colours[labels][:, None, None] + noise).clamp(0, 255).to(torch.uint8), labels)


@pytest.fixture
def encoder() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def features(encoder: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = encoder(view_ops.plain(images, VIEWS))
    return out


class TestHalves:
    @pytest.mark.parametrize(
        ("total", "half"),
        [
            (8000, 3968),
            (7936, 3968),
            (2048, 1024),
            (2049, 1024),
            (1023, 384),
            (512, 256),
            (511, 255),
            (50, 25),
            (3, 1),
        ],
    )
    def test_the_posts_arithmetic(self, total: int, half: int) -> None:
        """8,000 is STL-10's test split: rows 0..3967 and 3968..7935."""
        fit, score, split = split_rows(torch.zeros(total, dtype=torch.int64))
        assert fit.tolist() == list(range(half))
        assert score.tolist() == list(range(half, 2 * half))
        assert split == "halves of the test set by row"

    def test_files_sorted_by_class_are_split_within_classes(self) -> None:
        fit, score, split = split_rows(torch.arange(10).repeat_interleave(60))
        assert fit.tolist() == list(range(0, 600, 2))
        assert score.tolist() == list(range(1, 600, 2))
        assert split == "alternate rows of each class of the test set"

    @settings(max_examples=200)
    @given(labels=st.lists(st.integers(0, 4), max_size=40))
    def test_never_shares_a_row_nor_scores_a_class_it_has_not_seen(self, labels: list[int]) -> None:
        y = torch.tensor(labels, dtype=torch.int64)
        fit, score, _ = split_rows(y)
        assert not set(fit.tolist()) & set(score.tolist())
        assert set(y[score].tolist()) <= set(y[fit].tolist())
        assert len(fit) >= len(score)


class TestEvaluate:
    def test_blog_is_the_one_vs_rest_probe_within_the_test_set(self, encoder: nn.Module) -> None:
        test = labelled(800, 0)
        result = evaluate(
            "blog", encoder, test=test, train=labelled(50, 1), views=VIEWS, device="cpu"
        )
        x, y = features(encoder, test.images), test.labels
        classifier = logistic_one_vs_rest(x[:384], y[:384])
        # 800 // 256 * 256 = 768. One row of rounding.
        assert result["accuracy"] == pytest.approx(
            classifier.score(x[384:768], y[384:768]), abs=0.3
        )
        assert result["train_accuracy"] == pytest.approx(
            classifier.score(x[:384], y[:384]), abs=0.3
        )
        assert 25.0 < result["accuracy"] < 100.0
        assert set(result) == KEYS
        assert (result["protocol"], result["num_train"], result["num_test"]) == ("blog", 384, 384)
        assert (result["num_classes"], result["dim"]) == (5, 12)
        assert result["seconds"] > 0.0

    def test_linear_fits_on_train_and_scores_on_test(self, encoder: nn.Module) -> None:
        train, test = labelled(300, 2), labelled(200, 3)
        result = evaluate("linear", encoder, test=test, train=train, views=VIEWS, device="cpu")
        x, y = features(encoder, train.images), train.labels
        classifier = logistic_multinomial(x, y)
        assert result["accuracy"] == pytest.approx(
            classifier.score(features(encoder, test.images), test.labels), abs=0.51
        )
        assert result["train_accuracy"] == pytest.approx(classifier.score(x, y), abs=0.34)
        assert (result["num_train"], result["num_test"]) == (300, 200)
        assert result["split"] == "training set and test set"

    def test_knn(self, encoder: nn.Module) -> None:
        train, test = labelled(300, 2), labelled(200, 3)
        result = evaluate("knn", encoder, test=test, train=train, views=VIEWS, device="cpu")
        votes, classes = knn_votes(
            features(encoder, train.images), train.labels, features(encoder, test.images)
        )
        expected = 100.0 * (classes[votes.argmax(1)] == test.labels).double().mean()
        assert result["accuracy"] == pytest.approx(float(expected), abs=0.51)
        assert result["train_accuracy"] is None
        assert set(result) == KEYS

    @pytest.mark.parametrize("protocol", ["linear", "knn"])
    @pytest.mark.parametrize(
        "unlabelled",
        [
            None,
            Images(labelled(40, 4).images, None),
            Images(labelled(40, 4).images, -torch.ones(40).long()),
        ],
    )
    def test_without_a_labelled_training_set_the_test_set_is_split(
        self, encoder: nn.Module, protocol: str, unlabelled: Images | None
    ) -> None:
        result = evaluate(
            protocol, encoder, test=labelled(200, 3), train=unlabelled, views=VIEWS, device="cpu"
        )
        assert (result["num_train"], result["num_test"]) == (100, 100)
        assert result["split"] == "halves of the test set by row"

    @pytest.mark.parametrize("protocol", PROTOCOLS)
    def test_unlabelled_rows_are_left_out(self, encoder: nn.Module, protocol: str) -> None:
        train, test = labelled(120, 5), labelled(100, 6)
        expected = evaluate(protocol, encoder, test=test, train=train, views=VIEWS, device="cpu")
        actual = evaluate(
            protocol, encoder, test=diluted(test), train=diluted(train), views=VIEWS, device="cpu"
        )
        del expected["seconds"], actual["seconds"]
        assert actual == expected

    @pytest.mark.parametrize("protocol", PROTOCOLS)
    @pytest.mark.parametrize("labels", [None, -torch.ones(60, dtype=torch.int64)])
    def test_refuses_a_test_set_without_labels(
        self, encoder: nn.Module, protocol: str, labels: Tensor | None
    ) -> None:
        test = Images(labelled(60, 0).images, labels)
        with pytest.raises(UsageError, match="--test-data"):
            evaluate(protocol, encoder, test=test, train=labelled(60, 1), views=VIEWS, device="cpu")

    def test_refuses_what_cannot_be_fitted(self, encoder: nn.Module) -> None:
        def run(test: Images) -> None:
            evaluate("blog", encoder, test=test, train=None, views=VIEWS, device="cpu")

        one_class = labelled(60, 0)
        with pytest.raises(
            UsageError, match=r"30 images to fit the probe on all have label 4.*--test-data"
        ):
            run(Images(one_class.images, torch.full((60,), 4)))
        with pytest.raises(UsageError, match="60 images but 59 labels"):
            run(Images(one_class.images, torch.zeros(59, dtype=torch.int64)))
        with pytest.raises(UsageError, match="1 labelled images are too few"):
            run(Images(one_class.images[:1], torch.zeros(1, dtype=torch.int64)))
        with pytest.raises(UsageError, match="'svm' is none of blog, linear, knn, finetune"):
            evaluate("svm", encoder, test=one_class, train=None, views=VIEWS, device="cpu")

    @pytest.mark.parametrize("protocol", PROTOCOLS)
    def test_a_diverged_encoder_is_an_error(self, encoder: nn.Module, protocol: str) -> None:
        next(encoder.parameters()).data[0] = float("nan")
        with pytest.raises(FastbyolError, match="diverged"):
            evaluate(protocol, encoder, test=labelled(60, 0), train=None, views=VIEWS, device="cpu")


class TestNotes:
    """Conditions that make an accuracy meaningless: an error or a note."""

    @pytest.mark.parametrize("protocol", PROTOCOLS)
    def test_one_class_to_fit_on_is_refused(self, encoder: nn.Module, protocol: str) -> None:
        """knn gave 100 % for it."""
        images = labelled(60, 0).images
        one = Images(images, torch.full((60,), 2))
        with pytest.raises(
            UsageError, match=r"30 images to fit the probe on all have label 2.*--test-data"
        ):
            evaluate(protocol, encoder, test=one, train=None, views=VIEWS, device="cpu")
        if protocol != "blog":
            with pytest.raises(UsageError, match=r"training data: the 60 images.*--train-data"):
                evaluate(
                    protocol, encoder, test=labelled(40, 1), train=one, views=VIEWS, device="cpu"
                )

    @pytest.mark.parametrize("protocol", ["linear", "knn"])
    def test_one_class_to_score_unknown_labels_and_repeated_images_give_notes(
        self, encoder: nn.Module, protocol: str
    ) -> None:
        train = labelled(60, 0)

        def notes(test: Images) -> tuple[int, list[str]]:
            result = evaluate(protocol, encoder, test=test, train=train, views=VIEWS, device="cpu")
            return result["num_repeated"], result["notes"]

        assert notes(labelled(40, 1)) == (0, [])
        fresh = labelled(40, 1)
        (one,) = notes(Images(fresh.images, torch.full((40,), 2)))[1]
        assert "40 scored images all have label 2" in one
        (unknown,) = notes(Images(fresh.images, torch.arange(40) % 8))[1]
        assert "15 of 40 scored images have a label that no fitted image has" in unknown
        assert notes(train) == (
            60,
            [
                "60 of 60 scored images are among those fitted: accuracy on them says nothing of "
                "images not seen"
            ],
        )
        assert train.labels is not None
        assert fresh.labels is not None
        some = Images(
            torch.cat((fresh.images, train.images[5:12])),
            torch.cat((fresh.labels, train.labels[5:12])),
        )
        assert notes(some)[0] == 7

    def test_parts_of_one_set_are_not_searched_for_repeats(self, encoder: nn.Module) -> None:
        result = evaluate(
            "knn", encoder, test=labelled(60, 0), train=None, views=VIEWS, device="cpu"
        )
        assert (result["num_repeated"], result["notes"]) == (None, [])


def diluted(data: Images) -> Images:
    """Put an unlabelled row after every labelled one, as in STL-10's train+unlabeled."""
    labels = torch.stack((data.labels, torch.full_like(data.labels, -1)), dim=1).flatten()
    return Images(data.images.repeat_interleave(2, 0), labels)


def test_check_refuses_what_evaluate_would() -> None:
    images = torch.zeros(8, 4, 4, 3, dtype=torch.uint8)
    check("blog", test=Images(images, torch.arange(8) % 2), train=None)
    with pytest.raises(UsageError, match="too few to split"):
        check("blog", test=Images(images, torch.arange(8)), train=None)
    with pytest.raises(UsageError, match="all have label 3"):
        check("blog", test=Images(images, torch.full((8,), 3)), train=None)
    with pytest.raises(UsageError, match="label"):
        check("blog", test=Images(images, None), train=None)


NAMES = ("ant", "bee", "cow", "dog", "eel")


@given(st.sets(st.sampled_from(NAMES), min_size=2), st.sampled_from(("knn", "linear")))
@settings(max_examples=12)
def test_classes_are_matched_by_name(kept: set[str], name: str) -> None:
    """A test set that lacks classes numbers those it has from 0: its accuracy is that of the
    numbers of the training set.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = nn.Sequential(
            nn.Conv2d(3, 12, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
    train, test = labelled(200, 1), labelled(120, 2)
    rows = torch.tensor([NAMES[int(label)] in kept for label in test.labels])
    some = Images(test.images[rows], test.labels[rows])
    own = tuple(sorted(kept))
    renumbered = torch.tensor([own.index(NAMES[int(label)]) for label in some.labels])
    wanted, got = (
        evaluate(
            name, encoder, test=scored, train=Images(*train[:2], NAMES), views=VIEWS, device="cpu"
        )
        for scored in (some, Images(some.images, renumbered, own))
    )
    assert got["accuracy"] == wanted["accuracy"]
    assert got["notes"] == wanted["notes"]


def test_a_class_of_the_test_set_alone_can_only_be_wrong_and_gives_a_note(
    encoder: nn.Module,
) -> None:
    train, test = labelled(200, 1, 4), labelled(120, 2)
    result = evaluate(
        "knn", encoder, test=Images(*test[:2], ("fox", *NAMES[1:4], "gnu")),
        train=Images(*train[:2], NAMES[:4]),
        views=VIEWS, device="cpu",
    )  # fmt: skip
    alone = int(((test.labels == 0) | (test.labels == 4)).sum())
    assert any(
        f"{alone} of 120 scored images have a label that no fitted image has" in note
        for note in result["notes"]
    )


def test_numbers_for_names_are_numbers(encoder: nn.Module) -> None:
    """An idx folder's classes are called 0, 1 and so on: against real names their numbers count."""
    train, test = labelled(200, 1), labelled(120, 2)
    digits = tuple(map(str, range(5)))
    plain, named = (
        evaluate(
            "knn",
            encoder,
            test=Images(*test[:2], names),
            train=Images(*train[:2], NAMES),
            views=VIEWS,
            device="cpu",
        )
        for names in ((), digits)
    )
    assert named["accuracy"] == plain["accuracy"]


@pytest.mark.parametrize("in_order", [True, False])
def test_halves_of_the_test_set_are_embedded_where_they_lie(
    encoder: nn.Module, in_order: bool
) -> None:
    """Not a byte is copied before a batch; alternate rows of a file sorted by class are chosen."""
    test = labelled(600, seed=3)
    assert test.labels is not None
    if not in_order:
        by_class = test.labels.argsort(stable=True)
        test = Images(test.images[by_class], test.labels[by_class])
        assert test.labels is not None
    seen: list[Tensor] = []

    def watching(encoder: nn.Module, images: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(images)
        return embed(encoder, images, *args, **kwargs)

    embed_rows("blog", encoder, test=test, train=None, views=VIEWS, device="cpu", embed=watching)
    lies_within = [
        images.untyped_storage().data_ptr() == test.images.untyped_storage().data_ptr()
        for images in seen
    ]
    assert lies_within == [in_order] * 2
    for images, rows in zip(seen, split_rows(test.labels), strict=False):
        assert torch.equal(images, test.images[rows])
