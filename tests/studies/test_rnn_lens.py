"""The study of lenses on recurrent networks: what its report says, and what it refuses."""

import json

import polars
import pytest
from families import tiny
from kill_and_resume import numbers

from sonde.cli import main
from sonde.data.python_docs import topics
from sonde.organisms.small_lm import train_tokenizer
from sonde.studies.rnn_lens import RnnLensConfig, rnn_lens


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A transformer and two recurrent networks of d 32 with one tokenizer, as folders."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = train_tokenizer(topics()[:20], 400)
    for family, layers in (("gpt_neox", 3), ("mamba2", 6), ("rwkv", 3)):
        tiny(family, vocab_size=400, num_hidden_layers=layers).save_pretrained(folder / family)
        tokenizer.save_pretrained(folder / family)
    return [str(folder / family) for family in ("gpt_neox", "mamba2", "rwkv")]


@pytest.fixture(scope="module")
def run(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "run"
    with pytest.raises(SystemExit) as end:
        main(["run", "rnn-lens", "--models", *models, "--tokens", "6144", "--out", str(folder)])
    assert not end.value.code
    return folder


def test_the_tuned_lens_is_closer_at_every_site_also_of_a_mamba2_of_six_layers(run, models):
    closer = [finding for finding in numbers(run) if finding["id"].startswith("depth.closer")]
    assert len(closer) == len(models)
    for finding, sites in zip(closer, (3, 6, 3), strict=True):
        assert f"at all {sites} sites" in finding["sentence"]
        assert finding["status"] == "found" and finding["interval"][1] < 0


def test_models_stand_beside_each_other_by_fraction_of_depth(run):
    table = polars.read_parquet(run / "tables" / "depth.table.parquet")
    assert table["model"].unique(maintain_order=True).to_list() == ["gpt_neox", "mamba2", "rwkv"]
    depths = table["depth"].to_list()
    assert len(depths) == 4 + 7 + 4
    assert depths[:4] == pytest.approx([0, 1 / 3, 2 / 3, 1]) and depths[4:6] == pytest.approx([0, 1 / 6])
    middle = [finding for finding in numbers(run) if finding["id"].startswith("depth.middle")]
    assert ["attention" in finding["sentence"] for finding in middle] == [True, False, False]
    assert [finding["control"]["name"] for finding in middle] == ["bias-only lens"] * 3
    assert [bool(finding["paper"]) for finding in middle] == [True, True, True]


def test_a_finished_study_is_resumed_without_training(run, models, monkeypatch):
    before = numbers(run)
    monkeypatch.setattr("sonde.lens.tuned.TunedLens.fit", None)
    assert numbers(rnn_lens(RnnLensConfig(tuple(models), tokens=6144, out=run, resume=True)).parent) == before
    assert json.loads((run / "findings.json").read_text())["run"]["study"] == "rnn-lens"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--models", "organism:pebble", "organism:pebble"], "--models takes one or more different models"),
        (["--models", "nowhere/at-all/x"], "nowhere/at-all/x"),
        (["--tokens", "1"], "--tokens is 1"),
    ],
)
def test_bad_options_give_one_line(argv, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["run", "rnn-lens", *argv, "--out", str(tmp_path / "run")])
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
