"""Every feature with every detector: planted anomalies are found, the control is at chance, gaps have their reasons."""

import numpy as np
import pytest
import torch

from sonde.errors import SondeError
from sonde.knowledge.anomaly_features import Feature
from sonde.knowledge.anomaly_table import compare, table
from sonde.knowledge.tables import Undefined
from sonde.stats.intervals import Interval
from sonde.stats.novelty import DETECTORS

FAST = tuple(name for name in DETECTORS if name not in ("flow", "isolation-forest"))
LABELS = np.repeat([False, True], [60, 15])


def feature(name: str = "planted", *, shift: float = 8.0, layers: int | None = 2, seed: int = 0) -> Feature:
    rng = np.random.default_rng(seed)
    shape = (lambda n: (n, 3)) if layers is None else (lambda n: (layers, n, 3))
    trusted, test = (torch.from_numpy(rng.normal(size=shape(n))) for n in (200, 75))
    test[..., 60:, 0] += shift
    return Feature(name, trusted, test)


def test_every_pair_is_there_once_and_finds_what_was_planted():
    given = [feature(), feature("one layer", layers=None, seed=1)]
    answers = tuple((part[0, :, 1] > 0).numpy() for part in (given[0].trusted, given[0].test))
    found = compare(given, LABELS, answers=answers, detectors=FAST)
    keys = [(told.feature, told.detector, told.online, told.aggregate) for told in found]
    assert len(set(keys)) == len(keys)
    for told in found:
        assert told.detector != "l0" and isinstance(told.auroc, Interval)
        assert told.scores is not None and told.scores.shape == LABELS.shape
        if told.detector not in ("topological", "relative-mahalanobis"):
            assert told.auroc.low > 0.9, told
    assert {told.online for told in found if told.detector == "lof"} == {False, True}
    assert {told.label for told in found if told.detector == "lof"} == {"lof", "lof online"}
    assert {told.aggregate for told in found if told.feature == "one layer"} == {"mean"}
    assert not any(told.feature == "one layer" for told in found if told.detector == "topological")


def test_rows_dealt_again_are_at_chance():
    dealt = [feature(str(seed), seed=seed).dealt_again(seed) for seed in range(8)]
    found = compare(dealt, LABELS, detectors=["mahalanobis", "likelihood-ratio"])
    values = [told.auroc.estimate for told in found if isinstance(told.auroc, Interval)]
    assert len(values) == 32 and np.mean(values) == pytest.approx(0.5, abs=0.06)


def test_intervals_resample_groups():
    given = feature(shift=1.0)
    alone = compare([given], LABELS, detectors=["mahalanobis"])[0].auroc
    tied = compare([given], LABELS, groups=np.arange(75) % 15, detectors=["mahalanobis"])[0].auroc
    assert isinstance(alone, Interval) and isinstance(tied, Interval)
    assert alone.estimate == tied.estimate and alone.n == 75 and tied.n == 15


def test_one_class_has_a_reason_and_no_number():
    found = compare([feature()], np.zeros(75, dtype=bool), detectors=["mahalanobis"])
    for told in found:
        assert isinstance(told.auroc, Undefined) and "both classes" in told.auroc.reason


def test_a_detector_that_cannot_be_fitted_has_a_reason():
    small = Feature("small", torch.randn(20, 3), torch.randn(75, 3))
    found = compare([small], LABELS, detectors=["lof", "mahalanobis"])
    reasons = [told.auroc.reason for told in found if isinstance(told.auroc, Undefined)]
    assert len(reasons) == 2 and all("too few for a local outlier factor" in reason for reason in reasons)
    assert isinstance(found[-1].auroc, Interval)


def test_a_shrunk_covariance_is_noted():
    wide = Feature("wide", torch.randn(30, 50), torch.randn(75, 50))
    (told,) = compare([wide], LABELS, detectors=["mahalanobis"])
    assert "rows for a covariance of 50 features: it is shrunk" in told.note
    assert compare([feature()], LABELS, detectors=["mahalanobis"])[0].note == ""


def test_codes_that_were_never_on_are_counted_for_sparse_features_only():
    codes = torch.zeros(50, 6)
    codes[:, :2] = 1
    test = torch.zeros(75, 6)
    test[:, 0] = 1
    test[60:, 5] = 1
    (told,) = compare([Feature("codes", codes, test, sparse=True)], LABELS, detectors=["l0"])
    assert isinstance(told.auroc, Interval) and told.auroc.estimate == 1.0
    assert compare([Feature("dense", codes, test)], LABELS, detectors=["l0"]) == []


def test_the_table_is_written_in_all_formats():
    found = compare([feature()], LABELS, detectors=["mahalanobis", "spectral"])
    made = table(found, caption="Planted anomalies")
    assert "| planted | mahalanobis | offline | mean |" in made.markdown()
    assert "AUROC low" in made.csv() and "planted" in made.latex()


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda: compare([feature()], LABELS[:-1]), "planted: 75 test rows for 74 labels"),
        (lambda: compare([feature()], LABELS, detectors=["nose"]), "detector 'nose' is unknown"),
    ],
)
def test_what_cannot_be_compared_is_refused(broken, message):
    with pytest.raises(SondeError, match=message):
        broken()
