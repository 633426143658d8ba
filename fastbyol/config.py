"""Every number of a run, as frozen typed models.

A component receives its slice (``ModelConfig``, ``OptimConfig``, ...), never the whole. Nothing mutates a configuration:
``config_io`` builds one from a preset, a TOML file and flags, and ``resolve`` fills in the numbers that depend on others.

Sources named in this file:
  post   "Understanding self-supervised and contrastive learning with BYOL" (2020), text and appendix
  code   the post's published code: moco.py, utils.py, lars.py, ws_resnet.py, train_blog.py
  byol   Grill et al., "Bootstrap Your Own Latent", arXiv:2006.07733, section 3.3 and appendix B, J
  moco   He et al., "Momentum Contrast", arXiv:1911.05722, and its version 2, arXiv:2003.04297
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

NormName = Literal["bn", "gn", "ln", "none"]
HeadNormName = Literal["bn", "gn", "ln", "none", "brn"]
Exclusion = Literal["none", "substring", "bias_and_norm"]
Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Range = tuple[float, float]


class Model(BaseModel):
    """Base of all slices: unknown keys are errors and instances are frozen and hashable."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with ``update``, checked as any other: pydantic's own takes every word and every number."""
        copied = super().model_copy(update=update, deep=deep)
        return type(self).model_validate(copied.model_dump(warnings=False)) if update else copied


class DataConfig(Model):
    """Where images come from and how they reach the device."""

    train: str = Field("textures", min_length=1, description="beton file to train on, or 'textures' or 'fashion-mnist'")
    test: str | None = Field(
        None, min_length=1, description="labelled file for the probe; default: the held-out part of a built-in training set"
    )
    image_field: str | None = Field(
        None, min_length=1, description="image field of both files; default: the only one that a file has"
    )
    label_field: str | None = Field(
        None, min_length=1, description="int field of both files; default: 'label', or one of a usual name"
    )
    limit: int = Field(
        0, ge=0, le=2**40, description="train on so many of the file's images, drawn once and alike for every seed; 0: all"
    )
    test_limit: int = Field(0, ge=0, le=2**40, description="the same for the probe's images")
    textures_count: int = Field(4096, ge=64, le=10_000_000, description="images of the textures to train on")
    textures_test_count: int = Field(2048, ge=64, le=10_000_000, description="images of the textures to test on")
    textures_size: int | None = Field(
        None, ge=16, le=1024, description="side of the textures' images, pixels; default: views.size"
    )
    textures_seed: int = Field(
        0, ge=0, lt=2**31, description="seed of the textures to train on; those to test on take the next"
    )
    cache: Literal["auto", "device", "none"] = Field(
        "auto", description="keep the decoded set on the device: if it fits, always, never"
    )
    decoder: Literal["auto", "ffcv", "torchvision"] = Field(
        "auto", description="auto: FFCV where it is installed; of JPEG images torchvision's pixels are others, up to 6 levels"
    )
    workers: int = Field(0, ge=0, le=1024, description="decoding threads; 0 takes the machine's cores")
    size: int | None = Field(
        None, ge=8, le=4096, description="decoded side for sets of mixed sizes, pixels; default: views.size"
    )


class ViewsConfig(Model):
    """The two random views of an image. Defaults: the post's Appendix B (code: MoCoTransforms with s = 0.5)."""

    size: int = Field(96, ge=8, le=1024, description="side of a view, pixels")
    scale: Range = Field((0.2, 1.0), description="share of the image's area that a crop takes")
    ratio: Range = Field((3.0 / 4.0, 4.0 / 3.0), description="aspect ratio of a crop (torchvision's default)")
    strength: float = Field(0.5, ge=0.0, le=1.0, description="SimCLR's s: scales the four jitter amplitudes below")
    brightness: float = Field(0.8, ge=0.0, le=10.0)
    contrast: float = Field(0.8, ge=0.0, le=10.0)
    saturation: float = Field(0.8, ge=0.0, le=10.0)
    hue: float = Field(0.2, ge=0.0, le=0.5)
    jitter_p: Probability = 0.8
    grayscale_p: Probability = 0.2
    flip_p: Probability = 0.5
    blur: Literal["gaussian", "pil"] = Field("gaussian", description="sampled Gaussian, or Pillow's three box blurs")
    blur_kernel: int = Field(9, ge=1, le=63, description="taps of the sampled Gaussian, odd (SimCLR: a tenth of the side)")
    blur_sigma: Range = Field((0.1, 2.0), description="standard deviation, pixels")
    blur_p: tuple[Probability, Probability] = Field((0.5, 0.5), description="per view")
    solarize_p: tuple[Probability, Probability] = Field((0.0, 0.0), description="per view (byol: 0 and 0.2)")
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    @model_validator(mode="after")
    def _ranges(self) -> ViewsConfig:
        for name in ("scale", "ratio", "blur_sigma"):
            low, high = getattr(self, name)
            if not 0.0 < low <= high:
                raise ValueError(f"views.{name} must be two positive numbers, the smaller first, got {low} and {high}")
        if self.scale[1] > 1.0:
            raise ValueError(f"views.scale must not exceed 1, got {self.scale[1]}")
        if self.blur_kernel % 2 == 0:
            raise ValueError(f"views.blur_kernel must be odd, got {self.blur_kernel}")
        if self.blur == "gaussian" and self.blur_kernel // 2 >= self.size:
            raise ValueError(
                f"views.blur_kernel must not reach past the image: {self.blur_kernel} taps over views.size of {self.size} px"
            )
        if min(self.std) <= 0.0:
            raise ValueError(f"views.std must be positive, got {self.std}")
        return self


class HeadConfig(Model):
    """A two-layer MLP: linear, norm, ReLU, linear (code: utils.MLP). Weight standardization spares the last linear."""

    norm: HeadNormName = "bn"
    hidden: int = Field(512, ge=1, le=65536)
    out: int = Field(128, ge=1, le=65536)
    ws: bool = False


class PredictorConfig(HeadConfig):
    """The online network's second head."""

    layers: Literal[0, 2] = Field(2, description="0: there is no predictor, predictions are the projections")


class ModelConfig(Model):
    """ResNet-18 encoder, projector and predictor. Defaults: the post's sizes."""

    norm: NormName = "bn"
    ws: bool = Field(False, description="standardize the encoder's convolution weights")
    groups: int = Field(32, ge=1, le=4096, description="groups of group norm; fewer where a group would hold under 2 channels")
    width: int = Field(64, ge=2, le=1024, description="channels of the first stage; the embedding has 8 times as many")
    stem: Literal["torchvision", "small"] = Field("torchvision", description="7x7 stride 2 and max-pool, or 3x3 stride 1")
    projector: HeadConfig = HeadConfig()
    predictor: PredictorConfig = PredictorConfig()


class MethodConfig(Model):
    """What a step learns from. Defaults of the contrastive loss: code, moco.py, after moco version 2."""

    name: Literal["byol", "contrastive", "simsiam"] = Field(
        "byol", description="cosines with a moving average's projections, cross-entropy over negatives, or cosines with its own"
    )
    temperature: float = Field(0.2, gt=0.0, le=1000.0, description="contrastive: cosines are divided by it")
    queue: int = Field(
        65536, ge=0, le=10_000_000, description="contrastive: past target projections kept as negatives; 0: the batch's others"
    )


class OptimConfig(Model):
    """SGD and LARS. ``lr`` and ``weight_decay`` left out take the preset's numbers for the optimizer that is chosen."""

    name: Literal["sgd", "lars"] = "sgd"
    lr: float | None = Field(None, ge=0.0, le=1000.0)
    weight_decay: float | None = Field(None, ge=0.0, le=10.0)
    sgd_lr: float = Field(0.8, ge=0.0, le=1000.0, description="code: train_blog.py")
    sgd_weight_decay: float = Field(1e-4, ge=0.0, le=10.0, description="code: MoCoMethodParams")
    lars_lr: float = Field(0.2, ge=0.0, le=1000.0, description="post, appendix; byol section 3.3")
    lars_weight_decay: float = Field(1.5e-6, ge=0.0, le=10.0, description="byol section 3.3")
    lr_scaling: Literal["none", "linear"] = Field("none", description="linear: lr x batch_size / 256")
    momentum: float = Field(0.9, ge=0.0, lt=1.0)
    eta: float = Field(1e-3, gt=0.0, le=1.0, description="LARS trust coefficient")
    dialect: Literal["blog", "deepmind", "bolts"] = "blog"
    lars_on: tuple[str, ...] = Field(("*",), description="which parameters adapt: module prefixes or globs; '*' is all")
    lars_exclude: Exclusion = Field("none", description="which of those do not adapt after all")
    decay_exclude: Exclusion = Field("none", description="which parameters take no weight decay")
    lr_mult: tuple[tuple[str, float], ...] = Field(
        (), description="pairs (prefix or glob, factor); factors of all matches multiply"
    )
    rate_cap: float | None = Field(None, gt=0.0, le=1e9, description="LARS: no parameter's rate exceeds this; default: no cap")
    replay_rates: str | None = Field(
        None, min_length=1, description="run folder whose recorded rates are used instead of LARS's own, step by step"
    )

    @model_validator(mode="after")
    def _patterns(self) -> OptimConfig:
        if not all(self.lars_on):
            raise ValueError("optim.lars_on must not hold an empty pattern; '*' is all parameters, [] is none")
        for pattern, factor in self.lr_mult:
            if not pattern or factor < 0.0:
                raise ValueError(f"optim.lr_mult must pair a pattern with a factor of 0 or more, got {pattern!r} and {factor}")
        return self


class ScheduleConfig(Model):
    """lr and tau over a run."""

    lr: Literal["cosine", "constant"] = "cosine"
    lr_unit: Literal["step", "epoch"] = Field("epoch", description="how often the lr moves")
    warmup_epochs: float = Field(0.0, ge=0.0, le=10_000.0, description="linear, per step")
    horizon_epochs: int | None = Field(None, ge=1, le=1_000_000, description="length of the cosines; default: train.epochs")
    tau: float = Field(0.996, ge=0.0, le=1.0, description="EMA momentum at step 0 (byol section 3.3; code)")
    tau_schedule: Literal["cosine", "constant"] = Field("cosine", description="cosine: rises to 1 at the horizon")
    tau_unit: Literal["step", "epoch"] = "epoch"
    ema_order: Literal["before", "after"] = Field("before", description="target update before or after the optimizer's")


class TrainConfig(Model):
    """The loop."""

    epochs: int = Field(10, ge=1, le=1_000_000)
    batch_size: int = Field(256, ge=2, le=65536, description="images per step; each is seen as two views")
    seed: int = Field(0, ge=0, lt=2**63)
    precision: Literal["fp32", "bf16", "fp64", "auto"] = Field(
        "fp32", description="auto: bf16 where the device multiplies it natively and gradients agree; fp64 is for tests"
    )
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    init_from: str | None = Field(
        None, min_length=1, description="run folder or checkpoint whose weights a new run starts from; momentum and step do not"
    )
    loss_scale: float = Field(1.0, gt=0.0, le=1e6, description="factor on the loss (code: loss_constant_factor)")
    max_skipped_steps: int = Field(
        10, ge=0, le=1_000_000, description="steps in a row with a non-finite gradient that are left out; one more ends it"
    )
    stop_on_collapse: bool = Field(False, description="end with exit code 3 once the state is 'collapsed' at an epoch's end")


class EngineConfig(Model):
    """How a step is executed. It changes speed, and rounding at most."""

    mode: Literal["auto", "eager", "compile", "graph"] = Field(
        "auto", description="eager, torch.compile, or one CUDA graph over compiled regions; auto: what is measured to pay"
    )
    kernels: Literal["auto", "triton", "cpu", "reference"] = Field(
        "auto", description="the fused operations in Triton, compiled for a CPU, or in plain torch; auto: what fits"
    )

    @field_validator("kernels", mode="before")
    @classmethod
    def _read_old_word(cls, kernels: object) -> object:
        """Read what configurations said before ``cpu`` was the word."""
        return "cpu" if kernels == "processor" else kernels


class ProbeConfig(Model):
    """Accuracy during and after training."""

    every_epochs: int = Field(1, ge=0, le=1_000_000, description="0: only at the end")
    protocol: Literal["blog", "linear", "knn"] = "blog"


class RunConfig(Model):
    """What a run writes."""

    checkpoint_every_steps: int = Field(0, ge=0, le=1_000_000_000, description="0: at every epoch's end")
    keep_checkpoints: int = Field(3, ge=1, le=1_000_000)
    layers_every_steps: int = Field(1, ge=1, le=1_000_000, description="spacing of the per-layer telemetry")
    drain_every_steps: int = Field(16, ge=1, le=65536, description="steps held on the device before metrics are written")


class Config(Model):
    """A whole run."""

    preset: str = "blog"
    data: DataConfig = DataConfig()
    views: ViewsConfig = ViewsConfig()
    model: ModelConfig = ModelConfig()
    method: MethodConfig = MethodConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig = TrainConfig()
    engine: EngineConfig = EngineConfig()
    probe: ProbeConfig = ProbeConfig()
    run: RunConfig = RunConfig()


def resolve(config: Config) -> Config:
    """Fill in what depends on other values: lr and weight decay of the chosen optimizer, lr scaling, horizon, textures size.

    Idempotent: a resolved configuration resolves to itself, so that ``config.toml`` of a run can be read back.
    """
    optim, batch = config.optim, config.train.batch_size
    lr = optim.lr
    if lr is None:
        lr = optim.sgd_lr if optim.name == "sgd" else optim.lars_lr
    if optim.lr_scaling == "linear":
        lr = lr * batch / 256.0
    decay = optim.weight_decay
    if decay is None:
        decay = optim.sgd_weight_decay if optim.name == "sgd" else optim.lars_weight_decay
    # pydantic's own copies: config_io, which knows where a number comes from, says it of one that is out of range.
    copy = BaseModel.model_copy
    return copy(
        config,
        update={
            "optim": copy(optim, update={"lr": lr, "weight_decay": decay, "lr_scaling": "none"}),
            "data": copy(config.data, update={"textures_size": config.data.textures_size or max(16, config.views.size)}),
            "schedule": copy(config.schedule, update={"horizon_epochs": config.schedule.horizon_epochs or config.train.epochs}),
        },
    )
