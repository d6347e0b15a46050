"""Latents planted to be of one kind are of that kind and of no other."""

import numpy as np
from latent_worlds import VOCAB

from sonde.features.latent_cache import LatentCache
from sonde.features.latent_statistics import latent_statistics


def test_planted_kinds_are_told_apart(tmp_path):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCAB, (500, 64))
    masks = [
        (tokens == 7, rng.uniform(1, 2, tokens.shape)),  # one token
        (tokens < 15, rng.uniform(1, 2, tokens.shape)),  # fifteen tokens
        (np.broadcast_to(np.arange(64) == 5, tokens.shape), rng.uniform(1, 2, tokens.shape)),  # one position
        (rng.random(tokens.shape) < 0.3, np.where(tokens == 7, 4.0, 1.0)),  # strong on one token, weak on all
        (np.zeros(tokens.shape, dtype=bool), np.ones(tokens.shape)),  # dead
    ]
    columns = []
    for latent, (mask, value) in enumerate(masks):
        sequence, position = mask.nonzero()
        columns.append((sequence, position, np.full(len(sequence), latent), value[mask]))
    triples = tuple(np.concatenate(column) for column in zip(*columns, strict=True))
    cache = LatentCache.write(tmp_path, tokens, {"x": (5, triples)})
    found = latent_statistics(cache, "x")
    assert found.alive.tolist() == [True, True, True, True, False]
    assert (found.counts == [mask.sum() for mask, _ in masks]).all()
    assert found.single_token.tolist() == [True, False, False, True, False]  # the strongest activations decide
    assert found.weakly_single_token.tolist() == [True, False, False, False, False]
    assert found.unigram.tolist() == [True, True, False, False, False]
    assert found.positional.tolist() == [False, False, True, False, False]
    q = 1 / 64  # fires at one of 64 positions, always: the information is the entropy of firing
    assert np.isclose(found.position_information[2], -q * np.log(q) - (1 - q) * np.log(1 - q))
    summary = found.summary()
    assert summary["alive"] == 0.8 and summary["over 10 % of tokens"] == 0.2 and summary["positional"] == 0.25
