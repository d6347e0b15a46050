"""Conditional prompts: the network is its formula, learns a rule that no single prompt can serve, and is savable."""

import math
from pathlib import Path

import families
import pytest
import torch
from torch.nn.functional import mish

from sonde.errors import SondeError
from sonde.lm.model import LanguageModel
from sonde.prompts.conditional import PromptGenerator, train_generator
from sonde.prompts.evaluation import evaluate
from sonde.prompts.examples import Examples
from sonde.prompts.generation import generate
from sonde.prompts.soft_prompt import SoftPrompt, embedding_rms
from sonde.prompts.training import train_prompts

CONTEXT = [3, 30, 60]


def two_wishes(lm: LanguageModel) -> Examples:
    """One context, and two texts that hard prompts make the model write: the condition says which is wanted."""
    prompts = (SoftPrompt.from_tokens(lm, ids) for ids in families.tokens(20, 2, seed=6).tolist())
    found = {text[0]: text for text in (generate(lm, prompt, [CONTEXT], max_new_tokens=2)[0] for prompt in prompts)}
    texts = list(found.values())[:2]  # they differ from their first token on
    conditions = torch.tensor([[float(i % 2), 1.0] for i in range(4)])
    return Examples([CONTEXT] * 4, [texts[i % 2] for i in range(4)], conditions=conditions)


def sure() -> LanguageModel:
    """A model that is sure of what it says, as a trained one is."""
    model = families.tiny("gpt_neox")
    lm = LanguageModel(model, name="sure")
    lm.structure.head.weight.mul_(4)
    return lm


@pytest.mark.parametrize("layers", [0, 2])
def test_the_generator_is_its_formula(layers: int) -> None:
    lm = families.model("llama")
    g = PromptGenerator(lm, k=2, n=3, hidden=5, layers=layers)
    with torch.no_grad():
        for parameter in g.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(1))
        c = torch.tensor([[0.3, -0.7], [1.0, 2.0]])
        hidden = mish(c @ g.first.weight.T + g.first.bias).view(2, 3, 5)
        for i in range(layers):
            hidden = mish(torch.einsum("bni,nio->bno", hidden, g.stack[i]) + g.stack_bias[i])
        torch.testing.assert_close(g(c), torch.einsum("bni,nio->bno", hidden, g.last) + g.last_bias)
    assert g.prompt([0.3, -0.7]).vectors.shape == (3, 32)
    with pytest.raises(SondeError, match="condition of 3 numbers; this generator takes 2"):
        g.prompt([1, 2, 3])


def test_it_begins_near_rows_of_the_embedding() -> None:
    lm = families.model("llama")
    vectors = PromptGenerator(lm, k=2, n=64)(torch.tensor([[0.5, 0.5]]))
    assert vectors.square().mean().sqrt().item() == pytest.approx(embedding_rms(lm), rel=0.2)


def test_it_learns_what_no_single_prompt_can_do(tmp_path: Path) -> None:
    lm = sure()
    examples = two_wishes(lm)
    g = PromptGenerator(lm, k=2, n=4, hidden=32)
    found = train_generator(lm, examples, g, steps=60, lr=0.03)
    (single,) = train_prompts(lm, examples, lengths=(4,), restarts=1, steps=60)
    bound = math.log(2) / 2  # nats a token of one prompt that must leave the choice of the first open
    assert found["validation"] < bound / 2 < bound <= single.validation
    nats = [evaluate(lm, g.prompt([c, 1.0]), examples).nats[0, int(c)].item() for c in (0.0, 1.0)]
    assert sum(nats) / 4 == pytest.approx(found["validation"], rel=1e-3)
    g.save(tmp_path, lm)
    again = PromptGenerator.load(tmp_path, lm)
    assert torch.equal(again.prompt([1.0, 1.0]).vectors, g.prompt([1.0, 1.0]).vectors)
    with pytest.raises(SondeError, match="was trained for other weights"):
        PromptGenerator.load(tmp_path, LanguageModel(families.tiny("gpt_neox")))


def test_a_generator_needs_conditions_of_its_size() -> None:
    lm = families.model("gpt_neox")
    examples = two_wishes(lm)
    with pytest.raises(SondeError, match="takes conditions of 3 numbers; the examples have 2"):
        train_generator(lm, examples, PromptGenerator(lm, k=3, n=1))
    with pytest.raises(SondeError, match="0 vectors from 2 numbers"):
        PromptGenerator(lm, k=2, n=0)


def test_a_loss_that_is_no_number_leaves_the_best_generator() -> None:
    lm = families.model("gpt_neox")
    examples = two_wishes(lm)
    g = PromptGenerator(lm, k=2, n=2, hidden=8)
    with pytest.raises(SondeError, match="at step 1: lower the learning rate"):
        train_generator(lm, examples, g, steps=5, lr=1e30, validation=examples)
    assert all(parameter.isfinite().all() for parameter in g.parameters())
