"""Neighbours by cosine and by co-occurrence equal what dense matrices say."""

import numpy as np
import pytest
from latent_worlds import planted

from sonde.features import neighbours as module
from sonde.features.neighbours import by_cooccurrence, by_cosine


@pytest.mark.parametrize("block", [3, 512])
def test_cooccurrence_is_the_jaccard_index_of_dense_firing(tmp_path, monkeypatch, block):
    monkeypatch.setattr(module, "_BLOCK", block)
    rng = np.random.default_rng(0)
    sets = [tuple(rng.choice(200, 20, replace=False)) for _ in range(11)]
    cache = planted(tmp_path, sets, sequences=50)
    fires = np.stack([np.isin(cache.tokens, members).ravel() for members in sets], 1).astype(float)
    both = fires.T @ fires
    counts = fires.sum(0)
    jaccard = both / (counts[:, None] + counts - both)
    found = by_cooccurrence(cache, "planted", kept=4)
    np.fill_diagonal(jaccard, -1)
    for latent in range(11):
        best = np.sort(jaccard[latent])[::-1][:4]
        assert np.allclose(found.similarity[latent], best)
        assert np.allclose(jaccard[latent, found.ids[latent]], best)
        assert latent not in found.ids[latent]
    assert found.tokens == cache.n_tokens
    sample = by_cooccurrence(cache, "planted", kept=4, entries=int(counts.sum()) // 2)
    assert sample.tokens == cache.n_tokens * 24 // 50


def test_cosine_neighbours_are_the_nearest_rows(monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 7)
    rows = np.random.default_rng(0).normal(size=(40, 8))
    rows[5] = 0
    found = by_cosine(rows, kept=6)
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    cosine = unit @ unit.T
    np.fill_diagonal(cosine, -np.inf)
    assert np.allclose(found.similarity, np.sort(cosine, 1)[:, ::-1][:, :6], atol=1e-6)
    assert found.of(5) == [] and found.of(0)[0][0] == cosine[0].argmax()
    assert by_cosine(rows[:3]).ids.shape == (3, 2)
