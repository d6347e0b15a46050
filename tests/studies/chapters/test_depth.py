"""What the chapter on depth says of deleted blocks and influential directions, on tiny models."""

from types import SimpleNamespace

import pytest
from families import tiny

from sonde.data.python_docs import topics
from sonde.errors import SondeError
from sonde.lens.tuned import TunedLens
from sonde.lm.batches import TokenBatches
from sonde.lm.model import LanguageModel
from sonde.organisms.small_lm import train_tokenizer
from sonde.runs.charts import spec
from sonde.studies.chapters import depth
from sonde.studies.chapters.depth import Depth, _middle


@pytest.fixture(scope="module")
def text():
    tokenizer = train_tokenizer(topics()[:20], 400)
    return tokenizer, TokenBatches(None, tokenizer, context=32, rows=3, limit_tokens=1500)


def chapter(text, net) -> Depth:
    tokenizer, batches = text
    lm = LanguageModel(net, tokenizer, name="tiny")
    fit, held = batches.split(0.5)
    config = SimpleNamespace(seed=0)
    audit = SimpleNamespace(
        lm=lm, fit=fit, held=held, lens=TunedLens.zeros(lm), config=config, command=lambda name: f"sonde audit {name}"
    )
    return Depth(audit)  # type: ignore[arg-type]


def test_a_block_that_adds_nothing_costs_nothing(text):
    net = tiny("llama", vocab_size=400)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        net.model.layers[1].get_submodule(name).weight.zero_()
    finding, figure = chapter(text, net)._deletion()
    assert "block 1 " not in finding.metric
    assert finding.control is not None
    data = spec(figure.chart, figure.id)["datasets"].values()
    rows = [row for values in data for row in values if "added" in row]
    assert [row["block"] for row in rows] == [0, 1, 2]
    assert rows[1]["added"] == rows[1]["random"] == 0


def test_a_model_of_one_block_is_deleted_to_its_embedding(text):
    finding, _ = chapter(text, tiny("gpt_neox", vocab_size=400, num_hidden_layers=1))._deletion()
    assert "only block" in finding.sentence


def test_the_strongest_direction_moves_more_than_a_random_one(text):
    finding, (table,) = chapter(text, tiny("gpt_neox", vocab_size=400))._influence()
    assert finding.status == "found"
    assert "more than averaging away a random one" in finding.sentence
    assert len(table.rows) == 2 * 3
    assert all(row[1] > row[2] for row in table.rows)


def test_where_no_direction_can_be_found_the_chapter_says_why(text, monkeypatch):
    def refuse(*args, **kwargs):
        raise SondeError("the final norm is of no known kind")

    monkeypatch.setattr(depth, "influential_directions", refuse)
    finding, tables = chapter(text, tiny("gpt_neox", vocab_size=400))._influence()
    assert finding.status == "refused"
    assert finding.to_json()["reason"] == "the final norm is of no known kind"
    assert not tables


@pytest.mark.parametrize("rows", [1, 3, 4, 8, 1000])
def test_rows_come_from_the_middle(text, rows):
    _, batches = text
    found = _middle(batches, rows)
    assert sum(len(batch.tokens) for batch in found) == min(rows, batches.n_chunks)
    assert [batch.index for batch in found] == list(range(found[0].index, found[0].index + len(found)))
    before, after = found[0].index, batches.n_batches - 1 - found[-1].index
    assert abs(before - after) <= 1
