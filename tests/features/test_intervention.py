"""Interventions do what they say at the right tokens, hit their target, and true explanations of them win."""

import math

import numpy as np
import pytest
import torch
from families import tiny
from latent_worlds import planted

import sonde
from sonde.errors import SondeError
from sonde.features.dictionary import Design, Dictionary
from sonde.features.intervention import (
    FewShotLikelihood,
    NextTokens,
    adding,
    continued,
    effect_score,
    find_strength,
    firing_prompts,
    increases,
    latent_ablation,
    latent_addition,
)
from sonde.lm.model import LanguageModel

PROMPTS = [[5, 6, 7, 8], [9, 10, 11], [20, 21, 22, 23, 24, 25, 26]]
TARGETS = (0.1, 1 / 3, 1.0, 3.0)


@pytest.fixture(scope="module")
def pebble() -> LanguageModel:
    return sonde.load("organism:pebble")


@pytest.mark.parametrize("family", ["gpt_neox", "gpt2", "mamba"])
def test_the_last_token_and_all_that_follow_are_changed_also_from_the_cache(family):
    lm = LanguageModel(tiny(family))
    direction = torch.randn(lm.d_model)
    act = adding("resid_post.1", direction)
    prompts = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    new = torch.tensor([[30, 31], [32, 33]])

    def changed(x):  # tokens 3, 4 and 5, in one run
        x[:, 3:] += 2.0 * direction
        return x

    with torch.no_grad():
        with lm.editing({"resid_post.1": changed}):
            whole = lm(torch.cat([prompts, new], 1)).logits
        with act.on(lm, 2.0):
            out = lm(prompts, use_cache=True)
            pieces = [out.logits]
            for i in range(2):
                out = lm(new[:, i : i + 1], past=out.past)
                pieces.append(out.logits)
    assert whole is not None
    assert (torch.cat(pieces, 1) - whole).abs().max() < 1e-4 * whole.abs().max()  # type: ignore[arg-type]


def test_next_tokens_of_prompts_of_all_lengths_are_those_of_whole_runs():
    lm = LanguageModel(tiny("llama"))
    act = adding("resid_post.0", torch.randn(lm.d_model))
    found = NextTokens(lm, PROMPTS, batch=2)
    for strength, rows in ((0.0, found.clean), (3.0, found.log_probs(act, 3.0))):
        for prompt, row in zip(PROMPTS, rows, strict=True):
            with torch.no_grad(), act.on(lm, strength):
                logits = lm(torch.tensor([prompt])).logits
            assert logits is not None
            assert (logits[0, -1].log_softmax(-1) - row).abs().max() < 1e-4


def test_adding_to_a_latent_keeps_the_error_and_zeroing_takes_its_part_away():
    lm = LanguageModel(tiny("gpt_neox"))
    dictionary = Dictionary.initialised(Design("topk", lm.d_model, 64, 8), seed=1)
    dictionary.site = "resid_post.1"
    x = torch.randn(2, 5, lm.d_model)
    sparse = dictionary.encode(x)
    error = x - dictionary.decode(sparse)
    dense = torch.zeros(2, 5, 64).scatter(-1, sparse.indices, sparse.values)
    latent = int(sparse.indices[0, 0, 0])
    more = dense.clone()
    more[..., latent] += 1.7
    added = latent_addition(dictionary, latent).edit(1.7)(x)
    assert torch.allclose(added, more @ dictionary.w_dec + dictionary.b_dec + error, atol=1e-4)
    dense[..., latent] = 0
    zeroed = latent_ablation(dictionary, latent).edit(1.0)(x)
    assert torch.allclose(zeroed, dense @ dictionary.w_dec + dictionary.b_dec + error, atol=1e-4)
    dictionary.site = None
    with pytest.raises(SondeError, match="does not say which site"):
        latent_addition(dictionary, 0)
    with pytest.raises(SondeError, match="give an autoencoder and its site"):
        latent_ablation(dictionary, 0)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e3])
@pytest.mark.parametrize("power", [1.0, 2.0, 4.0])
def test_the_search_meets_every_target_on_curves_that_rise(target, scale, power):
    found = find_strength(target, lambda a: 12 * (1 - math.exp(-((a / scale) ** power) / 12)))
    assert found.met and abs(found.kl / target - 1) <= 0.1 and found.evaluations <= 10


def test_a_target_out_of_reach_is_not_met_and_says_so():
    found = find_strength(3.0, lambda a: min(a, 1.0))
    assert not found.met and found.kl == 1.0 and found.evaluations <= 10
    with pytest.raises(SondeError, match="target KL is 0"):
        find_strength(0.0, lambda a: a)


def test_planted_directions_meet_their_targets_and_true_explanations_win(pebble):
    """Latents that write one token each: the text after adding to one of them holds its token."""
    strings = pebble.token_strings(range(pebble.vocab_size))
    whole = [i for i, text in enumerate(strings) if text[:1] == " " and text[1:].isalpha() and len(text) > 5]
    ids = np.random.default_rng(0).permutation(whole)[:20].tolist()
    texts = [
        "The old man and the",
        "In the morning they walked to the",
        "She said that the",
        "He looked at the house and",
    ]
    prompts = [pebble.encode(text) for text in (*texts, *(f"Then {text.lower()}" for text in texts))]
    next_tokens = NextTokens(pebble, prompts)

    def likelihood(given, explanation):  # of a reader who counts
        return np.array([math.log(0.01 + text.count(explanation)) for text in given])

    clean = continued(pebble, prompts, None)
    wins, met, shown = [], [], []
    for place, token in enumerate(ids):
        row = pebble.unembedding.weight[token].float()
        act = adding("resid_post.5", row / row.norm())
        strength = find_strength(3.0, lambda a, act=act: next_tokens.divergence(act, a))
        met.append(strength.met and abs(strength.kl / 3 - 1) <= 0.1 and strength.evaluations <= 10)
        shown.append(token in [other for other, _ in increases(next_tokens, act, strength.value)[0]])
        steered = continued(pebble, prompts, act, strength.value)
        true, other = (effect_score([strings[i]], likelihood, steered, clean).mean for i in (token, ids[place - 1]))
        wins.append(true > other)
    assert all(met) and np.mean(wins) >= 0.9 and np.mean(shown) >= 0.9


def test_the_best_explanation_is_chosen_on_one_half_and_reported_on_the_other():
    gains = {"a": [3, 3, 0, 0], "b": [1, 1, 5, 5], "": [9, 9, 9, 9]}

    def likelihood(given, explanation):
        return np.array(gains[explanation], dtype=float) if given[0] == "steered" else np.zeros(4)

    found = effect_score(["a", "b", ""], likelihood, ["steered"] * 4, ["clean"] * 4)
    assert (found.explanation, found.mean, found.best_of_all) == ("a", 0.0, 3.0)
    with pytest.raises(SondeError, match="all are empty"):
        effect_score([" "], likelihood, ["a", "b"], ["c", "d"])
    with pytest.raises(SondeError, match="1 steered and 1 clean"):
        effect_score(["a"], likelihood, ["a"], ["c"])


def test_likelihoods_are_those_of_whole_texts_whatever_the_batch(pebble):
    shots = [("a dog barked", "animals"), ("two and two", "numbers")]
    texts = ["the cat slept", "seven of nine and then eleven", "x"]
    one, many = (FewShotLikelihood(pebble, shots, batch=batch)(texts, "animals") for batch in (1, 3))
    assert np.allclose(one, many, atol=1e-4) and (one < 0).all()


def test_prompts_end_where_the_latent_first_fires(tmp_path):
    cache = planted(tmp_path, [(3, 4)])
    prompts = firing_prompts(cache, "planted", 0, count=25, most=20)
    assert len(prompts) == 25
    for prompt in prompts:
        assert prompt[-1] in (3, 4) and not {3, 4} & set(prompt[:-1]) and 2 <= len(prompt) <= 20
    with pytest.raises(SondeError, match="prompts of at least 2 tokens"):
        NextTokens(LanguageModel(tiny("llama")), [[1]])
