"""Declared claims on made-up units whose half-lives are known, the screen's design, and units end to end."""

import dataclasses
import math

import numpy as np
import pytest

from sonde.dynamics.decay_backdoor import Backdoor, run_backdoor
from sonde.dynamics.decay_experiment import Setting, Unit, few_rows, run_unit
from sonde.dynamics.decay_hypotheses import CLAIMS, declared, interval_of, mean_log_half_life
from sonde.dynamics.decay_screen import FACTORS, cells, effects, signs
from sonde.errors import SondeError

TINY = Setting(mixture="B", languages=2, width=16, steps=10, drop_steps=8, revive_from=(4,), batch=8, seed=2)


def row(mixture, seed, life, *, decay=0.01, width=96, censored=False, tokens=100, savings=40.0):
    return {
        "mixture": mixture,
        "seed": seed,
        "weight_decay": decay,
        "width": width,
        "tokens": tokens,
        "half_life_exact": life,
        "censored_exact": censored,
        "savings_64": savings,
        "savings_sign_64": "=",
    }


def units(seeds, ratio, **levels):
    """A and B in every seed, B's 1 + half-life larger by `ratio` up to a little noise."""
    noise = np.random.default_rng(0).normal(0, 0.05, (seeds, 2))
    made = []
    for seed in range(seeds):
        made.append(row("A", seed, 50 * math.exp(noise[seed, 0]) - 1, **levels))
        made.append(row("B", seed, 50 * ratio * math.exp(noise[seed, 1]) - 1, **levels))
    return made


def by_name(rows, **given):
    return {one.name: one for one in declared(rows, **given)}


def test_a_planted_difference_is_supported_with_its_ratio():
    found = by_name(units(10, 2.0))
    assert list(found) == list(CLAIMS)
    one = found["H1"]
    assert one.verdict == "supported" and one.n == 10
    assert one.ratio == pytest.approx(2, rel=0.05) and one.interval.contains(one.ratio)
    assert one.p == 2 / 2**10 and one.adjusted == pytest.approx(6 * one.p)  # of six claims
    assert one.log_rank_p < 0.01
    assert found["H3"].verdict == "supported" and found["H3"].ratio == pytest.approx(8)
    assert found["H2"].verdict == "not run" and found["H6"].verdict == "not run"


def test_no_difference_is_equivalent_and_the_wrong_one_contradicts():
    assert by_name(units(10, 1.0))["H1"].verdict == "equivalent"
    assert by_name(units(10, 0.5))["H1"].verdict == "contradicted"


def test_few_seeds_leave_it_open_and_say_how_many_are_needed():
    one = by_name(units(5, 2.0))["H1"]
    assert one.verdict == "open" and one.interval is not None
    assert "cannot reach" in one.why and "8 or more" in one.why


def test_below_three_seeds_there_is_no_interval():
    one = by_name(units(2, 2.0))["H1"]
    assert one.ratio == pytest.approx(2, rel=0.1) and one.interval is None
    with pytest.raises(SondeError, match="interval over 2 seeds would mean nothing"):
        interval_of([1.0, 2.0])


def test_where_all_are_censored_it_says_so_and_gives_no_number():
    rows = [row(m, s, 384.0, censored=True) for s in range(4) for m in "AB"]
    one = by_name(rows)["H1"]
    assert one.verdict == "not run" and one.ratio is None and "above 384: drop for longer" in one.why
    with pytest.raises(SondeError, match="all 8 half-lives are above 384"):
        mean_log_half_life(rows)
    half = [row("A", s, 60.0) for s in range(4)] + [row("B", s, 384.0, censored=True) for s in range(4)]
    one = by_name(half)["H1"]
    assert one.censored == 4 and "the ratio is a bound" in one.why
    assert one.ratio == pytest.approx(385 / 61) and one.log_rank_p < 0.05


def test_other_budgets_are_refused_unless_forced():
    rows = [row("A", s, 60.0) for s in range(3)] + [row("B", s, 90.0, tokens=200) for s in range(3)]
    with pytest.raises(SondeError, match="read 200 and 100 tokens"):
        declared(rows)
    assert by_name(rows, forced=True)["H1"].ratio == pytest.approx(91 / 61)
    with pytest.raises(SondeError, match="no units"):
        declared([])


def test_weight_decay_and_width_are_paired_by_seed_and_mixture():
    rows = units(9, 1.5) + units(9, 1.5, width=192)
    rows += [one | {"weight_decay": 1.0, "half_life_exact": (one["half_life_exact"] + 1) / 3 - 1} for one in rows]
    found = by_name(rows)
    assert found["H4"].ratio == pytest.approx(3) and found["H4"].n == 9 and found["H4"].verdict == "supported"
    assert found["H6"].ratio == pytest.approx(1.0) and found["H6"].verdict == "equivalent"


def test_a_held_out_pair_that_lasts_as_long_supports_the_fifth_claim():
    rows = [row("D", s, 60.0) | {"held_out_half_life": 40.0 + s, "pair_half_life": 41.0 + s} for s in range(8)]
    found = by_name(rows)["H5"]
    assert found.verdict == "supported" and found.interval.high < 1.25
    slow = [one | {"held_out_half_life": 90.0} for one in rows]
    assert by_name(slow)["H5"].verdict == "contradicted"


def test_the_screen_is_balanced_and_of_resolution_four():
    design = signs()
    assert design.shape == (16, 8) and (design.sum(0) == 0).all()
    np.testing.assert_array_equal(design.T @ design, 16 * np.eye(8))
    for a in range(8):
        for b in range(8):
            for c in range(b):
                if a not in (b, c):
                    assert design[:, a] @ (design[:, b] * design[:, c]) == 0
    settings = cells(TINY)
    assert len(set(settings)) == 16
    assert {s.steps for s in settings} == {10, 40} and {s.optimizer for s in settings} == {"adamw", "sgd"}


def test_a_planted_effect_is_found_and_the_others_are_nothing():
    rows = []
    for seed in range(3):
        for setting, sign in zip(cells(TINY), signs(), strict=True):
            life = 40 * math.exp(0.4 * sign[list(FACTORS).index("lr")]) - 1
            rows.append(dataclasses.asdict(setting) | {"seed": seed, "half_life_exact": life})
    first, *others = effects(rows, base_steps=TINY.steps)
    assert first.factor == "lr" and first.ratio == pytest.approx(math.exp(0.8)) and first.n == 3
    assert all(one.ratio == pytest.approx(1) for one in others)
    with pytest.raises(SondeError, match="both levels"):
        effects([one for one in rows if one["width"] == 64], base_steps=TINY.steps)


def test_a_unit_has_all_stages_and_survives_its_tree(tmp_path):
    unit = run_unit(TINY, floor_steps=4, drift_steps=4, variants=True, alone=True, folder=tmp_path)
    assert set(unit.curves) == {"joint", "dropped", "continued", "floor", "alone"}
    assert set(unit.revivals) == {4, 8} and set(unit.variants) == {"B only", "16 rows of B"}
    assert unit.after.steps == 18 and unit.main() == ("digits",)
    again = Unit.of_tree(unit.tree())
    assert again.summary() == unit.summary() and again.rows() == unit.rows()
    row = unit.summary()
    assert row["half_life_exact"] is None and "skill the model does not have" in row["why_exact"]
    resumed = run_unit(TINY, floor_steps=4, drift_steps=4, variants=True, alone=True, folder=tmp_path)
    assert resumed.rows() == unit.rows()


def test_what_is_dropped_is_named_as_languages_pairs_or_all_of_translation():
    shared = dataclasses.replace(TINY, mixture="C", languages=3)
    joint = shared.joint()
    gone = {
        "digits": 5,  # itself and four translations
        "digits>digits-2": 1,
        "translation": 6,
    }
    for name, count in gone.items():
        assert len(dataclasses.replace(shared, dropped=(name,)).tasks_dropped(joint)) == count
    rest = dataclasses.replace(shared, dropped=("digits-2",), everything_but=True).tasks_dropped(joint)
    assert all("digits-2" not in name for name in rest)
    with pytest.raises(SondeError, match="no task 'latin'"):
        dataclasses.replace(shared, dropped=("latin",)).tasks_dropped(joint)
    with pytest.raises(SondeError, match="leaves an empty mixture"):
        dataclasses.replace(TINY, dropped=("digits", "digits-2")).tasks_dropped(TINY.joint())
    with pytest.raises(SondeError, match="no translation to drop"):
        dataclasses.replace(TINY, dropped=("translation",)).tasks_dropped(TINY.joint())


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(SondeError, match="give a time inside it"):
        Setting(drop_steps=64, revive_from=(64,))
    with pytest.raises(SondeError, match="1 joint steps"):
        Setting(steps=1)


def test_few_rows_are_few_for_the_tasks_that_are_named():
    joint = few_rows(TINY.joint(), ["digits"], 5, seed=0)
    assert len(joint.task("digits").rows) == 5 and len(joint.task("digits-2").rows) > 5


def test_the_held_out_pair_is_followed_through_the_drop():
    unit = run_unit(dataclasses.replace(TINY, mixture="D", dropped=("translation",)), floor_steps=2, drift_steps=2)
    row = unit.summary()
    assert {"zero_shot_before", "zero_shot_middle", "zero_shot_after"} <= set(row)
    assert row["held_out_half_life"] is None  # ten steps teach no translation


def test_the_backdoor_arms_are_scored_on_the_trigger(tmp_path):
    found = run_backdoor(TINY, control_steps=4, folder=tmp_path)
    assert set(found.curves) == {"joint", "clean", "near-triggers", "revived"}
    assert found.trigger == "digits+trigger" and not found.learned
    assert Backdoor.of_tree(found.tree()) == found
    with pytest.raises(SondeError, match="skill the model does not have"):
        found.half_life("clean")
