"""The study of label economics: what it says of the planted task, of a file, and of options that make no sense."""

import json

import numpy as np
import pytest
from kill_and_resume import numbers

from sonde.cli import main
from sonde.errors import SondeError
from sonde.studies.label_economics import LabelEconomicsConfig, label_economics

SMALL = {"budgets": (20.0, 60.0, 180.0), "shares": (0.0, 0.2, 0.6, 1.0), "seeds": 2, "test": 500,
         "methods": ("sequential",), "budget": 100.0}  # fmt: skip


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "run"
    with pytest.raises(SystemExit) as stop:
        main(["run", "label-economics", "--budget", "100", "--weak-price", "1/10", "--budgets", "20", "60", "180",
              "--shares", "0", "0.2", "0.6", "1", "--seeds", "2", "--test", "500", "--methods", "sequential",
              "--out", str(folder)])  # fmt: skip
    assert not stop.value.code
    return folder / "report.html"


def test_the_report_says_what_to_buy_with_its_interval_and_control(report):
    found = {finding["id"]: finding for finding in numbers(report.parent)}
    assert set(found) == {
        "plan.accuracy", "regimes.budget-20", "regimes.budget-60", "regimes.budget-180", "salience.ratio",
    }  # fmt: skip
    assert found["plan.accuracy"]["sentence"].startswith("For 100, buy ")
    assert all(f["control"] and f["interval"][0] <= f["estimate"] <= f["interval"][1] for f in found.values())
    assert found["plan.accuracy"]["command"].startswith("sonde run label-economics --budget 100.0 --weak-price 1/10")
    page = report.read_text(encoding="utf-8")
    assert "weak labels shuffled" in page and "efficient frontier" in page


def test_every_run_is_kept_with_what_it_bought(report):
    import polars as pl

    runs = pl.read_parquet(report.parent / "tables/runs.parquet")
    assert len(runs) == 2 * 3 * 4
    assert (runs["cost"] <= runs["budget"]).all()
    assert (runs["cost"] * 10 == runs["weak labels"] + 10 * runs["oracle labels"]).all()


def test_a_finished_run_is_resumed_with_the_same_numbers(report, monkeypatch):
    monkeypatch.setattr("sonde.knowledge.label_sweep.sweep", None)  # nothing is run again
    before = numbers(report.parent)
    config = LabelEconomicsConfig(**{**SMALL, "weak_price": "1/10"}, out=report.parent, resume=True)
    assert numbers(label_economics(config).parent) == before


def write(path, rows=900, **columns):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, 12)).astype(np.float32)
    truth = (x[:, 0] + 0.3 * rng.standard_normal(rows) > 0).astype(float)
    truth[rows // 2 :] = np.nan
    arrays = {"features": x, "cheap": 1 / (1 + np.exp(-x[:, 0] - x[:, 1])), "expert": truth, **columns}
    np.savez(path, **arrays)
    return str(path)


def test_a_plan_is_made_from_a_users_file_in_which_the_truth_is_partly_known(tmp_path):
    config = LabelEconomicsConfig(
        data=write(tmp_path / "mine.npz"), weak="cheap", truth="expert", budget=40.0, seeds=2, methods=("sequential",),
        shares=(0.0, 0.2, 0.6, 1.0), out=tmp_path / "run",
    )  # fmt: skip
    page = label_economics(config).read_text(encoding="utf-8")
    assert "mine.npz" in page and "expert labels" in page and "cheap labels" in page
    assert json.loads((tmp_path / "run/run.json").read_text())["status"] == "finished"


def test_texts_are_read_by_a_language_model(tmp_path):
    import polars as pl

    rng = np.random.default_rng(0)
    words = rng.permutation([f"{a} {b}" for a in ("warm", "cold", "dry", "wet") for b in map(str, range(60))])
    truth = [int(word.split()[0] in ("warm", "dry")) for word in words]
    weak = [0.8 if t ^ (i % 5 == 0) else 0.2 for i, t in enumerate(truth)]
    pl.DataFrame({"text": words, "weak": weak, "truth": truth}).write_csv(tmp_path / "t.csv")
    config = LabelEconomicsConfig(
        data=str(tmp_path / "t.csv"), model="organism:pebble", budget=16.0, weak_price="1/4", seeds=2,
        methods=("sequential",), shares=(0.0, 0.5, 1.0), out=tmp_path / "run",
    )  # fmt: skip
    assert label_economics(config).exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weak_price": "-1"}, "a label cannot cost less than nothing"),
        ({"weak_price": "0"}, "weak labels without limit need a cap"),
        ({"weak_price": "cheap"}, "expected a number such as 0.1 or 1/10"),
        ({"budget": 0.5}, "a budget of 0.5 is below the price of a label, 1"),
        ({"budgets": (100.0,)}, "--budgets needs at least two"),
        ({"budgets": (10.0, 1e6)}, "the planted task makes 60,000 at most"),
        ({"shares": (0.0, 1.0)}, "--shares are between 0 and 1"),
        ({"methods": ("magic",)}, "--methods takes any of sequential"),
        ({"seeds": 1}, "--seeds is 1"),
        ({"model": "organism:pebble"}, "--model reads the texts of --data"),
        ({"data": "none.npz"}, r"none\.npz does not exist"),
        ({"resume": True, "out": None}, "--resume needs --out"),
    ],
    ids=str,
)
def test_bad_options_are_refused_in_one_line(change, message, tmp_path):
    with pytest.raises(SondeError, match=message):
        label_economics(LabelEconomicsConfig(**{**SMALL, "out": tmp_path / "run", **change}))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("columns", "given", "message"),
    [
        ({"cheap": np.full(900, 3.0)}, {}, "label source 'cheap' holds 3.*looks like a column of classes"),
        ({"expert": np.full(900, 2.0)}, {}, "'expert' holds 2: the truth is 0 or 1"),
        ({}, {"weak": "none"}, r"has no column 'none'; there are features, cheap, expert"),
        ({}, {"budgets": (8.0, 400.0)}, r"more labels were asked for than the pool of 750 rows holds"),
        ({}, {"weak_price": "1/1000"}, "are enough for a pilot of"),
    ],
    ids=range(5),
)
def test_files_that_cannot_be_used_are_refused_with_the_column(columns, given, message, tmp_path):
    path = write(tmp_path / "mine.npz", **columns)
    config = {"data": path, "weak": "cheap", "truth": "expert", "out": tmp_path / "run", "seeds": 2, **given}
    with pytest.raises(SondeError, match=message):
        label_economics(LabelEconomicsConfig(**config))
    assert not (tmp_path / "run").exists()


def test_one_line_and_exit_code_2(capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        main(["run", "label-economics", "--weak-price", "-1", "--out", str(tmp_path / "run")])
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
