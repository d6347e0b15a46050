"""Detectors: planted outliers, closed forms, chance for what is normal, and what cannot be detected is refused."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sonde.errors import SondeError
from sonde.lens.anomaly import KINDS, SRM, Detector, bootstrap_auroc, detection, features, srm_layer
from sonde.lens.choices import ChoiceScores
from sonde.stats.ranks import auroc


def normal_rows(n: int, d: int = 4, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d)) @ np.diag(np.arange(1, d + 1))


def scores(log_probs: torch.Tensor, counts: list[int] | None = None) -> ChoiceScores:
    _, n, k = log_probs.shape
    sites = tuple(f"resid_pre.{layer}" for layer in range(len(log_probs) - 1))
    return ChoiceScores(sites, log_probs, torch.tensor(counts or [k] * n), torch.zeros(n, dtype=torch.long))


def test_features_are_flattened_and_of_two_choices_only_the_difference():
    three = torch.randn(5, 7, 3)
    assert features(scores(three)).shape == (7, 15)
    assert features(scores(three))[2].tolist() == pytest.approx(three[:, 2].flatten().tolist())
    two = torch.randn(5, 7, 2)
    np.testing.assert_allclose(features(scores(two)), (two[..., 1] - two[..., 0]).double().T, atol=1e-6)


def test_questions_of_unequal_numbers_of_choices_make_no_matrix():
    with pytest.raises(SondeError, match="the questions have 2 to 3 choices"):
        features(scores(torch.randn(2, 2, 3), [2, 3]))


@pytest.mark.parametrize("kind", KINDS)
def test_every_detector_finds_planted_outliers_and_no_difference_between_normal_rows(kind):
    found = detection(
        lambda seed: Detector(kind, seed=seed), normal_rows(240), normal_rows(60, seed=1) + 25, seeds=4, draws=200
    )
    assert found.auroc.low >= 0.9
    assert found.control.contains(0.5) and abs(found.control.estimate - 0.5) <= 0.1


def test_rows_that_are_normal_are_not_told_from_normal_ones():
    found = detection(lambda seed: Detector("lof", seed=seed), normal_rows(400), normal_rows(200, seed=1))
    assert abs(found.auroc.estimate - 0.5) <= 0.1 and found.auroc.contains(0.5)


def test_the_same_seed_gives_the_same_interval():
    rows = normal_rows(80), normal_rows(30, seed=1)
    first, second, other = (
        detection(lambda _: Detector("one-class-svm"), *rows, seeds=2, draws=50, seed=seed) for seed in (0, 0, 1)
    )
    assert first == second != other


@settings(max_examples=40, deadline=None)
@given(
    normal=st.lists(st.integers(-3, 3), min_size=2, max_size=12),
    strange=st.lists(st.integers(-3, 3), min_size=2, max_size=12),
)
def test_bootstraps_by_counts_are_aurocs_of_resampled_scores(normal, strange):
    """With the counts of the same draws, each is the AUROC of the scores repeated that often."""
    usual, odd = np.array(normal, dtype=float), np.array(strange, dtype=float)
    drawn = bootstrap_auroc(usual, odd, draws=5, rng=np.random.default_rng(0))
    rng = np.random.default_rng(0)
    ones = rng.multinomial(len(odd), np.full(len(odd), 1 / len(odd)), size=5)
    zeros = rng.multinomial(len(usual), np.full(len(usual), 1 / len(usual)), size=5)
    for value, one, zero in zip(drawn, ones, zeros, strict=True):
        values = np.concatenate([np.repeat(usual, zero), np.repeat(odd, one)])
        assert value == pytest.approx(float(auroc(values, np.repeat([0, 1], [len(usual), len(odd)]))))


def test_srm_is_the_difference_of_two_distances_with_the_stated_regulariser():
    rows, other = normal_rows(50), normal_rows(9, seed=1)
    rows[:, 1] += rows[:, 0]
    made = SRM().fit(rows)
    covariance = np.cov(rows.T) + 1e-3 * np.eye(4)
    off = other - rows.mean(0)
    full = np.einsum("ni,ij,nj->n", off, np.linalg.inv(covariance), off)
    diagonal = (off**2 / np.diag(covariance)).sum(1)
    np.testing.assert_allclose(made.score(other), full - diagonal, rtol=1e-9)


def test_srm_sees_a_broken_correlation_that_no_dimension_shows():
    rng = np.random.default_rng(0)
    one = rng.normal(size=300)
    rows = np.stack([one, one + 0.1 * rng.normal(size=300)], 1)
    strange = rng.permuted(rows, axis=0)
    found = detection(lambda _: SRM(), rows, strange, seeds=3, draws=200)
    assert found.auroc.low > 0.85


def test_the_layer_for_srm_is_one_with_correlations_and_the_deepest_of_equals():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(200, 6))
    mixed = noise @ rng.normal(size=(6, 6))
    layers = torch.from_numpy(np.stack([noise, mixed, mixed, noise]))
    assert srm_layer(layers, seeds=3) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_detector_scores_the_same_after_a_file(kind, tmp_path):
    made = Detector(kind, neighbors=7, seed=3).fit(normal_rows(40))
    made.save(tmp_path / kind)
    np.testing.assert_array_equal(
        Detector.load(tmp_path / kind).score(normal_rows(9, seed=1)), made.score(normal_rows(9, seed=1))
    )


def test_srm_scores_the_same_after_a_file(tmp_path):
    made = SRM().fit(torch.from_numpy(normal_rows(40)))
    made.save(tmp_path / "srm.safetensors")
    other = normal_rows(9, seed=1)
    np.testing.assert_array_equal(SRM.load(tmp_path / "srm.safetensors").score(other), made.score(other))


def test_a_folder_that_is_no_detector_is_refused(tmp_path):
    with pytest.raises(SondeError, match="is not the folder of a detector"):
        Detector.load(tmp_path)


def test_fewer_normal_questions_than_neighbours_are_refused():
    with pytest.raises(SondeError, match="20 normal questions are too few for a local outlier factor of 20 neighbours"):
        Detector("lof").fit(normal_rows(20))
    Detector("lof").fit(normal_rows(21))
    with pytest.raises(SondeError, match="20 normal questions are too few"):
        detection(lambda seed: Detector("lof", seed=seed), normal_rows(40), normal_rows(5))


def test_an_auroc_with_one_class_is_refused():
    for normal, strange in ((normal_rows(40), np.zeros((0, 4))), (np.zeros((0, 4)), normal_rows(5))):
        with pytest.raises(SondeError, match="an AUROC needs both classes: given"):
            detection(lambda seed: Detector("one-class-svm"), normal, strange)
    with pytest.raises(ValueError, match="AUROC needs both classes"):
        bootstrap_auroc(np.zeros(0), np.ones(3), draws=5, rng=np.random.default_rng(0))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda: Detector("oracle"), "detector 'oracle' is unknown: use lof, isolation-forest, one-class-svm"),  # type: ignore[arg-type]
        (lambda: Detector(neighbors=0), "neighbors is 0"),
        (lambda: Detector().score(normal_rows(3)), "call fit first"),
        (lambda: SRM().score(normal_rows(3)), "call fit first"),
        (lambda: Detector().save("nowhere"), "call fit first"),
        (lambda: SRM().save("nowhere"), "call fit first"),
        (lambda: Detector().fit(normal_rows(30)).score(normal_rows(3, 5)), "rows of 5 features .* fitted on 4"),
        (lambda: SRM().fit(normal_rows(30)).score(normal_rows(3, 5)), "states of width 5 for an SRM of width 4"),
        (lambda: SRM().fit(normal_rows(1)), "1 normal question has no covariance"),
        (lambda: Detector().fit(np.full((30, 2), np.nan)), "60 of 60 features are not finite"),
        (lambda: Detector().fit(np.zeros(30)), r"not of shape \(30,\)"),
    ],
)
def test_what_cannot_be_detected_is_refused(broken, message):
    with pytest.raises(SondeError, match=message):
        broken()
