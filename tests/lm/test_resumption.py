"""A pass that is resumed in the middle is the whole pass, in every family."""

import pytest
import torch
from families import FAMILIES, tiny, tokens

from sonde.errors import SondeError
from sonde.lm.model import LanguageModel
from sonde.lm.resumption import Resumption, first_block, resumed, resumption, run_from


@pytest.mark.parametrize("family", FAMILIES)
def test_a_resumed_pass_is_the_whole_pass(family):
    lm = LanguageModel(tiny(family), name=family)
    assert resumption(lm).works
    assert resumption(lm).error == 0


@pytest.mark.parametrize(
    "family", ["gpt2", "gpt_neox", "gemma3_text", "opt", "bloom", "mamba2", "rwkv", "granitemoehybrid", "xlstm"]
)
def test_from_every_block_on_it_does_what_an_edit_of_the_stream_does(family):
    lm, ids = LanguageModel(tiny(family)), tokens(4, 12)
    with torch.no_grad(), lm.reading("resid_pre.*", f"resid_post.{lm.n_layers - 1}") as acts:
        lm(ids)
    for layer, site in enumerate(acts):
        changed = acts[site].clone()
        changed[0, 3] += 1
        changed[2] *= 1.5
        with torch.no_grad():
            ends = run_from(lm, layer, changed, ids)
            with resumed(lm, layer, changed):
                found = lm(ids).logits
            with lm.editing({site: lambda _, changed=changed: changed}), lm.reading("resid_post.2", "logits") as edited:
                lm(ids)
        torch.testing.assert_close(ends, edited["resid_post.2"], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found, edited["logits"], rtol=1e-4, atol=1e-4)


def test_pads_are_masked_as_in_the_pass():
    lm, ids = LanguageModel(tiny("gpt_neox")), tokens(2, 8)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, :3] = False
    with torch.no_grad(), lm.reading("resid_pre.1", "resid_post.2") as acts:
        lm(ids, mask)
    with torch.no_grad():
        ends = run_from(lm, 1, acts["resid_pre.1"], ids, mask)
    torch.testing.assert_close(ends[mask], acts["resid_post.2"][mask])


def test_gradients_pass_through_the_blocks_that_run():
    lm, ids = LanguageModel(tiny("llama")), tokens(2, 6)
    with torch.no_grad(), lm.reading("resid_pre.1") as acts:
        lm(ids)
    stream = acts["resid_pre.1"].double()
    lm.model.double()
    free = stream.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(run_from(lm, 1, free, ids).square().sum(), free)
    step = torch.randn_like(stream) * 1e-3  # large beside the single precision of the norms
    with torch.no_grad():
        up, down = (run_from(lm, 1, stream + sign * step, ids).square().sum() for sign in (1, -1))
    torch.testing.assert_close((up - down) / 2, (gradient * step).sum(), rtol=1e-2, atol=0)


def test_blocks_that_are_passed_by_do_not_run_and_come_back():
    lm, ids = LanguageModel(tiny("llama")), tokens(2, 6)
    ran = []
    resumption(lm)
    hooks = [
        block.mlp.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, block in enumerate(lm.structure.blocks)
    ]
    with lm.reading("resid_pre.2", "logits") as whole:
        lm(ids)
    ran.clear()
    with resumed(lm, 2, whole["resid_pre.2"]), lm.reading("logits") as again:
        lm(ids)
    assert ran == [2]
    assert torch.equal(again["logits"], whole["logits"])
    for hook in hooks:
        hook.remove()
    assert all("forward" not in block.__dict__ for block in lm.structure.blocks)


def test_a_model_that_hands_on_more_than_the_stream_is_found_out_and_runs_whole():
    lm, ids = LanguageModel(tiny("llama")), tokens(2, 6)
    memory = {}

    def remember(module, args, out):
        memory["first"] = out

    def add(module, args, out):
        return out + memory.pop("first", 0)

    blocks = lm.structure.blocks
    hooks = [blocks[0].mlp.register_forward_hook(remember), blocks[2].register_forward_hook(add)]
    assert not Resumption(lm).works
    with torch.no_grad(), lm.reading("resid_pre.1", "resid_post.2") as acts:
        lm(ids)
    with torch.no_grad():
        torch.testing.assert_close(run_from(lm, 1, acts["resid_pre.1"], ids), acts["resid_post.2"])
    for hook in hooks:
        hook.remove()


def test_a_model_is_resumed_from_the_residual_stream_alone():
    lm = LanguageModel(tiny("gpt2"))
    assert (first_block(lm, "resid_pre.0"), first_block(lm, "resid_post.2")) == (0, 3)
    for site in ("mlp_out.1", "embed", "resid_pre.3", "logits"):
        with pytest.raises(SondeError, match="resumed from the residual stream"):
            first_block(lm, site)
