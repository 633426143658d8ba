"""Fine-tuning is SGD on the cross-entropy as torch has it, repeats itself, chooses its rate away
from the test set, and leaves the encoder and the global generator alone.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

from fastbyol import views as view_ops
from fastbyol.config import ModelConfig, ViewsConfig
from fastbyol.errors import FastbyolError, UsageError
from fastbyol.evaluation import finetune as module
from fastbyol.evaluation.features import embed
from fastbyol.evaluation.finetune import (
    Recipe,
    crops_and_flips,
    finetune,
    fit,
    labels_of_each_class,
)
from fastbyol.model.norm import join_views
from fastbyol.model.ordinary import ordinary
from fastbyol.model.resnet import ResNet, build_encoder
from fastbyol_kernels.views.table import Column
from labelled_stripes import stripes

VIEWS = ViewsConfig(size=16, blur_kernel=3)
SHORT = Recipe(epochs=2, batch_size=16)


def encoder(norm: str = "bn", *, ws: bool = False, seed: int = 0) -> ResNet:
    """An encoder of a run: its batch norms expect two views in a batch."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build_encoder(ModelConfig(width=8, norm=norm, ws=ws, stem="small"), num_views=2)


@pytest.mark.parametrize(("norm", "ws"), [("bn", False), ("gn", False), ("gn", True)])
def test_learns_from_an_encoders_weights(norm: str, ws: bool) -> None:
    train, test = stripes(256, 0), stripes(200, 1)
    net, classifier = finetune(
        encoder(norm, ws=ws), train.images, train.labels, VIEWS, replace(SHORT, epochs=6)
    )
    assert classifier.score(embed(net, test.images, VIEWS, device="cpu"), test.labels) > 95.0


def test_steps_are_torchs_own_on_an_ordinary_network() -> None:
    """In float64, where rounding cannot grow: another network of the same weights, torch's batch
    norm over the whole batch, and the steps written out: the rate of each, Nesterov's momentum.
    """
    train = stripes(40, 0)
    recipe = Recipe(
        epochs=2, batch_size=8, lrs=(0.02,), warmup=0.2, weight_decay=0.01, seed=5,
        dtype=torch.float64,
    )  # fmt: skip
    made = encoder().double()
    twin = ordinary(copy.deepcopy(made), ModelConfig(width=8, stem="small")).double()
    head = module._new_head(64, 3, recipe.seed).double()
    join_views(made)
    net = nn.Sequential(made, copy.deepcopy(head))
    fit(net, train.images, train.labels, VIEWS, recipe)
    views, generator = crops_and_flips(VIEWS), torch.Generator().manual_seed(5)
    parameters = [*twin.parameters(), *head.parameters()]
    buffers = [torch.zeros_like(p) for p in parameters]
    twin.train()
    for step in range(10):
        epoch, within = divmod(step, 5)
        if within == 0:
            order = torch.randperm(40, generator=generator)
        ids = order[8 * within : 8 * within + 8]
        table = view_ops.draw(views, ids, seed=5, epoch=epoch, height=16, width=16)
        batch = view_ops.apply(train.images[ids], table[:1], views, torch.float64)[0]
        loss = F.cross_entropy(head(twin(batch)), train.labels[ids])
        left = torch.tensor(min(1.0, (10 - step) / 8.0), dtype=torch.float64)
        lr = 0.02 * min((step + 1) / 2, float(0.5 * (1.0 + torch.cos(torch.pi * (1.0 - left)))))
        for p, buffer, g in zip(
            parameters, buffers, torch.autograd.grad(loss, parameters), strict=True
        ):
            decayed = g + 0.01 * p.data
            buffer.mul_(0.9).add_(decayed)
            p.data -= lr * (decayed + 0.9 * buffer)
    theirs = head(twin.eval()(view_ops.plain(train.images, VIEWS, torch.float64)))
    ours = net.eval()(view_ops.plain(train.images, VIEWS, torch.float64))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-8)


def test_a_librarys_encoder_sees_the_batch_as_one_view() -> None:
    """An odd batch cannot be halved into two views."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = build_encoder(ModelConfig(encoder="timm:test_resnet"), num_views=2)
    train = stripes(27, 0)
    lines = list[str]()
    recipe = Recipe(epochs=1, batch_size=9)
    finetune(made, train.images, train.labels, VIEWS, recipe, lines.append)
    assert len(lines) == 1
    assert made.num_views == 2


def test_repeats_itself_and_changes_nothing_else() -> None:
    train, made = stripes(64, 0), encoder()
    before, weights = torch.get_rng_state(), copy.deepcopy(made.state_dict())

    def tuned(seed: int) -> list[Tensor]:
        net, classifier = finetune(
            made, train.images, train.labels, VIEWS, replace(SHORT, seed=seed)
        )
        return [*net.state_dict().values(), classifier.weights]

    first = tuned(3)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(
        torch.equal(a, b)
        for a, b in zip(made.state_dict().values(), weights.values(), strict=False)
    )
    assert all(module.num_views == 2 for module in made.modules() if hasattr(module, "num_views"))
    torch.rand(5)
    assert all(torch.equal(a, b) for a, b in zip(first, tuned(3), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, tuned(4), strict=True))


def test_the_encoder_of_a_library_learns_in_passes_of_whole_batches() -> None:
    config = ModelConfig(encoder="torchvision:shufflenet_v2_x0_5")
    torch.manual_seed(0)
    made = build_encoder(config, num_views=2, image_size=VIEWS.size)
    train = stripes(30, 0)
    recipe = Recipe(epochs=1, batch_size=15)
    net, _ = finetune(made, train.images, train.labels, VIEWS, recipe)
    assert (net.num_views, made.num_views) == (1, 2)
    steps = [b for name, b in net.named_buffers() if name.endswith("num_batches_tracked")]
    assert {int(step) for step in steps} == {2}  # one update a batch of 15, not one a view


def test_rounds_as_the_dtype_does() -> None:
    """In bfloat16 the weights stay float32 and end elsewhere, not far away."""
    train = stripes(64, 0)
    nets = [
        finetune(
            encoder("gn"), train.images, train.labels, VIEWS, replace(SHORT, epochs=1, dtype=dtype)
        )[0]
        for dtype in (torch.float32, torch.bfloat16)
    ]
    exact, rounded = (torch.cat([p.detach().flatten() for p in net.parameters()]) for net in nets)
    assert rounded.dtype == torch.float32
    assert 0.0 < float((exact - rounded).norm() / exact.norm()) < 0.05


def test_the_rate_is_chosen_on_held_out_training_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never trained on before it is chosen, and a rate that diverges is left out."""
    train, lines = stripes(100, 0), list[str]()
    seen = list[Tensor]()

    def watching(net: nn.Module, images: Tensor, *args: object) -> None:
        seen.append(images)
        fit(net, images, *args)

    monkeypatch.setattr(module, "fit", watching)
    recipe = replace(SHORT, epochs=4, lrs=(0.03, 1e-9, 1e30))
    finetune(encoder(), train.images, train.labels, VIEWS, recipe, lines.append)
    held_out = labels_of_each_class(train.labels, 0.1, recipe.seed)
    kept = [k for k in range(100) if k not in held_out.tolist()]
    assert 8 <= len(held_out) <= 12
    for images in seen[:3]:
        assert torch.equal(images, train.images[kept])
    assert torch.equal(seen[3], train.images)
    chosen = [line for line in lines if line.startswith("lr ")]
    assert [line.split(":")[0] for line in chosen] == ["lr 1e-09", "lr 0.03", "lr 1e+30"]
    assert f"of {len(held_out)} held-out training images" in chosen[0]
    assert "diverged" in chosen[2]
    # The last training is by the best, whose loss falls.
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in lines[-4:]]
    assert losses[-1] < 0.8 * losses[0]


def test_errors_are_one_line_that_says_what_to_do() -> None:
    train = stripes(40, 0)

    def run(recipe: Recipe, made: nn.Module | None = None) -> None:
        finetune(made or encoder(), train.images, train.labels, VIEWS, recipe)

    with pytest.raises(FastbyolError, match=r"diverged in epoch 1: .*1e\+30 \(--lr\)"):
        run(replace(SHORT, lrs=(1e30,)))
    with pytest.raises(FastbyolError, match="diverged at every learning rate"):
        run(replace(SHORT, lrs=(1e30, 1e31)))
    broken = encoder()
    next(broken.parameters()).data[0] = torch.nan
    with pytest.raises(FastbyolError, match="encoder has diverged"):
        run(SHORT, broken)
    few = stripes(3, 0)
    with pytest.raises(UsageError, match="too few to hold some out"):
        finetune(
            encoder(),
            few.images,
            torch.tensor([0, 1, 1]),
            VIEWS,
            replace(SHORT, lrs=(0.1, 0.2)),
        )
    for values, says in (
        ({"epochs": -1}, "--epochs -1"),
        ({"batch_size": 1}, "--batch-size 1"),
        ({"lrs": ()}, "--lr"),
        ({"lrs": (0.1, -0.1)}, "--lr -0.1"),
        ({"lrs": (float("nan"),)}, "--lr nan"),
        ({"seed": -1}, "--seed -1"),
    ):
        with pytest.raises(UsageError, match=says):
            Recipe(**values)


def test_fewer_images_than_a_batch() -> None:
    train = stripes(20, 0)
    lines = list[str]()
    finetune(encoder(), train.images, train.labels, VIEWS, Recipe(epochs=1), lines.append)
    assert len(lines) == 1


def test_views_are_crops_and_flips_only() -> None:
    """A plain grey image comes out plain grey: nothing touches colour, and the crop keeps half of
    the area at least.
    """
    light = crops_and_flips(ViewsConfig(size=16, blur_kernel=3, solarize_p=(1.0, 1.0)))
    ids = torch.arange(200)
    images = torch.full((200, 24, 24, 3), 77, dtype=torch.uint8)
    out = module._augmented(images, ids, light, Recipe(), epoch=0)
    expected = view_ops.plain(torch.full((1, 16, 16, 3), 77, dtype=torch.uint8), light)
    torch.testing.assert_close(out, expected.expand_as(out), rtol=0.0, atol=1e-5)
    table = view_ops.draw(light, ids, seed=0, epoch=0, height=24, width=24)
    area = table[0, :, Column.HEIGHT] * table[0, :, Column.WIDTH] / 24**2
    # Sides are rounded to pixels: by at most half of one in 24 each.
    assert float(area.min()) > 0.5 - 0.05
    assert 0.2 < float(table[0, :, Column.FLIP].mean()) < 0.8


@pytest.mark.parametrize("decay", ["linear", "cosine"])
@pytest.mark.parametrize("total", [1, 2, 7, 100])
def test_learning_rate_rises_and_falls(total: int, decay: str) -> None:
    recipe = Recipe(warmup=0.15, decay=decay)
    shares = [recipe.share(step, total) for step in range(total)]
    assert all(0.0 < share <= 1.0 for share in shares)
    peak = shares.index(max(shares))
    assert shares[: peak + 1] == sorted(shares[: peak + 1])
    assert shares[peak:] == sorted(shares[peak:], reverse=True)
    assert max(shares) > 0.99
    assert recipe.share(total, total) == 0.0


@settings(max_examples=100)
@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=60),
    shares=st.tuples(st.floats(0.001, 1.0), st.floats(0.001, 1.0)),
    seed=st.integers(0, 2**40),
)
def test_a_share_of_each_class_is_nested_and_of_the_size_asked_for(
    labels: list[int], shares: tuple[float, float], seed: int
) -> None:
    y = torch.tensor(labels)
    small, large = (labels_of_each_class(y, share, seed) for share in sorted(shares))
    assert set(small.tolist()) <= set(large.tolist())
    assert large.tolist() == sorted(set(large.tolist()))
    for label in set(labels):
        count = labels.count(label)
        assert int((y[large] == label).sum()) == max(1, round(max(shares) * count))


def test_a_share_is_as_large_as_scikit_learns_stratified_one() -> None:
    y = torch.arange(7).repeat_interleave(100)
    theirs, _ = train_test_split(range(700), train_size=0.13, stratify=y.numpy(), random_state=0)
    assert len(labels_of_each_class(y, 0.13, 0)) == len(theirs)
    for share in (0.0, -0.1, 1.1, float("nan")):
        with pytest.raises(UsageError, match="--labels"):
            labels_of_each_class(y, share, 0)
