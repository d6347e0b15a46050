"""The study of bias on planted embeddings, where gender is one direction and a profession leans on it."""

import numpy as np
import pytest
from kill_and_resume import numbers

from sonde.data.biographies import PROFESSIONS, SHARE_OF_WOMEN, ConceptTable, biographies
from sonde.errors import SondeError
from sonde.studies.bias_erasure import BiasErasureConfig, bias_erasure

METHODS = ("leace", "sal", "random")


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Professions 0 and 1 look alike but for gender, which is direction 0; 2 and 3 have directions of their own."""
    folder = tmp_path_factory.mktemp("planted")
    rng = np.random.default_rng(0)
    task = rng.integers(4, size=800)
    gender = np.where(rng.random(800) < np.array([0.9, 0.1, 0.5, 0.5])[task], 1, 0)
    x = rng.normal(size=(800, 12)) * 0.5
    x[:, 0] += 3 * gender
    for t, column in ((0, 1), (1, 1), (2, 2), (3, 3)):
        x[task == t, column] += 3
    lines = ["text,gender,job"] + [f"t,{'fm'[g]},j{t}" for g, t in zip(gender, task, strict=True)]
    (folder / "table.csv").write_text("\n".join(lines), encoding="utf-8")
    np.save(folder / "x.npy", x.astype(np.float32))
    return folder


@pytest.fixture(scope="module")
def report(planted):
    return bias_erasure(config(planted, out=planted / "run"))


def config(folder, **changes):
    given = {"table": str(folder / "table.csv"), "embeddings": str(folder / "x.npy"), "methods": METHODS}
    return BiasErasureConfig(**{**given, "concept": "gender", "task": "job", **changes})


def test_the_gap_that_was_planted_is_found_and_erased(report):
    found = {finding["id"]: finding for finding in numbers(report.parent)}
    concept, gap, task = (found[f"bias.{name}"] for name in ("concept", "gap", "task"))
    assert concept["control"]["estimate"] > 99
    assert concept["interval"][0] < 55
    assert gap["control"]["estimate"] > 40
    assert gap["status"] == "found"
    assert gap["estimate"] < 0.4 * gap["control"]["estimate"]
    assert task["estimate"] < 0  # gender was a help, and is gone


def test_a_random_direction_erases_nothing(report):
    import polars as pl

    table = pl.read_parquet(report.parent / "tables" / "bias.methods.parquet")
    rows = dict(zip(table["what is erased"], table.iter_rows(named=True), strict=True))
    assert rows["random subspace"]["gender told, linear"] > 95
    assert rows["LEACE"]["change"] < 1
    assert rows["LEACE"]["rank"] == rows["random subspace"]["rank"] == 1


def test_a_finished_study_is_resumed_with_the_same_numbers(planted, report):
    before = numbers(report.parent)
    assert numbers(bias_erasure(config(planted, out=report.parent, resume=True)).parent) == before


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"methods": ("sal",)}, "--methods takes leace"),
        ({"methods": ("leace", "magic")}, "--methods takes leace"),
        ({"table": None}, "--embeddings need --table"),
        ({"table": "nowhere.csv"}, "does not exist"),
        ({"table": "nowhere.xls"}, "is no table"),
        ({"concept": "age"}, "no column 'age'; its columns are text, gender, job"),
        ({"embeddings": "x.bin"}, "holds no embeddings"),
        ({"embeddings": "x.npy"}, "cannot be read"),
        ({"embeddings": None, "text": "body"}, "no column 'body'"),
        ({"embeddings": None, "encoder": "./nowhere"}, "cannot be loaded"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(changes, match, planted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SondeError, match=match):
        bias_erasure(config(planted, **changes, out=tmp_path / "run"))


def test_embeddings_must_fit_the_table_and_be_finite(planted, tmp_path):
    x = np.load(planted / "x.npy")
    np.save(tmp_path / "short.npy", x[:5])
    x[7, 2] = np.nan
    np.save(tmp_path / "nan.npy", x)
    for name, match in (("short.npy", "800 rows, one for each"), ("nan.npy", "row 7 of")):
        with pytest.raises(SondeError, match=match):
            bias_erasure(config(planted, embeddings=str(tmp_path / name), out=tmp_path / "run"))


def test_missing_values_are_counted(planted, tmp_path):
    (tmp_path / "t.csv").write_text("text,gender,job\na,f,x\nb,,y\n", encoding="utf-8")
    with pytest.raises(SondeError, match="column 'gender': 1 rows are empty"):
        bias_erasure(config(planted, table=str(tmp_path / "t.csv")))


def test_biographies_have_the_shares_that_they_say_and_name_no_profession():
    table = biographies(3000, seed=1)
    assert table.concepts == ("man", "woman")
    assert set(table.tasks) == set(PROFESSIONS)
    for number, name in enumerate(table.tasks):
        share = table.concept[table.task == number].mean()
        assert share == pytest.approx(SHARE_OF_WOMEN[name], abs=0.1)
        assert not any(name in text for text in table.texts)
    assert biographies(60).texts == biographies(60).texts
    women = [text for text, woman in zip(table.texts, table.concept, strict=True) if woman]
    assert all(any(w in text.split() for w in ("she", "She", "Her", "her")) for text in women)
    assert not any(" he " in f" {text} " or text.startswith("He ") for text in women)


def test_tables_without_two_classes_or_of_uneven_columns_are_refused():
    with pytest.raises(SondeError, match="concept has 1 class"):
        ConceptTable.of(["a", "b"], ["x", "x"], ["y", "z"])
    with pytest.raises(SondeError, match="2 texts, 1 concepts"):
        ConceptTable.of(["a", "b"], ["x"], ["y", "z"])
    with pytest.raises(SondeError, match="too few"):
        biographies(10)
