"""The sparse loss and every gradient of it equal those of dense matrices and plain autograd, in float64 to 1e-10."""

import pytest
import torch

from sonde.features.crosscoder import crosscoder
from sonde.features.dictionary import Design, Dictionary
from sonde.features.objective import Part, Scale, losses, variance
from sonde.features.step_config import StepConfig
from sonde.features.straight_through import jump_relu, step_above

D, M, N, K = 12, 96, 40, 5

CASES = {
    "topk": (Design("topk", D, M, K), {}),
    "topk, mean squared error": (Design("topk", D, M, K), {"reconstruction": "mse"}),
    "topk, unrectified aux-k": (Design("topk", D, M, K), {"aux_rectify": False}),
    "topk, aux-k of fewer dead than half the width": (Design("topk", D, M, K), {"aux_k": 60}),
    "multi-topk": (Design("topk", D, M, K, multi_topk=True), {}),
    "multi-topk by norm": (Design("topk", D, M, K, multi_topk=True, ranked_by_norm=True), {}),
    "skip transcoder": (Design("topk", D, M, K, outputs=7, transcodes=True, skip=True), {}),
    "groupmax": (Design("groupmax", D, M, 6), {}),
    "batchtopk": (Design("batchtopk", D, M, K), {}),
    "batchtopk by norm": (Design("batchtopk", D, M, K, ranked_by_norm=True), {}),
    "matryoshka": (Design("matryoshka", D, M, K, prefixes=(8, 40, M), prefix_weights=(0.5, 0.3, 0.2)), {}),
    "crosscoder": (crosscoder((5, 7), M, kind="batchtopk", k=K), {}),
}


def made(design, *, seed=0):
    d = Dictionary(design).double().train()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in d.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=g, dtype=torch.float64))
        # Many latents are negative in every row, so that some of the k largest, and of the dead ones, are clipped.
        d.b_enc -= 1.8
    x = torch.randn(N, D, generator=g, dtype=torch.float64) + 0.3
    y = torch.randn(N, design.outputs, generator=g, dtype=torch.float64) if design.transcodes else x
    dead = torch.rand(M, generator=g) < 0.4
    return d, x, y, dead


def norms(d):
    parts = d.w_dec.split(d.design.streams, 1) if d.design.streams else [d.w_dec]
    return sum(part.norm(dim=1) for part in parts)


def dense_choice(d, pre, k):
    ranks = pre * norms(d).detach() if d.design.ranked_by_norm else pre
    if d.design.kind == "groupmax":
        places = pre.unflatten(1, (k, -1)).argmax(2) + torch.arange(0, M, M // k)
        return torch.zeros_like(pre).scatter(1, places, 1)
    if d.design.chooses_across_rows:
        return torch.zeros(N * M, dtype=pre.dtype).index_fill(0, ranks.flatten().topk(N * k)[1], 1).view(N, M)
    return torch.zeros_like(pre).scatter(1, ranks.topk(k)[1], 1)


def dense_loss(d, x, y, dead, config):
    """The specification, written with dense matrices."""
    pre = (x - d.b_dec if d.design.centred else x) @ d.w_enc.T + d.b_enc
    f = pre.relu() * dense_choice(d, pre.detach(), d.design.k)
    skip = 0 if d.w_skip is None else x @ d.w_skip.T
    divisor = (y - y.mean(0)).square().sum() if config.reconstruction == "fvu" else N
    total, error = 0, None
    for end, weight in zip(d.design.prefixes or (M,), d.design.prefix_weights or (1,), strict=True):
        error = y - (f[:, :end] @ d.w_dec[:end] + d.b_dec + skip)
        total = total + weight * error.square().sum() / divisor
    if d.design.multi_topk:
        wide = pre.relu() * dense_choice(d, pre.detach(), 4 * d.design.k)
        total = total + (y - (wide @ d.w_dec + d.b_dec + skip)).square().sum() / divisor / 8
    if config.aux_weight:
        error = error.detach()
        few = min(config.aux_k, int(dead.sum()))
        masked = torch.where(dead, pre, -torch.inf)
        chosen = torch.zeros_like(pre).scatter(1, masked.topk(few)[1], 1)
        guess = (chosen * (pre.relu() if config.aux_rectify else pre)) @ d.w_dec
        share = min(int(dead.sum()) / config.aux_k, 1)
        aux = share * (guess - error).square().sum() / (error - error.mean(0)).square().sum()
        total = total + config.aux_weight * aux
    return total, f


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", CASES)
def test_sparse_equals_dense_forwards_and_backwards(name, seed):
    design, fields = CASES[name]
    config = StepConfig(**fields).for_design(design)
    d, x, y, dead = made(design, seed=seed)
    found = losses([Part(d, x, dead)], y, config, Scale(variance(y), N))
    mine = torch.autograd.grad(found.total, list(d.parameters()), allow_unused=True)
    wanted, f = dense_loss(d, x, y, dead, config)
    theirs = torch.autograd.grad(wanted, list(d.parameters()), allow_unused=True)
    assert float((found.total - wanted).abs().detach()) < 1e-10
    for (parameter, _), a, b in zip(d.named_parameters(), mine, theirs, strict=True):
        assert a is not None, parameter
        assert float((a - b).abs().max()) < 1e-10, parameter
    assert torch.equal(found.fired[0], (f > 0).any(0))
    assert float(found.terms["l0"]) == pytest.approx(float((f > 0).sum() / N))


def test_among_the_k_largest_some_are_clipped_in_these_tests():
    d, x, _, _ = made(CASES["topk"][0])
    assert int((d.kept(x).pre <= 0).sum()) > 10


def test_aux_k_moves_the_encoder_rows_of_dead_latents_and_no_other_that_is_silent():
    design = Design("topk", D, M, K)
    d, x, y, _ = made(design)
    with torch.no_grad():
        d.b_enc[: M // 2] = -50  # below all others, and so never chosen
    dead = torch.arange(M) < M // 2
    config = StepConfig(aux_rectify=False).for_design(design)
    losses([Part(d, x, dead)], y, config, Scale(variance(y), N)).total.backward()
    assert int((d.w_enc.grad[dead].norm(dim=1) > 0).sum()) >= D // 2
    d.zero_grad()
    losses([Part(d, x, ~dead & False)], y, config, Scale(variance(y), N)).total.backward()
    assert not d.w_enc.grad[dead].any()


def test_the_window_of_a_threshold_sees_pre_on_both_sides():
    pre = torch.tensor([[0.30, 0.49, 0.51, 0.80], [0.46, 0.90, 0.10, 0.54]], dtype=torch.float64, requires_grad=True)
    theta = torch.full((4,), 0.5, dtype=torch.float64, requires_grad=True)
    slope = torch.randn(2, 4, dtype=torch.float64)
    window = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 1]])
    to_pre, to_theta = torch.autograd.grad((slope * jump_relu(pre, theta, 0.1)).sum(), [pre, theta])
    assert torch.allclose(to_theta, -(0.5 / 0.1) * (slope * window).sum(0))
    assert torch.equal(to_pre, slope * (pre > theta))
    to_theta = torch.autograd.grad((slope * step_above(pre, theta, 0.1)).sum(), theta)[0]
    assert torch.allclose(to_theta, -(1 / 0.1) * (slope * window).sum(0))
    to_pre = torch.autograd.grad((slope * step_above(pre, theta, 0.1, to_input=True)).sum(), pre)[0]
    assert torch.allclose(to_pre, slope * window / 0.1)
    assert step_above(pre, theta, 0.1).requires_grad
    assert torch.autograd.grad(step_above(pre, theta, 0.1).sum(), pre, allow_unused=True)[0] is None


PENALTIES = {
    "l0": lambda l0, f, n: l0,
    "l0_target": lambda l0, f, n: (l0 / 3 - 1) ** 2,
    "l0_quadratic": lambda l0, f, n: 2 / 3 * (l0 - 3) ** 2,
    "tanh": lambda l0, f, n: torch.tanh(4 * f * n).sum(1).mean(),
}


@pytest.mark.parametrize("penalty", PENALTIES)
def test_the_penalties_of_jumprelu_are_their_formulas(penalty):
    design = Design("jumprelu", D, M, threshold=0.2, bandwidth=0.1)
    d, x, y, dead = made(design)
    with torch.no_grad():
        d.threshold.fill_(0.2)
    fields = {"penalty": penalty, "target_l0": 3.0, "dead_penalty": 0.5}
    config = StepConfig(**fields).for_design(design)
    found = losses([Part(d, x, dead)], y, config, Scale(variance(y), N), sparsity=0.7)
    pre = (x - d.b_dec) @ d.w_enc.T + d.b_enc
    f = pre * (pre > 0.2)
    l0 = (pre > 0.2).double().sum(1).mean()
    error = (y - f @ d.w_dec - d.b_dec).square().sum() / N
    revive = ((0.2 - pre).relu() * d.w_dec.norm(dim=1))[:, dead].sum(1).mean()
    wanted = error + 0.7 * PENALTIES[penalty](l0, f, d.w_dec.norm(dim=1)) + 0.5 * revive
    assert float((found.total - wanted).abs().detach()) < 1e-10
    found.total.backward()
    assert d.threshold.grad.any()


@pytest.mark.parametrize("norm", ["project", "free"])
def test_the_penalty_of_relu_weighs_by_norms_where_these_are_free(norm):
    design = Design("relu", D, M)
    d, x, y, dead = made(design)
    found = losses([Part(d, x, dead)], y, StepConfig(norm=norm).for_design(design), Scale(variance(y), N), sparsity=0.3)
    f = d.dense(x).values
    weights = d.w_dec.norm(dim=1) if norm == "free" else torch.ones(M, dtype=torch.float64)
    wanted = (y - f @ d.w_dec - d.b_dec).square().sum() / N + 0.3 * (f * weights).sum(1).mean()
    assert float((found.total - wanted).abs().detach()) < 1e-10


def test_a_gate_learns_from_its_own_reconstruction_and_leaves_the_decoder_alone():
    design = Design("gated", D, M)
    d, x, y, dead = made(design)
    found = losses([Part(d, x, dead)], y, StepConfig().for_design(design), Scale(variance(y), N), sparsity=0.3)
    gate = (x - d.b_dec) @ d.w_enc.T + d.b_enc
    f = (gate > 0) * ((gate - d.b_enc) * d.r_mag.exp() + d.b_mag).relu()
    held = gate.relu() @ d.w_dec.detach() + d.b_dec.detach()
    wanted = (y - f @ d.w_dec - d.b_dec).square().sum() / N + (y - held).square().sum() / N
    wanted = wanted + 0.3 * gate.relu().sum(1).mean()
    mine = torch.autograd.grad(found.total, list(d.parameters()))
    theirs = torch.autograd.grad(wanted, list(d.parameters()))
    for a, b in zip(mine, theirs, strict=True):
        assert float((a - b).abs().max()) < 1e-10
