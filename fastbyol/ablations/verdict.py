"""What a claim's evidence comes to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

Outcome = Literal["reproduced", "partly", "not reproduced", "undetermined"]
Role = Literal["main", "other", "told"]


class Statement(NamedTuple):
    """One sentence of a claim: whether it held (None: not decided) and the measurements that say so.

    A ``main`` statement decides, an ``other`` one refines, and one that is ``told`` counts for nothing: it cannot be asked of
    these runs, or is a control.
    """

    text: str
    held: bool | None
    evidence: str
    role: Role = "main"


@dataclass(frozen=True)
class Verdict:
    """The outcome for one claim and the statements that it was drawn from."""

    claim: str
    outcome: Outcome
    statements: tuple[Statement, ...]


def outcome_of(statements: tuple[Statement, ...]) -> Outcome:
    """The outcome that statements come to.

    Not reproduced where a main statement failed; else undetermined where one is undecided, or there is none; else
    reproduced where all the others held too, and partly where not.
    """
    main = [statement.held for statement in statements if statement.role == "main"]
    if False in main:
        return "not reproduced"
    if None in main or not main:
        return "undetermined"
    return "reproduced" if all(s.held for s in statements if s.role == "other") else "partly"
