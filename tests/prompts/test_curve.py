"""Curves whose losses are planted: distances, saturation and intervals are what they must be."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sonde.files import load_bundle, save_bundle
from sonde.prompts.claims import Elicited, claim
from sonde.prompts.curve import Curve, Threshold
from sonde.studies.elicitation_chapters import curve_finding

LENGTHS = (0, 1, 4, 16)


def planted(losses, *, lengths=LENGTHS, rows=40, noise=0.0, restarts=1):
    """A curve of the given mean losses; restart 0 is best; success is a loss under ln 2."""
    rng = np.random.default_rng(0)
    offsets = noise * rng.standard_normal(rows)
    base = np.array(losses, dtype=float)[:, None, None] + np.arange(restarts)[:, None]
    nats = np.broadcast_to(base, (len(losses), restarts, 1)) + (offsets - offsets.mean())
    return Curve(
        lengths,
        nats,
        nats < math.log(2),
        nats.mean(-1),
        np.full(rows, 2),
        np.arange(rows) // 2,
        tuple((("suffix", 0.3),) * restarts for _ in lengths),
        tuple(torch.zeros(restarts, n, 3) for n in lengths),
    )


def test_the_distance_is_the_first_length_at_the_threshold():
    curve = planted([9.0, 5.0, 0.5, 0.1])
    assert curve.conditional_distance(Threshold(nats=0.6)) == 4
    assert curve.conditional_distance(Threshold(nats=9.0)) == 0
    assert math.isinf(curve.conditional_distance(Threshold(nats=0.01)))
    assert curve.conditional_distance(Threshold(success=0.95)) == 4
    for both in ({}, {"nats": 1.0, "success": 0.5}):
        with pytest.raises(ValueError, match="either of nats or of success"):
            Threshold(**both)


def test_saturation_follows_the_five_per_cent_rule():
    assert planted([10.0, 5.0, 1.4, 1.0]).saturation() == 4  # 0.4 <= 0.05 * 9
    assert planted([10.0, 5.0, 1.5, 1.0]).saturation() == 16
    assert planted([1.0, 1.0, 1.0, 1.0]).saturation() == 0  # nothing to gain: saturated at once


@given(st.lists(st.floats(0.01, 20), min_size=4, max_size=4))
def test_a_looser_threshold_never_takes_more_tokens(losses):
    curve = planted(losses)
    distances = [curve.conditional_distance(Threshold(nats=nats)) for nats in (0.1, 1.0, 5.0, 20.0)]
    assert distances == sorted(distances, reverse=True)
    assert curve.loss(curve.saturation()).estimate <= max(losses) + 1e-9


def test_the_best_restart_is_the_one_that_validation_chose_not_the_one_that_tested_best():
    curve = planted([9.0, 5.0, 1.0, 0.1], restarts=3)
    swapped = Curve(**{**vars(curve), "validation": curve.validation[:, ::-1].copy()})
    assert curve.best(4) == 0 and swapped.best(4) == 2
    assert swapped.loss(4).estimate == pytest.approx(3.0)
    assert swapped.median_loss(4) == curve.median_loss(4) == pytest.approx(2.0)
    assert curve.loss(4, per_token=True).estimate == pytest.approx(0.5)


def test_the_interval_of_the_distance_holds_it_and_says_when_it_may_be_infinite():
    sure = planted([9.0, 5.0, 0.5, 0.1], noise=0.05)
    assert sure.distance_interval(Threshold(nats=0.7)) == (4, 4)
    unsure = planted([9.0, 5.0, 1.0, 0.69], noise=1.0)
    low, high = unsure.distance_interval(Threshold(nats=0.7))
    assert low <= unsure.conditional_distance(Threshold(nats=0.7)) <= high == math.inf


def test_rows_of_one_context_count_as_one_unit():
    assert planted([9.0, 5.0, 1.0, 0.1], noise=1.0).loss(1).n == 20


def test_a_curve_comes_back_as_it_was_saved(tmp_path):
    curve = planted([9.0, 5.0, 1.0, 0.1], restarts=2)
    save_bundle(tmp_path / "curve.safetensors", curve.state())
    back = Curve.from_state(load_bundle(tmp_path / "curve.safetensors"))
    assert back.rows() == curve.rows() and back.settings == curve.settings
    assert all(torch.equal(a, b) for a, b in zip(back.vectors, curve.vectors, strict=True))


def test_lengths_that_do_not_ascend_from_zero_are_refused():
    with pytest.raises(ValueError, match="ascend from 0"):
        planted([9.0, 5.0], lengths=(1, 4))
    with pytest.raises(ValueError, match="the curve has no length 2"):
        planted([9.0, 5.0, 1.0, 0.1]).loss(2)


def elicited(curve, control=None, random=None, held_out=True):
    return Elicited("toy", "write the payload", curve, control, random, held_out)


def test_without_a_control_model_the_word_is_refused_with_the_reason():
    said = claim(elicited(planted([9.0, 0.1, 0.1, 0.1])))
    assert said.capability == "refused"
    assert "no control model" in said.reason and "2502.15836" in said.reason
    assert "capability" not in said.sentence


def test_without_held_out_contexts_the_word_is_refused():
    curve, control = planted([9.0, 0.1, 0.1, 0.1]), planted([9.0, 8.0, 7.0, 6.0])
    said = claim(elicited(curve, control, held_out=False))
    assert said.capability == "refused" and "held out" in said.reason


def test_fewer_tokens_than_the_control_model_and_than_random_strings_is_a_capability():
    curve, control = planted([9.0, 0.1, 0.1, 0.1]), planted([9.0, 8.0, 7.0, 6.0])
    said = claim(elicited(curve, control, control), bits=64)
    assert said.capability == "present"
    assert said.sentence == (
        "1 token (64 bits) makes toy write the payload on unseen contexts; the control model needs more than 16 "
        "tokens, random targets of that length more than 16 tokens."
    )


@pytest.mark.parametrize(
    ("curve", "control", "random", "reason"),
    [
        ([9.0, 5.0, 5.0, 5.0], [9.0] * 4, [9.0] * 4, "longer"),
        ([9.0, 0.1, 0.1, 0.1], [9.0, 0.1, 0.1, 0.1], [9.0] * 4, "takes no more: this shows what prompts can do"),
        ([9.0, 0.1, 0.1, 0.1], [9.0] * 4, [9.0, 0.1, 0.1, 0.1], "any string could be had"),
        ([9.0, 0.69, 0.1, 0.1], [9.0, 0.70, 0.1, 0.1], None, "cannot be told apart"),
    ],
    ids=str,
)
def test_what_a_control_does_as_well_shows_no_capability(curve, control, random, reason):
    curves = [planted(losses, noise=0.2) for losses in (curve, control)]
    said = claim(elicited(*curves, planted(random, noise=0.2) if random else None), Threshold(nats=math.log(2)))
    assert said.capability == "not shown" and reason in said.reason


def test_a_push_is_found_where_it_works_and_the_control_model_under_as_many_tokens_does_not():
    shown = elicited(planted([9.0, 0.1, 0.1, 0.1]), planted([9.0, 8.0, 7.0, 6.0]))
    forced = elicited(planted([9.0, 8.0, 0.1, 0.1]), planted([9.0, 8.0, 0.3, 0.1]))
    found = [curve_finding(one, claim(one), name="x", command="c") for one in (shown, forced)]
    assert [one.status for one in found] == ["found", "unclear"]
    assert found[0].control is not None and (found[0].estimate, found[0].control.estimate) == (1.0, 0.0)
    assert "takes no more" in found[1].sentence
    never = elicited(planted([9.0] * 4), planted([9.5] * 4))
    assert curve_finding(never, claim(never), name="x", command="c").status == "not found"
