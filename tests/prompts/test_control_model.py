"""The shuffled network has the form and the weights of the model in no order."""

import torch
from families import tiny

from sonde.lm.model import LanguageModel
from sonde.prompts.control_model import shuffled


def test_blocks_hold_the_same_numbers_elsewhere_and_the_rest_is_untouched():
    lm = LanguageModel(tiny("gpt_neox"))
    before = lm.hash
    control = shuffled(lm, seed=3)
    assert LanguageModel(lm.model).hash == before  # the model itself is as it was
    blocks = {id(p) for p in control.structure.blocks.parameters()}
    for old, new in zip(lm.model.parameters(), control.model.parameters(), strict=True):
        if id(new) in blocks and new.ndim > 1:
            assert not torch.equal(old, new) and torch.equal(old.flatten().sort().values, new.flatten().sort().values)
        else:
            assert torch.equal(old, new)
    assert shuffled(lm, seed=3).hash == control.hash != shuffled(lm, seed=4).hash
