"""After scrubbing, no part of the model is given anything from which the concept could be read linearly."""

import functools
import warnings

import pytest
import torch
from families import tiny

from sonde.concepts.scrubbing import METHODS, CleanRun, Scrub, cut_points, scrub
from sonde.data.python_docs import topics
from sonde.data.rule_tags import tagged
from sonde.errors import SondeError
from sonde.lm.batches import TokenBatches
from sonde.lm.model import LanguageModel
from sonde.lm.row_loss import row_loss
from sonde.lm.stream import feed
from sonde.lm.token_labels import TokenLabels
from sonde.organisms.small_lm import train_tokenizer

FAMILIES = ("gpt_neox", "llama", "opt", "bloom", "olmo2", "mamba2", "rwkv", "falcon_h1", "granitemoehybrid")
CASES = [(family, "leace") for family in FAMILIES] + [("llama", "sal"), ("mamba2", "sal")]


@functools.cache
def tokenizer():
    return train_tokenizer(topics()[:20], 400)


@functools.cache
def model(family="llama", **changes):
    return LanguageModel(tiny(family, vocab_size=400, **changes), tokenizer(), name=family)


@functools.cache
def text():
    """Token batches of some documents, and the class of every token."""
    chosen = topics()[:6]
    batches = TokenBatches(chosen, tokenizer(), context=24, rows=8, limit_tokens=1600)
    return batches, TokenLabels.of(batches, tagged(chosen, "class"))


def gaps(lm, batches, labels, sites, edits):
    """Largest distance between a class mean and the mean of all classes at each site, in deviations of the site."""
    found = {}
    for site in sites:
        x, z = [], []
        for batch in batches:
            with torch.no_grad(), lm.editing(edits), lm.reading(site) as acts:
                lm(batch.tokens, batch.mask)
            label = labels.at(batches, batch.index)
            x.append(acts[site][label >= 0].double())
            z.append(label[label >= 0])
        x, z = torch.cat(x), torch.cat(z)
        means = torch.stack([x[z == c].mean(0) for c in z.unique()])
        found[site] = float((means - x.mean(0)).norm(dim=-1).max() / x.std(0).norm())
    return found


@pytest.mark.parametrize(("family", "method"), CASES)
def test_class_means_are_equal_at_every_cut_point_of_the_scrubbed_run(family, method):
    lm, (batches, labels) = model(family), text()
    made = scrub(lm, batches, labels, method=method)
    assert tuple(made.edits) == cut_points(lm)
    clean = gaps(lm, batches, labels, made.edits, {})
    after = gaps(lm, batches, labels, made.edits, made.edits)
    assert all(clean[site] > 0.1 for site in clean)
    # Float32: what is left of a gap is rounding of activations a thousand times as large as the gap of a rare class.
    assert all(after[site] < 1e-3 * clean[site] for site in after), after


def test_erasers_of_the_clean_run_leave_the_concept_in_deeper_inputs():
    lm, (batches, labels) = model(), text()
    made = scrub(lm, batches, labels, sequential=False)
    after = gaps(lm, batches, labels, made.edits, made.edits)
    assert after["mixer_in.0"] < 1e-4
    assert after["mlp_in.2"] > 0.01
    first = scrub(lm, batches, labels, sites=["mixer_in.0"]).edits["mixer_in.0"]
    h = torch.randn(5, lm.d_model)
    assert torch.allclose(first(h), made.edits["mixer_in.0"](h), atol=1e-5)


@pytest.mark.parametrize("family", ["gpt_neox", "mamba2"])
def test_kept_activations_give_the_erasers_of_recomputed_ones(family, tmp_path):
    lm, (batches, labels) = model(family), text()
    exact = scrub(lm, batches, labels, keep="recompute")
    memory = scrub(lm, batches, labels, keep="memory")
    disk = scrub(lm, batches, labels, keep="disk", folder=tmp_path / "scrub")
    assert not (tmp_path / "scrub" / "stream").exists()
    losses = [row_loss(lm, batches, made.edits).bits_per_byte().estimate for made in (exact, memory, disk)]
    assert losses[1] == losses[2]
    assert abs(losses[1] - losses[0]) < 1e-3 * losses[0]


def test_the_random_control_keeps_the_mean_and_takes_out_as_many_dimensions():
    lm, (batches, labels) = model(), text()
    ours = scrub(lm, batches, labels)
    control = scrub(lm, batches, labels, method="random", ranks=ours.ranks)
    assert control.ranks == ours.ranks
    assert set(ours.ranks.values()) == {len(labels.names) - 1}
    for edit in control.edits.values():
        assert torch.allclose(edit.right @ edit.left, torch.eye(edit.rank), atol=1e-5)
        assert torch.allclose(edit.left, edit.right.T)
        assert torch.allclose(edit(edit.reference), edit.reference, atol=1e-5)
    other = scrub(lm, batches, labels, method="random", seed=1)
    assert not torch.allclose(other.edits["mixer_in.1"].left, control.edits["mixer_in.1"].left)


def test_tokens_without_a_label_are_run_and_not_fitted_on():
    lm, (batches, labels) = model(), text()

    class Half:
        concept, names = labels.concept, labels.names

        def at(self, batches, index):
            z = labels.at(batches, index).clone()
            z[:, ::2] = -1
            return z

    made = scrub(lm, batches, Half(), sites=["mlp_in.1"])
    assert made.edits["mlp_in.1"].facts["n"] < 0.6 * batches.n_tokens
    known, all_of_them = (gaps(lm, batches, z, ["mlp_in.1"], made.edits)["mlp_in.1"] for z in (Half(), labels))
    assert known < 1e-3
    assert all_of_them > 10 * known


@pytest.mark.parametrize("keep", ["memory", "disk", "recompute"])
def test_an_interrupted_scrub_goes_on_where_it_stopped(keep, tmp_path):
    lm, (batches, labels) = model(), text()
    whole = scrub(lm, batches, labels, keep=keep, folder=tmp_path / "whole")
    part = tmp_path / "part"
    done = list(whole.edits)[:3]
    for site in done:
        whole.edits[site].save(part / site)
    again = scrub(lm, batches, labels, keep=keep, folder=part)
    h = torch.randn(4, lm.d_model)
    for site, edit in again.edits.items():
        assert torch.allclose(edit(h), whole.edits[site](h), atol=2e-2 if keep != "recompute" else 1e-5), site


def test_a_scrub_is_saved_and_loaded(tmp_path):
    lm, (batches, labels) = model(), text()
    made = scrub(lm, batches, labels, sites=["mixer_in.*"])
    made.save(tmp_path / "scrub")
    back = Scrub.load(tmp_path / "scrub")
    assert (back.method, back.concept, back.sequential, back.ranks) == ("leace", "class of token", True, made.ranks)
    ids = next(iter(batches)).tokens
    with torch.no_grad(), made.editing(lm):
        ours = lm(ids).logits
    with torch.no_grad(), back.editing(lm):
        assert torch.equal(lm(ids).logits, ours)
    with pytest.raises(SondeError, match="not the folder of a scrub"):
        Scrub.load(tmp_path)


def test_cut_points_are_found_by_what_parts_are_given():
    lm = model()
    assert cut_points(lm) == tuple(f"{kind}_in.{i}" for i in range(3) for kind in ("mixer", "mlp"))
    assert cut_points(lm, "mixers", layers=[-1, 0]) == ("mixer_in.0", "mixer_in.2")
    assert cut_points(model("mamba2")) == ("mixer_in.0", "mixer_in.1", "mixer_in.2")
    with pytest.raises(SondeError, match="layer 7 does not exist"):
        cut_points(lm, layers=[7])
    with pytest.raises(SondeError, match="no cut point"):
        cut_points(model("mamba2"), "mlps")
    with pytest.raises(SondeError, match="cut points are"):
        cut_points(lm, "sublayers")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"method": "magic"}, "use leace, sal, random"),
        ({"keep": "tape"}, "in memory or on disk"),
        ({"keep": "disk"}, "needs a folder"),
        ({"sites": ["logits"]}, "no place to scrub"),
        ({"sites": ["state.0"]}, "no place to scrub"),
        ({"sites": ["mixer_in.9"]}, "does not exist"),
    ],
)
def test_what_cannot_be_scrubbed_is_refused(options, match):
    with pytest.raises(SondeError, match=match):
        scrub(model(), *text(), **options)


def test_text_whose_fitting_part_lacks_the_concept_is_refused():
    batches, labels = text()

    class One:
        concept, names = labels.concept, labels.names

        def __init__(self, label):
            self.label = label

        def at(self, batches, index):
            return torch.full_like(labels.at(batches, index), self.label)

    with pytest.raises(SondeError, match="nothing to erase: only 'line break' of class of token"):
        scrub(model(), batches, One(0))
    with pytest.raises(SondeError, match="nothing to erase: no label of class of token"):
        scrub(model(), batches, One(-1))


def test_activations_that_are_not_finite_are_named():
    lm, (batches, labels) = model(), text()
    with (
        lm.editing({"mixer_in.1": lambda h: h * float("nan")}),
        pytest.raises(SondeError, match=r"mixer_in\.1 cannot be fitted on: row"),
    ):
        scrub(lm, batches, labels, keep="recompute")


@pytest.mark.parametrize("method", METHODS)
def test_no_method_warns_on_ordinary_text(method):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scrub(model(), *text(), method=method)


def test_one_clean_run_fits_several_concepts_and_their_controls():
    lm, (batches, labels) = model(), text()
    places = TokenLabels.by_place(batches.context)
    run = CleanRun(cut_points(lm), batches, [labels, places])
    feed(lm, batches, [run])
    (leace, control), (other, _) = run.finish()
    alone = scrub(lm, batches, labels, sequential=False)
    h = torch.randn(4, lm.d_model)
    for site, edit in alone.edits.items():
        assert torch.allclose(leace.edits[site](h), edit(h), atol=1e-5)
    assert control.ranks == leace.ranks
    assert (control.method, other.concept) == ("random", "place in the window")
