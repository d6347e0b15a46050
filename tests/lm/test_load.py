"""Loading: every bad folder gets one clear line, and nothing that could lie is loaded."""

import json
import os

import pytest
import torch
from families import tiny
from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

from sonde.errors import SondeError
from sonde.lm.load import load


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "model"
    tiny("gpt_neox").save_pretrained(path)
    return path


def test_a_saved_model_loads_as_it_was(folder):
    lm = load(folder)
    ids = torch.arange(3, 11)[None]
    with torch.no_grad():
        assert torch.allclose(lm(ids).logits, tiny("gpt_neox")(input_ids=ids).logits, atol=1e-5)
    assert lm.name == str(folder)
    assert lm.tokenizer is None


def test_half_precision_files_are_computed_in_float32_on_a_cpu(folder):
    tiny("gpt_neox").half().save_pretrained(folder)
    assert load(folder).dtype == torch.float32
    assert load(folder, dtype="bfloat16").dtype == torch.bfloat16


def test_a_missing_path_is_said_to_be_missing(tmp_path):
    with pytest.raises(SondeError, match="nothing-here does not exist"):
        load(tmp_path / "nothing-here")


def test_a_name_that_is_neither_folder_nor_on_the_hub_is_one_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SondeError, match="not-a-model is not a folder here, and it could not be had") as caught:
        load("not-a-model")
    assert "\n" not in str(caught.value)


def test_a_file_is_not_a_model(folder):
    with pytest.raises(SondeError, match="is a file; give the folder"):
        load(folder / "config.json")


def test_a_folder_without_config_is_refused(tmp_path):
    with pytest.raises(SondeError, match=r"has no config\.json"):
        load(tmp_path)


def test_a_config_that_is_not_json_is_refused(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(SondeError, match=r"config\.json cannot be used"):
        load(folder)


def test_an_unknown_architecture_is_refused(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "martian"}))
    with pytest.raises(SondeError, match="martian"):
        load(folder)


@pytest.mark.parametrize("keep", [100, 3000])
def test_a_truncated_safetensors_file_is_refused(folder, keep):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(SondeError, match=r"damaged|could not be loaded"):
        load(folder)


def test_a_folder_without_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(SondeError, match="has no weights"):
        load(folder)


def test_a_pickle_is_read_only_if_the_user_insists(folder):
    state = tiny("gpt_neox").state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(SondeError, match="only as a pickle"):
        load(folder)
    assert load(folder, allow_pickle=True).n_layers == 3


def test_weights_that_would_be_random_are_refused(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights.pop("gpt_neox.final_layer_norm.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SondeError, match=r"lacks or misfits gpt_neox\.final_layer_norm\.weight"):
        load(folder)


def test_an_encoder_is_refused(tmp_path):
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertForMaskedLM(config).save_pretrained(tmp_path)
    with pytest.raises(SondeError, match="is not a causal language model"):
        load(tmp_path)


def test_an_encoder_decoder_is_refused(tmp_path):
    config = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(SondeError, match="encoder-decoder"):
        load(tmp_path)


def test_unknown_devices_and_number_types_are_refused(folder):
    with pytest.raises(SondeError, match="dtype 'float8' is unknown"):
        load(folder, dtype="float8")
    with pytest.raises(SondeError, match="is not a device"):
        load(folder, device="gpu0")
    if not torch.cuda.is_available():
        with pytest.raises(SondeError, match="no CUDA device"):
            load(folder, device="cuda")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_refused(folder):
    (folder / "model.safetensors").chmod(0)
    with pytest.raises(SondeError):
        load(folder)


def test_rwkv_is_loaded_without_the_rescaling_that_changes_its_weights(tmp_path):
    tiny("rwkv").save_pretrained(tmp_path)
    lm = load(tmp_path)
    before = lm.hash
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        logits = lm(ids).logits
        never_rescaled = tiny("rwkv", rescale_every=0)(input_ids=ids).logits
        rescaled = tiny("rwkv")(input_ids=ids).logits
    del lm.__dict__["hash"]
    assert lm.hash == before
    assert torch.allclose(logits, never_rescaled, atol=1e-5)
    # rescaling changes logits only through the epsilon of the norms
    assert (logits - rescaled).abs().max() < 1e-3 * rescaled.abs().max()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_gives_the_logits_of_the_cpu(folder):
    ids = torch.arange(3, 11)[None]
    with torch.no_grad():
        there = load(folder, device="cuda", dtype="float32")(ids).logits.cpu()
        assert torch.allclose(there, load(folder)(ids).logits, atol=1e-3)
