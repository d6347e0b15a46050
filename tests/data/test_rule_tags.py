"""Rules give words the tags that a reader would, often enough."""

import pytest

from sonde.data.labels import read_conllu
from sonde.data.rule_tags import RULES, tagged
from sonde.errors import SondeError


def tags(text: str, concept: str) -> list[tuple[str, str]]:
    found = tagged([text], concept)
    return [(text[start:end], found.names[label]) for start, end, label in found.spans[0]]


def test_parts_of_speech_of_a_plain_sentence():
    expected = "The/DET old/ADJ man/NOUN did/AUX n't/PART see/VERB Anna/PROPN in/ADP 1912/NUM ,/PUNCT and/CCONJ "
    expected += "she/PRON laughed/VERB quietly/ADV ./PUNCT"
    assert tags("The old man didn't see Anna in 1912, and she laughed quietly.", "pos") == [
        tuple(pair.split("/")) for pair in expected.split()
    ]


@pytest.mark.parametrize(
    ("text", "word", "tag"),
    [
        ("I want to go to the house", "to", "PART"),
        ("They went to the house", "to", "ADP"),
        ("She has gone", "has", "AUX"),
        ("She has a dog", "has", "VERB"),
        ("Anna's dog", "'s", "PART"),
        ("It's late", "'s", "AUX"),
    ],
)
def test_words_with_two_uses_are_told_apart_by_their_neighbours(text, word, tag):
    assert next(found for spelled, found in tags(text, "pos") if spelled == word) == tag


def test_capitals_and_classes():
    assert tags("NASA and McCoy met Anna", "capitals") == [
        ("NASA", "UPPER"),
        ("and", "lower"),
        ("McCoy", "mixed"),
        ("met", "lower"),
        ("Anna", "Capitalised"),
    ]
    assert [kind for _, kind in tags("it is 3 + 4.\nA", "class")] == [
        *("word start", "word continuation") * 2,
        *("number", "symbol", "number", "punctuation", "line break", "word start"),
    ]


def test_other_concepts_are_refused():
    with pytest.raises(SondeError, match="choose class, capitals, pos"):
        tagged(["a"], "mood")
    assert RULES == ("class", "capitals", "pos")


def test_a_text_without_words_has_no_capitals():
    with pytest.raises(SondeError, match="no labels of capitals"):
        tagged(["1 2 3"], "capitals")


@pytest.mark.data
def test_most_words_of_a_treebank_get_its_tag(shared_data):
    gold = read_conllu([shared_data / "pos" / "en_ewt-ud-test.conllu"])
    ours = tagged(gold.texts, "pos")
    right = total = 0
    for theirs, mine in zip(gold.spans, ours.spans, strict=True):
        by_start = {start: ours.names[label] for start, _, label in mine.tolist()}
        total += len(theirs)
        right += sum(by_start.get(start) == gold.names[label] for start, _, label in theirs.tolist())
    assert right / total > 0.84
