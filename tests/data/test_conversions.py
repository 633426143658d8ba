"""Sources that are no betons: converted once, whatever happens, and again when changed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from processes import wait_until
from small_disk import small_disk

from fastbyol import load_config
from fastbyol.config import DataConfig
from fastbyol.data import beton, conversions, convert, embedded, loader, sources
from fastbyol.errors import FastbyolError, UsageError
from leftovers import in_shared_memory, lasting_in_shared_memory
from source_files import random_images

PROCESSES = multiprocessing.get_context("forkserver")
SIDE = 20


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, which trusts the times of new files, and always looks at them."""
    monkeypatch.setattr(conversions, "LONG_LOOK_S", float("inf"))
    monkeypatch.setenv("FASTBYOL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(conversions, "SETTLED_NS", 0)
    return tmp_path / "cache"


def pictures(folder: Path, *classes: str, count: int = 3, side: int = SIDE, seed: int = 0) -> Path:
    """Write ``count`` PNG files of each class; return the folder."""
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for k in range(count):
            image = random_images(1, side, side + k % 2, 100 * seed + 10 * number + k)[0]
            Image.fromarray(image).save(folder / name / f"{k}.png")
    return folder


def images_of(path: Path, size: int = SIDE) -> NDArray[np.uint8]:
    """Return the images of a beton, (N, H, W, 3)."""
    read = loader.read_all(path, workers=1, size=size)
    return read.images.numpy()


def made(source: Path, size: int = SIDE, **options: Any) -> Path:
    """Return the beton of ``source``."""
    return conversions.converted(str(source), split=None, size=size, **options)


def count_conversions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that grows by a source's name at every conversion."""
    names, write = [], convert.write

    def counting(*arguments: Any, **options: Any) -> Any:
        names.append(options["name"])
        return write(*arguments, **options)

    monkeypatch.setattr(convert, "write", counting)
    return names


def test_a_folder_is_what_convert_makes_of_it(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "in", "cat", "dog")
    convert.convert(str(folder), tmp_path / "by_hand.beton", size=SIDE)
    path = made(folder)
    np.testing.assert_array_equal(images_of(path), images_of(tmp_path / "by_hand.beton"))
    labels = beton.inspect(path).labels
    assert labels is not None
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_images_of_one_small_size_stay_as_they_are(tmp_path: Path) -> None:
    images = random_images(5, 24, 24)
    np.save(tmp_path / "x.npy", images)
    small, large = made(tmp_path / "x.npy", size=16), made(tmp_path / "x.npy", size=48)
    assert small == large
    np.testing.assert_array_equal(images_of(small), images)
    wide = conversions.AS_IS_SIDE + 1
    np.save(tmp_path / "wide.npy", random_images(2, wide, wide))
    assert beton.inspect(made(tmp_path / "wide.npy", size=16)).uniform_size == (16, 16)
    assert beton.inspect(made(tmp_path / "wide.npy", size=wide)).uniform_size == (wide, wide)


def rename(folder: Path) -> None:
    (folder / "cat" / "1.png").rename(folder / "cat" / "9.png")


def recolour(folder: Path) -> None:
    """Change one pixel, and put size and time back."""
    path = folder / "cat" / "1.png"
    status, data = path.stat(), bytearray(path.read_bytes())
    with Image.open(path) as image:
        changed = 255 - np.asarray(image)
    Image.fromarray(changed).save(path)
    path.write_bytes(path.read_bytes().ljust(len(data), b"\0"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def replace(folder: Path) -> None:
    """Put another picture in place of one."""
    (folder / "dog" / "0.png").replace(folder / "cat" / "0.png")


@pytest.mark.parametrize(
    "change",
    [
        rename,
        recolour,
        replace,
        lambda folder: (folder / "cat" / "1.png").unlink(),
        lambda folder: pictures(folder, "eel"),
    ],
    ids=["renamed", "recoloured", "replaced", "removed", "added"],
)
def test_a_changed_folder_is_noticed(tmp_path: Path, change: Callable[[Path], object]) -> None:
    folder = pictures(tmp_path / "in", "cat", "dog")
    before = made(folder)
    assert made(folder) == before
    change(folder)
    after = made(folder)
    assert after != before
    convert.convert(str(folder), tmp_path / "by_hand.beton", size=SIDE)
    np.testing.assert_array_equal(images_of(after), images_of(tmp_path / "by_hand.beton"))


def test_the_same_bytes_are_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither other times nor another folder makes other images."""
    folder = pictures(tmp_path / "in", "cat", "dog")
    names, path = count_conversions(monkeypatch), made(folder)
    os.utime(folder / "cat" / "0.png", (1, 1))
    assert made(folder) == path
    (folder / ".DS_Store").write_bytes(b"x")
    assert made(folder) == path
    folder.rename(tmp_path / "in_another_place")
    folder.symlink_to(tmp_path / "in_another_place")
    assert made(folder) == path
    assert names == [str(folder)]


def test_bytes_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as no file has other times or numbers, and the memory of them is whole."""
    folder = pictures(tmp_path / "in", "cat")
    path = made(folder)
    with monkeypatch.context() as patched:
        patched.setattr(conversions, "_file_digest", lambda path: pytest.fail("read again"))
        assert made(folder) == path
    (memory,) = path.parent.glob("*.seen")
    for damaged in (b"", b"[", b"[1]", b'["a", 2]', b"{}", b"\xff"):
        memory.write_bytes(damaged)
        assert made(folder) == path


def test_a_look_that_took_long_counts_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command asks several times, of which each would walk through a million files."""
    folder = pictures(tmp_path / "in", "cat")
    monkeypatch.setattr(conversions, "LONG_LOOK_S", -1.0)
    monkeypatch.setattr(conversions, "LOOK_COUNTS", 1e9)
    monkeypatch.setattr(conversions, "_looks", {})
    path = made(folder)
    monkeypatch.setattr(sources, "files_of", lambda name: pytest.fail("walked again"))
    assert made(folder) == path


def test_a_file_that_was_just_written_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another write in the same step of the clock would leave its times as they are."""
    monkeypatch.setattr(conversions, "SETTLED_NS", 10**18)
    folder = pictures(tmp_path / "in", "cat")
    assert not list(made(folder).parent.glob("*.seen"))


def test_a_folder_that_changes_meanwhile_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, write = pictures(tmp_path / "in", "cat", "dog"), convert.write

    def meddling(*arguments: Any, **options: Any) -> Any:
        report = write(*arguments, **options)
        rename(folder)
        return report

    with monkeypatch.context() as patched:
        patched.setattr(convert, "write", meddling)
        with pytest.raises(UsageError, match="changed while it was converted; try again"):
            made(folder)
    assert len(list(made(folder).parent.glob("*.beton"))) == 1


def ask(start: Any, answers: Any, cache: str, source: str) -> None:
    """Answer with the beton's inode, and how often this process wrote it."""
    with pytest.MonkeyPatch.context() as patched:
        names = count_conversions(patched)
        os.environ["FASTBYOL_CACHE"] = cache
        start.wait()
        path = conversions.converted(source, split=None, size=SIDE)
        answers.put((path.stat().st_ino, len(names)))


def test_of_two_processes_one_converts(tmp_path: Path, cache: Path) -> None:
    folder = pictures(tmp_path / "in", "cat", "dog", count=20)
    start, answers = PROCESSES.Event(), PROCESSES.Queue()
    children = [
        PROCESSES.Process(target=ask, args=(start, answers, str(cache), str(folder)))
        for _ in range(2)
    ]
    for child in children:
        child.start()
    start.set()
    (first, wrote), (second, wrote_too) = [answers.get(timeout=300) for _ in children]
    for child in children:
        child.join(60)
    assert first == second
    assert wrote + wrote_too == 1


CONVERT = """
import sys
from fastbyol.data import conversions
conversions.converted(sys.argv[1], split=None, size=64)
"""


@pytest.mark.slow
def test_a_killed_conversion_is_begun_anew(tmp_path: Path, cache: Path) -> None:
    images, before = random_images(6000, 64, 64), in_shared_memory()
    np.save(tmp_path / "x.npy", images)
    process = subprocess.Popen([sys.executable, "-c", CONVERT, str(tmp_path / "x.npy")])
    wait_until(lambda: list(cache.glob("converted/.*.tmp")), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list(cache.glob("converted/*.beton"))
    path = made(tmp_path / "x.npy", size=64)
    np.testing.assert_array_equal(images_of(path, 64), images)
    left = {each.suffix for each in path.parent.iterdir()}
    assert left == {".beton", ".lock", ".seen"}
    assert not lasting_in_shared_memory(before)


def test_a_full_disk_is_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pictures(tmp_path / "in", "cat", "dog")
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        monkeypatch.setenv("FASTBYOL_CACHE", str(disk))
        with pytest.raises(FastbyolError, match="make room on that disk and try again") as caught:
            made(folder)
        assert "\n" not in str(caught.value)
        assert not [each for each in disk.rglob("*") if each.suffix in (".tmp", ".beton")]


def test_a_cache_that_cannot_be_written_is_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTBYOL_CACHE", str(tmp_path / "file"))
    with pytest.raises(UsageError, match="FASTBYOL_CACHE=DIR"):
        made(pictures(tmp_path / "in", "cat"))


def parts(folder: Path, *names: str) -> Path:
    """Write a folder with those parts, each of other pictures."""
    for k, name in enumerate(names):
        pictures(folder / name, "cat", "dog", count=k + 1, seed=10 * k)
    return folder


def test_a_run_is_scored_on_the_part_that_its_folder_has(tmp_path: Path) -> None:
    def counts(**settings: Any) -> tuple[int, int | None]:
        config = DataConfig(train=str(tmp_path / "in"), size=SIDE, **settings)
        test = embedded.held_out_file(config)
        train = beton.inspect(embedded.training_file(config)).num_samples
        return train, None if test is None else beton.inspect(test).num_samples

    parts(tmp_path / "in", "train", "val", "test")
    assert counts() == (2, 6)
    assert counts(split="val") == (4, 6)
    assert counts(test_split="val") == (2, 4)
    assert counts(split="test") == (6, 4)
    assert counts(test=str(tmp_path / "in")) == (2, 6)
    assert counts(test=str(tmp_path / "in" / "val")) == (2, 4)
    with pytest.raises(UsageError, match="no subfolder 'other'"):
        counts(split="other")


def test_a_part_without_labels_is_not_scored_on(tmp_path: Path) -> None:
    """Test images often lie in one folder; a run is scored on them only if it is asked to."""
    folder = parts(tmp_path / "in", "train")
    pictures(folder, "test")
    assert embedded.held_out_file(DataConfig(train=str(folder), size=SIDE)) is None
    plain = pictures(tmp_path / "plain", "cat", "dog")
    assert embedded.held_out_file(DataConfig(train=str(plain), size=SIDE)) is None


def test_a_split_of_what_has_none_is_refused(tmp_path: Path) -> None:
    convert.convert("textures", tmp_path / "a.beton", count=64, size=16)
    for name in (str(tmp_path / "a.beton"), "textures"):
        with pytest.raises(UsageError, match="has no split 'val'"):
            embedded.training_file(DataConfig(train=name, split="val"))
        with pytest.raises(UsageError, match="has no split 'val'"):
            embedded.held_out_file(DataConfig(train=name, test_split="val"))


TINY = (
    *("--set", "model.width=4", "--set", "model.stem=small", "--res", "16", "--device", "cpu"),
    *("--set", "train.batch_size=8", "--epochs", "1", "--preset", "blog"),
)


def test_a_command_says_once_what_it_converts(run: Any, tmp_path: Path) -> None:
    pictures(tmp_path / "in" / "train", "cat", "dog", count=8)
    pictures(tmp_path / "in" / "test", "cat", "dog", count=4)
    code, out, err = run("train", "--data", "in", *TINY, "--out", "a")
    assert code == 0, err
    assert "16 images from" in out
    lines = err.splitlines()
    assert lines == [
        "in: converting it, once",
        "in: converted once, train, 16 images, 2 classes",
        "in: converting it, once",
        "in: converted once, test, 8 images, 2 classes",
    ]
    code, _, err = run("train", "--data", "in", *TINY, "--out", "b")
    assert (code, err) == (0, "")
    result = run.json("eval", "a", "--protocol", "knn")
    assert (result["num_train"], result["num_test"]) == (16, 8)
    named = ("--train-data", "in/train", "--test-data", "in/test")
    assert run.json("eval", "a", "--protocol", "knn", *named)["num_test"] == 8
    code, _, err = run("resume", "a")
    assert (code, err) == (0, "")
    (tmp_path / "in" / "train" / "cat" / "0.png").unlink()
    code, _, err = run("resume", "a")
    assert code == 2
    assert f"{tmp_path / 'in'}: is not the training data that the run was made with" in err


def test_a_library_says_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = pictures(tmp_path / "in", "cat", "dog")
    config = load_config("demo", [f"data.train={folder}", "train.batch_size=4"])
    embedded.prepare(config.data)
    assert capsys.readouterr() == ("", "")
