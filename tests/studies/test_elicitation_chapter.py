"""The audit's chapter on elicitation, at a size that tests the words and not the model."""

import json

import pytest
from kill_and_resume import numbers

from sonde.errors import SondeError
from sonde.prompts import elicitation as measuring
from sonde.prompts.elicitation import Budget
from sonde.studies.audit import AuditConfig, audit
from sonde.studies.chapters import elicitation

MODEL = "organism:pebble"


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "mine.jsonl"
    words = ["river", "stone", "lamp", "horse", "glass", "paper", "apple", "cloud"]
    path.write_text("\n".join(json.dumps({"prompt": f"The {word} is here.", "target": " Yes."}) for word in words))
    return path


@pytest.fixture(scope="module")
def report(own, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(elicitation, "_BUDGET", Budget(lengths=(1, 2), restarts=1, steps=2, batch=4))
        out = tmp_path_factory.mktemp("audit") / "run"
        return audit(AuditConfig(MODEL, behaviours=str(own), tokens=2048, chapters=("elicitation",), out=out))


def test_the_users_behaviour_is_told_in_words_with_its_control(report):
    (finding,) = numbers(report.parent)
    assert finding["id"] == "elicitation.mine.push" and finding["control"] is not None
    assert "organism:pebble" in finding["sentence"] and "write “Yes.”" in finding["sentence"]
    assert "the control model needs" in finding["sentence"] and "random targets" in finding["sentence"]
    page = report.read_text(encoding="utf-8")
    assert "Exactly right on" in page and "F(0.3)" in page


def test_the_audit_goes_on_from_the_curves_that_it_has(own, report, monkeypatch):
    monkeypatch.setattr(elicitation, "_BUDGET", Budget(lengths=(1, 2), restarts=1, steps=2, batch=4))
    monkeypatch.setattr(measuring, "train_prompts", None)  # nothing is trained again
    config = AuditConfig(
        MODEL, behaviours=str(own), tokens=2048, chapters=("elicitation",), out=report.parent, resume=True
    )
    before = numbers(report.parent)
    assert numbers(audit(config).parent) == before


def test_a_file_without_targets_ends_the_audit_before_it_begins(tmp_path):
    (tmp_path / "bad.jsonl").write_text(json.dumps({"prompt": "a"}))
    with pytest.raises(SondeError, match="line 1 has no 'target'"):
        audit(AuditConfig(MODEL, behaviours=str(tmp_path / "bad.jsonl"), tokens=2048, out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_classifier_of_the_user_is_told_by_its_name_with_the_control_models_score(tmp_path, monkeypatch):
    monkeypatch.setattr(elicitation, "_REWARDED", Budget(lengths=(1,), restarts=1, steps=1, batch=2))
    monkeypatch.setattr(elicitation, "_ROWS", 8)
    (tmp_path / "own.py").write_text("def length(texts):\n    return [float(len(text)) for text in texts]\n")
    given = f"{tmp_path}/own.py:length"
    page = audit(AuditConfig(MODEL, behaviours=given, tokens=2048, chapters=("elicitation",), out=tmp_path / "run"))
    (finding,) = numbers(page.parent)
    assert "the score of “length”" in finding["sentence"] and finding["control"]["name"] == "control model"
    with pytest.raises(SondeError, match="has no function 'width'"):
        audit(AuditConfig(MODEL, behaviours=f"{tmp_path}/own.py:width", tokens=2048, out=tmp_path / "other"))
    assert not (tmp_path / "other").exists()
