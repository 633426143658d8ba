"""The fourteen claims of the post: their statements, runs and published curves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

from fastbyol.ablations.curves import appendix

# The arms of the post's table, and the names that the numbers of M1 have for their rows.
TABLE_ROWS = {
    "bn-sgd-mlp-bn": "mlp_bn",
    "bn-sgd-projector-bn": "projector_bn",
    "bn-sgd-predictor-bn": "predictor_bn",
    "bn-sgd-mlp-none": "none",
    "bn-sgd-mlp-ln": "ln",
    "random": "random",
    "bn-sgd-contrastive": "contrastive",
}
# The table's positive and negative cosines, by the numbers that have them.
TABLE_COSINES = {
    "bn-sgd-mlp-bn": "positive_negative_cosine_mlp_bn",
    "bn-sgd-mlp-none": "positive_negative_cosine_none_and_ln",
    "bn-sgd-mlp-ln": "positive_negative_cosine_none_and_ln",
}
TABLE = tuple(TABLE_ROWS)
# Arms that the post argues about and could not run: LARS's rates of another seed replayed without
# feedback, and a cap on them.
REPLAYED, CAPPED = "gn-lars-0.2-replayed", "gn-lars-0.2-capped"
# The arm that C13 compares its higher learning rate with.
CONTRAST = "gn-lars-layer1-layer2"
# A setting that the post leaves open is one more arm, ARM@WHAT, e.g. gn-sgd-mlp-none@lr0.2.
ARMS = {
    "C12": ("gn-lars-0.5", "gn-lars-0.1"),
    "M1": TABLE,
}
# Of M1's two no statement is made.
CONTROLS = {
    "C6": (REPLAYED, CAPPED),
    "C13": (CONTRAST, REPLAYED),
    "M1": ("bn-sgd-simsiam", "bn-sgd-no-predictor"),
}
# The seeds that a verdict wants of every arm, the post's single runs excepted: three, so that one
# odd seed cannot decide, and five for the two claims that lie at a border, where seeds come out
# either way.
SEEDS, AT_A_BORDER = 3, {"C7": 5, "C12": 5}


class Source(NamedTuple):
    """A published curve: its arm, its figure and series, and its measure.

    ``measure`` is a field of ``Evidence`` (loss, pos_cos, neg_cos, accuracy) or ``rate:GROUP``.
    """

    arm: str
    figure: str
    series: str
    measure: str


@dataclass(frozen=True, eq=False)
class Claim:
    """One claim: ``says`` is the post's statement, ``numbers`` were read off its figures.

    ``arms`` are the runs that the claim is about, ``controls`` runs that are reported with it if
    they exist. A verdict on one's own runs needs at least ``needs`` seeds per arm.
    """

    id: str
    name: str
    says: str
    figures: tuple[str, ...]
    arms: tuple[str, ...]
    controls: tuple[str, ...]
    numbers: Mapping[str, Any]
    sources: tuple[Source, ...]
    needs: int


def _sources() -> dict[str, tuple[Source, ...]]:
    accuracy = {
        "C1": ("bn-sgd-mlp-bn", "accuracy_bn_encoder", "sgd_mlp_bn"),
        "C2": ("bn-sgd-mlp-none", "accuracy_bn_encoder", "sgd_mlp_none"),
        "C3": ("bn-lars-mlp-none", "accuracy_bn_encoder", "lars0.2_mlp_none"),
        "C4": ("gn-sgd-mlp-bn", "accuracy_gn_encoder", "sgd_mlp_bn"),
        "C5": ("gn-sgd-mlp-none", "accuracy_gn_encoder", "sgd_mlp_none"),
        "C6": ("gn-lars-0.2", "accuracy_gn_encoder", "lars0.2_mlp_none"),
        "C7": ("gn-lars-0.1", "accuracy_gn_encoder", "lars0.1_mlp_none"),
    }
    return {
        **{key: (Source(*series, "accuracy"),) for key, series in accuracy.items()},
        "C8": _loss_and_cosines("gn-sgd-weight-decay", "weight_decay"),
        "C9": _loss_and_cosines("gn-ws-sgd", "weight_std"),
        "C10": _loss_and_cosines("gn-lars-layer1-layer2", "lars_layer12")
        + tuple(
            Source("gn-lars-layer1-layer2", "lars_layer12_rate", name, f"rate:encoder.{name}")
            for name in ("layer1", "layer2")
        ),
        "C11": _loss_and_cosines("gn-lars-mlps", "lars_mlp")
        + tuple(
            Source("gn-lars-mlps", "lars_mlp_rate", name, f"rate:{name.replace('_', '.')}")
            for name in (
                "projector_linear1",
                "projector_linear2",
                "predictor_linear1",
                "predictor_linear2",
            )
        ),
        "C12": tuple(
            Source(f"gn-lars-{lr}", f"lars_timing_{figure}", f"lr{lr}", measure)
            for lr in ("0.5", "0.1")
            for figure, measure in (("rate", "rate:encoder.layer1"), ("loss", "loss"))
        ),
    }


def _loss_and_cosines(arm: str, figure: str) -> tuple[Source, ...]:
    return (
        Source(arm, f"{figure}_loss", "loss", "loss"),
        Source(arm, f"{figure}_cosine", "negative", "neg_cos"),
        Source(arm, f"{figure}_cosine", "positive", "pos_cos"),
    )


def _read() -> tuple[Claim, ...]:
    sources = _sources()
    return tuple(
        Claim(
            id=row["id"],
            name=row["name"],
            says=row["says"],
            figures=tuple(dict.fromkeys(source.figure for source in sources.get(row["id"], ()))),
            arms=ARMS.get(row["id"], (row["name"],)),
            controls=CONTROLS.get(row["id"], ()),
            numbers=MappingProxyType(row["numbers"]),
            sources=sources.get(row["id"], ()),
            needs=AT_A_BORDER.get(row["id"], SEEDS),
        )
        for row in appendix()["claims"]
    )


CLAIMS: tuple[Claim, ...] = _read()


def published_accuracy(claim: str) -> float:
    """Return the accuracy in percent at the end of the published curve of ``claim``, an id."""
    numbers = next(each.numbers for each in CLAIMS if each.id == claim)
    return float(
        next(value for name, value in numbers.items() if name in ("accuracy@319", "accuracy@320"))
    )
