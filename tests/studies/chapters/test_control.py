"""What the chapter on control says of the bundled model and of a user's own contrast."""

import contextlib
import json
from types import SimpleNamespace

import pytest

import sonde
from sonde.cli import main
from sonde.runs.charts import spec
from sonde.studies.chapters.control import Control


def chapter(contrast=None) -> Control:
    audit = SimpleNamespace(
        lm=sonde.load("organism:pebble", check=False),
        config=SimpleNamespace(seed=0, contrast=contrast),
        command=lambda name: f"sonde audit organism:pebble --chapters {name}",
        timed=lambda step: contextlib.nullcontext(),
    )
    return Control(audit)  # type: ignore[arg-type]


def test_dose_and_response_are_told_beside_random_directions():
    part = chapter()
    written = part.write()
    (finding,) = written.findings
    assert finding.estimate > 0
    assert finding.control.name.startswith("random directions")
    figure, table = written.blocks
    spec(figure.chart, figure.id)
    assert len(table.rows) == 5
    assert all(row[2] <= row[3] for row in table.rows)


def test_a_bad_contrast_is_one_line_before_any_work(tmp_path, capsys):
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps({"positive": ["one text here"], "negative": ["another text here"]}))
    for given, line in ((path, "give as many of both, at least 8"), (tmp_path / "no.json", "no.json")):
        with pytest.raises(SystemExit) as ended:
            main(["audit", "organism:pebble", "--contrast", str(given), "--out", str(tmp_path / "run")])
        assert ended.value.code == 2
        assert line in capsys.readouterr().err
        assert not (tmp_path / "run").exists()
