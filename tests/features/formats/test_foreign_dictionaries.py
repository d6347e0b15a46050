"""Files as each project writes them, written here by hand; the answer is each project's formula in float64."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sonde.errors import SondeError
from sonde.features.crosscoder import crosscoder
from sonde.features.design import Design
from sonde.features.dictionary import Dictionary
from sonde.features.formats import saelens, sparsify
from sonde.features.formats.detection import detected, load_dictionaries, load_dictionary
from sonde.features.formats.hooks import lens_hook, site_of

D, M, K = 12, 48, 5
pytestmark = pytest.mark.usefixtures("no_grad")


def normal(*shape):
    return torch.randn(*shape)


def weights(outputs=D):
    """W_enc M x d, b_enc, W_dec M x d, b_dec, W_skip."""
    return normal(M, D) / 3, normal(M) / 3, normal(M, outputs), normal(outputs), normal(outputs, D)


def dense(dictionary, x):
    """All latents of every row."""
    sparse = dictionary.encode(x)
    out = torch.zeros(*x.shape[:-1], dictionary.design.latents)
    return out.scatter_add(-1, sparse.indices, sparse.values)


def top_k(pre, k=K):
    values, indices = pre.relu().topk(k, dim=-1)
    return torch.zeros_like(pre).scatter(-1, indices, values)


def agree(dictionary, x, latents, output):
    torch.testing.assert_close(dense(dictionary, x), latents, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(dictionary(x), output, atol=1e-5, rtol=1e-5)


def write_sparsify(folder, tensors, **config):
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"d_in": D, "expansion_factor": M // D, "k": K} | config))
    return folder


def write_saelens(folder, tensors, **config):
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"d_in": D, "d_sae": M, "dtype": "float32"} | config))
    return folder


def sparsify_tensors(w_enc, b_enc, w_dec, b_dec):
    return {"encoder.weight": w_enc, "encoder.bias": b_enc, "W_dec": w_dec, "b_dec": b_dec}


def lens_tensors(w_enc, b_enc, w_dec, b_dec):
    return {"W_enc": w_enc.T, "b_enc": b_enc, "W_dec": w_dec, "b_dec": b_dec}


# sparsify


@pytest.mark.parametrize("old", [False, True])
def test_sparsify_is_read_by_its_formula_old_files_too(tmp_path, old):
    w_enc, b_enc, w_dec, b_dec, _ = weights()
    extra = {"signed": False, "normalize_decoder": True} if old else {"activation": "topk", "num_latents": M}
    write_sparsify(tmp_path / "layers.3.mlp", sparsify_tensors(w_enc, b_enc, w_dec, b_dec), **extra)
    (tmp_path / "config.json").write_text(json.dumps({"model": "EleutherAI/pythia-70m"}))
    dictionary = load_dictionary(tmp_path / "layers.3.mlp")
    x = normal(7, 3, D)
    f = top_k((x - b_dec) @ w_enc.T + b_enc)
    agree(dictionary, x, f, f @ w_dec + b_dec)
    assert (dictionary.site, dictionary.target, dictionary.model) == ("mlp_out.3", None, "EleutherAI/pythia-70m")
    assert dictionary.facts == {"format": "sparsify", "name": "layers.3.mlp", "hook": "layers.3.mlp"}


def test_groupmax_of_sparsify_keeps_the_largest_of_each_group(tmp_path):
    w_enc, b_enc, w_dec, b_dec, _ = weights()
    folder = write_sparsify(tmp_path, sparsify_tensors(w_enc, b_enc, w_dec, b_dec), activation="groupmax", k=6)
    x = normal(9, D)
    pre = ((x - b_dec) @ w_enc.T + b_enc).relu().unflatten(-1, (6, -1))
    f = torch.where(pre == pre.amax(-1, keepdim=True), pre, 0).flatten(-2)
    agree(load_dictionary(folder), x, f, f @ w_dec + b_dec)


def test_a_skip_transcoder_of_sparsify_subtracts_nothing_and_adds_the_skip(tmp_path):
    w_enc, b_enc, w_dec, b_dec, w_skip = weights()
    tensors = sparsify_tensors(w_enc, b_enc, w_dec, b_dec) | {"W_skip": w_skip}
    folder = write_sparsify(tmp_path / "layers.1.mlp", tensors, transcode=True, skip_connection=True)
    dictionary = load_dictionary(folder)
    x = normal(9, D)
    f = top_k(x @ w_enc.T + b_enc)
    agree(dictionary, x, f, f @ w_dec + b_dec + x @ w_skip.T)
    assert (dictionary.site, dictionary.target) == ("mlp_in.1", "mlp_out.1")


def test_all_hookpoints_of_a_run_are_read_in_order(tmp_path):
    for name in ("layers.10", "layers.9", "embed_in"):
        write_sparsify(tmp_path / name, sparsify_tensors(*weights()[:4]))
    found = load_dictionaries(tmp_path)
    assert list(found) == ["embed_in", "layers.9", "layers.10"]
    assert [d.site for d in found.values()] == ["embed", "resid_post.9", "resid_post.10"]
    with pytest.raises(SondeError, match="no dictionary in any folder"):
        load_dictionaries(tmp_path / "layers.10" / "nothing")


# SAELens


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("centred", [False, True])
def test_topk_of_saelens_is_read_by_new_and_old_keys(tmp_path, old, centred):
    w_enc, b_enc, w_dec, b_dec, _ = weights()
    new_keys = {
        "architecture": "topk",
        "k": K,
        "metadata": {"sae_lens_version": "6.5", "hook_name": "blocks.2.hook_mlp_out"},
    }
    old_keys = {
        "architecture": "standard",
        "hook_point": "blocks.2.hook_mlp_out",
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": K},
        "normalize_activations": False,
    }
    keys = (old_keys if old else new_keys) | {"apply_b_dec_to_input": centred}
    folder = write_saelens(tmp_path, lens_tensors(w_enc, b_enc, w_dec, b_dec), **keys)
    dictionary = load_dictionary(folder)
    x = normal(9, D)
    f = top_k((x - b_dec * centred) @ w_enc.T + b_enc)
    agree(dictionary, x, f, f @ w_dec + b_dec)
    assert dictionary.design.kind == "topk" and dictionary.site == "mlp_out.2"


def test_saelens_ranked_by_decoder_norms_gives_saelens_own_numbers(tmp_path):
    w_enc, b_enc, w_dec, b_dec, _ = weights()
    folder = write_saelens(
        tmp_path, lens_tensors(w_enc, b_enc, w_dec, b_dec), architecture="topk", k=K, rescale_acts_by_decoder_norm=True
    )
    x, norms = normal(9, D), w_dec.norm(dim=1)
    f = top_k(((x - b_dec) @ w_enc.T + b_enc) * norms)
    agree(load_dictionary(folder), x, f, f / norms @ w_dec + b_dec)


def test_a_training_checkpoint_of_batchtopk_is_read_with_its_threshold(tmp_path):
    w_enc, b_enc, w_dec, b_dec, _ = weights()
    tensors = lens_tensors(w_enc, b_enc, w_dec, b_dec) | {"topk_threshold": torch.tensor(0.7)}
    keys = {"architecture": "matryoshka_batchtopk", "k": K, "rescale_acts_by_decoder_norm": True}
    folder = write_saelens(tmp_path, tensors, **keys)
    x, norms = normal(9, D), w_dec.norm(dim=1)
    pre = ((x - b_dec) @ w_enc.T + b_enc) * norms
    f = pre * (pre > 0.7)
    agree(load_dictionary(folder), x, f, f / norms @ w_dec + b_dec)
    write_saelens(tmp_path, tensors | {"topk_threshold": torch.tensor(0.0)}, **keys)
    with pytest.raises(SondeError, match=r"topk_threshold is 0\.0, expected above 0"):
        load_dictionary(folder)


@pytest.mark.parametrize("logarithm", [False, True])
def test_jumprelu_of_saelens_is_read_also_from_logarithms_of_thresholds(tmp_path, logarithm):
    w_enc, b_enc, w_dec, b_dec, _ = weights()
    theta = torch.rand(M)
    name = {"log_threshold": theta.log()} if logarithm else {"threshold": theta}
    tensors = lens_tensors(w_enc, b_enc, w_dec, b_dec) | name
    x = normal(9, D)
    pre = x @ w_enc.T + b_enc
    f = pre * (pre > theta)
    folder = write_saelens(tmp_path, tensors, architecture="jumprelu", apply_b_dec_to_input=False)
    agree(load_dictionary(folder), x, f, f @ w_dec + b_dec)


def test_gated_of_saelens(tmp_path):
    w_enc, b_gate, w_dec, b_dec, _ = weights()
    r_mag, b_mag = normal(M) / 3, normal(M)
    tensors = lens_tensors(w_enc, b_gate, w_dec, b_dec) | {"b_gate": b_gate, "r_mag": r_mag, "b_mag": b_mag}
    del tensors["b_enc"]
    x = normal(9, D)
    inner = (x - b_dec) @ w_enc.T
    f = (inner + b_gate > 0) * (inner * r_mag.exp() + b_mag).relu()
    agree(load_dictionary(write_saelens(tmp_path, tensors, architecture="gated")), x, f, f @ w_dec + b_dec)


def test_a_jumprelu_skip_transcoder_of_saelens(tmp_path):
    w_enc, b_enc, w_dec, b_dec, w_skip = weights(outputs=7)
    theta = torch.rand(M)
    tensors = lens_tensors(w_enc, b_enc, w_dec, b_dec) | {"threshold": theta, "W_skip": w_skip}
    metadata = {"hook_name": "blocks.4.ln2.hook_normalized", "hook_name_out": "blocks.4.hook_mlp_out"}
    keys = {"architecture": "jumprelu_skip_transcoder", "d_out": 7, "apply_b_dec_to_input": False, "metadata": metadata}
    dictionary = load_dictionary(write_saelens(tmp_path, tensors, **keys))
    x = normal(9, D)
    pre = x @ w_enc.T + b_enc
    f = pre * (pre > theta)
    agree(dictionary, x, f, f @ w_dec + b_dec + x @ w_skip.T)
    assert (dictionary.site, dictionary.target) == ("mlp_in.4", "mlp_out.4")


def test_a_factor_of_fine_tuning_multiplies_what_is_decoded(tmp_path):
    w_enc, b_enc, w_dec, b_dec, _ = weights()
    factor = torch.rand(M) + 0.5
    tensors = lens_tensors(w_enc, b_enc, w_dec, b_dec) | {"scaling_factor": factor}
    x = normal(9, D)
    f = ((x - b_dec) @ w_enc.T + b_enc).relu()
    folder = write_saelens(tmp_path, tensors, architecture="standard", finetuning_scaling_factor=True)
    agree(load_dictionary(folder), x, f, (f * factor) @ w_dec + b_dec)
    write_saelens(tmp_path, tensors, architecture="standard", finetuning_scaling_factor=False)
    with pytest.raises(SondeError, match="scaling_factor other than 1"):
        load_dictionary(folder)


def test_a_scale_of_the_input_that_is_not_in_the_file_must_be_given(tmp_path):
    w_enc, b_enc, w_dec, b_dec, _ = weights()
    keys = {"architecture": "standard", "normalize_activations": "expected_average_only_in"}
    folder = write_saelens(tmp_path, lens_tensors(w_enc, b_enc, w_dec, b_dec), **keys)
    with pytest.raises(SondeError, match="give input_scale"):
        load_dictionary(folder)
    x, s = normal(9, D), 2.5
    f = ((s * x - b_dec) @ w_enc.T + b_enc).relu()
    agree(load_dictionary(folder, input_scale=s), x, f, (f @ w_dec + b_dec) / s)


@pytest.mark.parametrize("size", [3, 0.001])
def test_standardised_rows_of_saelens_also_where_they_are_small(tmp_path, size):
    w_enc, b_enc, w_dec, b_dec, _ = weights()
    keys = {"architecture": "topk", "k": K, "normalize_activations": "layer_norm"}
    folder = write_saelens(tmp_path, lens_tensors(w_enc, b_enc, w_dec, b_dec), **keys)
    x = 2 * size + size * normal(9, D)
    mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
    z = (x - mean) / (std + 1e-5)
    f = top_k((z - b_dec) @ w_enc.T + b_enc)
    dictionary = load_dictionary(folder)
    agree(dictionary, x, f, (f @ w_dec + b_dec) * std + mean)
    torch.testing.assert_close(dictionary(x) / size, ((f @ w_dec + b_dec) * std + mean) / size, atol=1e-4, rtol=1e-4)


def test_weights_that_were_processed_before_training_are_a_warning(tmp_path):
    metadata = {"model_name": "gpt2-small", "model_from_pretrained_kwargs": {"center_writing_weights": True}}
    folder = write_saelens(tmp_path, lens_tensors(*weights()[:4]), architecture="standard", metadata=metadata)
    with pytest.warns(UserWarning, match="trained on gpt2-small with center_writing_weights: the model as it is"):
        load_dictionary(folder)
    metadata["model_from_pretrained_kwargs"]["center_writing_weights"] = False
    load_dictionary(write_saelens(tmp_path, lens_tensors(*weights()[:4]), architecture="standard", metadata=metadata))


# Gemma Scope, Llama Scope


@pytest.mark.parametrize(
    "place", ["gemma-scope-2b-pt-res/layer_5/width_1k", "gemma-scope-9b-it-res/embedding/width_1k"]
)
def test_gemma_scope_subtracts_nothing_and_scales_dictionaries_of_the_embedding(tmp_path, place):
    w_enc, b_enc, w_dec, b_dec, _ = weights()
    theta = torch.rand(M)
    folder = tmp_path / place
    folder.mkdir(parents=True)
    arrays = {"W_enc": w_enc.T, "b_enc": b_enc, "W_dec": w_dec, "b_dec": b_dec, "threshold": theta}
    np.savez(folder / "params.npz", **{name: t.numpy() for name, t in arrays.items()})
    embedding = "embedding" in place
    scale = math.sqrt(D) if embedding else 1
    x = normal(9, D)
    pre = (x @ w_enc.T) / scale + b_enc
    f = pre * (pre > theta)
    dictionary = load_dictionary(folder)
    agree(dictionary, x, f, scale * (f @ w_dec) + b_dec)
    assert dictionary.site == ("embed" if embedding else "resid_post.5")
    assert dictionary.model == ("google/gemma-2-9b-it" if embedding else "google/gemma-2-2b")


def test_a_transcoder_of_gemma_scope_2_with_its_affine_connection(tmp_path):
    w_enc, b_enc, w_dec, b_dec, w_skip = weights(outputs=7)
    theta = torch.rand(M)
    tensors = {"w_enc": w_enc.T, "b_enc": b_enc, "w_dec": w_dec, "b_dec": b_dec, "threshold": theta}
    save_file(
        {name: t.contiguous() for name, t in tensors.items()} | {"affine_skip_connection": w_skip.T.contiguous()},
        tmp_path / "params.safetensors",
    )
    config = {
        "architecture": "jump_relu",
        "model_name": "google/gemma-3-1b-pt",
        "affine_connection": True,
        "hf_hook_point_in": "model.layers.7.pre_feedforward_layernorm.output",
        "hf_hook_point_out": "model.layers.7.post_feedforward_layernorm.output",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    dictionary = load_dictionary(tmp_path)
    x = normal(9, D)
    pre = x @ w_enc.T + b_enc
    f = pre * (pre > theta)
    agree(dictionary, x, f, f @ w_dec + b_dec + x @ w_skip.T)
    assert (dictionary.site, dictionary.target) == ("mlp_in.7", "mlp_out.7")


def test_llama_scope_runs_as_its_own_code_does_on_activations_as_they_are(tmp_path):
    w_enc, b_enc, w_dec, b_dec, _ = weights()
    save_file(
        {
            "encoder.weight": w_enc,
            "encoder.bias": b_enc,
            "decoder.weight": w_dec.T.contiguous(),
            "decoder.bias": b_dec,
        },
        _made(tmp_path / "checkpoints") / "final.safetensors",
    )
    config = {
        "d_model": D,
        "d_sae": M,
        "hook_point_in": "blocks.8.hook_resid_post",
        "hook_point_out": "blocks.8.hook_resid_post",
        "act_fn": "jumprelu",
        "jump_relu_threshold": 0.4,
        "norm_activation": "dataset-wise",
        "sparsity_include_decoder_norm": True,
        "dataset_average_activation_norm": {"in": 6.0, "out": 6.0},
    }
    (tmp_path / "hyperparams.json").write_text(json.dumps(config))
    x, s, norms = normal(9, D), math.sqrt(D) / 6, w_dec.norm(dim=1)
    pre = (x @ w_enc.T + b_enc / s) * norms
    f = pre * (pre > 0.4)
    dictionary = load_dictionary(tmp_path)
    agree(dictionary, x, f, f / norms @ w_dec + b_dec / s)
    # which is the dictionary of s x, scaled back: SAELens' form, with its threshold times s
    scaled = (s * (x @ w_enc.T) + b_enc) * norms
    torch.testing.assert_close(s * f, scaled * (scaled > s * 0.4), atol=1e-5, rtol=1e-5)
    assert dictionary.site == "resid_post.8"


def _made(folder):
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# dictionary_learning, OpenAI


def learned(folder, name, state, **trainer):
    trainer = {"dict_class": name, "activation_dim": D, "dict_size": M, "layer": 3, "lm_name": "EleutherAI/p"} | trainer
    torch.save(state, _made(folder) / "ae.pt")
    (folder / "config.json").write_text(json.dumps({"trainer": trainer | {"submodule_name": "resid_post_layer_3"}}))
    return folder


def test_every_class_of_dictionary_learning_is_read_by_its_formula(tmp_path):
    w_enc, b_enc, w_dec, b_dec, _ = weights()
    x = normal(9, D)
    linear = {"encoder.weight": w_enc, "encoder.bias": b_enc, "decoder.weight": w_dec.T.contiguous()}
    turned = {"W_enc": w_enc.T.contiguous(), "b_enc": b_enc, "W_dec": w_dec, "b_dec": b_dec}
    centred, plain = (x - b_dec) @ w_enc.T + b_enc, x @ w_enc.T + b_enc
    theta, k = torch.rand(M), torch.tensor(K, dtype=torch.int)
    one = torch.tensor(0.6)
    r_mag, b_gate, b_mag = normal(M) / 3, normal(M), normal(M)
    gated = {"encoder.weight": w_enc, "decoder.weight": w_dec.T.contiguous(), "decoder_bias": b_dec, "r_mag": r_mag}
    inner = (x - b_dec) @ w_enc.T
    cases = {
        "AutoEncoder": (linear | {"bias": b_dec}, {}, centred.relu()),
        "AutoEncoderNew": (linear | {"decoder.bias": b_dec}, {}, plain.relu()),
        "JumpReluAutoEncoder": (turned | {"threshold": theta}, {}, plain * (plain > theta)),
        "GatedAutoEncoder": (
            gated | {"gate_bias": b_gate, "mag_bias": b_mag},
            {},
            (inner + b_gate > 0) * (inner * r_mag.exp() + b_mag).relu(),
        ),
        "AutoEncoderTopK": (
            linear | {"b_dec": b_dec, "k": k, "threshold": torch.tensor(-1.0)},
            {"k": K},
            top_k(centred),
        ),
        "BatchTopKSAE": (linear | {"b_dec": b_dec, "k": k, "threshold": one}, {"k": K}, centred * (centred > 0.6)),
        "MatryoshkaBatchTopKSAE": (
            turned | {"k": k, "threshold": one, "group_sizes": torch.tensor([16, 32])},
            {"k": K},
            centred * (centred > 0.6),
        ),
    }
    for name, (state, trainer, f) in cases.items():
        dictionary = load_dictionary(learned(tmp_path / name, name, state, **trainer))
        agree(dictionary, x, f, f @ w_dec + b_dec)
        assert dictionary.site == "resid_post.3" and dictionary.model == "EleutherAI/p"
    assert dictionary.design.prefixes == (16, 48)
    learned(tmp_path / "k", "AutoEncoderTopK", cases["AutoEncoderTopK"][0], k=K + 1)
    with pytest.raises(SondeError, match=r"k is 6, but ae\.pt holds 5"):
        load_dictionary(tmp_path / "k")


@pytest.mark.parametrize("activation", ["ReLU", "TopK"])
def test_openais_dictionaries_standardise_rows_where_they_are_topk(tmp_path, activation):
    w_enc, b_enc, w_dec, b_dec, _ = weights()
    state = {
        "encoder.weight": w_enc,
        "latent_bias": b_enc,
        "decoder.weight": w_dec.T.contiguous(),
        "pre_bias": b_dec,
        "stats_last_nonzero": torch.zeros(M, dtype=torch.long),
        "latents_activation_frequency": torch.ones(M),
        "latents_mean_square": torch.ones(M),
        "activation": activation,
        "activation_state_dict": {"k": K, "postact_fn": "ReLU"} if activation == "TopK" else {},
    }
    torch.save(state, tmp_path / "sae.pt")
    dictionary = load_dictionary(tmp_path / "sae.pt")
    x = 2 + 3 * normal(9, D)
    mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
    z = (x - mean) / (std + 1e-5) if activation == "TopK" else x
    pre = (z - b_dec) @ w_enc.T + b_enc
    f = top_k(pre) if activation == "TopK" else pre.relu()
    out = f @ w_dec + b_dec
    agree(dictionary, x, f, out * std + mean if activation == "TopK" else out)
    state["activation_state_dict"], state["activation"] = {"k": K, "postact_fn": "Identity"}, "TopK"
    torch.save(state, tmp_path / "sae.pt")
    with pytest.raises(SondeError, match="postact_fn is 'Identity', expected one of ReLU"):
        load_dictionary(tmp_path / "sae.pt")


# what is refused


def test_missing_transposed_and_unexplained_tensors_are_named_with_their_shapes(tmp_path):
    w_enc, b_enc, w_dec, b_dec, w_skip = weights()
    good = sparsify_tensors(w_enc, b_enc, w_dec, b_dec)
    folder = write_sparsify(tmp_path, {name: t for name, t in good.items() if name != "W_dec"})
    with pytest.raises(SondeError, match=r"lacks W_dec \(48, 12\): it holds b_dec \(12,\), encoder.bias \(48,\)"):
        load_dictionary(folder)
    write_sparsify(tmp_path, good | {"W_dec": w_dec.T})
    with pytest.raises(
        SondeError, match=r"W_dec has the shape \(12, 48\), expected \(48, 12\), which is its transpose"
    ):
        load_dictionary(folder)
    write_sparsify(tmp_path, good | {"b_dec": normal(D + 1)})
    with pytest.raises(SondeError, match=r"b_dec has the shape \(13,\), expected \(12,\)$"):
        load_dictionary(folder)
    write_sparsify(tmp_path, good | {"W_skip": w_skip})
    with pytest.raises(SondeError, match=r"also holds W_skip \(12, 12\), which this format does not explain"):
        load_dictionary(folder)
    write_sparsify(tmp_path, good | {"b_dec": b_dec * math.nan})
    with pytest.raises(SondeError, match="b_dec holds nan or infinity"):
        load_dictionary(folder)


def test_an_unknown_activation_is_never_read_as_relu(tmp_path):
    tensors = weights()[:4]
    folder = write_sparsify(tmp_path / "s", sparsify_tensors(*tensors), activation="softmax")
    with pytest.raises(SondeError, match="activation is 'softmax', expected one of topk, groupmax"):
        load_dictionary(folder)
    write_sparsify(folder, sparsify_tensors(*tensors), signed=True)
    with pytest.raises(SondeError, match="signed is true, expected false"):
        load_dictionary(folder)
    lens = tmp_path / "l"
    for keys, message in (
        ({"architecture": "temporal"}, "architecture is 'temporal', expected one of standard"),
        ({"activation_fn_str": "tanh-relu"}, "activation_fn is 'tanh-relu', expected one of relu, topk"),
        ({"activation_fn_str": "topk"}, "topk without k"),
        ({"architecture": "topk", "k": M + 1}, "k is 49, more than the 48 latents"),
        ({"normalize_activations": "constant_norm_rescale"}, "expected one of none"),
    ):
        write_saelens(lens, lens_tensors(*tensors), **keys)
        with pytest.raises(SondeError, match=message):
            load_dictionary(lens)
    with pytest.raises(SondeError, match="dict_class is 'IdentityDict', expected one of AutoEncoder"):
        load_dictionary(learned(tmp_path / "i", "IdentityDict", {}))


def test_a_folder_without_a_dictionary_says_what_is_there_and_what_was_expected(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(SondeError, match=r"found notes\.txt; expected one of dictionary\.safetensors, sae"):
        load_dictionary(tmp_path)
    with pytest.raises(SondeError, match="is a file: give the folder"):
        load_dictionary(tmp_path / "notes.txt")
    with pytest.raises(SondeError, match="does not exist"):
        load_dictionary(tmp_path / "none")
    with pytest.raises(SondeError, match="format 'safetensors' is not known: use one of sonde, sparsify"):
        load_dictionary(tmp_path, "safetensors")
    (tmp_path / "cfg.json").write_text("{")
    (tmp_path / "sae.safetensors").write_text("")
    with pytest.raises(SondeError, match="cannot be read"):
        load_dictionary(tmp_path)


def test_a_pickle_that_holds_code_is_not_opened(tmp_path):
    class Code:
        def __reduce__(self):
            return print, ("ran",)

    torch.save({"activation": Code()}, tmp_path / "x.pt")
    with pytest.raises(SondeError, match="damaged or holds more than weights"):
        load_dictionary(tmp_path / "x.pt")


# back and forth


def filled(design, seed=0):
    torch.manual_seed(seed)
    dictionary = Dictionary(design)
    for parameter in dictionary.parameters():
        parameter.copy_(normal(*parameter.shape) / 2)
    if dictionary.threshold is not None:
        dictionary.threshold.copy_(torch.rand(dictionary.threshold.shape) + 0.1)
    dictionary.site, dictionary.model = "resid_post.3", "EleutherAI/pythia-70m"
    return dictionary


@pytest.mark.parametrize("kind", ["topk", "topk by norm", "groupmax", "skip transcoder", "not centred"])
def test_what_is_written_for_sparsify_comes_back_the_same(tmp_path, kind):
    fields = {
        "topk": {"kind": "topk", "k": K},
        "topk by norm": {"kind": "topk", "k": K, "ranked_by_norm": True},
        "groupmax": {"kind": "groupmax", "k": 6},
        "skip transcoder": {"kind": "topk", "k": K, "transcodes": True, "skip": True},
        "not centred": {"kind": "topk", "k": K, "centred": False},
    }
    dictionary = filled(Design(inputs=D, latents=M, **fields[kind]))
    sparsify.save(dictionary, tmp_path / "layers.3")
    back = load_dictionary(tmp_path / "layers.3")
    x = normal(20, D)
    torch.testing.assert_close(back(x), dictionary(x), atol=1e-5, rtol=1e-5)
    assert detected(tmp_path / "layers.3") == "sparsify"


@pytest.mark.parametrize(
    "kind",
    [
        "relu",
        "topk",
        "topk by norm",
        "batchtopk",
        "matryoshka by norm",
        "jumprelu",
        "gated",
        "transcoder",
        "standardised",
    ],
)
def test_what_is_written_for_saelens_comes_back_the_same(tmp_path, kind):
    fields = {
        "relu": {"kind": "relu", "centred": False},
        "topk": {"kind": "topk", "k": K},
        "topk by norm": {"kind": "topk", "k": K, "ranked_by_norm": True},
        "batchtopk": {"kind": "batchtopk", "k": K},
        "matryoshka by norm": {"kind": "matryoshka", "k": K, "ranked_by_norm": True},
        "jumprelu": {"kind": "jumprelu"},
        "gated": {"kind": "gated"},
        "transcoder": {"kind": "jumprelu", "transcodes": True, "skip": True, "outputs": 7},
        "standardised": {"kind": "topk", "k": K, "layer_norm": True},
    }
    dictionary = filled(Design(inputs=D, latents=M, **fields[kind]))
    saelens.save(dictionary, tmp_path)
    back = load_dictionary(tmp_path)
    x = normal(20, D)
    torch.testing.assert_close(back(x), dictionary(x), atol=1e-5, rtol=1e-5)
    assert (back.site, back.model) == (dictionary.site, dictionary.model)


def test_what_another_format_does_not_have_is_refused(tmp_path):
    relu = filled(Design("relu", D, M))
    with pytest.raises(SondeError, match="sparsify has no kind 'relu': it holds topk and groupmax"):
        sparsify.save(relu, tmp_path)
    with pytest.raises(SondeError, match="does not standardise rows"):
        sparsify.save(filled(Design("topk", D, M, k=K, layer_norm=True)), tmp_path)
    with pytest.raises(SondeError, match="reads 12 and writes 7"):
        sparsify.save(filled(Design("topk", D, M, k=K, transcodes=True, outputs=7)), tmp_path)
    with pytest.raises(SondeError, match="SAELens has no kind 'groupmax'"):
        saelens.save(filled(Design("groupmax", D, M, k=6)), tmp_path)
    with pytest.raises(SondeError, match="no transcoder of kind 'topk'"):
        saelens.save(filled(Design("topk", D, M, k=K, transcodes=True)), tmp_path)
    with pytest.raises(SondeError, match="is a crosscoder: SAELens holds dictionaries of one site"):
        saelens.save(filled(crosscoder((5, 7), M, kind="relu")), tmp_path)
    assert not list(tmp_path.iterdir())


def test_names_of_hooks_and_sites():
    for site in ("embed", "resid_pre.0", "resid_post.11", "mlp_in.2", "mlp_out.2", "mixer_out.3"):
        assert site_of(lens_hook(site)) == site
    assert site_of("blocks.3.attn.hook_z") is None and site_of(None) is None
    assert site_of("gpt_neox.layers.4.attention") == "mixer_out.4"
    assert site_of("model.layers.12.output") == "resid_post.12"
    assert site_of("h.2", side="in") == "resid_pre.2"
