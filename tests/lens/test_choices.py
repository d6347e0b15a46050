"""Scores of choices at every layer: equal to reading each choice alone, whatever the batch; pads enter nothing."""

import pytest
import torch
from families import tiny

from sonde.data.multiple_choice import Prompt
from sonde.errors import SondeError
from sonde.files import load_bundle, save_bundle
from sonde.lens.choices import ChoiceScores, choice_scores
from sonde.lens.tuned import TunedLens
from sonde.lm.model import LanguageModel

PROMPTS = [
    Prompt("Is this the statement?", (" no", " yes, it is a statement"), 0),
    Prompt("A much longer question, about modules and classes. Is this the statement?", (" no", " yes"), 1),
    Prompt("Which?", (" one of the first", " two", " one of the last"), 2),
]


@pytest.fixture(scope="module")
def lens(lens_lm):
    made = TunedLens.zeros(lens_lm)
    with torch.no_grad():
        made.weight.normal_(std=0.1)
        made.bias.normal_(std=0.1)
    return made


@pytest.fixture(scope="module")
def scores(lens_lm, lens):
    lenses = {"tuned": lens, "logit": TunedLens.logit(lens_lm)}
    return choice_scores(lens_lm, PROMPTS, lenses, keep_states=True)


@torch.no_grad()
def alone(lm, lens, prompt, choice):
    """Summed log-probabilities of one choice by layer, from a pass over it alone."""
    before, ids = lm.encode(prompt.text), lm.encode(prompt.text + choice)
    assert ids[: len(before)] == before
    with lm.reading(*lens.sites, "logits") as acts:
        lm(torch.tensor([ids]))
    rows = [lens(acts[site][0], layer) for layer, site in enumerate(lens.sites)] + [acts["logits"][0]]
    places = range(len(before), len(ids))
    return torch.stack([sum(row.double().log_softmax(-1)[i - 1, ids[i]] for i in places) for row in rows])


@pytest.mark.parametrize("family", ["gpt_neox", "mamba2", "rwkv", "gemma2", "recurrent_gemma"])
def test_a_choice_scores_as_it_does_alone_in_every_family(family, lens_lm):
    lm = LanguageModel(tiny(family, vocab_size=400), lens_lm.tokenizer, name=family)
    lens = TunedLens.logit(lm)
    found = choice_scores(lm, PROMPTS)["lens"]
    for number, prompt in enumerate(PROMPTS):
        for place, choice in enumerate(prompt.choices):
            torch.testing.assert_close(
                found.log_probs[:, number, place].double(), alone(lm, lens, prompt, choice), atol=2e-4, rtol=1e-4
            )


def test_a_tuned_lens_reads_at_every_layer_what_it_reads_alone(lens_lm, lens, scores):
    for number, prompt in enumerate(PROMPTS):
        for place, choice in enumerate(prompt.choices):
            torch.testing.assert_close(
                scores["tuned"].log_probs[:, number, place].double(),
                alone(lens_lm, lens, prompt, choice),
                atol=1e-4,
                rtol=1e-4,
            )
    torch.testing.assert_close(scores["tuned"].log_probs[-1], scores["logit"].log_probs[-1], rtol=0, atol=0)


@pytest.mark.parametrize("tokens_per_batch", [1, 40, 1000])
def test_pads_enter_nothing(tokens_per_batch, lens_lm, lens, scores):
    found = choice_scores(lens_lm, PROMPTS, lens, keep_states=True, tokens_per_batch=tokens_per_batch)["lens"]
    torch.testing.assert_close(found.log_probs, scores["tuned"].log_probs, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.states, scores["tuned"].states, atol=1e-5, rtol=1e-4)


def test_states_are_means_over_the_prompt_and_not_over_its_choices(lens_lm, scores):
    for number, prompt in enumerate(PROMPTS):
        with torch.no_grad(), lens_lm.reading("resid_pre.*", "resid_post.2") as acts:
            lens_lm(prompt.text)
        expected = torch.stack([value[0].mean(0) for value in acts.values()])
        torch.testing.assert_close(scores["logit"].states[:, number], expected, atol=1e-5, rtol=1e-4)


def test_choices_of_one_token_cost_one_row(lens_lm, monkeypatch):
    single = [token for token in (" a", " the", " is", " in") if len(lens_lm.encode(token)) == 1]
    rows = []
    call = LanguageModel.__call__
    monkeypatch.setattr(
        LanguageModel, "__call__", lambda lm, tokens, *rest: rows.append(len(tokens)) or call(lm, tokens, *rest)
    )
    choice_scores(lens_lm, [Prompt(f"Number {n}:", tuple(single), 0) for n in range(5)])
    assert len(single) > 2 and sum(rows) == 5


def test_a_question_with_fewer_choices_never_answers_with_an_absent_one(scores):
    made = scores["tuned"]
    assert made.counts.tolist() == [2, 2, 3] and made.correct.tolist() == [0, 1, 2]
    assert (made.log_probs[:, :2, 2] == -torch.inf).all()
    assert (made.answers[:, :2] < 2).all()
    with pytest.raises(SondeError, match="2 to 3 choices, and a matrix takes as many of each"):
        _ = made.table
    assert made[:2].log_probs.shape == (4, 2, 3) and len(made[:2]) == 2


def test_scores_survive_a_file(scores, tmp_path):
    save_bundle(tmp_path / "scores", scores["tuned"].state())
    found = ChoiceScores.from_state(load_bundle(tmp_path / "scores"))
    assert found.rows == scores["tuned"].rows == ("resid_pre.0", "resid_pre.1", "resid_pre.2", "output")
    for name in ("log_probs", "counts", "correct", "states"):
        assert torch.equal(getattr(found, name), getattr(scores["tuned"], name))


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "there is no prompt to score"),
        ([Prompt("Is it?", (" no", ""), 0)], "prompt 0 has no token for the choice ''"),
        ([Prompt("", (" no", " yes"), 0)], "prompt 0 has nothing before its choices"),
        ([Prompt("word " * 200, (" no", " yes"), 0)], "prompt 0 takes .* tokens, more than the 128 positions of tiny"),
    ],
    ids=["none", "empty choice", "empty prompt", "too long"],
)
def test_prompts_that_cannot_be_scored_are_refused(prompts, message, lens_lm):
    with pytest.raises(SondeError, match=message):
        choice_scores(lens_lm, prompts)


def test_lenses_of_other_sites_or_models_are_refused(lens_lm, lens):
    with pytest.raises(SondeError, match="must read the same sites"):
        choice_scores(lens_lm, PROMPTS, {"a": lens, "b": TunedLens.logit(lens_lm, sites=["mlp_out.*"])})
    wide = LanguageModel(tiny("gpt_neox", vocab_size=400, hidden_size=64), lens_lm.tokenizer)
    with pytest.raises(SondeError, match="has width 32"):
        choice_scores(wide, PROMPTS, lens)


def test_log_probabilities_that_are_not_finite_are_refused(lens_lm):
    broken = LanguageModel(tiny("gpt_neox", vocab_size=400), lens_lm.tokenizer)
    with torch.no_grad():
        broken.unembedding.weight[3] = torch.nan
    with pytest.raises(SondeError, match="are not finite: load the model in float32"):
        choice_scores(broken, PROMPTS)
