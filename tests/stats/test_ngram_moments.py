"""The k-th cross moment of embedded tokens is made of k-gram frequencies, and gives them back where d >= V."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sonde.stats.ngram_tables import NgramTables

V = 6


def frequencies(ids, k):
    """P(t_1, …, t_k) over a text, as an array of k axes."""
    tables = NgramTables.build(ids, vocab_size=V, order=k)
    grams = np.stack(np.meshgrid(*[np.arange(V)] * k, indexing="ij"), -1).reshape(-1, k)
    counts = tables.count(grams)
    return (counts / counts.sum()).reshape((V,) * k)


def moment(x, k):
    """E[x_i ⊗ … ⊗ x_{i+k-1}] of embedded tokens `x [n, d]`."""
    total = x[: len(x) - k + 1]
    for j in range(1, k):
        total = np.einsum("n...,nd->n...d", total, x[j : len(x) - k + 1 + j])
    return total.mean(0)


def along_all(table, matrix):
    """`matrix [rows, columns]` applied to every axis of a table."""
    for axis in range(table.ndim):
        table = np.moveaxis(np.tensordot(matrix, table, (1, axis)), 0, axis)
    return table


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 3), st.sampled_from([4, 8]))
def test_moments_are_the_embedded_table_of_ngrams_and_determine_it_where_embeddings_are_independent(seed, k, d):
    rng = np.random.default_rng(seed)
    ids, embedding = rng.choice(V, p=rng.dirichlet(np.ones(V)), size=80), rng.normal(size=(V, d))
    table, m = frequencies(ids, k), moment(embedding[ids], k)
    np.testing.assert_allclose(m, along_all(table, embedding.T), atol=1e-10)
    recovered = along_all(m, np.linalg.pinv(embedding).T)
    if d >= V:
        np.testing.assert_allclose(recovered, table, atol=1e-8)
    else:
        assert np.abs(recovered - table).max() > 1e-4


@pytest.mark.parametrize("k", [1, 2])
def test_with_fewer_dimensions_than_tokens_two_tables_share_a_moment(k):
    embedding = np.random.default_rng(0).normal(size=(V, 4))
    _, _, rows = np.linalg.svd(embedding.T)
    unseen = rows[-1]  # a change of the table that no moment shows
    for _ in range(k - 1):
        unseen = np.multiply.outer(unseen, rows[-1])
    table = np.full((V,) * k, 1 / V**k)
    other = table + unseen / np.abs(unseen).max() / V**k
    assert (other >= 0).all() and np.abs(other - table).max() > 0.01
    np.testing.assert_allclose(along_all(other, embedding.T), along_all(table, embedding.T), atol=1e-12)
