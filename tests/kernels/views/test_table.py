"""Every operation of the table against torchvision's float functionals and Pillow."""

from __future__ import annotations

import ast
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter
from torch import Tensor

from compiled_process import printed
from fastbyol_kernels.views import bytes_moved, reference, triton, two_views
from fastbyol_kernels.views.table import JITTER_ORDERS, Column
from fastbyol_kernels.views.triton import launch

# The promise is 2/255. float32 needs far less: some 20 roundings of 6e-8, and tap positions to 4e-6
# pixels on noise.
TOLERANCE = 2e-5
JITTER = {
    Column.BRIGHTNESS: torchvision.adjust_brightness,
    Column.CONTRAST: torchvision.adjust_contrast,
    Column.SATURATION: torchvision.adjust_saturation,
    Column.HUE: torchvision.adjust_hue,
}
FACTORS = {Column.BRIGHTNESS: 1.3, Column.CONTRAST: 0.65, Column.SATURATION: 1.4, Column.HUE: -0.09}


def images(height: int, width: int) -> Tensor:
    """Return six hard images: noise, saturated noise, a ramp, gray noise, black, nearly gray."""
    random = torch.Generator().manual_seed(height * 1000 + width)
    noise = torch.randint(0, 256, (6, height, width, 3), generator=random)
    noise[1] = (noise[1] > 127) * 255
    noise[2] = (
        torch.arange(height)[:, None, None] * 3
        + torch.arange(width)[:, None]
        + torch.arange(3) * 40
    ) % 256
    noise[3] = noise[3, :, :, :1]
    noise[4] = 0
    noise[5] = 128 + (noise[5] > 127)
    return noise.to(torch.uint8)


def table(
    height: int, width: int, entries: Mapping[Column, float | Tensor], num_views: int = 2
) -> Tensor:
    """Return the identity on six images except for ``entries``."""
    rows = torch.zeros(num_views, 6, len(Column))
    identity = {
        Column.HEIGHT: height,
        Column.WIDTH: width,
        Column.BRIGHTNESS: 1,
        Column.CONTRAST: 1,
        Column.SATURATION: 1,
    }
    for column, value in {**identity, **entries}.items():
        rows[..., column] = value
    return rows


def as_double(pixels: Tensor) -> Tensor:
    return pixels.permute(0, 3, 1, 2).double() / 255.0


def assert_is(
    expected: Callable[[Tensor], Tensor],
    entries: Mapping[Column, float | Tensor],
    device: torch.device,
    tolerance: float = TOLERANCE,
    shape: tuple[int, int] = (24, 24),
    size: int = 24,
    **settings: object,
) -> None:
    """Compare the op, with one table for all images and both views, to ``expected`` in float64."""
    pixels, rows = images(*shape), table(*shape, entries)
    wanted = expected(as_double(pixels)).expand(2, -1, -1, -1, -1).double()
    for kernels in ("reference", "auto"):
        views = two_views(
            pixels.to(device), rows.to(device), size=size, kernels=kernels, **settings
        )  # type: ignore[arg-type]
        torch.testing.assert_close(
            views.cpu().double(),
            wanted,
            rtol=0.0,
            atol=tolerance,
            msg=lambda m, k=kernels: f"{k}: {m}",
        )


def test_identity_is_exact_to_rounding(device: torch.device) -> None:
    # 1 / 255 and its product with a level are rounded: twice 2**-24.
    assert_is(lambda x: x, {}, device, tolerance=1.2e-7)


@settings(max_examples=40)
@given(st.data(), st.integers(4, 70), st.integers(4, 70), st.integers(4, 40), st.booleans())
def test_crop_resize_and_flip(
    data: st.DataObject, height: int, width: int, size: int, flip: bool
) -> None:
    box_height, box_width = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
    top, left = (
        data.draw(st.integers(0, height - box_height)),
        data.draw(st.integers(0, width - box_width)),
    )

    def expected(x: Tensor) -> Tensor:
        x = torchvision.resized_crop(
            x, top, left, box_height, box_width, [size, size], antialias=True
        )
        return torchvision.horizontal_flip(x) if flip else x

    box = {
        Column.TOP: top,
        Column.LEFT: left,
        Column.HEIGHT: box_height,
        Column.WIDTH: box_width,
        Column.FLIP: float(flip),
    }
    assert_is(expected, box, torch.device("cpu"), shape=(height, width), size=size)


@pytest.mark.parametrize(
    ("column", "value"),
    [(column, value) for column in tuple(JITTER)[:3] for value in (0.0, 0.2, 0.9, 1.1, 1.8)]
    + [(Column.HUE, value) for value in (-0.5, -0.3, -1 / 6, -0.01, 1e-4, 0.1, 1 / 3, 0.5)],
)
def test_one_jitter_operation(column: Column, value: float, device: torch.device) -> None:
    assert_is(lambda x: JITTER[column](x, float(np.float32(value))), {column: value}, device)


def test_hue_on_every_corner_edge_and_face_of_the_colour_cube(device: torch.device) -> None:
    levels = (0, 1, 2, 100, 101, 127, 128, 254, 255)
    cube = torch.tensor(list(itertools.product(levels, repeat=3)), dtype=torch.uint8).view(
        1, 27, 27, 3
    )
    for shift in torch.linspace(-0.5, 0.5, 25).tolist():
        rows = table(27, 27, {Column.HUE: shift})[:1, :1]
        views = two_views(cube.to(device), rows.to(device), size=27).cpu()
        expected = torchvision.adjust_hue(as_double(cube), shift)
        torch.testing.assert_close(views[0].double(), expected, rtol=0.0, atol=TOLERANCE)


@pytest.mark.parametrize("order", range(24))
def test_each_of_the_24_orders(order: int, device: torch.device) -> None:
    def expected(x: Tensor) -> Tensor:
        for column in JITTER_ORDERS[order]:
            x = JITTER[column](x, float(np.float32(FACTORS[column])))
        return x

    assert_is(expected, {**FACTORS, Column.ORDER: order}, device)


def test_the_orders_are_all_permutations() -> None:
    assert len({tuple(order) for order in JITTER_ORDERS}) == 24
    assert all(sorted(order) == sorted(JITTER) for order in JITTER_ORDERS)


def test_grayscale(device: torch.device) -> None:
    assert_is(lambda x: torchvision.rgb_to_grayscale(x, 3), {Column.GRAYSCALE: 1.0}, device)


@pytest.mark.parametrize("kernel", [1, 3, 9, 23, 47])
@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0, 9.0])
def test_gaussian_blur(kernel: int, sigma: float, device: torch.device) -> None:
    expected = float(np.float32(sigma))
    assert_is(
        lambda x: torchvision.gaussian_blur(x, [kernel, kernel], [expected, expected]),
        {Column.BLUR_SIGMA: sigma},
        device,
        blur_kernel=kernel,
    )


@pytest.mark.parametrize("sigma", [0.1, 0.5, 0.99, 1.0, 1.7, 2.0, 4.3])
def test_pil_blur(sigma: float, device: torch.device) -> None:
    """Compare with Pillow, which rounds after each of six passes, by three levels at most in total.

    Errors average out except for ties, which round down: a sixth of all values for sigma 1, whose
    weights are sixths.
    """
    pixels, rows = images(24, 24), table(24, 24, {Column.BLUR_SIGMA: sigma}, num_views=1)
    pillow = [
        np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(sigma)))
        for image in pixels.numpy()
    ]
    levels = (
        two_views(pixels.to(device), rows.to(device), size=24, blur="pil").cpu()[0].double() * 255
    )
    error = levels - as_double(torch.from_numpy(np.stack(pillow))) * 255
    assert error.abs().max() < 3.0
    assert error.abs().mean() < 0.6
    assert abs(error.mean()) < (0.5 if sigma == 1.0 else 0.1)


def test_pil_blur_of_a_point_has_the_asked_variance(device: torch.device) -> None:
    """Check that the variance is exact, the purpose of extended box blurs."""
    point = torch.zeros(1, 41, 41, 3, dtype=torch.uint8)
    point[0, 20, 20] = 255
    for sigma in (0.3, 0.8, 1.0, 1.9, 3.1):
        rows = table(41, 41, {Column.BLUR_SIGMA: sigma})[:1, :1].to(device)
        profile = (
            two_views(point.to(device), rows, size=41, blur="pil", dtype=torch.float64)[0, 0, 0]
            .sum(0)
            .cpu()
        )
        offset = torch.arange(41, dtype=torch.float64) - 20
        assert math.isclose(
            float((profile * offset**2).sum()), float(np.float32(sigma)) ** 2, rel_tol=1e-9
        )


def test_solarize(device: torch.device) -> None:
    assert_is(lambda x: torchvision.solarize(x, 0.5), {Column.SOLARIZE: 1.0}, device)


def test_normalize(device: torch.device) -> None:
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    assert_is(lambda x: torchvision.normalize(x, mean, std), {}, device, mean=mean, std=std)


def mixed_table(num_views: int, height: int, width: int) -> Tensor:
    """Return rows that differ in everything."""
    random = torch.Generator().manual_seed(7)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(num_views, 6, generator=random)

    box_height, box_width = uniform(height / 3, height).floor(), uniform(width / 3, width).floor()
    jitter, blur = uniform(0, 1) < 0.8, uniform(0, 1) < 0.5
    entries = {
        Column.TOP: (uniform(0, 1) * (height - box_height)).floor(),
        Column.LEFT: (uniform(0, 1) * (width - box_width)).floor(),
        Column.HEIGHT: box_height,
        Column.WIDTH: box_width,
        Column.FLIP: uniform(0, 2).floor(),
        Column.ORDER: uniform(0, 24).floor(),
        **{column: torch.where(jitter, uniform(0.6, 1.4), 1.0) for column in tuple(JITTER)[:3]},
        Column.HUE: torch.where(jitter, uniform(-0.1, 0.1), 0.0),
        Column.GRAYSCALE: uniform(0, 1.25).floor(),
        Column.BLUR_SIGMA: torch.where(blur, uniform(0.1, 2.0), 0.0),
        Column.SOLARIZE: uniform(0, 1.25).floor(),
    }
    return table(height, width, entries, num_views)


@pytest.mark.parametrize("blur", ["gaussian", "pil"])
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_a_view_depends_on_its_own_row_and_image_alone(
    kernels: str, blur: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare bit for bit across batches, passes and numbers of threads."""
    pixels, rows = images(40, 33).to(device), mixed_table(5, 40, 33).to(device)
    together = two_views(pixels, rows, size=20, blur=blur, kernels=kernels)
    for image in range(6):
        part = pixels[image : image + 1], rows[:, image : image + 1].contiguous()
        assert torch.equal(
            two_views(*part, size=20, blur=blur, kernels=kernels)[:, 0], together[:, image]
        )
    monkeypatch.setattr(reference, "_PASS_BYTES_CPU", 1)
    monkeypatch.setattr(reference, "_PASS_BYTES_GPU", 1)
    threads = torch.get_num_threads()
    for count in (1, 3):
        torch.set_num_threads(count)
        again = two_views(pixels, rows, size=20, blur=blur, kernels=kernels)
        torch.set_num_threads(threads)
        assert torch.equal(again, together)


def test_layout_and_dtypes(device: torch.device) -> None:
    """Check roundings between dtypes, and channels-last memory for convolutions."""
    pixels, rows = images(40, 33).to(device), mixed_table(3, 40, 33).to(device)
    exact, single, half = (
        two_views(pixels, rows, size=20, std=(0.2, 0.3, 0.4), dtype=dtype, kernels="reference")
        for dtype in (torch.float64, torch.float32, torch.bfloat16)
    )
    for views in (exact, single, half):
        assert views.shape == (3, 6, 3, 20, 20)
        assert views.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    assert (exact.dtype, single.dtype, half.dtype) == (torch.float64, torch.float32, torch.bfloat16)
    torch.testing.assert_close(single.double(), exact, rtol=0.0, atol=TOLERANCE)
    assert torch.equal(half, single.bfloat16())


@pytest.mark.parametrize("kernels", ["cpu", "reference"])
def test_strided_images_are_read_as_they_are(kernels: str, device: torch.device) -> None:
    if kernels == "cpu" and device.type != "cpu":
        pytest.skip("the images are on a GPU")
    pixels, rows = images(40, 33).to(device), mixed_table(2, 40, 33).to(device)
    strided = pixels.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    read = [two_views(x, rows, size=20, kernels=kernels) for x in (strided, pixels)]
    assert torch.equal(*read)


def assert_kernels_agree(
    pixels: Tensor,
    rows: Tensor,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> None:
    """Compare the kernels with the float64 reference.

    float32 has the reference's ``TOLERANCE``. In bfloat16 half a unit in the last place is 2**-9 of
    the value, a whole one 2**-8, and the interpreter, which truncates, may be one more off. 16-bit
    staging adds 2**-17 at most three times, which contrast and hue can double.
    """
    pixels, rows = pixels.to(device), rows.to(device)
    exact = two_views(pixels, rows, dtype=torch.float64, kernels="reference", **options)
    half = dtype == torch.bfloat16
    for kernels in ("triton", "cpu") if device.type == "cpu" else ("triton",):
        got = two_views(pixels, rows, dtype=dtype, kernels=kernels, **options)
        assert got.dtype == dtype
        assert got.stride() == exact.stride()
        torch.testing.assert_close(
            got.double(), exact, rtol=2**-7 if half else 0.0,
            atol=6 * 2**-17 if half else TOLERANCE
        )  # fmt: skip


# Image, view: the same size, both axes shrunk (odd sizes, 4 and 6 taps), enlarged, one of each, no
# power of two of tiles.
KERNEL_SHAPES = [(16, 16, 16), (31, 21, 11), (9, 7, 13), (30, 6, 10), (24, 24, 23)]


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize(("height", "width", "size"), KERNEL_SHAPES)
@pytest.mark.parametrize("blur", ["gaussian", "pil"])
def test_kernels_equal_the_reference(
    height: int, width: int, size: int, blur: str, device: torch.device
) -> None:
    pixels, rows = images(height, width), mixed_table(2, height, width)
    assert_kernels_agree(
        pixels, rows, device, size=size, blur=blur, mean=(0.4, 0.5, 0.1), std=(1.0, 2.0, 3.0)
    )


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("blur", ["gaussian", "pil"])
def test_kernels_equal_the_reference_in_bfloat16(blur: str, device: torch.device) -> None:
    pixels, rows = images(20, 15), mixed_table(2, 20, 15)
    assert_kernels_agree(pixels, rows, device, size=14, blur=blur, dtype=torch.bfloat16)


def test_kernels_follow_all_24_orders(device: torch.device) -> None:
    rows = table(8, 8, FACTORS, num_views=4)
    rows[..., Column.ORDER] = torch.arange(24.0).view(4, 6)
    assert_kernels_agree(images(8, 8), rows, device, size=8)


def test_kernels_turn_hues_of_the_whole_colour_cube(device: torch.device) -> None:
    levels = (0, 1, 2, 100, 101, 127, 128, 254, 255)
    cube = torch.tensor(list(itertools.product(levels, repeat=3)), dtype=torch.uint8).view(
        1, 27, 27, 3
    )
    rows = table(27, 27, {})[:1, :1].repeat(13, 1, 1)
    rows[:, 0, Column.HUE] = torch.linspace(-0.5, 0.5, 13)
    assert_kernels_agree(cube, rows, device, size=27)


@pytest.mark.parametrize("kernel", [1, 5, 31])
def test_kernels_blur_with_any_number_of_taps(kernel: int, device: torch.device) -> None:
    rows = table(
        16, 16, {Column.BLUR_SIGMA: torch.tensor([0.05, 0.1, 0.7, 2.0, 9.0, 1e3])}, num_views=1
    )
    assert_kernels_agree(images(16, 16), rows, device, size=16, blur_kernel=kernel)


def test_kernels_blur_with_pillows_boxes_of_any_radius(device: torch.device) -> None:
    sigmas = {Column.BLUR_SIGMA: torch.tensor([0.05, 0.99, 1.0, 2.5, 6.0, 40.0])}
    for size in (5, 1):
        rows = table(size, size, sigmas, num_views=1)
        assert_kernels_agree(images(size, size), rows, device, size=size, blur="pil")


@pytest.mark.gpu
@settings(max_examples=6, derandomize=True)
@given(
    st.integers(1, 24),
    st.integers(1, 24),
    st.integers(5, 20),
    st.sampled_from(("gaussian", "pil")),
    st.data(),
)
def test_kernels_equal_the_reference_at_any_shape(
    height: int, width: int, size: int, blur: str, data: st.DataObject
) -> None:
    rows = mixed_table(1, height, width)
    rows[..., Column.HEIGHT : Column.WIDTH + 1].clamp_(min=1)
    half = data.draw(st.booleans())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert_kernels_agree(
        images(height, width),
        rows,
        device,
        size=size,
        blur=blur,
        blur_kernel=data.draw(st.integers(0, min(size - 1, 5))) * 2 + 1,
        dtype=torch.bfloat16 if half else torch.float32,
    )


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize(
    ("dtype", "blur"),
    [(torch.float32, "gaussian"), (torch.float32, "pil"), (torch.bfloat16, "pil")],
    ids=str,
)
def test_kernels_cut_views_into_tiles_and_bands(
    dtype: torch.dtype, blur: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Use several tiles and bands per view, as at full size, with a short last one.

    Of Pillow's blurs the first is the same away from the edges, the second nowhere, and the weights
    of both need several blocks.
    """
    for name, value in (("CROP_BLOCK", 64), ("BLOCK", 32), ("BLOCK_W", 32)):
        monkeypatch.setattr(triton, name, value)
    monkeypatch.setattr(triton, "MIN_ROWS", 5)
    monkeypatch.setattr(triton, "MAX_ROWS", 5)
    pixels, rows = images(14, 14)[:3], mixed_table(1, 14, 14)[:, :3].contiguous()
    rows[0, :2, Column.BLUR_SIGMA] = torch.tensor([1.2, 2.2])
    assert_kernels_agree(pixels, rows, device, size=13, blur=blur, dtype=dtype)


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize(("dtype", "blur"), [(torch.float32, "gaussian"), (torch.bfloat16, "pil")])
def test_views_in_blocks_are_the_plain_ones_moved(
    dtype: torch.dtype, blur: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare every value, and all others with zero: bit for bit where one order of sums is.

    A GPU's mean luma may have another order, of fp32, which bf16 can round to a unit.
    """
    near = 0.0 if device.type == "cpu" else 2**-7 if dtype == torch.bfloat16 else TOLERANCE
    for name in ("CROP_BLOCK", "BLOCK"):
        monkeypatch.setattr(triton, name, 64)  # two tiles a view
    pixels, rows = images(10, 9)[:3].to(device), mixed_table(1, 10, 9)[:, :3].contiguous()
    # Views finished by each of the kernels: blurred, of another contrast, neither.
    rows[..., Column.BLUR_SIGMA] = torch.tensor([1.5, 0.0, 0.0])
    rows[..., Column.CONTRAST] = torch.tensor([1.0, 0.8, 1.0])
    options: dict[str, Any] = {"size": 10, "blur": blur, "blur_kernel": 3, "dtype": dtype}
    for kernels in ("triton", "cpu", "reference") if device.type == "cpu" else ("triton",):
        plain, blocks = (
            two_views(pixels, rows.to(device), layout=layout, kernels=kernels, **options)
            for layout in ("plain", "blocks")
        )
        assert blocks.shape == (1, 3, 16, 8, 8)
        assert blocks.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
        rest, inner = blocks.clone(), slice(2, 7)
        for y, x, channel in itertools.product(range(2), range(2), range(3)):
            at = (..., 8 * y + 4 * x + channel, inner, inner)
            torch.testing.assert_close(
                blocks[at], plain[:, :, channel, y::2, x::2], rtol=near, atol=near
            )
            rest[at] = 0.0
        assert not rest.any()


def test_kernels_repeat_themselves_and_a_view_depends_on_its_own_row_alone(
    device: torch.device,
) -> None:
    """Compare bit for bit: no order of additions may vary."""
    pixels, rows = images(16, 13).to(device), mixed_table(2, 16, 13).to(device)
    options: dict[str, Any] = {"size": 12, "dtype": torch.bfloat16, "kernels": "triton"}
    together = two_views(pixels, rows, **options)
    assert torch.equal(two_views(pixels, rows, **options), together)
    for image in (0, 4):
        alone = two_views(
            pixels[image : image + 1], rows[:, image : image + 1].contiguous(), **options
        )
        assert torch.equal(alone[:, 0], together[:, image])


@pytest.mark.parametrize("kernels", ["triton", "cpu", "reference"])
def test_rows_of_a_set_are_its_images(kernels: str, device: torch.device) -> None:
    """Compare bit for bit with the images gathered: in any order, some twice, others never."""
    where = torch.device("cpu") if kernels == "cpu" else device
    pixels, entries = images(12, 9).to(where), mixed_table(2, 12, 9)[:, :4].contiguous().to(where)
    for rows in (torch.tensor([5, 0, 5, 3], device=where), torch.arange(4, device=where)):
        options: dict[str, Any] = {"size": 7, "blur_kernel": 3, "kernels": kernels}
        assert torch.equal(
            two_views(pixels, entries, rows=rows, **options),
            two_views(pixels[rows], entries, **options),
        )


def test_kernels_read_nothing_outside_whatever_the_table_says(device: torch.device) -> None:
    """Compare boxes outside the image with the same boxes moved inside."""
    pixels, wild = images(9, 9)[:3].to(device), table(9, 9, {})[:1, :3].to(device)
    boxes = torch.tensor([[-5.0, 3, 9, 99], [50, 2, 4, 4], [0, 8, -3, 7]])
    inside = torch.tensor([[0.0, 3, 9, 6], [8, 2, 1, 4], [0, 8, 1, 1]])
    tame = wild.clone()
    wild[0, :, : Column.WIDTH + 1], tame[0, :, : Column.WIDTH + 1] = (
        boxes.to(device),
        inside.to(device),
    )
    got, expected = (
        two_views(pixels, wild, size=9, kernels="triton"),
        two_views(pixels, tame, size=9, kernels="reference"),
    )
    torch.testing.assert_close(got, expected, rtol=0.0, atol=TOLERANCE)
    rows = torch.tensor([-1, 2**40, -(2**63)], device=device)
    assert torch.equal(
        two_views(pixels, tame, rows=rows, size=9, kernels="triton"),
        two_views(pixels[[0, 2, 0]], tame, size=9, kernels="triton"),
    )


def test_a_set_may_exceed_32_bits(device: torch.device) -> None:
    """Read images beyond 2**31 bytes, of a set whose other pages are never touched."""
    pixels = torch.empty(2**31 // 48 + 9, 4, 4, 3, dtype=torch.uint8, device=device)
    rows = torch.tensor([len(pixels) - 1, len(pixels) - 5], device=device)
    own, entries = images(4, 4)[:2].to(device), table(4, 4, {})[:1, :2].contiguous().to(device)
    pixels[rows] = own
    expected = two_views(own, entries, size=4, blur_kernel=3, kernels="reference")
    for kernels in ("triton", "cpu") if device.type == "cpu" else ("triton",):
        got = two_views(pixels, entries, rows=rows, size=4, blur_kernel=3, kernels=kernels)
        torch.testing.assert_close(got, expected, rtol=0.0, atol=TOLERANCE)


def test_a_cpu_refuses_what_lies_outside() -> None:
    pixels, rows = images(9, 9)[:2], table(9, 9, {})[:1, :2]
    for row in (-1, 2):
        with pytest.raises(ValueError, match=r"^rows holds a row outside the set of 2 images$"):
            two_views(pixels, rows, rows=torch.tensor([0, row]), size=9, kernels="cpu")
    for column, value, words in (
        (Column.TOP, 1, "does not lie within"),
        (Column.ORDER, 24, "jitter order"),
    ):
        wild = rows.clone()
        wild[0, 1, column] = value
        with pytest.raises(ValueError, match=words):
            two_views(pixels, wild, size=9, kernels="cpu")
    wide = rows.clone()
    wide[..., Column.BLUR_SIGMA] = 1.0
    with pytest.raises(ValueError, match="blur_kernel must be at most 17"):
        two_views(pixels, wide, size=9, blur_kernel=19, kernels="cpu")
    # Pillow's boxes know no such limit: they repeat the edge.
    for sigma in (9.0, 40.0):
        wide[..., Column.BLUR_SIGMA] = sigma
        exact = two_views(
            pixels, wide, size=9, blur="pil", dtype=torch.float64, kernels="reference"
        )
        got = two_views(pixels, wide, size=9, blur="pil", kernels="cpu")
        torch.testing.assert_close(got.double(), exact, rtol=0.0, atol=TOLERANCE)


@pytest.mark.parametrize("kernels", ["cpu", "reference"])
def test_another_default_device_changes_nothing(kernels: str) -> None:
    pixels, rows = images(9, 9), table(9, 9, {})
    views = two_views(pixels, rows, size=9, kernels=kernels)
    with torch.device("meta"):
        assert torch.equal(two_views(pixels, rows, size=9, kernels=kernels), views)


def test_opcheck(device: torch.device) -> None:
    pixels, rows = images(6, 6).to(device), mixed_table(1, 6, 6).to(device)
    order = torch.arange(6, device=device).flip(0)
    for dtype, picked in ((torch.float32, None), (torch.bfloat16, order)):
        in_blocks = dtype == torch.bfloat16
        arguments = (pixels, rows, picked, 4, 3, [0.0] * 3, [1.0] * 3, dtype, in_blocks)
        torch.library.opcheck(torch.ops.fastbyol.two_views, arguments)


def test_compiled_equals_eager(device: torch.device) -> None:
    pixels, rows = images(6, 6).to(device), mixed_table(1, 6, 6).to(device)

    def twice() -> Tensor:
        return two_views(pixels, rows, size=4, blur_kernel=3, kernels="triton") * 2

    assert torch.equal(torch.compile(twice, fullgraph=True, backend="aot_eager")(), twice())


@pytest.mark.parametrize("size", [1, 7, 24, 32, 96, 100, 224])
def test_launches_cover_views(size: int) -> None:
    for side in (size // 2 + 1, size, 3 * size):
        plan = launch(side, 5, size)
        assert plan.taps_y >= 2 * side / size
        assert 1 <= plan.rows <= size
    assert launch(96, 96, 96).rows * 96 % triton.BLOCK == 0


def test_bytes_moved_is_what_the_budget_says() -> None:
    """Count 256 images of 96x96 as two bfloat16 views: 35.4 MB and the table."""
    assert bytes_moved(2, 256, 96, 96, 96, 2) == 256 * 96 * 96 * 3 * (1 + 2 * 2) + 512 * 13 * 4


GOOD = {"images": images(8, 8), "table": table(8, 8, {Column.BLUR_SIGMA: 1}), "size": 8}


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("images", images(8, 8).float()),
        ("images", images(8, 8)[0]),
        ("images", images(8, 8)[..., :1]),
        ("images", images(8, 8)[:0]),
        ("table", table(8, 8, {}).double()),
        ("table", table(8, 8, {})[0]),
        ("table", table(8, 8, {})[:, :5]),
        ("table", table(8, 8, {})[..., :-1]),
        ("table", table(8, 8, {})[:0]),
        ("table", table(8, 8, {}).to("meta")),
        ("table", table(8, 8, {Column.TOP: 1})),
        ("table", table(8, 8, {Column.LEFT: -1})),
        ("table", table(8, 8, {Column.WIDTH: 9})),
        ("table", table(8, 8, {Column.HEIGHT: 0})),
        ("table", table(8, 8, {Column.HEIGHT: math.nan})),
        ("table", table(8, 8, {Column.ORDER: 24})),
        ("table", table(8, 8, {Column.ORDER: -1})),
        ("size", 0),
        ("blur", "median"),
        ("blur_kernel", 4),
        ("blur_kernel", -1),
        ("blur_kernel", 17),
        ("dtype", torch.float16),
        ("layout", "rows"),
        ("table", table(8, 8, {})[:, :2]),
        ("rows", torch.arange(6, dtype=torch.int32)),
        ("rows", torch.arange(6)[None]),
        ("rows", torch.arange(6, device="meta")),
        ("rows", torch.arange(6) + 1),
        ("rows", torch.arange(0)),
        ("kernels", "cuda"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_arguments_are_named(argument: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{argument} "):
        two_views(**{**GOOD, argument: value})  # type: ignore[arg-type]


def test_blocks_of_an_odd_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^size must be even"):
        two_views(**{**GOOD, "size": 7, "layout": "blocks"})  # type: ignore[arg-type]


def test_wrong_arguments_of_the_kernels_are_named(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels, rows = images(8, 8).to(device), mixed_table(2, 8, 8).to(device)
    good: dict[str, Any] = {"images": pixels, "table": rows, "size": 8, "kernels": "triton"}
    strided = {
        "images": pixels.transpose(1, 2),
        "table": rows.transpose(0, 1).contiguous().transpose(0, 1),
        "rows": torch.arange(12, device=device)[::2],
    }
    for name, value in (*strided.items(), ("blur_kernel", 17)):
        with pytest.raises(ValueError, match=rf"^{name} "):
            two_views(**{**good, name: value})
    if not pixels.is_cuda:
        monkeypatch.setattr("fastbyol_kernels.dispatch.TRITON_ON_CPU", False)
        with pytest.raises(ValueError, match="TRITON_INTERPRET"):
            two_views(**good)


BARRIERS = """
import torch
from fastbyol_kernels import ahead_of_time
from fastbyol_kernels.views import two_views

images, table = torch.zeros(2, 96, 96, 3, dtype=torch.uint8), torch.zeros(2, 2, 13)
for architecture in (80, 90):
    with ahead_of_time.recording(architecture) as launches:
        for blur in ("gaussian", "pil"):
            two_views(images, table, size=96, blur=blur, kernels="triton")
    codes = [one.compiled.asm for one in launches if one.name == "_blur_kernel"]
    print([(code["ttgir"].count(".barrier"), code["ptx"].count("bar.sync") > 0) for code in codes])
"""


def test_a_blurs_first_pass_ends_in_a_barrier() -> None:
    """It makes a program's threads see each other's writes, and becomes a bar.sync."""
    counted = [ast.literal_eval(line) for line in printed(BARRIERS).splitlines()]
    assert counted == [[(1, True), (1, True)]] * 2  # the second pass writes the result
