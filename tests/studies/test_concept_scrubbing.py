"""The study of concept scrubbing on the bundled model: what it finds, that it goes on, and what it refuses."""

import pytest
from kill_and_resume import numbers

from sonde.errors import SondeError
from sonde.studies.concept_scrubbing import ConceptScrubbingConfig, concept_scrubbing

MODEL = "organism:pebble"
SMALL = {"tokens": 4096, "seeds": 1}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scrubbing") / "run"
    return concept_scrubbing(ConceptScrubbingConfig(MODEL, out=folder, **SMALL))


def test_part_of_speech_costs_more_than_a_random_subspace_and_sal_more_than_leace(report):
    found = {finding["id"]: finding for finding in numbers(report.parent)}
    added = found["scrubbing.added-loss"]
    assert added["status"] == "found"
    assert added["estimate"] >= 5 * max(added["control"]["estimate"], 0)
    assert added["control"]["estimate"] >= 0
    assert found["scrubbing.sal"]["status"] == "found"


def test_the_report_names_its_controls_and_shows_every_condition(report):
    page = report.read_text(encoding="utf-8")
    for name in ("no edit", "random subspace", "LEACE on the clean run", "SAL", "labelled by rules"):
        assert name in page


def test_a_finished_study_is_resumed_with_the_same_numbers(report):
    before = numbers(report.parent)
    config = ConceptScrubbingConfig(MODEL, out=report.parent, resume=True, **SMALL)
    assert numbers(concept_scrubbing(config).parent) == before


def test_labels_come_from_a_treebank(tmp_path):
    words = [("The", "DET"), ("old", "ADJ"), ("man", "NOUN"), ("went", "VERB"), ("home", "ADV"), (".", "PUNCT")]
    sentence = "\n".join(f"{i}\t{w}\t_\t{tag}" + "\t_" * 6 for i, (w, tag) in enumerate(words, 1))
    path = tmp_path / "a.conllu"
    path.write_text("\n\n".join([sentence] * 450) + "\n", encoding="utf-8")
    config = ConceptScrubbingConfig(
        MODEL, labels=(str(path),), seeds=1, where="mixers", layers=(0, -1), out=tmp_path / "run"
    )
    page = concept_scrubbing(config).read_text(encoding="utf-8")
    assert "a.conllu" in page
    assert "part of speech" in page


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"seeds": 0}, "--seeds is 0"),
        ({"labels": ("a.conllu",), "text": "b.txt"}, "leave --text out"),
        ({"labels": ("a.conllu",)}, "does not exist"),
        ({"labels": ("a.txt",)}, r"give \.conllu"),
        ({"labels": ("a.conllu",), "column": "lemma"}, "choose upos"),
        ({"layers": (9,)}, "layer 9 does not exist"),
        ({"tokens": 1024}, "too few"),
        ({"tokens": 1}, "--tokens is 1"),
        ({"resume": True}, "--resume needs --out"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(options, match, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SondeError, match=match):
        concept_scrubbing(ConceptScrubbingConfig(MODEL, **options))
    assert not list(tmp_path.iterdir())
