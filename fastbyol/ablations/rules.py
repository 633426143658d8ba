"""The verdict rules: for every claim the statements that it makes, each in words and as a question to runs.

A statement is ``main`` where the claim stands or falls with it, ``other`` where it refines the claim, and ``told`` where it is
reported and counts for nothing: controls that the post could not run, and what it does not claim. To leave the collapse and to
learn are two statements everywhere: runs have done either without the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from fastbyol.ablations.accuracy_questions import (
    LEVEL_PP,
    beats,
    in_order,
    learns,
    learns_by,
    level,
    no_better,
    published_accuracy,
)
from fastbyol.ablations.claims import CAPPED, CONTRAST, REPLAYED, TABLE
from fastbyol.ablations.questions import (
    AT_ONCE,
    DISTURBED,
    IN_TIME,
    QUICKLY,
    Question,
    Span,
    collapses,
    comes_and_goes,
    disturbed,
    ends_collapsed,
    ends_out,
    ends_separated,
    every,
    leaves,
    loss_rises_after_collapse,
    never_collapses,
    never_leaves,
    separates,
    stays_beyond,
    was_collapsed,
)
from fastbyol.ablations.rate_questions import EXPLODES, peaks_before, rates_explode
from fastbyol.errors import check_choice

Role = Literal["main", "other", "told"]

ABOVE_UNTRAINED = "above that of its own untrained weights by more than sampling explains"


@dataclass(frozen=True)
class Rule:
    """A statement of a claim: ``text``, when it holds for a seed (``words``, ``ask``), and the arms whose runs it looks at."""

    text: str
    words: str
    ask: Question
    arms: tuple[str, ...]
    role: Role = "main"


def _never(arm: str) -> Rule:
    return Rule("It never collapses.", "no epoch ends in the collapsed phase", never_collapses(arm), (arm,))


def _learns(arm: str, text: str = "It learns.", role: Role = "other") -> Rule:
    return Rule(text, f"its last accuracy is {ABOVE_UNTRAINED}", learns(arm), (arm,), role)


def _learns_nothing(arm: str, text: str) -> Rule:
    return Rule(text, f"its last accuracy is not {ABOVE_UNTRAINED}", learns(arm, held_if=False), (arm,), "other")


def _level(arm: str, claim: str) -> Rule:
    accuracy = published_accuracy(claim)
    return Rule(
        f"Its accuracy ends at {accuracy:g} %.", f"within {LEVEL_PP:g} points; at full scale only",
        level(arm, accuracy), (arm,), "other",
    )  # fmt: skip


def _collapses_at_once(arm: str) -> Rule:
    return Rule("It collapses at once.", f"it is in the collapsed phase {AT_ONCE.words}", collapses(arm, AT_ONCE), (arm,))


def _ends_collapsed(arm: str, text: str = "It is collapsed at the end.") -> Rule:
    return Rule(text, "the last epoch ends in the collapsed phase", ends_collapsed(arm), (arm,))


def _ends_out(arm: str, text: str = "It is out of the collapse at the end.", span: Span | None = None) -> Rule:
    words = "the last epoch does not end in the collapsed phase"
    words += f"; a collapsed run that is over before this leaves it open: {span.words}" if span else ""
    return Rule(text, words, ends_out(arm, span), (arm,))


def _stays_collapsed(arm: str, text: str, role: Role) -> Rule:
    return Rule(text, "once collapsed, every epoch is", never_leaves(arm), (arm,), role)


def _was_collapsed(arm: str) -> Rule:
    return Rule("It collapses first.", "some epoch ends in the collapsed phase", was_collapsed(arm), (arm,))


def _leaves(arm: str, span: Span, text: str, role: Role = "other") -> Rule:
    return Rule(text, f"it is out of the collapsed phase again {span.words}", leaves(arm, span), (arm,), role)


def _explodes(arm: str, groups: tuple[str, ...], text: str, *, while_collapsed: bool, role: Role) -> Rule:
    words = f"each group's highest epoch mean is {EXPLODES:g} times its first rate or more"
    words += ", within an epoch of a collapsed one" if while_collapsed else ""
    return Rule(text, words, rates_explode(arm, groups, while_collapsed=while_collapsed), (arm,), role)


def _same_without_feedback(role: Role) -> Rule:
    return Rule(
        "The same rates, replayed without feedback, do not help.",
        f"{REPLAYED}, which takes its rates from another seed's run, is collapsed at the end",
        ends_collapsed(REPLAYED),
        (REPLAYED,),
        role,
    )


def _never_collapsing(claim: str, arm: str) -> tuple[Rule, ...]:
    return (_never(arm), _learns(arm), _level(arm, claim))


def _c2(arm: str) -> tuple[Rule, ...]:
    return (
        _collapses_at_once(arm),
        _ends_out(arm, "Trained longer, it leaves the collapse."),
        Rule(
            "It moves to a higher loss.", f"the last loss is over {DISTURBED:g} times the lowest of the collapse",
            loss_rises_after_collapse(arm), (arm,), "other",
        ),
        _learns(arm, "Its encodings become more useful."),
        _level(arm, "C2"),
    )  # fmt: skip


def _c5(arm: str) -> tuple[Rule, ...]:
    stays = _stays_collapsed(arm, "It never recovers in between.", "other")
    useless = _learns_nothing(arm, "Its encodings are worth no more than random weights'.")
    return (_collapses_at_once(arm), _ends_collapsed(arm), stays, useless, _level(arm, "C5"))


def _c6(arm: str) -> tuple[Rule, ...]:
    capped = Rule(
        "A cap on the rates keeps it collapsed.", f"{CAPPED} is collapsed at the end", ends_collapsed(CAPPED), (CAPPED,), "told"
    )
    return (
        _ends_out(arm),
        _learns(arm, role="main"),
        _was_collapsed(arm),
        _leaves(arm, QUICKLY, "It leaves the collapse quickly."),
        _level(arm, "C6"),
        _same_without_feedback("told"),
        capped,
    )


def _c7(arm: str) -> tuple[Rule, ...]:
    nothing = _learns_nothing(arm, "It learns nothing.")
    return (_collapses_at_once(arm), _ends_collapsed(arm), nothing, _level(arm, "C7"))


def _c8(arm: str) -> tuple[Rule, ...]:
    late = Rule(
        "It stays collapsed for long.", f"it collapses, and is not out of that again {AT_ONCE.words}",
        stays_beyond(arm, AT_ONCE), (arm,), "other",
    )  # fmt: skip
    apart = Rule("Its representations separate.", "the last epoch ends separated", ends_separated(arm), (arm,), "other")
    return (
        _collapses_at_once(arm),
        _ends_out(arm, "Weight decay alone lets it leave the collapse."),
        late,
        apart,
        _learns(arm),
        _level(arm, "C8"),
    )


def _c9(arm: str) -> tuple[Rule, ...]:
    return (
        Rule(
            "After a collapse, its representations separate.", f"a separated epoch follows a collapsed one {IN_TIME.words}",
            separates(arm, IN_TIME), (arm,),
        ),
        Rule(
            "It collapses and recovers several times.", "after a collapse it separates twice or more, with relapses in between",
            comes_and_goes(arm, IN_TIME), (arm,), "other",
        ),
        _ends_out(arm, span=IN_TIME),
        _learns(arm),
        _level(arm, "C9"),
    )  # fmt: skip


def _c10(arm: str) -> tuple[Rule, ...]:
    groups = ("encoder.layer1", "encoder.layer2")
    apart = Rule("It separates.", "the last epoch ends separated", ends_separated(arm), (arm,), "other")
    return (
        _explodes(arm, groups, "The rates of layer1 and layer2 explode as it collapses.", while_collapsed=True, role="main"),
        # The post shows 30 epochs of it: a run of as many steps that has not left did not.
        _leaves(arm, QUICKLY._replace(followed=30), "It leaves the collapse quickly.", "main"),
        apart,
        _learns(arm, role="told"),
    )


def _c11(arm: str) -> tuple[Rule, ...]:
    groups = ("projector.linear1", "projector.linear2", "predictor.linear1", "predictor.linear2")
    return (
        Rule(
            "The collapse is disturbed.",
            f"after the collapse the loss climbs to {DISTURBED:g} times its lowest, or the collapsed phase is left",
            disturbed(arm),
            (arm,),
        ),
        _ends_collapsed(arm, "The collapse returns."),
        _explodes(arm, groups, "The rates of the MLPs climb.", while_collapsed=False, role="other"),
    )


def _c12(fast: str, slow: str) -> tuple[Rule, ...]:
    return (
        Rule(
            "At lr .5 the rate of layer1 peaks before that at lr .1.", "the epoch of the highest epoch mean, in steps",
            peaks_before(fast, slow, "encoder.layer1"), (fast, slow),
        ),
        _ends_out(fast, "At lr .5 it is out of the collapse at the end."),
        _learns(fast, "At lr .5 it learns.", "main"),
        _ends_collapsed(slow, "At lr .1 it stays collapsed."),
        _leaves(fast, AT_ONCE, "At lr .5 it leaves the collapse at once."),
        Rule(
            "At lr .5 learning starts at once.", f"an accuracy is {ABOVE_UNTRAINED} {AT_ONCE.words}",
            learns_by(fast, AT_ONCE), (fast,), "other",
        ),
    )  # fmt: skip


def _c13(arm: str) -> tuple[Rule, ...]:
    """Where LARS does not recover either, that a higher rate does not says little: partly, then."""
    recovers = Rule(
        "LARS on the same layers does make it recover.", f"the last epoch of {CONTRAST} does not end in the collapsed phase",
        ends_out(CONTRAST), (CONTRAST,), "other",
    )  # fmt: skip
    return (
        _ends_collapsed(arm, "A higher learning rate on layer1 and layer2 does not make it recover."),
        recovers,
        _same_without_feedback("other"),
        _stays_collapsed(arm, "It does not leave the collapse in between.", "told"),
    )


def _m1(
    full: str, projector: str, predictor: str, none: str, ln: str, random: str, contrastive: str
) -> tuple[Rule, ...]:  # fmt: skip
    apart = every(never_collapses(full), ends_collapsed(none), ends_collapsed(ln))
    return (
        Rule(
            "BN in both MLPs, the projector's or the predictor's is better than none.", "by more than sampling explains",
            beats((full, projector, predictor), none), (full, projector, predictor, none),
        ),
        Rule(
            "Without norm, and with LayerNorm, it is no better than a random network.", "by more than sampling explains",
            no_better((none, ln), random), (none, ln, random),
        ),
        Rule(
            "Both BN, projector only, predictor only: in this order.", "no rise by more than sampling explains",
            in_order((full, projector, predictor)), (full, projector, predictor), "other",
        ),
        Rule(
            "Without norm and with LayerNorm it is collapsed, with BN it is not.",
            "the last epoch ends in the collapsed phase; none does", apart, (full, none, ln), "other",
        ),
        Rule(
            "A contrastive loss is better than a random network.", "by more than sampling explains",
            beats((contrastive,), random), (contrastive, random), "other",
        ),
        # Told: the contrastive arm's learning rate and queue are ours at sizes other than the post's, and so is the order then.
        Rule(
            "A contrastive loss is below BYOL with BN in both MLPs.", "by more than sampling explains",
            beats((full,), contrastive), (full, contrastive), "told",
        ),
    )  # fmt: skip


RULES: Mapping[str, tuple[Rule, ...]] = {
    "C1": _never_collapsing("C1", "bn-sgd-mlp-bn"),
    "C2": _c2("bn-sgd-mlp-none"),
    "C3": _never_collapsing("C3", "bn-lars-mlp-none"),
    "C4": _never_collapsing("C4", "gn-sgd-mlp-bn"),
    "C5": _c5("gn-sgd-mlp-none"),
    "C6": _c6("gn-lars-0.2"),
    "C7": _c7("gn-lars-0.1"),
    "C8": _c8("gn-sgd-weight-decay"),
    "C9": _c9("gn-ws-sgd"),
    "C10": _c10(CONTRAST),
    "C11": _c11("gn-lars-mlps"),
    "C12": _c12("gn-lars-0.5", "gn-lars-0.1"),
    "C13": _c13("gn-sgd-high-lr-layer1-layer2"),
    "M1": _m1(*TABLE),
}


def in_words(claim: str) -> str:
    """The rules of a claim as lines of text, one a statement."""
    check_choice("claim", claim, RULES)
    marks = {"main": "", "other": " (refines)", "told": " (told, does not count)"}
    return "\n".join(f"{rule.text[:-1]}{marks[rule.role]}: {rule.words}." for rule in _ordered(RULES[claim]))


def _ordered(rules: Iterable[Rule]) -> list[Rule]:
    return sorted(rules, key=lambda rule: ("main", "other", "told").index(rule.role))
