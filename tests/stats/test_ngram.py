import itertools
import math
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sonde.files import load_bundle, save_bundle
from sonde.stats.ngram import NgramModel

V = 5
texts = st.lists(st.lists(st.integers(0, V - 1), max_size=12), min_size=1, max_size=6).filter(any)
quick = settings(max_examples=40, deadline=None)


@quick
@given(texts, st.integers(1, 4), st.lists(st.integers(0, V - 1), max_size=5))
def test_every_conditional_distribution_sums_to_one_and_excludes_nothing(text, order, context):
    model = NgramModel.fit(text, vocab_size=V + 2, order=order)
    p = model.distribution(context)
    assert p.sum() == pytest.approx(1, abs=1e-12)
    assert (p > 0).all()


@quick
@given(texts, texts, st.integers(1, 4))
def test_log_prob_is_the_log_of_the_distribution(text, other, order):
    model = NgramModel.fit(text, vocab_size=V, order=order)
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
        (lambda: NgramModel.fit([1, 5], vocab_size=5), "1 to 5 in a vocabulary of 5"),
        (lambda: NgramModel.fit([1, 2], vocab_size=5, order=0), "order is 0"),
        (lambda: NgramModel.fit([0.5, 1.0], vocab_size=5), "integer ids"),
        (lambda: NgramModel.fit([1, 2], vocab_size=5).log_prob([-1]), "-1 to -1"),
        (lambda: NgramModel.fit([1, 2, 3], vocab_size=5, order=2).log_prob([1], order=3), "orders 1 to 2"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
