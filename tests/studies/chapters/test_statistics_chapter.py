"""What the chapter on statistics says of the bundled model, of a model that is an n-gram model, and of checkpoints."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

import sonde
from sonde.lm.batches import TokenBatches
from sonde.lm.stream import Batch
from sonde.runs.charts import spec
from sonde.stats.ngram import NgramModel
from sonde.studies.chapters.statistics import Statistics

LM = sonde.load("organism:pebble", check=False)


@pytest.fixture(scope="module")
def texts() -> tuple[TokenBatches, TokenBatches]:
    assert LM.tokenizer is not None
    return TokenBatches(None, LM.tokenizer, context=128, limit_tokens=8192).split(0.5)


def part(texts, model="organism:pebble") -> Statistics:
    fit, held = texts
    windows = torch.cat([batch.tokens for batch in fit])
    audit = SimpleNamespace(
        lm=LM,
        fit=fit,
        held=held,
        ngram=NgramModel.fit(windows, order=5, vocab_size=LM.vocab_size),
        config=SimpleNamespace(seed=0, model=model, device=None, dtype=None),
        run=SimpleNamespace(progress=lambda *args, **more: None),
        command=lambda name: f"sonde audit organism:pebble --chapters {name}",
        timed=lambda step: contextlib.nullcontext(),
    )
    made = Statistics(audit)  # type: ignore[arg-type]
    made.prepare()
    return made


def test_the_bundled_model_is_closer_to_the_order_of_a_text_than_to_its_shuffle(texts):
    chapter = part(texts)
    for batch in LM.stream(texts[1], sites=chapter.sites):
        chapter.update(batch)
    again = part(texts)
    again.load(chapter.state())
    for written in (chapter.write(), again.write()):
        (finding,) = written.findings
        assert finding.status == "found" and finding.estimate > 0.3 > finding.control.interval[1]
        (figure,) = written.blocks
        spec(figure.chart, figure.id)
        assert "without checkpoints" in written.not_shown


@pytest.mark.parametrize("order", [1, 2])
def test_a_model_that_is_an_ngram_model_is_recognised_by_its_order(texts, order):
    chapter = part(texts)
    for batch in texts[1]:
        rows = chapter.audit.ngram.predictions(batch.tokens.numpy(), order=order, first=0)
        logits = rows.dense().log().view(*batch.tokens.shape, -1)
        parts = (batch.tokens, batch.mask, batch.index, batch.documents, batch.chunks, batch.n_bytes)
        chapter.update(Batch(*parts, acts={"logits": logits}))
    written = chapter.write()
    words = "single tokens are closest" if order == 1 else "closest to n-grams of order 2 (pairs)"
    assert words in written.answer
    assert written.findings[0].status == ("not found" if order == 1 else "found")


def test_checkpoints_in_the_folder_of_a_model_are_read(texts, tmp_path):
    assert LM.tokenizer is not None
    for step in (10, 20):
        LM.model.save_pretrained(tmp_path / f"step{step}")
        LM.tokenizer.save_pretrained(tmp_path / f"step{step}")
    chapter = part(texts, model=str(tmp_path / "step20"))
    for batch in LM.stream(texts[1], sites=chapter.sites):
        chapter.update(batch)
    written = chapter.write()
    assert "Over its checkpoints it was closest to order 1, 2, 3, 4 at step 10, 10, 10, 10." in written.answer
    _, figure, table = written.blocks
    spec(figure.chart, figure.id)
    assert [row[0] for row in table.rows] == [10, 20]
