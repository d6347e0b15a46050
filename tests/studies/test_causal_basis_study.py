"""The study of causal directions: what its report says, and that it goes on where it stopped."""

import json

import pytest
from families import tiny
from kill_and_resume import numbers

from sonde.cli import main
from sonde.errors import SondeError
from sonde.studies.causal_basis import CausalBasisConfig, causal_basis

OPTIONS = ("--tokens", "1024", "--directions", "8")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from sonde.data.python_docs import topics
    from sonde.organisms.small_lm import train_tokenizer

    folder = tmp_path_factory.mktemp("model")
    tiny("gpt_neox", vocab_size=400).save_pretrained(folder)
    train_tokenizer(topics()[:20], 400).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def report(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "run"
    with pytest.raises(SystemExit) as stop:
        main(["run", "causal-basis", model, *OPTIONS, "--out", str(folder)])
    assert not stop.value.code
    return folder / "report.html"


def test_every_chapter_has_its_number_its_control_and_its_command(report, model):
    found = {finding["id"]: finding for finding in numbers(report.parent)}
    assert set(found) == {
        "directions.strength", "fidelity.spearman", "alignment.depth", "alignment.lens", "updates.negative"
    }  # fmt: skip
    for finding in found.values():
        assert finding["control"]
        assert finding["interval"][0] <= finding["estimate"] <= finding["interval"][1]
        assert finding["command"] == f"sonde run causal-basis {model} --directions 8 --tokens 1024"
    assert found["directions.strength"]["status"] == "found"
    assert found["fidelity.spearman"]["n"] == 8


def test_directions_and_lens_are_kept(report):
    from safetensors.torch import load_file

    bases = load_file(report.parent / "weights" / "bases.safetensors")
    assert {site: tuple(directions.shape) for site, directions in bases.items()} == {
        f"resid_pre.{layer}": (8, 32) for layer in range(3)
    }
    assert (report.parent / "lens" / "config.json").exists()
    assert json.loads((report.parent / "run.json").read_text())["status"] == "finished"


def test_a_finished_study_is_resumed_with_the_same_numbers(report, model):
    before = numbers(report.parent)
    config = CausalBasisConfig(model, tokens=1024, directions=8, out=report.parent, resume=True)
    assert numbers(causal_basis(config).parent) == before


@pytest.mark.parametrize(("count", "words"), [(7, "need at least 8"), (33, "of width 32")])
def test_impossible_numbers_of_directions_are_refused(model, count, words, tmp_path, capsys):
    with pytest.raises(SondeError, match=words):
        causal_basis(CausalBasisConfig(model, directions=count, out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    with pytest.raises(SystemExit) as stop:
        main(["run", "causal-basis", model, "--directions", str(count), "--out", str(tmp_path / "run")])
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
