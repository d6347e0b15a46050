import math

import pytest
import torch
from families import tiny, tokens
from torch import nn

from sonde.errors import SondeError
from sonde.lens.causal_basis import (
    CausalBasis,
    extract,
    influential_directions,
    logit_effects,
    principal_directions,
    random_basis,
)
from sonde.lens.direction_loss import direction_loss
from sonde.lens.tuned import TunedLens
from sonde.lm.model import LanguageModel


class Head:
    """Logits are W h: no norm."""

    norm = project = bias = softcap = None
    scale = 1.0

    def __init__(self, weight):
        self.weight = weight


def planted(strengths, d=8, vocab=20):
    """A lens that reads only len(strengths) directions, which are orthogonal, and those directions."""
    directions = random_basis(len(strengths), d, seed=1)
    patterns = torch.linalg.qr(torch.randn(vocab, len(strengths))).Q
    return TunedLens(Head(patterns * torch.tensor(strengths) @ directions), ["resid_pre.0"], d), directions


@pytest.fixture(scope="module")
def lens_and_states():
    torch.manual_seed(0)
    lm = LanguageModel(tiny("gpt_neox"))
    lens = TunedLens.zeros(lm)
    with torch.no_grad():
        lens.weight.normal_(std=0.1)
        with lm.reading("resid_pre.1") as acts:
            lm(tokens(8, 32))
    return lens, acts["resid_pre.1"].flatten(0, 1)


def test_planted_directions_are_found_in_their_order():
    lens, directions = planted((6.0, 3.0, 1.5))
    basis = extract(lens, 0, torch.randn(40_000, 8), k=5, tolerance=1e-6)
    cosines = (basis.directions[:3] @ directions.T).abs()
    # equal but for the sampling of the states and what mixing neighbours gains in a softmax
    assert float(cosines.diagonal().min()) > 0.95
    assert float((basis.directions[:3] @ directions.T).square().sum()) > 2.999  # together they span the planted space
    assert float(basis.energies[3:].max()) < 1e-3 * float(basis.energies[2])


def test_in_two_dimensions_the_first_direction_is_the_best_of_all_angles():
    lens = TunedLens(Head(2 * torch.randn(12, 2)), ["resid_pre.0"], 2)
    hidden = torch.randn(300, 2)
    loss = direction_loss(lens, 0, hidden, hidden.mean(0))
    angles = torch.linspace(0, math.pi, 721)
    best = loss.by_token(torch.stack([angles.cos(), angles.sin()], 1)).mean(-1).max()
    assert float(extract(lens, 0, hidden, k=1, tolerance=1e-7).energies[0]) == pytest.approx(float(best), rel=1e-4)


def test_directions_are_orthonormal_and_sorted(lens_and_states):
    lens, hidden = lens_and_states
    basis = extract(lens, 1, hidden, k=12)
    torch.testing.assert_close(basis.directions @ basis.directions.T, torch.eye(12), atol=1e-5, rtol=0)
    assert (basis.energies.diff() <= 0).all()
    assert (basis.evaluations <= 101).all()
    assert basis.site == "resid_pre.1" and len(basis) == 12
    measured = direction_loss(lens, 1, hidden, hidden.mean(0)).by_token(basis.directions).mean(-1)
    torch.testing.assert_close(measured, basis.energies, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("ablation", ["mean", "zero", "resample"])
def test_the_first_direction_beats_its_start_and_random_ones(lens_and_states, ablation):
    from sonde.lens.ablation import replacement

    lens, hidden = lens_and_states
    basis = extract(lens, 1, hidden, k=1, ablation=ablation)
    loss = direction_loss(lens, 1, hidden, replacement(hidden, ablation))
    others = torch.cat([principal_directions(lens, 1, 8), random_basis(32, 32), random_basis(32, 32, seed=1)])
    assert float(basis.energies[0]) >= float(loss.by_token(others).mean(-1).max())


def test_a_whole_basis_can_be_extracted():
    lens, _ = planted((4.0, 2.0), d=4)
    basis = extract(lens, 0, torch.randn(200, 4), k=4)
    torch.testing.assert_close(basis.directions.T @ basis.directions, torch.eye(4), atol=1e-5, rtol=0)


def test_same_states_same_basis(lens_and_states):
    lens, hidden = lens_and_states
    first, second = (extract(lens, 1, hidden, k=3, ablation="resample", seed=4) for _ in range(2))
    assert torch.equal(first.directions, second.directions)


def test_a_soft_cap_and_a_strange_norm_do_not_stop_the_search():
    lm = LanguageModel(tiny("gemma2"))
    with torch.no_grad(), lm.reading("resid_pre.1") as acts:
        lm(tokens(4, 16))
    hidden = acts["resid_pre.1"].flatten(0, 1)
    lens = TunedLens.logit(lm)
    assert float(extract(lens, 1, hidden, k=2).energies[0]) > 0

    class Strange(nn.Module):
        def forward(self, x):
            return x / (1 + x.abs().amax(-1, keepdim=True))

    lens.unembedding.norm = Strange()
    assert float(extract(lens, 1, hidden, k=2, max_evaluations=5).energies[0]) > 0
    with pytest.raises(SondeError, match="neither LayerNorm nor RMSNorm"):
        logit_effects(lens, 1, random_basis(1, lm.d_model))


def test_a_direction_names_the_tokens_at_its_ends():
    weight = torch.zeros(20, 6)
    weight[5, 2], weight[7, 2], weight[11, 4] = 8.0, -6.0, 3.0
    lens = TunedLens(Head(weight), ["resid_pre.0"], 6)
    first, second = influential_directions(lens, 0, torch.randn(500, 6), k=2, tokens=1)
    assert (first.promotes, first.suppresses) == ([5], [7])
    assert second.promotes == [11]
    assert first.energy > second.energy > 0
    assert float(first.vector[2]) > 0.95


def test_effects_on_logits_are_those_of_adding_the_direction(lens_and_states):
    lens, hidden = lens_and_states
    v = random_basis(1, 32)[0]
    effect = logit_effects(lens, 1, v[None])[0]
    with torch.no_grad():
        moved = lens.translate(hidden + 0.01 * v, 1), lens.translate(hidden, 1)
        centred = [h - h.mean(-1, keepdim=True) for h in moved]
        change = (centred[0] - centred[1]) * lens.unembedding.norm.weight @ lens.unembedding.weight.T / 0.01
    change = change - change.mean(-1, keepdim=True)
    torch.testing.assert_close(change.mean(0), effect, rtol=1e-2, atol=1e-2)


def test_a_basis_is_saved_and_loaded(lens_and_states, tmp_path):
    lens, hidden = lens_and_states
    basis = extract(lens, 1, hidden, k=2)
    basis.save(tmp_path / "basis.safetensors")
    again = CausalBasis.load(tmp_path / "basis.safetensors")
    assert again.site == basis.site
    for name in ("directions", "energies", "mean", "evaluations"):
        assert torch.equal(getattr(again, name), getattr(basis, name))


def test_another_file_is_no_basis(tmp_path):
    from sonde.files import save_bundle

    save_bundle(tmp_path / "other.safetensors", {"weight": torch.zeros(2)})
    with pytest.raises(SondeError, match="no causal basis"):
        CausalBasis.load(tmp_path / "other.safetensors")


def test_impossible_extractions_are_refused(lens_and_states):
    lens, hidden = lens_and_states
    for k in (0, 33):
        with pytest.raises(SondeError, match="1 to 32 orthogonal"):
            extract(lens, 1, hidden, k=k)
        with pytest.raises(SondeError, match="1 to 32 orthogonal"):
            principal_directions(lens, 1, k)
        with pytest.raises(SondeError, match="1 to 32 orthogonal"):
            random_basis(k, 32)
    with pytest.raises(SondeError, match="shape"):
        extract(lens, 1, hidden[:, :5], k=1)
    with pytest.raises(SondeError, match="at least 2 rows"):
        extract(lens, 1, hidden[:1], k=1)
    with pytest.raises(SondeError, match="nan or infinity"):
        extract(lens, 1, hidden.masked_fill(hidden > 0, float("nan")), k=1)
    with pytest.raises(SondeError, match="out of range"):
        extract(lens, 7, hidden, k=1)
    with pytest.raises(SondeError, match="unknown"):
        extract(lens, 1, hidden, k=1, ablation="noise")
