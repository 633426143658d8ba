"""Every kind of source to a beton file and back through FFCV's own reader."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from processes import wait_until
from torchvision.transforms import v2

import ffcv_files
import source_files
from fastbyol.data import beton, beton_write, convert, rgb, textures
from fastbyol.errors import FastbyolError, UsageError
from leftovers import wait_for_writers


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.beton"


def demand_alone(out: Path) -> None:
    """Check that writing left nothing beside ``out``."""
    assert [path.name for path in out.parent.iterdir() if ".beton" in path.name] == [out.name]


@pytest.mark.parametrize("kind", ["stl10", "cifar10", "cifar100", "classes", "npz"])
def test_every_kind_survives_bit_for_bit(tmp_path: Path, out: Path, kind: str) -> None:
    source = tmp_path / ("source.npz" if kind == "npz" else "source")
    build = {
        "stl10": lambda: source_files.stl10(source)["test"],
        "cifar10": lambda: source_files.cifar10(source)["test"],
        "cifar100": lambda: source_files.cifar100(source)["test"],
        "classes": lambda: source_files.class_folders(source),
        "npz": lambda: source_files.npz(source),
    }
    images, labels = build[kind]()
    split = None if kind in ("classes", "npz") else "test"
    seen: list[tuple[int, int]] = []
    report = convert.convert(
        str(source), out, split=split, progress=lambda *numbers: seen.append(numbers)
    )
    assert (report.kind, report.num_written, report.skipped, report.labelled) == (
        kind,
        len(images),
        (),
        True,
    )
    assert report.image_size == images.shape[1:3]
    assert report.num_bytes == out.stat().st_size
    assert seen[-1] == (len(images), len(images))
    actual, actual_labels = ffcv_files.loaded(out)
    np.testing.assert_array_equal(actual, images)
    assert actual_labels == labels
    demand_alone(out)


def test_textures(out: Path) -> None:
    """Convert 100 images: two blocks by two workers."""
    report = convert.convert("textures", out, count=100, size=16, seed=5, workers=2)
    images, labels = textures.make(100, 16, 5)
    actual, actual_labels = ffcv_files.regions(out)
    np.testing.assert_array_equal(actual, images)
    assert actual_labels == labels.tolist()
    assert (report.kind, report.class_names) == ("textures", textures.CLASSES)


def test_pictures_of_mixed_sizes(tmp_path: Path, out: Path) -> None:
    expected = source_files.odd_pictures(tmp_path / "odd")
    names = sorted(expected)
    report = convert.convert(str(tmp_path / "odd"), out)
    assert (report.num_written, report.labelled, report.image_size) == (len(expected), False, None)
    actual, labels = ffcv_files.regions(out)
    assert labels is None
    assert [image.shape for image in actual] == [expected[name].shape for name in names]
    for name, image in zip(names, actual, strict=True):
        # 4: JPEG's own error, see test_sources.
        assert np.abs(image.astype(int) - expected[name]).max() <= (
            4 if name in ("photo.JPG", "alpha.png") else 0
        )


@pytest.mark.parametrize("resize", ["resize", "centre"])
def test_sizes_are_torchvisions(tmp_path: Path, out: Path, resize: rgb.Resize) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    images = [source_files.random_images(1, 40 + 3 * k, 61 - 4 * k, k)[0] for k in range(9)]
    for k, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{k}.png")
    report = convert.convert(str(folder), out, size=24, resize=resize)
    assert report.image_size == (24, 24)
    side = 24 if resize == "centre" else (24, 24)
    reference = v2.Compose([v2.Resize(side, v2.InterpolationMode.BILINEAR), v2.CenterCrop(24)])
    for image, one in zip(images, ffcv_files.loaded(out)[0], strict=True):
        np.testing.assert_array_equal(one, np.asarray(reference(Image.fromarray(image))))


def test_jpeg_is_pillows_at_the_same_quality(tmp_path: Path, out: Path) -> None:
    """Compare two uses of libjpeg. FFCV decodes by the fast transform, a little darker."""
    images, labels = source_files.npz(tmp_path / "a.npz", side=40)
    report = convert.convert(str(tmp_path / "a.npz"), out, mode="jpg", quality=60)
    assert report.num_written == np.count_nonzero(~beton.inspect(out).raw) == len(images)
    actual, actual_labels = ffcv_files.loaded(out)
    assert actual_labels == labels
    for image, region, one in zip(images, ffcv_files.raw_regions(out), actual, strict=True):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=60)
        wanted = np.asarray(Image.open(file)).astype(int)
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(region.tobytes()))), wanted)
        assert np.abs(one - wanted).max() <= 12
        assert np.abs(one - wanted).mean() < 3


def test_damaged_pictures_are_left_out_and_named(tmp_path: Path, out: Path) -> None:
    images, labels = source_files.class_folders(tmp_path / "source")
    noise = tmp_path / "source" / "bee" / "half.png"
    Image.effect_noise((64, 64), 50).save(noise)
    noise.write_bytes(noise.read_bytes()[:2000])
    (tmp_path / "source" / "ant" / "empty.jpg").touch()
    with pytest.raises(UsageError, match=r"empty\.jpg.*--strict"):
        convert.convert(str(tmp_path / "source"), out, strict=True)
    report = convert.convert(str(tmp_path / "source"), out)
    assert [name for name, _ in report.skipped] == ["ant/empty.jpg", "bee/half.png"]
    assert "truncated" in report.skipped[1][1]
    actual, actual_labels = ffcv_files.loaded(out)
    np.testing.assert_array_equal(actual, images)
    assert actual_labels == labels
    (tmp_path / "source" / "ant" / "empty.jpg").unlink()
    with pytest.raises(UsageError, match=r"half\.png.*truncated.*--strict"):
        convert.convert(str(tmp_path / "source"), tmp_path / "strict.beton", strict=True)
    demand_alone(out)


def test_the_report_accounts_for_everything(tmp_path: Path, out: Path) -> None:
    source = tmp_path / "source"
    source_files.class_folders(source / "train")
    source_files.class_folders(source / "val")
    for name in (
        "readme.md",
        "train/ant/notes.txt",
        "train/bee/notes.txt",
        "train/labels.csv",
        "train/bee/.x.png",
    ):
        (source / name).touch()
    os.mkfifo(source / "train" / "cow" / "pipe.png")
    (source / "train" / "ant" / "gone.jpg").symlink_to("nowhere")
    Image.new("RGB", (60000, 1)).save(source / "train" / "ant" / "thin.png")
    report = convert.convert(str(source), out, size=64)
    *lines, last = report.in_words()
    assert last == f"{out}: 12 images, 3 classes, 3 skipped, 5 ignored"
    assert set(lines) == {
        "classes: split train; there are also val",
        "skipped train/ant/gone.jpg: No such file or directory",
        "skipped train/ant/thin.png: 60000 x 1 pixels are too thin for a short side of 64",
        "skipped train/cow/pipe.png: is a named pipe, not a regular file",
        "ignored .txt files: train/ant/notes.txt, train/bee/notes.txt",
        "ignored hidden files and folders: train/bee/.x.png",
        "ignored .md files: readme.md",
        "ignored .csv tables, whose labels are not read: train/labels.csv",
    }


@pytest.mark.parametrize(
    ("resize", "mode", "kept"), [("centre", "raw", 2), ("resize", "jpg", 4), ("none", "jpg", 2)]
)
def test_odd_shapes_never_cost_the_others(
    tmp_path: Path, out: Path, resize: rgb.Resize, mode: beton_write.Mode, kept: int
) -> None:
    for name, size in {"a": (32, 32), "b": (60000, 1), "c": (1, 30000), "d": (9999, 3)}.items():
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    report = convert.convert(
        str(tmp_path), out, size=None if resize == "none" else 64, resize=resize, mode=mode
    )
    assert report.num_written == kept
    left_out = [name for name, _ in report.skipped]
    assert left_out == ([] if resize == "resize" else ["b.png", "c.png"])


def test_nothing_readable(tmp_path: Path, out: Path) -> None:
    Image.effect_noise((64, 64), 50).save(tmp_path / "half.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "half.png").read_bytes()[:2000])
    with pytest.raises(UsageError, match="none of 1 images"):
        convert.convert(str(tmp_path), out)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"resize": "centre"}, "--size"),
        ({"resize": "none", "size": 8}, "drop one"),
        ({"resize": "crop"}, "resize: 'crop' is none of"),
        ({"size": 20000}, "16384"),
        ({"mode": "png"}, "'png'"),
        ({"quality": 0}, "quality 0"),
        ({"workers": -1}, "workers -1"),
        ({"split": "test"}, "test_images"),
        *[
            ({"source": "textures", name: value}, name)
            for name, value in (("size", 4), ("count", 0), ("seed", -1))
        ],
        ({"source": "textures", "split": "train"}, "split"),
    ],
)
def test_wrong_options(tmp_path: Path, out: Path, options: dict[str, object], words: str) -> None:
    source_files.npz(tmp_path / "a.npz")
    options = {"source": str(tmp_path / "a.npz"), "out": out} | options
    with pytest.raises(UsageError) as caught:
        convert.convert(**options)  # type: ignore[arg-type]
    assert words in str(caught.value)
    assert not out.exists()


def test_outputs_that_cannot_be(tmp_path: Path, out: Path) -> None:
    """Refuse the output before the source is read."""
    out.write_text("mine")
    for path, words in (
        (out, "--overwrite"),
        (tmp_path, "folder"),
        (tmp_path / "no" / "a.beton", "no such folder"),
    ):
        with pytest.raises(UsageError, match=words):
            convert.convert("absent", path)
    for path in (Path("/proc/a.beton"), tmp_path / ("x" * 300)):
        with pytest.raises(UsageError, match="cannot be written"):
            convert.convert("absent", path)
    assert out.read_text() == "mine"


def test_a_disk_that_is_too_small(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source_files.npz(tmp_path / "a.npz")
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(FastbyolError, match="make room"):
        convert.convert(str(tmp_path / "a.npz"), out)


def test_killed_conversions_leave_nothing(tmp_path: Path, out: Path) -> None:
    """Kill a conversion while it starts, imports and writes; the next one removes leftovers."""
    # 550 MB, which it is killed long before it has written.
    command = (
        f"from fastbyol.data.convert import convert; convert('textures', {str(out)!r}, "
        "count=20000, size=96)"
    )
    for num_bytes in (-1, 0, 1 << 23):
        process = subprocess.Popen([sys.executable, "-c", command], start_new_session=True)
        if num_bytes < 0:
            time.sleep(0.5)
        else:
            wait_until(lambda least=num_bytes: _leftover_bytes(tmp_path) > least, process)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        wait_for_writers(process.pid)
        assert not out.exists()
    assert _leftover_bytes(tmp_path)
    convert.convert("textures", out, count=10, size=16)
    demand_alone(out)
    assert beton.inspect(out).num_samples == 10


def _leftover_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.name.endswith(".tmp"))
