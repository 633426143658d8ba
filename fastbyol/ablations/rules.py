"""The verdict rules, a table read top to bottom.

It has the statements that each claim makes, in words and as questions. To leave the collapse and to
learn are two statements everywhere: runs have done either without the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal, NamedTuple

from fastbyol.ablations import questions as ask
from fastbyol.ablations.claims import CAPPED, CONTRAST, REPLAYED, TABLE, published_accuracy
from fastbyol.ablations.questions import (
    AT_ONCE,
    DISTURBED,
    EXPLODES,
    IN_TIME,
    LEVEL_PP,
    QUICKLY,
    Finding,
    Span,
)
from fastbyol.errors import check_choice

# A claim stands or falls with its main statements and is refined by the others. A told statement is
# reported and counts for nothing: a control that the post could not run, or what it does not claim.
Role = Literal["main", "other", "told"]


class Condition(NamedTuple):
    """A condition on the runs of one seed, in words and as a question to one run of each arm."""

    words: str
    question: Callable[..., Finding]


class Rule(NamedTuple):
    """A statement of a claim, and its test on the runs of ``arms``, by default the claim's own."""

    role: Role
    text: str
    test: Condition
    arms: tuple[str, ...] = ()


UNTRAINED = "above that of its own untrained weights by more than sampling explains"
NEVER_COLLAPSES = Condition("no epoch ends in the collapsed phase", ask.never_collapses)
WAS_COLLAPSED = Condition("some epoch ends in the collapsed phase", ask.was_collapsed)
COLLAPSES_AT_ONCE = Condition(
    f"it is in the collapsed phase {AT_ONCE.words}", ask.collapses_at_once
)
ENDS_COLLAPSED = Condition("the last epoch ends in the collapsed phase", ask.ends_collapsed)
ENDS_OUT = Condition("the last epoch does not end in the collapsed phase", ask.ends_out)
ENDS_SEPARATED = Condition("the last epoch ends separated", ask.ends_separated)
NEVER_LEAVES = Condition("once collapsed, every epoch is", ask.never_leaves)
LEARNS = Condition(f"its last accuracy is {UNTRAINED}", ask.learns)
LEARNS_NOTHING = Condition(f"its last accuracy is not {UNTRAINED}", ask.learns_nothing)
BEYOND_SAMPLING = "by more than sampling explains"


def _leaves(span: Span) -> Condition:
    return Condition(
        f"it is out of the collapsed phase again {span.words}", partial(ask.leaves, span=span)
    )


def _explode(*groups: str, while_collapsed: bool) -> Condition:
    words = f"each group's highest epoch mean is {EXPLODES:g} times its first rate or more"
    words += ", within an epoch of a collapsed one" if while_collapsed else ""
    return Condition(
        words, partial(ask.rates_explode, groups=groups, while_collapsed=while_collapsed)
    )


def _level(claim: str) -> Rule:
    accuracy = published_accuracy(claim)
    test = Condition(
        f"within {LEVEL_PP:g} points; at full scale only", partial(ask.level, published=accuracy)
    )
    return Rule("other", f"Its accuracy ends at {accuracy:g} %.", test)


def _never_collapsing(claim: str) -> tuple[Rule, ...]:
    return (
        Rule("main", "It never collapses.", NEVER_COLLAPSES),
        Rule("other", "It learns.", LEARNS),
        _level(claim),
    )


def _same_without_feedback(role: Role) -> Rule:
    words = f"{REPLAYED}, which takes its rates from another seed's run, is collapsed at the end"
    text = "The same rates, replayed without feedback, do not help."
    return Rule(role, text, Condition(words, ask.ends_collapsed), (REPLAYED,))


COLLAPSE_FIRST = Rule("main", "It collapses at once.", COLLAPSES_AT_ONCE)
FAST, SLOW = "gn-lars-0.5", "gn-lars-0.1"
FULL, PROJECTOR, PREDICTOR, NONE, LN, RANDOM, CONTRASTIVE = TABLE

RULES: Mapping[str, tuple[Rule, ...]] = {
    "C1": _never_collapsing("C1"),
    "C2": (
        COLLAPSE_FIRST,
        Rule("main", "Trained longer, it leaves the collapse.", ENDS_OUT),
        Rule("other", "It moves to a higher loss.", Condition(
            f"the last loss is over {DISTURBED:g} times the lowest of the collapse",
            ask.loss_rises_after_collapse,
        )),
        Rule("other", "Its encodings become more useful.", LEARNS),
        _level("C2"),
    ),
    "C3": _never_collapsing("C3"),
    "C4": _never_collapsing("C4"),
    "C5": (
        COLLAPSE_FIRST,
        Rule("main", "It is collapsed at the end.", ENDS_COLLAPSED),
        Rule("other", "It never recovers in between.", NEVER_LEAVES),
        Rule("other", "Its encodings are worth no more than random weights'.", LEARNS_NOTHING),
        _level("C5"),
    ),
    "C6": (
        Rule("main", "It is out of the collapse at the end.", ENDS_OUT),
        Rule("main", "It learns.", LEARNS),
        Rule("main", "It collapses first.", WAS_COLLAPSED),
        Rule("other", "It leaves the collapse quickly.", _leaves(QUICKLY)),
        _level("C6"),
        _same_without_feedback("told"),
        Rule("told", "A cap on the rates keeps it collapsed.", Condition(
            f"{CAPPED} is collapsed at the end", ask.ends_collapsed,
        ), (CAPPED,)),
    ),
    "C7": (
        COLLAPSE_FIRST,
        Rule("main", "It is collapsed at the end.", ENDS_COLLAPSED),
        Rule("other", "It learns nothing.", LEARNS_NOTHING),
        _level("C7"),
    ),
    "C8": (
        COLLAPSE_FIRST,
        Rule("main", "Weight decay alone lets it leave the collapse.", ENDS_OUT),
        Rule("other", "It stays collapsed for long.", Condition(
            f"it collapses, and is not out of that again {AT_ONCE.words}", partial(ask.stays_beyond,
            span=AT_ONCE),
        )),
        Rule("other", "Its representations separate.", ENDS_SEPARATED),
        Rule("other", "It learns.", LEARNS),
        _level("C8"),
    ),
    "C9": (
        Rule("main", "After a collapse, its representations separate.", Condition(
            f"a separated epoch follows a collapsed one {IN_TIME.words}", partial(ask.separates,
            span=IN_TIME),
        )),
        Rule("other", "It collapses and recovers several times.", Condition(
            "after a collapse it separates twice or more, with relapses in between",
            partial(ask.comes_and_goes, span=IN_TIME),
        )),
        Rule("main", "It is out of the collapse at the end.", Condition(
            f"{ENDS_OUT.words}; a collapsed run that is over before this leaves it open: "
            f"{IN_TIME.words}",
            partial(ask.ends_out, span=IN_TIME),
        )),
        Rule("other", "It learns.", LEARNS),
        _level("C9"),
    ),
    "C10": (
        Rule("main", "The rates of layer1 and layer2 explode as it collapses.", _explode(
            "encoder.layer1", "encoder.layer2", while_collapsed=True,
        )),
        # The post shows 30 epochs of it: a run of as many steps that has not left did not.
        Rule("main", "It leaves the collapse quickly.", _leaves(QUICKLY._replace(followed=30))),
        Rule("other", "It separates.", ENDS_SEPARATED),
        Rule("told", "It learns.", LEARNS),
    ),
    "C11": (
        Rule("main", "The collapse is disturbed.", Condition(
            f"after the collapse the loss climbs to {DISTURBED:g} times its lowest, or the "
            "collapsed phase is left",
            ask.disturbed,
        )),
        Rule("main", "The collapse returns.", ENDS_COLLAPSED),
        Rule("other", "The rates of the MLPs climb.", _explode(
            "projector.linear1", "projector.linear2", "predictor.linear1", "predictor.linear2",
            while_collapsed=False,
        )),
    ),
    "C12": (
        Rule("main", "At lr .5 the rate of layer1 peaks before that at lr .1.", Condition(
            "the epoch of the highest epoch mean, in steps", partial(ask.peaks_before,
            group="encoder.layer1"),
        ), (FAST, SLOW)),
        Rule("main", "At lr .5 it is out of the collapse at the end.", ENDS_OUT, (FAST,)),
        Rule("main", "At lr .5 it learns.", LEARNS, (FAST,)),
        Rule("main", "At lr .1 it stays collapsed.", ENDS_COLLAPSED, (SLOW,)),
        Rule("other", "At lr .5 it leaves the collapse at once.", _leaves(AT_ONCE), (FAST,)),
        Rule("other", "At lr .5 learning starts at once.", Condition(
            f"an accuracy is {UNTRAINED} {AT_ONCE.words}", partial(ask.learns_by, span=AT_ONCE),
        ), (FAST,)),
    ),
    "C13": (
        Rule("main", "A higher learning rate on layer1 and layer2 does not make it recover.",
        ENDS_COLLAPSED),
        # If LARS does not recover either, a higher rate that does not says little: partly, then.
        Rule("other", "LARS on the same layers does make it recover.", Condition(
            f"the last epoch of {CONTRAST} does not end in the collapsed phase", ask.ends_out,
        ), (CONTRAST,)),
        _same_without_feedback("other"),
        Rule("told", "It does not leave the collapse in between.", NEVER_LEAVES),
    ),
    "M1": (
        Rule("main", "BN in both MLPs, the projector's or the predictor's is better than none.",
        Condition(
            BEYOND_SAMPLING, ask.beat_the_last,
        ), (FULL, PROJECTOR, PREDICTOR, NONE)),
        Rule("main", "Without norm, and with LayerNorm, it is no better than a random network.",
        Condition(
            BEYOND_SAMPLING, ask.no_better_than_the_last,
        ), (NONE, LN, RANDOM)),
        Rule("other", "Both BN, projector only, predictor only: in this order.", Condition(
            f"no rise {BEYOND_SAMPLING}", ask.in_order,
        ), (FULL, PROJECTOR, PREDICTOR)),
        Rule("other", "Without norm and with LayerNorm it is collapsed, with BN it is not.",
        Condition(
            "the last epoch ends in the collapsed phase; none does",
            ask.only_the_first_never_collapses,
        ), (FULL, NONE, LN)),
        Rule("other", "A contrastive loss is better than a random network.", Condition(
            BEYOND_SAMPLING, ask.beat_the_last,
        ), (CONTRASTIVE, RANDOM)),
        # Told: at sizes other than the post's the contrastive arm's learning rate and queue are
        # ours, and so is the order then.
        Rule("told", "A contrastive loss is below BYOL with BN in both MLPs.", Condition(
            BEYOND_SAMPLING, ask.beat_the_last,
        ), (FULL, CONTRASTIVE)),
    ),
}  # fmt: skip


def in_words(claim: str) -> str:
    """Return the rules of a claim as lines of text, one for each statement."""
    check_choice("claim", claim, RULES)
    marks = {"main": "", "other": " (refines)", "told": " (told, does not count)"}
    rules = sorted(RULES[claim], key=lambda rule: list(marks).index(rule.role))
    return "\n".join(f"{rule.text[:-1]}{marks[rule.role]}: {rule.test.words}." for rule in rules)
