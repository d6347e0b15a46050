import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sonde.errors import SondeError
from sonde.stats.ngram import NgramModel

V = 7
KINDS = ("kneser-ney", "absolute", "none")


def rows(seed, order=3, smoothing="kneser-ney", n=60):
    rng = np.random.default_rng(seed)
    ids = rng.choice(V, p=rng.dirichlet(np.ones(V)), size=(5, n))
    return NgramModel.fit(ids, vocab_size=V, order=order, smoothing=smoothing).predictions(ids[:, :-1])


def naive(p, q):
    return torch.xlogy(p, p).sum(-1) - torch.xlogy(p, q).sum(-1)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.integers(1, 3), st.sampled_from(KINDS))
def test_divergences_and_entropy_equal_those_of_dense_tables(seed, order, smoothing):
    ours = rows(seed, order, smoothing)
    p = ours.dense()
    logits = torch.from_numpy(np.random.default_rng(seed).normal(size=(len(ours), V))) * 3
    q = logits.softmax(-1)
    m = (p + q) / 2
    torch.testing.assert_close(ours.kl(logits), naive(p, q))
    torch.testing.assert_close(ours.jensen_shannon(logits), (naive(p, m) + naive(q, m)) / 2)
    torch.testing.assert_close(ours.entropy(), -torch.xlogy(p, p).sum(-1))
    torch.testing.assert_close(p.sum(1), torch.ones(len(ours), dtype=torch.float64), atol=1e-9, rtol=0)


@pytest.mark.parametrize("smoothing", KINDS)
def test_a_distribution_diverges_from_itself_by_nothing(smoothing):
    ours = rows(1, smoothing=smoothing)
    logits = ours.dense().log() + 5
    assert ours.kl(logits).abs().max() < 1e-12
    assert ours.jensen_shannon(logits).abs().max() < 1e-12


def test_a_model_that_excludes_what_occurs_diverges_without_bound_and_never_by_nan():
    ours = rows(2, order=2, smoothing="none")
    logits = torch.zeros(len(ours), V).double()
    logits[:, ours.tokens[0]] = -torch.inf
    kl = ours.kl(logits)
    assert kl[0] == torch.inf and not kl.isnan().any()
    assert not rows(2, order=2).kl(logits).isnan().any()
    js = ours.jensen_shannon(logits)
    assert js.isfinite().all() and js.max() <= np.log(2) + 1e-12


def test_a_part_is_the_rows_and_the_csr_tensor_the_sparse_part():
    ours = rows(3, smoothing="none")
    torch.testing.assert_close(ours.part(5, 9).dense(), ours.dense()[5:9])
    torch.testing.assert_close(ours.csr().to_dense(), ours.dense())


def test_a_context_without_a_continuation_counts_nothing():
    model = NgramModel.fit([0, 1, 2], vocab_size=V, order=2, smoothing="none")
    ours = model.rows([[0], [2]], unseen="empty")
    assert ours.seen.tolist() == [True, False]
    assert ours.kl(torch.zeros(2, V)).tolist() == pytest.approx([np.log(V), 0])
    assert ours.jensen_shannon(torch.zeros(2, V))[1] == 0


def test_another_vocabulary_is_named_with_both_sizes():
    with pytest.raises(SondeError, match=r"over 9 tokens and the counts are over 7: .* logits\[..., :7\]"):
        rows(4).kl(torch.zeros(len(rows(4)), 9))
    with pytest.raises(SondeError, match="rows"):
        rows(4).jensen_shannon(torch.zeros(2, V))
