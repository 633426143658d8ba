"""Philox against Random123's known answers and an implementation in Python integers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbyol_kernels.philox import DOMAIN_ORDER, DOMAIN_VIEWS, philox4x32, split_id, uniform

WORD = st.integers(0, 2**32 - 1)
# Random123, kat_vectors: philox4x32 10 rounds; counter words, key words, result words.
KNOWN_ANSWERS = [
    (
        "00000000 00000000 00000000 00000000",
        "00000000 00000000",
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    ),
    (
        "ffffffff ffffffff ffffffff ffffffff",
        "ffffffff ffffffff",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def philox_in_integers(counter: list[int], key: int) -> list[int]:
    """Apply the paper's round function with Python's unbounded integers."""
    mask = 2**32 - 1
    keys = [key & mask, key >> 32 & mask]
    for _ in range(10):
        first, second = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            (second >> 32) ^ counter[1] ^ keys[0],
            second & mask,
            (first >> 32) ^ counter[3] ^ keys[1],
            first & mask,
        ]
        keys = [(keys[0] + 0x9E3779B9) & mask, (keys[1] + 0xBB67AE85) & mask]
    return counter


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers(counter: str, key: str, answer: str) -> None:
    low, high = words(key)
    result = philox4x32(*(torch.tensor([word]) for word in words(counter)), low | high << 32)
    assert [int(word) for word in result] == words(answer)


@settings(max_examples=50)
@given(st.lists(WORD, min_size=4, max_size=4), st.integers(0, 2**64 - 1))
def test_equals_integer_arithmetic(counter: list[int], key: int) -> None:
    result = philox4x32(*(torch.tensor(word) for word in counter), key)
    assert [int(word) for word in result] == philox_in_integers(counter, key)


def test_the_key_may_be_a_tensor() -> None:
    for key in (5, 2**63 + 7, 2**64 - 1):
        signed = torch.tensor(key - 2**64 if key >= 2**63 else key)
        for ours, theirs in zip(
            philox4x32(torch.arange(9), 1, 2, 3, signed),
            philox4x32(torch.arange(9), 1, 2, 3, key),
            strict=True,
        ):
            assert torch.equal(ours, theirs)


def test_broadcasts_and_depends_on_each_counter_alone() -> None:
    ids, blocks = torch.arange(5)[:, None], torch.arange(3)[None, :]
    table = torch.stack(philox4x32(ids, 7, blocks, 1, 2**63 - 1))
    assert table.shape == (4, 5, 3)
    single = torch.stack(philox4x32(torch.tensor(3), 7, 2, 1, 2**63 - 1))
    assert torch.equal(table[:, 3, 2], single)


def test_counters_count_modulo_two_to_the_32() -> None:
    ids = torch.arange(4)
    assert torch.equal(philox4x32(ids + 2**32, 1, 2, 3, 9)[0], philox4x32(ids, 1, 2, 3, 9)[0])


def test_uniform_is_exact_and_below_one() -> None:
    ends = uniform(torch.tensor([0, 255, 256, 2**31, 2**32 - 1]))
    assert ends.dtype == torch.float32
    assert ends.tolist() == [0.0, 0.0, 2.0**-24, 0.5, 1.0 - 2.0**-24]


def test_uniform_has_the_moments_of_a_uniform_variable() -> None:
    draws = uniform(torch.stack(philox4x32(torch.arange(50_000), 0, 0, 0, 1))).double()
    # 200k draws: the standard errors of mean and variance are 6.5e-4 and 1.7e-4; four of them are
    # allowed.
    assert abs(draws.mean() - 0.5) < 2.6e-3
    assert abs(draws.var() - 1.0 / 12.0) < 6.8e-4
    correlation = torch.corrcoef(draws) - torch.eye(4, dtype=torch.float64)
    assert correlation.abs().max() < 4.0 / 50_000**0.5


def test_split_id_separates_ids_and_domains() -> None:
    ids = torch.tensor([5, 5 + 2**32, 5 + 2**39, 2**40 - 1])
    seen = {
        (int(low), int(high))
        for domain in (DOMAIN_VIEWS, DOMAIN_ORDER)
        for low, high in zip(*split_id(ids, domain), strict=True)
    }
    assert len(seen) == 8
    low, high = split_id(ids, DOMAIN_VIEWS)
    assert torch.equal((high >> 8 << 32) | low, ids)
    assert bool((high & 0xFF == DOMAIN_VIEWS).all())
