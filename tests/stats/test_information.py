import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import spatial, special, stats

from sonde.stats import information
from sonde.stats.information import (
    aitchison,
    bits,
    bits_per_byte,
    clr,
    cross_entropy,
    entropy,
    js,
    kl,
    log_probs,
    max_difference,
    mean_kl,
    tv,
)

pairs = st.integers(2, 12).flatmap(lambda v: hnp.arrays(np.float64, (2, 3, v), elements=st.floats(-30, 30)))
quick = settings(max_examples=40, deadline=None)


def logs(logits):
    return log_probs(torch.from_numpy(logits))


@quick
@given(pairs)
def test_divergences_equal_scipys(logits):
    p, q = logs(logits)
    a, b = p.exp().numpy(), q.exp().numpy()
    np.testing.assert_allclose(entropy(p), stats.entropy(a, axis=-1), atol=1e-12)
    np.testing.assert_allclose(kl(p, q), special.rel_entr(a, b).sum(-1), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(
        js(p, q), [spatial.distance.jensenshannon(*rows) ** 2 for rows in zip(a, b, strict=True)], rtol=1e-6, atol=1e-9
    )
    np.testing.assert_allclose(tv(p, q), spatial.distance.cdist(a, b, "cityblock").diagonal() / 2, atol=1e-12)


@quick
@given(pairs)
def test_bounds_and_pinskers_inequality_hold(logits):
    p, q = logs(logits)
    assert (kl(p, q) >= 0).all()
    assert (js(p, q) <= math.log(2)).all()
    assert (tv(p, q) <= 1 + 1e-12).all()
    assert (tv(p, q) <= (kl(p, q) / 2).sqrt() + 1e-9).all()
    assert (max_difference(p, q) <= tv(p, q) + 1e-12).all()
    assert torch.equal(js(p, q), js(q, p))


@quick
@given(pairs)
def test_a_distribution_is_at_distance_exactly_zero_from_itself(logits):
    p = logs(logits)[0]
    for distance in (kl, tv, mean_kl, max_difference):
        assert not distance(p, p).any()
    assert js(p, p).max() < 1e-12


@quick
@given(pairs)
def test_cross_entropy_averaged_over_p_is_entropy_plus_kl(logits):
    p, q = logs(logits)
    surprise = torch.stack([cross_entropy(q, torch.full((3,), token)) for token in range(q.shape[-1])], dim=-1)
    torch.testing.assert_close((p.exp() * surprise).sum(-1), entropy(p) + kl(p, q), rtol=1e-9, atol=1e-9)


def test_removed_tokens_add_nothing():
    logits = torch.randn(4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    other = torch.randn(4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gone = torch.tensor([1, 4])
    kept = torch.tensor([0, 2, 3, 5, 6])
    masked = [log_probs(x.index_fill(-1, gone, -torch.inf)) for x in (logits, other)]
    short = [log_probs(x[:, kept]) for x in (logits, other)]
    for f in (kl, js, tv, mean_kl):
        torch.testing.assert_close(f(*masked), f(*short))
    torch.testing.assert_close(entropy(masked[0]), entropy(short[0]))
    torch.testing.assert_close(aitchison(*masked, weights=masked[0].exp()), aitchison(*short, weights=short[0].exp()))


def test_kl_is_infinite_where_q_excludes_what_p_allows():
    p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([1.0, 0.0]).log()
    assert kl(p, q) == torch.inf
    assert js(p, q) < math.log(2)


def test_disjoint_distributions_reach_the_bounds():
    p, q = torch.tensor([1.0, 0.0]).log(), torch.tensor([0.0, 1.0]).log()
    assert js(p, q).item() == pytest.approx(math.log(2))
    assert tv(p, q) == 1


def test_half_precision_is_computed_in_single():
    logits = torch.linspace(-40, 10, 50_000).to(torch.float16)
    for f in (log_probs, entropy):
        assert f(logits).dtype == torch.float32
    assert entropy(log_probs(logits)).isfinite()
    assert log_probs(logits).isfinite().all()


@quick
@given(pairs, st.floats(-5, 5), st.floats(0.5, 4))
def test_aitchison_ignores_shifts_and_positive_scales(logits, shift, scale):
    a, b = torch.from_numpy(logits)
    weights = torch.arange(1.0, a.shape[-1] + 1, dtype=torch.float64).expand_as(a)
    similarity, moved = aitchison(a, b, weights), aitchison(a * scale + shift, b, weights)
    spread = torch.minimum(a.std(-1), b.std(-1)) > 1e-3
    torch.testing.assert_close(similarity[spread], moved[spread], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(aitchison(a, -a, weights)[spread], -torch.ones(int(spread.sum()), dtype=torch.float64))


@quick
@given(pairs)
def test_clr_has_weighted_mean_zero(logits):
    a, b = torch.from_numpy(logits)
    weights = b.softmax(-1)
    assert (weights * clr(a, weights)).sum(-1).abs().max() < 1e-9


def test_aitchison_of_a_constant_change_is_nan():
    assert aitchison(torch.ones(5), torch.arange(5.0)).isnan()


def test_bits_per_byte_is_total_bits_over_total_bytes():
    assert bits(math.log(2)) == pytest.approx(1)
    assert bits_per_byte(3 * math.log(2), tokens=100, bytes=400) == pytest.approx(0.75)
    with pytest.raises(ValueError, match="0 bytes"):
        bits_per_byte(1.0, tokens=3, bytes=0)


def test_targets_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="targets of shape"):
        information.cross_entropy(torch.zeros(2, 3, 5), torch.zeros(2, 4, dtype=torch.long))
