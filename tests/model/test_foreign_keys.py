"""An encoder's tensors under other programs' names. Other libraries' models: test_origin.py."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fastbyol.config import ModelConfig
from fastbyol.model.foreign_keys import MismatchError, match
from fastbyol.model.resnet import build_encoder

OWN = build_encoder(ModelConfig(width=2, norm="gn")).state_dict()
OF_BATCH_NORM = build_encoder(ModelConfig(width=2)).state_dict()
WORDS = st.text("abcdefghijklmnopqrstuvwxyz_", min_size=1, max_size=8)
PREFIXES = st.lists(st.one_of(WORDS, st.sampled_from(["0", "module", "fc"])), max_size=4).map(
    lambda parts: "".join(f"{part}." for part in parts)
)
CHILDREN = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}


def by_position(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names as in ``nn.Sequential(*resnet.children())``."""
    return {
        ".".join((CHILDREN[name.partition(".")[0]], name.partition(".")[2])): tensor
        for name, tensor in state.items()
    }


def behind(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


@given(
    prefix=PREFIXES,
    head=st.dictionaries(WORDS, st.integers(1, 3), max_size=3),
    is_position=st.booleans(),
    order=st.randoms(use_true_random=False),
)
@settings(max_examples=60, deadline=None)
def test_whatever_stands_before_the_names_and_beside_them_the_encoder_is_recognised(
    prefix: str, head: dict[str, int], is_position: bool, order
) -> None:
    inner = by_position(OWN) if is_position else OWN
    heads = {f"head.{name}": torch.zeros(size) for name, size in head.items()}
    rows = [*behind(prefix, inner).items(), *heads.items()]
    order.shuffle(rows)
    found = match(OWN, dict(rows))
    keys = [prefix + name for name in inner]
    assert found.keys == dict(zip(OWN, keys, strict=True))
    assert (found.prefix, found.by_position) == (prefix, is_position)
    assert found.missing == ()
    assert sum(found.unused.values()) == len(heads)


@pytest.mark.parametrize(
    ("trained", "average"),
    [
        ("backbone.", "backbone_momentum."),
        ("backbone.", "teacher_backbone."),
        ("student_backbone.", "backbone."),  # lightly's DINO: the average has the plain name
        ("state_dict.encoder.", "state_dict.momentum_encoder."),
        ("module.encoder_q.", "module.encoder_k."),
        ("online_network.", "target_network."),
        ("online_encoder.net.", "target_encoder.net."),
        ("state_dict.", "state_dict_ema."),
        ("student.module.backbone.", "teacher.backbone."),
    ],
)
def test_the_trained_network_comes_before_its_average(trained: str, average: str) -> None:
    changed = {name: tensor + 1 for name, tensor in OWN.items()}
    for pairs in ((trained, average), (average, trained)):  # in either order
        file = behind(pairs[0], OWN) | behind(pairs[1], changed)
        found = match(OWN, file)
        assert found.prefix == trained
        assert found.others == (average,)


def test_two_encoders_without_a_word_are_refused_unless_they_are_one() -> None:
    twice = behind("net.", OWN) | behind("model.net.", OWN)
    assert match(OWN, twice).prefix == "net."
    twice["net.conv1.weight"] = twice["net.conv1.weight"] + 1
    with pytest.raises(MismatchError, match=r"two encoders, net\. and model\.net\.: save the one"):
        match(OWN, twice)


def refused(own: dict[str, Tensor], file: dict[str, Tensor], pattern: str) -> None:
    with pytest.raises(MismatchError, match=pattern) as caught:
        match(own, file)
    assert len(str(caught.value).splitlines()) == 1


def test_the_first_difference_is_named() -> None:
    shape = re.escape(str(tuple(OWN["conv1.weight"].shape)))
    file = behind("backbone.", OWN)
    del file["backbone.conv1.weight"], file["backbone.layer3.0.bn1.weight"]
    refused(OWN, file, rf"^conv1.weight of the encoder is absent there and {shape} in this")
    cut = OWN | {"conv1.weight": OWN["conv1.weight"][:, :1]}
    refused(OWN, cut, rf"^conv1.weight of the encoder is \(2, 1, 7, 7\) there and {shape} in")
    deeper = OWN | {"layer1.2.conv1.weight": torch.zeros(2, 2, 3, 3)}
    refused(OWN, deeper, r"^layer1\.2\.conv1\.weight of the encoder is \(2, .*absent in this")
    refused(OWN, by_position(deeper), r"^layer1\.2\.conv1\.weight of the encoder is \(2, ")
    refused(OWN, OF_BATCH_NORM, r"^bn1.running_mean of the encoder is \(2,\) there and absent")
    refused(OF_BATCH_NORM, OWN, r"^bn1.running_mean of the encoder is absent there and \(2,\) in")
    refused(
        OWN, {"cls_token": torch.zeros(1)}, r"^only 0 of its 1 tensors, such as cls_token, have n"
    )
    norms = {name: t for name, t in OWN.items() if "bn" in name}
    bare = {name: t for name, t in OWN.items() if name not in norms}
    refused(OWN, bare, r"^bn1.weight of the encoder is absent there and \(2,\) in this network")
    kept = bare | {name: OWN[name] for name in ("bn1.weight", "bn1.bias")}
    refused(bare, kept, r"^bn1.weight of the encoder is \(2,\) there and absent in this network")
    more = OWN | {"layer5.0.conv1.weight": torch.zeros(2, 2, 3, 3)}
    refused(OWN, more, r"^layer5\.0\.conv1\.weight of the encoder is \(2, .*absent in this")
    refused(OWN, {}, r"^only 0 of its 0 tensors have names like the encoder's, such as conv1")
    refused(OWN, OWN | {"layer1.\x1b\n": torch.zeros(1)}, r"^'layer1\.\\x1b\\n' of the encoder")


def test_a_sequential_within_the_encoder_is_one_encoder() -> None:
    own = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)).state_dict()
    found = match(behind("net.layers.", own), behind("layers.", own) | {"fc.bias": torch.ones(1)})
    assert (found.in_words(), found.others) == ("by name under layers", ())
    assert dict(found.unused) == {"fc": 1}


def test_counters_of_batch_norm_may_be_missing() -> None:
    file = {key: t for key, t in OF_BATCH_NORM.items() if not key.endswith("batches_tracked")}
    found = match(OF_BATCH_NORM, file)
    assert len(found.missing) == 20
    assert set(found.missing) | set(found.keys) == set(OF_BATCH_NORM)


class Wrapped(nn.Module):
    """An encoder whose own names have a prefix, and whose head has features and a classifier."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.head = nn.Sequential()
        self.head.norm = nn.LayerNorm(4)
        self.head.fc = nn.Linear(4, num_classes) if num_classes else nn.Identity()


def test_an_encoder_of_another_kind_with_a_prefix_of_its_own_and_a_classifier_in_its_head() -> None:
    own = behind("model.", Wrapped(0).state_dict())
    found = match(own, behind("state_dict.", Wrapped(3).state_dict()))
    assert found.keys == {name: name.replace("model", "state_dict", 1) for name in own}
    assert found.unused == {"state_dict.head": 2}
    refused(own, Wrapped(0).state_dict() | {"head.norm2.bias": torch.zeros(1)}, r"^head\.norm2")


def test_a_classifier_of_which_the_encoder_has_the_first_layers() -> None:
    """As torchvision's MobileNetV3 has it without its last layer."""

    def network(*layers: nn.Module) -> dict[str, Tensor]:
        features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        return nn.ModuleDict(
            {"features": features, "classifier": nn.Sequential(*layers)}
        ).state_dict()

    own = network(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(), nn.Identity())
    file = network(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 10))
    assert match(own, file).unused == {"classifier": 2}
    refused(
        own,
        network(nn.Linear(4, 8), nn.ReLU(), nn.Dropout()) | {"features.2.bias": torch.zeros(1)},
        r"^features\.2\.bias of the encoder is \(1,\) there and absent",
    )
