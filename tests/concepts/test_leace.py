import warnings

import numpy as np
import pytest
import torch
from concepts.planted import DOUBLE, gap, mse, one_hot, planted
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC

from sonde.concepts.leace import LeaceEraser
from sonde.concepts.oracle import OracleEraser
from sonde.concepts.sal import SalEraser

quick = settings(max_examples=25, deadline=None)


def matrix(eraser):
    return torch.eye(eraser.d, dtype=DOUBLE) - eraser.left @ eraser.right


@pytest.fixture(scope="module")
def reference():
    """The original implementation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("concept_erasure", reason="needs concept-erasure 0.2.4")


@pytest.mark.parametrize("k", [2, 3, 5, 10, 20])
@pytest.mark.parametrize("affine", [True, False])
def test_no_linear_classifier_finds_anything_after_erasure(k, affine):
    x, z = planted(2048, 128, k)
    eraser = LeaceEraser.fit(x, z, shrinkage=False, affine=affine)
    y = eraser(x)
    assert gap(x, z) > 0.5
    assert gap(y, z) < 1e-9
    assert eraser.rank <= k - 1
    torch.testing.assert_close(eraser(y), y, rtol=0, atol=1e-10)
    assert mse(x, y) >= mse(x, OracleEraser.fit(x, z)(x, z))
    rows = (y - y.mean(0)).numpy()
    logistic = LogisticRegression(C=np.inf, tol=1e-12, max_iter=1000).fit(rows, z.numpy())
    assert np.abs(logistic.coef_).max() < 4e-9
    svm = LinearSVC(dual=False, fit_intercept=False, tol=1e-13).fit(rows, z.numpy())
    assert np.abs(svm.coef_).max() < 4e-9


@pytest.mark.parametrize("k", [2, 5, 20])
def test_no_affine_map_that_guards_changes_less(k):
    """The gradient of the mean squared change vanishes along every map Q with Q C = 0."""
    x, z = planted(2048, 128, k)
    eraser = LeaceEraser.fit(x, z, shrinkage=False)
    centred = x - x.mean(0)
    covariance, cross = centred.T @ centred / len(x), centred.T @ one_hot(z) / len(x)
    gradient = 2 * (matrix(eraser) - torch.eye(128, dtype=DOUBLE)) @ covariance
    left = torch.linalg.svd(cross)[0][:, : k - 1]
    free = torch.eye(128, dtype=DOUBLE) - left @ left.T
    assert float((gradient @ free).abs().max()) < 4e-9


@quick
@given(st.integers(0, 10_000), st.integers(2, 6), st.integers(2, 12), st.booleans())
def test_what_erasure_promises_holds_for_any_rows(seed, k, d, shrinkage):
    x, z = planted(300, d, k, seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        eraser = LeaceEraser.fit(x, z, shrinkage=shrinkage)
    y = eraser(x)
    size = float(x.abs().max())
    assert gap(y, z) < 1e-9 * size
    torch.testing.assert_close(eraser(y), y, rtol=0, atol=1e-9 * size)
    torch.testing.assert_close(y.mean(0), x.mean(0), rtol=0, atol=1e-9 * size)
    assert eraser.rank <= min(k - 1, d)
    if not shrinkage:
        # Cov(r(x)) = S - L Lᵀ
        assert torch.linalg.eigvalsh(torch.cov(x.T) - torch.cov(y.T)).min() > -1e-9 * size**2
        assert mse(x, OracleEraser.fit(x, z)(x, z)) <= mse(x, y) * (1 + 1e-9)
        assert mse(x, y) <= mse(x, SalEraser.fit(x, z)(x)) * (1 + 1e-9)


@quick
@given(st.integers(0, 10_000), st.lists(st.integers(1, 299), min_size=1, max_size=4))
def test_shards_and_batches_give_what_one_pass_gives(seed, cuts):
    x, z = planted(300, 6, 3, seed=seed)
    places = np.split(np.arange(300), sorted(cuts))
    batched, shards = LeaceEraser(), LeaceEraser()
    for rows in places:
        batched.update(x[rows], z[rows])
        shards.merge(LeaceEraser().update(x[rows], z[rows]))
    whole = LeaceEraser.fit(x, z)
    for eraser in (batched.finish(), shards.finish()):
        torch.testing.assert_close(matrix(eraser), matrix(whole), rtol=0, atol=1e-9)
        torch.testing.assert_close(eraser.reference, whole.reference, rtol=0, atol=1e-10)


def test_a_rare_class_is_erased_as_well():
    n, p = 200_000, 5e-5
    g = torch.Generator().manual_seed(0)
    z = torch.zeros(n, dtype=torch.long)
    z[: int(n * p)] = 1
    x = torch.randn(n, 16, generator=g, dtype=DOUBLE)
    x[z == 1] += 3
    y = LeaceEraser.fit(x, z)(x)
    assert gap(x, z) > 2
    assert gap(y, z) < 1e-6 * gap(x, z)


@pytest.mark.parametrize("scale", [1e-3, 1e-8, 1e6])
def test_the_unit_of_z_does_not_matter(scale):
    x, _ = planted(2000, 16, 3)
    values = x[:, :2] + torch.randn(2000, 2, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    one, other = LeaceEraser.fit(x, values), LeaceEraser.fit(x, values * scale)
    torch.testing.assert_close(matrix(one), matrix(other), rtol=0, atol=1e-9)
    y = other(x)
    cross = (y - y.mean(0)).T @ (values - values.mean(0)) / 2000
    assert float(cross.abs().max()) < 1e-9


@pytest.mark.peer
@pytest.mark.parametrize("k", [2, 5])
@pytest.mark.parametrize("shrinkage", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_maps_are_those_of_the_original(reference, k, shrinkage, affine):
    x, z = planted(2048, 64, k)
    theirs = reference.LeaceEraser.fit(x, one_hot(z), shrinkage=shrinkage, affine=affine, svd_tol=1e-3)
    ours = LeaceEraser.fit(x, z, shrinkage=shrinkage, affine=affine, tolerance=1e-3)
    assert float((theirs.P - matrix(ours)).abs().max()) < 1e-8
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-8)
    sal = reference.LeaceEraser.fit(x, one_hot(z), method="orth", svd_tol=1e-3)
    torch.testing.assert_close(SalEraser.fit(x, z)(x), sal(x), rtol=0, atol=1e-8)
    oracle = reference.OracleEraser.fit(x, one_hot(z))
    torch.testing.assert_close(OracleEraser.fit(x, z)(x, z), oracle(x, one_hot(z)), rtol=0, atol=1e-8)


@pytest.mark.peer
def test_a_rare_class_that_the_original_leaves_is_erased(reference):
    z = torch.zeros(100_000, dtype=torch.long)
    z[:7] = 1
    x = torch.randn(100_000, 8, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    x[:7] += 3
    theirs = reference.LeaceEraser.fit(x, one_hot(z))(x)
    assert gap(theirs, z) > 0.99 * gap(x, z)
    assert gap(LeaceEraser.fit(x, z)(x), z) < 1e-6 * gap(x, z)


@pytest.mark.peer
def test_small_values_that_the_original_leaves_are_erased(reference):
    x, _ = planted(2000, 8, 2)
    z = 0.001 * x[:, :1]

    def left(y):
        return float(((y - y.mean(0)).T @ (z - z.mean(0))).abs().max() / len(x))

    assert left(reference.LeaceEraser.fit(x, z)(x)) > 0.99 * left(x)
    assert left(LeaceEraser.fit(x, z)(x)) < 1e-9 * left(x)


def test_complex_rows_are_erased():
    x, z = planted(1000, 8, 3)
    w = torch.complex(x, planted(1000, 8, 3, seed=1)[0])
    eraser = LeaceEraser.fit(w, z, shrinkage=False)
    y = eraser(w)
    assert gap(y, z) < 1e-9
    torch.testing.assert_close(eraser(y), y)
    values = torch.complex(x[:, :1], x[:, 1:2])  # of real rows, both parts go
    y = LeaceEraser.fit(x, values)(x)
    assert float(((y - y.mean(0)).T @ (x[:, :2] - x[:, :2].mean(0))).abs().max()) < 1e-8


def test_rows_on_a_plane_are_erased_by_the_pseudo_inverse():
    x, z = planted(500, 6, 3)
    flat = x @ torch.randn(6, 20, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    eraser = LeaceEraser.fit(flat, z, shrinkage=False)
    assert eraser.facts["covariance_rank"] == 6
    assert gap(eraser(flat), z) < 1e-9 * float(flat.abs().max())
    outside = torch.linalg.svd(flat - flat.mean(0))[2][6:]
    torch.testing.assert_close(eraser.right @ outside.T, torch.zeros(2, 14, dtype=DOUBLE), rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_single_and_half_precision_rows_are_erased_to_their_digits(dtype):
    x, z = planted(4000, 32, 4, dtype=dtype)
    eraser = LeaceEraser.fit(x, z)
    assert eraser.left.dtype == torch.float32
    assert eraser.rank == 3
    assert eraser(x).dtype == dtype
    assert gap(eraser(x.float()), z) < 2e-6 * float(x.abs().max())
    exact = LeaceEraser.fit(x.double(), z)
    torch.testing.assert_close(matrix(eraser).float(), matrix(exact).float(), rtol=0, atol=1e-5)
    double = LeaceEraser.fit(x, z, precision=torch.float64)
    torch.testing.assert_close(matrix(double).float(), matrix(exact).float(), rtol=0, atol=1e-6)


def test_a_second_fit_finds_nothing_left():
    x, z = planted(1000, 16, 4)
    y = LeaceEraser.fit(x, z)(x)
    assert LeaceEraser.fit(y, z).rank == 0
    torch.testing.assert_close(LeaceEraser.fit(y, z)(x), x)


def test_for_labels_the_singular_values_are_canonical_correlations():
    x, z = planted(3000, 5, 3)
    facts = LeaceEraser.fit(x, z, shrinkage=False).facts
    centred, labels = x - x.mean(0), one_hot(z)[:, :2] - one_hot(z)[:, :2].mean(0)
    q, r = torch.linalg.qr(centred)[0], torch.linalg.qr(labels)[0]
    torch.testing.assert_close(
        torch.tensor(facts["singular_values"]).double(), torch.linalg.svdvals(q.T @ r), rtol=1e-6, atol=1e-6
    )


def test_in_place_is_the_same_edit_without_a_copy():
    x, z = planted(500, 8, 3)
    for affine in (True, False):
        eraser = LeaceEraser.fit(x, z, affine=affine)
        expected, y = eraser(x), x.clone()
        assert eraser.erase_(y) is y
        torch.testing.assert_close(y, expected)
        with pytest.raises(ValueError, match="in place"):
            eraser.erase_(x.float())


def test_what_the_tolerance_leaves_is_said():
    x, _ = planted(2000, 8, 2)
    noise = torch.randn(2000, 1, generator=torch.Generator().manual_seed(5), dtype=DOUBLE)
    values = torch.cat([x[:, :1], noise], 1)
    with pytest.warns(UserWarning, match=r"1 of 2 directions stay, with a correlation of up to 0\.0"):
        eraser = LeaceEraser.fit(x, values, tolerance=0.5)
    assert eraser.rank == 1
    assert 0 < eraser.facts["largest_discarded"] < 0.2


def test_few_rows_without_shrinkage_are_warned_of():
    x, z = planted(20, 64, 2)
    with pytest.warns(UserWarning, match="rank 19, and z is guarded on the fitting rows only"):
        eraser = LeaceEraser.fit(x, z, shrinkage=False)
    assert gap(eraser(x), z) < 1e-8
    LeaceEraser.fit(x, z)
