"""The alarm: planted anomalies, calibrated p-values, layers that are standardised, files, what is refused."""

import numpy as np
import pytest

from sonde.errors import SondeError
from sonde.knowledge.anomaly import Alarm
from sonde.stats.gaussian_novelty import Mahalanobis
from sonde.stats.novelty import DETECTORS
from sonde.stats.ranks import auroc


def normal(n: int, d: int = 3, *, seed: int = 0, layers: int | None = None) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d) if layers is None else (layers, n, d))


def test_an_alarm_on_one_matrix_orders_rows_as_its_detector_does():
    trusted, rows = normal(400), normal(50, seed=1)
    order = np.random.default_rng(0).permutation(400)
    alone = Mahalanobis().fit(trusted[order[100:]]).score(rows)
    np.testing.assert_array_equal(np.argsort(Alarm().fit(trusted).score(rows)), np.argsort(alone))


def test_p_values_of_rows_like_the_trusted_ones_are_uniform_and_those_of_strange_rows_small():
    alarm = Alarm().fit(normal(2000))
    usual = alarm.p_values(normal(2000, seed=1))
    for share in (0.05, 0.2, 0.5):
        assert (usual <= share).mean() == pytest.approx(share, abs=0.04)
    strange = alarm.p_values(normal(50, seed=2) + 8)
    assert (strange == 1 / 501).all()


def test_layers_of_any_scale_count_alike_and_the_largest_decides_for_max():
    trusted, usual, strange = (normal(n, seed=n, layers=4) for n in (400, 201, 200))
    strange[1] += 3
    labels = np.repeat([0, 1], [201, 200])
    rows = np.concatenate([usual, strange], 1)
    scale = np.array([1.0, 1e3, 1e-4, 10.0])[:, None, None]
    found = {}
    for how in ("mean", "max"):
        scores = Alarm(aggregate=how).fit(trusted).score(rows)
        np.testing.assert_allclose(Alarm(aggregate=how).fit(scale * trusted).score(scale * rows), scores, rtol=1e-6)
        found[how] = float(auroc(scores, labels))
    assert found["max"] > 0.95 and found["mean"] > 0.95


def test_scores_are_in_standard_deviations_of_held_out_trusted_rows():
    trusted = normal(4000, layers=2)
    scores = Alarm(held_out=0.5).fit(trusted).score(normal(4000, seed=1, layers=2))
    assert scores.mean() == pytest.approx(0, abs=0.05)
    # the mean of two independent scores
    assert scores.std() == pytest.approx(2**-0.5, abs=0.05)


# a flow is trained, which takes seconds, and is saved as the others are
@pytest.mark.parametrize("name", [name for name in DETECTORS if name != "flow"])
def test_every_detector_makes_an_alarm_that_survives_a_file(name, tmp_path):
    trusted, rows = normal(120, layers=2), normal(30, seed=1, layers=2)
    answers = {"answers": (trusted[0, :, 0] > 0).astype(int)} if name == "topological" else {}
    given = {"answers": (rows[0, :, 0] > 0).astype(int)} if name == "topological" else {}
    alarm = Alarm(name, aggregate="max", seed=3).fit(trusted, **answers)
    batch = None if alarm.untrusted == "no" or name == "topological" else rows
    scores = alarm.score(rows, batch, **given)
    assert scores.shape == (30,) and np.isfinite(scores).all()
    alarm.save(tmp_path / name)
    np.testing.assert_allclose(Alarm.load(tmp_path / name).score(rows, batch, **given), scores, rtol=1e-12)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda: Alarm("nose"), "detector 'nose' is unknown: use mahalanobis, "),
        (lambda: Alarm(aggregate="sum"), "aggregate 'sum' is unknown: use mean, max"),  # type: ignore[arg-type]
        (lambda: Alarm(held_out=1.0), "held_out is 1.0"),
        (lambda: Alarm().score(normal(3)), "call fit first"),
        (lambda: Alarm().save("nowhere"), "call fit first"),
        (lambda: Alarm().fit(normal(5)), "5 trusted rows are too few to fit an alarm and hold 0.25 of them out"),
        (lambda: Alarm().fit(np.full((30, 2), np.nan)), "60 of 60 features are not finite: the first is in row 0"),
        (lambda: Alarm("quantum-entropy").fit(normal(30)).score(normal(9)), "compares with untrusted rows"),
        (lambda: Alarm().fit(normal(30)).score(normal(9, 4)), "rows of 4 features for a Mahalanobis fitted on 3"),
        (lambda: Alarm.load("nowhere"), "nowhere is not the folder of an alarm"),
    ],
)
def test_what_cannot_alarm_is_refused(broken, message):
    with pytest.raises(SondeError, match=message):
        broken()
