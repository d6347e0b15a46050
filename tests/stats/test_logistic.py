import pytest
import torch
from sklearn.linear_model import LogisticRegression

from sonde.stats.logistic import logistic


def rows(layers=3, n=400, d=12, seed=0):
    """Rows of unequal and correlated coordinates with a large mean, and labels that they decide with noise."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(layers, d, d, generator=g) * torch.logspace(0.5, -1.5, d)[:, None]
    x = torch.randn(layers, n, d, generator=g) @ mix + 20
    centred = x - x.mean(1, keepdim=True)
    score = (centred / centred.std(1, keepdim=True)).mean((0, 2))
    return x, (score + 0.5 * torch.randn(n, generator=g) * score.std()) > 0


def newton(x, y, l2, steps=50):
    """The minimum in float64, by the exact Hessian."""
    x = torch.cat([x.double(), torch.ones(len(x), 1, dtype=torch.float64)], 1)
    penalty = torch.full((x.shape[1],), 2 * l2, dtype=torch.float64)
    penalty[-1] = 0
    w = torch.zeros(x.shape[1], dtype=torch.float64)
    for _ in range(steps):
        p = (x @ w).sigmoid()
        gradient = x.T @ (p - y.double()) / len(x) + penalty * w
        hessian = (x.T * (p * (1 - p))) @ x / len(x) + penalty.diag()
        w = w - torch.linalg.solve(hessian, gradient)
    return w


@pytest.mark.parametrize("l2", [0.001, 0.1])
def test_the_weights_are_newtons(l2):
    x, y = rows()
    found = logistic(x, y, l2=l2)
    assert bool(found.converged.all())
    for layer in range(len(x)):
        true = newton(x[layer], y, l2)
        assert torch.cosine_similarity(found.weight[layer], true[:-1], dim=0) > 0.9999
        torch.testing.assert_close(found.weight[layer], true[:-1], rtol=5e-3, atol=5e-3 * float(true[:-1].abs().max()))
        margins = x[layer].double() @ found.weight[layer] + found.bias[layer]
        torch.testing.assert_close(margins, x[layer].double() @ true[:-1] + true[-1], rtol=0, atol=5e-3)


def test_the_weights_are_scikit_learns():
    x, y = rows()
    found = logistic(x, y)
    for layer in range(len(x)):
        peer = LogisticRegression(C=1 / (2 * len(y) * 0.001), tol=1e-10, max_iter=500, solver="newton-cholesky")
        peer.fit(x[layer].double().numpy(), y.numpy())
        assert torch.cosine_similarity(found.weight[layer], torch.from_numpy(peer.coef_[0]), dim=0) > 0.9999


def test_a_given_covariance_changes_nothing():
    x, y = rows()
    covariance = torch.stack([torch.cov(layer.T) for layer in x])
    one, other = logistic(x, y), logistic(x, y, covariance=covariance)
    torch.testing.assert_close(one.loss, other.loss, rtol=1e-6, atol=0)


def test_separable_labels_and_more_dimensions_than_rows_have_a_solution():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 20, 50, generator=g)
    y = torch.arange(20) % 2 == 0
    found = logistic(x, y)
    assert bool(found.converged.all())
    margins = (x.double() @ found.weight[..., None])[..., 0] + found.bias[:, None]
    assert bool(((margins > 0) == y).all())


def test_a_dead_coordinate_has_no_weight():
    x, y = rows(layers=1)
    x[..., 3] = 7.0
    assert logistic(x, y).weight[0, 3] == 0


def test_shares_are_taken_as_labels():
    x = torch.zeros(1, 4, 1)
    x[0, 2:] = 1.0
    found = logistic(x, torch.tensor([0.2, 0.2, 0.7, 0.7]), l2=0.0)
    odds = torch.logit(torch.tensor([0.2, 0.7], dtype=torch.float64))
    torch.testing.assert_close(found.bias[0], odds[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.weight[0, 0], odds[1] - odds[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (torch.ones(5), "all 5 labels are 1: a classifier needs both classes"),
        (torch.tensor([0, 1, 2, 0, 1]), "labels are 0 and 1"),
        (torch.zeros(4), r"labels of shape \(4,\) for rows of shape"),
    ],
)
def test_bad_labels_are_named(y, message):
    with pytest.raises(ValueError, match=message):
        logistic(torch.randn(1, 5, 2), y)


def test_a_negative_penalty_is_refused():
    with pytest.raises(ValueError, match="l2 is -1"):
        logistic(torch.randn(1, 2, 2), torch.tensor([0.0, 1.0]), l2=-1)
