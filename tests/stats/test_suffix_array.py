import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sonde.errors import SondeError
from sonde.stats.ngram_tables import NgramTables
from sonde.stats.suffix_array import SuffixArray, suffix_order

V = 4
texts = st.lists(st.lists(st.integers(0, V - 1), max_size=14), min_size=1, max_size=6).filter(any)
quick = settings(max_examples=60, deadline=None)


@quick
@given(st.lists(st.integers(1, 3), min_size=1, max_size=60))
def test_suffixes_come_in_lexicographic_order(symbols):
    assert suffix_order(np.array(symbols)).tolist() == sorted(range(len(symbols)), key=lambda i: symbols[i:])


@quick
@given(texts, st.lists(st.integers(0, V - 1), min_size=1, max_size=7))
def test_counts_and_positions_equal_brute_force_and_cross_no_document(text, gram):
    places = [
        [document, i]
        for document, ids in enumerate(text)
        for i in range(len(ids) - len(gram) + 1)
        if ids[i : i + len(gram)] == gram
    ]
    index = SuffixArray.build(text, vocab_size=V)
    assert index.count([gram]).tolist() == [len(places)]
    assert index.positions(gram).tolist() == places


@quick
@given(texts, st.integers(0, 3))
def test_what_follows_a_context_is_what_the_sorted_tables_say(text, length):
    tables, index = NgramTables.build(text, vocab_size=V, order=4), SuffixArray.build(text, vocab_size=V)
    length = min(length, tables.order - 1)
    contexts = np.array(list(itertools.product(range(V), repeat=length)), dtype=np.int64).reshape(V**length, length)
    for ours, theirs in zip(index.continuations(contexts), tables.continuations(contexts), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("size", [20_000, 1])
def test_a_constant_text_and_a_wide_vocabulary_are_ordered(size):
    assert suffix_order(np.full(size, 7)).tolist() == list(range(size))[::-1]
    wide = np.random.default_rng(0).integers(1, 2**31, size=300)
    assert suffix_order(wide).tolist() == sorted(range(300), key=lambda i: wide[i:].tolist())


def test_a_saved_index_opens_memory_mapped_with_the_same_counts(tmp_path):
    ids = np.random.default_rng(1).integers(70_000, size=500)
    index = SuffixArray.build(ids, vocab_size=70_000)
    index.save(tmp_path / "index")
    again = SuffixArray.open(tmp_path / "index")
    assert isinstance(again.order, np.memmap) and again.symbols.dtype == np.uint32 and again.order.dtype == np.int32
    np.testing.assert_array_equal(again.count(ids[:, None]), index.count(ids[:, None]))
    (tmp_path / "index" / "order.npy").write_bytes(b"damage")
    with pytest.raises(SondeError, match="does not hold a suffix array"):
        SuffixArray.open(tmp_path / "index")


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="token id 9 at position 1: expected 0 to 3"):
        SuffixArray.build([1, 9], vocab_size=V)
    with pytest.raises(ValueError, match=r"token id -1 at position \(0, 1\)"):
        SuffixArray.build([1, 2], vocab_size=V).count([[1, -1]])
    with pytest.raises(ValueError, match="no tokens"):
        SuffixArray.build([], vocab_size=V)
