"""Cards of latents of which it is known where they fire and what they write."""

from types import SimpleNamespace
from typing import Any

import families
import numpy as np
import pytest
import torch
from latent_worlds import planted

from sonde.errors import SondeError
from sonde.features.cards import STRONGEST, feature_cards
from sonde.features.latent_cache import LatentCache
from sonde.features.logit_effects import logit_effects
from sonde.lm.model import LanguageModel

SETS = [(3, 5), (9,), (3, 5, 11), ()]
RECORD = {
    "status": "scored",
    "reason": "",
    "explanation": "fires on three and five",
    "measures": {
        "detection": {
            "main": "balanced_accuracy",
            "values": {
                "balanced_accuracy": {"estimate": 0.9, "low": 0.8, "high": 0.95, "n": 100, "chance": 0.5},
                "f1": {"estimate": 0.9, "low": 0.8, "high": 0.95, "n": 100},
                "auc": {"estimate": None, "reason": "no probabilities"},
            },
        }
    },
}


# A model of no text: tokens are called by their numbers.
WORDED: Any = SimpleNamespace(d_model=8, token_strings=lambda ids: [f"<{i}>" for i in ids])


@pytest.fixture(scope="module")
def cards(tmp_path_factory):
    cache = planted(tmp_path_factory.mktemp("cache"), SETS)
    rows = torch.eye(4, 6)
    rows[2] = rows[0] + 0.5 * rows[1]
    return feature_cards(WORDED, cache, "planted", directions=rows, records={0: RECORD}, left_out="not asked")


def test_a_card_counts_and_shows_where_a_latent_fires(cards):
    first = cards[0]
    assert first.fires / first.tokens == pytest.approx(0.01, rel=0.2)
    assert dict(first.facts)["Kind"] == "few tokens"
    assert "single-token" in dict(cards[1].facts)["Kind"]
    for window in first.windows:
        for token, activation in zip(window.tokens, window.activations, strict=True):
            assert (activation > 0) == (token in ("<3>", "<5>"))
    assert sum(first.strengths) == first.fires


def test_the_strongest_windows_come_first_and_every_tenth_is_shown(cards):
    tops = [max(window.activations) for window in cards[0].windows]
    assert tops[0] == cards[0].largest and tops == sorted(tops, reverse=True)
    assert [window.quantile for window in cards[0].windows] == [10] * STRONGEST + list(range(9, 0, -1))


def test_neighbours_are_those_that_write_alike_and_fire_together(cards):
    for nearness in cards[0].near.values():
        assert nearness[0][0] == 2
    assert cards[0].near["decoder cosine"][0][1] == pytest.approx(1 / np.sqrt(1.25))
    assert cards[0].near["firing together (Jaccard)"][0][1] == 0 or len(cards[0].near) == 2


def test_a_latent_that_never_fires_and_one_that_was_not_asked_about_say_so(cards):
    assert (cards[3].status, cards[3].windows, cards[3].largest) == ("never fired", (), None)
    assert (cards[1].status, cards[1].reason) == ("fires", "not asked")


def test_scores_of_a_run_are_taken_over_and_what_could_not_be_had_is_left_out(cards):
    assert cards[0].explanation == "fires on three and five"
    assert [(score.measure, score.main) for score in cards[0].scores] == [("balanced accuracy", True), ("F1", False)]
    assert cards[0].scores[0].chance == 0.5


def test_only_latents_that_are_to_be_shown_have_windows(tmp_path):
    cache = planted(tmp_path, SETS)
    cards = feature_cards(WORDED, cache, "planted", shown=[1])
    assert [bool(card.windows) for card in cards] == [False, True, False, False]
    assert all(card.largest for card in cards[:3])
    assert list(cards[1].near) == ["firing together (Jaccard)"]


def test_a_window_fits_a_context_that_32_does_not_divide(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 9, (40, 50))
    sequence, position = (tokens == 3).nonzero()
    triples = sequence, position, np.zeros_like(sequence), np.ones(len(sequence))
    cache = LatentCache.write(tmp_path, tokens, {"one": (1, triples)})
    (card,) = feature_cards(WORDED, cache, "one")
    assert len(card.windows[0].tokens) == 25 and not card.near


def test_a_hookpoint_that_is_not_there_is_named(tmp_path):
    with pytest.raises(SondeError, match="no hookpoint 'other'"):
        feature_cards(WORDED, planted(tmp_path, SETS), "other")


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "mamba2"])
def test_the_direction_of_a_token_promotes_it_through_the_final_norm(family):
    lm = LanguageModel(families.tiny(family))
    norm = lm.unembedding.norm
    assert norm is not None
    gain: Any = norm.weight
    weight, gain = lm.unembedding.weight.detach().float(), gain.detach().float()
    rows = torch.linalg.lstsq(weight * gain, torch.eye(len(weight))[:, :1]).solution.T  # logit of token 0 alone
    found = logit_effects(lm, torch.cat([rows, -rows]), kept=5)
    normed = lm.unembedding.normed(torch.cat([rows, -rows])[None] * 1e6) - lm.unembedding.normed(
        torch.zeros(1, 1, rows.shape[1])
    )
    expected = normed[0] @ weight.T * lm.unembedding.scale
    torch.testing.assert_close(found.up, expected.topk(5).values, rtol=1e-3, atol=1e-3)
    assert found.promoted[0, 0] == 0 and found.suppressed[1, 0] == 0
    assert (found.up[:, 0] > 0).all() and (found.down[:, 0] < 0).all()


def test_the_length_of_a_direction_does_not_matter():
    lm = LanguageModel(families.tiny("llama"))
    rows = torch.randn(3, lm.d_model, generator=torch.Generator().manual_seed(0))
    one, other = logit_effects(lm, rows), logit_effects(lm, 100 * rows)
    assert torch.equal(one.promoted, other.promoted)
    torch.testing.assert_close(one.up, other.up)


def test_a_direction_of_another_width_is_refused():
    lm = LanguageModel(families.tiny("llama"))
    with pytest.raises(ValueError, match="has width 32"):
        logit_effects(lm, torch.zeros(2, 5))
