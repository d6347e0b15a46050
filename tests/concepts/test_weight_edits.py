"""Edits of weights do what hooks do, are found by structure, guard tied embeddings and can be undone bit for bit."""

import json

import pytest
import torch
from families import D_MODEL, tiny, tokens

from sonde.concepts.site_edits import SiteEdits
from sonde.concepts.weight_edits import add_to_bias, edit_weights, edited_weights
from sonde.errors import SondeError
from sonde.lm.model import LanguageModel

BAKED = ["gpt_neox", "gpt2", "llama", "opt", "falcon", "cohere", "granite", "mamba2", "jamba", "qwen3_next", "xlstm"]


def _direction(d):
    return torch.randn(d, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", BAKED)
@pytest.mark.parametrize("mean", [None, 0.25], ids=["ablation", "ace"])
def test_baked_weights_are_the_hooks(family, mean):
    lm = LanguageModel(tiny(family), name=family)
    u, ids = _direction(lm.d_model), tokens(2, 8)
    means = None if mean is None else torch.full((lm.d_model,), mean)
    with SiteEdits.everywhere(lm, u, mean=means, strength=0.5).on(lm):
        hooks = lm(ids).logits
    before = {name: value.clone() for name, value in lm.model.state_dict().items()}
    plain = lm(ids).logits
    with edited_weights(lm, u, mean=means, strength=0.5, tied="untie"):
        torch.testing.assert_close(lm(ids).logits, hooks, atol=1e-4, rtol=0)
        assert (hooks - plain).abs().max() > 0.1
    after = lm.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("family", ["gemma2", "olmo2", "rwkv", "bloom"])
def test_where_a_norm_or_a_gate_has_the_last_word_it_is_refused_and_taken_back(family):
    lm = LanguageModel(tiny(family))
    before = lm(tokens(2, 8)).logits
    with pytest.raises(SondeError, match=r"use SiteEdits\.everywhere"):
        edit_weights(lm, _direction(D_MODEL), tied="untie")
    torch.testing.assert_close(lm(tokens(2, 8)).logits, before, atol=0, rtol=0)


@pytest.fixture
def tied():
    return LanguageModel(tiny("llama", tie_word_embeddings=True), name="tied")


def test_tied_embeddings_are_never_edited_silently_at_both_ends(tied):
    u = _direction(D_MODEL)
    with pytest.raises(SondeError, match="ties its embedding to its unembedding"):
        edit_weights(tied, u)
    head = tied.structure.head.weight.clone()
    with edited_weights(tied, u, tied="untie"):
        assert torch.equal(tied.structure.head.weight, head)
        assert not torch.equal(tied.structure.embedding.weight, head)
    assert tied.structure.head.weight is tied.structure.embedding.weight
    with edited_weights(tied, u, tied="exclude") as edit:
        assert torch.equal(tied.structure.embedding.weight, head)
        assert not any("embed" in name for name in edit.changed)
    with pytest.raises(SondeError, match="tied='untie'"):
        edit_weights(tied, u, mean=u, tied="exclude")


def test_the_manifest_says_what_was_done_and_the_folder_loads(tmp_path):
    from sonde.lm.load import load

    lm = LanguageModel(tiny("gpt_neox"), name="tiny")
    before = lm.hash
    edit = edit_weights(lm, _direction(D_MODEL))
    edit.save(tmp_path / "baked")
    manifest = json.loads((tmp_path / "baked/manifest.json").read_text())
    assert manifest["hash_before"] == before != manifest["hash_after"]
    assert len(manifest["changed"]) == 1 + 3 * 4  # a table, and two matrices with their biases a block
    again = load(tmp_path / "baked", check=False)
    torch.testing.assert_close(again(tokens(2, 6)).logits, lm(tokens(2, 6)).logits, atol=1e-5, rtol=0)
    edit.undo()
    edit.undo()
    assert lm.hash == before


@pytest.mark.parametrize("site", ["mixer_out.1", "mlp_out.0", "resid_post.2"])
def test_a_vector_in_a_bias_is_activation_addition(site):
    lm = LanguageModel(tiny("gpt_neox"))
    vector, ids = _direction(D_MODEL), tokens(2, 6)
    with lm.editing({site: lambda h: h + vector}):
        hooks = lm(ids).logits
    edit = add_to_bias(lm, site, vector)
    torch.testing.assert_close(lm(ids).logits, hooks, atol=1e-4, rtol=0)
    edit.undo()
    assert (lm(ids).logits - hooks).abs().max() > 1e-3


def test_bad_directions_and_sites_are_refused():
    lm = LanguageModel(tiny("llama"), name="tiny")
    with pytest.raises(SondeError, match="width 3"):
        edit_weights(lm, torch.ones(3))
    with pytest.raises(SondeError, match="zero or not finite"):
        edit_weights(lm, torch.zeros(D_MODEL))
    with pytest.raises(SondeError, match="has no bias"):
        add_to_bias(lm, "mlp_out.0", torch.ones(D_MODEL))
    with pytest.raises(SondeError, match="not at 'embed'"):
        add_to_bias(lm, "embed", torch.ones(D_MODEL))
