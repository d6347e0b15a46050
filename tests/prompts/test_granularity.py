"""Spellings of one text, the languages it is of, and curves by the character."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sonde.data.markov_language import LANGUAGE
from sonde.errors import SondeError
from sonde.prompts.granularity import (
    CONTEXT,
    LANGUAGES,
    SPAN,
    CharacterCurves,
    Spelling,
    chains,
    character_curves,
    entropy,
    texts,
    train_speller,
)


@given(st.integers(0, 50), st.sampled_from([1, 2, 4]))
def test_every_text_can_be_spelt_and_read_back(seed, k):
    spelling = Spelling(k)
    pieces = {i: piece for piece, i in spelling._ids.items()}
    for row in texts(4, seed=seed):
        assert len(row) == CONTEXT + SPAN
        ids = spelling.ids(row)
        assert "".join(pieces[i] for i in ids) == row and max(ids) < spelling.vocab_size


def test_languages_share_their_words_and_no_chain():
    found = chains()
    assert found.shape == (LANGUAGES, len(LANGUAGE), len(LANGUAGE))
    np.testing.assert_allclose(found.sum(-1), 1)
    assert all(not np.allclose(found[0], other) for other in found[1:])


def test_a_text_of_a_language_has_only_its_pairs_of_words():
    allowed = chains()[2] > 0
    for row in texts(8, seed=3, language=2):
        words = row.split(" ")[1:-1]  # the ends may be cut
        assert all(allowed[LANGUAGE.index(a), LANGUAGE.index(b)] for a, b in pairwise(words))


def test_the_entropy_is_that_of_a_long_walk():
    chain = chains()[0]
    rng, word, bits, size = np.random.default_rng(0), 0, 0.0, 0
    for _ in range(20000):
        following = rng.choice(len(chain), p=chain[word])
        bits -= math.log2(chain[word, following])
        size += len(LANGUAGE[following]) + 1
        word = following
    assert entropy() == pytest.approx(bits / size, rel=0.02)


def test_examples_score_the_same_span_after_every_context():
    spelling, row = Spelling(4), texts(1, seed=0)
    for context in (0, 8, CONTEXT):
        examples = spelling.examples(row, context)
        assert examples.targets[0] == spelling.ids(row[0][CONTEXT:])
        assert len(examples.contexts[0]) == 1 + context // 4


def test_what_a_prompt_is_worth_lies_between_the_contexts_that_help_as_much():
    read = np.array([[2.0, 2.0], [1.0, 1.0], [0.5, 0.5]])
    prompted = np.array([[2.0, 2.0], [1.5, 1.5], [0.4, 0.4]])
    found = CharacterCurves(4, (0, 1, 4), prompted, (0, 4, 8), read)
    assert [found.worth(n) for n in (0, 1, 4)] == [0.0, 2.0, math.inf]
    assert found.replaced == (0, 4, 16)


def test_a_model_of_few_steps_has_curves_of_the_right_shape():
    spelling = Spelling(4)
    lm = train_speller(spelling, steps=3, rows=4)
    found = character_curves(lm, spelling, lengths=(1,), contexts=(0, 8), rows=8, restarts=1, steps=2)
    assert found.prompted.shape == (2, 8) and found.read.shape == (2, 8)
    np.testing.assert_allclose(found.prompted[0], found.read[0], atol=1e-5)
    # 1,027 tokens, nearly untrained: about 10 bits for 4 characters
    assert 2 < found.bits(0).estimate < 3


def test_other_sizes_and_contexts_are_refused():
    with pytest.raises(SondeError, match="tokens of 3 characters: give 1, 2 or 4"):
        Spelling(3)
    spelling = Spelling(4)
    lm = train_speller(spelling, steps=1, rows=2)
    with pytest.raises(SondeError, match=r"contexts \[6\].*multiples of 4 up to 64"):
        character_curves(lm, spelling, contexts=(0, 6))
