"""The study of lenses: what its report says, and that it goes on where it stopped."""

import pytest
from kill_and_resume import numbers

from sonde.errors import SondeError
from sonde.studies.tuned_lens import TunedLensConfig, tuned_lens

MODEL = "organism:pebble"


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "run"
    return tuned_lens(TunedLensConfig(MODEL, tokens=8192, lenses=("logit", "ridge"), out=folder))


def test_the_study_finds_what_the_paper_found(report):
    found = {finding["id"]: finding for finding in numbers(report.parent)}
    closer, transfer = found["distance.closer"], found["transfer.spearman"]
    assert closer["status"] == "found"
    assert closer["interval"][1] < 0
    assert transfer["estimate"] <= -0.6
    assert transfer["paper"]["value"] == -0.78


def test_a_trained_lens_is_kept_in_the_run(report):
    import sonde

    lm = sonde.load(MODEL, check=False)
    assert sonde.TunedLens.load(report.parent / "lenses" / "ridge", lm).sites == lm.match("resid_pre.*")


def test_a_finished_study_is_resumed_without_training(report):
    before = numbers(report.parent)
    config = TunedLensConfig(MODEL, tokens=8192, lenses=("logit", "ridge"), out=report.parent, resume=True)
    assert numbers(tuned_lens(config).parent) == before


@pytest.mark.parametrize("lenses", [("logit",), ("ridge",), ("logit", "crystal"), ()])
def test_lenses_that_cannot_be_compared_are_refused(lenses, tmp_path):
    with pytest.raises(SondeError, match="--lenses takes logit and at least one of"):
        tuned_lens(TunedLensConfig(MODEL, lenses=lenses, out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_the_command_of_a_finding_repeats_the_settings(report):
    expected = "sonde run tuned-lens organism:pebble --lenses logit ridge --tokens 8192"
    assert {finding["command"] for finding in numbers(report.parent)} == {expected}
