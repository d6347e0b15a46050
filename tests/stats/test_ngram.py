import itertools
import math
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sonde.errors import SondeError
from sonde.files import load_bundle, save_bundle
from sonde.stats.ngram import NgramModel

V = 5
texts = st.lists(st.lists(st.integers(0, V - 1), max_size=12), min_size=1, max_size=6).filter(any)
quick = settings(max_examples=40, deadline=None)
KINDS = ("kneser-ney", "absolute")


@quick
@given(texts, st.integers(1, 4), st.lists(st.integers(0, V - 1), max_size=5), st.sampled_from(KINDS))
def test_every_conditional_distribution_sums_to_one_and_excludes_nothing(text, order, context, smoothing):
    model = NgramModel.fit(text, vocab_size=V + 2, order=order, smoothing=smoothing)
    p = model.distribution(context)
    assert p.sum() == pytest.approx(1, abs=1e-12)
    assert (p > 0).all()


@quick
@given(texts, texts, st.integers(1, 4), st.sampled_from(KINDS))
def test_log_prob_is_the_log_of_the_distribution(text, other, order, smoothing):
    model = NgramModel.fit(text, vocab_size=V, order=order, smoothing=smoothing)
    expected = [
        math.log(model.distribution(d[max(0, i - order + 1) : i] if i >= order - 1 else d[:i])[d[i]])
        for d in other
        for i in range(len(d))
    ]
    np.testing.assert_allclose(model.log_prob(other), expected, rtol=1e-10)


@quick
@given(texts, texts)
def test_a_lower_order_of_the_same_counts_is_the_model_of_that_order(text, other):
    whole = NgramModel.fit(text, vocab_size=V, order=4)
    for order in range(1, whole.order + 1):
        short = NgramModel.fit(text, vocab_size=V, order=order)
        np.testing.assert_allclose(whole.log_prob(other, order=order), short.log_prob(other), rtol=1e-12)


@quick
@given(texts, st.integers(1, 4), st.randoms(use_true_random=False))
def test_documents_do_not_touch(text, order, random):
    shuffled = random.sample(text, len(text))
    a, b = (NgramModel.fit(t, vocab_size=V, order=order) for t in (text, shuffled))
    apart = np.concatenate([a.log_prob(d) for d in text])
    np.testing.assert_allclose(a.log_prob(text), apart, rtol=1e-12)
    np.testing.assert_allclose(b.log_prob(text), apart, rtol=1e-12)


def naive_trigram(text):
    """Kneser-Ney of order 3 with the discounts of small texts, written with dictionaries."""
    occurrences, left = defaultdict(Counter), defaultdict(lambda: defaultdict(set))
    for d in text:
        for k, i in itertools.product((1, 2, 3), range(len(d))):
            if i >= k - 1:
                gram = tuple(d[i - k + 1 : i + 1])
                occurrences[gram[:-1]][gram[-1]] += 1
                left[gram[:-1]][gram[-1]].add(d[i - k] if i >= k else "start")

    def p(context, w, top=True):
        shorter = p(context[1:], w, False) if context else 1 / V
        n = occurrences[context] if top else {t: len(s) for t, s in left[context].items()}
        if not n:
            return shorter
        total, off = sum(n.values()), lambda c: (0, 0.5, 1, 1.5)[min(c, 3)]
        own = n.get(w, 0)
        return (own - off(own)) / total + sum(map(off, n.values())) / total * shorter

    return p


def test_equals_kneser_ney_written_with_dictionaries():
    text = [[0, 1, 2, 0, 1, 3], [0, 1, 2, 2], [4], [1, 2, 0, 1, 2]]
    model, naive = NgramModel.fit(text, vocab_size=V, order=3), naive_trigram(text)
    for length in range(3):
        for context in itertools.product(range(V), repeat=length):
            expected = [naive(context, w) for w in range(V)]
            np.testing.assert_allclose(model.distribution(context), expected, rtol=1e-12)


def naive_absolute(text, order, context, w):
    """Interpolated absolute discounting of one order and all below it, with dictionaries."""
    if order == 0:
        return 1 / V
    grams = Counter(tuple(d[i : i + order]) for d in text for i in range(len(d) - order + 1))
    once, twice = (sum(n == m for n in grams.values()) for m in (1, 2))
    delta = once / (once + 2 * twice) if once and twice else 0.5
    context = tuple(context)[len(context) - order + 1 :]
    follows = {gram[-1]: n for gram, n in grams.items() if gram[:-1] == context}
    shorter = naive_absolute(text, order - 1, context[1:], w)
    if not follows:
        return shorter
    total = sum(follows.values())
    return max(follows.get(w, 0) - delta, 0) / total + delta * len(follows) / total * shorter


@quick
@given(texts, st.lists(st.integers(0, V - 1), min_size=2, max_size=2))
def test_equals_absolute_discounting_written_with_dictionaries(text, context):
    model = NgramModel.fit(text, vocab_size=V, order=3, smoothing="absolute")
    order = min(model.order, len(context) + 1)
    expected = [naive_absolute(text, order, context, w) for w in range(V)]
    np.testing.assert_allclose(model.distribution(context), expected, rtol=1e-12)


@quick
@given(texts)
def test_without_smoothing_it_is_the_share_of_occurrences(text):
    model = NgramModel.fit(text, vocab_size=V, order=2, smoothing="none")
    pairs = Counter(pair for d in text for pair in itertools.pairwise(d))
    for context in range(V) if model.order == 2 else ():
        total = sum(n for pair, n in pairs.items() if pair[0] == context)
        if total:
            expected = [pairs[context, w] / total for w in range(V)]
            np.testing.assert_allclose(model.distribution([context]), expected, rtol=1e-12)
        else:
            with pytest.raises(SondeError, match=rf"no continuation for context \[{context}\]"):
                model.distribution([context])
            assert not model.rows([[context]], unseen="empty").seen.item()


def test_an_unsmoothed_model_names_the_context_that_it_never_saw():
    model = NgramModel.fit([0, 1, 2, 0, 1], vocab_size=V, order=3, smoothing="none")
    np.testing.assert_allclose(model.log_prob([0, 1, 2]), np.log([2 / 5, 1, 1]), atol=1e-15)
    assert model.log_prob([0, 2])[1] == -np.inf
    with pytest.raises(SondeError, match=r"no continuation for context \[1, 1\] \(position 3\)"):
        model.log_prob([[0, 1, 1, 2]])


@pytest.mark.parametrize("smoothing", KINDS)
def test_where_nothing_repeats_rows_still_sum_to_one_and_the_model_says_what_it_took(smoothing):
    model = NgramModel.fit(np.arange(50), vocab_size=60, order=3, smoothing=smoothing)
    rows = model.rows(np.stack([np.arange(58), np.arange(58) + 1], 1))
    np.testing.assert_allclose(rows.dense().sum(1), 1, atol=1e-9)
    assert all(f"order {k}" in note and "0.5" in note for k, note in zip((1, 2, 3), model.notes, strict=True))


@quick
@given(st.lists(st.lists(st.integers(0, V - 1), min_size=9, max_size=9), min_size=1, max_size=3), st.integers(1, 4))
def test_what_is_predicted_at_t_looks_at_the_tokens_up_to_t(text, order):
    model = NgramModel.fit(text, vocab_size=V, order=4)
    dense = model.predictions(np.array(text), order=order, first=3).dense().reshape(len(text), 6, V)
    for row, ids in zip(dense, text, strict=True):
        for p, t in zip(row, range(3, 9), strict=True):
            context = ids[t - order + 2 : t + 1]
            assert len(context) == order - 1
            np.testing.assert_allclose(p, model.distribution(context, order=order), rtol=1e-12)


@pytest.mark.parametrize("smoothing", [*KINDS, "none"])
def test_samples_have_the_frequencies_of_the_model_and_come_again_with_the_seed(smoothing):
    text = np.random.default_rng(4).integers(0, 4, size=(40, 60)) ** 2 % 5
    model = NgramModel.fit(text, vocab_size=V, order=3, smoothing=smoothing)
    drawn = model.sample(4000, 5, seed=1)
    np.testing.assert_array_equal(drawn, model.sample(4000, 5, seed=1))
    assert (drawn != model.sample(4000, 5, seed=2)).any()
    for context in itertools.product((0, 1, 4), repeat=2):
        after = drawn[(drawn[:, 2:4] == context).all(1), 4]
        expected = model.distribution(context)
        share = np.bincount(after, minlength=V) / len(after)
        np.testing.assert_allclose(share, expected, atol=5 * np.sqrt(0.25 / len(after)))


def test_recovers_the_entropy_rate_of_a_markov_source():
    rng = np.random.default_rng(0)
    transition = rng.dirichlet(np.full(20, 0.3), size=20)
    cumulative = transition.cumsum(1)
    states, u = np.zeros((300, 500), dtype=np.int64), rng.random((300, 500))
    for t in range(1, 500):
        states[:, t] = np.minimum((u[:, t, None] > cumulative[states[:, t - 1]]).sum(1), 19)
    train, held = states[:250], states[250:]
    entropy_rate = -np.log(transition[held[:, :-1], held[:, 1:]]).mean()
    loss = {k: -NgramModel.fit(train, vocab_size=20, order=k).log_prob(held)[:, 1:].mean() for k in (1, 2, 4)}
    assert loss[2] == pytest.approx(entropy_rate, abs=0.01)
    assert loss[1] > loss[2] + 0.3
    assert loss[4] < loss[2] + 0.1  # longer contexts cost little where they hold nothing


def test_a_large_vocabulary_and_a_high_order_fit_the_keys():
    ids = np.random.default_rng(1).zipf(1.3, size=20_000) % 65_536
    model = NgramModel.fit(ids, vocab_size=65_536, order=7)
    assert model.order == 7
    assert model.distribution(ids[100:107]).sum() == pytest.approx(1, abs=1e-9)
    assert model.log_prob(ids).mean() > -1
    assert np.isfinite(model.log_prob(np.arange(1000) + 60_000)).all()


def test_array_list_and_tensor_give_the_same_numbers():
    ids = np.random.default_rng(2).integers(9, size=(4, 30))
    model = NgramModel.fit(ids, vocab_size=9, order=3)
    expected = model.log_prob(ids)
    assert expected.shape == (4, 30)
    np.testing.assert_array_equal(NgramModel.fit(ids.tolist(), vocab_size=9, order=3).log_prob(ids), expected)
    np.testing.assert_array_equal(model.log_prob(torch.from_numpy(ids)), expected)
    np.testing.assert_array_equal(model.log_prob(list(ids)), expected.ravel())
    np.testing.assert_array_equal(model.log_prob(ids[0].tolist()), expected[0])


def test_state_comes_back_with_the_same_numbers(tmp_path):
    ids = np.random.default_rng(3).integers(9, size=500)
    model = NgramModel.fit(ids, vocab_size=9)
    save_bundle(tmp_path / "ngrams", model.state())
    again = NgramModel.from_state(load_bundle(tmp_path / "ngrams"))
    assert again.order == 5
    np.testing.assert_array_equal(again.log_prob(ids), model.log_prob(ids))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: NgramModel.fit([], vocab_size=5), "no tokens"),
        (lambda: NgramModel.fit([[], []], vocab_size=5), "no tokens"),
        (lambda: NgramModel.fit([1, 5], vocab_size=5), "token id 5 at position 1: expected 0 to 4"),
        (lambda: NgramModel.fit([[1], [70000, 1, 2]], vocab_size=5), "token id 70000 at position 1"),
        (lambda: NgramModel.fit([1, 2], vocab_size=5, order=0), "order is 0"),
        (lambda: NgramModel.fit([0.5, 1.0], vocab_size=5), "integer ids"),
        (lambda: NgramModel.fit([1, 2], vocab_size=5).log_prob([-1]), "token id -1 at position 0"),
        (lambda: NgramModel.fit([1, 2], vocab_size=5).rows([[1, 7]]), r"token id 7 at position \(0, 1\)"),
        (lambda: NgramModel.fit([1, 2], vocab_size=5, smoothing="magic"), "'magic' is none of kneser-ney"),
        (lambda: NgramModel.fit([1, 2, 3], vocab_size=5).predictions([[1, 2]], first=0), "first is 0"),
        (lambda: NgramModel.fit([1, 2, 3], vocab_size=5, order=2).log_prob([1], order=3), "orders 1 to 2"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
