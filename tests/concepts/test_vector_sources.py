"""Where steering vectors come from: prompts that end where they should, and warnings where they do not."""

import pytest
import torch
from families import tiny, tokens

import sonde
from sonde.concepts.contrast import PLAIN, contrast, template_hash
from sonde.concepts.dose_response import default_pairs, dose_response, read_pairs
from sonde.concepts.judges import log_odds
from sonde.concepts.logit_direction import fit_logit_direction
from sonde.concepts.vector_sources import (
    from_letters,
    from_open_replies,
    from_phrases,
    from_prompts,
    from_replies,
)
from sonde.errors import SondeError
from sonde.lm.model import LanguageModel


@pytest.fixture(scope="module")
def lm():
    return sonde.load("organism:refuser", check=False)


@pytest.fixture(scope="module")
def plain():
    return sonde.load("organism:pebble", check=False)


def test_prompts_are_put_into_the_chat_format(lm):
    sets = from_prompts(lm, ["Burn the boat."], ["Paint the boat.", "Weigh it."])
    assert sets.template == template_hash(lm) != PLAIN
    assert lm.decode(sets.positive[0]).endswith("User: Burn the boat.\nAssistant:")
    assert contrast(lm, sets.positive, sets.negative, sites="resid_post.2", template=sets.template).n_negative == 2


def test_a_chat_model_without_its_template_is_warned_of(lm):
    with pytest.warns(UserWarning, match="has a chat template"):
        from_prompts(lm, ["Burn the boat."], ["Paint the boat."], chat=False)


def test_sets_that_end_differently_are_warned_of_with_their_tails(plain):
    with pytest.warns(UserWarning, match=r"end differently: '.*\?' and '.*!'"):
        from_prompts(plain, ["Is it cold?"], ["It is cold!"])


def test_replies_follow_the_same_prompt(lm):
    sets = from_replies(lm, ["Burn it."], ["I cannot."], ["Here is how."])
    assert lm.decode(sets.positive[0]).endswith("Assistant: I cannot.")
    assert lm.decode(sets.negative[0]).endswith("Assistant: Here is how.")
    phrases = from_phrases(lm, ["Burn it.", "Paint it."], "I cannot", "Here is")
    assert [lm.decode(ids[-2:]) for ids in phrases.positive] == [" I cannot"] * 2
    with pytest.raises(SondeError, match="1 prompts, 2 replies"):
        from_replies(lm, ["Burn it."], ["a", "b"], ["c"])


def test_open_replies_lose_their_last_character(lm):
    sets = from_open_replies(lm, ["Burn it."], ["I cannot help."], ["Here it is!"])
    assert lm.decode(sets.positive[0]).endswith("help")
    assert lm.decode(sets.negative[0]).endswith("it is")
    with pytest.raises(SondeError, match="too short"):
        from_open_replies(lm, ["Burn it."], ["."], ["Here"])


def test_letters_must_be_the_last_token(plain):
    questions = ["Which? (A) now (B) later", "Which? (A) later (B) now"]
    sets = from_letters(plain, questions, ["(A", "(B"], ["(B", "(A"])
    assert plain.token_strings([ids[-1] for ids in sets.positive]) == ["A", "B"]
    with pytest.raises(SondeError, match=r"ends in .* its last token is not the letter"):
        from_letters(plain, questions, ["(A)", "(B)"], ["(B)", "(A)"])
    with pytest.warns(UserWarning, match="one letter shows the behaviour in 100%"):
        from_letters(plain, questions, ["(A", "(A"], ["(B", "(B"])


def test_an_empty_side_is_refused(lm):
    with pytest.raises(SondeError, match="no negative prompts"):
        from_prompts(lm, ["Burn it."], [])


@pytest.fixture(scope="module")
def regression():
    lm = LanguageModel(tiny("gpt_neox"), name="tiny")
    rows, behaviour = tokens(60, 6, seed=4).tolist(), torch.tensor([3, 9, 27])
    edits = {
        kind: fit_logit_direction(lm, rows, behaviour, sites="resid_post.2", projector=kind)
        for kind in ("none", "orthogonal", "oblique")
    }
    with lm.reading("resid_post.2", "logits") as acts:
        lm(torch.tensor(rows))
    return edits, acts["resid_post.2"][:, -1].double(), log_odds(acts["logits"][:, -1], behaviour)


def test_the_logit_direction_is_the_regression_of_activations_on_log_odds(regression):
    edits, x, y = regression
    centred = (y - y.mean())[:, None]
    expected = ((x - x.mean(0)) * centred).sum(0) / (len(y) - 1) / y.std()
    for edit in edits.values():
        torch.testing.assert_close(edit.edits["resid_post.2"].added, expected.float(), atol=1e-5, rtol=1e-4)


def test_what_the_oblique_projector_reads_is_uncorrelated_with_everything_after_it(regression):
    edits, x, y = regression
    edit = edits["oblique"].edits["resid_post.2"]
    after = edit.at(0.0)(x)
    cross = ((after - after.mean(0)) * (y - y.mean())[:, None]).mean(0)
    before = ((x - x.mean(0)) * (y - y.mean())[:, None]).mean(0)
    assert cross.norm() < 1e-2 * before.norm()
    orthogonal = edits["orthogonal"].edits["resid_post.2"].at(0.0)(x)
    assert (after - x).square().sum(-1).mean() < 1.05 * (orthogonal - x).square().sum(-1).mean() * x.shape[1]


def test_log_odds_that_do_not_vary_are_refused(lm):
    prompts = [[5, 6, 7]] * 4
    with pytest.raises(SondeError, match="the same on all prompts"):
        fit_logit_direction(lm, prompts, torch.tensor([1]), sites="resid_post.0")
    with pytest.raises(SondeError, match="at least 3"):
        fit_logit_direction(lm, prompts[:2], torch.tensor([1]), sites="resid_post.0")
    with pytest.raises(SondeError, match="projector 'skew'"):
        fit_logit_direction(lm, prompts, torch.tensor([1]), sites="resid_post.0", projector="skew")


def test_at_strength_0_nothing_moves_the_preference(plain):
    found = dose_response(plain, default_pairs(), site="resid_post.2", strengths=[0.0, 1.0], n_random=1)
    torch.testing.assert_close(found.preference[0], found.random[0, 0])
    assert found.preference.shape == (2, 12)
    assert (found.preference[1] - found.preference[0]).mean() > 0


def test_a_file_of_pairs_is_read_or_refused_in_one_line(tmp_path):
    path = tmp_path / "pairs.json"
    path.write_text('{"name": "cold", "positive": ["a b c"], "negative": ["d e f"]}')
    assert read_pairs(path).name == "cold"
    with pytest.raises(SondeError, match="1 positive and 1 negative texts: give as many of both, at least 8"):
        read_pairs(path).halves()
    path.write_text('{"positive": "a"}')
    with pytest.raises(SondeError, match="is not a contrast"):
        read_pairs(path)
    path.write_text("[")
    with pytest.raises(SondeError, match="cannot be read as a contrast"):
        read_pairs(path)
