"""Tiny data sets in their true on-disk formats, written from the formats' descriptions.

Builders return what they wrote: images uint8 (N, H, W, 3) and labels, by split or file.
"""

from __future__ import annotations

import gzip
import io
import json
import struct
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import scipy.io
from numpy.typing import NDArray
from PIL import Image

Images = NDArray[np.uint8]

FEATURES = {
    "image": {"_type": "Image"},
    "label": {"names": ["ant", "bee", "cow"], "_type": "ClassLabel"},
}
CIFAR10_NAMES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
STL10_NAMES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")


def random_images(count: int, height: int, width: int, seed: int = 0) -> Images:
    """Return smooth pictures, so that JPEG keeps them: a random 4 x 4 grid, enlarged."""
    grid = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), np.uint8)
    return np.stack(
        [
            np.asarray(Image.fromarray(g).resize((width, height), Image.Resampling.BICUBIC))
            for g in grid
        ]
    )


def stl10(
    folder: Path, *, train: int = 20, test: int = 10, unlabeled: int = 12
) -> dict[str, tuple[Images, list[int]]]:
    """Write ``folder/stl10_binary`` as its archive unpacks: columns first, labels from 1."""
    inner = folder / "stl10_binary"
    inner.mkdir(parents=True)
    (inner / "class_names.txt").write_text("\n".join(STL10_NAMES) + "\n")
    (inner / "fold_indices.txt").write_text(
        "".join(" ".join(map(str, fold)) + " \n" for fold in folds(train))
    )
    written = _stl10_parts(train, test, unlabeled)
    for part, (images, labels) in written.items():
        (inner / f"{part}_X.bin").write_bytes(images.transpose(0, 3, 2, 1).tobytes())
        if part != "unlabeled":
            (inner / f"{part}_y.bin").write_bytes(bytes(label + 1 for label in labels))
    return written


def stl10_matlab(
    folder: Path, *, train: int = 20, test: int = 10, unlabeled: int = 12
) -> dict[str, tuple[Images, list[int]]]:
    """Write ``folder/stl10_matlab`` as its archive unpacks: version 5, but 7.3 for unlabeled."""
    inner = folder / "stl10_matlab"
    inner.mkdir(parents=True)
    names, written = (
        np.array([[np.array([name])] for name in STL10_NAMES], object),
        _stl10_parts(train, test, unlabeled),
    )
    for part, (images, labels) in written.items():
        rows = images.transpose(0, 3, 2, 1).reshape(len(images), -1)
        if part == "unlabeled":
            hdf5_mat(inner / "unlabeled.mat", X=rows)
            continue
        arrays = {"X": rows, "y": np.array(labels, np.uint8)[:, None] + 1, "class_names": names.T}
        if part == "train":
            arrays["fold_indices"] = np.empty((1, 10), object)
            for k, fold in enumerate(folds(train)):
                arrays["fold_indices"][0, k] = (
                    np.array(fold, np.float64)[:, None] + 1
                )  # MATLAB counts from 1
        scipy.io.savemat(inner / f"{part}.mat", arrays, do_compression=True)
    return written


def _stl10_parts(train: int, test: int, unlabeled: int) -> dict[str, tuple[Images, list[int]]]:
    written = {}
    for seed, (part, count) in enumerate(
        (("train", train), ("test", test), ("unlabeled", unlabeled))
    ):
        labels = [-1 if part == "unlabeled" else (7 * k + seed) % 10 for k in range(count)]
        written[part] = (random_images(count, 96, 96, seed), labels)
    return written


def folds(count: int, size: int = 5) -> list[list[int]]:
    """Return ten of STL-10's folds: indices in train, which may be in several folds."""
    return [sorted(np.random.default_rng(k).permutation(count)[:size].tolist()) for k in range(10)]


def hdf5_mat(path: Path, **arrays: NDArray[np.uint8]) -> None:
    """Write MATLAB's version 7.3: HDF5 behind a head of 512 bytes, transposed arrays in chunks."""
    with h5py.File(path, "w", userblock_size=512) as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array.T, chunks=True, compression="gzip").attrs[
                "MATLAB_class"
            ] = np.bytes_("uint8")
    with path.open("r+b") as opened:
        opened.write(
            b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(116) + bytes(8) + b"\x00\x02IM"
        )


def cifar_binary(
    folder: Path, *, classes: int = 10, count: int = 6
) -> dict[str, tuple[Images, list[int]]]:
    """Write rows of the label, or coarse and fine label, and the planes; names are text files."""
    inner = folder / ("cifar-10-batches-bin" if classes == 10 else "cifar-100-binary")
    inner.mkdir(parents=True)
    names = "batches.meta.txt" if classes == 10 else "fine_label_names.txt"
    (inner / names).write_text("\n".join(_cifar_names(classes)) + "\n\n")
    parts = _cifar_parts(classes, [count] * 6, 80)
    for file, (images, labels) in parts.items():
        rows = [bytes([label] if classes == 10 else [label // 5, label]) for label in labels]
        planes = zip(rows, _planes(images), strict=True)
        (inner / f"{file}.bin").write_bytes(
            b"".join(row + plane.tobytes() for row, plane in planes)
        )
    return _cifar_splits(parts)


def cifar_matlab(
    folder: Path, *, classes: int = 10, count: int = 6
) -> dict[str, tuple[Images, list[int]]]:
    """Write arrays ``data`` (N, 3072) and ``labels`` or ``fine_labels`` (N, 1); names are cells."""
    inner = folder / ("cifar-10-batches-mat" if classes == 10 else "cifar-100-matlab")
    inner.mkdir(parents=True)
    cells = np.array([[np.array([name])] for name in _cifar_names(classes)], object)
    fine = "" if classes == 10 else "fine_"
    scipy.io.savemat(
        inner / ("batches.meta.mat" if classes == 10 else "meta.mat"), {f"{fine}label_names": cells}
    )
    parts = _cifar_parts(classes, [count] * 6, 90)
    for file, (images, labels) in parts.items():
        arrays = {"data": _planes(images), f"{fine}labels": np.array(labels, np.uint8)[:, None]}
        scipy.io.savemat(inner / f"{file}.mat", arrays)
    return _cifar_splits(parts)


def cifar10(
    folder: Path, *, per_batch: int = 6, test: int = 8
) -> dict[str, tuple[Images, list[int]]]:
    """Write ``folder/cifar-10-batches-py``, pickled as Python 2 did."""
    inner = folder / "cifar-10-batches-py"
    inner.mkdir(parents=True)
    names = {"num_cases_per_batch": per_batch, "label_names": list(CIFAR10_NAMES)}
    (inner / "batches.meta").write_bytes(python2_pickle(names))
    parts = _cifar_parts(10, [*[per_batch] * 5, test], 1)
    for batch, (file, (images, labels)) in enumerate(parts.items(), 1):
        names = ["a.png"] * len(images)
        what = {
            "batch_label": f"batch {batch}",
            "labels": labels,
            "data": _planes(images),
            "filenames": names,
        }
        (inner / file).write_bytes(python2_pickle(what))
    return _cifar_splits(parts)


def cifar100(
    folder: Path, *, train: int = 12, test: int = 9
) -> dict[str, tuple[Images, list[int]]]:
    """Write ``folder/cifar-100-python``: train and test with fine and coarse labels, and names."""
    inner = folder / "cifar-100-python"
    inner.mkdir(parents=True)
    meta = {
        "fine_label_names": list(_cifar_names(100)),
        "coarse_label_names": [f"coarse {k}" for k in range(20)],
    }
    (inner / "meta").write_bytes(python2_pickle(meta))
    parts = _cifar_parts(100, [train, test], 50)
    for file, (images, labels) in parts.items():
        what = {
            "fine_labels": labels,
            "coarse_labels": [k // 5 for k in labels],
            "data": _planes(images),
        }
        (inner / file).write_bytes(python2_pickle(what))
    return _cifar_splits(parts)


def _cifar_names(classes: int) -> tuple[str, ...]:
    return CIFAR10_NAMES if classes == 10 else tuple(f"fine {k}" for k in range(100))


def _cifar_parts(classes: int, counts: list[int], seed: int) -> dict[str, tuple[Images, list[int]]]:
    files = (
        [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]
        if classes == 10
        else ["train", "test"]
    )
    return {
        file: (
            random_images(count, 32, 32, seed + k),
            [(37 * row + k) % classes for row in range(count)],
        )
        for k, (file, count) in enumerate(zip(files, counts, strict=False))
    }


def _cifar_splits(
    parts: dict[str, tuple[Images, list[int]]],
) -> dict[str, tuple[Images, list[int]]]:
    *train, test = parts.values()
    images, labels = zip(*train, strict=True)
    return {
        "train": (np.concatenate(images), [label for part in labels for label in part]),
        "test": test,
    }


def svhn(folder: Path, *, train: int = 11, test: int = 7) -> dict[str, tuple[Images, list[int]]]:
    """Write SVHN's ``X`` (32, 32, 3, N) and ``y`` (N, 1) from 1 to 10; return digits."""
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for split, count in (("train", train), ("test", test)):
        images, y = random_images(count, 32, 32, count), np.arange(count, dtype=np.uint8) % 10 + 1
        scipy.io.savemat(
            folder / f"{split}_32x32.mat",
            {"X": images.transpose(1, 2, 3, 0), "y": y[:, None]},
            do_compression=True,
        )
        written[split] = (images, [int(label) % 10 for label in y])
    return written


def idx(
    folder: Path,
    *,
    train: int = 20,
    test: int = 24,
    side: int = 28,
    packed: bool = True,
    sets: str = "",
) -> dict[str, tuple[Images, list[int]]]:
    """Write MNIST's four files; return their images as RGB, in the middle of 32 x 32."""
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for split, name, count in (("train", "train", train), ("test", "t10k", test)):
        grey, labels = (
            random_images(count, side, side, len(name))[..., 0],
            [(3 * k + count) % 10 for k in range(count)],
        )
        heads = (
            struct.pack(">BBBBIII", 0, 0, 8, 3, *grey.shape),
            struct.pack(">BBBBI", 0, 0, 8, 1, count),
        )
        for what, head, body in (
            ("images-idx3", heads[0], grey.tobytes()),
            ("labels-idx1", heads[1], bytes(labels)),
        ):
            path = folder / f"{sets}{name}-{what}-ubyte{'.gz' * packed}"
            path.write_bytes(gzip.compress(head + body) if packed else head + body)
        padded = np.zeros((count, max(32, side), max(32, side), 3), np.uint8)
        start = max(0, 32 - side) // 2
        padded[:, start : start + side, start : start + side] = grey[..., None]
        written[split] = (padded, labels)
    return written


def class_folders(
    folder: Path, *, classes: tuple[str, ...] = ("ant", "bee", "cow"), per_class: int = 4
) -> tuple[Images, list[int]]:
    """Write a folder of PNG files a class, one of them a level deeper, in sorted order."""
    images = random_images(len(classes) * per_class, 24, 20, 7)
    labels = []
    for k, image in enumerate(images):
        label, number = divmod(k, per_class)
        inside = folder / classes[label] / ("z" if number == per_class - 1 else "")
        inside.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(inside / f"picture {number}.png")
        labels.append(label)
    return images, labels


def packed(folder: Path, path: Path, *, form: int = tarfile.PAX_FORMAT) -> Path:
    """Pack the content of a folder as a zip or, by the suffix, a tar; return its path."""
    names = sorted(each.relative_to(folder).as_posix() for each in folder.rglob("*"))
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in names:
                archive.write(folder / name, name)
        return path
    method = {".gz": "gz", ".tgz": "gz", ".bz2": "bz2", ".xz": "xz"}.get(path.suffix, "")
    with tarfile.open(path, f"w:{method}", format=form) as tar:  # type: ignore[call-overload]
        for name in names:
            tar.add(folder / name, name, recursive=False)
    return path


def tar_of(path: Path, members: Mapping[str, bytes]) -> Path:
    """Write a tar of files; return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def png(image: Images) -> bytes:
    """Return a picture as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def webdataset(
    folder: Path, *, shards: int = 3, per_shard: int = 4, name: str = "shard", labels: str = "cls"
) -> tuple[Images, list[int]]:
    """Write shards as WebDataset's ``ShardWriter`` does, with labels in .cls or .json."""
    folder.mkdir(parents=True, exist_ok=True)
    images = random_images(shards * per_shard, 18, 22, 11)
    numbers = [(5 * k + 2) % 7 for k in range(len(images))]
    for shard in range(shards):
        members = {}
        for k in range(shard * per_shard, (shard + 1) * per_shard):
            label = (
                str(numbers[k]) if labels == "cls" else json.dumps({"label": numbers[k], "id": k})
            )
            members |= {f"{k:08d}.{labels}": label.encode(), f"{k:08d}.png": png(images[k])}
            members[f"{k:08d}.txt"] = b"a caption"
        tar_of(folder / f"{name}-{shard:06d}.tar", members)
    return images, numbers


def npz(
    path: Path, *, count: int = 20, side: int = 16, labelled: bool = True
) -> tuple[Images, list[int]]:
    """Write ``images`` (N, H, W, 3) and ``labels`` (N,), compressed."""
    images, labels = random_images(count, side, side, 9), [k % 5 for k in range(count)]
    arrays = {"images": images} | ({"labels": np.array(labels, np.int32)} if labelled else {})
    np.savez_compressed(path, **arrays)
    return images, labels


def parquet(folder: Path, *, train: int = 10, test: int = 7) -> dict[str, tuple[Images, list[int]]]:
    """Write data/train-00000-of-00002.parquet and so on, as the Hub has them."""
    from pyarrow import parquet

    (folder / "data").mkdir(parents=True)
    written = {}
    for split, count in (("train", train), ("test", test)):
        written[split] = _labelled(count)
        table = table_of(*written[split])
        for k in range(2):
            rows = table.slice(k * (count // 2), count // 2 + k * (count % 2))
            path = folder / "data" / f"{split}-{k:05}-of-00002.parquet"
            parquet.write_table(rows, path, row_group_size=3)
    return written


def saved_set(
    folder: Path, *, train: int = 10, test: int = 7
) -> dict[str, tuple[Images, list[int]]]:
    """Write what DatasetDict.save_to_disk of the library datasets 5.2 writes, train in two files.

    An arrow file is a stream, with the features in its schema's metadata.
    """
    import pyarrow

    written = {}
    for split, count in (("train", train), ("test", test)):
        written[split] = _labelled(count)
        table = table_of(*written[split])
        inner, shards = folder / split, 2 if split == "train" else 1
        inner.mkdir(parents=True)
        names = [f"data-{k:05}-of-{shards:05}.arrow" for k in range(shards)]
        size = -(-count // shards)
        for k, name in enumerate(names):
            with pyarrow.ipc.new_stream(inner / name, table.schema) as stream:
                stream.write_table(table.slice(k * size, size), max_chunksize=4)
        state = {
            "_data_files": [{"filename": name} for name in names],
            "_fingerprint": "0123456789abcdef",
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": split,
        }
        about = {"citation": "", "description": "", "features": FEATURES, "homepage": ""}
        (inner / "state.json").write_text(json.dumps(state, indent=2, sort_keys=True))
        (inner / "dataset_info.json").write_text(json.dumps(about, indent=2))
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    return written


def encoded(image: Images, kind: str = "PNG") -> bytes:
    """Return the bytes of a picture file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind)
    return file.getvalue()


def _labelled(count: int) -> tuple[Images, list[int]]:
    return random_images(count, 14, 18, count), [k % 3 for k in range(count)]


def table_of(images: Images, labels: list[int]) -> Any:
    """Return the table of a set of the library datasets, with its features."""
    import pyarrow

    pictures = [{"bytes": encoded(image), "path": f"{k}.png"} for k, image in enumerate(images)]
    of = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    table = pyarrow.table(
        {"image": pyarrow.array(pictures, of), "label": pyarrow.array(labels, pyarrow.int64())}
    )
    about = json.dumps({"info": {"features": FEATURES}})
    return table.replace_schema_metadata({"huggingface": about})


def odd_pictures(folder: Path) -> dict[str, Images]:
    """Write a picture of each mode and size; return the exact RGB by each mode's definition.

    For CMYK and JPEG, which are not exact, return the intended colours.
    """
    folder.mkdir(parents=True)
    rng = np.random.default_rng(3)
    expected: dict[str, Images] = {}

    grey = rng.integers(0, 256, (18, 31), np.uint8)
    Image.fromarray(grey).save(folder / "grey.png")
    expected["grey.png"] = np.stack([grey] * 3, -1)

    colour = rng.integers(0, 256, (25, 17, 3), np.uint8)
    alpha = rng.integers(0, 256, (25, 17, 1), np.uint8)
    Image.fromarray(np.concatenate([colour, alpha], 2)).save(folder / "alpha.png")
    share = alpha / 255.0
    expected["alpha.png"] = np.round(colour * share + 255.0 * (1.0 - share)).astype(np.uint8)

    palette, index = (
        rng.integers(0, 256, (16, 3), np.uint8),
        rng.integers(0, 16, (21, 22), np.uint8),
    )
    paletted = Image.frombytes("P", (22, 21), index.tobytes())
    paletted.putpalette(palette.tobytes())
    paletted.save(folder / "palette.png")
    expected["palette.png"] = palette[index]

    paletted.save(folder / "see-through.gif", transparency=5)
    shown = palette.copy()
    shown[5] = 255
    expected["see-through.gif"] = shown[index]

    bits = rng.integers(0, 2, (13, 19)).astype(bool)
    Image.fromarray(bits).save(folder / "bits.png")
    expected["bits.png"] = np.stack([bits * np.uint8(255)] * 3, -1)

    deep = rng.integers(0, 65536, (14, 15), np.uint16)
    Image.fromarray(deep).save(folder / "deep.png")
    expected["deep.png"] = np.stack([np.round(deep / 257.0).astype(np.uint8)] * 3, -1)

    upright = random_images(1, 40, 30, 4)[0]
    turned = Image.fromarray(upright).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees clockwise to view"
    turned.save(folder / "turned.png", exif=exif)
    expected["turned.png"] = upright

    smooth = random_images(1, 33, 44, 5)[0]
    Image.fromarray(smooth).save(folder / "photo.JPG", quality=98, subsampling=0)
    expected["photo.JPG"] = smooth
    Image.fromarray(255 - smooth).convert("CMYK").save(folder / "print.tiff")
    expected["print.tiff"] = 255 - smooth
    return expected


def python2_pickle(value: object) -> bytes:
    """Pickle by protocol 2 as Python 2's cPickle: byte strings, old numpy names, flags 0 and 1."""
    return b"\x80\x02" + _pickled(value) + b"."


def _pickled(value: object) -> bytes:
    if isinstance(value, dict):
        return (
            b"}(" + b"".join(_pickled(key) + _pickled(item) for key, item in value.items()) + b"u"
        )
    if isinstance(value, list):
        return b"](" + b"".join(map(_pickled, value)) + b"e"
    if isinstance(value, str | bytes):
        data = value.encode("latin1") if isinstance(value, str) else value
        return (
            b"U" + bytes([len(data)]) if len(data) < 256 else b"T" + struct.pack("<i", len(data))
        ) + data
    if isinstance(value, int):
        return b"K" + bytes([value]) if 0 <= value < 256 else b"J" + struct.pack("<i", value)
    assert isinstance(value, np.ndarray)
    assert value.dtype == np.uint8
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNN"
    dtype += b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    shape = b"(" + b"".join(map(_pickled, value.shape)) + b"t"
    return array + b"(K\x01" + shape + dtype + b"\x89" + _pickled(value.tobytes()) + b"tb"


def _planes(images: Images) -> NDArray[np.uint8]:
    """Return (N, 3072): all red, then all green, then all blue, row by row."""
    return np.concatenate(
        [images[..., channel].reshape(len(images), -1) for channel in range(3)], axis=1
    )
