import pytest
import torch
from families import tiny, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sonde.lens.direction_loss import AutogradLoss, ClosedNorm, RankOneLoss, direction_loss
from sonde.lens.tuned import TunedLens
from sonde.lm.model import LanguageModel


class Unembedding:
    """An unembedding of random numbers, with or without each of the parts that families have."""

    def __init__(self, norm, d=6, vocab=11, *, bias=False, scale=1.0, softcap=None, project=False, size=1.0):
        d_head = d // 2 if project else d
        self.norm = norm
        self.project = nn.Linear(d, d_head, bias=False).requires_grad_(False) if project else None
        self.weight = size * torch.randn(vocab, d_head)
        self.bias = torch.randn(vocab) if bias else None
        self.scale, self.softcap = scale, softcap

    def __call__(self, hidden):
        normed = hidden if self.norm is None else self.norm(hidden)
        if self.project is not None:
            normed = self.project(normed)
        logits = self.scale * (normed @ self.weight.T + (0 if self.bias is None else self.bias))
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


class CubeNorm(nn.Module):
    """A norm of neither kind."""

    def forward(self, x):
        return x / x.abs().pow(3).mean(-1, keepdim=True).pow(1 / 3)


def norm_of(kind, d=6):
    norm = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}[kind](d, eps=1e-3) if kind in ("layer", "rms") else None
    if norm is not None:
        nn.init.normal_(norm.weight)
        if kind == "layer":
            nn.init.normal_(norm.bias)
    return (norm or (CubeNorm() if kind == "cube" else None)) and (norm or CubeNorm()).requires_grad_(False)


def lens_of(unembedding, d=6):
    lens = TunedLens(unembedding, ["resid_pre.0", "resid_pre.1"], d)
    with torch.no_grad():
        lens.weight.normal_(std=0.3)
        lens.bias.normal_(std=0.3)
    return lens


def naive(lens, layer, hidden, reference, direction):
    """Energies by token and the gradient of their mean: ablate, read through the lens, compare."""
    v = direction.clone().requires_grad_()
    ablated = hidden - ((hidden - reference) @ v)[:, None] * v
    before, after = (lens(h, layer).log_softmax(-1) for h in (hidden, ablated))
    energies = (before.exp() * (before - after)).sum(-1)
    return energies.detach(), torch.autograd.grad(energies.mean(), v)[0]


def assert_same(loss, lens, layer, hidden, reference, direction):
    energies, gradient = naive(lens, layer, hidden, reference, direction)
    energy, found = loss(direction)
    assert energy == pytest.approx(float(energies.mean()), rel=1e-4, abs=1e-5)
    assert float((found - gradient).norm()) <= 1e-4 * float(gradient.norm()) + 1e-6
    torch.testing.assert_close(loss.by_token(direction[None])[0].float(), energies, rtol=1e-4, atol=1e-5)


@settings(deadline=None, max_examples=40)
@given(
    kind=st.sampled_from(["layer", "rms", "none"]),
    bias=st.booleans(),
    scale=st.sampled_from([1.0, 0.25, 3.0]),
    softcap=st.sampled_from([None, 2.0]),
    project=st.booleans(),
    by_token=st.booleans(),
    kept=st.booleans(),
    seed=st.integers(0, 99),
)
def test_energy_and_gradient_of_the_identity_are_those_of_ablation(
    kind, bias, scale, softcap, project, by_token, kept, seed
):
    torch.manual_seed(seed)
    lens = lens_of(Unembedding(norm_of(kind), bias=bias, scale=scale, softcap=softcap, project=project))
    hidden = torch.randn(9, 6)
    reference = hidden.roll(1, 0) if by_token else hidden.mean(0)
    loss = direction_loss(lens, 1, hidden, reference, cache_bytes=1 << 20 if kept else 0)
    assert isinstance(loss, RankOneLoss)
    assert_same(loss, lens, 1, hidden, reference, torch.randn(6))


@pytest.mark.parametrize(
    "family",
    ["gpt2", "gpt_neox", "llama", "gemma2", "gemma3_text", "phi", "opt", "bloom", "cohere", "granite", "mamba2", "rwkv",
     "recurrent_gemma", "falcon_h1", "xlstm"],
)  # fmt: skip
def test_the_identity_holds_in_every_family(family):
    lm = LanguageModel(tiny(family))
    lens = TunedLens.zeros(lm)
    with torch.no_grad():
        lens.weight.normal_(std=0.1)
        lens.bias.normal_(std=0.3)
        with lm.reading("resid_pre.1") as acts:
            lm(tokens(4, 16))
    hidden = acts["resid_pre.1"].flatten(0, 1)
    loss = direction_loss(lens, "resid_pre.1", hidden, hidden.mean(0))
    assert isinstance(loss, RankOneLoss)
    direction = nn.functional.normalize(torch.randn(lm.d_model), dim=0)
    energies, gradient = naive(lens, 1, hidden, hidden.mean(0), direction)
    energy, found = loss(direction)
    assert energy == pytest.approx(float(energies.mean()), rel=1e-5, abs=1e-7)
    assert float((found - gradient).norm() / gradient.norm()) < 2e-5


def test_nothing_is_lost_when_a_direction_equals_its_reference():
    lens = lens_of(Unembedding(norm_of("layer"), bias=True))
    hidden = torch.randn(5, 6)
    loss = direction_loss(lens, 0, hidden, hidden)
    energy, gradient = loss(torch.randn(6))
    assert energy == 0
    assert float(gradient.abs().max()) < 1e-6


def test_a_prediction_that_ablation_makes_impossible_still_has_an_energy():
    lens = lens_of(Unembedding(norm_of("layer"), size=200.0))
    hidden = 3 * torch.randn(8, 6)
    direction = nn.functional.normalize(torch.randn(6), dim=0)
    energies, _ = naive(lens, 0, hidden, hidden.mean(0), direction)
    assert float(energies.max()) > 100
    loss = direction_loss(lens, 0, hidden, hidden.mean(0))
    torch.testing.assert_close(loss.by_token(direction[None])[0].float(), energies, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_norm_of_neither_kind_is_differentiated(softcap):
    lens = lens_of(Unembedding(norm_of("cube"), bias=True, softcap=softcap))
    hidden = torch.randn(9, 6)
    loss = direction_loss(lens, 0, hidden, hidden.mean(0))
    assert isinstance(loss, AutogradLoss)
    assert_same(loss, lens, 0, hidden, hidden.mean(0), torch.randn(6))


def test_what_a_norm_does_is_measured():
    layer = norm_of("layer")
    found = ClosedNorm.of(layer, 6)
    assert found.centred
    assert found.eps == pytest.approx(1e-3, rel=1e-3)
    torch.testing.assert_close(found.gain, layer.weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.shift, layer.bias)
    rms = ClosedNorm.of(norm_of("rms"), 6)
    assert not rms.centred
    assert rms.eps == pytest.approx(1e-3, rel=1e-3)
    assert ClosedNorm.of(norm_of("cube"), 6) is None
    assert ClosedNorm.of(None, 6).eps is None
