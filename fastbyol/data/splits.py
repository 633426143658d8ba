"""The usual spellings of the parts of a data set."""

from __future__ import annotations

import re

WORDS = {
    "train": ("train", "training", "trn"),
    "val": ("val", "valid", "validation", "eval", "evaluation", "dev"),
    "test": ("test", "testing", "tst"),
    "unlabeled": ("unlabeled", "unlabelled"),
}
# The first one that a folder has is its default.
NAMES = ("train", "test", "val", "unlabeled")
_WORDS = "|".join(f"(?P<{name}>{'|'.join(words)})" for name, words in WORDS.items())
# Around the word: words for images, years, numbers, and the A and B of image translation. Before
# it, the set's own name (seg_train, ILSVRC2012_img_val).
_AROUND = r"(?:images?|imgs?|data|set|split|raw|[\W\d_])*"
_SPELLING = re.compile(rf"(?:.*[_. -])?{_AROUND}(?:{_WORDS}){_AROUND}[ab]?", re.IGNORECASE)


def canonical(name: str) -> str | None:
    """Return the split in NAMES that ``name`` means (``val2017``, ``test_images``), or None."""
    spelled = _SPELLING.fullmatch(name)
    return None if spelled is None else spelled.lastgroup
