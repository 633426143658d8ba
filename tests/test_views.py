"""The drawn distributions against torchvision's own get_params, the draw's independence, and both
views end to end.

All seeds are fixed, so every p-value is one number for good. 1e-3 is asked of each; the negative
controls show that a slightly wrong distribution lands far below.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as reference
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from torchvision.transforms import ColorJitter, RandomResizedCrop

from fastbyol import views
from fastbyol.config import ViewsConfig
from fastbyol_kernels.philox import DOMAIN_VIEWS, philox4x32, uniform
from fastbyol_kernels.views.table import JITTER_ORDERS, Column

DRAWS = 20_000
PASS = 1e-3
CONTROL = 1e-6
BOTH_APPLIED = ViewsConfig(jitter_p=1.0, blur_p=(1.0, 1.0), solarize_p=(0.3, 0.2))
# Square, flat, tall, so long that no attempt fits, so long that some fit.
SIZES = [(96, 96), (64, 96), (200, 150), (20, 120), (32, 58)]


def draw(
    config: ViewsConfig, *, height: int = 96, width: int = 96, seed: int = 1, epoch: int = 0
) -> np.ndarray:
    """Draw 20k samples' tables as float64 (V, DRAWS, columns)."""
    table = views.draw(
        config, torch.arange(DRAWS), seed=seed, epoch=epoch, height=height, width=width
    )
    return table.double().numpy()


@cache
def torchvision_boxes(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> np.ndarray:
    """Draw (DRAWS, 4): top, left, height, width by RandomResizedCrop.get_params."""
    image = torch.empty(1, height, width)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return np.array(
            [RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(DRAWS)],
            dtype=float,
        )


@cache
def torchvision_jitter() -> np.ndarray:
    """Draw (DRAWS, 8): order of the four operations, factors, by ColorJitter(.4, .4, .4, .1)."""
    jitter = ColorJitter(0.4, 0.4, 0.4, 0.1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        draws = [
            jitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
            for _ in range(DRAWS)
        ]
    return np.array([[*order.tolist(), *factors] for order, *factors in draws])


def boxes_of(table: np.ndarray) -> np.ndarray:
    return table[..., : Column.WIDTH + 1]


def aspects(boxes: np.ndarray) -> dict[str, np.ndarray]:
    """Return the numbers that are tested: columns, area, shape, and offset relative to the room."""
    top, left, height, width = boxes.T
    return {
        "top": top,
        "left": left,
        "height": height,
        "width": width,
        "area": height * width,
        "log ratio": np.log(width / height),
        "top by height": top * 1000 + height,
        "left by width": left * 1000 + width,
    }


def same(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Return the p-value of two-sample Kolmogorov-Smirnov, 1 if both are one constant."""
    if np.ptp(ours) == np.ptp(theirs) == 0 and ours[0] == theirs[0]:
        return 1.0
    return float(stats.ks_2samp(ours, theirs).pvalue)


def same_counts(ours: np.ndarray, theirs: np.ndarray, bins: int) -> float:
    """Return the p-value of the chi-square test over 0..bins-1, without empty bins."""
    counts = np.stack(
        [np.bincount(sample.astype(int), minlength=bins) for sample in (ours, theirs)]
    )
    counts = counts[:, counts.sum(0) > 0]
    return 1.0 if counts.shape[1] == 1 else float(stats.chi2_contingency(counts).pvalue)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_crop_boxes_are_distributed_as_torchvisions(height: int, width: int) -> None:
    config = ViewsConfig()
    theirs = torchvision_boxes(height, width, config.scale, config.ratio)
    for boxes in boxes_of(draw(config, height=height, width=width)):
        for name, sample in aspects(boxes).items():
            assert same(sample, aspects(theirs)[name]) > PASS, name
        for column, bins in enumerate((height, width, height + 1, width + 1)):
            assert same_counts(boxes[:, column], theirs[:, column], bins) > PASS, column


def test_the_central_crop_is_torchvisions_where_no_attempt_fits() -> None:
    for height, width, ratio in (
        (20, 120, (0.75, 4 / 3)),
        (120, 20, (0.75, 4 / 3)),
        (33, 33, (2.0, 3.0)),
        (10, 3, (0.5, 2.0)),
    ):
        config = ViewsConfig(scale=(1.0, 1.0), ratio=ratio)
        boxes = boxes_of(draw(config, height=height, width=width)).reshape(-1, 4)
        theirs = RandomResizedCrop.get_params(
            torch.empty(1, height, width), list(config.scale), list(ratio)
        )
        assert np.array_equal(np.unique(boxes, axis=0), [theirs])


@pytest.mark.parametrize(
    "wrong",
    [
        {"scale": (0.22, 1.0)},
        {"scale": (0.2, 0.9)},
        {"ratio": (0.77, 4 / 3)},
        {"ratio": (0.75, 1.36)},
    ],
    ids=str,
)
def test_the_crop_tests_see_a_slightly_wrong_range(wrong: dict[str, tuple[float, float]]) -> None:
    theirs = aspects(torchvision_boxes(96, 96, ViewsConfig().scale, ViewsConfig().ratio))
    ours = aspects(boxes_of(draw(ViewsConfig(**wrong)))[0])
    assert min(same(ours[name], theirs[name]) for name in theirs) < CONTROL


def test_the_crop_tests_see_a_uniform_ratio_and_an_offset_by_one() -> None:
    theirs = torchvision_boxes(96, 96, ViewsConfig().scale, ViewsConfig().ratio)
    random = np.random.default_rng(0)
    area, ratio = 96**2 * random.uniform(0.2, 1.0, DRAWS), random.uniform(0.75, 4 / 3, DRAWS)
    width, height = np.round(np.sqrt(area * ratio)), np.round(np.sqrt(area / ratio))
    fits = (width <= 96) & (height <= 96)
    boxes = np.stack([height * 0, width * 0, height, width], axis=1)[fits]
    assert same(aspects(boxes)["log ratio"], aspects(theirs)["log ratio"]) < CONTROL
    never_last = boxes_of(draw(ViewsConfig()))[0]
    never_last[:, 0] = np.minimum(never_last[:, 0], np.maximum(95 - never_last[:, 2], 0))
    assert (
        same_counts(never_last[:, 0] + never_last[:, 2], theirs[:, 0] + theirs[:, 2], 97) < CONTROL
    )


def test_jitter_is_distributed_as_torchvisions() -> None:
    theirs = torchvision_jitter()
    their_orders = np.array(
        [
            [
                list(itertools.permutations(range(4))).index(tuple(row))
                for row in theirs[:, :4].astype(int)
            ]
        ]
    )
    for table in draw(BOTH_APPLIED):
        for offset, column in enumerate(
            (Column.BRIGHTNESS, Column.CONTRAST, Column.SATURATION, Column.HUE)
        ):
            assert same(table[:, column], theirs[:, 4 + offset]) > PASS, column.name
        assert same_counts(table[:, Column.ORDER], their_orders[0], 24) > PASS


def test_order_numbers_mean_the_permutations_that_were_counted() -> None:
    names = [Column.BRIGHTNESS, Column.CONTRAST, Column.SATURATION, Column.HUE]
    assert [[names.index(column) for column in order] for order in JITTER_ORDERS] == [
        list(order) for order in itertools.permutations(range(4))
    ]


@pytest.mark.parametrize(
    ("wrong", "column"),
    [
        ({"brightness": 0.88}, Column.BRIGHTNESS),
        ({"contrast": 0.72}, Column.CONTRAST),
        ({"strength": 0.55}, Column.SATURATION),
        ({"hue": 0.22}, Column.HUE),
    ],
    ids=str,
)
def test_the_jitter_tests_see_a_slightly_wrong_range(
    wrong: dict[str, float], column: Column
) -> None:
    theirs = torchvision_jitter()[:, 4 + column - Column.BRIGHTNESS]
    table = draw(ViewsConfig(jitter_p=1.0, **wrong))[0]
    assert same(table[:, column], theirs) < CONTROL


def test_the_order_test_sees_one_missing_order() -> None:
    orders = draw(BOTH_APPLIED)[0][:, Column.ORDER]
    assert same_counts(np.minimum(orders, 22), orders, 24) < CONTROL


def test_blur_sigma_is_uniform() -> None:
    for table in draw(BOTH_APPLIED):
        assert stats.kstest(table[:, Column.BLUR_SIGMA], stats.uniform(0.1, 1.9).cdf).pvalue > PASS
        assert (
            stats.kstest(table[:, Column.BLUR_SIGMA], stats.uniform(0.1, 1.8).cdf).pvalue < CONTROL
        )


def applied(table: np.ndarray) -> dict[str, np.ndarray]:
    """Return the rows that each operation with a probability touches."""
    return {
        "flip": table[..., Column.FLIP] == 1,
        "jitter": (table[..., Column.BRIGHTNESS : Column.HUE + 1] != (1, 1, 1, 0)).any(-1),
        "grayscale": table[..., Column.GRAYSCALE] == 1,
        "blur": table[..., Column.BLUR_SIGMA] > 0,
        "solarize": table[..., Column.SOLARIZE] == 1,
    }


def test_each_operation_happens_as_often_as_configured() -> None:
    config = ViewsConfig(
        flip_p=0.45,
        jitter_p=0.8,
        grayscale_p=0.2,
        blur_p=(0.9, 0.1),
        solarize_p=(0.0, 0.25),
        strength=1.0,
        hue=0.5,
    )
    wanted = {
        "flip": (0.45, 0.45), "jitter": (0.8, 0.8), "grayscale": (0.2, 0.2), "blur": (0.9, 0.1),
        "solarize": (0.0, 0.25)
    }  # fmt: skip
    for name, rows in applied(draw(config)).items():
        for row, probability in zip(rows, wanted[name], strict=True):
            assert stats.binomtest(int(row.sum()), DRAWS, probability).pvalue > PASS, name
            assert stats.binomtest(int(row.sum()), DRAWS, probability + 0.03).pvalue < CONTROL, name


def test_probabilities_zero_and_one_are_never_and_always() -> None:
    off, on = (
        ViewsConfig(flip_p=p, jitter_p=p, grayscale_p=p, blur_p=(p, p), solarize_p=(p, p))
        for p in (0.0, 1.0)
    )
    assert not any(rows.any() for rows in applied(draw(off)).values())
    assert all(rows.all() for rows in applied(draw(on)).values())
    still = ViewsConfig(jitter_p=1.0, strength=0.0)
    assert not applied(draw(still))["jitter"].any()


def test_a_factor_never_falls_below_zero() -> None:
    factors = draw(ViewsConfig(jitter_p=1.0, strength=1.0, brightness=1.5))[..., Column.BRIGHTNESS]
    assert factors.min() >= 0.0
    assert stats.kstest(factors[0], stats.uniform(0.0, 2.5).cdf).pvalue > PASS


MIXED = ViewsConfig(blur_p=(0.5, 0.5), solarize_p=(0.3, 0.3))


@pytest.mark.parametrize(
    "other",
    [
        lambda table: table[1],
        lambda table: np.roll(table[0], 1, axis=0),
        lambda table: draw(MIXED, epoch=1)[0],
        lambda table: draw(MIXED, seed=2)[0],
    ],
    ids=["other view", "next sample", "next epoch", "next seed"],
)
def test_draws_are_independent(other: Callable[[np.ndarray], np.ndarray]) -> None:
    """No column of one draw correlates with any column of the other; nor do the columns' distances
    from their means.

    338 coefficients with standard error 20000**-0.5 = .0071: 4.5 of these leave a false alarm a
    chance of 2e-3.
    """
    table = draw(MIXED)
    one, two = table[0], other(table)
    assert not np.array_equal(one, two)
    for view in (lambda x: x, lambda x: np.abs(x - x.mean(0))):
        cross = np.corrcoef(view(one), view(two), rowvar=False)[: len(Column), len(Column) :]
        assert np.nanmax(np.abs(cross)) < 4.5 / DRAWS**0.5


def test_the_independence_test_sees_a_weak_tie() -> None:
    table = draw(MIXED)
    share = np.arange(DRAWS)[:, None] % 20 == 0
    cross = np.corrcoef(table[0], np.where(share, table[0], table[1]), rowvar=False)[
        : len(Column), len(Column) :
    ]
    assert np.nanmax(np.abs(cross)) > 4.5 / DRAWS**0.5


@settings(max_examples=30)
@given(
    st.lists(st.integers(0, 2**40 - 1), min_size=1, max_size=40),
    st.integers(0, 2**63 - 1),
    st.integers(0, 2**32 - 1),
    st.data(),
)
def test_the_draw_depends_on_no_batch(
    ids: list[int], seed: int, epoch: int, data: st.DataObject
) -> None:
    """Bit for bit: one by one, shuffled, cut anywhere."""
    whole = views.draw(MIXED, torch.tensor(ids), seed=seed, epoch=epoch, height=50, width=70)
    order = data.draw(st.permutations(range(len(ids))))
    cut = data.draw(st.integers(0, len(ids)))
    parts = [
        views.draw(
            MIXED,
            torch.tensor([ids[i] for i in part], dtype=torch.int64),
            seed=seed,
            epoch=epoch,
            height=50,
            width=70,
        )
        for part in (order[:cut], order[cut:])
    ]
    assert torch.equal(torch.cat(parts, dim=1), whole[:, order])
    single = views.draw(MIXED, torch.tensor(ids[:1]), seed=seed, epoch=epoch, height=50, width=70)
    assert torch.equal(single, whole[:, :1])


def test_the_draw_depends_on_no_thread_count() -> None:
    before = torch.get_num_threads()
    tables = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            tables.append(draw(MIXED))
    finally:
        torch.set_num_threads(before)
    assert np.array_equal(tables[0], tables[1])


@pytest.mark.gpu(only=True)
def test_the_draw_depends_on_no_device() -> None:
    ids = torch.arange(200_000) * 5_000_011
    for height, width in SIZES:
        on_cpu, on_gpu = (
            views.draw(MIXED, ids.to(device), seed=2**63 - 1, epoch=3, height=height, width=width)
            for device in ("cpu", "cuda")
        )
        assert torch.equal(on_gpu.cpu(), on_cpu)


def scalar_draw(
    config: ViewsConfig, sample: int, view: int, seed: int, epoch: int, height: int, width: int
) -> list[float]:
    """Draw a row in Python floats by torchvision's get_params and the counter layout."""

    def block(number: int) -> list[float]:
        high = (sample >> 32) << 8 | DOMAIN_VIEWS
        words = philox4x32(
            torch.tensor(sample & 0xFFFFFFFF), epoch, view * 256 + number, high, seed
        )
        return [float(uniform(word)) for word in words]

    def between(u: float, low: float, high: float) -> float:
        return low + u * (high - low)

    for attempt in range(10):
        u = block(attempt)
        area = height * width * between(u[0], *config.scale)
        ratio = math.exp(between(u[1], math.log(config.ratio[0]), math.log(config.ratio[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(u[2] * (height - h + 1)), int(u[3] * (width - w + 1))
            break
    else:
        h = height if width / height >= config.ratio[0] else round(width / config.ratio[0])
        w = width if width / height <= config.ratio[1] else round(height * config.ratio[1])
        top, left = (height - h) // 2, (width - w) // 2
    flip, jitter, order, gray = block(10)
    amplitudes = [
        config.strength * a
        for a in (config.brightness, config.contrast, config.saturation, config.hue)
    ]
    centres = [1.0, 1.0, 1.0, 0.0]
    factors = [
        between(u, c - a, c + a) for u, c, a in zip(block(11), centres, amplitudes, strict=True)
    ]
    blur, sigma, solarize, _ = block(12)
    return [
        *(top, left, h, w, flip < config.flip_p, int(order * 24)),
        *(factors if jitter < config.jitter_p else centres),
        gray < config.grayscale_p,
        between(sigma, *config.blur_sigma) if blur < config.blur_p[view] else 0.0,
        solarize < config.solarize_p[view],
    ]


@settings(max_examples=60)
@given(
    st.integers(0, 2**40 - 1),
    st.integers(0, 2**63 - 1),
    st.integers(0, 2**32 - 1),
    st.sampled_from(SIZES),
)
def test_the_draw_equals_a_scalar_implementation(
    sample: int, seed: int, epoch: int, shape: tuple[int, int]
) -> None:
    height, width = shape
    table = views.draw(
        MIXED, torch.tensor([sample]), seed=seed, epoch=epoch, height=height, width=width
    )
    for view in range(2):
        expected = scalar_draw(MIXED, sample, view, seed, epoch, height, width)
        # One unit of float32: where the last bit of a float64 sum falls is not the point.
        np.testing.assert_allclose(
            table[view, 0].numpy(), np.float32(expected), rtol=1.2e-7, atol=1e-8
        )


def photographs(count: int, height: int, width: int) -> Tensor:
    """Draw smooth coloured noise at three scales, uint8 (count, height, width, 3)."""
    random = torch.Generator().manual_seed(5)
    layers = [
        torch.nn.functional.interpolate(
            torch.rand(count, 3, max(1, height // cell), max(1, width // cell), generator=random),
            (height, width),
        )
        for cell in (1, 7, 20)
    ]
    return (sum(layers) / 3 * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()  # type: ignore[union-attr]


ADJUST = {
    Column.BRIGHTNESS: reference.adjust_brightness,
    Column.CONTRAST: reference.adjust_contrast,
    Column.SATURATION: reference.adjust_saturation,
    Column.HUE: reference.adjust_hue,
}


def torchvision_view(image: Tensor, row: list[float], config: ViewsConfig) -> Tensor:
    """Make a view by torchvision's functionals in float64: uint8 (H, W, 3) -> (3, S, S)."""
    top, left, height, width = (int(value) for value in row[:4])
    x = image.permute(2, 0, 1).double() / 255.0
    x = reference.resized_crop(
        x, top, left, height, width, [config.size, config.size], antialias=True
    )
    for column in JITTER_ORDERS[int(row[Column.ORDER])]:
        x = ADJUST[column](x, row[column])
    x = reference.rgb_to_grayscale(x, 3) if row[Column.GRAYSCALE] else x
    x = reference.horizontal_flip(x) if row[Column.FLIP] else x
    if row[Column.BLUR_SIGMA]:
        x = reference.gaussian_blur(x, [config.blur_kernel] * 2, [row[Column.BLUR_SIGMA]] * 2)
    return reference.solarize(x, 0.5) if row[Column.SOLARIZE] else x


@pytest.mark.parametrize(
    ("height", "width", "size"), [(96, 96, 96), (40, 56, 32), (32, 32, 48), (130, 90, 24)]
)
@pytest.mark.parametrize("solarize", [0.0, 0.3])
def test_views_equal_torchvisions_end_to_end(
    height: int, width: int, size: int, solarize: float
) -> None:
    """Within 2/255 of a level before normalising.

    Solarizing jumps at 1/2 where the slope changes sign, yet min(v, 1 - v) is continuous: rounding
    stays rounding.
    """
    config = ViewsConfig(size=size, solarize_p=(solarize, solarize))
    images, ids = photographs(24, height, width), torch.arange(24) + 2**33
    table = views.draw(config, ids, seed=9, epoch=4, height=height, width=width)
    expected = torch.stack(
        [
            torchvision_view(images[i], table[v, i].tolist(), config)
            for v in range(2)
            for i in range(24)
        ]
    ).view(2, 24, 3, size, size)
    for kernels in ("auto", "reference"):
        result = views.two_views(config, images, ids, seed=9, epoch=4, kernels=kernels).double()
        result = result * torch.tensor(config.std).view(3, 1, 1) + torch.tensor(config.mean).view(
            3, 1, 1
        )
        torch.testing.assert_close(
            result, expected, rtol=0.0, atol=2e-5
        )  # the promise is 2/255 = 8e-3
        assert result.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)


def test_apply_obeys_every_setting_of_the_config() -> None:
    """Each field changes the result in its own way; the values are tested with the op."""
    images, ids = photographs(8, 40, 40), torch.arange(8)
    base = ViewsConfig(size=40, blur_p=(1.0, 1.0))
    table = views.draw(base, ids, seed=0, epoch=0, height=40, width=40)
    plain = views.apply(images, table, base)
    shifted = views.apply(
        images, table, base.model_copy(update={"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)})
    )
    torch.testing.assert_close(
        plain,
        (shifted - torch.tensor(base.mean).view(3, 1, 1)) / torch.tensor(base.std).view(3, 1, 1),
    )
    for update in ({"blur": "pil"}, {"blur_kernel": 3}):
        difference = (
            (views.apply(images, table, base.model_copy(update=update)) - plain).abs().amax()
        )
        assert 0.05 < difference < 2.0
    assert views.apply(images, table, base.model_copy(update={"size": 24})).shape == (
        2,
        8,
        3,
        24,
        24,
    )
    assert views.apply(images, table, base, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(32, 32, 32), (96, 96, 32), (50, 77, 32), (77, 50, 32), (20, 31, 48)],
)
def test_plain_is_torchvisions_resize_and_centre_crop(height: int, width: int, size: int) -> None:
    config = ViewsConfig(size=size)
    images = photographs(5, height, width)
    x = images.permute(0, 3, 1, 2).double() / 255.0
    x = reference.center_crop(reference.resize(x, [size], antialias=True), [size, size])
    expected = reference.normalize(x, list(config.mean), list(config.std))
    single, exact = (views.plain(images, config, dtype) for dtype in (torch.float32, torch.float64))
    torch.testing.assert_close(single.double(), expected, rtol=0.0, atol=2e-5)
    torch.testing.assert_close(exact, expected, rtol=0.0, atol=1e-12)
    assert torch.equal(views.plain(images, config, torch.bfloat16), single.bfloat16())
    assert single.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("ids", torch.arange(3, dtype=torch.int32)),
        ("ids", torch.arange(4).view(2, 2)),
        ("seed", -1),
        ("seed", 2**64),
        ("epoch", -1),
        ("epoch", 2**32),
        ("height", 0),
    ],
)
def test_wrong_arguments_of_draw_are_named(argument: str, value: object) -> None:
    good = {"ids": torch.arange(3), "seed": 0, "epoch": 0, "height": 8, "width": 8}
    with pytest.raises(ValueError, match=rf"^{argument} "):
        views.draw(ViewsConfig(), **{**good, argument: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "images", [torch.zeros(2, 8, 8, 3), torch.zeros(2, 3, 8, 8, dtype=torch.uint8)]
)
def test_wrong_images_are_named(images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"^images "):
        views.plain(images, ViewsConfig(size=8))
    with pytest.raises(ValueError, match=r"^images "):
        views.two_views(ViewsConfig(size=8), images, torch.arange(2), seed=0, epoch=0)
