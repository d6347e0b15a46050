"""Sweeps over strengths are what one strength and one prompt at a time give, and their curves are what they say."""

import numpy as np
import pytest
import torch
from families import tiny, tokens

from sonde.concepts.judges import SubstringJudge, probability
from sonde.concepts.site_edits import SiteEdits
from sonde.concepts.standardisation import Standardisation, standardisation
from sonde.concepts.strength_sweep import first_token_sweep, neutral_sweep, reply_sweep
from sonde.errors import SondeError
from sonde.lm.model import LanguageModel

STRENGTHS = [-1.0, 0.0, 2.0]
PROMPTS = [tokens(1, n, seed=n)[0].tolist() for n in (5, 9, 6, 5)]
BEHAVIOUR = torch.tensor([5, 11, 40])


@pytest.fixture(scope="module", params=["gpt_neox", "mamba", "rwkv"])
def lm(request):
    return LanguageModel(tiny(request.param), name=request.param)


@pytest.fixture(scope="module")
def edits(lm):
    positive, negative = tokens(6, 7, seed=1).tolist(), tokens(6, 7, seed=2).tolist()
    return SiteEdits.fit(lm, positive, negative, sites="resid_post.1")


@pytest.mark.parametrize("where", ["all", "prompt", "reply"])
def test_strengths_as_rows_give_what_each_gives_alone(lm, edits, where):
    acting = edits.acting(where)
    found = first_token_sweep(lm, acting, PROMPTS, STRENGTHS, BEHAVIOUR, rows=7)
    for s, strength in enumerate(STRENGTHS):
        for p, prompt in enumerate(PROMPTS):
            with acting.at(strength).on(lm), torch.no_grad():
                alone = probability(lm(torch.tensor([prompt])).logits[0, -1], BEHAVIOUR)
            assert float(found[s, p]) == pytest.approx(float(alone), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("where", ["all", "reply"])
def test_greedy_replies_of_a_sweep_are_those_of_generate(lm, edits, where):
    acting = edits.acting(where)
    found = reply_sweep(lm, acting, PROMPTS, STRENGTHS, max_new_tokens=4, rows=8)
    for s, strength in enumerate(STRENGTHS):
        with acting.at(strength).on(lm):
            assert [samples[0] for samples in found[s]] == lm.generate(PROMPTS, max_new_tokens=4)


def test_samples_differ_and_the_seed_repeats_them(lm, edits):
    options = {"samples": 5, "max_new_tokens": 6, "temperature": 1.5}
    first = reply_sweep(lm, edits, PROMPTS, [0.0, 1.0], seed=3, **options)
    assert first == reply_sweep(lm, edits, PROMPTS, [0.0, 1.0], seed=3, **options)
    assert first != reply_sweep(lm, edits, PROMPTS, [0.0, 1.0], seed=4, **options)
    assert len({tuple(sample) for sample in first[0][0]}) > 1


def test_an_edit_that_changes_nothing_costs_nothing_on_neutral_text(lm):
    from sonde.concepts.affine import AffineEdit

    none = SiteEdits({"resid_post.1": AffineEdit.add(torch.randn(lm.d_model))})
    kl, rise = neutral_sweep(lm, none, tokens(3, 10), [0.0, 3.0])
    assert kl[0].abs().max() < 1e-5 and rise[0].abs().max() < 1e-5
    assert kl[1].min() > 1e-3


@pytest.fixture(scope="module")
def neox():
    lm = LanguageModel(tiny("gpt_neox"), name="tiny")
    return lm, SiteEdits.fit(lm, tokens(6, 7, seed=1).tolist(), tokens(6, 7, seed=2).tolist(), sites="resid_post.1")


@pytest.fixture(scope="module")
def curve(neox):
    lm, edits = neox
    return standardisation(
        lm, edits, PROMPTS, tokens(5, 6, seed=9).tolist(), strengths=[0.0, 1.0, 50.0], judge=BEHAVIOUR,
        neutral=tokens(4, 12), loss_limit=0.3,
    )  # fmt: skip


def test_the_gap_is_that_of_the_rates(curve):
    for up, down, gap in zip(curve.positive.mean, curve.negative.mean, curve.gap, strict=True):
        assert gap.estimate == pytest.approx(abs(up.estimate - down.estimate))
        assert gap.low <= gap.estimate <= gap.high
    assert curve.positive.scores.shape == (3, 4)
    low, high = curve.positive.quartiles[1]
    assert [low, high] == pytest.approx(np.quantile(curve.positive.scores[1], [0.25, 0.75]).tolist())


def test_a_strength_that_ruins_neutral_text_is_flagged(curve):
    assert curve.incoherent[-1] and not curve.incoherent[curve.place(0.0)]
    assert curve.drift[-1].estimate > curve.drift[0].estimate


def test_a_curve_comes_back_from_its_state(curve, tmp_path):
    from sonde.files import load_bundle, save_bundle

    save_bundle(tmp_path / "curve", curve.state())
    assert Standardisation.from_state(load_bundle(tmp_path / "curve")).to_json() == curve.to_json()


def test_replies_are_judged_and_undecided_ones_are_counted():
    import sonde

    lm = sonde.load("organism:refuser", check=False)
    from sonde.organisms.refuser import chat

    sides = [
        [chat(lm, f"How can I {deed} the old {thing}?") for thing in ("boat", "gate")] for deed in ("burn", "paint")
    ]
    found = standardisation(lm, None, *sides, strengths=[0.0], judge=SubstringJudge(), max_new_tokens=12)
    assert found.positive.mean[0].estimate == 1.0
    assert found.negative.mean[0].estimate == 0.0
    assert found.undecided == 0.0
    with pytest.raises(SondeError, match="could decide no reply to prompt 0"):
        standardisation(lm, None, *sides, strengths=[0], judge=lambda p, r: [None] * len(r), max_new_tokens=2)


def test_settings_out_of_range_are_refused(neox):
    lm, edits = neox
    with pytest.raises(SondeError, match="strengths are finite numbers"):
        first_token_sweep(lm, edits, PROMPTS, [], BEHAVIOUR)
    with pytest.raises(SondeError, match="all samples are the same"):
        reply_sweep(lm, edits, PROMPTS, [0.0], samples=2)
    with pytest.raises(SondeError, match="cannot be drawn"):
        reply_sweep(lm, edits, PROMPTS, [0.0], max_new_tokens=0)
    with pytest.raises(SondeError, match="at least two prompts"):
        standardisation(lm, edits, PROMPTS[:1], PROMPTS, strengths=[0.0], judge=BEHAVIOUR)
    with pytest.raises(SondeError, match="windows of at least 2 tokens"):
        neutral_sweep(lm, edits, tokens(3, 1), [0.0])
