"""Logistic regression around a prior mean: the optimum, in both forms, against scikit-learn's."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from sonde.knowledge.label_fit import PENALTIES, cross_entropy, fit_path, logits_of, principal_axes, refit, targets_of


def data(n, d, classes=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g, dtype=torch.float64)
    y = (x @ torch.randn(d, classes, generator=g, dtype=torch.float64)).argmax(1)
    return x, y, torch.nn.functional.one_hot(y, classes).double()


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize(("n", "d"), [(120, 20), (30, 60)], ids=["primal", "dual"])
def test_the_path_is_that_of_scikit_learn(n, d, classes):
    x, hard, y = data(n, d, classes)
    path = fit_path(x, y, prior=torch.zeros(1 if classes == 2 else classes, d), tolerance=1e-13)
    scale = float(x.square().sum() / n)
    for number in (0, 4, 7):
        model = LogisticRegression(C=1 / (PENALTIES[number] * scale), fit_intercept=False, tol=1e-12, max_iter=20000)
        expected = model.fit(x.numpy(), hard.numpy()).coef_
        assert np.abs(path[number].numpy() - expected).max() < 2e-6 * np.abs(expected).max()


@pytest.mark.parametrize(("n", "d"), [(80, 10), (15, 40)], ids=["primal", "dual"])
def test_the_gradient_vanishes_at_the_optimum_for_soft_labels_and_any_prior(n, d):
    x, _, _ = data(n, d)
    p = torch.rand(n, dtype=torch.float64)
    y = torch.stack([1 - p, p], 1)
    prior = torch.randn(1, d, dtype=torch.float64)
    path = fit_path(x, y, prior=prior, tolerance=1e-14)
    scale = float(x.square().sum() / n)
    for weights, penalty in zip(path, PENALTIES, strict=True):
        gradient = ((weights @ x.T).sigmoid() - p) @ x + penalty * scale * (weights - prior)
        assert gradient.abs().max() < 1e-5


def test_a_strong_penalty_leaves_the_prior_and_rows_it_explains_do_too():
    x, _, _ = data(50, 8)
    prior = torch.randn(1, 8, dtype=torch.float64)
    p = (prior @ x.T).sigmoid()[0]
    same = fit_path(x, torch.stack([1 - p, p], 1), prior=prior)
    assert torch.allclose(same, prior.expand_as(same), atol=1e-6)
    _, _, y = data(50, 8, seed=3)
    assert (fit_path(x, y, prior=prior, penalties=[1e9])[0] - prior).abs().max() < 1e-6


def test_a_refit_of_more_rows_is_the_same_as_a_fit_of_them():
    x, _, y = data(150, 12)
    axes = principal_axes(x[:120])
    start = fit_path(x[:120], y[:120], prior=torch.zeros(1, 12), penalties=[0.1], axes=axes)[0]
    again = refit(
        x, y, prior=torch.zeros(1, 12, dtype=torch.float64), penalty=0.1, start=start, axes=axes, tolerance=1e-14
    )
    assert torch.allclose(
        again, fit_path(x, y, prior=torch.zeros(1, 12), penalties=[0.1], tolerance=1e-14)[0], atol=1e-6
    )


def test_cross_entropy_is_that_of_torch():
    logits = torch.randn(3, 20)
    y = torch.softmax(torch.randn(20, 3), 1)
    expected = torch.nn.functional.cross_entropy(logits.T, y)
    assert torch.allclose(cross_entropy(logits, targets_of(y)).float(), expected, atol=1e-6)
    two = torch.softmax(torch.randn(20, 2), 1)
    odds = torch.randn(1, 20)
    both = torch.cat([torch.zeros(1, 20), odds])
    assert torch.allclose(cross_entropy(odds, targets_of(two)), cross_entropy(both, two.T), atol=1e-6)
    assert logits_of(torch.ones(2, 1, 4), torch.ones(5, 4)).shape == (2, 1, 5)


def test_shapes_and_penalties_are_checked():
    x, _, y = data(10, 3)
    with pytest.raises(ValueError, match="expected"):
        fit_path(x, y[:9], prior=torch.zeros(1, 3))
    with pytest.raises(ValueError, match="numbers above 0"):
        fit_path(x, y, prior=torch.zeros(1, 3), penalties=[0.0])
