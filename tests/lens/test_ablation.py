import pytest
import torch
from families import tiny, tokens

from sonde.errors import SondeError
from sonde.lens.ablation import SubspaceAblation, ablate, replacement
from sonde.lens.causal_basis import random_basis
from sonde.lm.model import LanguageModel


def test_the_component_becomes_the_references_and_the_rest_stays():
    hidden, directions = torch.randn(7, 5), random_basis(2, 5)
    for kind in ("mean", "zero", "resample"):
        reference = replacement(hidden, kind)
        ablated = ablate(hidden, directions, reference)
        expected = (reference @ directions.T).expand(7, 2)
        torch.testing.assert_close(ablated @ directions.T, expected, atol=1e-6, rtol=1e-5)
        moved = ablated - hidden
        torch.testing.assert_close(moved @ directions.T @ directions, moved, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(ablate(ablated, directions, reference), ablated, atol=1e-6, rtol=1e-5)


def test_resampling_gives_no_row_its_own_component():
    hidden = torch.arange(12.0)[:, None] * torch.ones(1, 3)
    other = replacement(hidden, "resample", seed=3)
    assert sorted(other[:, 0].tolist()) == list(range(12))
    assert not (other == hidden).any()


@pytest.mark.parametrize("kind", ["mean", "resample"])
def test_one_row_has_neither_mean_nor_other(kind):
    with pytest.raises(SondeError, match="at least 2"):
        replacement(torch.randn(1, 4), kind)
    assert replacement(torch.randn(1, 4), "zero").shape == (4,)


def test_ablations_are_edits_of_a_model():
    lm = LanguageModel(tiny("gpt2"))
    directions, ids = random_basis(3, lm.d_model), tokens(3, 8)
    mean = torch.randn(lm.d_model)
    for edit, expected in (
        (SubspaceAblation(directions, "mean", mean), (directions @ mean).expand(3, 8, 3)),
        (SubspaceAblation(directions, "zero"), torch.zeros(3, 8, 3)),
    ):
        with torch.no_grad(), lm.editing({"resid_pre.1": edit}), lm.reading("resid_pre.1") as acts:
            lm(ids)
        torch.testing.assert_close(acts["resid_pre.1"] @ directions.T, expected, atol=1e-5, rtol=1e-4)
    with torch.no_grad(), lm.reading("resid_pre.1") as clean:
        lm(ids)
    with torch.no_grad(), lm.editing({"resid_pre.1": SubspaceAblation(directions, "resample")}):
        with lm.reading("resid_pre.1") as acts:
            lm(ids)
        with pytest.raises(SondeError, match="at least 2"):
            lm(ids[:1])
    own, new = (x["resid_pre.1"] @ directions.T for x in (clean, acts))
    for row in range(3):
        matches = [other for other in range(3) if torch.allclose(new[row], own[other], atol=1e-4)]
        assert matches and matches != [row]


def test_impossible_ablations_are_refused():
    directions = random_basis(2, 4)
    with pytest.raises(SondeError, match="orthonormal"):
        SubspaceAblation(torch.ones(2, 4), "zero")
    with pytest.raises(SondeError, match="shape"):
        SubspaceAblation(torch.ones(4), "zero")
    with pytest.raises(SondeError, match="unknown"):
        SubspaceAblation(directions, "noise")
    with pytest.raises(SondeError, match="takes a mean"):
        SubspaceAblation(directions, "mean")
    with pytest.raises(SondeError, match="takes no mean"):
        SubspaceAblation(directions, "zero", torch.zeros(4))
    with pytest.raises(SondeError, match="unknown"):
        replacement(torch.randn(3, 4), "noise")
