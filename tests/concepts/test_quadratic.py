import warnings

import pytest
import torch
from concepts.planted import DOUBLE, mse, planted

from sonde.concepts.quadratic import QuadraticEditor, QuadraticEraser


def class_covariances(x, z):
    return torch.stack([torch.cov(x[z == c].T) for c in z.unique()])


def log_loss_of_a_quadratic_classifier(x, z):
    """Mean of -log p(z | x) under Gaussians with each class's mean, covariance and share."""
    scores = []
    for c in z.unique():
        rows = x[z == c]
        density = torch.distributions.MultivariateNormal(rows.mean(0), torch.cov(rows.T))
        scores.append(density.log_prob(x) + torch.tensor(len(rows) / len(x), dtype=DOUBLE).log())
    return float(torch.nn.functional.cross_entropy(torch.stack(scores, 1), z))


@pytest.mark.parametrize("k", [2, 3, 5, 20])
def test_a_quadratic_classifier_knows_no_more_than_the_class_shares(k):
    x, z = planted(1024, 32, k, spread=True)
    eraser = QuadraticEraser.fit(x, z)
    y = eraser(x, z)
    share = torch.bincount(z).double() / len(z)
    entropy = float(torch.special.entr(share).sum())
    assert log_loss_of_a_quadratic_classifier(x, z) < 0.5 * entropy
    assert log_loss_of_a_quadratic_classifier(y, z) == pytest.approx(entropy, rel=1e-7)
    assert (torch.linalg.eigvalsh(eraser.maps) > 0).all()


def test_the_mean_stays_when_classes_are_unequal():
    x, z = planted(2000, 6, 2, shift=3, spread=True)
    z = z.masked_fill(torch.arange(2000) % 5 > 0, 0)  # one row in ten is of class 1
    y = QuadraticEraser.fit(x, z)(x, z)
    torch.testing.assert_close(y.mean(0), x.mean(0))


def test_edited_rows_are_of_the_target_class():
    x, z = planted(3000, 8, 3, spread=True)
    editor = QuadraticEditor.fit(x, z)
    y = editor(x, z, 1)
    for c in range(3):
        torch.testing.assert_close(y[z == c].mean(0), x[z == 1].mean(0))
        torch.testing.assert_close(torch.cov(y[z == c].T), torch.cov(x[z == 1].T))
    assert torch.equal(y[z == 1], x[z == 1])
    torch.testing.assert_close(editor(editor(x[z == 0], 0, 2), 2, 0), x[z == 0])
    targets = (z + 1) % 3
    torch.testing.assert_close(editor(x, z, targets)[z == 0], y[z == 0])


@pytest.mark.peer
def test_maps_are_those_of_the_original_but_for_its_unweighted_mean():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quadratic = pytest.importorskip("concept_erasure.quadratic", reason="needs concept-erasure 0.2.4")
    # a quarter and three quarters: the original holds class shares in single precision
    x, z = planted(3000, 12, 4, shift=3, spread=True)
    z = (z == 0).long()
    for shrinkage in (True, False):
        theirs = quadratic.QuadraticFitter.fit(x, z, shrinkage=shrinkage)
        ours = QuadraticEraser.fit(x, z, shrinkage=shrinkage)
        editor = QuadraticEditor.fit(x, z, shrinkage=shrinkage)
        if not shrinkage:
            torch.testing.assert_close(ours.maps, theirs.eraser.ot_maps, rtol=0, atol=1e-8)
            torch.testing.assert_close(editor.map(0, 1), theirs.editor().ot_maps[0, 1], rtol=0, atol=1e-8)
            moved = theirs.eraser(x, z).mean(0) - x.mean(0)
            assert float(moved.norm()) > 1
            torch.testing.assert_close(ours(x, z), theirs.eraser(x, z) - moved, rtol=0, atol=1e-8)
            assert mse(x, ours(x, z)) < mse(x, theirs.eraser(x, z))
        else:
            # shrinkage is of the covariance with n there, with n - 1 here
            torch.testing.assert_close(ours.maps, theirs.eraser.ot_maps, rtol=0, atol=1e-2)


def test_shrinkage_serves_classes_with_few_rows():
    x, z = planted(60, 32, 3, spread=True)
    with pytest.warns(UserWarning, match="class 0 has no more rows than the 32 dimensions"):
        QuadraticEraser.fit(x, z)
    eraser = QuadraticEraser.fit(x, z, shrinkage=True)
    before, after = class_covariances(x, z), class_covariances(eraser(x, z), z)
    assert (after - after.mean(0)).norm() < 0.7 * (before - before.mean(0)).norm()
    assert (torch.linalg.eigvalsh(eraser.maps) > 0).all()


def test_bad_input_is_named():
    x, z = planted(40, 3, 2)
    with pytest.raises(ValueError, match=r"class 2 has 1 row\(s\): its covariance needs at least 2"):
        QuadraticEraser.fit(x, torch.cat([z[:-1], torch.tensor([2])]))
    with (
        pytest.raises(ValueError, match=r"class 1 has 0 row\(s\)"),
        pytest.warns(UserWarning, match="no rows have the label 1"),
    ):
        QuadraticEraser.fit(x, z * 2)
    editor = QuadraticEditor.fit(x, z)
    with pytest.raises(ValueError, match="labels from 7 to 7 for an eraser of classes 0 to 1"):
        editor(x, z, 7)
    with pytest.raises(ValueError, match="a target of -1"):
        editor(x, z, -1)
