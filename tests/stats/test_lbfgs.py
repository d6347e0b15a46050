import pytest
import torch

from sonde.stats.lbfgs import minimise


def quadratics(b=4, p=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    root = torch.randn(b, p, p, generator=g, dtype=torch.float64)
    a = root @ root.mT + 0.05 * torch.eye(p, dtype=torch.float64)
    return a, torch.randn(b, p, generator=g, dtype=torch.float64)


def test_quadratics_end_at_their_solutions():
    a, b = quadratics()

    def objective(x, which):
        pulled = (a[which] @ x[..., None])[..., 0]
        return (x * pulled).sum(-1) / 2 - (b[which] * x).sum(-1), pulled - b[which]

    end = minimise(objective, torch.zeros_like(b), tolerance=1e-14)
    assert bool(end.converged.all())
    torch.testing.assert_close(end.x, torch.linalg.solve(a, b), rtol=1e-4, atol=1e-5)


def rosenbrock(x, which):
    u, v = x.unbind(-1)
    value = (1 - u) ** 2 + 100 * (v - u**2) ** 2
    return value, torch.stack([-2 * (1 - u) - 400 * u * (v - u**2), 200 * (v - u**2)], -1)


def test_a_problem_takes_the_same_way_alone_and_in_company():
    start = torch.tensor([[-1.2, 1.0], [0.5, -2.0], [3.0, 3.0]])
    together = minimise(rosenbrock, start, tolerance=1e-14)
    torch.testing.assert_close(together.x, torch.ones(3, 2, dtype=torch.float64), rtol=1e-4, atol=1e-4)
    for i in range(3):
        alone = minimise(rosenbrock, start[i : i + 1], tolerance=1e-14)
        torch.testing.assert_close(alone.x[0], together.x[i], rtol=0, atol=1e-12)
        assert alone.steps[0] == together.steps[i]


def test_a_preconditioner_of_the_hessian_solves_a_quadratic_at_once():
    a, b = quadratics()
    inverse = torch.linalg.inv(a)

    def objective(x, which):
        pulled = (a[which] @ x[..., None])[..., 0]
        return (x * pulled).sum(-1) / 2 - (b[which] * x).sum(-1), pulled - b[which]

    end = minimise(
        objective, torch.zeros_like(b), precondition=lambda v, which: (inverse[which] @ v[..., None])[..., 0]
    )
    assert int(end.steps.max()) <= 3
    torch.testing.assert_close(end.x, torch.linalg.solve(a, b))


def test_steps_are_limited_and_what_has_not_converged_says_so():
    end = minimise(rosenbrock, torch.tensor([[-1.2, 1.0]]), steps=3)
    assert end.steps.tolist() == [3]
    assert end.converged.tolist() == [False]


def test_a_start_that_is_not_finite_is_named():
    with pytest.raises(ValueError, match="problem 1 is nan at its start"):
        minimise(rosenbrock, torch.tensor([[0.0, 0.0], [float("nan"), 0.0]]))
