"""Epoch orders: permutations by an independent Philox, uniform and independent."""

from __future__ import annotations

import itertools
import os
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fastbyol.data import order

SEEDS = st.integers(0, 2**63 - 1)
EPOCHS = st.integers(0, 2**31)
# The draws are fixed, so a test of a good generator fails never or always; 1e-3 leaves one in a
# thousand seeds to avoid.
LEAST_P = 1e-3


def philox_key(sample: int, seed: int, epoch: int) -> int:
    """Return the first two Philox 4x32-10 words as a signed number, by the paper's formulas."""
    word = 2**32 - 1
    x = [sample & word, epoch & word, 0, (sample >> 32) << 8 & word | 2]
    k = [seed & word, seed >> 32]
    for _ in range(10):
        a, b = x[0] * 0xD2511F53, x[2] * 0xCD9E8D57
        x = [(b >> 32) ^ x[1] ^ k[0], b & word, (a >> 32) ^ x[3] ^ k[1], a & word]
        k = [(k[0] + 0x9E3779B9) & word, (k[1] + 0xBB67AE85) & word]
    return (x[0] << 32 | x[1]) - 2**63


@given(st.lists(st.integers(0, 2**56 - 1), min_size=1, max_size=20), SEEDS, EPOCHS)
def test_keys_are_philox_of_sample_and_epoch(ids: list[int], seed: int, epoch: int) -> None:
    keys = order.sort_keys(torch.tensor(ids), seed=seed, epoch=epoch)
    assert keys.tolist() == [philox_key(i, seed, epoch) for i in ids]


@given(st.integers(1, 3000), SEEDS, EPOCHS)
def test_is_the_permutation_that_sorts_the_keys(count: int, seed: int, epoch: int) -> None:
    actual = order.permutation(count, seed=seed, epoch=epoch)
    keys = order.sort_keys(torch.arange(count), seed=seed, epoch=epoch).numpy()
    assert actual.dtype == torch.int64
    assert actual.tolist() == sorted(range(count), key=keys.__getitem__)


def test_every_size_up_to_a_thousand_is_a_permutation() -> None:
    for count in range(1, 1001):
        actual = order.permutation(count, seed=count, epoch=count % 7)
        assert torch.equal(actual.sort().values, torch.arange(count)), count


@settings(max_examples=10)
@given(st.integers(1, 40), SEEDS, st.integers(1, 7))
def test_does_not_depend_on_the_chunk(count: int, seed: int, chunk: int) -> None:
    whole = order.permutation(count, seed=seed, epoch=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order, "CHUNK", chunk)
        assert torch.equal(order.permutation(count, seed=seed, epoch=3), whole)


@pytest.mark.parametrize(
    "count", [order.CHUNK - 1, order.CHUNK, order.CHUNK + 1, 105_000, 1_300_000]
)
def test_large_sets_hold_every_sample_once(count: int) -> None:
    actual = order.permutation(count, seed=2**63 - 1, epoch=1)
    assert torch.equal(actual.sort().values, torch.arange(count))


def orders_of_four(seed: int, num_epochs: int) -> np.ndarray:
    """Return which of the 24 orders of four samples each epoch has."""
    keys = order.sort_keys(
        torch.arange(4), seed=seed, epoch=torch.arange(num_epochs)[:, None]
    ).numpy()
    index = {p: k for k, p in enumerate(itertools.permutations(range(4)))}
    return np.array([index[tuple(row)] for row in np.argsort(keys, axis=1, kind="stable").tolist()])


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_all_orders_are_equally_likely(seed: int) -> None:
    assert stats.chisquare(np.bincount(orders_of_four(seed, 24_000), minlength=24)).pvalue > LEAST_P


def test_every_sample_is_equally_likely_at_every_place() -> None:
    table = np.zeros((40, 40))
    for epoch in range(4000):
        table[np.arange(40), order.permutation(40, seed=7, epoch=epoch).numpy()] += 1
    # Rows and columns are full, which leaves 39 * 39 degrees of freedom; the scale makes up for the
    # dependence.
    statistic = ((table - 100.0) ** 2 / 100.0).sum() * 39 / 40
    assert LEAST_P < stats.chi2.sf(statistic, 39 * 39) < 1 - LEAST_P


@pytest.mark.parametrize(
    ("seeds", "lag"), [((5, 5), 1), ((5, 6), 0), ((5, 6), 1), ((5, 5 + 2**32), 0)]
)
def test_epochs_and_seeds_are_independent(seeds: tuple[int, int], lag: int) -> None:
    """Compare seed s, epoch e + 1 with seed s + 1, epoch e, too: their sums are equal."""
    first, second = orders_of_four(seeds[0], 30_001), orders_of_four(seeds[1], 30_001)
    first, second = (first[lag:], second[:-lag]) if lag else (first, second)
    table = np.histogram2d(first, second, bins=24)[0]
    assert stats.chi2_contingency(table).pvalue > LEAST_P


@pytest.mark.parametrize(("count", "epoch"), [(0, 0), (-1, 0), (3, -1)])
def test_refuses_what_has_no_order(count: int, epoch: int) -> None:
    with pytest.raises(ValueError, match="no permutation"):
        order.permutation(count, seed=0, epoch=epoch)


@given(st.integers(1, 3000), st.integers(0, 4000))
def test_a_subset_is_the_same_few_samples_in_order(num_samples: int, limit: int) -> None:
    chosen = order.subset(num_samples, limit)
    if limit in (0, num_samples) or limit > num_samples:
        assert chosen is None
    else:
        assert chosen.tolist() == sorted(set(chosen.tolist()))
        assert len(chosen) == limit
        assert chosen[0] >= 0
        assert chosen[-1] < num_samples
        assert set(chosen.tolist()) <= set(
            order.permutation(num_samples, seed=0, epoch=0).tolist()[: limit + 1]
        )


def test_a_subset_of_a_sorted_file_has_all_its_classes() -> None:
    """Sort by class, as files often are: the first samples would have one class."""
    classes = torch.arange(60_000) // 6000
    counts = torch.bincount(classes[order.subset(60_000, 4096)], minlength=10)
    assert stats.chisquare(counts.numpy()).pvalue > LEAST_P


@pytest.mark.parametrize("num_samples", [100, order.CHUNK + 100])
def test_orders_made_ahead_are_the_permutations(
    num_samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In sequence, again, and after a leap; of many samples in another thread where they can be."""
    makers, make = dict[int, str](), order.permutation

    def noting(num_samples: int, *, seed: int, epoch: int) -> torch.Tensor:
        makers[epoch] = threading.current_thread().name
        return make(num_samples, seed=seed, epoch=epoch)

    monkeypatch.setattr(order, "permutation", noting)
    orders = order.Orders(num_samples, seed=5)
    for epoch in (0, 1, 2, 2, 7, 8):
        assert torch.equal(orders.of(epoch), make(num_samples, seed=5, epoch=epoch))
    orders.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "order"]
    assert (makers[1] == makers[8] == "order") is (num_samples > order.CHUNK)


def test_a_forked_process_makes_its_own_orders(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that was to make it is not there, as it had not ended before the fork."""
    going, make = threading.Event(), order.permutation

    def slow(num_samples: int, *, seed: int, epoch: int) -> torch.Tensor:
        if threading.current_thread().name == "order":
            going.wait(60)
        return make(num_samples, seed=seed, epoch=epoch)

    monkeypatch.setattr(order, "permutation", slow)
    orders = order.Orders(order.CHUNK + 1, seed=1)
    orders.of(0)
    pid = os.fork()
    if pid == 0:
        going.set()
        same = torch.equal(orders.of(1), make(order.CHUNK + 1, seed=1, epoch=1))
        os._exit(0 if same else 1)
    going.set()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    orders.close()
