"""A pass that is resumed in the middle is the whole pass, in every family."""

import pytest
import torch
from families import FAMILIES, tiny, tokens

from sonde.lm.model import LanguageModel
from sonde.lm.resumption import Resumption


@pytest.mark.parametrize("family", FAMILIES)
def test_a_resumed_pass_is_the_whole_pass(family):
    lm = LanguageModel(tiny(family), name=family)
    assert Resumption(lm).works
    assert Resumption(lm).error == 0


def test_blocks_that_are_passed_by_do_not_run_and_come_back():
    lm, ids = LanguageModel(tiny("llama")), tokens(2, 6)
    ran = []
    hooks = [
        block.mlp.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, block in enumerate(lm.structure.blocks)
    ]
    resumption = Resumption(lm)
    with lm.reading("resid_pre.2", "logits") as whole:
        lm(ids)
    ran.clear()
    with resumption.at(2, whole["resid_pre.2"]), lm.reading("logits") as resumed:
        lm(ids)
    assert ran == [2]
    assert torch.equal(resumed["logits"], whole["logits"])
    for hook in hooks:
        hook.remove()
    assert all("forward" not in block.__dict__ for block in lm.structure.blocks)


def test_a_model_that_hands_on_more_than_the_stream_is_found_out():
    lm = LanguageModel(tiny("llama"))
    memory = {}

    def remember(module, args, out):
        memory["first"] = out

    def add(module, args, out):
        return out + memory.pop("first", 0)

    blocks = lm.structure.blocks
    hooks = [blocks[0].mlp.register_forward_hook(remember), blocks[2].register_forward_hook(add)]
    assert not Resumption(lm).works
    for hook in hooks:
        hook.remove()
