from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sonde.errors import SondeError
from sonde.stats.ngram_tables import NgramTables

V = 4
texts = st.lists(st.lists(st.integers(0, V - 1), max_size=12), min_size=1, max_size=6).filter(any)


# 17 and 33 bits a token: the longer n-grams do not fit into one word
@settings(max_examples=60, deadline=None)
@given(texts, st.integers(1, 6), st.sampled_from([V, 1 << 16, 1 << 32]))
def test_counts_equal_brute_force_and_no_ngram_crosses_a_document(text, order, vocab_size):
    tables = NgramTables.build(text, vocab_size=vocab_size, order=order)
    for k, level in enumerate(tables.levels, start=1):
        counted = Counter(tuple(d[i : i + k]) for d in text for i in range(len(d) - k + 1))
        grams = np.array(sorted(counted))
        assert len(level.keys) == len(grams)
        assert tables.find(grams).tolist() == list(range(len(grams)))
        assert tables.count(grams).tolist() == [counted[tuple(gram)] for gram in grams]
        opening = {tuple(d[:k]) for d in text if len(d) >= k}
        assert {tuple(gram) for gram in grams[level.openings].tolist()} == opening


def test_ids_that_do_not_occur_are_counted_zero_and_contexts_have_empty_rows():
    tables = NgramTables.build([[0, 1, 0, 1], [2]], vocab_size=V, order=2)
    assert tables.count([[0, 1], [1, 2], [3, 3]]).tolist() == [2, 0, 0]
    assert tables.count(np.zeros((2, 0), dtype=int)).tolist() == [5, 5]
    begins, tokens, counts = tables.continuations([[2], [0], [3], [1]])
    assert begins.tolist() == [0, 0, 1, 1, 2]
    assert (tokens.tolist(), counts.tolist()) == ([1, 0], [2, 1])


def test_saved_tables_open_memory_mapped_with_the_same_counts(tmp_path):
    ids = np.random.default_rng(0).integers(50_277, size=3000) // 500
    tables = NgramTables.build(ids, vocab_size=50_277, order=5)
    tables.save(tmp_path / "tables")
    again = NgramTables.open(tmp_path / "tables")
    assert isinstance(again.levels[4].keys, np.memmap)
    assert again.levels[4].tokens.dtype == np.uint16
    grams = np.lib.stride_tricks.sliding_window_view(ids, 5)
    np.testing.assert_array_equal(again.count(grams), tables.count(grams))
    with pytest.raises(SondeError, match="exists already"):
        tables.save(tmp_path / "tables")
    (tmp_path / "tables" / "keys.3.npy").unlink()
    with pytest.raises(SondeError, match="does not hold n-gram tables"):
        NgramTables.open(tmp_path / "tables")
    assert [path.name for path in tmp_path.iterdir()] == ["tables"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda tables: tables.count([[70_000, 1]]), r"token id 70000 at position \(0, 0\): expected 0 to 3"),
        (lambda tables: tables.count([[0, 1, 2, 3]]), "rows of 0 to 2 ids"),
        (lambda tables: tables.continuations([[0, 1]]), "rows of 0 to 1 ids"),
        (lambda tables: tables.count([[0.5]]), "expected integers"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(NgramTables.build([0, 1, 2], vocab_size=V, order=2))
