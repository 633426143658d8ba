"""Every operation of the table against torchvision's v2 float functionals and Pillow, one at a time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as reference
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter
from torch import Tensor

from fastbyol_kernels import two_views as op
from fastbyol_kernels.two_views import JITTER_ORDERS, Column, two_views

# The promise is 2/255. float32 needs far less: some 20 roundings of 6e-8, and tap positions to 4e-6 pixels on noise.
TOLERANCE = 2e-5
JITTER = {
    Column.BRIGHTNESS: reference.adjust_brightness,
    Column.CONTRAST: reference.adjust_contrast,
    Column.SATURATION: reference.adjust_saturation,
    Column.HUE: reference.adjust_hue,
}
FACTORS = {Column.BRIGHTNESS: 1.3, Column.CONTRAST: 0.65, Column.SATURATION: 1.4, Column.HUE: -0.09}


def images(height: int, width: int) -> Tensor:
    """Six hard images: noise, saturated noise, a smooth ramp, gray noise, black, and nearly gray."""
    random = torch.Generator().manual_seed(height * 1000 + width)
    noise = torch.randint(0, 256, (6, height, width, 3), generator=random)
    noise[1] = (noise[1] > 127) * 255
    noise[2] = (torch.arange(height)[:, None, None] * 3 + torch.arange(width)[:, None] + torch.arange(3) * 40) % 256
    noise[3] = noise[3, :, :, :1]
    noise[4] = 0
    noise[5] = 128 + (noise[5] > 127)
    return noise.to(torch.uint8)


def table(height: int, width: int, entries: Mapping[Column, float | Tensor], num_views: int = 2) -> Tensor:
    """The identity on six images, but for ``entries``."""
    rows = torch.zeros(num_views, 6, len(Column))
    identity = {Column.HEIGHT: height, Column.WIDTH: width, Column.BRIGHTNESS: 1, Column.CONTRAST: 1, Column.SATURATION: 1}
    for column, value in {**identity, **entries}.items():
        rows[..., column] = value
    return rows


def floats(pixels: Tensor) -> Tensor:
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
    """The op with one table for all images equals ``expected`` on float64 images, for both views."""
    pixels, rows = images(*shape), table(*shape, entries)
    views = two_views(pixels.to(device), rows.to(device), size=size, **settings).cpu().double()  # type: ignore[arg-type]
    torch.testing.assert_close(views, expected(floats(pixels)).expand(2, -1, -1, -1, -1).double(), rtol=0.0, atol=tolerance)


def test_identity_is_exact_to_rounding(device: torch.device) -> None:
    assert_is(lambda x: x, {}, device, tolerance=1e-7)


@settings(max_examples=40, deadline=None)
@given(st.data(), st.integers(4, 70), st.integers(4, 70), st.integers(4, 40), st.booleans())
def test_crop_resize_and_flip(data: st.DataObject, height: int, width: int, size: int, flip: bool) -> None:
    box_height, box_width = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
    top, left = data.draw(st.integers(0, height - box_height)), data.draw(st.integers(0, width - box_width))

    def expected(x: Tensor) -> Tensor:
        x = reference.resized_crop(x, top, left, box_height, box_width, [size, size], antialias=True)
        return reference.horizontal_flip(x) if flip else x

    box = {Column.TOP: top, Column.LEFT: left, Column.HEIGHT: box_height, Column.WIDTH: box_width, Column.FLIP: float(flip)}
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
    cube = torch.tensor(list(itertools.product(levels, repeat=3)), dtype=torch.uint8).view(1, 27, 27, 3)
    for shift in torch.linspace(-0.5, 0.5, 25).tolist():
        rows = table(27, 27, {Column.HUE: shift})[:1, :1]
        views = two_views(cube.to(device), rows.to(device), size=27).cpu()
        expected = reference.adjust_hue(floats(cube), shift)
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
    assert_is(lambda x: reference.rgb_to_grayscale(x, 3), {Column.GRAYSCALE: 1.0}, device)


@pytest.mark.parametrize("kernel", [1, 3, 9, 23, 47])
@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0, 9.0])
def test_gaussian_blur(kernel: int, sigma: float, device: torch.device) -> None:
    expected = float(np.float32(sigma))
    assert_is(
        lambda x: reference.gaussian_blur(x, [kernel, kernel], [expected, expected]),
        {Column.BLUR_SIGMA: sigma},
        device,
        blur_kernel=kernel,
    )


@pytest.mark.parametrize("sigma", [0.1, 0.5, 0.99, 1.0, 1.7, 2.0, 4.3])
def test_pil_blur(sigma: float, device: torch.device) -> None:
    """Pillow rounds to a level after each of its six passes: at most half a level each and three together.

    Errors average out but for ties, which go down: a sixth of all values where the weights are sixths (sigma 1).
    """
    pixels, rows = images(24, 24), table(24, 24, {Column.BLUR_SIGMA: sigma}, num_views=1)
    pillow = [np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(sigma))) for image in pixels.numpy()]
    levels = two_views(pixels.to(device), rows.to(device), size=24, blur="pil").cpu()[0].double() * 255
    error = levels - floats(torch.from_numpy(np.stack(pillow))) * 255
    assert error.abs().max() < 3.0
    assert error.abs().mean() < 0.6
    assert abs(error.mean()) < (0.5 if sigma == 1.0 else 0.1)


def test_pil_blur_of_a_point_has_the_asked_variance(device: torch.device) -> None:
    """What extended box blurs are for: the variance is exact for any sigma, in float64 to rounding."""
    point = torch.zeros(1, 41, 41, 3, dtype=torch.uint8)
    point[0, 20, 20] = 255
    for sigma in (0.3, 0.8, 1.0, 1.9, 3.1):
        rows = table(41, 41, {Column.BLUR_SIGMA: sigma})[:1, :1].to(device)
        profile = two_views(point.to(device), rows, size=41, blur="pil", dtype=torch.float64)[0, 0, 0].sum(0).cpu()
        offset = torch.arange(41, dtype=torch.float64) - 20
        assert math.isclose(float((profile * offset**2).sum()), float(np.float32(sigma)) ** 2, rel_tol=1e-9)


def test_solarize(device: torch.device) -> None:
    assert_is(lambda x: reference.solarize(x, 0.5), {Column.SOLARIZE: 1.0}, device)


def test_normalize(device: torch.device) -> None:
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    assert_is(lambda x: reference.normalize(x, mean, std), {}, device, mean=mean, std=std)


def mixed_table(num_views: int, height: int, width: int) -> Tensor:
    """Rows that differ in everything."""
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
def test_a_view_depends_on_its_own_row_and_image_alone(
    blur: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, whatever stands beside it and however the work is cut into passes."""
    pixels, rows = images(40, 33).to(device), mixed_table(5, 40, 33).to(device)
    together = two_views(pixels, rows, size=20, blur=blur)
    for image in range(6):
        alone = two_views(pixels[image : image + 1], rows[:, image : image + 1], size=20, blur=blur)
        assert torch.equal(alone[:, 0], together[:, image])
    monkeypatch.setattr(op, "_PASS_BYTES_CPU", 1)
    monkeypatch.setattr(op, "_PASS_BYTES_GPU", 1)
    assert torch.equal(two_views(pixels, rows, size=20, blur=blur), together)


def test_layout_and_dtypes(device: torch.device) -> None:
    """float32 agrees with float64 to its rounding, bfloat16 is float32 rounded, and convolutions find channels_last."""
    pixels, rows = images(40, 33).to(device), mixed_table(3, 40, 33).to(device)
    exact, single, half = (
        two_views(pixels, rows, size=20, std=(0.2, 0.3, 0.4), dtype=dtype)
        for dtype in (torch.float64, torch.float32, torch.bfloat16)
    )
    for views in (exact, single, half):
        assert views.shape == (3, 6, 3, 20, 20)
        assert views.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    assert (exact.dtype, single.dtype, half.dtype) == (torch.float64, torch.float32, torch.bfloat16)
    torch.testing.assert_close(single.double(), exact, rtol=0.0, atol=TOLERANCE)
    assert torch.equal(half, single.bfloat16())


def test_strided_images_are_read_as_they_are(device: torch.device) -> None:
    pixels, rows = images(40, 33).to(device), mixed_table(2, 40, 33).to(device)
    strided = pixels.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert torch.equal(two_views(strided, rows, size=20), two_views(pixels, rows, size=20))


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
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_arguments_are_named(argument: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{argument} "):
        two_views(**{**GOOD, argument: value})  # type: ignore[arg-type]
