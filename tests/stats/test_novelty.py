"""Detectors on arrays: closed forms, planted anomalies of known AUROC, scikit-learn's numbers, what is refused."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sonde.errors import SondeError
from sonde.stats.flow import CouplingFlow
from sonde.stats.gaussian_novelty import (
    Gaussian,
    LikelihoodRatio,
    Mahalanobis,
    QuantumEntropy,
    SpectralSignature,
    TwoGaussians,
)
from sonde.stats.layered_rows import Novelty, layered
from sonde.stats.local_outliers import LocalOutlierFactor, Topological, nearest
from sonde.stats.novelty import DETECTORS, IsolationForest, NewlyActive, OneClassSVM, StandardisedSquare
from sonde.stats.ranks import auroc

PLAIN = [name for name in DETECTORS if name != "topological"]


def normal(n: int, d: int = 4, *, seed: int = 0, layers: int | None = None) -> np.ndarray:
    shape = (n, d) if layers is None else (layers, n, d)
    return np.random.default_rng(seed).normal(size=shape) * np.arange(1, d + 1)


def scored(made: Novelty, trusted: np.ndarray, rows: np.ndarray) -> np.ndarray:
    made.fit(trusted)
    return made.score(rows, None if made.untrusted == "no" else rows)


def told(made: Novelty, trusted: np.ndarray, usual: np.ndarray, strange: np.ndarray) -> float:
    labels = np.repeat([0, 1], [len(usual), len(strange)])
    return float(auroc(scored(made, trusted, np.concatenate([usual, strange])), labels))


# relative-mahalanobis sees broken correlations only, l0 codes that were off
@pytest.mark.parametrize("name", [name for name in PLAIN if name not in ("l0", "relative-mahalanobis")])
def test_every_detector_finds_planted_outliers(name):
    # fewer than the 20 neighbours among which they would be usual
    strange = normal(16, seed=2) + np.array([0, 0, 0, 60.0])
    assert told(DETECTORS[name](), normal(300), normal(160, seed=1), strange) > 0.95


@pytest.mark.parametrize("name", [name for name in PLAIN if name != "l0"])
def test_every_detector_is_at_chance_on_rows_that_are_normal(name):
    # the standard error of an AUROC of 400 against 400 is 0.02
    assert told(DETECTORS[name](), normal(600), normal(400, seed=1), normal(400, seed=2)) == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("name", [name for name in PLAIN if name != "abstraction"])  # which links the layers
def test_layers_are_scored_as_each_alone(name):
    trusted, rows = normal(80, layers=3), normal(30, seed=1, layers=3)
    if name == "two-gaussians":
        # a row is on one side in all layers
        trusted, rows = np.repeat(trusted[:1], 3, 0), np.repeat(rows[:1], 3, 0)
    if name == "flow":
        # one draw of first weights for all layers
        trusted, rows = trusted[:1], rows[:1]
    together = scored(DETECTORS[name](), trusted, rows)
    assert together.shape == rows.shape[:2] and together.dtype == np.float64
    for layer in range(len(rows)):
        np.testing.assert_allclose(
            together[layer], scored(DETECTORS[name](), trusted[layer], rows[layer]), rtol=1e-6, atol=1e-9
        )


def test_shifted_gaussians_have_the_aurocs_that_theory_gives():
    """A shift by s along one direction: AUROC of the log-likelihood ratio is Phi(s / sqrt 2)."""
    rng = np.random.default_rng(0)
    trusted, usual, strange = (rng.normal(size=(n, 1)) for n in (20000, 4000, 4000))
    shift = 1.0
    truth = 0.5 * (1 + math.erf(shift / 2))
    both = np.concatenate([usual, strange + shift])
    labels = np.repeat([0, 1], 4000)
    # untrusted rows of the shifted Gaussian alone make the likelihood ratio a linear function of x
    ratio = LikelihoodRatio().fit(trusted).score(both, rng.normal(size=(20000, 1)) + shift)
    assert float(auroc(ratio, labels)) == pytest.approx(truth, abs=0.015)
    # |x|² of N(s, 1) against N(0, 1) is a noncentral chi-squared against a central one
    from scipy.stats import chi2, ncx2

    grid = np.linspace(1e-6, 60, 400_001)
    area = float(np.trapezoid(ncx2.sf(grid, 1, shift**2) * chi2.pdf(grid, 1), grid))
    assert float(auroc(Mahalanobis().fit(trusted).score(both), labels)) == pytest.approx(area, abs=0.02)


def test_mahalanobis_is_the_closed_form():
    rows, other = normal(60), normal(9, seed=1)
    rows[:, 1] += 2 * rows[:, 0]
    covariance, off = np.cov(rows.T), other - rows.mean(0)
    full = np.einsum("ni,ij,nj->n", off, np.linalg.inv(covariance), off)
    np.testing.assert_allclose(Mahalanobis(rcond=0).fit(rows).score(other), full, rtol=1e-9)
    diagonal = (off**2 / np.diag(covariance)).sum(1)
    np.testing.assert_allclose(Mahalanobis(relative=True, rcond=0).fit(rows).score(other), full - diagonal, rtol=1e-9)


def test_small_eigenvalues_are_dropped_as_pinv_drops_them():
    rows = normal(200, 3)
    rows[:, 2] = 1e-3 * rows[:, 2]
    other = normal(20, 3, seed=1)
    inverse = np.linalg.pinv(np.cov(rows.T), rcond=1e-3, hermitian=True)
    assert np.linalg.matrix_rank(inverse) == 2
    off = other - rows.mean(0)
    np.testing.assert_allclose(
        Mahalanobis().fit(rows).score(other), np.einsum("ni,ij,nj->n", off, inverse, off), rtol=1e-8
    )


def test_the_relative_distance_sees_broken_correlations_only():
    rng = np.random.default_rng(0)
    one = rng.normal(size=600)
    rows = np.stack([one, one + 0.1 * rng.normal(size=600)], 1)
    broken = rng.permuted(rows[:200], axis=0)
    assert told(Mahalanobis(relative=True), rows[400:], rows[200:400], broken) > 0.9


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_mahalanobis_does_not_depend_on_units_and_rotation(seed):
    rng = np.random.default_rng(seed)
    rows, other, turn = rng.normal(size=(40, 3)), rng.normal(size=(5, 3)), rng.normal(size=(3, 3)) + 3 * np.eye(3)
    here = Mahalanobis(rcond=0).fit(rows).score(other)
    there = Mahalanobis(rcond=0).fit(rows @ turn + 7).score(other @ turn + 7)
    np.testing.assert_allclose(here, there, rtol=1e-6)


def test_fewer_rows_than_features_are_shrunk_and_said():
    with pytest.warns(UserWarning, match="5 rows for a covariance of 8 features: it is shrunk"):
        made = Mahalanobis().fit(normal(5, 8))
    assert bool(made.gaussian_.kept.all()) and np.isfinite(made.score(normal(3, 8, seed=1))).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Mahalanobis().fit(normal(9, 8))


def test_a_layer_without_spread_says_nothing():
    rows, other = normal(40, layers=2), normal(9, seed=1, layers=2)
    rows[1], other[1] = 3 + 1e-8 * rows[1], 3 + 1e-8 * other[1]
    found = Mahalanobis().fit(rows).score(other)
    assert (found[1] == 0).all() and (found[0] > 0).all()


def test_quantum_entropy_is_mahalanobis_at_both_limits():
    trusted, rows = normal(300), normal(50, seed=1)
    distance = Mahalanobis().fit(trusted).score(rows)
    np.testing.assert_allclose(QuantumEntropy(alpha=0).fit(trusted).score(rows, rows), distance, rtol=1e-9)
    # untrusted rows that spread exactly as the trusted ones: S = 1
    np.testing.assert_allclose(QuantumEntropy().fit(trusted).score(rows, trusted), math.e**4 * distance, rtol=1e-9)


def test_quantum_entropy_is_the_published_formula():
    trusted, rows = normal(100), normal(40, seed=1) + np.array([3.0, 0, 0, 0])
    values, vectors = np.linalg.eigh(np.cov(trusted.T))
    whitening = vectors / np.sqrt(values)
    spread = whitening.T @ np.cov(rows.T) @ whitening
    power = np.linalg.eigh(4 * spread / np.linalg.norm(spread, 2))
    weights = power.eigenvectors * np.exp(power.eigenvalues) @ power.eigenvectors.T
    z = (rows - trusted.mean(0)) @ whitening
    np.testing.assert_allclose(
        QuantumEntropy().fit(trusted).score(rows, rows), np.einsum("ni,ij,nj->n", z, weights, z), rtol=1e-8
    )


def test_the_spectral_signature_is_the_top_singular_direction_of_the_batch():
    rows = normal(50, seed=1)
    off = rows - rows.mean(0)
    top = np.linalg.svd(off, full_matrices=False)[2][0]
    np.testing.assert_allclose(SpectralSignature().fit(normal(5)).score(rows, rows), (off @ top) ** 2, rtol=1e-8)


def test_the_likelihood_ratio_is_that_of_two_gaussians():
    trusted, untrusted = normal(40_000), normal(40_000, seed=1) * [2, 0.5, 3, 1] + 1
    rows = normal(30, seed=2)
    from scipy.stats import multivariate_normal

    truth = multivariate_normal(untrusted.mean(0), np.cov(untrusted.T)).logpdf(rows) - multivariate_normal(
        trusted.mean(0), np.cov(trusted.T)
    ).logpdf(rows)
    # the untrusted covariance is shrunk a little, with 40,000 rows hardly
    np.testing.assert_allclose(LikelihoodRatio().fit(trusted).score(rows, untrusted), truth, atol=0.02)


def test_expectation_maximisation_recovers_a_planted_mixture():
    rng = np.random.default_rng(0)
    trusted = rng.normal(size=(2, 3000, 2))
    usual, strange = rng.normal(size=(2, 1400, 2)), 0.5 * rng.normal(size=(2, 600, 2)) + [4.0, -2.0]
    untrusted = np.concatenate([usual, strange], 1)
    made = TwoGaussians().fit(trusted)
    scores = made.score(untrusted, untrusted)
    assert made.share_ == pytest.approx(0.3, abs=0.01)
    planted = made.gaussian_.whitened(torch.tensor([[[4.0, -2.0]]] * 2, dtype=torch.float64))
    np.testing.assert_allclose(made.mean_, planted[:, 0], atol=0.1)
    np.testing.assert_allclose(made.covariance_, np.stack([0.25 * np.eye(2)] * 2), atol=0.06)
    assert (auroc(scores, np.tile(np.repeat([0, 1], [1400, 600]), (2, 1))) > 0.99).all()


def test_offline_outlier_factors_are_those_of_scikit_learn():
    from sklearn.neighbors import LocalOutlierFactor as Peer

    for d, shift in ((3, 0.0), (40, 1e4)):
        trusted, rows = normal(200, d) + shift, normal(50, d, seed=1) + shift
        peer = Peer(n_neighbors=20, novelty=True).fit(trusted)
        np.testing.assert_allclose(LocalOutlierFactor().fit(trusted).score(rows), -peer.score_samples(rows), rtol=1e-7)


def test_online_outlier_factors_are_those_of_scikit_learn_within_batch_and_trusted_rows():
    from sklearn.neighbors import LocalOutlierFactor as Peer

    trusted, rows = normal(200), normal(50, seed=1)
    peer = Peer(n_neighbors=20).fit(np.concatenate([rows, trusted])).negative_outlier_factor_[:50]
    made = LocalOutlierFactor().fit(trusted)
    np.testing.assert_allclose(made.score(rows, untrusted=rows), -peer, rtol=1e-7)
    np.testing.assert_allclose(made.score(rows, untrusted=rows.copy()), -peer, rtol=1e-7)
    other = Peer(n_neighbors=20, novelty=True).fit(np.concatenate([normal(30, seed=2), trusted]))
    np.testing.assert_allclose(made.score(rows, normal(30, seed=2)), -other.score_samples(rows), rtol=1e-7)


def test_forests_and_support_vectors_are_those_of_scikit_learn():
    from sklearn.ensemble import IsolationForest as Forest
    from sklearn.svm import OneClassSVM as Machine

    trusted, rows = normal(200), normal(50, seed=1)
    forest = Forest(random_state=3).fit(trusted)
    np.testing.assert_array_equal(IsolationForest(seed=3).fit(trusted).score(rows), -forest.score_samples(rows))
    machine = Machine(gamma="scale").fit(trusted)
    np.testing.assert_array_equal(OneClassSVM().fit(trusted).score(rows), -machine.score_samples(rows))


def test_nearest_rows_are_found_in_chunks(monkeypatch):
    from sonde.stats import local_outliers

    rows, among = (torch.from_numpy(normal(n, seed=n, layers=2)) for n in (31, 50))
    truth = torch.cdist(rows, among, compute_mode="donot_use_mm_for_euclid_dist").topk(5, largest=False)
    monkeypatch.setattr(local_outliers, "_ELEMENTS", 700)
    distance, index = nearest(rows, among, 5)
    torch.testing.assert_close(distance, truth.values)
    assert torch.equal(index, truth.indices)


def test_codes_that_were_never_on_are_counted_and_others_standardised():
    codes = np.zeros((4, 3))
    codes[:, 0] = [1, 2, 3, 4]
    rows = np.array([[1.0, 0, 0], [0, 5, 0], [2, 5, 1]])
    assert NewlyActive().fit(codes).score(rows).tolist() == [0, 1, 2]
    deviation = codes[:, 0].std(ddof=1)
    assert StandardisedSquare().fit(codes).score(rows)[0] == pytest.approx(((1 - 2.5) / deviation) ** 2 / 3)


def test_a_flow_is_the_gaussian_on_gaussian_rows_and_better_on_bent_ones():
    rng = np.random.default_rng(0)
    trusted, rows = rng.normal(size=(400, 4)), rng.normal(size=(100, 4))
    straight = CouplingFlow().fit(trusted)
    assert straight.gained_[0] < 0.05
    ranks = np.argsort(np.argsort(straight.score(rows))), np.argsort(np.argsort(Mahalanobis().fit(trusted).score(rows)))
    assert np.corrcoef(*ranks)[0, 1] > 0.95

    def bent(n: int) -> np.ndarray:
        one = rng.normal(size=(n, 1))
        return np.concatenate([one, one**2 + 0.3 * rng.normal(size=(n, 1))], 1)

    flow = CouplingFlow().fit(bent(800))
    assert flow.gained_[0] > 0.3
    # off the bend, and near the middle of the Gaussian
    strange = np.stack([rng.uniform(-0.3, 0.3, 200), rng.uniform(1.5, 2.5, 200)], 1)
    assert told(CouplingFlow(), bent(800), bent(200), strange) > 0.95
    assert told(Mahalanobis(), bent(800), bent(200), strange) < 0.8


def test_a_flow_has_the_density_of_a_bijection():
    """The log-determinant is that of the Jacobian: exp(-score) integrates to the Gaussian's constant."""
    rng = np.random.default_rng(0)
    one = rng.normal(size=(500, 1))
    rows = np.concatenate([one, np.abs(one) + 0.3 * rng.normal(size=(500, 1))], 1)
    flow = CouplingFlow().fit(rows)
    axis = torch.linspace(-9, 9, 601, dtype=torch.float64)
    z = torch.cartesian_prod(axis, axis)[None]
    with torch.no_grad():
        total = (-flow._surprise(z, flow._weights)).exp().sum() * (axis[1] - axis[0]) ** 2
    assert float(total) == pytest.approx(2 * math.pi, rel=1e-3)


def test_topology_sees_answers_that_are_reached_another_way():
    """Trusted rows gather by their answer from the first layer on; strange ones stay with the other until the last."""
    rng = np.random.default_rng(0)

    def rows(n: int, *, strange: bool = False) -> tuple[np.ndarray, np.ndarray]:
        answers = rng.integers(0, 2, n)
        sides = np.stack([(2 * answers - 1) * size * (-1 if strange and layer < 2 else 1)
                          for layer, size in enumerate((2.0, 3.0, 3.0))])  # fmt: skip
        return sides[..., None] + rng.normal(size=(3, n, 2)), answers

    trusted, answers = rows(200)
    made = Topological().fit(trusted, answers)
    (usual, usual_answers), (strange, strange_answers) = rows(100), rows(100, strange=True)
    scores = made.score(usual, answers=usual_answers), made.score(strange, answers=strange_answers)
    assert float(auroc(np.concatenate(scores), np.repeat([0, 1], 100))) > 0.95
    with pytest.raises(SondeError, match="answer 2 is not among those of the trusted rows"):
        made.score(usual, answers=usual_answers + 2)
    with pytest.raises(SondeError, match="give answers="):
        made.score(usual)
    with pytest.raises(SondeError, match="answer 0 has only 1 trusted row"):
        Topological().fit(trusted, np.arange(200) > 0)


def test_rows_that_are_not_finite_are_named_with_their_layer():
    rows = normal(30, layers=3)
    rows[2, 7, 1] = np.nan
    rows[2, 9, 0] = np.inf
    with pytest.raises(SondeError, match="2 of 360 features are not finite: the first is in row 7 of layer 2"):
        Mahalanobis().fit(rows)


@pytest.mark.parametrize("name", PLAIN)
def test_what_no_detector_can_score_is_refused(name):
    with pytest.raises(SondeError, match="has seen no trusted rows: call fit first"):
        DETECTORS[name]().score(normal(3))
    made = DETECTORS[name]().fit(normal(40, layers=2))
    batch = None if made.untrusted == "no" else normal(3, layers=2)
    with pytest.raises(SondeError, match=r"rows of 5 features for a .* fitted on 4"):
        made.score(normal(3, 5, layers=2), batch)
    if batch is not None:
        with pytest.raises(SondeError, match=r"rows of 1 layers for a .* fitted on 2"):
            made.score(normal(3), normal(3))
    if made.untrusted == "must":
        with pytest.raises(SondeError, match=r"compares with untrusted rows: score\(batch, untrusted=batch\)"):
            made.score(normal(3, layers=2))
    if made.untrusted == "no":
        with pytest.raises(SondeError, match="does not look at untrusted rows"):
            made.score(normal(3, layers=2), normal(3, layers=2))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda: layered(np.zeros(3)), r"not of shape \(3,\)"),
        (lambda: layered(np.zeros((2, 0))), r"not of shape \(2, 0\)"),
        (lambda: LocalOutlierFactor(0), "neighbors is 0"),
        (lambda: LocalOutlierFactor().fit(normal(20)), "20 trusted rows are too few for a local outlier factor of 20"),
        (lambda: Mahalanobis().fit(normal(1)), "1 trusted rows are too few for Mahalanobis: give at least 2"),
        (lambda: Mahalanobis().fit(np.ones((30, 2))), "all rows are equal"),
        (lambda: CouplingFlow().fit(normal(9)), "9 trusted rows are too few for CouplingFlow"),
        (lambda: QuantumEntropy().fit(normal(9)).score(normal(1), normal(1)), "1 untrusted row says nothing"),
    ],
)
def test_rows_that_cannot_be_learned_from_are_refused(broken, message):
    with pytest.raises(SondeError, match=message):
        broken()


def test_a_gaussian_keeps_its_moments():
    rows = torch.from_numpy(normal(50, layers=2))
    made = Gaussian.of(rows)
    again = Gaussian.with_moments(made.mean, made.covariance)
    torch.testing.assert_close(made.whitened(rows), again.whitened(rows))
    white = made.whitened(rows)
    torch.testing.assert_close(white.mT @ white / 49, torch.eye(4, dtype=torch.float64).expand(2, 4, 4))
