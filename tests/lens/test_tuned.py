import pytest
import torch
from families import FAMILIES, tiny, tokens

from sonde.errors import SondeError
from sonde.lens.tuned import TunedLens
from sonde.lm.model import LanguageModel


def final_state(lm, ids, *sites):
    with torch.no_grad(), lm.reading(*sites) as acts:
        lm(ids)
    return acts


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["logit", "bias", "tuned"])
def test_translators_at_zero_are_the_logit_lens_bit_for_bit(family, kind):
    lm = LanguageModel(tiny(family))
    lens = TunedLens.zeros(lm, kind)
    acts = final_state(lm, tokens(2, 12), *lens.sites)
    for layer, site in enumerate(lens.sites):
        assert torch.equal(lens(acts[site], layer), lm.unembed(acts[site]))


def test_all_layers_at_once_are_each_layer_alone():
    lens = TunedLens.zeros(LanguageModel(tiny("llama")))
    torch.nn.init.normal_(lens.weight)
    torch.nn.init.normal_(lens.bias)
    hidden = torch.randn(3, 5, 32)
    alone = torch.stack([lens.translate(hidden[i], i) for i in range(3)])
    torch.testing.assert_close(lens.translate_all(hidden), alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(alone[1, 0], hidden[1, 0] + lens.weight[1] @ hidden[1, 0] + lens.bias[1])


def test_a_layer_is_a_number_or_a_site():
    lens = TunedLens.logit(LanguageModel(tiny("gpt2")), sites=["resid_pre.*", "mlp_out.1"])
    assert lens.sites == ("resid_pre.0", "resid_pre.1", "mlp_out.1", "resid_pre.2")
    assert (lens.layer("mlp_out.1"), lens.layer(-1), lens.layer(3)) == (2, 3, 3)
    for wrong in (4, -5, "resid_pre.9"):
        with pytest.raises(SondeError, match=r"out of range|no site"):
            lens.layer(wrong)


def test_logits_are_no_hidden_state():
    with pytest.raises(SondeError, match="logits"):
        TunedLens.logit(LanguageModel(tiny("gpt2")), sites="logits")


def test_an_attached_lens_reads_with_the_other_models_unembedding():
    base, other = LanguageModel(tiny("gpt2")), LanguageModel(tiny("gpt2", seed=1), name="tuned")
    lens = TunedLens.zeros(base)
    torch.nn.init.normal_(lens.weight, std=0.1)
    attached = lens.attach(other)
    hidden = torch.randn(4, 32)
    assert torch.equal(attached(hidden, 1), other.unembed(lens.translate(hidden, 1)))
    assert torch.equal(attached.weight, lens.weight)
    assert attached.weight is not lens.weight


@pytest.mark.parametrize(
    ("changes", "message"), [({"n_embd": 64}, "width 32"), ({"n_layer": 2}, r"resid_pre\.2"), ({}, "family")]
)
def test_a_lens_is_not_attached_to_another_shape_or_family(changes, message):
    lens = TunedLens.zeros(LanguageModel(tiny("gpt2")))
    lens.facts = {"family": "gpt2"}
    other = LanguageModel(tiny("gpt2", **changes) if changes else tiny("llama"))
    with pytest.raises(SondeError, match=message):
        lens.attach(other)
