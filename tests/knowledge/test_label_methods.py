"""Methods on features: what they buy, what they learn, and which rows they ask about."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from sonde.errors import SondeError
from sonde.knowledge.label_choice import CHOICES, Margin, best_offers, draw, entropy, margin
from sonde.knowledge.label_head import Head
from sonde.knowledge.label_logistic import Logistic, StageMemory, fit_stage
from sonde.knowledge.label_losses import LogConfidence
from sonde.knowledge.label_methods import (
    METHODS,
    GivenScores,
    MostConfident,
    Only,
    Pooled,
    Sequential,
    UncertaintySampling,
    method_named,
)
from sonde.knowledge.label_problem import LabelSource, Problem, Purchase
from sonde.knowledge.label_score import LabelRun, rates, score
from sonde.knowledge.label_training import StageSettings, train_stage
from sonde.knowledge.planted_labels import planted_task

TASK = planted_task(pool=3000, test=1000, width=50, relevant=10)
ORDER = {"weak": 600, "oracle": 120}


def accuracy(method, counts=ORDER, task=TASK, seed=0):
    return rates(method(task, Purchase(task, counts, seed=seed), seed=seed).scores, task.test_truth)[0]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_pays_for_what_it_uses_and_gives_the_same_twice(name):
    first, second = (method_named(name)(TASK, Purchase(TASK, ORDER, seed=3, budget=180), seed=3) for _ in range(2))
    assert first.cost == sum(TASK.prices[s] * len(rows) for s, rows in first.bought.items()) <= 180
    assert (first.scores == second.scores).all()
    assert all(len(first.bought[s]) <= count for s, count in ORDER.items())
    assert not set(first.bought["weak"]) & set(first.bought["oracle"])


def test_two_stages_beat_either_and_noise_is_chance():
    few = {"weak": 300, "oracle": 60}
    means = [np.mean([accuracy(m, few, seed=s) for s in range(4)]) for m in (Sequential(), Only(), Only("weak"))]
    assert means[0] > means[1] + 0.02
    assert means[0] > means[2] + 0.02
    assert abs(accuracy(method_named("random")) - 0.5) < 0.05


def test_a_stage_without_rows_is_skipped():
    assert accuracy(Sequential(), {"weak": 0, "oracle": 120}) == accuracy(Only(), {"oracle": 120})
    nothing = Sequential()(TASK, Purchase(TASK, {"weak": 0, "oracle": 0}), seed=0)
    assert nothing.cost == 0 and (nothing.scores == 0).all()


def test_asking_about_uncertain_rows_beats_asking_at_random_where_few_rows_are_in_doubt():
    # The weak rule says all about 95 % of the pool and nothing about the rest, whose class another feature tells.
    rng = np.random.default_rng(0)

    def rows(n, share):
        doubt = rng.random(n) < share
        x = np.stack([np.where(doubt, 0, 5) * rng.choice([-1, 1], n) + 0.1 * rng.standard_normal(n),
                      rng.standard_normal(n)], 1)  # fmt: skip
        return torch.from_numpy(x), np.where(doubt, x[:, 1] > 0, x[:, 0] > 0).astype(int)

    (x, y), (x_test, y_test) = rows(2000, 0.05), rows(500, 0.5)
    sources = [LabelSource.of("weak", torch.sigmoid(x[:, 0]), price=0.1), LabelSource.of("oracle", y, price=1)]
    task = Problem(features=x, test_features=x_test, test_truth=y_test, sources=sources)
    order = {"weak": 200, "oracle": 20}
    gains = [
        accuracy(UncertaintySampling(), order, task, s) - accuracy(Sequential(), order, task, s) for s in (0, 1, 2)
    ]
    assert np.mean(gains) > 0.05


def test_stages_that_methods_share_are_fitted_once():
    memory = StageMemory()
    backend = Logistic(memory=memory)
    for method in (Sequential(backend), UncertaintySampling(backend=backend), Only("weak", backend)):
        method(TASK, Purchase(TASK, ORDER), seed=0)
    assert (memory.fits, memory.hits) == (3, 2)
    assert accuracy(Sequential(backend)) == accuracy(Sequential())


def test_one_class_and_too_few_rows_are_said():
    truth = np.ones(200, dtype=int)
    x = torch.randn(200, 4)
    task = Problem(
        features=x,
        test_features=x[:6],
        test_truth=np.array([0, 1] * 3),
        sources=[LabelSource.of("oracle", truth, price=1)],
    )
    notes = Sequential()(task, Purchase(task, {"oracle": 3}), seed=0).notes
    assert "oracle: 3 rows are too few to hold any out, so the penalty was not chosen" in notes
    assert "all 3 labels of 'oracle' are of class 'yes'" in notes
    short = Head(stage=StageSettings(passes=200))
    notes = Sequential(short)(task, Purchase(task, {"oracle": 8}), seed=0).notes
    assert any("no early stopping" in note for note in notes)


def test_three_classes_are_learned_by_both_backends():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1200, 6, generator=g)
    y = (x @ torch.randn(6, 3, generator=g)).argmax(1)
    task = Problem(
        features=x[:900],
        test_features=x[900:],
        test_truth=y[900:].numpy(),
        sources=[LabelSource.of(name, y[:900], price=p, classes=3) for name, p in (("weak", 0.5), ("oracle", 1))],
        classes=("a", "b", "c"),
    )
    for backend in (Logistic(), Head(stage=StageSettings(lr=2e-2))):
        outcome = UncertaintySampling(choice=Margin(), backend=backend)(
            task, Purchase(task, {"weak": 200, "oracle": 100}), seed=0
        )
        assert outcome.scores.shape == (300, 3)
        assert rates(outcome.scores, task.test_truth)[0] > 0.85
    assert LabelRun.of("m", outcome, task, seed=0).cost == Fraction(200)


def test_the_most_confident_share_is_bought_whole_and_used_in_part():
    outcome = MostConfident(0.25)(TASK, Purchase(TASK, ORDER), seed=0)
    assert len(outcome.bought["weak"]) == 600
    assert accuracy(MostConfident(1.0)) == accuracy(Sequential())
    with pytest.raises(SondeError, match="keep is 0"):
        MostConfident(0)


def test_scores_given_from_elsewhere_cost_nothing():
    scores = tuple(np.where(TASK.test_truth, 2.0, -1.0))
    outcome = GivenScores(scores)(TASK, Purchase(TASK, ORDER), seed=0)
    assert outcome.cost == 0 and rates(outcome.scores, TASK.test_truth) == (1, 1, 1)


def test_a_score_has_intervals_and_calibration_forgives_an_offset():
    scores = Pooled()(TASK, Purchase(TASK, ORDER), seed=0).scores
    measured = score(scores + 50, TASK.test_truth)
    assert measured.accuracy.estimate == pytest.approx(TASK.test_truth.mean())
    assert measured.calibrated.low > 0.7
    assert measured.auroc.method == "bootstrap" and measured.accuracy.method == "wilson"
    assert measured.auroc.estimate == rates(scores, TASK.test_truth)[1]
    with pytest.raises(SondeError, match="for 1000 test rows"):
        score(scores[:5], TASK.test_truth)


def test_the_penalty_is_chosen_on_held_out_rows():
    x = torch.randn(400, 30, dtype=torch.float64)
    noise = torch.nn.functional.one_hot(torch.arange(400) % 2, 2).double()
    weights, _ = fit_stage(x, noise, torch.zeros(1, 30, dtype=torch.float64))
    assert (x @ weights.T).abs().max() < 0.6  # labels without meaning are believed little
    clean = torch.nn.functional.one_hot((x[:, 0] > 0).long(), 2).double()
    weights, _ = fit_stage(x, clean, torch.zeros(1, 30, dtype=torch.float64))
    assert (((x @ weights.T)[:, 0] > 0) == (x[:, 0] > 0)).double().mean() > 0.97


def test_temperature_goes_from_the_top_rows_to_chance():
    values = torch.linspace(0.01, 0.69, 100, dtype=torch.float64)
    assert set(draw(values, 10)) == set(range(90, 100))
    means = [np.mean([draw(values, 10, temperature=t, seed=s).mean() for s in range(200)]) for t in (0.1, 1, 100)]
    assert means[0] > 85 > means[1] > 60 > means[2] > 45
    with pytest.raises(SondeError, match="11 rows are to be chosen from 10 candidates"):
        draw(values[:10], 11)
    with pytest.raises(SondeError, match="temperature -1"):
        draw(values, 1, temperature=-1)


def test_entropy_and_margin_agree_on_two_classes_and_are_the_closed_form():
    scores = torch.randn(50, 1)
    assert (entropy(scores).argsort() == margin(scores).argsort()).all()
    assert float(entropy(torch.zeros(1, 4))) == pytest.approx(np.log(4))
    assert float(margin(torch.tensor([[np.log(9.0)]]))) == pytest.approx(0.2)


@pytest.mark.parametrize("name", CHOICES)
def test_every_choice_takes_distinct_rows(name):
    scores, x = torch.randn(80, 1), torch.randn(80, 5)
    chosen = CHOICES[name].choose(scores, 30, features=x, temperature=0.0, seed=0)
    assert len(set(chosen)) == 30 and set(chosen) <= set(range(80))


def test_diverse_rows_are_farther_apart_than_the_most_uncertain_ones():
    g = torch.Generator().manual_seed(0)
    x = torch.cat([0.1 * torch.randn(50, 2, generator=g), 5 + 0.1 * torch.randn(50, 2, generator=g)])
    scores = torch.cat([torch.zeros(50, 1), torch.full((50, 1), 0.5)])
    apart = CHOICES["diverse"].choose(scores, 10, features=x, temperature=0.0, seed=0)
    assert 3 <= (apart >= 50).sum() <= 7
    assert (CHOICES["entropy"].choose(scores, 10, features=x, temperature=0.0, seed=0) < 50).all()
    with pytest.raises(SondeError, match="compares rows by their features"):
        CHOICES["density"].choose(scores, 1, features=None, temperature=0.0, seed=0)
    with pytest.raises(SondeError, match="greedy"):
        CHOICES["diverse"].choose(scores, 1, features=x, temperature=1.0, seed=0)


def test_gain_per_price_buys_weak_labels_until_they_say_less_than_the_prediction():
    scores = torch.tensor([[0.0], [3.0]])
    names, gain = best_offers(scores, {"weak": 0.75, "oracle": 1.0}, {"weak": Fraction(1, 10), "oracle": Fraction(1)})
    assert names.tolist() == ["weak", "oracle"]  # at .95 a label that is right three times in four changes nothing
    assert gain.tolist() == pytest.approx([2.5, 1 - 1 / (1 + np.exp(-3))], abs=1e-6)
    with pytest.raises(SondeError, match="free"):
        best_offers(scores, {"weak": 0.75}, {"weak": Fraction(0)})


def test_api_settings_are_those_of_the_source():
    api = StageSettings(api=True)
    assert [api.batch_of(n) for n in (20, 1000, 2000, 5000)] == [1, 1, 2, 8]
    assert [api.steps_of(n) for n in (20, 100, 8000, 16_384)] == [100, 300, 2000, 2048]
    assert StageSettings().steps_of(100) == 938 and StageSettings().steps_of(40_000) == 1250


def test_the_best_weights_are_kept_when_training_goes_wrong():
    x = torch.randn(200, 3)
    labels = torch.nn.functional.one_hot((x[:, 0] > 0).long(), 2).float()
    head = torch.nn.Linear(3, 1, bias=False)
    notes = train_stage(head, lambda rows: head(x[torch.from_numpy(rows)]), labels, settings=StageSettings(lr=0.5))
    assert not notes
    assert rates(head(x)[:, 0].detach().numpy(), (x[:, 0] > 0).numpy().astype(int))[1] > 0.95


def test_log_confidence_needs_a_batch():
    api = Head(loss=LogConfidence(buffer=0), stage=StageSettings(api=True))
    with pytest.raises(SondeError, match="which has 1 rows: use at least 8"):
        Sequential(api)(TASK, Purchase(TASK, {"weak": 40}), seed=0)


def test_a_method_on_features_refuses_a_task_of_texts():
    task = Problem(
        texts=[str(i) for i in range(20)],
        test_texts=["x", "y"],
        test_truth=np.array([0, 1]),
        sources=[LabelSource.of("oracle", np.arange(20) % 2, price=1)],
    )
    with pytest.raises(SondeError, match="has texts but no features"):
        Sequential()(task, Purchase(task, {"oracle": 4}), seed=0)
    with pytest.raises(SondeError, match="no method 'magic': there are sequential"):
        method_named("magic")
