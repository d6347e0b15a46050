"""Quadratic steering gives the target's mean and covariance, and leaves the target's own rows alone under lda."""

import pytest
import torch
from families import tiny, tokens

from sonde.concepts.quadratic_steering import QuadraticEdit, fit_quadratic
from sonde.errors import SondeError
from sonde.lm.model import LanguageModel


@pytest.fixture(scope="module")
def kinds():
    generator = torch.Generator().manual_seed(0)
    mixes = torch.randn(2, 5, 5, generator=generator)
    rows = torch.randn(2, 4000, 5, generator=generator) @ mixes
    return rows[0] + 8, rows[1]


def test_pooled_rows_get_the_mean_and_covariance_of_the_target(kinds):
    positive, negative = kinds
    edit = QuadraticEdit.fit(positive, negative, target="negative")
    after = edit(torch.cat([positive, negative]))
    torch.testing.assert_close(after.mean(0), negative.mean(0), atol=0.05, rtol=0)
    torch.testing.assert_close(after.T.cov(), negative.T.cov(), atol=0.1, rtol=0.1)


def test_rows_of_the_target_stay_under_lda_and_the_others_become_like_them(kinds):
    positive, negative = kinds
    edit = QuadraticEdit.fit(positive, negative, source="lda", target="negative")
    own = edit.kinds(negative) == 0
    assert own.float().mean() > 0.99
    torch.testing.assert_close(edit(negative)[own], negative[own], atol=1e-3, rtol=1e-3)
    moved = edit(positive)
    torch.testing.assert_close(moved.mean(0), negative.mean(0), atol=0.2, rtol=0)
    torch.testing.assert_close(moved.T.cov(), negative.T.cov(), atol=0.4, rtol=0.2)


def test_it_is_an_edit_of_a_model():
    lm = LanguageModel(tiny("gpt_neox"))
    edits = fit_quadratic(
        lm, tokens(12, 6, seed=1).tolist(), tokens(12, 6, seed=2).tolist(), sites="resid_post.1", source="lda"
    )
    plain = lm(tokens(2, 6)).logits
    with edits.on(lm):
        assert lm(tokens(2, 6)).logits.isfinite().all()
        assert not torch.allclose(lm(tokens(2, 6)).logits, plain)
    assert edits.at(2.0).edits["resid_post.1"] is edits.edits["resid_post.1"]


def test_too_few_rows_and_unknown_words_are_refused(kinds):
    with pytest.raises(SondeError, match="at least two prompts"):
        QuadraticEdit.fit(kinds[0][:1], kinds[1], target="negative")
    with pytest.raises(SondeError, match="source is pooled or lda"):
        QuadraticEdit.fit(*kinds, source="guess", target="negative")
