"""The language model as a whole: what it says of itself, what it refuses, generation under edits."""

import pytest
import torch
from families import FAMILIES, model, tiny, tokens

from sonde.errors import SondeError
from sonde.lm.model import LanguageModel

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.mark.parametrize("family", FAMILIES)
def test_unembedding_the_last_block_gives_the_logits(family):
    lm, ids = model(family), tokens()
    with lm.reading(f"resid_post.{lm.n_layers - 1}", "logits") as acts:
        lm(ids)
    assert torch.allclose(lm.unembed(acts[f"resid_post.{lm.n_layers - 1}"]), acts["logits"], atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "bloom", "opt", "gemma3_text", "mamba2", "mamba"])
def test_left_padding_gives_the_logits_of_the_row_alone(family):
    lm = model(family)
    ids = tokens(batch=2, length=7)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, :3] = False
    padded = lm(ids, mask).logits
    assert torch.allclose(padded[0, 3:], lm(ids[:1, 3:]).logits[0], atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_right_padding_gives_the_logits_of_the_row_alone(family):
    lm = model(family)
    ids = tokens(batch=2, length=7)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, 4:] = False
    padded = lm(ids, mask).logits
    assert torch.allclose(padded[0, :4], lm(ids[:1, :4]).logits[0], atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_equals_generation_without_a_cache(family):
    lm = model(family)
    prompts = [[5, 9, 11, 30], [7, 8]]
    got = lm.generate(prompts, max_new_tokens=5)
    for prompt, new in zip(prompts, got, strict=True):
        ids = list(prompt)
        for _ in range(5):
            ids.append(int(lm(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == 2:
                ids.pop()
                break
        assert new == ids[len(prompt) :]


@pytest.mark.parametrize("family", ["llama", "gpt2", "mamba2", "rwkv", "mamba", "jamba"])
def test_an_edit_from_the_prompts_end_on_acts_with_a_cache_as_without(family):
    lm = model(family)
    vector = torch.linspace(-3, 3, lm.d_model)
    edit = {"resid_post.1": lambda h: h + vector}
    prompts = [[5, 9, 11, 30], [7, 8]]
    with lm.editing(edit, positions=slice(-1, None)):
        got = lm.generate(prompts, max_new_tokens=4)
    assert got != lm.generate(prompts, max_new_tokens=4)
    for prompt, new in zip(prompts, got, strict=True):
        ids = list(prompt)
        for _ in range(4):
            with lm.editing(edit, positions=slice(len(prompt) - 1, None)):
                ids.append(int(lm(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == 2:
                ids.pop()
                break
        assert new == ids[len(prompt) :]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_suffix_run_from_the_cache_gives_the_logits_and_activations_of_the_whole_run(family):
    lm, ids = model(family), tokens(batch=2, length=9)
    with lm.reading("resid_post.1", "logits") as whole:
        lm(ids)
    for cut in (8, 5):
        past = lm(ids[:, :cut], use_cache=True).past
        with lm.reading("resid_post.1", "logits") as part:
            out = lm(ids[:, cut:], past=past)
        assert torch.allclose(out.logits, whole["logits"][:, cut:], atol=2e-4), cut
        assert torch.allclose(part["resid_post.1"], whole["resid_post.1"][:, cut:], atol=2e-4), cut


def test_rwkv_is_read_with_the_weights_it_was_trained_with_even_after_it_rescaled_them():
    model, ids = tiny("rwkv"), tokens()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    logits = model(input_ids=ids).logits
    assert any(not torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    lm = LanguageModel(model)
    assert (lm(ids).logits - logits).abs().max() < 1e-3 * logits.abs().max()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_sampling_repeats_with_the_same_seed():
    lm = LanguageModel(tiny("llama"))
    first = lm.generate([[5, 9]], max_new_tokens=8, temperature=1.0, seed=1)
    assert first == lm.generate([[5, 9]], max_new_tokens=8, temperature=1.0, seed=1)
    assert first != lm.generate([[5, 9]], max_new_tokens=8, temperature=1.0, seed=2)


def test_generation_while_reading_says_what_to_do():
    lm = LanguageModel(tiny("llama"))
    with lm.reading("resid_post.0"), pytest.raises(SondeError, match=r"read activations with lm\(tokens\)"):
        lm.generate([[5, 9]], max_new_tokens=2)


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (torch.tensor([[1, 97]]), None, "token id 97 is outside the vocabulary of 97"),
        (torch.tensor([[-1, 5]]), None, "token id -1 is outside"),
        (torch.tensor([1, 2]), None, "shape"),
        (torch.tensor([[1.0, 2.0]]), None, "float"),
        (torch.tensor([[1, 2]]), torch.ones(1, 3, dtype=torch.bool), "the mask has shape"),
        (torch.ones(1, 200, dtype=torch.long), None, "200 tokens are more than the 128 positions"),
    ],
)
def test_bad_tokens_get_one_clear_line(ids, mask, message):
    with pytest.raises(SondeError, match=message):
        LanguageModel(tiny("gpt2"), name="gpt2")(ids, mask)


def test_text_without_a_tokenizer_is_refused():
    with pytest.raises(SondeError, match="without a tokenizer"):
        LanguageModel(tiny("gpt2"), name="bare")("some text")


def test_the_hash_depends_on_the_weights_alone():
    one, two = LanguageModel(tiny("gpt2"), name="a"), LanguageModel(tiny("gpt2"), name="b")
    assert one.hash == two.hash
    two.model.get_input_embeddings().weight.data[0, 0] += 1
    assert LanguageModel(two.model).hash != one.hash
