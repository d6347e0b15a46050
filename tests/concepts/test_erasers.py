"""What the other erasers promise: SAL, the oracle, SPLINCE, ALF-QLEACE, free-form, quantiles, INLP and RLACE."""

import numpy as np
import pytest
import torch
from concepts.planted import DOUBLE, gap, mse, one_hot, planted
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from sonde.concepts.alf import AlfQleaceEraser
from sonde.concepts.freeform import FreeFormEraser
from sonde.concepts.inlp import InlpEraser
from sonde.concepts.leace import LeaceEraser
from sonde.concepts.oracle import OracleEraser
from sonde.concepts.quantile import QuantileEditor
from sonde.concepts.rlace import RlaceEraser, fantope
from sonde.concepts.row_sample import RowSample
from sonde.concepts.sal import SalEraser
from sonde.concepts.splince import SplinceEraser
from sonde.errors import SondeError

quick = settings(max_examples=20, deadline=None)


def cross(x, z):
    return (x - x.mean(0)).T @ (z - z.mean(0)) / len(x)


def accuracy(x, z):
    half = len(x) // 2
    return float(LogisticRegression(max_iter=200).fit(x[:half].numpy(), z[:half]).score(x[half:].numpy(), z[half:]))


@quick
@given(st.integers(0, 10_000), st.integers(2, 5))
def test_sal_is_an_orthogonal_projection_that_guards(seed, k):
    x, z = planted(200, 8, k, seed=seed)
    eraser = SalEraser.fit(x, z)
    assert gap(eraser(x), z) < 1e-9
    torch.testing.assert_close(eraser.left.T @ eraser.left, torch.eye(eraser.rank, dtype=DOUBLE))
    torch.testing.assert_close(eraser(x).mean(0), x.mean(0))


@quick
@given(st.integers(0, 10_000), st.booleans())
def test_the_oracle_leaves_the_residual_of_least_squares(seed, labels):
    x, z = planted(200, 5, 3, seed=seed)
    columns = one_hot(z) if labels else 1e-4 * torch.cat([x[:, :2].sin(), x[:, :1].sin()], 1)  # one column twice
    y = OracleEraser.fit(x, z)(x, z) if labels else OracleEraser.fit(x, columns)(x, columns)
    centred = (columns - columns.mean(0)).numpy()
    slope = np.linalg.lstsq(centred, (x - x.mean(0)).numpy(), rcond=1e-12)[0]
    torch.testing.assert_close(y, x - torch.from_numpy(centred @ slope), rtol=0, atol=1e-8)


@quick
@given(st.integers(0, 10_000), st.integers(2, 4), st.integers(2, 4))
def test_splince_erases_the_concept_and_keeps_the_task_exactly(seed, k, m):
    x, z = planted(400, 12, k, seed=seed)
    _, task = planted(400, 12, m, seed=seed + 1)
    x = x + torch.randn(m, 12, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)[task]
    eraser = SplinceEraser.fit(x, z, keep=task, shrinkage=False)
    y, size = eraser(x), float(x.abs().max())
    assert gap(y, z) < 1e-8 * size
    torch.testing.assert_close(cross(y, one_hot(task)), cross(x, one_hot(task)), rtol=0, atol=1e-9 * size)
    torch.testing.assert_close(eraser(y), y, rtol=0, atol=1e-8 * size)
    assert eraser.rank == k - 1
    leace = LeaceEraser.fit(x, z, shrinkage=False)
    assert mse(x, leace(x)) <= mse(x, y) * (1 + 1e-9)


def test_what_concept_and_task_share_is_erased_and_said():
    x, z = planted(400, 8, 2)
    with pytest.warns(UserWarning, match="1 of 1 directions of the task are also the concept's"):
        eraser = SplinceEraser.fit(x, z, keep=z)
    torch.testing.assert_close(eraser(x), LeaceEraser.fit(x, z)(x))
    with pytest.raises(ValueError, match="nothing to keep"):
        SplinceEraser.fit(x, z)


def test_splince_takes_a_stream():
    x, z = planted(300, 6, 3)
    task = torch.arange(300) % 2
    shards = [SplinceEraser().update(x[r], z[r], keep=task[r]) for r in torch.arange(300).split(120)]
    merged = shards[0].merge(shards[1]).merge(shards[2]).finish()
    torch.testing.assert_close(merged(x), SplinceEraser.fit(x, z, keep=task)(x))


def test_alf_qleace_takes_out_what_differs_between_class_covariances():
    x, z = planted(4000, 16, 2, spread=True)
    eraser = AlfQleaceEraser.fit(x, z)
    assert gap(eraser(x), z) < 1e-9
    trace = eraser.facts["differences"]
    assert trace[-1] <= 0.1 < trace[-2]
    assert trace == sorted(trace, reverse=True)
    y = eraser(x)
    torch.testing.assert_close(eraser(y), y, rtol=0, atol=1e-9)
    torch.testing.assert_close(y.mean(0), x.mean(0))

    def difference(rows):
        return float((torch.cov(rows[z == 0].T) - torch.cov(rows[z == 1].T)).norm())

    leace = LeaceEraser.fit(x, z)(x)
    assert difference(y) == pytest.approx(trace[-1] * difference(leace), rel=1e-3)
    assert AlfQleaceEraser.fit(x, z, max_rank=2).rank == 3
    assert AlfQleaceEraser.fit(x, z, max_rank=0).rank == 1
    with pytest.raises(ValueError, match=r"target is 1\.5"):
        AlfQleaceEraser.fit(x, z, target=1.5)


def test_alf_qleace_finds_the_one_direction_in_which_variances_differ():
    x = torch.randn(20_000, 8, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    z = torch.arange(20_000) % 2
    x[z == 1, 3] *= 4
    eraser = AlfQleaceEraser.fit(x, z, max_rank=1)
    assert float(eraser.left[3, -1].abs()) > 0.999


def test_a_true_conditional_mean_guards_and_costs_less_than_leace():
    g = torch.Generator().manual_seed(0)
    n = 40_000
    z = (torch.rand(n, generator=g) < 0.5).long()
    sign = 2 * z - 1
    x = torch.randn(n, 3, generator=g, dtype=DOUBLE)
    # the sign of the product of two coordinates tells z, which no linear predictor sees; the third is linear
    x[:, 0] = x[:, 0].abs()
    x[:, 1] = x[:, 1].abs() * sign
    x[:, 2] += sign

    def f(rows):
        return (rows[:, 1:2] > 0).double()

    eraser = FreeFormEraser.fit(x, z, predictor=f)
    y = eraser(x)
    assert gap(y, z) < 1e-9
    assert mse(x, y) < 0.9 * mse(x, LeaceEraser.fit(x, z)(x))
    torch.testing.assert_close(y, OracleEraser.fit(x, z)(x, z), rtol=0, atol=1e-9)
    with pytest.raises(SondeError, match="own predictor cannot be saved"):
        eraser.save("anywhere")


def test_a_trained_predictor_guards_nearly():
    x, z = planted(4000, 8, 3)
    y = FreeFormEraser.fit(x[:3000], z[:3000])(x)
    assert gap(y[:3000], z[:3000]) < 0.1 * gap(x[:3000], z[:3000])
    values = ((x - x.mean(0))[:, :1]).tanh()
    y = FreeFormEraser.fit(x, values)(x)
    assert cross(y, values).abs().max() < 0.1 * cross(x, values).abs().max()


def test_quantiles_move_every_coordinate_to_the_target_class():
    x, z = planted(6000, 4, 2, spread=True)
    x = (x / x.std(0) / 2).exp()
    editor = QuantileEditor.fit(x, z)
    y = editor(x, z, 1)
    levels = torch.linspace(0.02, 0.98, 25, dtype=DOUBLE)
    found, wanted = y[z == 0].quantile(levels, 0), x[z == 1].quantile(levels, 0)
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.05)
    back = editor(y[z == 0], 1, 0)
    torch.testing.assert_close(back, x[z == 0], rtol=0.02, atol=0.02)
    order = x[z == 0][:, 0].argsort()
    assert (y[z == 0][order, 0].diff() >= -1e-9).all()
    far = editor(torch.full((1, 4), 1e3, dtype=DOUBLE), 0, 1)
    torch.testing.assert_close(far - 1e3, (x[z == 1].amax(0) - x[z == 0].amax(0))[None])


def test_values_that_many_rows_share_go_to_the_middle_of_their_range():
    x = torch.cat([torch.zeros(500), torch.linspace(0, 1, 501)])[:, None].double()
    z = torch.cat([torch.zeros(500), torch.ones(501)]).long()
    assert QuantileEditor.fit(x, z)(torch.zeros(1, 1, dtype=DOUBLE), 0, 1).item() == pytest.approx(0.5, abs=0.01)
    with pytest.raises(ValueError, match=r"class 2 has 1 row"):
        QuantileEditor.fit(x, torch.cat([z[:-1], torch.tensor([2])]))
    with pytest.raises(ValueError, match="no order"):
        QuantileEditor.fit(x.to(torch.complex128), z)


def test_a_sample_is_uniform_over_shards_and_bounded():
    x = torch.arange(5000.0)[:, None]
    z = (torch.arange(5000) % 50 == 0).long()
    sample = RowSample(capacity=400, categorical=True)
    for rows in torch.arange(5000).split(700):
        sample.merge(RowSample(capacity=400, seed=int(rows[0])).update(x[rows], z[rows]))
    kept, labels = sample.rows
    assert sample.n == 5000
    assert torch.bincount(labels).tolist() == [400, 100]
    assert kept[labels == 1][:, 0].tolist() == x[z == 1][:, 0].tolist()
    assert abs(float(kept[labels == 0].mean()) - 2500) < 4 * 5000 / 12**0.5 / 20
    with pytest.raises(ValueError, match="at least 2"):
        RowSample(capacity=1)
    with pytest.raises(ValueError, match="no data"):
        RowSample().rows  # noqa: B018


def test_inlp_hides_the_concept_step_by_step():
    x, z = planted(3000, 16, 2, shift=0.7)
    one, many = InlpEraser.fit(x, z, directions=1), InlpEraser.fit(x, z, directions=10)
    assert (one.rank, many.rank) == (1, 10)
    torch.testing.assert_close(many.left.T @ many.left, torch.eye(10, dtype=DOUBLE), rtol=0, atol=1e-9)
    scores = [accuracy(rows, z) for rows in (x, one(x), many(x))]
    assert scores[0] > scores[1] + 0.05
    assert scores[1] > scores[2]
    assert mse(x, LeaceEraser.fit(x, z)(x)) < mse(x, many(x))
    with pytest.raises(ValueError, match="0 directions"):
        InlpEraser.fit(x, z, directions=0)


def test_the_game_finds_the_planted_direction():
    g = torch.Generator().manual_seed(0)
    z = torch.arange(2000) % 2
    x = torch.randn(2000, 10, generator=g, dtype=DOUBLE)
    x[:, 4] += 2 * z
    eraser = RlaceEraser.fit(x, z, steps=60)
    assert float(eraser.left[4, 0].abs()) > 0.98
    assert accuracy(eraser(x), z) < 0.56
    with pytest.raises(ValueError, match="10 directions"):
        RlaceEraser.fit(x, z, directions=10)


@quick
@given(st.integers(0, 10_000), st.integers(1, 4))
def test_the_fantope_is_projected_onto(seed, rank):
    a = torch.randn(5, 5, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)
    a = a + a.T
    p = fantope(a, rank)
    values = torch.linalg.eigvalsh(p)
    assert values.min() > -1e-9
    assert values.max() < 1 + 1e-9
    assert float(values.sum()) == pytest.approx(rank)
    torch.testing.assert_close(fantope(p, rank), p, rtol=0, atol=1e-8)
