"""The token set finds what a planted latent fires on, and nothing where there is nothing to find."""

import dataclasses

import numpy as np
from latent_worlds import VOCAB, planted

from sonde.features.latent_cache import LatentCache
from sonde.features.lexical import lexical_explanation, lexical_score
from sonde.features.samplers import LatentExamples, Sampling, examples

SMALL = Sampling(length=16, min_examples=100)


def sampled(cache: LatentCache, latent: int, **changes) -> LatentExamples:
    found = examples(cache, cache.hookpoints[0], latent, config=dataclasses.replace(SMALL, **changes))
    assert isinstance(found, LatentExamples)
    return found


def test_a_planted_set_is_found_and_told_perfectly(tmp_path):
    sets = [(3,), (10, 20, 30), (1, 2, 3, 4)]
    cache = planted(tmp_path, sets, sequences=600)
    for latent, members in enumerate(sets):
        found = sampled(cache, latent)
        explanation = lexical_explanation(found)
        score = lexical_score(explanation, found)
        assert set(explanation.ids) == set(members) and explanation.f1 == 1
        assert score.balanced_accuracy == 1 and set(score.by_quantile) == set(range(1, 11))
        assert (score.positives, score.negatives) == (50, 50)


def test_on_a_latent_that_fires_anywhere_it_is_near_chance(tmp_path):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCAB, (600, 64))
    sequence, position = (rng.random(tokens.shape) < 0.03).nonzero()
    triples = (sequence, position, np.zeros(len(sequence), int), rng.uniform(1, 2, len(sequence)))
    cache = LatentCache.write(tmp_path, tokens, {"x": (1, triples)})
    scores = [
        lexical_score(lexical_explanation(found), found).balanced_accuracy
        for seed in range(10)
        for found in [examples(cache, "x", 0, config=SMALL, seed=seed)]
    ]
    assert abs(np.mean(scores) - 0.5) < 0.08


def test_tokens_come_in_the_order_of_what_they_add(tmp_path):
    rng = np.random.default_rng(0)
    tokens = rng.integers(10, VOCAB, (600, 64))
    tokens[rng.random(tokens.shape) < 0.03] = 1
    tokens[rng.random(tokens.shape) < 0.01] = 2
    sequence, position = np.isin(tokens, (1, 2)).nonzero()
    triples = (sequence, position, np.zeros(len(sequence), int), rng.uniform(1, 2, len(sequence)))
    found = sampled(LatentCache.write(tmp_path, tokens, {"x": (1, triples)}), 0, sampler="random")
    explanation = lexical_explanation(found)
    assert explanation.ids == (1, 2)
    assert explanation.sentence([" one", " two"]) == 'fires on " one", " two"'
    assert lexical_explanation(found, most=1).ids == (1,)
