"""What is kept of each row is what a dense matrix would keep, however it is found."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sonde.features import selection
from sonde.features.sparse_ops import Pattern, reusing


def encoder(n=50, d=8, latents=512, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, w, b = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((n, d), (latents, d), (latents,)))
    return x, w, b, torch.addmm(b, x, w.T)


def dense(kept):
    out = torch.full((kept.pattern.n, kept.pattern.size), -torch.inf, dtype=kept.pre.dtype)
    out[kept.pattern.rows, kept.pattern.latents] = kept.pre
    return out


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 33), st.sampled_from([64, 512, 1000, 1024]), st.integers(0, 10_000), st.booleans())
def test_the_largest_of_groups_of_the_largest_are_the_largest(k, latents, seed, tied):
    pre = torch.randn(7, latents, generator=torch.Generator().manual_seed(seed))
    if tied:
        pre = pre.round()
    values, places = selection.largest(pre, k)
    assert torch.equal(values.sort(1)[0], torch.topk(pre, k)[0].sort(1)[0])
    assert torch.equal(pre.gather(1, places), values)
    assert all(len(set(row)) == k for row in places.tolist())


@pytest.mark.parametrize("chunk", [600, 1 << 22])
def test_chunks_of_rows_do_not_change_what_is_kept(chunk, monkeypatch):
    monkeypatch.setattr(selection, "_CHUNK", chunk)
    x, w, b, pre = encoder()
    kept = selection.top_k(x, w, b, 9)
    wanted = torch.full_like(pre, -torch.inf).scatter(1, pre.topk(9)[1], pre.topk(9)[0])
    assert torch.allclose(dense(kept), wanted, atol=1e-12)
    assert torch.equal(dense(selection.above(x, w, b, 0.7)) > 0.7, pre > 0.7)


def test_rank_by_worth_keeps_other_latents_and_their_own_values():
    x, w, b, pre = encoder()
    worth = torch.linspace(0.1, 3, 512, dtype=torch.float64)
    kept = selection.top_k(x, w, b, 5, worth=worth)
    places = (pre * worth).topk(5)[1]
    wanted = torch.full_like(pre, -torch.inf).scatter(1, places, pre.gather(1, places))
    assert torch.allclose(dense(kept), wanted, atol=1e-12)


def test_groups_keep_their_largest():
    x, w, b, pre = encoder()
    kept = selection.group_max(x, w, b, 16)
    best = pre.unflatten(1, (16, 32)).max(2)
    assert torch.allclose(kept.pre.view(50, 16), best[0], atol=1e-12)
    assert torch.equal(kept.pattern.latents.view(50, 16), best[1] + 32 * torch.arange(16))


@pytest.mark.parametrize("worth", [False, True])
@pytest.mark.parametrize(("k", "shift"), [(3, 0.0), (40, 0.0), (500, 0.0), (9, -30.0)])
def test_a_batch_keeps_its_largest_and_none_that_is_not_positive(k, shift, worth):
    x, w, b, pre = encoder()
    pre, b = pre + shift, b + shift
    scale = torch.linspace(0.5, 2, 512, dtype=torch.float64) if worth else torch.ones(512, dtype=torch.float64)
    kept = selection.batch_top_k(x, w, b, k, worth=scale if worth else None)
    ranks = (pre * scale).flatten()
    many = min(50 * k, int((ranks > 0).sum()))
    wanted = torch.zeros(50 * 512, dtype=torch.bool).index_fill(0, ranks.topk(many)[1], True).view(50, 512)
    assert torch.equal(dense(kept) > 0, wanted)


def test_a_pattern_multiplies_as_its_matrix_does():
    x, w, b, _ = encoder()
    pattern, values = selection.above(x, w, b, 2.5)
    matrix = torch.zeros(50, 512, dtype=torch.float64)
    matrix[pattern.rows, pattern.latents] = values
    assert torch.allclose(pattern.product(values, w), matrix @ w, atol=1e-10)
    assert torch.allclose(pattern.turned_product(values, x), matrix.T @ x, atol=1e-10)
    assert torch.allclose(pattern.inner(x, w), (x @ w.T)[pattern.rows, pattern.latents], atol=1e-10)
    assert torch.allclose(pattern.column_sums(values), matrix.sum(0), atol=1e-10)
    assert torch.equal(pattern.counts, (matrix != 0).sum(0))


def test_memory_that_is_used_again_leaves_no_trace():
    x, w, b, _ = encoder()
    pattern, values = selection.top_k(x, w, b, 1)
    assert int((pattern.counts == 0).sum()) > 0
    spare = [torch.full((512, 8), 7.0, dtype=torch.float64)]
    place = spare[0].data_ptr()
    with reusing(spare):
        again = pattern.turned_product(values, x)
    assert again.data_ptr() == place
    assert not spare
    assert torch.equal(again, pattern.turned_product(values, x))


def test_no_rows_and_no_entries_are_no_special_case():
    x, w, b, _ = encoder()
    assert selection.above(x, w, b, 1e9).pattern.starts.tolist() == [0] * 51
    assert selection.above(x[:0], w, b, 0.0).pattern.n == 0
    empty = Pattern(torch.empty(0, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), 512)
    assert empty.product(x.new_empty(0), w).shape == (2, 8)
    assert not empty.product(x.new_empty(0), w).any()
