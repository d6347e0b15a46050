"""What a defence costs: planted curves, and the four kinds on a tiny network."""

import math

import pytest
import torch
from families import tiny
from test_curve import planted

from sonde.errors import SondeError
from sonde.lm.model import LanguageModel
from sonde.prompts.bits import Bits
from sonde.prompts.curve import Threshold
from sonde.prompts.defence import Defence, Measured, Strength, defence_strength
from sonde.prompts.elicitation import Budget
from sonde.prompts.examples import Examples

T = Threshold(nats=1.0)


def strength(undefended, defended, bits=(None, None)):
    curves = [Measured(planted(losses), one) for losses, one in zip((undefended, defended), bits, strict=True)]
    return Strength("d", ("edit",), *curves, T)


def test_strength_is_the_difference_of_distances_in_tokens_and_in_every_kind_of_bits():
    one, two = Bits(32.0, 2.0, 1.5, 7.0, 20.0), Bits(128.0, 12.0, 4.0, math.inf, 21.0)
    found = strength([9.0, 0.5, 0.5, 0.5], [9.0, 5.0, 0.5, 0.5], (one, two))
    assert found.tokens == 3 and found.interval == (3, 3)
    assert found.bits == {"nominal": 96, "quantised": 10, "noise-coded": 2.5, "hard": math.inf, "delivered": 1}


def test_a_defence_that_holds_is_worth_more_than_the_grid_and_one_of_nothing_is_not_a_number():
    assert strength([9.0, 0.5, 0.5, 0.5], [9.0] * 4).tokens == math.inf
    assert math.isnan(strength([9.0] * 4, [9.0] * 4).tokens)
    free = strength([0.5] * 4, [9.0, 0.5, 0.5, 0.5], (None, Bits(32.0, 2.0, 1.5, 7.0, 20.0)))
    assert free.tokens == 1 and free.bits["quantised"] == 2.0


@pytest.fixture(scope="module")
def lm():
    return LanguageModel(tiny("gpt_neox"), name="tiny")


@pytest.fixture(scope="module")
def measured(lm):
    ids = torch.randint(lm.vocab_size, (20, 5), generator=torch.Generator().manual_seed(1)).tolist()
    defences = [
        Defence("filter", allowed=lambda text: "x" not in text),
        Defence("edit", edits={"resid_post.2": lambda x: 0.0 * x}),
        Defence("fine-tune", model=LanguageModel(tiny("gpt_neox", seed=5), name="other")),
    ]
    lm.decode = lambda ids: "x" * (7 in ids)
    budget = Budget(lengths=(1,), restarts=1, steps=60, batch=12, lrs=(1.0,))
    found = defence_strength(lm, Examples(ids, [[7]] * 20), defences, budget, bits=False)
    del lm.decode
    return {one.defence: one for one in found}


def test_a_filter_takes_successes_and_leaves_losses(measured):
    one = measured["filter"]
    assert (one.undefended.curve.nats == one.defended.curve.nats).all()
    assert one.undefended.curve.success.any() and not one.defended.curve.success.any()
    assert one.tokens == math.inf and one.kinds == ("filter",)


def test_an_edit_is_on_while_prompts_are_trained_and_used_and_off_afterwards(lm, measured):
    curve = measured["edit"].defended.curve
    assert (abs(curve.nats - curve.nats[0, 0, 0]) < 1e-4).all()  # zeros before the head: nothing gets through
    with torch.no_grad():
        assert not torch.equal(lm(torch.tensor([[1, 2]])).logits[0, 0], lm(torch.tensor([[1, 2]])).logits[0, 1])


def test_a_fine_tune_is_attacked_in_the_place_of_the_model(measured):
    one = measured["fine-tune"]
    assert (one.defended.curve.nats[0] != one.undefended.curve.nats[0]).all()


class Spelling:
    """One letter, one token."""

    def encode(self, text):
        return [ord(letter) % 50 for letter in text]


def test_a_system_prompt_stands_before_every_context():
    defence = Defence("system", system="be")
    examples = Examples([[1, 2], [3]], [[4], [5]], slots=[1, 0])
    found = defence.contexts(Spelling(), examples)
    assert found.contexts == [[48, 1, 1, 2], [48, 1, 3]] and found.slots == [3, 2] and found.targets == examples.targets


def test_defences_by_nothing_and_of_another_vocabulary_are_refused(lm):
    with pytest.raises(SondeError, match="no system prompt, model, edit or filter"):
        Defence("nothing")
    other = LanguageModel(tiny("gpt_neox", vocab_size=80), name="other")
    examples = Examples([[i, 2] for i in range(8)], [[7]] * 8)
    with pytest.raises(SondeError, match="other has 80 tokens, tiny has"):
        defence_strength(
            lm, examples, [Defence("d", model=other)], Budget(lengths=(1,), restarts=1, steps=1), bits=False
        )
