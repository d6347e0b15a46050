"""Bits of prompts: formulas against closed forms, rulers on a prompt that works."""

import math

import pytest
import torch
from families import tiny
from hypothesis import given
from hypothesis import strategies as st

from sonde.errors import SondeError
from sonde.lm.model import LanguageModel
from sonde.prompts import bits
from sonde.prompts.curve import Threshold
from sonde.prompts.evaluation import evaluate
from sonde.prompts.examples import Examples
from sonde.prompts.soft_prompt import SoftPrompt
from sonde.prompts.training import train_prompts

ALWAYS = Threshold(success=0.95)


@pytest.fixture(scope="module")
def lm():
    return LanguageModel(tiny("gpt_neox"))


@pytest.fixture(scope="module")
def parts(lm):
    ids = torch.randint(lm.vocab_size, (12, 5), generator=torch.Generator().manual_seed(1)).tolist()
    examples = Examples(ids, [[7]] * 12)
    return examples.select(range(8)), examples.select(range(8, 12))


@pytest.fixture(scope="module")
def prompt(lm, parts):
    (trial,) = train_prompts(lm, parts[0], lengths=[2], restarts=1, steps=80, batch=8, lrs=(1.0,), validation=parts[1])
    assert evaluate(lm, trial.prompt, parts[1]).success.item() == 1.0
    return trial.prompt


@given(st.integers(1, 8), st.floats(0.1, 10), st.lists(st.floats(-20, 20), min_size=1, max_size=5))
def test_a_grid_of_b_bits_has_two_to_the_b_values_and_moves_nothing_inside_by_more_than_half_a_cell(b, width, numbers):
    vectors = torch.tensor([numbers], dtype=torch.float64)
    found = bits.on_grid(vectors, b, width)
    cell = 2 * width / 2**b
    index = found / cell - 0.5
    assert torch.allclose(index, index.round(), atol=1e-6)
    assert index.round().min() >= -(2 ** (b - 1)) and index.round().max() < 2 ** (b - 1)
    inside = vectors.abs() < width
    assert ((found - vectors).abs()[inside] <= cell / 2 + 1e-9).all()
    assert torch.allclose(bits.on_grid(found, b, width), found)


def test_the_information_of_a_noisy_prompt_is_the_kl_of_two_gaussians():
    draw = torch.Generator().manual_seed(0)
    mean, log_deviation = torch.randn(3, 2, 5, generator=draw), torch.randn(3, 2, 5, generator=draw) - 1
    noisy = torch.distributions.Normal(mean, log_deviation.exp())
    closed = torch.distributions.kl_divergence(noisy, torch.distributions.Normal(0.0, 0.7)).sum((1, 2)) / math.log(2)
    assert torch.allclose(bits.information(mean, log_deviation, 0.7), closed, rtol=1e-5)
    assert bits.information(torch.zeros(1, 4), torch.full((1, 4), math.log(0.7)), 0.7).abs() < 1e-5


def test_the_coarsest_grid_that_works_is_found_and_works(lm, parts, prompt):
    found = bits.quantised(lm, prompt, parts[1], threshold=ALWAYS)
    assert found is not None and found.success >= 0.95
    assert found.bits == found.per_coordinate * prompt.vectors.numel() < bits.nominal(prompt)
    assert len(found.prompt.vectors.unique()) <= 2**found.per_coordinate
    assert evaluate(lm, found.prompt, parts[1]).success.item() == pytest.approx(found.success)
    assert bits.quantised(lm, prompt, parts[1], threshold=Threshold(nats=-1.0)) is None


def test_a_noise_coded_prompt_costs_less_than_its_numbers_and_works_under_its_noise(lm, parts, prompt):
    found = bits.noise_coded(lm, prompt, *parts, threshold=ALWAYS, steps=60, prices=(1e-4, 1e-2, 1e-1))
    assert found is not None and found.success >= 0.95
    assert 0 < found.bits < bits.nominal(prompt)
    draws = found.mean + found.deviation * torch.randn(
        16, *found.mean.shape, generator=torch.Generator().manual_seed(5)
    )
    share = evaluate(lm, [SoftPrompt(vectors, prompt.position) for vectors in draws], parts[1]).success.mean()
    assert share >= 0.85
    with pytest.raises(SondeError, match="no vectors"):
        bits.noise_coded(lm, SoftPrompt.empty(lm), *parts)


def test_what_is_delivered_is_the_gain_of_the_target_in_bits(lm, parts, prompt):
    gain = bits.delivered(lm, prompt, parts[1])
    context, target = parts[1].contexts[0], parts[1].targets[0]
    with torch.no_grad():
        logp = lm(torch.tensor([context])).logits.log_softmax(-1)[0, -1]
    bare = -float(logp[target]) / math.log(2)
    assert gain > 0
    one = parts[1].select([0])
    now = evaluate(lm, prompt, one).nats.item() / math.log(2)
    assert bits.delivered(lm, prompt, one) == pytest.approx(bare - now, rel=1e-3)


def test_all_five_are_measured_and_hard_bits_are_infinite_where_no_tokens_do(lm, parts, prompt):
    found = bits.measure_bits(lm, prompt, *parts, threshold=ALWAYS, hard_lengths=(1,), steps=20)
    assert [name for name, _ in found.rows()] == ["nominal", "quantised", "noise-coded", "hard", "delivered"]
    assert found.nominal == 2 * prompt.vectors.shape[1] * 32 and found.hard == math.inf
    trivial = bits.hard_bits(lm, *parts, lengths=(1,), threshold=Threshold(nats=1e9))
    assert trivial == pytest.approx(math.log2(lm.vocab_size))
