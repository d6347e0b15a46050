"""What the chapter on knowledge says of the bundled models, of the user's statements, and when there is nothing."""

import contextlib
import json
from types import SimpleNamespace

import numpy as np
import pytest

import sonde
from sonde.errors import SondeError
from sonde.files import load_bundle, save_bundle
from sonde.runs.charts import spec
from sonde.studies import truth_measures
from sonde.studies.audit import AuditConfig
from sonde.studies.chapters import knowledge
from sonde.studies.chapters.knowledge import Knowledge


@pytest.fixture(autouse=True)
def _few(monkeypatch):
    monkeypatch.setattr(knowledge, "_ROWS", 160)
    monkeypatch.setattr(truth_measures, "SHUFFLED", 2)


def chapter(tmp_path, model="organism:pebble", statements=None) -> Knowledge:
    def path(step):
        return tmp_path / f"{step}.safetensors"

    audit = SimpleNamespace(
        lm=sonde.load(model, check=False),
        config=SimpleNamespace(seed=0, statements=statements),
        run=SimpleNamespace(
            done=lambda step: path(step).exists(),
            finish=lambda step, tree: save_bundle(path(step), tree),
            result=lambda step: load_bundle(path(step)),
        ),
        command=lambda name: f"sonde audit {model} --chapters {name}",
        timed=lambda step: contextlib.nullcontext(),
    )
    part = Knowledge(audit)  # type: ignore[arg-type]
    part.prepare()
    return part


def test_pebble_reads_a_comparison_but_not_its_truth(tmp_path):
    part = chapter(tmp_path)
    written = part.write()
    readable, carries, alarm = written.findings
    assert readable.status == "found" and readable.control.name == "shuffled labels"
    assert carries.status == "not found" and "calls the false ones true" in carries.sentence
    assert alarm.unit == "%" and alarm.control.estimate < 30
    layers, chart, table, strangest = written.blocks
    for figure in (layers, chart):
        spec(figure.chart, figure.id)
    assert len(table.rows) == 6 and len(strangest.rows) == 12
    assert [row[0] for row in strangest.rows] == sorted(row[0] for row in strangest.rows)
    again = chapter(tmp_path).write()
    assert [one.to_json() for one in again.findings] == [one.to_json() for one in written.findings]


def test_a_quirky_organism_is_asked_what_alice_and_bob_ask(tmp_path):
    written = chapter(tmp_path, "organism:quirky-comparison").write()
    readable, carries, _ = written.findings
    assert readable.status == carries.status == "found"
    assert "asked by Alice" in readable.sentence and "asked by Bob" in carries.sentence


def test_statements_without_truth_are_not_found(tmp_path):
    rng = np.random.default_rng(0)
    words = ("wolf", "river", "stone", "lamp", "bread", "glass", "horse", "leaf")
    texts = {f"The {a} and the {b} and the {c}." for a, b, c in rng.choice(words, size=(300, 3))}
    path = tmp_path / "noise.jsonl"
    path.write_text("\n".join(json.dumps({"statement": text, "label": i % 2}) for i, text in enumerate(sorted(texts))))
    written = chapter(tmp_path, statements=str(path)).write()
    readable, carries, _ = written.findings
    assert (
        readable.status != "found"
        and "No layer tells true statements of the kind “noise” from false ones" in readable.sentence
    )
    assert "nothing that could carry over to statements of the kind “larger than”" in carries.sentence
    assert "No layer tells" in spec(written.blocks[0].chart, "x")["title"]["text"]


def test_a_bad_file_is_known_before_the_audit_begins(tmp_path):
    path = tmp_path / "facts.csv"
    path.write_text("claim,label\nIt is.,1\n")
    with pytest.raises(SondeError, match="row 1 has no 'statement'"):
        Knowledge.check(AuditConfig("organism:pebble", statements=str(path)))
