"""The study of weak to strong: what it says of a planted task, of a language model, and of senseless options."""

import pytest
from kill_and_resume import numbers

from sonde.cli import main
from sonde.knowledge.label_training import StageSettings
from sonde.studies.weak_to_strong import WeakToStrongConfig, weak_to_strong

TINY = ("--rows", "1000", "--test", "300", "--seeds", "2")


def run(*words):
    with pytest.raises(SystemExit) as stop:
        main(["run", "weak-to-strong", *words])
    return stop.value.code


def page(folder):
    return (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "run"
    assert not run(*TINY, "--recipes", "kNN-filter", "logistic-relabel", "--out", str(folder))
    return folder


def test_the_share_of_the_gap_is_held_against_the_supervisor_and_shuffled_labels(folder):
    found = {finding["id"]: finding for finding in numbers(folder)}
    assert set(found) == {"gap.xent", "gap.best-recipe"}
    assert found["gap.xent"]["control"]["name"] == "the supervisor itself"
    low, high = found["gap.xent"]["interval"]
    assert low <= found["gap.xent"]["estimate"] <= high < 1
    assert found["gap.xent"]["command"].startswith("sonde run weak-to-strong --recipes kNN-filter logistic-relabel")
    assert "labels that say nothing" in found["gap.xent"]["sentence"]
    assert "labels shuffled" in page(folder)


def test_every_recipe_and_control_is_in_the_table(folder):
    import polars as pl

    table = pl.read_parquet(folder / "tables/gap.all.parquet")
    assert table["who"].to_list() == [
        "supervisor", "xent", "kNN-filter", "logistic-relabel", "xent, errors shuffled", "xent, labels shuffled",
        "ceiling",
    ]  # fmt: skip
    area = {who: float(text.split()[0]) for who, text in zip(table["who"], table["AUROC"], strict=True)}
    assert area["xent, labels shuffled"] < area["supervisor"] < area["ceiling"]


def test_a_finished_run_is_resumed_with_the_same_numbers(folder, monkeypatch):
    monkeypatch.setattr("sonde.studies.weak_to_strong._one_seed", None)  # nothing is run again
    before = numbers(folder)
    config = WeakToStrongConfig(
        rows=1000, test=300, seeds=2, recipes=("kNN-filter", "logistic-relabel"), out=folder, resume=True
    )
    assert numbers(weak_to_strong(config).parent) == before


def test_a_language_model_is_the_student(tmp_path, monkeypatch):
    monkeypatch.setattr("sonde.knowledge.label_lm.stage_settings", lambda lm: StageSettings(passes=64))
    folder = tmp_path / "run"
    words = ("--model", "organism:quirky-comparison", "--rows", "60", "--test", "60", "--seeds", "2")
    assert not run(*words, "--recipes", "entropy", "--student", "adapters", "--out", str(folder))
    assert sorted(path.name for path in (folder / "steps").iterdir()) == ["seed-0.safetensors", "seed-1.safetensors"]
    assert "Taught with weak labels alone" in page(folder) or "There is no gap" in page(folder)


def test_a_gap_that_is_not_there_is_refused(tmp_path):
    folder = tmp_path / "run"
    words = ("--model", "organism:quirky-comparison", "--rows", "60", "--seeds", "2", "--recipes", "kNN-filter")
    assert not run(*words, "--weak-site", "resid_post.3", "--out", str(folder))
    (finding,) = numbers(folder)
    assert "less than 0.05 above the supervisor's" in finding["reason"]
    assert "There is no gap" in page(folder)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--recipes", "magic"), "--recipes takes any of xent"),
        (("--student", "adapters"), "need --model"),
        (("--seeds", "1"), "fewer than 2"),
        (("--rows", "10"), "at least 60"),
        (("--model", "organism:quirky-comparison", "--supervisor-rows", "5000"), "lower --supervisor-rows"),
    ],
)
def test_senseless_options_are_one_line_and_leave_no_folder(words, message, tmp_path, capsys):
    folder = tmp_path / "run"
    assert run(*words, "--out", str(folder)) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.strip().splitlines()) == 1
    assert not folder.exists()
