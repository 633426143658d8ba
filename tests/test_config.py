"""config.py: what a configuration refuses, and the pure function that fills in derived numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from fastbyol.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    ScheduleConfig,
    TrainConfig,
    ViewsConfig,
    resolve,
)

BAD_VIEWS = [
    {"scale": (0.5, 0.2)},
    {"scale": (0.0, 1.0)},
    {"scale": (0.2, 1.5)},
    {"ratio": (-1.0, 1.0)},
    {"blur_sigma": (2.0, 0.1)},
    {"blur_kernel": 8},
    {"size": 8, "blur_kernel": 17},
    {"std": (0.2, 0.0, 0.2)},
    {"jitter_p": 1.01},
    {"blur_p": (0.5, -0.1)},
    {"mean": (0.0, 0.0, float("nan"))},
]
BAD_OPTIM = [
    {"lr": -1.0},
    {"lr": float("inf")},
    {"momentum": 1.0},
    {"eta": 0.0},
    {"dialect": "apex"},
    {"lars_on": ("",)},
    {"lr_mult": (("encoder", -1.0),)},
    {"lr_mult": (("", 1.0),)},
]


@pytest.mark.parametrize(
    ("model", "values"),
    [*((ViewsConfig, v) for v in BAD_VIEWS), *((OptimConfig, v) for v in BAD_OPTIM)],
    ids=str,
)
def test_wrong_values_are_refused(model: type[BaseModel], values: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        model.model_validate(values)


def test_a_wide_blur_is_refused_only_where_it_is_used() -> None:
    assert ViewsConfig(size=8, blur="pil", blur_kernel=17).size == 8
    assert ViewsConfig(size=9, blur_kernel=17).size == 9


def test_unknown_keys_and_changes_are_refused() -> None:
    with pytest.raises(ValidationError):
        ModelConfig.model_validate({"norms": "bn"})
    with pytest.raises(ValidationError):
        Config().train.epochs = 3  # type: ignore[misc]


@pytest.mark.parametrize(("name", "lr", "decay"), [("sgd", 0.8, 1e-4), ("lars", 0.2, 1.5e-6)])
def test_lr_and_weight_decay_follow_the_optimizer(name: str, lr: float, decay: float) -> None:
    optim = resolve(Config.model_validate({"optim": {"name": name}})).optim
    assert (optim.lr, optim.weight_decay) == (lr, decay)


def test_zeros_are_kept_and_what_a_run_lacks_is_refused() -> None:
    resolved = resolve(Config(optim=OptimConfig(lr=0.0, weight_decay=0.0)))
    assert (resolved.optim.lr, resolved.optim.weight_decay) == (0.0, 0.0)
    with pytest.raises(ValidationError):
        resolved.optim.model_copy(update={"lr": None})


@given(st.integers(2, 65536), st.none() | st.floats(0.0, 3.0))
def test_linear_scaling_is_that_of_the_paper(batch: int, lr: float | None) -> None:
    """arXiv:2006.07733, section 3.3: lr = 0.2 x batch / 256."""
    config = Config(
        optim=OptimConfig(name="lars", lr=lr, lr_scaling="linear"),
        train=TrainConfig(batch_size=batch),
    )
    assert resolve(config).optim.lr == (0.2 if lr is None else lr) * batch / 256.0


@given(st.integers(1, 1000), st.none() | st.integers(1, 1000), st.integers(8, 1024))
def test_resolve_is_idempotent(epochs: int, horizon: int | None, size: int) -> None:
    config = Config(
        views=ViewsConfig(size=size),
        optim=OptimConfig(lr_scaling="linear"),
        schedule=ScheduleConfig(horizon_epochs=horizon),
        train=TrainConfig(epochs=epochs, batch_size=100),
    )
    resolved = resolve(config)
    assert resolve(resolved) == resolved
    assert resolve(resolved.model_copy(update={"data": DataConfig()})) == resolved
    assert resolve(Config.model_validate(resolved.model_dump())) == resolved
    assert resolved.schedule.horizon_epochs == (horizon or epochs)
    assert resolved.data.textures_size == max(16, size)
