"""The names that other programs have for an encoder's tensors, mapped to its own.

Nothing here knows a library. Wrappers put prefixes before an encoder's names, which are whatever
stands before most of them. An ``nn.Sequential`` of an encoder's children has numbers in place of
their names, in the order of the children. Where there are several encoders, one is the average of
another: the words of their prefixes say which.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# Words in the names of an average of weights, as in momentum_backbone, encoder_k and
# state_dict_ema; and of the network that is trained, which is only called so beside an average.
_AVERAGED = {"momentum", "teacher", "target", "key", "k", "ema", "averaged", "swa"}
_TRAINED = {"online", "student", "query", "q"}
# What comes after the features in torchvision's, timm's and other libraries' classifiers.
_CLASSIFIERS = {"fc", "classifier", "head", "heads", "head_dist", "linear"}
# Nothing reads it: batch norm's momentum is fixed. Files from before torch 0.4.1 lack it.
COUNTER = "num_batches_tracked"
# The block's second path, as ResNets for CIFAR name it.
_SHORTCUT, _DOWNSAMPLE = ".shortcut.", ".downsample."
_LONGEST_NAME = 1000
# Of the names of a network's own norms, as bn1.
_NORMS, _DIGITS = {"bn", "gn", "ln", "norm"}, "0123456789"


@dataclass(frozen=True)
class Match:
    """The tensors of a file that are an encoder's: ``keys`` maps its names to the file's.

    ``prefix`` stands before them in the file, ``by_position`` tells whether numbers stand for its
    children. ``others`` are the prefixes of other encoders, ``missing`` the encoder's names that
    the file lacks, ``unused`` counts the file's other tensors by group.
    """

    keys: Mapping[str, str]
    prefix: str
    by_position: bool
    others: tuple[str, ...]
    missing: tuple[str, ...]
    unused: Mapping[str, int]

    def in_words(self) -> str:
        """Return how the file names the encoder's tensors."""
        words = "by position in an nn.Sequential" if self.by_position else "by name"
        return f"{words} under {self.prefix.rstrip('.')}" if self.prefix else words


class _Candidate(NamedTuple):
    """A prefix, and how the names behind it are read; ``keys`` as in ``Match``."""

    prefix: str
    by_position: bool
    keys: Mapping[str, str]

    def order(self) -> tuple[int, int]:
        """Return a key that sorts a trained network before its average."""
        words = set(re.split(r"[._]", self.prefix))
        return (1 - bool(words & _TRAINED) + bool(words & _AVERAGED), -len(self.keys))


class MismatchError(Exception):
    """A reason, in words, why a file's encoder is not this one."""


def match(encoder: Mapping[str, Tensor], file: Mapping[str, Tensor]) -> Match:
    """Return which tensors of ``file`` are those of ``encoder``, a state dict.

    Raises MismatchError, naming the first tensor of the encoder that is missing or has another
    shape, or the first one of the file's encoder that this one lacks; and for two encoders of which
    neither is called the other's average.
    """
    own = _without_wrapper(encoder)
    candidates = _candidates(own, file)
    most = max((len(one.keys) for one in candidates), default=0)
    # Of a file with few tensors the first one that it lacks is named.
    if 4 * most < min(len(own), len(file)) or not most:
        first = f", such as {_shown(next(iter(file)))}," if file else ""
        raise MismatchError(
            f"only {most} of its {len(file)} tensors{first} have names like the encoder's, such as "
            f"{next(iter(own))}"
        )
    whole = sorted((one for one in candidates if 2 * len(one.keys) > most), key=_Candidate.order)
    chosen = whole[0]
    # Of a Sequential within the encoder both ways of reading mean the same tensors.
    whole = [chosen, *(one for one in whole[1:] if one.prefix != chosen.prefix)]
    others = tuple(one.prefix for one in whole[1:])
    if others and whole[1].order() == chosen.order() and not _are_equal(chosen, whole[1], file):
        raise MismatchError(
            f"it has two encoders, {_shown(chosen.prefix)} and {_shown(others[0])}: save the one "
            "to start from alone"
        )
    names = {name: f"{chosen.prefix}{name}" for name in own} | dict(chosen.keys)
    for name, key in names.items():
        if name not in chosen.keys and name.endswith(f".{COUNTER}"):
            continue
        theirs = file.get(key)
        if theirs is None or theirs.shape != own[name].shape:
            raise _difference(name, theirs, own[name])
    missing = tuple(name for name in own if name not in chosen.keys)
    used = set(chosen.keys.values())
    rest = [key for key in file if key not in used]
    parts = {
        ".".join(name.split(".")[:cut]) for name in own for cut in range(1, name.count(".") + 1)
    }
    for key, name in _names_behind(chosen, own, rest):
        if _is_of_encoder(name, parts):
            raise _difference(name, file[key], None)
    wrapped = {name: key for (key, name) in zip(encoder, own, strict=True)}
    return Match(
        {wrapped[name]: key for name, key in chosen.keys.items()},
        chosen.prefix,
        chosen.by_position,
        others,
        tuple(wrapped[name] for name in missing),
        dict(Counter(_group(key, chosen.prefix) for key in rest)),
    )


def _without_wrapper(encoder: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return ``encoder`` without the parts of names that stand before all of them."""
    names = list(encoder)
    while len({name.partition(".")[0] for name in names}) == 1 and "." in names[0]:
        names = [name.partition(".")[2] for name in names]
    return dict(zip(names, encoder.values(), strict=True))


def _candidates(own: Mapping[str, Tensor], file: Iterable[str]) -> list[_Candidate]:
    """Return every prefix in ``file`` behind which some of the names of ``own`` stand."""
    by_name: dict[str, dict[str, str]] = {}
    positions: dict[str, dict[int, list[str]]] = {}
    for key in file:
        if len(key) > _LONGEST_NAME:
            continue
        parts = key.split(".")
        for cut in range(len(parts)):
            prefix = "".join(f"{part}." for part in parts[:cut])
            name = _own_spelling(key[len(prefix) :], own)
            if name in own:
                by_name.setdefault(prefix, {})[name] = key
            if parts[cut].isascii() and parts[cut].isdigit() and len(parts[cut]) < 4:
                positions.setdefault(prefix, {}).setdefault(int(parts[cut]), []).append(key)
    tops = tuple(dict.fromkeys(name.partition(".")[0] for name in own))
    by_position = {
        prefix: {
            name: key
            for top, index in zip(tops, sorted(children), strict=False)
            for key in children[index]
            if (name := _own_spelling(top + key[len(f"{prefix}{index}") :], own)) in own
        }
        for prefix, children in positions.items()
    }
    return [
        _Candidate(prefix, is_position, keys)
        for is_position, table in ((False, by_name), (True, by_position))
        for prefix, keys in table.items()
        if keys
    ]


def _own_spelling(name: str, own: Mapping[str, Tensor]) -> str:
    """Return ``name`` with this encoder's word for a block's second path."""
    if _SHORTCUT in name and name not in own:
        return name.replace(_SHORTCUT, _DOWNSAMPLE)
    return name


def _names_behind(
    chosen: _Candidate, own: Mapping[str, Tensor], keys: Iterable[str]
) -> Iterator[tuple[str, str]]:
    """Yield those of ``keys`` that stand behind the prefix, and what this encoder calls them."""
    tops = {key[len(chosen.prefix) :].partition(".")[0]: name for name, key in chosen.keys.items()}
    for key in keys:
        if key.startswith(chosen.prefix):
            top, dot, rest = key[len(chosen.prefix) :].partition(".")
            child = tops[top].partition(".")[0] if top in tops else top
            yield key, _own_spelling(child + dot + rest, own)


def _is_of_encoder(name: str, modules: Container[str]) -> bool:
    """Tell whether a tensor is of one of the encoder's children, and of no classifier in it.

    ``modules`` are the names of those of the encoder's modules that have tensors.
    """
    parts = name.split(".")
    if parts[-1] == COUNTER:
        return False
    if parts[0] not in modules:  # a head, unless it is one more of what there is, or a norm
        stem = parts[0].rstrip(_DIGITS)
        return stem in _NORMS or (stem != parts[0] and f"{stem}1" in modules)
    # A classifier may be a module, or the last ones of several: torchvision's classifier.3.
    return not any(
        _CLASSIFIERS & {part, before if part.isdigit() else ""}
        and ".".join(parts[: index + 1]) not in modules
        for index, (before, part) in enumerate(zip(["", *parts], parts, strict=False))
    )


def _are_equal(a: _Candidate, b: _Candidate, file: Mapping[str, Tensor]) -> bool:
    """Tell whether two names stand for the same weights, as where a module is in two others."""
    return a.keys.keys() == b.keys.keys() and all(
        torch.equal(file[a.keys[name]], file[b.keys[name]]) for name in a.keys
    )


def _difference(name: str, theirs: Tensor | None, ours: Tensor | None) -> MismatchError:
    there, here = ["absent" if t is None else str(tuple(t.shape)) for t in (theirs, ours)]
    return MismatchError(
        f"{_shown(name)} of the encoder is {there} there and {here} in this network"
    )


def _group(key: str, prefix: str) -> str:
    """Return the name under which a tensor that is not used is counted."""
    for parent in (prefix, prefix[:-1].rpartition(".")[0]):
        parent = f"{parent.rstrip('.')}." if parent else ""
        if key.startswith(parent):
            return parent + key[len(parent) :].partition(".")[0]
    return key.partition(".")[0]


def _shown(name: str) -> str:
    return name if name.isidentifier() or re.fullmatch(r"[\w.-]{1,100}", name) else repr(name[:100])
