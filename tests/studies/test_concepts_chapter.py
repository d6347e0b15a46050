"""The audit's chapter on concepts: what it finds in the bundled model, with rules and with the user's labels."""

import json

import pytest
from kill_and_resume import numbers

from sonde.errors import SondeError
from sonde.studies.audit import AuditConfig, audit

MODEL = "organism:pebble"


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("concepts") / "run"
    return audit(AuditConfig(MODEL, chapters=("concepts",), tokens=4096, out=folder))


def test_parts_of_speech_can_be_read_and_are_needed(report):
    found = {finding["id"]: finding for finding in numbers(report.parent)}
    present, cost = found["concepts.present"], found["concepts.cost"]
    assert present["status"] == cost["status"] == "found"
    assert present["estimate"] > 60
    assert present["control"]["estimate"] < 45
    assert "part of speech" in present["sentence"]
    assert cost["estimate"] > 3 * cost["control"]["estimate"]


def test_the_chapter_shows_every_concept_and_its_controls(report):
    page = report.read_text(encoding="utf-8")
    for words in ("class of token", "capitals", "place in the window", "shuffled labels", "random subspace"):
        assert words in page


def test_a_finished_audit_is_resumed_with_the_same_numbers(report):
    before = numbers(report.parent)
    config = AuditConfig(MODEL, chapters=("concepts",), tokens=4096, out=report.parent, resume=True)
    assert numbers(audit(config).parent) == before


def test_labels_of_the_user_come_first(tmp_path):
    path = tmp_path / "names.jsonl"
    text = "Anna saw the wolf by the river. Then Peter called, and the wolf ran away from Anna. "
    spans = [[i, i + len(w), kind] for w, kind in (("Anna", "name"), ("Peter", "name"), ("wolf", "animal"))
             for i in range(len(text)) if text.startswith(w, i)]  # fmt: skip
    path.write_text("\n".join([json.dumps({"text": text * 4, "spans": spans})] * 20), encoding="utf-8")
    config = AuditConfig(MODEL, chapters=("concepts",), tokens=4096, labels=str(path), out=tmp_path / "run")
    found = {finding["id"]: finding for finding in numbers(audit(config).parent)}
    assert "Its label can be read" in found["concepts.present"]["sentence"]
    assert "--labels" in found["concepts.present"]["command"]


def test_labels_that_cannot_be_read_end_the_audit_in_one_line(tmp_path):
    with pytest.raises(SondeError, match="does not exist"):
        audit(AuditConfig(MODEL, chapters=("concepts",), labels="nowhere.conllu", out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()
