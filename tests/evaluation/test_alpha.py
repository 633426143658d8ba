"""Alpha-ReQ against numpy's fit of a polynomial to numpy's spectrum, and where theory has it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastbyol.evaluation.alpha import FEWEST, FIRST, LAST, alpha_req, eigenspectrum, power_law


def by_formula(x: np.ndarray) -> tuple[float, float]:
    """Fit the log of PCA's variances by ``polyfit``, whose weights are of deviations."""
    variances = np.linalg.svd(x - x.mean(0), compute_uv=False) ** 2 / len(x)
    ranks = np.arange(1, len(variances) + 1)[FIRST - 1 : LAST]
    logs, weights = np.log(variances[FIRST - 1 : LAST]), 1 / ranks
    fit = np.polyfit(np.log(ranks), logs, 1, w=np.sqrt(weights))
    rest = logs - np.polyval(fit, np.log(ranks))
    total = logs - np.average(logs, weights=weights)
    return -fit[0], 1 - (weights * rest**2).sum() / (weights * total**2).sum()


def with_spectrum(eigenvalues: np.ndarray, samples: int, seed: int = 0) -> np.ndarray:
    """Return centred rows whose covariance has exactly these eigenvalues, in a random basis."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((samples, len(eigenvalues)))
    directions = np.linalg.qr(noise - noise.mean(0))[0]
    basis = np.linalg.qr(rng.standard_normal((len(eigenvalues),) * 2))[0]
    return directions * np.sqrt(samples * eigenvalues) @ basis


@given(st.integers(12, 60), st.integers(8, 150), st.integers(0, 99), st.floats(-3, 3))
def test_is_a_weighted_line_through_the_logs_of_numpys_spectrum(
    samples: int, features: int, seed: int, mean: float
) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((samples, features)) * rng.uniform(0.5, 2, features) + mean
    # Centring takes a direction of as many as there are rows.
    kept = min(samples - 1, features)
    fit = alpha_req(torch.from_numpy(x))
    assert (fit.first, fit.last) == (FIRST, min(LAST, kept))
    variances = np.sort(np.linalg.svd(x - x.mean(0), compute_uv=False) ** 2)[::-1][:kept]
    ours = eigenspectrum(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(ours, variances / samples, rtol=1e-8)
    if samples > features:  # polyfit would see the direction that is rounding
        alpha, r2 = by_formula(x)
        assert fit.alpha == pytest.approx(alpha, rel=1e-8, abs=1e-10)
        assert fit.r2 == pytest.approx(r2, rel=1e-8, abs=1e-10)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.5])
@pytest.mark.parametrize("features", [6, 40, 128])
def test_a_power_law_has_its_exponent(alpha: float, features: int) -> None:
    x = with_spectrum(np.arange(1, features + 1.0) ** -alpha, 200)
    fit = alpha_req(torch.from_numpy(x))
    assert fit.alpha == pytest.approx(alpha, abs=1e-9)
    assert fit.r2 == pytest.approx(1.0)
    assert fit.last == min(features, LAST)


def test_what_is_before_and_behind_the_range_does_not_matter() -> None:
    spectrum = torch.arange(1, 201, dtype=torch.float64) ** -1.5
    other = spectrum.clone()
    other[: FIRST - 1] *= 100
    other[LAST:] /= 100
    assert power_law(other) == power_law(spectrum)
    assert power_law(other, last=150) != power_law(spectrum, last=150)


def test_isotropic_noise_decays_hardly_at_all() -> None:
    x = torch.randn(20000, 32, generator=torch.Generator().manual_seed(0))
    fit = alpha_req(x)
    assert fit.alpha is not None
    assert 0 < fit.alpha < 0.1


@given(st.integers(0, 99), st.floats(1e-6, 1e6), st.floats(-100, 100))
def test_basis_length_and_mean_do_not_matter(seed: int, factor: float, shift: float) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((60, 20)) * np.arange(1, 21.0) ** -1
    basis = np.linalg.qr(rng.standard_normal((20, 20)))[0]
    one, other = (alpha_req(torch.from_numpy(each)) for each in (x, factor * (x @ basis + shift)))
    assert other.alpha == pytest.approx(one.alpha, rel=1e-6)
    assert other.r2 == pytest.approx(one.r2, rel=1e-6)


@pytest.mark.parametrize("rank", [0, 1, FIRST + FEWEST - 2])
def test_too_few_directions_are_no_spectrum(rank: int) -> None:
    """As after a collapse: rounding would be taken for a law."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(50, rank, generator=g) @ torch.randn(rank, 30, generator=g)
    fit = alpha_req(x + torch.rand(30, generator=g))
    assert (fit.alpha, fit.r2) == (None, None)
    assert fit.last == rank
    assert fit.as_json() == {"alpha": None, "alpha_r2": None, "alpha_range": [FIRST, rank]}


def test_one_direction_more_is_one() -> None:
    g = torch.Generator().manual_seed(0)
    rank = FIRST + FEWEST - 1
    x = torch.randn(50, rank, generator=g, dtype=torch.float64) @ torch.randn(
        rank, 30, generator=g, dtype=torch.float64
    )
    assert alpha_req(x).alpha is not None


def test_float32s_rounding_of_a_point_is_left_out() -> None:
    g = torch.Generator().manual_seed(0)
    point = torch.rand(1, 64, generator=g)
    assert len(eigenspectrum(point.expand(300, 64))) == 0
    assert len(eigenspectrum(point * (1 + 6e-8 * torch.randn(300, 64, generator=g)))) == 0
    # A feature that is constant, and one of a unit that is dead.
    x = torch.randn(300, 8, generator=g)
    x[:, 0], x[:, 1] = 5.0, 0.0
    assert len(eigenspectrum(x)) == 6
