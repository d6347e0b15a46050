"""Rules take the steps of `torch.optim`, and refuse what makes no step."""

import pytest
import torch

from sonde.dynamics.update_rules import SGD, Adam, RuleOptimizer, clip_factor
from sonde.errors import SondeError

_PAIRS = {
    "plain": (SGD(lr=0.01, momentum=0.0), lambda p: torch.optim.SGD(p, lr=0.01)),
    "momentum": (SGD(lr=0.01, l2=0.1), lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=0.1)),
    "nesterov": (SGD(lr=0.01, nesterov=True), lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True)),
    "adam": (Adam(eps_root=0.0, l2=0.1), lambda p: torch.optim.Adam(p, lr=3e-3, weight_decay=0.1)),
    "adamw": (Adam(eps_root=0.0, decoupled=0.1), lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.1)),
}


@pytest.mark.parametrize("name", list(_PAIRS))
def test_a_rule_takes_the_steps_of_torch(name):
    rule, make = _PAIRS[name]
    ours = torch.nn.Parameter(torch.randn(3, 5, dtype=torch.float64))
    theirs = torch.nn.Parameter(ours.detach().clone())
    optimizers = RuleOptimizer([ours], rule), make([theirs])
    for _ in range(20):
        for optimizer, p in zip(optimizers, (ours, theirs), strict=True):
            optimizer.zero_grad()
            (p.cos() * p).sum().backward()
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_clipping_is_that_of_torch():
    p = torch.nn.Parameter(torch.zeros(4))
    for size in (0.1, 10.0):
        p.grad = torch.full((4,), size)
        expected = p.grad * clip_factor(p.grad.norm(), 1.0)
        torch.nn.utils.clip_grad_norm_([p], 1.0)
        assert p.grad.equal(expected)


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: SGD(lr=0), "lr is 0"),
        (lambda: SGD(momentum=1.0), "momentum is 1.0"),
        (lambda: SGD(momentum=0.0, nesterov=True), "Nesterov's variant needs"),
        (lambda: SGD(l2=-1), "l2 -1"),
        (lambda: Adam(betas=(0.9, 1.0)), "betas are"),
        (lambda: Adam(eps=0.0, eps_root=0.0), "one above 0"),
    ],
    ids=["lr", "momentum", "nesterov", "l2", "betas", "eps"],
)
def test_settings_that_make_no_step_are_refused(make, line):
    with pytest.raises(SondeError, match=line):
        make()
