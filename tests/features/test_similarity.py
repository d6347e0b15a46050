"""Matching finds what was permuted, and shuffled words are less alike than the same words in place."""

import numpy as np
import pytest

from sonde.errors import SondeError
from sonde.features.similarity import TermVectors, matched, matched_by, random_pairs, shuffled, shuffled_means


def sets(seed: int, n: int = 30) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.choice(200, rng.integers(2, 9), replace=False).tolist() for _ in range(n)]


def test_a_permuted_dictionary_matches_itself():
    first = sets(0)
    order = np.random.default_rng(1).permutation(30)
    embed = TermVectors(first)
    match = matched(embed(first), embed([first[i] for i in order]))
    assert match.mean == pytest.approx(1) and (order[match.second] == match.first).all()


def test_the_match_is_the_best_one_of_all_permutations():
    import itertools

    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(5, 3)), rng.normal(size=(5, 3))
    cosine = (a / np.linalg.norm(a, axis=1)[:, None]) @ (b / np.linalg.norm(b, axis=1)[:, None]).T
    best = max(sum(cosine[i, j] for i, j in enumerate(order)) for order in itertools.permutations(range(5)))
    assert matched(a, b).mean * 5 == pytest.approx(best)


def test_shuffling_keeps_lengths_and_words_and_lowers_the_match():
    first = sets(0)
    second = [[*one[:-1], 150 + i % 50] for i, one in enumerate(first)]  # one word of each is another
    rng = np.random.default_rng(0)
    dealt = shuffled(first, rng)
    assert [len(one) for one in dealt] == [len(one) for one in first]
    assert sorted(term for one in dealt for term in one) == sorted(term for one in first for term in one)
    embed = TermVectors(first, second)
    chance = shuffled_means(first, second, embed, draws=10)
    assert matched(embed(first), embed(second)).mean > chance.max() + 0.2
    assert np.ptp(chance) > 0


def test_a_match_by_decoder_rows_is_held_against_pairs_at_random():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(30, 8))
    order = rng.permutation(30)
    first = sets(0)
    vectors = TermVectors(first)(first)
    match = matched_by((rows, rows[order]), (vectors, vectors[order]))
    assert match.mean == pytest.approx(1)
    assert random_pairs(match, (vectors, vectors[order]), draws=20).max() < 0.3


def test_sets_that_cannot_be_matched_are_refused():
    with pytest.raises(SondeError, match=r"shapes \(0, 3\) and \(2, 3\)"):
        matched(np.zeros((0, 3)), np.ones((2, 3)))
    with pytest.raises(SondeError, match="one width"):
        matched(np.ones((2, 3)), np.ones((2, 4)))
