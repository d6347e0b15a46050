"""What the chapter on features says of the bundled model, of one without a dictionary, and after an interruption."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

import sonde
from sonde.errors import SondeError
from sonde.features.design import Design
from sonde.features.dictionary import Dictionary
from sonde.features.metrics import evaluate
from sonde.files import load_bundle, save_bundle
from sonde.lm.batches import TokenBatches
from sonde.organisms.pebble_features import load_dictionary
from sonde.runs.blocks import Figure, Prose, Table
from sonde.runs.charts import spec
from sonde.runs.feature_cards import FeatureView
from sonde.studies.chapters.features import Features

LM = sonde.load("organism:pebble", check=False)


@pytest.fixture(scope="module")
def texts() -> tuple[TokenBatches, TokenBatches]:
    assert LM.tokenizer is not None
    return TokenBatches(None, LM.tokenizer, context=128, tokens_per_batch=1024, limit_tokens=8192).split(0.5)


def part(texts, model="organism:pebble", dictionary=None) -> Features:
    fit, held = texts
    audit = SimpleNamespace(
        lm=LM,
        fit=fit,
        held=held,
        config=SimpleNamespace(seed=0, model=model, dictionary=dictionary),
        command=lambda name: f"sonde audit {model} --chapters {name}",
        timed=lambda step: contextlib.nullcontext(),
    )
    made = Features(audit)  # type: ignore[arg-type]
    made.prepare()
    return made


def test_the_bundled_dictionary_beats_random_directions_and_resumes(texts, tmp_path):
    chapter, again = part(texts), part(texts)
    for i, batch in enumerate(LM.stream(texts[1], sites=chapter.sites)):
        chapter.update(batch)
        if i == 1:
            save_bundle(tmp_path / "state", chapter.state())
            again.load(load_bundle(tmp_path / "state"))
        elif i > 1:
            again.update(batch)
    one, other = chapter.write(), again.write()
    assert [f.to_json() for f in one.findings] == [f.to_json() for f in other.findings]
    assert [finding.status for finding in one.findings] == ["found", "found"]
    view, figure, table = one.blocks
    assert isinstance(view, FeatureView) and isinstance(figure, Figure) and isinstance(table, Table)
    assert len(view.features) == 1024
    assert sum(bool(feature.windows) for feature in view.features) == 12
    assert view == other.blocks[0]
    spec(figure.chart, figure.id)
    measured = evaluate(LM, load_dictionary("organism:pebble"), texts[1], tokens=4096, loss_tokens=0)
    assert one.findings[0].estimate == pytest.approx(measured.reconstruction.fvu.estimate, rel=1e-6)
    assert [row[0] for row in table.rows] == ["dictionary", "random directions"]


def test_a_model_without_a_dictionary_is_told_how_to_train_one(texts):
    chapter = part(texts, model="somebody/model")
    assert chapter.sites == ()
    written = chapter.write()
    (said,) = written.blocks
    assert isinstance(said, Prose) and not written.findings
    assert "sonde run sae somebody/model" in said.text


def test_a_dictionary_that_does_not_fit_is_refused_before_the_run(tmp_path, texts):
    wide = Dictionary.initialised(Design("topk", 64, 8, 2))
    wide.save(tmp_path / "siteless")
    wide.site = "resid_post.1"
    wide.save(tmp_path / "wide")
    made = Dictionary.initialised(Design("topk", 192, 8, 2, outputs=192, transcodes=True))
    made.site, made.target = "mlp_in.1", "mlp_out.1"
    made.save(tmp_path / "transcoder")
    for name, message in (("siteless", "which site it reads"), ("transcoder", "no autoencoder of one site")):
        with pytest.raises(SondeError, match=message):
            Features.check(SimpleNamespace(dictionary=str(tmp_path / name)))  # type: ignore[arg-type]
    with pytest.raises(SondeError, match=r"reads width 64, resid_post\.1 of organism:pebble has 192"):
        part(texts, dictionary=str(tmp_path / "wide"))


def test_a_dictionary_of_the_users_own_takes_the_place_of_the_bundled_one(tmp_path, texts):
    made = Dictionary.initialised(Design("relu", 192, 16))
    made.site = "resid_post.1"
    made.save(tmp_path / "own")
    chapter = part(texts, dictionary=str(tmp_path / "own"))
    assert chapter.sites == ("resid_post.1",)
    for batch in LM.stream(texts[1], sites=chapter.sites):
        chapter.update(batch)
    with torch.no_grad():
        written = chapter.write()
    view = written.blocks[0]
    assert isinstance(view, FeatureView) and view.command.endswith(str(tmp_path / "own"))
