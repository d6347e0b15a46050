import json

import pytest
import torch
from families import FAMILIES, tiny, tokens

import sonde
from sonde.concepts.contrast import contrast
from sonde.concepts.state_steering import StateContrast, StateEdit, require_states, residual_alignment, state_contrast
from sonde.errors import SondeError
from sonde.lm.model import LanguageModel
from sonde.lm.state_algebra import canonical
from sonde.organisms.mode_recall import pairs

RECURRENT = [
    *("mamba", "mamba2", "falcon_mamba", "rwkv", "recurrent_gemma", "jamba", "falcon_h1", "bamba", "qwen3_next"),
    *("granitemoehybrid", "xlstm"),
]


@pytest.fixture(scope="module")
def rwkv():
    return LanguageModel(tiny("rwkv"), name="tiny")


def ragged(n, *, seed):
    return [row[: 8 - i % 3].tolist() for i, row in enumerate(tokens(n, 8, seed=seed))]


@pytest.mark.parametrize("family", RECURRENT)
def test_means_are_those_of_the_canonical_states_of_one_prompt_at_a_time(family):
    lm = LanguageModel(tiny(family))
    sides = ragged(4, seed=1), ragged(3, seed=2)
    made = state_contrast(lm, *sides, batch=2)
    assert made.layers
    for layer in made.layers:
        means = []
        for prompts in sides:
            states = []
            for ids in prompts:
                with lm.reading(f"state.{layer}") as acts:
                    lm(torch.tensor([ids]))
                states.append(canonical(acts[f"state.{layer}"])["recurrent"][0])
            means.append(torch.stack(states).mean(0))
        found = made.difference(layer)["recurrent"]
        torch.testing.assert_close(found, means[0] - means[1], rtol=1e-3, atol=1e-4 * float(means[0].abs().max()))


@pytest.mark.parametrize("family", RECURRENT)
def test_an_edit_of_strength_zero_is_none_and_of_one_acts(family):
    lm = LanguageModel(tiny(family))
    rows = tokens(2, 6, seed=3)
    made = state_contrast(lm, ragged(4, seed=1), ragged(4, seed=2))

    def after(strength):
        past = lm(rows, use_cache=True).past
        with lm.editing({f"state.{i}": StateEdit(made.difference(i), strength) for i in made.layers}):
            return lm(tokens(2, 2, seed=4), past=past).logits

    plain = lm(tokens(2, 2, seed=4), past=lm(rows, use_cache=True).past).logits
    torch.testing.assert_close(after(0.0), plain)
    assert float((after(1.0) - plain).abs().max()) > 1e-4


def test_heads_limit_the_edit(rwkv):
    lm = LanguageModel(tiny("mamba2"), name="tiny")
    made = state_contrast(lm, ragged(4, seed=1), ragged(4, seed=2))
    whole, part = made.difference(1)["recurrent"], made.difference(1, heads=[2])["recurrent"]
    assert torch.equal(part[2], whole[2])
    assert not part[[0, 1, 3]].any()
    with pytest.raises(SondeError, match="head 4 does not exist: there are 0 … 3"):
        made.difference(1, heads=[4])
    with pytest.raises(SondeError, match="layer 5 has no state in this contrast: it has layers 0, 1, 2"):
        made.difference(5)


def test_the_convolution_window_and_the_shift_are_options(rwkv):
    lm = LanguageModel(tiny("mamba2"))
    made = state_contrast(lm, ragged(4, seed=1), ragged(4, seed=2), parts=("recurrent", "conv"))
    assert set(made.difference(0)) == {"recurrent", "conv"}
    shifted = state_contrast(rwkv, ragged(4, seed=1), ragged(4, seed=2), parts=("shift",))
    assert set(shifted.difference(0)) == {"shift.mixer", "shift.mlp"}


def test_a_state_contrast_comes_back_and_another_models_is_refused(rwkv, tmp_path):
    made = state_contrast(rwkv, ragged(4, seed=1), ragged(4, seed=2))
    made.save(tmp_path)
    back = StateContrast.load(tmp_path, rwkv)
    assert back.layers == made.layers and (back.n_positive, back.n_negative) == (4, 4)
    for layer in made.layers:
        assert torch.equal(back.difference(layer)["recurrent"], made.difference(layer)["recurrent"])
    other = LanguageModel(tiny("rwkv", seed=1), name="other")
    with pytest.raises(SondeError, match="made from tiny, whose weights are not those of other"):
        StateContrast.load(tmp_path, other)
    assert StateContrast.load(tmp_path, other, force=True).model_name == "tiny"
    with pytest.raises(SondeError, match="has layer 2, other has 2 layers"):
        StateContrast.load(tmp_path, LanguageModel(tiny("rwkv", num_hidden_layers=2), name="other"), force=True)
    (tmp_path / "states.safetensors").write_bytes(b"no")
    with pytest.raises(SondeError, match="is damaged"):
        StateContrast.load(tmp_path, rwkv)
    (tmp_path / "states.safetensors").unlink()
    with pytest.raises(SondeError, match="a file is missing"):
        StateContrast.load(tmp_path, rwkv)
    made.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "format": "none"}))
    with pytest.raises(SondeError, match="is not the configuration of a state contrast"):
        StateContrast.load(tmp_path, rwkv)


def test_a_state_of_another_width_is_refused_where_it_is_added(rwkv):
    wide = LanguageModel(tiny("rwkv", hidden_size=64, attention_hidden_size=64), name="wide")
    made = state_contrast(rwkv, ragged(4, seed=1), ragged(4, seed=2))
    past = wide(tokens(1, 4), use_cache=True).past
    with (
        wide.editing({"state.1": made.edit(1)}),
        pytest.raises(SondeError, match=r"has shape \(32,\); this state takes \(64,\)"),
    ):
        wide(tokens(1, 1), past=past)


@pytest.mark.parametrize(
    ("family", "parts", "message"),
    [
        ("gpt2", ("recurrent",), r"model \(gpt2\) has no recurrent state to steer: it keeps kv"),
        ("lfm2", ("recurrent",), r"\(lfm2\) has no recurrent state to steer: it keeps conv, kv"),
        ("mamba", ("shift",), r"\(mamba\) has no shift state"),
        ("mamba", ("kv",), "no part 'kv' that can be steered"),
    ],
)
def test_a_family_without_the_state_is_refused(family, parts, message):
    with pytest.raises(SondeError, match=message):
        state_contrast(LanguageModel(tiny(family)), [[3, 4]], [[5, 6]], parts=parts)


def test_a_model_that_failed_its_self_check_is_refused(rwkv, monkeypatch):
    from dataclasses import replace

    check = replace(rwkv.check(), states={"recurrent": 1e-7})
    monkeypatch.setattr(type(rwkv), "check", lambda self: check)
    with pytest.raises(SondeError, match=r"failed the self-check for edits of state\.\*\.recurrent: .* no more than 1"):
        require_states(rwkv)
    check = replace(check, states={"recurrent": 1.0}, clone=0.5)
    with pytest.raises(SondeError, match="failed the self-check for state edits: a clone shares memory"):
        require_states(rwkv)


def test_bad_prompts_and_layers_are_refused(rwkv):
    with pytest.raises(SondeError, match="there are no negative prompts"):
        state_contrast(rwkv, [[3]], [])
    with pytest.raises(SondeError, match="leave the same states: every difference is zero"):
        state_contrast(rwkv, [[3, 4]], [[3, 4]])
    with pytest.raises(SondeError, match="layer 3 of tiny has no recurrent state: choose from 0, 1, 2"):
        state_contrast(rwkv, [[3, 4]], [[4, 3]], layers=[3])
    same = state_contrast(rwkv, [[3, 4], [5, 6]], [[4, 3], [6, 5]])
    same.negative[1] = same.positive[1]
    with pytest.raises(SondeError, match="do not differ at layer 1"):
        same.edit(1)
    rwkv.model.train()
    try:
        with pytest.raises(SondeError, match="is in training mode"):
            require_states(rwkv)
    finally:
        rwkv.model.eval()


def test_pads_to_the_right_are_refused_with_states(rwkv):
    mask = torch.tensor([[True, True, False], [True, True, True]])
    with pytest.raises(SondeError, match="pads to the right"):
        rwkv(tokens(2, 3), mask, use_cache=True)


def test_rows_of_a_memory_are_those_of_the_batch(rwkv):
    past = rwkv(tokens(2, 3), use_cache=True).past
    with pytest.raises(SondeError, match="the cache holds 2 rows, the tokens 3"):
        rwkv(tokens(3, 1), past=past)


def test_a_state_writes_the_steering_vector_behind_it_and_nothing_before():
    lm = sonde.load("organism:mode-recall-mamba2", check=False)
    day, night = pairs(32, seed=1)
    vectors = contrast(lm, day, night, sites="resid_post.*")
    states = state_contrast(lm, [row[:-1] for row in day], [row[:-1] for row in night])
    found = residual_alignment(lm, night, states, vectors)
    assert found.shape == (3, 3)
    assert float(found[1, 1]) > 0.8
    assert not found[2, :2].any() and not found[1, 0].any()


def test_every_recurrent_family_of_the_tests_is_covered():
    linear = {"gpt2", "gpt_neox", "gptj", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi", "opt"}
    linear |= {"bloom", "falcon", "olmo2", "cohere", "stablelm", "granite", "lfm2"}
    assert set(RECURRENT) == set(FAMILIES) - linear
