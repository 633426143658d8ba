"""The data for the test of the marker: they hold what packages carry, or follow a formula."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib import cbook
from numpy.lib.stride_tricks import sliding_window_view
from sklearn.datasets import load_digits, load_sample_images

from fastbyol.data.loader import read_all
from fastbyol.errors import UsageError
from fastbyol_bench import marker_data
from fastbyol_bench.marker_data import EXPONENTS, KINDS, Labelled, coloured_noise

MADE = ("digits", "textures", "noise", "photographs", "terrain")


@pytest.fixture(scope="module")
def parts() -> dict[str, tuple[Labelled, Labelled]]:
    return {kind: (KINDS[kind](test=False), KINDS[kind](test=True)) for kind in MADE}


@pytest.mark.parametrize("kind", MADE)
def test_are_the_same_each_time_full_of_contrast_and_balanced(
    parts: dict[str, tuple[Labelled, Labelled]], kind: str
) -> None:
    again = KINDS[kind](test=True)
    np.testing.assert_array_equal(again.images, parts[kind][1].images)
    np.testing.assert_array_equal(again.labels, parts[kind][1].labels)
    for made, least in zip(parts[kind], (1285 if kind == "digits" else 4096, 512), strict=True):
        assert made.images.shape == (len(made.labels), 32, 32, 3)
        assert made.images.dtype == np.uint8
        assert least <= len(made.labels) < least + 18  # the same number of every class
        counts = np.bincount(made.labels)
        assert counts.max() - counts.min() <= (0.03 * least if kind == "digits" else 1)
        assert np.ptp(made.images) > 150
        assert len(np.unique(made.images.reshape(len(made.images), -1), axis=0)) > 0.99 * least
    assert parts[kind][0].labels.max() == parts[kind][1].labels.max()


def test_digits_are_those_of_sklearn_each_once(
    parts: dict[str, tuple[Labelled, Labelled]],
) -> None:
    """By undoing the scaling: least squares with the matrix of a bilinear interpolation."""
    centres = np.clip((np.arange(32) + 0.5) / 4 - 0.5, 0, 7)
    enlarge = np.maximum(0, 1 - np.abs(centres[:, None] - np.arange(8)))
    shrink = np.linalg.pinv(enlarge)
    made = [np.concatenate(arrays) for arrays in zip(*parts["digits"], strict=True)]
    images = made[0].astype(np.float64)
    np.testing.assert_array_equal(images[..., 0], images[..., 2])
    small = np.round(shrink @ images[..., 0] @ shrink.T * 16 / 255)
    own = np.column_stack([small.reshape(len(small), 64), made[1]])
    loaded = load_digits()
    theirs = np.column_stack([loaded.data, loaded.target])
    np.testing.assert_array_equal(own[np.lexsort(own.T)], theirs[np.lexsort(theirs.T)])


def corner(picture: np.ndarray, patch: np.ndarray) -> tuple[int, int] | None:
    """Where ``patch`` (32, 32, 3) lies in ``picture``, or None."""
    starts = np.argwhere((picture[:-31, :-31] == patch[0, 0]).all(axis=2))
    windows = sliding_window_view(picture, (32, 32, 3))[:, :, 0]
    return next(((r, c) for r, c in starts if np.array_equal(windows[r, c], patch)), None)


def test_patches_are_of_their_photograph_and_apart_from_the_test(
    parts: dict[str, tuple[Labelled, Labelled]],
) -> None:
    flower = load_sample_images().images[1]
    height, width = flower.shape[0] // 2, flower.shape[1] // 3
    wall = width - width // 3
    cells = [0, 0]
    for test, made in enumerate(parts["photographs"]):
        for label in (6, 11):  # the first and the last cell of the second picture
            rows = made.images[made.labels == label]
            places = [found for patch in rows[:15] if (found := corner(flower, patch))]
            top, left = (0, 0) if label == 6 else (height, 2 * width)
            for r, c in places:
                assert top <= r <= top + height - 32
                inside = (wall, width) if test else (0, wall)
                assert left + inside[0] <= c <= left + inside[1] - 32
            cells[test] += len(places)
            assert len(set(places)) == len(places)
    # Those of 40 px are scaled; patches of 32 are as they are.
    assert min(cells) >= 10


def test_terrain_is_the_map_in_metres(parts: dict[str, tuple[Labelled, Labelled]]) -> None:
    heights = cbook.get_sample_data("jacksboro_fault_dem.npz")["elevation"]
    windows = sliding_window_view(heights[:172, : 134 - 44], (32, 32)).astype(np.float32)
    made = parts["terrain"][0]
    metres = made.images[made.labels == 0][:12, ..., 0] * np.float32(840 / 255) + 236
    off = [np.abs(windows - patch).max(axis=(2, 3)).min() for patch in metres]
    # A level is 3.3 m, and about half of the patches are not scaled.
    assert sum(most < 1.7 for most in off) >= 3


@pytest.mark.parametrize("exponent", EXPONENTS)
def test_power_of_the_noise_falls_with_its_exponent(exponent: float) -> None:
    """By a fit to the periodogram under a Hann window, which keeps the edges from leaking."""
    fields = [coloured_noise(exponent, 0.0, np.random.default_rng(i)) for i in range(60)]
    window = np.outer(np.hanning(32), np.hanning(32))
    grey = np.stack(fields)[..., 0] - 128.0
    power = (np.abs(np.fft.fft2(grey * window)) ** 2).mean(axis=0)
    f = np.hypot(np.fft.fftfreq(32)[:, None], np.fft.fftfreq(32)[None])
    inside = (f > 0.1) & (f < 0.4)  # below it the window, above it rounding and corners
    slope = np.polyfit(np.log(f[inside]), np.log(power[inside]), 1)[0]
    # 60 images and clipping at 2.7 deviations: a tenth and a little.
    assert -slope == pytest.approx(exponent, abs=0.2)


@pytest.mark.parametrize("correlation", marker_data.CORRELATIONS)
def test_channels_of_the_noise_correlate_as_their_class_says(correlation: float) -> None:
    fields = [coloured_noise(1.0, correlation, np.random.default_rng(i)) for i in range(40)]
    pixels = np.concatenate([field.reshape(-1, 3) for field in fields])
    matrix = np.corrcoef(pixels.T)
    assert matrix[0, 1] == pytest.approx(correlation, abs=0.05)
    assert matrix[1, 2] == pytest.approx(correlation, abs=0.05)
    assert pixels.std() == pytest.approx(48, rel=0.1)


def test_betons_hold_the_arrays(
    parts: dict[str, tuple[Labelled, Labelled]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["marker_data", str(tmp_path / "new"), "digits"])
    marker_data.main()
    assert "digits-test.beton: 512 images, 10 classes" in capsys.readouterr().out
    for made, part in zip(parts["digits"], ("train", "test"), strict=True):
        kept = read_all(
            tmp_path / "new" / f"digits-{part}.beton", workers=1, size=32, labels="needed"
        )
        np.testing.assert_array_equal(kept.images.numpy(), made.images)
        assert kept.labels is not None
        np.testing.assert_array_equal(kept.labels.numpy(), made.labels)


def test_what_cannot_be_made_is_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(marker_data, "DEBIAN", tmp_path / "none")
    monkeypatch.setenv("FASTBYOL_CACHE", str(tmp_path / "empty"))
    with pytest.raises(UsageError, match=r"fashion-mnist-test-32px\.beton: not there"):
        marker_data.fashion_mnist(test=True)
    (tmp_path / "file").touch()
    for arguments, says in (
        (["new", "digit"], "'digit' is none of digits, textures"),
        (["file", "digits"], "file: File exists"),
        (["new", "fashion-mnist"], "not there"),
    ):
        words = [str(tmp_path / arguments[0]), *arguments[1:]]
        monkeypatch.setattr(sys, "argv", ["marker_data", *words])
        with pytest.raises(SystemExit) as ended:
            marker_data.main()
        assert ended.value.code == 2
        assert says in capsys.readouterr().err
    assert not list((tmp_path / "new").glob("*"))
