"""The studies of steering: what their reports say, at a small size, and the criteria on a small transformer."""

import pytest
from kill_and_resume import numbers

from sonde.errors import SondeError
from sonde.organisms.forbidden import train_forbidden
from sonde.studies.ace import AceConfig, ace
from sonde.studies.ace_toy import Row, acceptance, measured
from sonde.studies.direction_selection import SelectionConfig, direction_selection

SMALL = {"models": ("organism:refuser",), "prompts": 32, "held": 8, "strengths": (0.0, 1.0), "tokens": 1024}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return ace(AceConfig(**SMALL, out=tmp_path_factory.mktemp("ace") / "run"))


def test_ace_switches_refusal_on_every_prompt_and_addition_does_not(report):
    found = {finding["id"]: finding for finding in numbers(report.parent)}
    assert found["refuser.gap-off"]["estimate"] < 0.2
    switch = found["refuser.switch"]
    assert switch["status"] == "found"
    assert switch["estimate"] > 0.6 > switch["control"]["estimate"]


def test_a_finished_study_is_resumed_without_measuring_again(report, monkeypatch):
    before = numbers(report.parent)
    monkeypatch.setattr("sonde.concepts.standardisation.standardisation", None)
    assert numbers(ace(AceConfig(**SMALL, out=report.parent, resume=True)).parent) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strengths": (0.5, 2.0)}, "must hold 0 and 1"),
        ({"held": 1}, "--held is 1"),
        ({"harmful": ("a.txt",)}, "belong together"),
        ({"models": ()}, "--models names none"),
        ({"models": ("organism:pebble",)}, "has no chat template"),
    ],
    ids=str,
)
def test_bad_options_are_refused(change, message, tmp_path):
    with pytest.raises(SondeError, match=message):
        ace(AceConfig(**{**SMALL, "out": tmp_path / "run", **change}))


def test_a_direction_is_chosen_and_held_against_a_random_one(tmp_path):
    config = SelectionConfig(prompts=16, held=4, positions=1, tokens=1024, out=tmp_path / "run")
    found = {finding["id"]: finding for finding in numbers(direction_selection(config).parent)}
    assert found["affine.bypass"]["status"] == "found"
    assert found["affine.bypass"]["estimate"] < 0.3 < found["affine.bypass"]["control"]["estimate"]


def test_the_criteria_tell_good_edits_from_bad_ones():
    def rows(ace_gap, ablation_gap, copied):
        made = {"ACE, a = 0": (0.0, ace_gap, ace_gap, copied), "directional ablation": (0, 0, ablation_gap, 1)}
        made |= {"ACE, a = 1": (1.0, 1.0, 0.0, 0.0), "activation addition, a = −1": (0.0, 0.2, 0.2, 0.1)}
        return [Row(name, *values) for name, values in made.items()]

    assert all(holds for _, holds in acceptance([rows(0.1, 0.5, 0.95)] * 6).values())
    assert [holds for _, holds in acceptance([rows(0.4, 0.5, 0.5)] * 6).values()] == [False, False, False, True, True]


def test_on_a_transformer_with_known_answers_ace_switches_and_leaves_the_rest_alone():
    """One of the six runs of the acceptance; `sonde run ace --toy` has all of them."""
    rows = {row.edit: row for row in measured(train_forbidden(), "resid_post.3", n=256)}
    assert rows["none"].gap > 0.95 and rows["none"].copied > 0.95
    off, on, ablated = rows["ACE, a = 0"], rows["ACE, a = 1"], rows["directional ablation"]
    assert off.gap <= 0.3 and off.gap <= 0.6 * ablated.gap and off.copied >= 0.9
    assert min(on.harmless, on.harmful) >= 0.95
    for name, row in rows.items():
        assert not ("addition" in name and row.harmful <= 0.3 and row.copied >= 0.5)
