"""The recipe of small dictionaries: text that every machine has, and the plans of the study."""

import pytest
import torch
from families import tiny

from sonde.data.python_docs import topics
from sonde.errors import SondeError
from sonde.features.recipe import BATCH, SPARSITY, documentation, small_dictionary, small_plans
from sonde.lm.model import LanguageModel
from sonde.organisms.small_lm import train_tokenizer


@pytest.fixture(scope="module")
def lm():
    return LanguageModel(tiny("gpt_neox", vocab_size=400), train_tokenizer(topics()[:20], 400), name="tiny")


def test_a_small_dictionary_is_the_same_each_time_and_knows_its_site(lm, tmp_path):
    sizes = {"latents": 64, "k": 4, "tokens": 4 * BATCH}
    first = small_dictionary(lm, "resid_post.1", checkpoint=tmp_path / "checkpoint", **sizes)
    assert first.site == "resid_post.1" and first.design.k == 4 and first.facts["steps"] == 4
    again = small_dictionary(lm, "resid_post.1", checkpoint=tmp_path / "checkpoint", **sizes)
    assert torch.equal(first.w_dec, again.w_dec) and not first.facts["truncated"]


def test_plans_have_a_sparsity_that_suits_their_kind(lm):
    for kind, weight in SPARSITY.items():
        (plan,) = small_plans(lm, ["resid_post.1"], kind, latents=64, k=4, tokens=10_000)
        assert plan.config.sparsity == weight and plan.config.dead_after == 1000
    (plan,) = small_plans(lm, ["resid_post.1"], "jumprelu", latents=64, k=4, tokens=10_000, sparsity=0.5)
    assert (plan.config.sparsity, plan.config.target_l0, plan.design.bandwidth) == (0.5, 4, 2.0)


def test_a_model_without_a_tokenizer_reads_no_documentation():
    with pytest.raises(SondeError, match="without a tokenizer"):
        documentation(LanguageModel(tiny("gpt_neox")), 100)
