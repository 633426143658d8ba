"""Every number of a run, as frozen typed models.

A component receives its slice (``ModelConfig``, ``OptimConfig``, ...), not the whole. Descriptions
are what ``fastbyol train --help`` prints. They and the docstrings cite these sources:
  post   "Understanding self-supervised and contrastive learning with BYOL" (2020), with appendix
  code   the post's published code: moco.py, utils.py, lars.py, ws_resnet.py, train_blog.py
  byol   Grill et al., "Bootstrap Your Own Latent", arXiv:2006.07733, section 3.3 and appendix B, J
  moco   He et al., "Momentum Contrast", arXiv:1911.05722, and its version 2, arXiv:2003.04297
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from fastbyol.errors import nearest

# fastbyol's own encoders, and what names any other.
ENCODERS = ("resnet18", "resnet34", "resnet50")
_FOREIGN = re.compile(r"(timm|torchvision):([\w.-]+)", re.ASCII)
# What only fastbyol's own encoders have a choice of.
OF_OWN_ENCODERS = ("norm", "ws", "width", "stem")
NormName = Literal["bn", "gn", "ln", "none"]
HeadNormName = Literal["bn", "gn", "ln", "none", "brn"]
State = Literal["healthy", "collapsing", "collapsed", "recovering", "dead"]
# Different images come out as one, and no gradient leads a dead network out again.
IN_COLLAPSE: tuple[State, ...] = ("collapsed", "dead")
Exclusion = Literal["none", "substring", "bias_and_norm"]
Probability = Annotated[float, Field(ge=0.0, le=1.0)]
EpochCount = Annotated[int, Field(ge=1, le=1_000_000)]
Range = tuple[float, float]
LoggerName = Literal["tensorboard", "wandb", "mlflow", "trackio"]


@dataclass(frozen=True)
class Option:
    """The command-line option of ``train`` that sets a field, declared in the field's annotation.

    ``{head}`` in ``name`` stands for the section that holds the field. ``metavar`` and ``about``
    replace what the field's type and description would give. Of several options on one field the
    last one that is typed counts.
    """

    name: str
    metavar: str | None = None
    about: str | None = None


class Model(BaseModel):
    """Base of all slices: unknown keys are errors, and instances are frozen and hashable."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a copy with ``update``, validated. Pydantic's own takes every word and number."""
        copied = super().model_copy(update=update, deep=deep)
        return type(self).model_validate(copied.model_dump(warnings=False)) if update else copied


class DataConfig(Model):
    """The images and how they reach the device."""

    train: Annotated[str, Option("--data", "DATA")] = Field(
        "textures",
        min_length=1,
        description="What to train on: a beton, anything that `fastbyol convert` reads, or a "
        "built-in set: textures, fashion-mnist.",
    )
    test: Annotated[str | None, Option("--test-data", "DATA")] = Field(
        None,
        min_length=1,
        description="Labelled images for the probe, of the same kinds. Default: those that DATA "
        "has besides its training images, if any.",
    )
    split: Annotated[str | None, Option("--split")] = Field(
        None,
        min_length=1,
        description="Part of a folder, archive or the like to train on. Default: train, if it has "
        "parts.",
    )
    test_split: Annotated[str | None, Option("--test-split")] = Field(
        None,
        min_length=1,
        description="Part for the probe. Default: test or else val, if there are parts.",
    )
    image_field: Annotated[str | None, Option("--image-field", "NAME")] = Field(
        None,
        min_length=1,
        description="Image field of both files. Default: the only one in a file.",
    )
    label_field: Annotated[str | None, Option("--label-field", "NAME")] = Field(
        None,
        min_length=1,
        description="Int field of both files. Default: label, or the only one of a usual name.",
    )
    limit: int = Field(
        0,
        ge=0,
        le=2**40,
        description="Images to train on, drawn once and the same for every seed; 0: all of them.",
    )
    test_limit: int = Field(0, ge=0, le=2**40, description="Images to probe on; 0: all of them.")
    textures_count: int = Field(
        4096, ge=64, le=10_000_000, description="Number of textures to train on."
    )
    textures_test_count: int = Field(
        2048, ge=64, le=10_000_000, description="Number of textures to test on."
    )
    textures_size: int | None = Field(
        None, ge=16, le=1024, description="Side of the textures in pixels. Default: views.size."
    )
    textures_seed: int = Field(
        0,
        ge=0,
        lt=2**31,
        description="Seed of the textures to train on. Those to test on use the next one.",
    )
    cache: Literal["auto", "device", "none"] = Field(
        "auto", description="Keep the decoded images on the device: if they fit, always, or never."
    )
    decoder: Literal["auto", "ffcv", "torchvision"] = Field(
        "auto",
        description="auto: FFCV where it is installed. The two decode JPEG to pixels that differ "
        "by up to 6 levels.",
    )
    workers: int = Field(0, ge=0, le=1024, description="Decoding threads; 0: one per core.")
    size: int | None = Field(
        None,
        ge=8,
        le=4096,
        description="Side in pixels to bring images of mixed sizes to. Default: views.size.",
    )


class ViewsConfig(Model):
    """The two random views of an image.

    Defaults: the post's Appendix B (code: MoCoTransforms with s = 0.5).
    """

    size: Annotated[int, Option("--res")] = Field(
        96, ge=8, le=1024, description="Side of a view in pixels."
    )
    scale: Range = Field((0.2, 1.0), description="Fraction of the image's area that a crop covers.")
    ratio: Range = Field(
        (3.0 / 4.0, 4.0 / 3.0), description="Aspect ratio of a crop (torchvision's default)."
    )
    strength: float = Field(
        0.5, ge=0.0, le=1.0, description="SimCLR's s: scales the four jitter amplitudes below."
    )
    brightness: float = Field(
        0.8, ge=0.0, le=10.0, description="Jitter: factor between 1 - x and 1 + x, times strength."
    )
    contrast: float = Field(0.8, ge=0.0, le=10.0, description="Jitter, as brightness.")
    saturation: float = Field(0.8, ge=0.0, le=10.0, description="Jitter, as brightness.")
    hue: float = Field(
        0.2, ge=0.0, le=0.5, description="Jitter: turn by up to x of the circle, times strength."
    )
    jitter_p: Probability = Field(0.8, description="Probability of the four jitters, together.")
    grayscale_p: Probability = Field(0.2, description="Probability of a view without colour.")
    flip_p: Probability = Field(0.5, description="Probability of a horizontal flip.")
    blur: Literal["gaussian", "pil"] = Field(
        "gaussian", description="A sampled Gaussian, or Pillow's three box blurs."
    )
    blur_kernel: int = Field(
        9,
        ge=1,
        le=63,
        description="Taps of the sampled Gaussian, an odd number (SimCLR: a tenth of the side).",
    )
    blur_sigma: Range = Field((0.1, 2.0), description="Standard deviation in pixels.")
    blur_p: tuple[Probability, Probability] = Field(
        (0.5, 0.5), description="Probability for each view."
    )
    solarize_p: tuple[Probability, Probability] = Field(
        (0.0, 0.0), description="Probability for each view (byol: 0 and 0.2)."
    )
    mean: tuple[float, float, float] = Field(
        (0.485, 0.456, 0.406),
        description="Subtracted from pixels in [0, 1], per channel (ImageNet's, as torchvision).",
    )
    std: tuple[float, float, float] = Field(
        (0.229, 0.224, 0.225), description="Divides what is left, per channel (ImageNet's)."
    )

    @model_validator(mode="after")
    def _ranges(self) -> ViewsConfig:
        for name in ("scale", "ratio", "blur_sigma"):
            low, high = getattr(self, name)
            if not 0.0 < low <= high:
                raise ValueError(
                    f"views.{name} must be two positive numbers, the smaller first, got {low} and "
                    f"{high}"
                )
        if self.scale[1] > 1.0:
            raise ValueError(f"views.scale must not exceed 1, got {self.scale[1]}")
        if self.blur_kernel % 2 == 0:
            raise ValueError(f"views.blur_kernel must be odd, got {self.blur_kernel}")
        if self.blur == "gaussian" and self.blur_kernel // 2 >= self.size:
            raise ValueError(
                f"views.blur_kernel must not reach past the image: {self.blur_kernel} taps over "
                f"views.size of {self.size} px"
            )
        if min(self.std) <= 0.0:
            raise ValueError(f"views.std must be positive, got {self.std}")
        return self


class HeadConfig(Model):
    """A two-layer MLP: linear, norm, ReLU, linear (code: utils.MLP).

    Weight standardization leaves out the last linear layer.
    """

    norm: Annotated[
        HeadNormName, Option("--mlp-norm", about="Norm of both MLPs."), Option("--{head}-norm")
    ] = Field("bn", description="Norm of this MLP alone.")
    hidden: int = Field(512, ge=1, le=65536, description="Units of the hidden layer.")
    out: int = Field(
        128, ge=1, le=65536, description="Units of the output, the same for both MLPs."
    )
    ws: Annotated[bool, Option("--mlp-ws/--no-mlp-ws")] = Field(
        False, description="Standardize the weights of the MLPs' first linear layers."
    )


class PredictorConfig(HeadConfig):
    """The online network's second head."""

    layers: Annotated[Literal[0, 2], Option("--predictor-layers")] = Field(
        2, description="0: no predictor; predictions are the projections."
    )


class ModelConfig(Model):
    """Encoder, projector and predictor. Defaults: the post's ResNet-18 and sizes."""

    encoder: Annotated[
        str, Option("--encoder", "resnet18|resnet34|resnet50|timm:NAME|torchvision:NAME")
    ] = Field(
        "resnet18",
        description="Architecture of the encoder; of timm and torchvision any network for images, "
        "unfused and so slower.",
    )
    norm: Annotated[NormName, Option("--norm")] = Field("bn", description="Norm of the encoder.")
    norm_scope: Annotated[Literal["global", "rank"], Option("--norm-scope")] = Field(
        "global", description="Batch norm's statistics: of the whole batch, or of a rank's share."
    )
    ws: Annotated[bool, Option("--ws/--no-ws")] = Field(
        False, description="Standardize the encoder's convolution weights."
    )
    groups: int = Field(
        32,
        ge=1,
        le=4096,
        description="Groups of group norm; fewer where a group would have under 2 channels.",
    )
    width: Annotated[int, Option("--width")] = Field(
        64,
        ge=2,
        le=1024,
        description="Channels of the first stage. The embedding has 8 times as many, of resnet50 "
        "32 times.",
    )
    stem: Annotated[Literal["torchvision", "small"], Option("--stem")] = Field(
        "torchvision", description="7x7 with stride 2 and max pooling, or 3x3 with stride 1."
    )
    projector: HeadConfig = HeadConfig()
    predictor: PredictorConfig = PredictorConfig()

    @property
    def foreign(self) -> tuple[str, str] | None:
        """Library and name of an encoder that is not fastbyol's own, None of one that is."""
        match = _FOREIGN.fullmatch(self.encoder)
        return (match[1], match[2]) if match else None

    @field_validator("encoder")
    @classmethod
    def _encoder(cls, encoder: str) -> str:
        if encoder not in ENCODERS and _FOREIGN.fullmatch(encoder) is None:
            near = "".join(f"; the nearest is {each}" for each in nearest(encoder, ENCODERS))
            raise ValueError(
                f"should be {', '.join(ENCODERS)}, timm:NAME or torchvision:NAME{near}"
            )
        return encoder

    @model_validator(mode="after")
    def _of_own_encoders(self) -> ModelConfig:
        for name in OF_OWN_ENCODERS if self.foreign else ():
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(
                    f"model.{name} is of fastbyol's own encoders ({', '.join(ENCODERS)}), and "
                    f"model.encoder is {self.encoder}: leave it out"
                )
        return self


class MethodConfig(Model):
    """The loss. Defaults of the contrastive loss: code, moco.py, after moco version 2."""

    name: Annotated[Literal["byol", "contrastive", "simsiam"], Option("--method")] = Field(
        "byol",
        description="Predict a moving average's projections, tell them from negatives, or predict "
        "the network's own.",
    )
    temperature: Annotated[float, Option("--temperature")] = Field(
        0.2, gt=0.0, le=1000.0, description="Contrastive loss: divides the cosines."
    )
    queue: Annotated[int, Option("--queue")] = Field(
        65536,
        ge=0,
        le=10_000_000,
        description="Contrastive loss: past target projections kept as negatives; 0: the rest of "
        "the batch.",
    )


class OptimConfig(Model):
    """SGD and LARS.

    Without ``lr`` or ``weight_decay`` the chosen optimizer's own number below is used.
    """

    name: Annotated[Literal["sgd", "lars"], Option("--opt")] = Field(
        "sgd", description="Optimizer."
    )
    lr: Annotated[float | None, Option("--lr")] = Field(
        None,
        ge=0.0,
        le=1000.0,
        description="Learning rate. Default: the preset's for the optimizer.",
    )
    weight_decay: Annotated[float | None, Option("--wd")] = Field(
        None, ge=0.0, le=10.0, description="Weight decay. Default: the preset's for the optimizer."
    )
    sgd_lr: float = Field(0.8, ge=0.0, le=1000.0, description="SGD's lr (code: train_blog.py).")
    sgd_weight_decay: float = Field(
        1e-4, ge=0.0, le=10.0, description="SGD's weight decay (code: MoCoMethodParams)."
    )
    lars_lr: float = Field(
        0.2, ge=0.0, le=1000.0, description="LARS's lr (post, appendix; byol section 3.3)."
    )
    lars_weight_decay: float = Field(
        1.5e-6, ge=0.0, le=10.0, description="LARS's weight decay (byol section 3.3)."
    )
    lr_scaling: Literal["none", "linear"] = Field(
        "none", description="linear: lr x batch_size / 256."
    )
    momentum: float = Field(0.9, ge=0.0, lt=1.0, description="Momentum of SGD and of LARS.")
    eta: float = Field(1e-3, gt=0.0, le=1.0, description="LARS trust coefficient.")
    dialect: Annotated[Literal["blog", "deepmind", "bolts"], Option("--lars-dialect")] = Field(
        "blog", description="Whose LARS: `fastbyol explain lars` shows how they differ."
    )
    lars_on: Annotated[tuple[str, ...], Option("--lars-on", "PATTERN")] = Field(
        ("*",),
        description="Parameters that adapt: module prefixes or globs, repeatable; '*' is all.",
    )
    lars_exclude: Exclusion = Field("none", description="Parameters among those that do not adapt.")
    decay_exclude: Exclusion = Field("none", description="Parameters without weight decay.")
    lr_mult: Annotated[tuple[tuple[str, float], ...], Option("--lr-mult", "PATTERN=FACTOR")] = (
        Field(
            (),
            description="Rate factor of the parameters that match, repeatable. Factors of all "
            "matches multiply.",
        )
    )
    rate_cap: Annotated[float | None, Option("--rate-cap")] = Field(
        None, gt=0.0, le=1e9, description="LARS: highest rate of any parameter. Default: no cap."
    )
    replay_rates: Annotated[str | None, Option("--replay-rates", "RUN")] = Field(
        None, min_length=1, description="LARS: use the rates that this run recorded, step by step."
    )

    @model_validator(mode="after")
    def _patterns(self) -> OptimConfig:
        if not all(self.lars_on):
            raise ValueError(
                "optim.lars_on must not hold an empty pattern; '*' is all parameters, [] is none"
            )
        for pattern, factor in self.lr_mult:
            if not pattern or factor < 0.0:
                raise ValueError(
                    "optim.lr_mult must pair a pattern with a factor of 0 or more, got "
                    f"{pattern!r} and {factor}"
                )
        return self


class ScheduleConfig(Model):
    """Learning rate and tau over a run."""

    lr: Literal["cosine", "constant"] = Field(
        "cosine", description="Learning rate: falls to 0 at the horizon, or stays."
    )
    lr_unit: Literal["step", "epoch"] = Field(
        "epoch", description="How often the learning rate changes."
    )
    warmup_epochs: float = Field(0.0, ge=0.0, le=10_000.0, description="Linear, per step.")
    horizon_epochs: int | None = Field(
        None, ge=1, le=1_000_000, description="Length of the cosines. Default: train.epochs."
    )
    tau: float = Field(
        0.996, ge=0.0, le=1.0, description="EMA momentum at step 0 (byol section 3.3; code)."
    )
    tau_schedule: Literal["cosine", "constant"] = Field(
        "cosine", description="cosine: rises to 1 at the horizon."
    )
    tau_unit: Literal["step", "epoch"] = Field("epoch", description="How often tau changes.")
    ema_order: Literal["before", "after"] = Field(
        "before", description="Update the target before or after the optimizer's step."
    )


class TrainConfig(Model):
    """The training loop."""

    epochs: Annotated[int, Option("--epochs")] = Field(
        10, ge=1, le=1_000_000, description="Passes over the training images."
    )
    batch_size: Annotated[int, Option("--batch-size")] = Field(
        256, ge=2, le=65536, description="Images per step, each seen as two views."
    )
    ranks: Annotated[int | None, Option("--ranks")] = Field(
        None,
        ge=1,
        le=4096,
        description="Shares that a batch is split into. The same number has the same bits in any "
        "number of processes that divides it. Default: one per process.",
    )
    seed: Annotated[int, Option("--seed")] = Field(
        0, ge=0, lt=2**63, description="Of the weights, the order and the views."
    )
    precision: Annotated[
        Literal["fp32", "bf16", "fp64", "auto"], Option("--precision", "fp32|bf16|auto")
    ] = Field(
        "fp32",
        description="auto: bf16 where the device multiplies it natively and the gradients agree. "
        "fp64 is for tests.",
    )
    device: Annotated[str, Option("--device", "auto|cpu|cuda[:N]")] = Field(
        "auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto: a GPU if there is one."
    )
    init_from: Annotated[str | None, Option("--init-from", "RUN|FILE|NAME")] = Field(
        None,
        min_length=1,
        description="Weights to start from: those of a run or checkpoint, without its momentum and "
        "step; or an encoder's, of torchvision:NAME, timm:NAME or a file of weights.",
    )
    loss_scale: float = Field(
        1.0, gt=0.0, le=1e6, description="Factor on the loss (code: loss_constant_factor)."
    )
    max_skipped_steps: int = Field(
        10,
        ge=0,
        le=1_000_000,
        description="Steps in a row with a non-finite gradient to skip; one more ends the run.",
    )
    stop_on_collapse: Annotated[bool, Option("--stop-on-collapse")] = Field(
        False,
        description="End with exit code 3 once the state is 'collapsed' at the end of an epoch.",
    )
    end_in: tuple[tuple[State, EpochCount], ...] = Field(
        (),
        description="Pairs of a state and a number: the run is finished once so many epochs in a "
        "row have ended in that state.",
    )


class EngineConfig(Model):
    """The way a step is executed. It changes the speed, and at most the rounding."""

    mode: Annotated[Literal["auto", "eager", "compile", "graph"], Option("--engine")] = Field(
        "auto",
        description="Eager, torch.compile, or one CUDA graph over compiled regions. auto: the "
        "fastest as measured.",
    )
    kernels: Literal["auto", "triton", "cpu", "reference"] = Field(
        "auto",
        description="Fused operations in Triton, compiled for a cpu, or in plain torch. auto: "
        "what fits.",
    )
    stem: Literal["auto", "plain", "blocks"] = Field(
        "auto",
        description="Input of the torchvision stem: pixels of 3 channels, or blocks of 2x2 pixels "
        "as 16, for tensor cores. auto: blocks with Triton's kernels in bf16 and an even view "
        "size.",
    )
    overlap: bool = Field(
        False,
        description="On CUDA: the target's forward pass on a stream of its own, beside the online "
        "network's.",
    )
    heads: Literal["fp32", "tf32x3"] = Field(
        "fp32",
        description="Products of projector and predictor: in fp32, or of fp32 values split for "
        "TF32 units, by Triton's kernels alone.",
    )

    @field_validator("kernels", mode="before")
    @classmethod
    def _read_old_word(cls, kernels: object) -> object:
        """Read the word that configurations used before ``cpu``."""
        return "cpu" if kernels == "processor" else kernels


class ProbeConfig(Model):
    """Accuracy during and after training."""

    every_epochs: int = Field(1, ge=0, le=1_000_000, description="0: only at the end.")
    protocol: Literal["blog", "linear", "knn"] = Field(
        "blog",
        description="The post's one-vs-rest classifier on the test images, a linear one fitted to "
        "the training images, or nearest neighbours.",
    )


class RunConfig(Model):
    """The files that a run writes."""

    checkpoint_every_steps: int = Field(
        0, ge=0, le=1_000_000_000, description="0: at the end of every epoch."
    )
    checkpoint_every_s: float | None = Field(
        None,
        gt=0.0,
        le=1e9,
        description="Save also after the step that ends so many seconds after the last save.",
    )
    keep_checkpoints: int = Field(3, ge=1, le=1_000_000, description="Newest checkpoints to keep.")
    layers_every_steps: int = Field(
        1, ge=1, le=1_000_000, description="Steps between two records of every layer."
    )
    drain_every_steps: int = Field(
        16,
        ge=1,
        le=65536,
        description="Steps whose metrics stay on the device before they are written.",
    )


class LogConfig(Model):
    """The libraries that a run is logged to besides its own files. No number depends on them."""

    to: Annotated[tuple[LoggerName, ...], Option("--log", "NAME")] = Field(
        (),
        description="Log to tensorboard, wandb, mlflow or trackio; several with commas. "
        "docs/loggers.md says where each writes.",
    )
    project: str = Field(
        "fastbyol",
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9_. -]{0,127}$",
        description="Project in wandb and trackio, experiment in mlflow.",
    )
    layers_every_steps: int = Field(
        10,
        ge=0,
        le=1_000_000,
        description="Steps between two histograms of the layers, of those that layers.npy has; "
        "0: none.",
    )
    pictures: int = Field(
        8, ge=0, le=1000, description="Samples on the picture of views; 0: no picture."
    )
    wait_s: float = Field(
        30.0,
        ge=0.0,
        le=86400.0,
        description="Seconds at the run's end to wait for what is not sent yet.",
    )


class Config(Model):
    """A whole run."""

    preset: str = Field("blog", description="Name of the preset that the values began with.")
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
    log: LogConfig = LogConfig()


class ResolvedOptim(OptimConfig):
    """An optimizer whose learning rate, scaled already, and weight decay are numbers."""

    lr: float = Field(ge=0.0, le=1000.0)
    weight_decay: float = Field(ge=0.0, le=10.0)
    lr_scaling: Literal["none"] = "none"


class ResolvedSchedule(ScheduleConfig):
    """A schedule whose horizon is a number of epochs."""

    horizon_epochs: int = Field(ge=1, le=1_000_000)


class Resolved(Config):
    """A configuration in which no number waits for another: what runs are made of.

    ``resolve`` makes one of a ``Config``; ``config_io.load`` and ``config_io.parse`` return one.
    """

    optim: ResolvedOptim
    schedule: ResolvedSchedule


def derived(config: Config) -> dict[str, object]:
    """Return the values that depend on others, by dotted key.

    They are the lr and weight decay of the chosen optimizer, scaled by the batch size if asked for,
    the schedules' horizon and the sizes of textures and of images of mixed sizes.
    """
    optim, lr, decay = config.optim, config.optim.lr, config.optim.weight_decay
    if lr is None:
        lr = optim.sgd_lr if optim.name == "sgd" else optim.lars_lr
    if optim.lr_scaling == "linear":
        lr = lr * config.train.batch_size / 256.0
    if decay is None:
        decay = optim.sgd_weight_decay if optim.name == "sgd" else optim.lars_weight_decay
    return {
        "optim.lr": lr,
        "optim.weight_decay": decay,
        "optim.lr_scaling": "none",
        "schedule.horizon_epochs": config.schedule.horizon_epochs or config.train.epochs,
        "data.textures_size": config.data.textures_size or max(16, config.views.size),
        "data.size": config.data.size or config.views.size,
    }


def resolve(config: Config) -> Resolved:
    """Return ``config`` with its ``derived`` values; a resolved one stays equal.

    A copy with other ``data`` has to be resolved again: it may lack sizes.
    """
    values = config.model_dump()
    for key, value in derived(config).items():
        section, _, name = key.partition(".")
        values[section][name] = value
    return Resolved.model_validate(values)
