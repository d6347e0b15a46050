"""Labels of words reach the tokens that cover them, whatever the tokenizer does to the words."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sonde
from sonde.data.labels import LabelledText, labelled_sequences, plain_texts, read_conllu, read_labels
from sonde.errors import SondeError
from sonde.lm.batches import TokenBatches

CONLLU = """\
# newdoc id = one
# sent_id = 1
1\tDogs\tdog\tNOUN\tNNS\tNumber=Plur\t2\tnsubj\t_\t_
2-3\tdon't\t_\t_\t_\t_\t_\t_\t_\t_
2\tdo\tdo\tAUX\tVBP\t_\t0\troot\t_\t_
3\tn't\tnot\tPART\tRB\t_\t2\tadvmod\t_\t_
4\tbark\tbark\tVERB\tVB\t_\t2\txcomp\t_\tSpaceAfter=No
4.1\tghost\tghost\tX\tX\t_\t_\t_\t_\t_
5\t.\t.\tPUNCT\t.\t_\t2\tpunct\t_\t_

# sent_id = 2
# newpar
1-2\tdu\t_\t_\t_\t_\t_\t_\t_\t_
1\tde\tde\tADP\t_\t_\t_\t_\t_\t_
2\tle\tle\tDET\t_\t_\t_\t_\t_\t_
3\tthé\tthé\tNOUN\t_\tNumber=Sing\t_\t_\t_\t_

# newdoc id = two
1\tYes\tyes\t_\tUH\t_\t0\troot\t_\t_
"""


@pytest.fixture(scope="module")
def tokenizer():
    return sonde.load("organism:pebble", check=False).tokenizer


def spelled(labelled: LabelledText, document: int = 0) -> list[tuple[str, str]]:
    text = labelled.texts[document]
    return [(text[start:end], labelled.names[label]) for start, end, label in labelled.spans[document]]


def by_token(labelled: LabelledText, tokenizer, **layout) -> list[tuple[str, str | None]]:
    """(text of the token, its class) of all tokens of the labelled text, in the order of the text."""
    batches = TokenBatches(list(labelled.texts), tokenizer, **{"context": 2, "join": False, **layout})
    labels = labelled.at(*batches.extents())
    return [
        (tokenizer.decode([int(i)]), None if label < 0 else labelled.names[label])
        for i, label in zip(batches._ids, labels, strict=True)
    ]


def test_words_of_conllu_are_found_in_the_text_they_make(tmp_path):
    path = tmp_path / "a.conllu"
    path.write_text(CONLLU, encoding="utf-8")
    found = read_conllu([path])
    assert found.texts == ("Dogs don't bark.\ndu thé", "Yes")
    assert spelled(found) == [
        ("Dogs", "NOUN"),
        ("do", "AUX"),
        ("n't", "PART"),
        ("bark", "VERB"),
        (".", "PUNCT"),
        ("thé", "NOUN"),
    ]
    assert spelled(found, 1) == []
    assert spelled(read_conllu([path], column="feats:Number")) == [("Dogs", "Plur"), ("thé", "Sing")]
    assert spelled(read_conllu([path], column="xpos"), 1) == [("Yes", "UH")]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("1\tDogs\tNOUN\n", "line 1 has 3 columns"),
        ("x" + "\t_" * 9 + "\n", "begins with 'x'"),
        ("1\ta" + "\t_" * 8 + "\n", "no labels of part of speech"),
        ("", "no labels of part of speech"),
    ],
)
def test_a_line_that_is_no_conllu_is_named(text, match, tmp_path):
    path = tmp_path / "a.conllu"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SondeError, match=match):
        read_labels(path)


@pytest.mark.parametrize("column", ["lemma", "feats", "upos:Number", ""])
def test_columns_that_do_not_exist_are_refused(column, tmp_path):
    with pytest.raises(SondeError, match="choose upos, xpos"):
        read_conllu([tmp_path / "a.conllu"], column=column)


def test_labels_come_from_spans_and_from_whole_texts(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [
        {"text": "Anna went home", "spans": [[0, 4, "name"]]},
        {"text": "all of it", "label": "joy"},
        {"text": "no idea", "label": None},
        {"text": "to Rome", "spans": [{"start": 3, "end": 7, "label": "name"}]},
    ]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    found = read_labels(path)
    assert found.names == ("joy", "name")
    assert [spelled(found, i) for i in range(4)] == [[("Anna", "name")], [("all of it", "joy")], [], [("Rome", "name")]]
    filled = read_labels(path, outside="other")
    assert spelled(filled)[1:] == [("went", "other"), ("home", "other")]


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ('{"text": "a", "spans": [[0, 5, "x"]]}', "span 0 to 5"),
        ('{"text": "abc", "spans": [[2, 2, "x"]]}', "span 2 to 2"),
        ('{"text": "abc", "spans": [[0, "x"]]}', "spans are"),
        ('{"text": "abc"}', "neither"),
        ('{"label": "x"}', "expected an object"),
        ("{", "is not JSON"),
        ('{"text": "abc", "label": null}', "no labels of label"),
    ],
)
def test_bad_rows_of_labels_are_named(row, match, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(row, encoding="utf-8")
    with pytest.raises(SondeError, match=match):
        read_labels(path)


def test_files_that_are_no_labels_are_refused(tmp_path):
    with pytest.raises(SondeError, match=r"give \.conllu"):
        read_labels(tmp_path / "a.txt")
    with pytest.raises(SondeError, match="does not exist"):
        read_labels(tmp_path / "a.conllu")
    (tmp_path / "b.conllu").write_bytes(b"\xff\xfe")
    with pytest.raises(SondeError, match="not UTF-8"):
        read_labels(tmp_path / "b.conllu")


def test_as_many_labels_as_texts():
    with pytest.raises(SondeError, match="2 labels for 1 texts"):
        labelled_sequences(["a"], ["x", "y"], concept="mood")


def test_a_token_inside_a_word_has_the_words_class_and_one_across_words_has_none(tokenizer):
    text = "The incomprehensibilities, said Anna"
    spans = [(0, 3, "DET"), (4, 25, "NOUN"), (25, 26, "PUNCT"), (27, 31, "VERB"), (32, 36, "PROPN")]
    found = by_token(LabelledText.of([(text, spans)], concept="pos"), tokenizer)
    assert "".join(token for token, _ in found if token != "<|endoftext|>") == text
    known = {token.strip(): label for token, label in found if label}
    assert known["The"] == "DET"
    assert known[","] == "PUNCT"
    assert sum(label == "NOUN" for _, label in found) > 2
    halves = LabelledText.of([(text, [(0, 5, "a"), (5, 36, "b")])], concept="half")
    cut = by_token(halves, tokenizer)
    first = next(i for i, (token, _) in enumerate(cut) if token.strip().startswith("in"))
    assert cut[first][1] == (None if len(cut[first][0].strip()) > 1 else "a")


def test_the_first_label_counts_where_a_concept_says_so(tokenizer):
    text = " wolf"
    spans = [(1, 2, "start"), (2, 5, "inside")]
    assert {label for _, label in by_token(LabelledText.of([(text, spans)], concept="c"), tokenizer)} <= {
        None,
        "inside",
    }
    first = by_token(LabelledText.of([(text, spans)], concept="c", rule="first"), tokenizer)
    assert next(label for _, label in first if label) == "start"


def test_characters_that_take_several_tokens_keep_their_label(tokenizer):
    text = "ab 𝔘𝔫𝔦 cd"
    found = by_token(LabelledText.of([(text, [(3, 6, "odd")])], concept="c"), tokenizer)
    assert sum(label == "odd" for _, label in found) > 3
    assert {token.strip(): label for token, label in found}["ab"] is None


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.text("abcdefg é𝔘.,'", min_size=1, max_size=12), st.sampled_from("xyz")), min_size=1),
    st.integers(2, 9),
    st.booleans(),
)
def test_a_labelled_token_covers_characters_of_its_class(tokenizer, pieces, context, join):
    """Each token that has a class overlaps a span of it, and no labelled character of another class."""
    text, spans = "", []
    for piece, label in pieces:
        if piece.strip():
            spans.append((len(text), len(text) + len(piece), label))
        text += piece
    if not spans or not text.strip():
        return
    labelled = LabelledText.of([(text, spans), ("zz " + text, [])], concept="c", names="xyz")
    try:
        batches = TokenBatches(list(labelled.texts), tokenizer, context=context, join=join)
    except SondeError:  # too short for one row
        return
    labels = labelled.at(*batches.extents())
    document, extents = batches.extents()
    assert (labels[document == 1] == -1).all()
    encoded = text.encode()
    for label, (start, end) in zip(labels[document == 0], extents[document == 0], strict=True):
        start_character = len(encoded[:start].decode(errors="ignore"))
        end_character = len(encoded[:end].decode(errors="ignore"))
        over = {name for a, b, name in spans if a < end_character and b > start_character}
        if label >= 0 and start < end:
            assert over == {"xyz"[label]}
        if start < end and len(over) == 1:
            assert label == "xyz".index(over.pop())


@pytest.mark.parametrize("layout", [{"join": True}, {"join": False}, {"join": True, "shuffle": True}])
def test_places_lead_from_a_batch_to_the_tokens_of_the_text(tokenizer, layout):
    texts = ["The wolf looked at the fire. " * 9, "Nothing else happened, said the old man. " * 7]
    batches = TokenBatches(texts, tokenizer, context=16, rows=3, **layout)
    for batch in batches:
        places = batches.places(batch.index)
        known = places >= 0
        assert np.array_equal(batches._ids[places[known]], batch.tokens[known])
        assert not (known & ~batch.mask).any()
        assert int((batch.mask & ~known).sum()) in (0, len(places))


def test_labels_of_another_text_are_refused(tokenizer):
    batches = TokenBatches(["a text that is long enough for this", "two"], tokenizer, context=2, join=False)
    one = LabelledText.of([("short", [(0, 5, "x")])], concept="c")
    with pytest.raises(SondeError, match="labels of 1 documents"):
        one.at(*batches.extents())
    two = LabelledText.of([("short", [(0, 5, "x")]), ("two", [])], concept="c")
    with pytest.raises(SondeError, match="belong to another text"):
        two.at(*batches.extents())


def test_texts_for_a_tagger_are_numbered_like_those_of_batches():
    assert plain_texts(["a", "  ", "b", "c"], 2) == ["a", "b"]


@pytest.mark.data
def test_every_word_of_ud_ewt_is_where_its_text_says(shared_data):
    found = read_conllu([shared_data / "pos" / "en_ewt-ud-dev.conllu"])
    lines = (shared_data / "pos" / "en_ewt-ud-dev.conllu").read_text(encoding="utf-8").splitlines()
    sentences = [line.removeprefix("# text = ") for line in lines if line.startswith("# text = ")]
    whole = " ".join(" ".join(found.texts).split())
    assert sum(" ".join(sentence.split()) in whole for sentence in sentences) >= 0.99 * len(sentences)
    assert len(found.names) == 17
    words = sum(not line.startswith("#") and line.split("\t")[0].isdecimal() for line in lines if line)
    assert sum(map(len, found.spans)) >= 0.99 * words
