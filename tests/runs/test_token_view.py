import base64
import gzip
import json
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_example import token_view

from sonde.runs.blocks import Statistic, TokenView
from sonde.runs.report import coding, token_text


def decode(head, payload):
    """What the page's script does, in numpy."""
    data = np.frombuffer(gzip.decompress(base64.b64decode(payload)), dtype=np.uint8)
    at = 0

    def take(shape, width):
        nonlocal at
        count = int(np.prod(shape))
        planes = data[at : at + count * width].reshape(width, count).astype(np.int64)
        at += count * width
        return sum(plane << (8 * i) for i, plane in enumerate(planes)).reshape(shape)

    layers, tokens, k, wide = head["L"], head["T"], head["K"], 4 if head["wide"] else 2
    found = {
        "tokens": take((tokens,), wide),
        "top": take((layers, tokens, k), wide),
        "log2p": take((layers, tokens, k), 2),
        "hits": take((layers, tokens), 1),
        "stats": [take((layers, tokens) if stat["layered"] else (tokens,), 2) for stat in head["stats"]],
        "rank": take((layers, tokens), 2) if head["ranked"] else None,
    }
    assert at == len(data)
    return found


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 7), st.integers(1, 5), st.integers(0, 1000))
def test_what_is_packed_comes_back_within_half_a_step(n_layers, k, seed):
    view = token_view(seed, n_layers, k)
    head, payload = coding.encode(view)
    found = decode(head, payload)
    assert [head["vocab"][i] for i in found["tokens"]] == [token_text.label(text) for text in view.tokens]
    labels = {i: token_text.label(text) for i, text in view.vocabulary.items()}
    gap = 0xFFFF
    for given_id, packed in zip(np.ravel(view.top), found["top"].ravel(), strict=True):
        assert (packed == gap) if given_id == -1 else (head["vocab"][packed] == labels[int(given_id)])
    bits = -view.top_log2p
    known = np.isfinite(bits)
    assert np.array_equal(found["log2p"] == gap, ~known)
    assert (
        np.abs(found["log2p"][known] / coding.BITS_PER_STEP - np.clip(bits[known], 0, 31.999)).max()
        <= 0.5 / 2048 + 1e-9
    )
    assert np.array_equal(found["rank"], np.minimum(view.rank, gap))
    for statistic, stat, packed in zip(view.statistics, head["stats"], found["stats"], strict=True):
        values = np.asarray(statistic.values)
        known = np.isfinite(values)
        assert np.array_equal(packed == gap, ~known)
        offset = 32767 if stat["scale"] == "diverging" else 0
        assert np.abs((packed[known] - offset) * stat["step"] - values[known]).max() <= 0.5 * stat["step"] + 1e-9
        assert stat["step"] <= np.abs(values[known]).max() / 1000


def test_the_place_of_the_true_token_is_marked():
    view = token_view()
    head, payload = coding.encode(view)
    hits = decode(head, payload)["hits"]
    assert np.array_equal(hits > 0, (view.rank > 0) & (view.rank <= head["K"]))
    assert np.array_equal(hits[hits > 0], view.rank[hits > 0])


def test_equal_views_have_equal_bytes():
    assert coding.encode(token_view()) == coding.encode(token_view())


def test_a_view_is_a_tenth_of_its_numbers_as_json():
    # Numbers like a model's: words by Zipf's law, layers that agree with one another.
    rng = np.random.default_rng(0)
    shape, k = (12, 512), 5
    vocabulary = {i: f"token{i}" for i in range(516)}
    top = np.minimum(rng.zipf(1.4, (*shape, k)), 515)
    log2p = -np.sort(rng.gamma(2.0, 2.0, top.shape))
    values = [rng.gamma(2.0, 2.0, shape[1]) + rng.gamma(1.0, 0.1, shape) for _ in range(4)]
    rank = np.round(2 ** values[0]).astype(int)
    tokens = [vocabulary[i] for i in rng.integers(0, 516, shape[1])]
    statistics = [Statistic(name=f"s{i}", unit="bits", values=v) for i, v in enumerate(values)]
    view = TokenView(
        id="big", title="t", caption="c", tokens=tokens, sites=[str(i) for i in range(12)], top=top, top_log2p=log2p,
        rank=rank, vocabulary=vocabulary, statistics=statistics,
    )  # fmt: skip
    head, payload = coding.encode(view)
    listed = [
        [{"token": vocabulary[i], "p": 2.0**p} for i, p in zip(ids, bits, strict=True)]
        for ids, bits in zip(top.reshape(-1, k).tolist(), log2p.reshape(-1, k).tolist(), strict=True)
    ]
    rest = [v.tolist() for v in values]
    naive = json.dumps({"tokens": tokens, "top": listed, "rank": rank.tolist(), "stats": rest})
    assert len(payload) + len(json.dumps(head)) < len(naive) / 10


def test_a_view_without_layers_or_predictions_is_packed_too():
    scores = np.array([0.0, np.nan, -2.5])
    view = TokenView(
        id="latent", title="t", caption="c", tokens=["a", " b", "\n"], sites=["latent 7"],
        statistics=[Statistic(name="activation", unit="", values=scores, scale="diverging")],
    )  # fmt: skip
    head, payload = coding.encode(view)
    assert head["K"] == 0
    assert decode(head, payload)["stats"][0].tolist()[1] == 0xFFFF
    assert coding.first_colours(view) == ["d4", "gap", "d0"]


def test_more_strings_than_two_bytes_can_number_take_four():
    n_tokens = 70_000
    view = TokenView(
        id="wide", title="t", caption="c", tokens=[f"w{i}" for i in range(n_tokens)], sites=["0"],
        statistics=[Statistic(name="position", unit="", values=np.arange(n_tokens) % 7)],
    )  # fmt: skip
    head, payload = coding.encode(view)
    assert head["wide"]
    assert decode(head, payload)["tokens"][-1] == n_tokens - 1


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"statistics": [Statistic(name="s", unit="", values=np.zeros((2, 9)))]}, "'s' has shape"),
        ({"top": np.zeros((1, 2, 1), int), "top_log2p": np.zeros((1, 2, 2))}, "expected both"),
        ({"top": np.full((1, 2, 1), 5), "top_log2p": np.zeros((1, 2, 1))}, "vocabulary lacks the id 5"),
        ({"top": np.zeros((1, 2, 1), int)}, "belong together"),
        ({"rank": np.zeros((2, 2), int)}, "rank has shape"),
        ({"id": "Not An Id"}, "lower-case"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_by_name(changes, complaint):
    good = {
        "id": "v", "title": "t", "caption": "c", "tokens": ["a", "b"], "sites": ["0"],
        "statistics": [Statistic(name="s", unit="", values=np.zeros((1, 2)))],
    }  # fmt: skip
    with pytest.raises(ValueError, match=complaint):
        TokenView(**{**good, **changes})


def test_a_sequential_statistic_with_negative_values_is_refused():
    view = TokenView(
        id="v", title="t", caption="c", tokens=["a"], sites=["0"],
        statistics=[Statistic(name="s", unit="", values=np.array([-1.0]))],
    )  # fmt: skip
    with pytest.raises(ValueError, match="diverging"):
        coding.encode(view)


@pytest.mark.parametrize(
    ("text", "label", "name"),
    [
        (" the", "␣the", ""),
        ("   ", "␣×3", "3 spaces"),
        ("\n", "↵", "newline"),
        ("\n\n", "↵×2", "2 newlines"),
        ("\n  ", "↵  ", "newline, 2 spaces"),
        ("\t", "⇥", "tab"),
        ("", "∅", "empty token"),
        ("a\u202eb", "a\\u202eb", ""),
        ("\u200d", "\\u200d", ""),
        ("\x00", "\\x00", ""),
        ("\u0301", "◌\u0301", ""),
        ("⟨E2 80⟩", "⟨E2 80⟩", ""),
    ],
)
def test_signs_and_names_of_tokens(text, label, name):
    assert (token_text.label(text), token_text.name(text)) == (label, name)


@given(st.text(max_size=80))
def test_no_token_shows_invisible_or_direction_changing_characters(text):
    for shown in (token_text.label(text), token_text.passage_text(text).replace("\n", "")):
        assert shown
        assert not any(unicodedata.category(sign) in ("Cc", "Cf", "Cs", "Zl", "Zp") for sign in shown)


@given(st.lists(st.sampled_from(" \n\t\r"), min_size=1, max_size=12).map("".join))
def test_white_space_always_has_a_name_and_a_sign(text):
    assert token_text.name(text)
    assert token_text.label(text).strip()


@given(st.floats(0, 100), st.floats(0, 100), st.sampled_from(["sequential", "diverging"]))
def test_a_larger_value_never_has_a_lower_colour_step(a, b, scale):
    low, high = sorted((a, b))
    assert int(coding.colour_class(low, 50.0, scale)[1:]) <= int(coding.colour_class(high, 50.0, scale)[1:])
