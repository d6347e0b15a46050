"""Edits by site: fitted right, on the tokens that were asked for, in batches, with a cache, saved and refused."""

import pytest
import torch
from families import D_MODEL, tiny, tokens

from sonde.concepts.affine import AffineEdit
from sonde.concepts.conditional import Conditional
from sonde.concepts.contrast import contrast
from sonde.concepts.site_edits import SiteEdits, mean_norms
from sonde.errors import SondeError
from sonde.lm.model import LanguageModel

POSITIVE, NEGATIVE = tokens(6, 7, seed=1).tolist(), tokens(5, 7, seed=2).tolist()


@pytest.fixture(scope="module")
def lm():
    return LanguageModel(tiny("gpt_neox"), name="tiny")


@pytest.fixture(scope="module")
def ace(lm):
    return SiteEdits.fit(lm, POSITIVE, NEGATIVE, sites="resid_post.1", method="ace")


def _projections(lm, edits, site, ids, mask=None):
    edit = edits.edits[site]
    with edits.on(lm), lm.reading(site) as acts:
        lm(ids, mask)
    return (acts[site] - edit.reference) @ edit.right[0] / edit.added.norm()


def test_ace_at_0_and_1_puts_every_token_at_one_mean(lm, ace):
    for strength in (0.0, 1.0):
        found = _projections(lm, ace.at(strength), "resid_post.1", tokens(3, 9))
        torch.testing.assert_close(found, torch.full((3, 9), strength), atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", ["add", "ablate", "patch", "mean", "ace"])
def test_every_method_is_the_affine_edit_of_the_means(lm, method):
    means = contrast(lm, POSITIVE, NEGATIVE, sites="mlp_out.0")
    found = SiteEdits.of(means, method, strength=0.5).edits["mlp_out.0"]
    up, down, r = means.positive["mlp_out.0"], means.negative["mlp_out.0"], means.difference("mlp_out.0")
    expected = {
        "add": AffineEdit.add(r, 0.5),
        "ablate": AffineEdit.ablate(r),
        "patch": AffineEdit.patch(r, 0.5 * float(up @ r / r.norm())),
        "mean": AffineEdit.mean_ablate(r, down),
        "ace": AffineEdit.ace(up, down, 0.5),
    }[method]
    h = torch.randn(4, D_MODEL)
    torch.testing.assert_close(found(h), expected(h), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("where", "edited"), [("all", slice(0, 6)), ("prompt", slice(0, 5)), ("reply", slice(5, 6))])
def test_only_the_tokens_that_were_asked_for_are_edited(lm, ace, where, edited):
    ids = tokens(2, 6)
    with lm.reading("resid_post.1") as acts:
        lm(ids)
    plain = acts["resid_post.1"]
    with ace.at(3.0).acting(where).on(lm), lm.reading("resid_post.1") as acts:
        lm(ids)
    changed = (acts["resid_post.1"] - plain).norm(dim=-1) > 1e-4
    expected = torch.zeros(2, 6, dtype=torch.bool)
    expected[:, edited] = True
    assert torch.equal(changed, expected)


@pytest.mark.parametrize("where", ["all", "prompt", "reply"])
def test_left_padding_and_the_cache_change_nothing(lm, ace, where):
    """A short prompt among longer ones, generated from the cache, is what it is alone and in one pass."""
    edits = ace.at(2.0).acting(where)
    short, longer = tokens(1, 4, seed=3)[0].tolist(), tokens(1, 8, seed=4)[0].tolist()
    with edits.on(lm):
        alone = lm.generate([short], max_new_tokens=5)[0]
        beside = lm.generate([longer, short], max_new_tokens=5)[1]
    assert alone == beside
    whole = torch.tensor([short + alone])
    positions = {"all": None, "prompt": slice(0, 3), "reply": slice(3, None)}[where]
    with lm.editing(edits.edits, positions=positions):
        logits = lm(whole).logits
    assert logits[0, 3 : 3 + len(alone)].argmax(-1).tolist()[: len(alone)] == alone


def test_sequential_fitting_measures_later_sites_on_the_edited_stream(lm):
    sites = ["resid_post.0", "resid_post.1"]
    options = {"sites": sites, "method": "ace", "strength": 1.0}
    apart, sequential = (
        SiteEdits.fit(lm, POSITIVE, NEGATIVE, sequential=chosen, **options) for chosen in (False, True)
    )
    torch.testing.assert_close(apart.edits[sites[0]].added, sequential.edits[sites[0]].added)
    with lm.editing({sites[0]: sequential.edits[sites[0]]}):
        means = contrast(lm, POSITIVE, NEGATIVE, sites=sites[1])
    torch.testing.assert_close(sequential.edits[sites[1]].added, means.difference(sites[1]))
    assert not torch.allclose(apart.edits[sites[1]].added, sequential.edits[sites[1]].added, atol=1e-3)


def test_every_sublayer_may_have_its_own_vector(lm):
    edits = SiteEdits.fit(lm, POSITIVE, NEGATIVE, sites=["mixer_out.*", "mlp_out.*"], method="add", strength=0.2)
    assert len(edits.edits) == 2 * lm.n_layers
    assert len({edit.added.norm().item() for edit in edits.edits.values()}) == 2 * lm.n_layers


@pytest.mark.parametrize("family", ["gpt_neox", "gpt2", "llama", "gemma2", "mamba2", "rwkv"])
def test_ablation_everywhere_leaves_no_projection_anywhere_in_the_stream(family):
    lm = LanguageModel(tiny(family))
    u = torch.nn.functional.normalize(torch.randn(D_MODEL), dim=0)
    streams = [*lm.match("resid_pre.*"), f"resid_post.{lm.n_layers - 1}"]
    for mean, expected in ((None, 0.0), (2.0 * u, 2.0 + 0.5 * 3)):
        edits = SiteEdits.everywhere(lm, 3 * u, mean=mean, strength=0.5)
        with edits.on(lm), lm.reading(*streams) as acts:
            lm(tokens(2, 6))
        for site in streams:
            torch.testing.assert_close(acts[site] @ u, torch.full((2, 6), expected), atol=2e-4, rtol=0)


def test_contexts_nest_in_order_and_say_how_far_they_overlap(lm, ace):
    other = SiteEdits.fit(lm, NEGATIVE, POSITIVE, sites="resid_post.1", method="add", strength=1.0)
    assert ace.overlap(other)["resid_post.1"] == pytest.approx(1, abs=1e-4)
    joined = ace.edits["resid_post.1"].then(other.edits["resid_post.1"])
    ids = tokens(2, 6)
    with ace.on(lm), other.on(lm):
        nested = lm(ids).logits
    with lm.editing({"resid_post.1": joined}):
        torch.testing.assert_close(lm(ids).logits, nested, atol=1e-4, rtol=0)


def test_hooks_are_gone_after_an_error(lm, ace):
    plain = lm(tokens(2, 6)).logits
    with pytest.raises(RuntimeError, match="on the way"), ace.at(5.0).on(lm):
        raise RuntimeError("on the way")
    torch.testing.assert_close(lm(tokens(2, 6)).logits, plain, atol=0, rtol=0)


def test_a_conditional_edit_acts_where_its_probe_fires():
    h = torch.tensor([[2.0, 0.0], [-2.0, 0.0]])
    edit = Conditional(AffineEdit.add(torch.tensor([0.0, 1.0])), torch.tensor([1.0, 0.0]), threshold=0.5)
    torch.testing.assert_close(edit(h), torch.tensor([[2.0, 1.0], [-2.0, 0.0]]))
    torch.testing.assert_close(edit.at(3.0)(h), torch.tensor([[2.0, 3.0], [-2.0, 0.0]]))
    always = Conditional(edit.edit, edit.weight, threshold=float("-inf"))
    torch.testing.assert_close(always(h), edit.edit(h))
    with pytest.raises(ValueError, match="finite vector"):
        Conditional(edit.edit, torch.full((2,), float("nan")))


def test_saved_edits_come_back_and_belong_to_their_model(lm, ace, tmp_path):
    ace.acting("reply").save(tmp_path / "edits")
    again = SiteEdits.load(tmp_path / "edits", lm)
    assert again.where == "reply"
    assert again.facts == ace.facts
    assert set(again.facts["norms"]) == {"resid_post.1"}
    h = torch.randn(3, D_MODEL)
    torch.testing.assert_close(again.edits["resid_post.1"](h), ace.edits["resid_post.1"](h), atol=0, rtol=0)
    with pytest.raises(SondeError, match="whose weights are not those of other"):
        SiteEdits.load(tmp_path / "edits", LanguageModel(tiny("gpt_neox", seed=1), name="other"))
    with pytest.raises(SondeError, match=r"width 32 at resid_post\.1, wide has 64"):
        SiteEdits.load(tmp_path / "edits", LanguageModel(tiny("gpt_neox", hidden_size=64), name="wide"))
    with pytest.raises(SondeError, match=r"are at resid_post.1, which .* does not have"):
        SiteEdits.load(tmp_path / "edits", LanguageModel(tiny("gpt_neox", num_hidden_layers=1)))
    with pytest.raises(SondeError, match="is not the folder of edits"):
        SiteEdits.load(tmp_path, lm)


def test_sets_that_do_not_differ_are_told_by_site(lm):
    with pytest.raises(SondeError, match="do not differ"):
        SiteEdits.fit(lm, POSITIVE, POSITIVE, sites="resid_post.0")
    means = contrast(lm, POSITIVE, NEGATIVE, sites=["resid_post.0"])
    means.positive["resid_post.0"] = means.negative["resid_post.0"]
    with pytest.raises(SondeError, match=r"no difference .* at resid_post.0 \(6 and 5 prompts\)"):
        SiteEdits.of(means)


def test_bad_arguments_are_refused(lm, ace):
    with pytest.raises(SondeError, match="where is 'here'"):
        ace.acting("here")
    with pytest.raises(SondeError, match="method 'push' is unknown"):
        SiteEdits.fit(lm, POSITIVE, NEGATIVE, sites="resid_post.0", method="push")
    with pytest.raises(SondeError, match="no negative prompts"):
        SiteEdits.fit(lm, POSITIVE, [], sites="resid_post.0")
    with pytest.raises(SondeError, match="there are no edits"):
        SiteEdits({})


def test_norms_are_those_of_the_means(lm):
    means = contrast(lm, POSITIVE, NEGATIVE, sites="resid_post.0")
    difference, _ = mean_norms(means)["resid_post.0"]
    assert difference == pytest.approx(float(means.difference("resid_post.0").norm()))
