"""Hard prompts against all prompts there are, counted out."""

import itertools
import math

import pytest
import torch
from families import tiny

from sonde.errors import SondeError
from sonde.lm.model import LanguageModel
from sonde.prompts.examples import Examples
from sonde.prompts.hard import best_token, greedy_search
from sonde.prompts.soft_prompt import SoftPrompt


@pytest.fixture(scope="module")
def lm():
    return LanguageModel(tiny("gpt_neox"))


@pytest.fixture(scope="module")
def examples(lm):
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(lm.vocab_size, (3, 8), generator=draw).tolist()
    return Examples([row[:5] for row in ids], [row[5:] for row in ids])


@torch.no_grad()
def counted(lm, examples, prompt, at=None):
    """Nats of the whole target with the prompt's tokens in the text, by an ordinary pass."""
    total = 0.0
    for context, target in zip(examples.contexts, examples.targets, strict=True):
        place = len(context) if at is None else at
        row = [*context[:place], *prompt, *context[place:], *target]
        logp = lm(torch.tensor([row])).logits.log_softmax(-1)[0, -len(target) - 1 : -1]
        total -= float(logp[torch.arange(len(target)), target].sum())
    return total / len(examples)


@pytest.mark.parametrize(("position", "at"), [("suffix", None), ("prefix", 0)])
def test_the_best_token_is_the_best_of_all(lm, examples, position, at):
    few = examples.select([0, 1])
    found = best_token(lm, few, position=position)
    all_of_them = {token: counted(lm, few, [token], at) for token in range(lm.vocab_size)}
    best = min(all_of_them, key=all_of_them.get)
    assert found.ids == (best,)
    assert found.nats == pytest.approx(all_of_them[best], rel=1e-4)
    assert found.bits == pytest.approx(math.log2(lm.vocab_size))
    assert [nats for _, nats in found.others] == sorted(nats for _, nats in found.others)
    soft = found.soft(lm)
    assert isinstance(soft, SoftPrompt) and (len(soft), soft.position) == (1, position)


def test_the_greedy_search_only_ever_improves_and_comes_near_the_best_pair(lm, examples):
    found = greedy_search(lm, examples, 2, steps=24, batch=3, seed=1)
    assert found.nats == pytest.approx(counted(lm, examples, found.ids), rel=1e-4)
    longer = greedy_search(lm, examples, 2, steps=24, batch=3, seed=1, start=found.ids)
    assert longer.nats <= found.nats + 1e-6
    draw = torch.Generator().manual_seed(0)
    random = [counted(lm, examples, pair) for pair in torch.randint(lm.vocab_size, (60, 2), generator=draw).tolist()]
    assert found.nats < min(random)
    assert found.bits == pytest.approx(2 * math.log2(lm.vocab_size))


def test_the_same_seed_finds_the_same_prompt(lm, examples):
    one, two = (greedy_search(lm, examples, 3, steps=4, seed=7) for _ in range(2))
    assert one == two
    assert len(set(itertools.chain([one.ids], (ids for ids, _ in one.others)))) == 1 + len(one.others)


def test_prompts_of_no_tokens_and_starts_of_another_length_are_refused(lm, examples):
    with pytest.raises(SondeError, match="hard prompt of 0 tokens"):
        greedy_search(lm, examples, 0)
    with pytest.raises(SondeError, match="hard prompt of 2 tokens from a start of 1"):
        greedy_search(lm, examples, 2, start=[1])
