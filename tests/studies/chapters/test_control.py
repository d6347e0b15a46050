"""What the chapter on control says of the bundled model and of a user's own contrast."""

import contextlib
import json
from types import SimpleNamespace

import pytest

import sonde
from sonde.errors import SondeError
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
    part.prepare()
    written = part.write()
    (finding,) = written.findings
    assert finding.estimate > 0
    assert finding.control.name.startswith("random directions")
    figure, table = written.blocks
    spec(figure.chart, figure.id)
    assert len(table.rows) == 5
    assert all(row[2] <= row[3] for row in table.rows)


def test_a_bad_contrast_is_known_before_the_pass(tmp_path):
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps({"positive": ["one text here"], "negative": ["another text here"]}))
    with pytest.raises(SondeError, match="give as many of both, at least 8"):
        chapter(str(path)).prepare()
