import dataclasses

import numpy as np
import pytest
import torch

from sonde.errors import SondeError
from sonde.lens.ablation import SubspaceAblation
from sonde.lens.causal_basis import CausalBasis, extract, random_basis
from sonde.lens.fidelity import DirectionEffects, fidelity
from sonde.lens.tuned import TunedLens


def basis_of(site, directions, mean):
    k = len(directions)
    return CausalBasis(site, directions, torch.zeros(k, dtype=torch.float64), mean, torch.zeros(k, dtype=torch.long))


@pytest.fixture(scope="module")
def batch(lens_batches):
    return lens_batches[0]


def test_effects_are_those_of_ablating_one_direction_after_the_other(lens_lm, batch):
    lens, mean = TunedLens.logit(lens_lm), torch.randn(32)
    directions = random_basis(3, 32, seed=5)
    (found,) = fidelity(lens_lm, lens, basis_of("resid_pre.1", directions, mean), [batch])
    with torch.no_grad():
        logp = lens_lm(batch.tokens).logits.log_softmax(-1)
        for v, effect in zip(directions, found.basis.effects, strict=True):
            with lens_lm.editing({"resid_pre.1": SubspaceAblation(v[None], "mean", mean)}):
                logq = lens_lm(batch.tokens).logits.log_softmax(-1)
            expected = (logp.exp() * (logp - logq)).sum((-1, -2))
            np.testing.assert_allclose(effect, expected, rtol=1e-3, atol=1e-4)
    assert found.basis.tokens.tolist() == [32] * 8
    assert found.control.effects.shape == (3, 8)


def test_pads_do_not_count(lens_lm, batch):
    lens, mean = TunedLens.logit(lens_lm), torch.zeros(32)
    basis = basis_of("resid_pre.1", random_basis(2, 32), mean)
    (whole,) = fidelity(lens_lm, lens, basis, [batch])
    tokens = torch.cat([batch.tokens, torch.zeros(8, 5, dtype=torch.long)], 1)
    mask = torch.cat([batch.mask, torch.zeros(8, 5, dtype=torch.bool)], 1)
    (padded,) = fidelity(lens_lm, lens, basis, [dataclasses.replace(batch, tokens=tokens, mask=mask)])
    np.testing.assert_allclose(padded.basis.effects, whole.basis.effects, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(padded.basis.energies, whole.basis.energies, rtol=1e-3, atol=1e-5)


def test_after_the_last_block_the_lens_is_the_model_and_fidelity_is_perfect(lens_lm, lens_batches):
    lens = TunedLens.logit(lens_lm, sites=["resid_post.2"])
    with torch.no_grad(), lens_lm.reading("resid_post.2") as acts:
        lens_lm(lens_batches[0].tokens)
    basis = extract(lens, 0, acts["resid_post.2"].flatten(0, 1), k=6)
    (found,) = fidelity(lens_lm, lens, basis, [lens_batches[1], lens_batches[2]])
    np.testing.assert_allclose(found.basis.energy, found.basis.effect, rtol=1e-3, atol=1e-6)
    assert found.basis.spearman().estimate == pytest.approx(1)
    assert found.basis.effects.shape == (6, 16)
    assert found.strength(2).low > 1


def test_influential_directions_of_a_lens_move_the_model_more_than_random_ones(lens_lm, lens_batches):
    lens = TunedLens.logit(lens_lm, sites=["resid_pre.*"])
    with torch.no_grad(), lens_lm.reading("resid_pre.2") as acts:
        lens_lm(lens_batches[0].tokens)
    basis = extract(lens, "resid_pre.2", acts["resid_pre.2"].flatten(0, 1), k=8)
    (found,) = fidelity(lens_lm, lens, [basis], [lens_batches[1]])
    assert found.site == "resid_pre.2"
    assert found.strength().low > 1
    assert len(found.basis.effect_intervals()) == len(found.basis.energy_intervals()) == 8
    with pytest.raises(SondeError, match="no top 9"):
        found.strength(9)


def test_correlation_is_over_directions():
    energies, tokens = np.array([[1.0, 1], [2, 2], [3, 3], [4, 4], [5, 5]]), np.ones(2)
    assert DirectionEffects(energies, energies**2, tokens).spearman().estimate == pytest.approx(1)
    assert DirectionEffects(energies, -energies, tokens).spearman().estimate == pytest.approx(-1)
    assert DirectionEffects(energies, energies, tokens).spearman().n == 5


def test_what_cannot_be_measured_is_refused(lens_lm, batch):
    lens, directions = TunedLens.logit(lens_lm, sites=["resid_pre.*", "mlp_out.*"]), random_basis(1, 32)
    with pytest.raises(SondeError, match="no text"):
        fidelity(lens_lm, lens, basis_of("resid_pre.1", directions, torch.zeros(32)), [])
    with pytest.raises(SondeError, match="residual stream"):
        fidelity(lens_lm, lens, basis_of("mlp_out.1", directions, torch.zeros(32)), [batch])
