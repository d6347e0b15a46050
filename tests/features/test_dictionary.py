"""A dictionary encodes, decodes, stands for its input in a model, is folded and saved."""

import json
from dataclasses import replace

import pytest
import torch
from families import tiny

from sonde.errors import SondeError
from sonde.features.dictionary import Design, Dictionary, Sparse
from sonde.lm.model import LanguageModel

DESIGNS = {
    "relu": Design("relu", 16, 64),
    "topk": Design("topk", 16, 64, 4),
    "topk by norm": Design("topk", 16, 64, 4, ranked_by_norm=True),
    "topk of rows of one scale": Design("topk", 16, 64, 4, layer_norm=True),
    "groupmax": Design("groupmax", 16, 64, 4),
    "batchtopk": Design("batchtopk", 16, 64, 4),
    "batchtopk by norm": Design("batchtopk", 16, 64, 4, ranked_by_norm=True),
    "matryoshka": Design("matryoshka", 16, 64, 4),
    "jumprelu": Design("jumprelu", 16, 64, threshold=0.5),
    "gated": Design("gated", 16, 64),
    "skip transcoder": Design("topk", 16, 64, 4, outputs=8, transcodes=True, skip=True),
}


def made(name, *, seed=0):
    """A dictionary of random weights, with no parameter 0 and decoder rows of many lengths."""
    dictionary = Dictionary(DESIGNS[name])
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in dictionary.parameters():
            if parameter is not dictionary.threshold:
                parameter.copy_(0.4 * torch.randn(parameter.shape, generator=g))
        if dictionary.design.kind == "jumprelu":
            dictionary.threshold.copy_(torch.rand(64, generator=g))
        elif dictionary.threshold is not None:
            dictionary.threshold.fill_(0.9)
    return dictionary


def rows(*shape, seed=1):
    return torch.randn(*shape, 16, generator=torch.Generator().manual_seed(seed))


def dense(sparse):
    return torch.zeros(*sparse.values.shape[:-1], 64).scatter_add(-1, sparse.indices, sparse.values)


def by_formula(d, x):
    """Values of all latents, written out."""
    if d.design.layer_norm:
        x = (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-5)
    pre = (x - d.b_dec if d.design.centred else x) @ d.w_enc.T + d.b_enc
    worth = d.w_dec.norm(dim=1) if d.design.ranked_by_norm else torch.ones(64)
    match d.design.kind:
        case "relu":
            return pre.relu()
        case "topk":
            return pre.relu() * torch.zeros_like(pre).scatter(-1, (pre * worth).topk(4, -1)[1], 1)
        case "groupmax":
            grouped = pre.unflatten(-1, (4, 16))
            return (grouped.relu() * (grouped == grouped.amax(-1, keepdim=True))).flatten(-2)
        case "batchtopk" | "matryoshka":
            return pre.relu() * (pre * worth > d.threshold)
        case "jumprelu":
            return pre.relu() * (pre > d.threshold)
        case _:
            return (pre > 0) * ((pre - d.b_enc) * d.r_mag.exp() + d.b_mag).relu()


@pytest.mark.parametrize("name", DESIGNS)
def test_every_kind_is_its_formula(name):
    d, x = made(name), rows(3, 5)
    f = by_formula(d, x)
    assert (f > 0).any()
    sparse = d.encode(x)
    assert torch.allclose(dense(sparse), f, atol=1e-5)
    assert (sparse.indices[sparse.values == 0] == 0).all()
    out = f @ d.w_dec + d.b_dec
    assert torch.allclose(d.decode(sparse), out, atol=1e-5)
    if d.w_skip is not None:
        out = out + x @ d.w_skip.T
    if d.design.layer_norm:
        out = out * x.std(-1, keepdim=True) + x.mean(-1, keepdim=True)
    assert torch.allclose(d(x), out, atol=1e-5)
    assert torch.allclose(d.latents_of(x, [3, 60, 3]), f[..., [3, 60, 3]], atol=1e-5)
    if d.design.k is None:
        assert torch.allclose(d.train()(x), out, atol=1e-5)


@pytest.mark.parametrize("name", DESIGNS)
def test_a_saved_dictionary_is_the_same_dictionary(name, tmp_path):
    d = made(name)
    d.site, d.model, d.model_hash, d.facts = "resid_post.3", "pebble", "ab12", {"tokens": 5}
    d.save(tmp_path)
    again = Dictionary.load(tmp_path)
    assert (again.design, again.site, again.model, again.model_hash, again.facts) == (
        d.design, "resid_post.3", "pebble", "ab12", {"tokens": 5},
    )  # fmt: skip
    assert torch.equal(again(rows(9)), d(rows(9)))


def test_what_cannot_be_loaded_says_why(tmp_path):
    with pytest.raises(SondeError, match="no dictionary"):
        Dictionary.load(tmp_path)
    made("topk").save(tmp_path)
    (tmp_path / "dictionary.safetensors").rename(tmp_path / "away")
    with pytest.raises(SondeError, match="incomplete"):
        Dictionary.load(tmp_path)
    (tmp_path / "dictionary.safetensors").write_bytes(b"12")
    with pytest.raises(SondeError, match="damaged"):
        Dictionary.load(tmp_path)
    (tmp_path / "away").replace(tmp_path / "dictionary.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    for changed, message in (
        (config | {"design": config["design"] | {"latents": 32}}, "where the design has"),
        (config | {"design": config["design"] | {"kind": "softmax"}}, "softmax"),
        ({"format": "other"}, "not the configuration"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with pytest.raises(SondeError, match=message):
            Dictionary.load(tmp_path)


@pytest.mark.parametrize("name", set(DESIGNS) - {"topk of rows of one scale"})
def test_a_folded_scale_changes_the_units_alone(name):
    d, x = made(name), rows(40)
    wanted = d(3.7 * x) / 3.7
    folded = d.folded_scale(3.7)
    assert (folded(x) - wanted).norm() / wanted.norm() < 1e-5


def test_targets_may_have_a_scale_of_their_own_where_nothing_is_centred():
    d, x = made("skip transcoder"), rows(40)
    assert torch.allclose(d.folded_scale(2.0, target=5.0)(x), d(2 * x) / 5, atol=1e-5)
    with pytest.raises(ValueError, match="target"):
        made("topk").folded_scale(2.0, target=5.0)
    with pytest.raises(ValueError, match="above 0"):
        made("topk").folded_scale(0.0)


@pytest.mark.parametrize("name", ["relu", "topk by norm", "batchtopk", "batchtopk by norm", "jumprelu", "gated"])
def test_folded_norms_change_nothing_but_the_norms(name):
    d, x = made(name), rows(40)
    folded = d.folded_norms()
    assert (folded(x) - d(x)).norm() / d(x).norm() < 1e-5
    assert torch.allclose(folded.w_dec.norm(dim=1), torch.ones(64), atol=1e-5)


def test_norms_are_not_folded_where_they_would_change_the_choice():
    for name in ("topk", "groupmax"):
        with pytest.raises(SondeError, match="cannot be folded"):
            made(name).folded_norms()
    untrained = Dictionary.initialised(DESIGNS["batchtopk"])
    with pytest.raises(SondeError, match="no threshold yet"):
        untrained.folded_norms()


@pytest.mark.parametrize("name", ["batchtopk", "batchtopk by norm", "matryoshka"])
def test_one_threshold_for_all_rows_is_a_jumprelu(name):
    d, x = made(name), rows(40)
    jumping = d.as_jumprelu()
    assert jumping.design.kind == "jumprelu"
    assert torch.allclose(dense(jumping.encode(x)), dense(d.encode(x)), atol=1e-6)
    with pytest.raises(SondeError, match="has no threshold"):
        made("topk").as_jumprelu()


def test_before_a_threshold_is_known_the_batch_decides_and_afterwards_each_row():
    d, x = made("batchtopk"), rows(40)
    alone = torch.cat([dense(d.encode(row[None])) for row in x])
    assert torch.allclose(dense(d.encode(x)), alone, atol=1e-6)
    d.train()
    assert int((d.encode(x).values > 0).sum()) == 4 * 40


def test_prefixes_add_up_to_the_whole():
    d, x = made("matryoshka"), rows(40)
    assert torch.allclose(d.reconstruct(x, prefix=64), d(x), atol=1e-5)
    f = dense(d.encode(x))[:, :16]
    assert torch.allclose(d.reconstruct(x, prefix=16), f @ d.w_dec[:16] + d.b_dec, atol=1e-5)


def test_init_is_unit_rows_tied_and_centred():
    mean = torch.arange(16.0)
    d = Dictionary.initialised(DESIGNS["topk"], mean=mean)
    assert torch.allclose(d.w_dec.norm(dim=1), torch.ones(64))
    assert torch.equal(d.w_enc, d.w_dec)
    assert torch.equal(d.b_dec, mean)
    assert not d.b_enc.any()
    assert not torch.equal(d.w_enc, Dictionary.initialised(DESIGNS["topk"], seed=1).w_enc)
    t = Dictionary.initialised(DESIGNS["skip transcoder"], mean=mean, target_mean=mean[:8])
    assert not t.w_dec.any()
    assert not t.w_skip.any()
    assert torch.allclose(t.b_enc, -t.w_enc @ mean)
    assert torch.equal(t(rows(4)), mean[:8].expand(4, 8))


def test_a_dictionary_stands_as_an_edit_in_a_model():
    lm = LanguageModel(tiny("llama"))
    tokens = torch.arange(12).view(2, 6)
    plain = lm(tokens).logits
    d = Dictionary.initialised(Design("topk", lm.d_model, 64, 4))
    with lm.editing({"resid_post.0": d}):
        assert not torch.allclose(lm(tokens).logits, plain)
    with lm.editing({"resid_post.0": d.splice(error=True)}):
        assert torch.allclose(lm(tokens).logits, plain, atol=1e-5)


@pytest.mark.parametrize("name", ["topk", "topk of rows of one scale", "jumprelu"])
def test_with_the_error_added_back_only_what_is_changed_changes(name):
    d, x = made(name), rows(3, 5)
    assert torch.allclose(d.splice(error=True, change=lambda latents: latents)(x), x, atol=1e-5)

    def ablated(latents):
        return Sparse(torch.where(latents.indices == 7, 0, latents.values), latents.indices)

    scale = x.std(-1, keepdim=True) if d.design.layer_norm else 1
    wanted = x - d.latents_of(x, [7]) * d.w_dec[7] * scale
    assert torch.allclose(d.splice(error=True, change=ablated)(x), wanted, atol=1e-5)
    assert torch.allclose(d.splice(change=lambda latents: latents)(x), d(x), atol=1e-5)


def test_a_transcoder_does_not_stand_for_its_input():
    with pytest.raises(SondeError, match="transcoder"):
        made("skip transcoder").splice()


def test_another_width_is_refused_with_both():
    with pytest.raises(SondeError, match=r"width 12.*width 16"):
        made("topk").encode(torch.zeros(3, 12))


def test_activations_of_half_precision_come_back_in_it():
    out = made("topk")(rows(4).bfloat16())
    assert out.dtype == torch.bfloat16


def test_gradients_reach_the_input_and_the_weights_through_a_splice():
    d = made("topk").double()
    x = rows(6).double().requires_grad_()
    d(x).square().sum().backward()
    mine = [x.grad.clone(), *(p.grad.clone() for p in d.parameters())]
    x.grad = None
    d.zero_grad()
    (by_formula(d, x) @ d.w_dec + d.b_dec).square().sum().backward()
    for a, b in zip(mine, [x.grad, *(p.grad for p in d.parameters())], strict=True):
        assert torch.allclose(a, b, atol=1e-10)


def test_a_kind_is_replaced_and_checked_like_any_other():
    with pytest.raises(ValueError, match="k is 4, but kind 'relu' has none"):
        replace(DESIGNS["topk"], kind="relu")
