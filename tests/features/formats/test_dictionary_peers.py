"""sparsify and SAELens themselves read what is written here, and what they write is read here: 1e-5 in both directions.

They need `eai-sparsify` and `sae-lens`, which are in no extra of this project.
"""

import warnings

import pytest
import torch

from sonde.features.design import Design
from sonde.features.dictionary import Dictionary
from sonde.features.formats import saelens, sparsify
from sonde.features.formats.detection import load_dictionary

D, M, K = 16, 64, 6
pytestmark = [pytest.mark.peer, pytest.mark.usefixtures("no_grad")]


def peer(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return pytest.importorskip(name)
        except Exception as error:  # a peer whose own dependencies are of other versions
            pytest.skip(f"{name} is installed and does not import: {error}")


@pytest.fixture(scope="module")
def eleuther():
    return peer("sparsify")


@pytest.fixture(scope="module")
def lens():
    return peer("sae_lens")


def random(module):
    for name, parameter in [*module.named_parameters(), *module.named_buffers()]:
        if parameter.is_floating_point():
            parameter.data = torch.randn(parameter.shape) / 2
            if "threshold" in name:
                parameter.data = parameter.data.abs() + 0.05
    return module


def same(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def dense(dictionary, x):
    sparse = dictionary.encode(x)
    return torch.zeros(len(x), M).scatter_add(-1, sparse.indices, sparse.values)


SPARSIFY = {
    "topk": {},
    "groupmax": {"activation": "groupmax", "k": 8},
    "transcoder": {"transcode": True},
    "skip": {"transcode": True, "skip_connection": True},
    "multi": {"multi_topk": True},
}


def k_latents(theirs, x):
    """What k latents say: with `multi_topk`, sparsify's own output is that of its 4k latents."""
    if not theirs.cfg.multi_topk:
        return theirs(x).sae_out
    values, indices, _ = theirs.encode(x)
    return theirs.decode(values, indices)


@pytest.mark.parametrize("kind", list(SPARSIFY))
def test_sparsify_both_ways(tmp_path, eleuther, kind):
    x = torch.randn(50, D)
    config = eleuther.SparseCoderConfig(**({"num_latents": M, "k": K} | SPARSIFY[kind]))
    theirs = random(eleuther.SparseCoder(D, config))
    theirs.save_to_disk(tmp_path / "layers.2.mlp")
    ours = load_dictionary(tmp_path / "layers.2.mlp")
    same(ours(x), k_latents(theirs, x))
    sparsify.save(ours, tmp_path / "back")
    again = eleuther.SparseCoder.load_from_disk(tmp_path / "back")
    same(k_latents(again, x), k_latents(theirs, x))
    values, indices, _ = theirs.encode(x)
    same(dense(ours, x), torch.zeros(len(x), M).scatter_add(-1, indices, values))


def test_what_ranks_by_norms_and_does_not_centre_is_written_for_sparsify_all_the_same(tmp_path, eleuther):
    ours = random(Dictionary(Design("topk", D, M, k=K, ranked_by_norm=True, centred=False)))
    sparsify.save(ours, tmp_path)
    x = torch.randn(50, D)
    same(eleuther.SparseCoder.load_from_disk(tmp_path)(x).sae_out, ours(x))


LENS = {
    "standard": ("StandardSAE", {}),
    "standard, not centred": ("StandardSAE", {"apply_b_dec_to_input": False}),
    "topk": ("TopKSAE", {"k": K}),
    "topk by norm": ("TopKSAE", {"k": K, "rescale_acts_by_decoder_norm": True}),
    "topk, standardised": ("TopKSAE", {"k": K, "normalize_activations": "layer_norm"}),
    "jumprelu": ("JumpReLUSAE", {}),
    "gated": ("GatedSAE", {}),
    "transcoder": ("Transcoder", {"d_out": 9, "apply_b_dec_to_input": False}),
    "skip transcoder": ("SkipTranscoder", {"d_out": 9, "apply_b_dec_to_input": False}),
    "jumprelu transcoder": ("JumpReLUTranscoder", {"d_out": 9, "apply_b_dec_to_input": False}),
    "jumprelu skip transcoder": ("JumpReLUSkipTranscoder", {"d_out": 9, "apply_b_dec_to_input": False}),
}


@pytest.mark.parametrize("kind", list(LENS))
def test_saelens_both_ways(tmp_path, lens, kind):
    from sae_lens.saes import transcoder

    name, fields = LENS[kind]
    home = lens if hasattr(lens, name) else transcoder
    theirs = random(getattr(home, name)(getattr(home, f"{name}Config")(d_in=D, d_sae=M, **fields)))
    theirs.save_model(tmp_path / "theirs")
    x = 3 * torch.randn(50, D)
    ours = load_dictionary(tmp_path / "theirs")
    same(ours(x), theirs(x))
    same(dense(ours, x), theirs.encode(x))
    saelens.save(ours, tmp_path / "back")
    again = (lens.SAE if home is lens else type(theirs)).load_from_disk(tmp_path / "back")
    same(again(x), theirs(x))


@pytest.mark.parametrize("name", ["BatchTopK", "MatryoshkaBatchTopK"])
def test_checkpoints_and_exports_of_saelens_training(tmp_path, lens, name):
    widths = {"matryoshka_widths": [16, M]} if name.startswith("Matryoshka") else {}
    config = getattr(lens, f"{name}TrainingSAEConfig")(d_in=D, d_sae=M, k=K, **widths)
    theirs = random(getattr(lens, f"{name}TrainingSAE")(config))
    theirs.topk_threshold.fill_(0.8)
    theirs.save_model(tmp_path / "checkpoint")
    theirs.save_inference_model(tmp_path / "export")
    x = torch.randn(50, D)
    final = lens.SAE.load_from_disk(tmp_path / "export")
    same(load_dictionary(tmp_path / "export")(x), final(x))
    same(load_dictionary(tmp_path / "checkpoint")(x), final(x))


@pytest.mark.parametrize("kind", ["batchtopk", "matryoshka", "batchtopk by norm", "jumprelu transcoder"])
def test_kinds_with_one_threshold_are_jumprelu_to_saelens(tmp_path, lens, kind):
    fields = {"kind": kind.split()[0], "inputs": D, "latents": M}
    fields |= {"transcodes": True} if "transcoder" in kind else {"k": K}
    ours = random(Dictionary(Design(**fields, ranked_by_norm="norm" in kind)))
    saelens.save(ours, tmp_path)
    x = torch.randn(50, D)
    same(lens.SAE.load_from_disk(tmp_path)(x), ours(x))


def test_keys_from_before_version_6_are_read_as_saelens_reads_them(tmp_path, lens):
    import json

    theirs = random(lens.TopKSAE(lens.TopKSAEConfig(d_in=D, d_sae=M, k=K)))
    theirs.save_model(tmp_path)
    old = {
        "architecture": "standard",
        "d_in": D,
        "d_sae": M,
        "dtype": "float32",
        "model_name": "gpt2-small",
        "hook_name": "blocks.4.hook_resid_pre",
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": K},
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "sae_lens_version": "4.0.0",
    }
    (tmp_path / "cfg.json").write_text(json.dumps(old))
    ours, again = load_dictionary(tmp_path), lens.SAE.load_from_disk(tmp_path)
    x = torch.randn(50, D)
    same(ours(x), again(x))
    assert (ours.site, ours.model, ours.design.kind) == ("resid_pre.4", "gpt2-small", "topk")
