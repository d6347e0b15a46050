import pytest
import torch
from concepts.planted import DOUBLE, planted
from sklearn.linear_model import LogisticRegression

from sonde.concepts.affine import AffineEdit
from sonde.concepts.certificate import certify
from sonde.concepts.inlp import InlpEraser
from sonde.concepts.leace import LeaceEraser
from sonde.concepts.oracle import OracleEraser
from sonde.concepts.sal import SalEraser


def test_it_tells_an_eraser_from_an_edit_that_does_nothing():
    x, z = planted(4000, 16, 3)
    leace = certify(LeaceEraser.fit(x[:2000], z[:2000]), x[2000:], z[2000:])
    assert leace.guarded
    assert leace.rank == 2
    assert leace.chance.estimate == pytest.approx(1 / 3, abs=0.04)
    assert leace.linear[0].low > leace.linear[1].high
    assert leace.gap[1] < 0.2 * leace.gap[0]
    assert 0 < leace.mean_squared_change.low <= leace.mean_squared_change.high < 1
    random = torch.linalg.qr(torch.randn(16, 2, generator=torch.Generator().manual_seed(0), dtype=DOUBLE))[0]
    control = certify(AffineEdit(left=random, right=random.T), x[2000:], z[2000:])
    assert not control.guarded
    assert control.linear[1].low > 0.5


def test_on_its_own_rows_an_eraser_is_exact():
    x, z = planted(1000, 8, 2)
    found = certify(LeaceEraser.fit(x, z), x, z)
    assert found.gap[1] < 1e-9
    assert found.correlation[1] < 1e-9
    oracle = certify(OracleEraser.fit(x, z), x, z)
    assert oracle.rank is None
    assert oracle.mean_squared_change.estimate < found.mean_squared_change.estimate


def test_probes_may_be_trained_on_the_rows_of_the_eraser():
    x, z = planted(3000, 64, 2)
    eraser = LeaceEraser.fit(x[:600], z[:600])
    own = certify(eraser, x[600:], z[600:], probes_on=(x[:600], z[:600]))
    assert own.guarded
    assert own.linear[0].n == 2400
    # an adversary with rows of its own finds what 600 rows leave of 64 dimensions
    assert certify(eraser, x[600:], z[600:]).linear[1].estimate > own.linear[1].estimate


def test_values_are_scored_by_the_share_of_variance():
    x, _ = planted(2000, 8, 2)
    z = x[:, :2] + 0.1 * torch.randn(2000, 2, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    found = certify(LeaceEraser.fit(x[:1000], z[:1000]), x[1000:], z[1000:])
    assert (found.score, found.gap) == ("R2", None)
    assert found.linear[0].low > 0.9
    assert found.linear[1].high < 0.1
    assert found.guarded


def test_the_table_and_the_text_say_the_same():
    x, z = planted(400, 4, 2)
    found = certify(LeaceEraser.fit(x, z), x, z, torch.arange(400) > 9)
    assert found.n == 390
    table = {row["quantity"]: row for row in found.rows()}
    assert table["linear probe, accuracy"]["after_low"] == found.linear[1].low
    assert "gap of class means: " in str(found)
    assert f"{found.mlp[0].estimate:.3g}" in str(found)
    with pytest.raises(ValueError, match="at least 20"):
        certify(LeaceEraser.fit(x, z), x[:10], z[:10])


def test_methods_rank_as_published():
    """LEACE and SAL reach chance, LEACE at three quarters of the cost or less; INLP pays several times as much."""
    g = torch.Generator().manual_seed(0)
    n, d = 6000, 768
    # the concept is spread over directions of all variances, so that an oblique projection has something to gain
    scale = torch.logspace(0.6, -0.6, d, dtype=torch.float32)
    mix = torch.linalg.qr(torch.randn(d, d, generator=g))[0]
    z = torch.randint(0, 2, (n,), generator=g)
    direction = torch.randn(d, generator=g)
    x = torch.randn(n, d, generator=g) * scale + (2 * z[:, None] - 1) * direction * 3 / (direction / scale).norm()
    x = x @ mix
    train, test = slice(0, 4000), slice(4000, None)

    def score(eraser):
        rows = x if eraser is None else eraser(x)
        probe = LogisticRegression(max_iter=100).fit(rows[train].numpy(), z[train])
        return probe.score(rows[test].numpy(), z[test])

    def cost(eraser):
        return float((eraser(x[test]) - x[test]).square().sum(-1).mean())

    leace, sal = LeaceEraser.fit(x[train], z[train]), SalEraser.fit(x[train], z[train])
    inlp = InlpEraser.fit(x[train], z[train], directions=25)
    assert score(None) > 0.97
    assert abs(score(leace) - 0.5) < 0.035
    assert abs(score(sal) - 0.5) < 0.035
    assert cost(leace) <= 0.75 * cost(sal)
    assert cost(inlp) > 3 * cost(leace)
