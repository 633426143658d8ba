"""The encoder for export: the engine's function, under all that torch does with networks."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from fastbyol.config import ModelConfig
from fastbyol.errors import UsageError
from fastbyol.model.ordinary import Encoder, ordinary
from fastbyol.model.resnet import build_encoder

close = torch.testing.assert_close
KINDS = list(itertools.product(("bn", "gn", "ln", "none"), (False, True), ("small", "torchvision")))
NAMES = ["-".join((norm, "ws" * ws, stem)) for norm, ws, stem in KINDS]


def images(count: int = 4, side: int = 40) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(count))


def config_of(
    kind: tuple[str, bool, str], width: int = 4, encoder: str = "resnet18"
) -> ModelConfig:
    norm, ws, stem = kind
    return ModelConfig.model_validate(
        {"encoder": encoder, "norm": norm, "ws": ws, "stem": stem, "width": width}
    )


def twins(config: ModelConfig) -> tuple[nn.Module, Encoder]:
    """Make the engine's encoder, with random statistics and affine parameters, and its twin."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = build_encoder(config, num_views=2)
        with torch.no_grad():
            for name, tensor in net.state_dict().items():
                if tensor.ndim == 1:
                    tensor.uniform_(
                        0.5, 1.5
                    ) if "var" in name or "weight" in name else tensor.normal_()
    return net.eval(), ordinary(net, config)


@pytest.fixture(params=KINDS, ids=NAMES)
def kind(request: pytest.FixtureRequest) -> tuple[str, bool, str]:
    return request.param


def test_it_computes_what_the_engines_does(kind: tuple[str, bool, str]) -> None:
    for encoder, width, side in (
        ("resnet18", 4, 40),
        ("resnet18", 16, 25),
        ("resnet34", 4, 25),
        ("resnet50", 4, 25),
    ):
        net, twin = twins(config_of(kind, width, encoder))
        assert {k: v.shape for k, v in net.state_dict().items()} == {
            k: v.shape for k, v in twin.state_dict().items()
        }
        for count in (1, 5):
            x = images(count, side)
            wanted = copy.deepcopy(net).double()(x.double())
            # fp32 through twenty layers, and through up to fifty.
            bound = 1e-4 if encoder == "resnet18" else 1e-3
            assert (twin(x).double() - wanted).norm() <= bound * wanted.norm()
            close(copy.deepcopy(twin).double()(x.double()), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("encoder", ["resnet18", "resnet34", "resnet50"])
def test_with_batch_norm_it_is_torchvisions(encoder: str, train: bool) -> None:
    theirs = getattr(torchvision.models, encoder)()
    theirs.fc = nn.Identity()
    _, twin = twins(ModelConfig.model_validate({"encoder": encoder}))
    theirs.load_state_dict(twin.state_dict())
    theirs.train(train)
    twin.train(train)
    x = images(5, 64)
    y, wanted = twin(x), theirs(x)
    assert torch.equal(y, wanted)
    y.square().sum().backward()
    wanted.square().sum().backward()
    assert all(
        torch.equal(p.grad, q.grad)
        for p, q in zip(twin.parameters(), theirs.parameters(), strict=True)
    )
    assert all(torch.equal(a, b) for a, b in zip(twin.buffers(), theirs.buffers(), strict=True))


def test_it_is_made_of_plain_tensors_of_its_own_and_draws_nothing(
    kind: tuple[str, bool, str],
) -> None:
    before = torch.get_rng_state()
    net, twin = twins(config_of(kind))
    assert torch.equal(torch.get_rng_state(), before)
    theirs = {t.untyped_storage().data_ptr() for t in net.state_dict().values()}
    for tensor in (*twin.parameters(), *twin.buffers()):
        assert tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        assert tensor.untyped_storage().data_ptr() not in theirs
    assert all(p.requires_grad for p in twin.parameters())
    assert not any(module.training for module in twin.modules())


def _scripted(net: nn.Module, x: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(net), file)
    return torch.jit.load(io.BytesIO(file.getvalue()))(x)


def _saved(net: nn.Module, x: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save(net, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)(x)


def _reloaded(net: Encoder, x: Tensor) -> Tensor:
    file, other = io.BytesIO(), copy.deepcopy(net)
    torch.save(net.state_dict(), file)
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.zero_()
    other.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True), strict=True)
    return other(x)


def _exported(net: nn.Module, x: Tensor) -> Tensor:
    batch = torch.export.Dim("batch", min=2, max=64)
    return torch.export.export(
        net, (torch.cat((x, x)),), dynamic_shapes=((({0: batch}),))
    ).module()(x)


def _together(net: nn.Module, x: Tensor) -> Tensor:
    stacked = {name: torch.stack((t, t)).detach() for name, t in net.state_dict().items()}
    return vmap(lambda tensors: functional_call(net, tensors, (x,)))(stacked)[1]


USES: dict[str, Callable[[Encoder, Tensor], Tensor]] = {
    "trace": lambda net, x: torch.jit.trace(net, x)(x),
    "script": _scripted,
    "export": _exported,
    "compile": lambda net, x: torch.compile(net, backend="aot_eager", fullgraph=True)(x),
    "fx": lambda net, x: torch.fx.symbolic_trace(net)(x),
    "make_fx": lambda net, x: make_fx(net)(x)(x),
    "vmap": lambda net, x: vmap(lambda image: net(image[None])[0])(x),
    "ensemble": _together,
    "deepcopy": lambda net, x: copy.deepcopy(net)(x),
    "pickle": lambda net, x: pickle.loads(pickle.dumps(net))(x),
    "torch.save": _saved,
    "state_dict": _reloaded,
    "channels_last": lambda net, x: copy.deepcopy(net).to(memory_format=torch.channels_last)(
        x.contiguous(memory_format=torch.channels_last)
    ),
    "inference_mode": lambda net, x: torch.inference_mode()(net)(x).clone(),
}


# Each norm, each stem, and with and without standardized weights.
@pytest.mark.parametrize(
    "kind",
    [
        ("bn", False, "torchvision"),
        ("gn", True, "small"),
        ("ln", True, "torchvision"),
        ("none", False, "small"),
    ],
    ids=str,
)
@pytest.mark.parametrize("use", USES)
def test_uses(use: str, kind: tuple[str, bool, str]) -> None:
    twin, x = twins(config_of(kind, width=2))[1], images(4, 24)
    with warnings.catch_warnings():
        for category in (
            DeprecationWarning,
            FutureWarning,
            torch.jit.TracerWarning,
        ):  # of torch.jit as a whole
            warnings.simplefilter("ignore", category)
        wanted = twin(x)
        assert (USES[use](twin, x) - wanted).norm() <= 1e-4 * wanted.norm()


def test_meta_fake_and_lower_precision(kind: tuple[str, bool, str]) -> None:
    twin, x = twins(config_of(kind))[1], images()
    assert copy.deepcopy(twin).to("meta")(x.to("meta")).shape == (4, 32)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert twin(x).shape == (4, 32)
    wanted = twin(x)
    for dtype in (torch.bfloat16, torch.float16):
        got = copy.deepcopy(twin).to(dtype)(x.to(dtype))
        assert got.dtype == dtype
        # Some sixty roundings in a row, to 8 bits at the least.
        if wanted.abs().max() < 1e3:  # else float16 ends before it
            assert (got.float() - wanted).norm() <= 0.1 * wanted.norm()


def test_fine_tuning_knows_no_views(kind: tuple[str, bool, str]) -> None:
    """A batch of any size, in any order; and torch's own gradients."""
    _, twin = twins(config_of(kind))
    twin.train()
    x, order = torch.cat((images(4), 3 + images(3))).double(), torch.tensor([0, 4, 1, 5, 2, 6, 3])
    one, other = copy.deepcopy(twin).double(), copy.deepcopy(twin).double()
    close(one(x), other(x[order])[order.argsort()], rtol=1e-9, atol=1e-9)
    close(dict(one.named_buffers()), dict(other.named_buffers()))
    head = copy.deepcopy(twin)
    head.fc = nn.Linear(head.embedding_dim, 3)
    head(images(5)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


def test_gradients_are_its_functions(kind: tuple[str, bool, str]) -> None:
    twin = twins(config_of(kind, width=2))[1].double()
    x = images(2, 9).double()
    assert torch.autograd.gradcheck(twin, x.requires_grad_(), fast_mode=True)
    assert grad(lambda x: twin(x).sum())(x.detach()).shape == x.shape


def test_words_that_are_none_are_refused() -> None:
    for odd in ({"norm": "in"}, {"stem": "big"}, {"encoder": "resnet19"}):
        with pytest.raises(UsageError, match="is none of"):
            Encoder(ModelConfig.model_construct(**{**ModelConfig().__dict__, **odd}))
