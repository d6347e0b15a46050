"""Losses for wrong labels, their repair, weak labellers, and the share of the gap that a student recovers."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sonde.errors import SondeError
from sonde.knowledge.label_head import Head
from sonde.knowledge.label_losses import (
    LOSSES,
    ConfidenceEntropy,
    ConfidenceWindow,
    CrossEntropy,
    Divergence,
    LogConfidence,
    hardened,
    log_probabilities,
)
from sonde.knowledge.label_repair import nearest, repair
from sonde.knowledge.label_training import StageSettings
from sonde.knowledge.planted_labels import planted_task
from sonde.knowledge.weak_labels import shuffled_errors, stopped_at
from sonde.knowledge.weak_to_strong import Recipe, gap_recovered, generalise


def batch(n=16, classes=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, 1 if classes == 2 else classes, generator=g, dtype=torch.float64)
    labels = torch.softmax(torch.randn(n, classes, generator=g, dtype=torch.float64), 1)
    return logits.requires_grad_(), labels


def value(loss, logits, labels, step=0):
    return loss.begin(labels, batch=len(labels))(logits, labels, step)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("loss", [LogConfidence(limit=0), ConfidenceEntropy(limit=0), ConfidenceWindow(1.0)], ids=str)
def test_without_own_confidence_every_loss_is_cross_entropy(loss, classes):
    logits, labels = batch(classes=classes)
    full = torch.cat([torch.zeros_like(logits), logits], 1) if classes == 2 else logits
    expected = torch.nn.functional.cross_entropy(full, labels)
    for step in (0, 500):
        assert torch.allclose(value(loss, logits, labels, step), expected)
    assert torch.allclose(value(CrossEntropy(), logits, labels), expected)
    # at the first step of the warm-up c is 0 as well
    assert torch.allclose(value(LogConfidence(), logits, labels, 0), expected)


def test_log_confidence_rises_to_its_limit_and_targets_own_hardened_prediction():
    logits, labels = batch()
    logs = log_probabilities(logits)
    hard = hardened(logs.detach(), labels.mean(0), logs.detach())
    for step, c in ((100, 0.25), (200, 0.5), (900, 0.5)):
        expected = -(((1 - c) * labels + c * hard) * logs).sum(1).mean()
        assert torch.allclose(value(LogConfidence(buffer=0), logits, labels, step), expected)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 40), st.integers(0, 5))
def test_hardened_predictions_have_the_prior_of_the_labels(ones, seed):
    logs = log_probabilities(torch.randn(40, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    prior = torch.tensor([1 - ones / 40, ones / 40], dtype=torch.float64)
    assert abs(int(hardened(logs, prior, logs)[:, 1].sum()) - ones) <= 1


def test_kl_has_the_gradient_of_cross_entropy_and_vanishes_at_the_labels():
    logits, labels = batch()
    (one,) = torch.autograd.grad(value(CrossEntropy(), logits, labels), logits)
    (other,) = torch.autograd.grad(value(Divergence(), logits, labels), logits)
    assert torch.allclose(one, other)
    exact = (labels[:, 1:] / labels[:, :1]).log()
    assert float(value(Divergence(), exact, labels)) == pytest.approx(0, abs=1e-12)


def test_sure_rows_are_outside_the_window():
    logits = torch.tensor([[0.0], [5.0]], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[0.3, 0.7], [0.9, 0.1]], dtype=torch.float64)
    (gradient,) = torch.autograd.grad(value(ConfidenceWindow(0.15), logits, labels), logits)
    assert gradient[0] != 0 and gradient[1] == 0
    assert torch.isfinite(value(ConfidenceWindow("median"), logits, labels))


def test_entropy_sharpens_the_prediction():
    logits = torch.tensor([[1.0]], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[0.2689414, 0.7310586]], dtype=torch.float64)  # what is predicted already
    (gradient,) = torch.autograd.grad(value(ConfidenceEntropy(warmup=0), logits, labels, 0), logits)
    assert float(gradient) < -0.01


def test_log_confidence_refuses_a_batch_without_a_quantile():
    with pytest.raises(SondeError, match="has 1 rows"):
        LogConfidence().begin(torch.ones(1, 2), batch=1)
    with pytest.raises(SondeError, match="has 4 rows"):
        LogConfidence(buffer=0).begin(torch.ones(4, 2), batch=4)
    LogConfidence(buffer=32).begin(torch.ones(4, 2), batch=4)
    assert set(LOSSES) == {"xent", "log-confidence", "window", "entropy", "kl"}


def clusters(n=300, wrong=0.1):
    g = torch.Generator().manual_seed(0)
    truth = torch.arange(n) % 2
    x = torch.randn(n, 4, generator=g) + 4 * truth[:, None]
    labels = torch.nn.functional.one_hot(truth, 2).float()
    bad = torch.randperm(n, generator=g)[: round(wrong * n)]
    labels[bad] = 1 - labels[bad]
    return x, labels, truth, set(bad.tolist())


@pytest.mark.parametrize("kind", ["knn", "logistic"])
def test_relabelling_rights_wrong_labels(kind):
    x, labels, truth, _ = clusters()
    fixed = repair(x, labels, kind=kind, neighbours=20)
    assert fixed.kept.all()
    assert (fixed.labels.argmax(1) == truth).float().mean() > 0.98
    assert torch.allclose(fixed.labels.sum(1), torch.ones(300), atol=1e-5)


@pytest.mark.parametrize("kind", ["knn", "logistic", "topological"])
def test_a_filter_drops_the_tenth_that_is_wrong(kind):
    x, labels, _, bad = clusters()
    kept = repair(x, labels, kind=kind, use="filter", neighbours=20).kept
    dropped = set(np.flatnonzero(~kept).tolist())
    # The components that are left out may be more than a tenth by themselves.
    assert len(dropped) == 30 or (kind == "topological" and 30 < len(dropped) < 40)
    assert len(dropped & bad) >= 28


def test_the_nearest_rows_are_those_of_scikit_learn():
    from sklearn.neighbors import NearestNeighbors

    x = torch.randn(90, 3)
    expected = NearestNeighbors(n_neighbors=6).fit(x.numpy()).kneighbors(x.numpy(), return_distance=False)[:, 1:]
    assert (nearest(x, 5, block=40) == expected).all()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kind": "magic"}, "no label repair 'magic'"),
        ({"kind": "topological"}, "leaves rows out and has no new labels"),
        ({"neighbours": 400}, "300 rows do not have 400 neighbours"),
    ],
)
def test_repairs_that_cannot_be_are_refused(given, message):
    x, labels, *_ = clusters()
    with pytest.raises(SondeError, match=message):
        repair(x, labels, **given)


@pytest.mark.parametrize("target", [0.6, 0.8])
def test_a_labeller_stops_at_the_wanted_accuracy(target):
    task = planted_task(pool=5000, test=200, width=60, relevant=20)
    truth = task.source("oracle").labels.argmax(1).numpy()
    labeller = stopped_at(target, task.features[:2500], truth[:2500])
    assert target <= labeller.accuracy < target + 0.05
    right = (labeller.label(task.features[2500:]).argmax(1).numpy() == truth[2500:]).mean()
    assert right == pytest.approx(target, abs=0.05)


def test_a_labeller_that_cannot_be_that_good_says_how_good_it_got():
    x, truth = torch.randn(200, 3), np.arange(200) % 2
    with pytest.raises(SondeError, match=r"never reached 0\.99: its best was 0\.\d+ after \d+ steps"):
        stopped_at(0.99, x, truth, epochs=2)
    with pytest.raises(SondeError, match="more than the largest class"):
        stopped_at(0.4, x, truth)


@pytest.mark.parametrize("classes", [2, 3])
def test_shuffled_errors_are_as_large_and_teach_nothing(classes):
    g = torch.Generator().manual_seed(0)
    labels = torch.softmax(torch.randn(2000, classes, generator=g), 1)
    truth = torch.randint(classes, (2000,), generator=g).numpy()
    dealt = shuffled_errors(labels, truth)

    def errors(p):
        return np.sort(1 - p.numpy()[np.arange(2000), truth])

    assert np.allclose(errors(dealt), errors(labels))
    assert torch.allclose(dealt.sum(1), torch.ones(2000), atol=1e-6)
    one = 1 - labels.numpy()[np.arange(2000), truth]
    other = 1 - dealt.numpy()[np.arange(2000), truth]
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.08
    if classes == 2:
        assert np.allclose(np.sort(np.abs(labels[:, 1].numpy() - truth)), np.sort(np.abs(dealt[:, 1].numpy() - truth)))


def test_the_recovered_gap_is_0_for_the_supervisor_and_1_for_the_ceiling():
    assert gap_recovered(0.7, 0.7, 0.9) == 0
    assert gap_recovered(0.9, 0.7, 0.9) == pytest.approx(1)
    with pytest.raises(SondeError):
        gap_recovered(0.7, 0.7, 0.71)


def test_a_student_recovers_part_of_the_gap_and_a_ceiling_all_of_it():
    task = planted_task(pool=2500, test=1000, width=60, relevant=20)
    student = generalise([task], Recipe("xent", Head(stage=StageSettings(lr=1e-2))), rows=1000)
    assert student.supervisor < student.student < student.ceiling
    assert 0 < student.recovered.estimate < 1
    truth = generalise([task], Recipe("xent", Head(stage=StageSettings(lr=1e-2))), rows=1000, weak="oracle")
    assert truth.recovered is None  # the truth as supervisor leaves no gap
    repaired = Recipe("again", repair="knn", use="filter", iterations=1)
    assert generalise([task], repaired, rows=400).seeds == 1
