"""The images of measurements."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fastbyol.data.loader import read_all
from fastbyol_bench.pictures import beton, pictures


def test_the_beton_holds_the_pictures(tmp_path: Path) -> None:
    images, labels = pictures(25, 20)
    kept = read_all(beton(tmp_path, 25, 20), workers=1, size=20)
    np.testing.assert_array_equal(kept.images.numpy(), images)
    assert kept.labels is not None
    np.testing.assert_array_equal(kept.labels.numpy(), labels)
    assert np.bincount(labels).tolist() == [3] * 5 + [2] * 5
    assert not np.array_equal(images[0], images[10])
    np.testing.assert_array_equal(pictures(25, 20)[0], images)
