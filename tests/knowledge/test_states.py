import pytest
import torch
from families import model, tiny, tokens

import sonde
from sonde.errors import SondeError
from sonde.knowledge.states import States, answer_tokens, extract
from sonde.lm.model import LanguageModel

PROMPTS = [tokens(1, n, seed=i)[0].tolist() for i, n in enumerate((5, 7, 7, 6, 9))]
ANSWERS = [(10, 20), (11, 21), (12, 22), (13, 23), (10, 20)]
SOME = (
    "gpt_neox", "llama", "mistral", "gemma2", "opt", "bloom",
    "mamba", "mamba2", "rwkv", "recurrent_gemma", "jamba", "falcon_h1", "xlstm",
)  # fmt: skip


def naive(lm, prompts, answers):
    """One row at a time, prompt and answer whole, no cache."""
    last, pair, odds = [], [], []
    for ids, both in zip(prompts, answers, strict=True):
        after = []
        for answer in both:
            with lm.reading("resid_post.*", "logits") as acts:
                lm(torch.tensor([[*ids, answer]]))
            rows = torch.stack([acts[f"resid_post.{i}"][0] for i in range(lm.n_layers)])
            after.append(rows[:, -1])
        last.append(rows[:, -2])
        pair.append(torch.stack(after, 1))
        logits = acts["logits"][0, -2]
        odds.append(logits[both[1]] - logits[both[0]])
    return torch.stack(last), torch.stack(pair), torch.stack(odds)


def assert_same(states, lm, prompts, answers):
    last, pair, odds = naive(lm, prompts, answers)
    scale = pair.abs().max()
    torch.testing.assert_close(states.last / scale, last / scale, rtol=0, atol=2e-6)
    torch.testing.assert_close(states.pair / scale, pair / scale, rtol=0, atol=2e-6)
    torch.testing.assert_close(states.lm_log_odds, odds, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", SOME)
def test_batched_and_forked_states_are_those_of_whole_rows_one_at_a_time(family):
    lm = model(family)
    assert_same(extract(lm, PROMPTS, ANSWERS, batch=3), lm, PROMPTS, ANSWERS)


def test_a_family_that_cannot_be_continued_reads_prompt_and_answer_whole(monkeypatch):
    from dataclasses import replace

    from sonde.knowledge import states as module

    lm = model("llama")
    broken = replace(module.continuation(lm.model), mode="none")
    monkeypatch.setattr(module, "continuation", lambda _: broken)
    assert_same(extract(lm, PROMPTS, ANSWERS), lm, PROMPTS, ANSWERS)


def test_text_and_templates_with_answers_of_their_own():
    lm = sonde.load("organism:pebble")
    prompts = ["Is the wolf old? It is", "Was it far? It was", "He said that it was"]
    answers = [(" no", " yes"), (" not", " so"), (" no", " yes")]
    states = extract(lm, prompts, answers, sites=["resid_post.1", "mlp_out.5"])
    assert states.sites == ("resid_post.1", "mlp_out.5")
    assert states.last.shape == (3, 2, lm.d_model)
    ids = [lm.encode(prompt) for prompt in prompts]
    own = [tuple(lm.encode(answer)[0] for answer in both) for both in answers]
    _, _, odds = naive(lm, ids, own)
    torch.testing.assert_close(states.lm_log_odds, odds, rtol=1e-4, atol=1e-4)


def test_edits_in_force_are_read():
    lm = model("llama")
    with lm.editing({"resid_post.0": lambda h: 0 * h + 1}):
        states = extract(lm, PROMPTS, (10, 20))
    assert bool((states.last[:, 0] == 1).all())
    assert bool((states.pair[:, 0] == 1).all())


def test_half_precision_on_disk_returns_its_error_and_float32_none(tmp_path):
    lm = model("llama")
    states = extract(lm, PROMPTS, ANSWERS)
    states.pair[0, 1, 0] *= 1e6  # more than a half holds
    error = states.save(tmp_path / "half.safetensors")
    back = States.load(tmp_path / "half.safetensors", lm=lm)
    off = (back.pair - states.pair).norm(dim=-1) / states.pair.norm(dim=-1)
    last = (back.last - states.last).norm(dim=-1) / states.last.norm(dim=-1)
    assert 0 < error < 2**-11
    assert error == pytest.approx(float(torch.maximum(off.amax(), last.amax())), rel=1e-3)
    assert back.sites == states.sites
    assert torch.equal(back.lm_log_odds, states.lm_log_odds)
    assert states.save(tmp_path / "whole.safetensors", half=False) == 0.0
    whole = States.load(tmp_path / "whole.safetensors")
    assert torch.equal(whole.pair, states.pair)
    assert torch.equal(whole.last, states.last)
    assert (tmp_path / "half.safetensors").stat().st_size < 0.7 * (tmp_path / "whole.safetensors").stat().st_size
    with pytest.raises(SondeError, match=r"states of llama, whose weights are not those of gpt2"):
        States.load(tmp_path / "whole.safetensors", lm=model("gpt2"))


def test_rows_are_taken_and_joined():
    states = extract(model("llama"), PROMPTS, ANSWERS)
    joined = States.join([states[:2], states[torch.tensor([False, False, True, True, True])]])
    assert torch.equal(joined.pair, states.pair)
    assert torch.equal(states[[4, 0]].last, states.last[[4, 0]])
    other = extract(model("llama"), PROMPTS, ANSWERS, sites="mlp_out.*")
    with pytest.raises(SondeError, match=r"has resid_post.0 where these states have mlp_out.0"):
        States.join([states, other])


@pytest.mark.parametrize(
    ("prompts", "answers", "message"),
    [
        (["It is"], (" Nope sir", " yes"), r"are not one token each: \[' N', 'ope', ' sir'\] and \[' yes'\]"),
        (["It is"], (" yes", " yes"), r"begin with the same token: \[' yes'\] and \[' yes'\]"),
        (["It is"], [(" no", " yes")] * 2, "2 pairs of answers for 1 prompts"),
        (["It is"], [(" no", " yes", " so")], "3 answers: expected two"),
        (["It is", ""], (" no", " yes"), "prompt 1 is empty"),
        ([], (" no", " yes"), "no prompts"),
        (["It is " * 600], (" no", " yes"), r"prompt 0 has \d+ tokens, and .* reads \d+ with the answer: shorten it"),
    ],
)
def test_bad_prompts_and_answers_are_named(prompts, answers, message):
    with pytest.raises(SondeError, match=message):
        extract(sonde.load("organism:pebble"), prompts, answers)


def test_answers_that_begin_alike_are_named_with_their_tokens():
    lm = sonde.load("organism:pebble")
    with pytest.raises(SondeError, match="begin with the same token"):
        answer_tokens(lm, ["It is"], [lm.encode("It is")], (" No", " No sir"))


def test_sites_without_a_vector_or_of_several_widths_are_refused():
    lm = model("llama")
    with pytest.raises(SondeError, match=r"logits has no vector"):
        extract(lm, PROMPTS, ANSWERS, sites="logits")
    with pytest.raises(SondeError, match="made without a tokenizer"):
        extract(lm, PROMPTS, (" no", " yes"))


def test_states_that_are_not_finite_are_named_by_row_and_layer():
    lm = model("llama")

    def break_one(h):
        return torch.where(h[..., :1] == h[..., :1].max(), torch.nan, h) if h.shape[1] > 1 else h

    with (
        lm.editing({"resid_post.1": break_one}, rows=[0], positions=-1),
        pytest.raises(SondeError, match=r"row \d at resid_post.1 is not finite"),
    ):
        extract(lm, PROMPTS, ANSWERS)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(SondeError, match="states of shapes"):
        States(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), torch.zeros(2), ("a", "b", "c"))


def test_an_encoder_is_refused_where_it_is_wrapped():
    from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    with pytest.raises(SondeError, match="no unembedding"):
        LanguageModel(BertModel(BertConfig(vocab_size=20, **sizes)))
    small = T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    with pytest.raises(SondeError, match="encoder-decoder"):
        LanguageModel(T5ForConditionalGeneration(small))


def test_the_model_is_left_as_it_was():
    lm = LanguageModel(tiny("llama"))
    before = lm(tokens()).logits
    extract(lm, PROMPTS, ANSWERS)
    assert torch.equal(lm(tokens()).logits, before)
    assert not lm.structure.head._forward_pre_hooks
