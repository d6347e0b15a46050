import pytest
import torch
from families import tiny, tokens

from sonde.errors import SondeError
from sonde.lens.later_blocks import first_block, recording
from sonde.lm.model import LanguageModel


@pytest.mark.parametrize(
    "family", ["gpt2", "gpt_neox", "gemma3_text", "opt", "bloom", "mamba2", "rwkv", "granitemoehybrid", "xlstm"]
)
def test_the_rest_of_a_model_does_what_an_edit_of_the_stream_does(family):
    lm, ids = LanguageModel(tiny(family)), tokens(4, 12)
    with torch.no_grad(), recording(lm) as rest, lm.reading("resid_pre.1", "resid_post.2") as acts:
        lm(ids)
    changed = acts["resid_pre.1"].clone()
    changed[0, 3] += 1
    changed[2] *= 1.5
    rest.check(acts, 1)
    with torch.no_grad():
        ends = rest.run(changed, 1)
        with lm.editing({"resid_pre.1": lambda _: changed}), lm.reading("resid_post.2") as edited:
            lm(ids)
    torch.testing.assert_close(ends, edited["resid_post.2"], rtol=1e-4, atol=1e-4)
    assert torch.equal(rest.run(changed, 3), changed)


def test_pads_are_masked_as_in_the_pass():
    lm, ids = LanguageModel(tiny("gpt_neox")), tokens(2, 8)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, :3] = False
    with torch.no_grad(), recording(lm) as rest, lm.reading("resid_pre.1", "resid_post.2") as acts:
        lm(ids, mask)
    rest.check(acts, 1)


def test_blocks_that_remember_something_are_found_out():
    lm = LanguageModel(tiny("gpt2"))
    block = lm.structure.blocks[2]
    plain, calls = block.forward, []

    def moody(hidden, *args, **kwargs):
        calls.append(1)
        return plain(hidden * len(calls), *args, **kwargs)

    block.forward = moody
    with torch.no_grad(), recording(lm) as rest, lm.reading("resid_pre.1", "resid_post.2") as acts:
        lm(tokens(2, 6))
    with pytest.raises(SondeError, match="the last 2 blocks of model cannot be run by themselves"):
        rest.check(acts, 1)


def test_a_model_is_resumed_from_the_residual_stream_alone():
    lm = LanguageModel(tiny("gpt2"))
    assert (first_block(lm, "resid_pre.0"), first_block(lm, "resid_post.2")) == (0, 3)
    for site in ("mlp_out.1", "embed", "resid_pre.3", "logits"):
        with pytest.raises(SondeError, match="resumed from the residual stream"):
            first_block(lm, site)
