"""One suite over all erasers: every one answers to the same verbs."""

import copy

import numpy as np
import pytest
import torch
from concepts.planted import DOUBLE, gap, planted
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from sonde.concepts.affine import AffineEdit
from sonde.concepts.alf import AlfQleaceEraser
from sonde.concepts.estimator import LabelledEraser
from sonde.concepts.freeform import FreeFormEraser
from sonde.concepts.inlp import InlpEraser
from sonde.concepts.leace import LeaceEraser
from sonde.concepts.oracle import OracleEraser
from sonde.concepts.quadratic import QuadraticEditor, QuadraticEraser
from sonde.concepts.quantile import QuantileEditor
from sonde.concepts.rlace import RlaceEraser
from sonde.concepts.sal import SalEraser
from sonde.concepts.splince import SplinceEraser
from sonde.concepts.statistics import ConceptStatistics
from sonde.errors import SondeError

X, Z = planted(600, 8, 3, spread=True)
TASK = torch.arange(600) % 2


class Splince(SplinceEraser):
    """With a task of its own, so that it can be called as the others are."""

    def update(self, x, z, mask=None, *, keep=None):
        rows = torch.arange(len(x)) % 2 if keep is None else keep
        return super().update(x, z, mask, keep=rows)


AFFINE = {
    "leace": LeaceEraser,
    "linear leace": lambda: LeaceEraser(affine=False),
    "sal": SalEraser,
    "splince": Splince,
    "alf": AlfQleaceEraser,
    "inlp": lambda: InlpEraser(directions=4),
    "rlace": lambda: RlaceEraser(directions=2, steps=20),
}
LABELLED = {"oracle": OracleEraser, "quadratic": QuadraticEraser}
EDITORS = {"editor": QuadraticEditor, "quantile": lambda: QuantileEditor(bins=32)}
ALL = {**AFFINE, **LABELLED, **EDITORS, "free-form": FreeFormEraser}


def given_to(eraser, z):
    """What an eraser is given beside the rows."""
    if isinstance(eraser, QuadraticEditor | QuantileEditor):
        return (z, 0)
    return (z,) if isinstance(eraser, LabelledEraser) else ()


@pytest.fixture(scope="module", params=ALL)
def fitted(request):
    return ALL[request.param]().fit(X, Z)


def test_arrays_and_tensors_of_any_shape_come_back_as_they_went(fitted):
    y = fitted.transform(X, *given_to(fitted, Z))
    assert isinstance(y, torch.Tensor)
    assert y.shape == X.shape
    assert not torch.equal(y, X)
    array = fitted.transform(X.numpy(), *given_to(fitted, Z.numpy()))
    assert isinstance(array, np.ndarray)
    np.testing.assert_allclose(array, y.numpy(), atol=1e-12)
    cube = fitted(X.view(20, 30, 8), *given_to(fitted, Z.view(20, 30)))
    torch.testing.assert_close(cube.view(600, 8), y)
    half = fitted(X.to(torch.bfloat16), *given_to(fitted, Z))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), y, rtol=0.1, atol=0.3)


def test_it_moves_to_single_precision(fitted):
    before = fitted(X, *given_to(fitted, Z))
    moved = copy.deepcopy(fitted).float()
    torch.testing.assert_close(moved(X.float(), *given_to(fitted, Z)), before.float(), rtol=1e-3, atol=1e-3)


def test_it_is_the_same_after_saving(fitted, tmp_path):
    fitted.save(tmp_path / "eraser")
    again = type(fitted).load(tmp_path / "eraser")
    for name, value in fitted.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    torch.testing.assert_close(again(X, *given_to(again, Z)), fitted(X, *given_to(fitted, Z)), rtol=1e-13, atol=1e-13)
    assert again.get_params() == fitted.get_params()
    assert again.facts["n"] == 600
    with pytest.raises((SondeError, OSError)):
        type(fitted).load(tmp_path / "nothing")
    if isinstance(fitted, AffineEdit):
        torch.testing.assert_close(AffineEdit.load(tmp_path / "eraser")(X), fitted(X), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", ALL)
def test_scikit_learn_clones_it_unfitted(name):
    eraser = ALL[name]()
    assert isinstance(eraser, nn.Module)
    twin = clone(eraser)
    assert twin.get_params() == eraser.get_params()
    with pytest.raises(NotFittedError, match="call fit"):
        twin(X, *given_to(twin, Z))
    with pytest.raises(NotFittedError, match="no data yet"):
        twin.finish()
    with pytest.raises(NotFittedError):
        twin.transform(X, *given_to(twin, Z))


@pytest.mark.parametrize("name", set(ALL) - {"free-form", "rlace", "inlp"})
def test_a_stream_of_shards_gives_what_one_fit_gives(name):
    whole = ALL[name]().fit(X, Z)
    shards = [ALL[name]().update(X[rows], Z[rows]) for rows in torch.arange(600).split(250)]
    streamed = shards[0].merge(shards[1]).merge(shards[2]).finish()
    torch.testing.assert_close(streamed(X, *given_to(whole, Z)), whole(X, *given_to(whole, Z)), rtol=0, atol=1e-7)
    assert streamed.statistics is None
    with pytest.raises(ValueError, match="this eraser is finished"):
        streamed.update(X, Z)


@pytest.mark.parametrize("name", ALL)
def test_bad_rows_and_constant_labels_are_refused(name):
    hole = X.clone()
    hole[7, 0] = torch.inf
    with pytest.raises(ValueError, match="row 7 of x"):
        ALL[name]().fit(hole, Z)
    with pytest.raises(ValueError, match="z has the shape"):
        ALL[name]().fit(X, Z[:-1])
    with pytest.raises(ValueError, match="nothing to erase: z is constant"):
        ALL[name]().fit(X, torch.zeros(600, dtype=torch.long))
    with pytest.raises(ValueError, match=r"at least 2|needs at least"):
        ALL[name]().fit(X[:1], Z[:1])
    with pytest.raises(ValueError, match="width"):
        ALL[name]().update(X, Z).update(X[:, :5], Z)


@pytest.mark.parametrize("name", ["leace", "sal", "splince", "oracle"])
def test_a_class_without_rows_is_warned_of(name):
    with pytest.warns(UserWarning, match="no rows have the label 1"):
        ALL[name]().fit(X, Z.where(Z != 1, 2))


@pytest.mark.parametrize("name", ["leace", "sal", "oracle"])
def test_a_constant_value_is_nothing_to_erase(name):
    with pytest.raises(ValueError, match="nothing to erase: z is constant"):
        ALL[name]().fit(X, torch.full((600, 2), 3.7, dtype=DOUBLE))


@pytest.mark.parametrize("name", ["leace", "sal", "alf"])
def test_a_pipeline_erases_before_it_predicts(name):
    other = (X[:, 0] > X[:, 0].median()).numpy()
    pipeline = make_pipeline(StandardScaler(), ALL[name](), LogisticRegression(max_iter=500))
    pipeline.fit(X.numpy(), Z.numpy())
    assert pipeline.score(X.numpy(), Z.numpy()) < 0.4
    assert clone(pipeline).fit(X.numpy(), other.astype(int)).score(X.numpy(), other) < 0.6


def test_unknown_labels_are_left_out_and_left_alone():
    z = Z.clone()
    z[::3] = -1
    known = z >= 0
    for kind in (LeaceEraser, SalEraser):
        torch.testing.assert_close(kind.fit(X, z)(X), kind.fit(X[known], z[known])(X))
    for kind in LABELLED.values():
        y = kind.fit(X, z)(X, z)
        assert torch.equal(y[~known], X[~known])
        assert gap(y[known], z[known]) < 1e-9


def test_one_pass_serves_several_erasers():
    statistics = ConceptStatistics(covariance="class")
    for rows in torch.arange(600).split(100):
        statistics.update(X[rows], Z[rows])
    for name in ("leace", "sal", "oracle", "quadratic", "alf"):
        shared, own = ALL[name]().finish(statistics), ALL[name]().fit(X, Z)
        torch.testing.assert_close(shared(X, *given_to(own, Z)), own(X, *given_to(own, Z)), rtol=0, atol=1e-8)


def test_one_object_is_a_pytorch_module_and_an_edit():
    eraser = LeaceEraser.fit(X.float(), Z)
    assert set(dict(eraser.named_buffers())) == {"left", "right", "reference", "strength"}
    x = X.float().requires_grad_()
    eraser(x).square().sum().backward()
    assert x.grad is not None
    assert isinstance(eraser.then(AffineEdit.ablate(torch.ones(8))), AffineEdit)
    assert "LeaceEraser(tolerance=0.01)" in str(LeaceEraser(tolerance=0.01))
