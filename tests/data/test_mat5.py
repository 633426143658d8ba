"""MATLAB's version 5, sound against scipy.io, and damaged: a DamagedError, never another."""

from __future__ import annotations

import io
import struct
import zlib

import hypothesis.extra.numpy
import numpy as np
import pytest
import scipy.io
from hypothesis import given
from hypothesis import strategies as st

from fastbyol.data import mat5

DTYPES = st.sampled_from(
    [np.dtype(name) for name in ("u1", "i1", "u2", "i2", "u4", "i4", "f4", "f8")]
)
ARRAYS = hypothesis.extra.numpy.arrays(
    DTYPES, hypothesis.extra.numpy.array_shapes(min_dims=2, max_dims=4, max_side=5)
)


def saved(compressed: bool, **arrays: object) -> io.BytesIO:
    file = io.BytesIO()
    scipy.io.savemat(file, arrays, do_compression=compressed)
    return file


@given(ARRAYS, ARRAYS, st.booleans())
def test_arrays(first: np.ndarray, second: np.ndarray, compressed: bool) -> None:
    file = saved(compressed, X=first, a_longer_name=second)
    variables = mat5.variables(file)
    assert list(variables) == ["X", "a_longer_name"]
    for name, array in (("X", first), ("a_longer_name", second)):
        assert variables[name].shape == array.shape
        np.testing.assert_array_equal(mat5.read(file, variables[name], name), array)
        assert mat5.read(file, variables[name], name).dtype == array.dtype


@given(
    st.lists(st.text("abc \u00e9\u4e2d", min_size=1, max_size=9) | ARRAYS, min_size=1, max_size=6),
    st.booleans(),
)
def test_cells(contents: list[str | np.ndarray], compressed: bool) -> None:
    cells = np.empty((len(contents), 1), object)
    for k, content in enumerate(contents):
        cells[k, 0] = content
    file = saved(compressed, X=np.zeros((3, 3)), cells=cells)
    variables = mat5.read_cells(file, mat5.variables(file)["cells"])
    for read, content in zip(variables, contents, strict=True):
        if isinstance(content, str):
            assert read == content
        else:
            np.testing.assert_array_equal(read, content.reshape(-1, order="F"))


def test_the_other_byte_order() -> None:
    body = (
        struct.pack(">IIII", 6, 8, 9, 0)
        + struct.pack(">IIII", 5, 8, 2, 3)
        + struct.pack(">HHI", 1, 1, ord("X") << 24)
    )
    body += struct.pack(">II", 3, 12) + np.arange(6, dtype=">i2").tobytes() + bytes(4)
    file = io.BytesIO(
        b"MATLAB 5.0".ljust(124) + b"\x01\x00MI" + struct.pack(">II", 14, len(body)) + body
    )
    np.testing.assert_array_equal(
        mat5.read(file, mat5.variables(file)["X"], ""), [[0, 2, 4], [1, 3, 5]]
    )
    file.seek(0)
    np.testing.assert_array_equal(scipy.io.loadmat(file)["X"], [[0, 2, 4], [1, 3, 5]])


def test_what_is_no_real_array_is_refused() -> None:
    file = saved(False, z=np.ones((2, 2)) * 1j, s={"a": 1}, t="text", logical=np.array([[True]]))
    variables = mat5.variables(file)
    for name in ("z", "s", "t"):
        with pytest.raises(mat5.DamagedError):
            mat5.read(file, variables[name], name)
        with pytest.raises(mat5.DamagedError):
            mat5.read_cells(file, variables[name])
    np.testing.assert_array_equal(mat5.read(file, variables["logical"], ""), [[1]])


@pytest.mark.parametrize("compressed", [True, False])
def test_damaged(compressed: bool) -> None:
    """Change any byte, also below the compression."""
    rng = np.random.default_rng(0)
    whole = saved(
        False, X=rng.integers(0, 256, (3, 40), np.uint8), c=np.array([["ab", "cd"]], object)
    ).getvalue()
    refused = 0
    for at in [*range(126, len(whole)), *rng.integers(126, len(whole), 300).tolist()]:
        data = bytearray(whole)
        data[at] ^= 1 << int(rng.integers(8))
        if compressed:
            packed = zlib.compress(bytes(data[128:]))
            data = data[:128] + struct.pack("<II", 15, len(packed)) + packed
        file = io.BytesIO(data)
        try:
            for name, variable in mat5.variables(file).items():
                if name == "c":
                    mat5.read_cells(file, variable)
                else:
                    assert mat5.read(file, variable, name).shape == variable.shape
        except (mat5.DamagedError, zlib.error):
            refused += 1
    assert refused > 50
