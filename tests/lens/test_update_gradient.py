import pytest
import torch
from torch.nn.functional import cosine_similarity, cross_entropy

from sonde.errors import SondeError
from sonde.lens.update_gradient import update_gradient


def test_cosines_are_those_of_a_model_without_the_block(lens_lm, lens_batches):
    batch = lens_batches[0]
    found = update_gradient(lens_lm, [batch])
    assert [block.layer for block in found] == [0, 1, 2]
    with torch.no_grad(), lens_lm.reading("resid_pre.*", "resid_post.*") as acts:
        lens_lm(batch.tokens)
    for block, layer in zip(found, range(3), strict=True):
        before = acts[f"resid_pre.{layer}"].clone().requires_grad_()
        with torch.enable_grad(), lens_lm.editing({f"resid_post.{layer}": lambda _, start=before: start}):
            logits = lens_lm(batch.tokens).logits[:, :-1]
            loss = cross_entropy(logits.flatten(0, 1), batch.tokens[:, 1:].flatten())
            (gradient,) = torch.autograd.grad(loss, before)
        update = acts[f"resid_post.{layer}"] - before.detach()
        cosine = cosine_similarity(update, gradient, dim=-1)[:, :-1]
        assert block.cosine.estimate == pytest.approx(float(cosine.mean()), abs=1e-4)
        assert block.negative.estimate == pytest.approx(float((cosine < 0).float().mean()), abs=1e-2)


def test_a_block_that_steps_down_the_gradient_is_always_negative(lens_lm, lens_batches):
    """The last block is replaced by a gradient step on the loss of each token."""
    batch = lens_batches[0]
    with torch.no_grad(), lens_lm.reading("resid_pre.2") as acts:
        lens_lm(batch.tokens)
    start = acts["resid_pre.2"].clone().requires_grad_()
    with torch.enable_grad():
        logits = lens_lm.unembed(start)[:, :-1]
        loss = cross_entropy(logits.flatten(0, 1), batch.tokens[:, 1:].flatten(), reduction="sum")
        (gradient,) = torch.autograd.grad(loss, start)
    update_gradient(lens_lm, [batch])  # how the model is resumed is measured once, on blocks of its own
    block = lens_lm.structure.blocks[2]
    step = -0.1 * gradient
    try:
        block.forward = lambda hidden, **kwargs: hidden + step
        last = update_gradient(lens_lm, [batch])[2]
    finally:
        del block.forward
    assert last.negative.estimate == 1
    assert last.cosine.estimate == pytest.approx(-1, abs=1e-3)


def test_without_text_there_is_no_gradient(lens_lm):
    with pytest.raises(SondeError, match="no text"):
        update_gradient(lens_lm, [])
