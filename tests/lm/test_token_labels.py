"""Classes of tokens go to batches, halves and bins of places."""

import pytest
import torch

import sonde
from sonde.data.labels import LabelledText
from sonde.errors import SondeError
from sonde.lm.batches import TokenBatches
from sonde.lm.token_labels import TokenLabels


@pytest.fixture(scope="module")
def tokenizer():
    return sonde.load("organism:pebble", check=False).tokenizer


@pytest.fixture(scope="module")
def labelled():
    texts = ["The wolf looked at the fire and said nothing. " * 12, "Nobody came. " * 30]
    spans = [
        [(i, i + 4, "noun") for i in range(len(texts[0])) if texts[0].startswith("wolf", i)],
        [(i, i + 4, "verb") for i in range(len(texts[1])) if texts[1].startswith("came", i)],
    ]
    return LabelledText.of(zip(texts, spans, strict=True), concept="pos", names=("adverb", "noun", "verb"))


@pytest.mark.parametrize("join", [True, False])
def test_labels_stand_where_their_words_are(tokenizer, labelled, join):
    batches = TokenBatches(list(labelled.texts), tokenizer, context=16, rows=4, join=join)
    labels = TokenLabels.of(batches, labelled)
    assert labels.names == ("noun", "verb")  # no token is an adverb
    found = {"noun": set(), "verb": set()}
    for batch in batches:
        z = labels.at(batches, batch.index)
        assert z.shape == batch.tokens.shape
        assert (z[~batch.mask] == -1).all()
        for number, name in enumerate(labels.names):
            found[name] |= {tokenizer.decode([i]).strip() for i in batch.tokens[z == number].tolist()}
    assert found == {"noun": {"wolf"}, "verb": {"came"}}
    assert labels.counts(batches) == {"noun": 12, "verb": 30} if not join else labels.counts(batches)["noun"] == 12


def test_halves_share_the_labels_of_the_whole(tokenizer, labelled):
    batches = TokenBatches(list(labelled.texts), tokenizer, context=16, rows=4)
    labels = TokenLabels.of(batches, labelled)
    whole = {
        chunk: row for b in batches for chunk, row in zip(b.chunks.tolist(), labels.at(batches, b.index), strict=True)
    }
    for half in batches.split(0.5):
        for batch in half:
            for chunk, row in zip(batch.chunks.tolist(), labels.at(half, batch.index), strict=True):
                assert torch.equal(row, whole[chunk])


def test_places_of_a_window_are_binned(tokenizer, labelled):
    batches = TokenBatches(list(labelled.texts), tokenizer, context=20, rows=2)
    labels = TokenLabels.by_place(20)
    assert labels.names == ("1 to 4", "5 to 16", "17 to 20")
    assert labels.at(batches, 0)[0].tolist() == [0] * 4 + [1] * 12 + [2] * 4


def test_text_with_one_class_has_nothing_to_erase(tokenizer, labelled):
    one = LabelledText(labelled.texts[:1], labelled.spans[:1], labelled.names, "pos")
    batches = TokenBatches(list(one.texts), tokenizer, context=16)
    with pytest.raises(SondeError, match="nothing to erase: only 'noun' of pos occurs"):
        TokenLabels.of(batches, one)
    with pytest.raises(SondeError, match="one bin of places"):
        TokenLabels.by_place(4)
