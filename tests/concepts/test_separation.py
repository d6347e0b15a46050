import numpy as np
import pytest
import torch
from families import tiny, tokens

from sonde.concepts.separation import _of, separation
from sonde.errors import SondeError
from sonde.lm.model import LanguageModel


def planted(*, behaviour, letter, n=60, d=8):
    """Pairs whose activations are noise, plus one direction for the behaviour and one for the letter."""
    rng = np.random.default_rng(0)
    second = np.stack([np.arange(n) % 2, 1 - np.arange(n) % 2])
    values = rng.normal(size=(2, n, d))
    values[:, :, 0] += letter * second
    values[:, :, 1] += behaviour * np.array([[1], [0]])
    return torch.tensor(values), second


def test_a_planted_behaviour_is_seen_and_a_letter_is_not_taken_for_it():
    both = _of("here", *planted(behaviour=6, letter=12), seed=0)
    assert both.component_letter > 0.99
    assert both.behaviour.low > 0.95
    letter = _of("here", *planted(behaviour=0, letter=12), seed=0)
    assert letter.component_letter > 0.99
    assert letter.behaviour.contains(0.5)
    behaviour = _of("here", *planted(behaviour=12, letter=0), seed=0)
    assert behaviour.component_behaviour > 0.99 > behaviour.component_letter


def test_every_site_of_a_model_is_looked_at():
    lm = LanguageModel(tiny("gpt2"))
    start = tokens(12, 5).tolist()
    positive = [[*row, 5 + i % 2] for i, row in enumerate(start)]
    negative = [[*row, 6 - i % 2] for i, row in enumerate(start)]
    found = separation(lm, positive, negative)
    assert [one.site for one in found] == list(lm.match("resid_post.*"))
    assert all(one.points.shape == (24, 2) for one in found)


@pytest.mark.parametrize(
    ("positive", "negative", "message"),
    [
        ([[3, 5]] * 9, [[3, 6]] * 8, "9 positive and 8 negative prompts are not pairs"),
        ([[3, 5]] * 7, [[3, 6]] * 7, "7 pairs are too few"),
        ([[3, 5]] * 9, [[3, 6]] * 9, "letter and behaviour cannot be told apart"),
    ],
)
def test_pairs_that_cannot_tell_are_refused(positive, negative, message):
    with pytest.raises(SondeError, match=message):
        separation(LanguageModel(tiny("gpt2")), positive, negative)
