"""A task with label sources, and purchases that deal its pool."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sonde.errors import SondeError
from sonde.knowledge.label_problem import LabelSource, Method, Problem, Purchase, log_odds, repeated_texts
from sonde.knowledge.planted_labels import planted_task

RNG = np.random.default_rng(0)


def problem(pool=60, sources=None, **given):
    sources = sources or [
        LabelSource.of("weak", RNG.random(pool), price=0.1),
        LabelSource.of("oracle", RNG.integers(0, 2, pool), price=1),
    ]
    return Problem(
        **{
            "features": torch.randn(pool, 3),
            "test_features": torch.randn(4, 3),
            "test_truth": np.array([0, 1, 0, 1]),
            "sources": sources,
            **given,
        }
    )


TASK = problem()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 20), st.integers(0, 30), st.integers(0, 3))
def test_rows_of_different_sources_are_disjoint_and_orders_of_one_seed_are_nested(weak, oracle, seed):
    purchase = Purchase(TASK, {"weak": weak, "oracle": oracle}, seed=seed)
    first, second = purchase.take("weak")[0], purchase.take("oracle")[0]
    assert (len(first), len(second)) == (weak, oracle)
    assert not set(first) & set(second)
    larger = Purchase(TASK, {"weak": weak + 10, "oracle": oracle}, seed=seed)
    assert set(first) <= set(larger.take("weak")[0])
    assert set(second) == set(larger.take("oracle")[0])
    assert purchase.cost == weak * TASK.prices["weak"] + oracle


def test_candidates_are_dealt_in_proportion_to_what_is_ordered():
    purchase = Purchase(TASK, {"weak": 20, "oracle": 10}, seed=1)
    assert len(purchase.candidates("weak")) == 40
    assert len(purchase.candidates("oracle")) == 20


def test_rows_that_one_source_alone_labels_are_its_own():
    truth = np.full(60, np.nan)
    truth[:10] = RNG.integers(0, 2, 10)
    task = problem(
        sources=[LabelSource.of("weak", RNG.random(60), price=0.1), LabelSource.of("oracle", truth, price=1)]
    )
    purchase = Purchase(task, {"weak": 50, "oracle": 10})
    assert set(purchase.take("oracle")[0]) == set(range(10))
    assert set(purchase.take("weak")[0]) == set(range(10, 60))
    with pytest.raises(
        SondeError, match=r"pool of 60 rows holds: 55 of 'weak' \(60 rows\) and 10 of 'oracle' \(10 rows\)"
    ):
        Purchase(task, {"weak": 55, "oracle": 10})


def test_a_purchase_gives_no_more_and_no_other_labels_than_were_ordered():
    purchase = Purchase(TASK, {"weak": 5, "oracle": 5})
    rows, labels = purchase.take("weak", 3)
    assert torch.equal(labels, TASK.source("weak").labels[torch.from_numpy(rows)])
    assert purchase.ledger.counts == {"weak": 3, "oracle": 0}
    with pytest.raises(SondeError, match="belongs to another source"):
        purchase.buy("oracle", rows)
    with pytest.raises(SondeError, match="6 labels of 'weak' were asked for, but 5 were ordered"):
        purchase.buy("weak", purchase.candidates("weak")[:6])
    with pytest.raises(SondeError, match="were not paid for"):
        purchase.labels("weak", purchase.candidates("weak")[3:4])


def test_three_sources_and_three_classes_are_dealt_and_paid_alike():
    labels = torch.softmax(torch.randn(60, 3), 1)
    task = problem(
        sources=[
            LabelSource.of("rule", labels, price="1/100", classes=3),
            LabelSource.of("crowd", labels, price="1/10", classes=3),
            LabelSource.of("expert", np.arange(60) % 3, price=1, classes=3),
        ],
        classes=("a", "b", "c"),
        test_truth=np.array([0, 1, 2, 1]),
    )
    purchase = Purchase(task, {"rule": 20, "crowd": 10, "expert": 5})
    taken = [set(purchase.take(name)[0]) for name in purchase.counts]
    assert len(set.union(*taken)) == 35
    assert float(purchase.cost) == pytest.approx(6.2)
    assert task.oracle == "expert"


def test_the_weak_labeller_of_the_planted_task_is_right_on_three_quarters():
    task = planted_task(pool=8000, test=100)
    weak, truth = (task.source(name).labels.argmax(1) for name in ("weak", "oracle"))
    assert float((weak == truth).double().mean()) == pytest.approx(0.75, abs=0.02)


def test_log_odds_of_labels_are_their_logits():
    p = torch.tensor([[0.5, 0.5], [0.1, 0.9]])
    assert log_odds(p).tolist() == pytest.approx([0, np.log(9)], abs=1e-5)
    assert log_odds(torch.eye(3)).shape == (3, 3)


def test_features_are_standardised_by_the_pool_and_dead_ones_are_left_out():
    x = torch.randn(50, 3) * torch.tensor([1.0, 100.0, 0.0]) + 7
    pool, test = problem(50, features=x, test_features=x[:4]).standardised
    assert torch.allclose(pool[:, :2].std(0), torch.ones(2))
    assert (pool[:, 2] == 0).all() and (pool[:, 3] == 1).all()
    assert torch.allclose(test, pool[:4])


def test_every_method_is_a_method():
    from sonde.knowledge.label_methods import METHODS, method_named

    assert all(isinstance(method_named(name), Method) for name in METHODS)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LabelSource.of("gpt", [0.2, 1.4], price=0.1), r"'gpt' holds 1\.4, which is outside \[0, 1\]"),
        (lambda: LabelSource.of("gpt", [0.0, 3.0, 1.0], price=0.1), "'gpt' holds 3.*looks like a column of classes"),
        (lambda: LabelSource.of("gpt", [0, 2], price=0.1), "'gpt' holds class 2, but there are 2 classes"),
        (lambda: LabelSource.of("gpt", [[0.5, 0.4]], price=0.1), r"'gpt', row 0: probabilities add up to 0\.9"),
        (lambda: LabelSource.of("gpt", [0.5], price=-1), "price of gpt is -1"),
        (lambda: LabelSource.of("gpt", [0.5], price=1, classes=3), "one probability a row, but there are 3 classes"),
        (lambda: problem(test_truth=np.zeros(4)), "the test rows are of one class"),
        (lambda: problem(features=torch.full((60, 3), torch.nan)), "60 rows of the pool have features that are not"),
        (lambda: problem(features=torch.randn(59, 3)), "labels of shape .* for a pool of 59 rows"),
        (lambda: problem(features=None, test_features=None), "a task needs features or texts"),
        (
            lambda: problem(texts=["same"] * 60, test_texts=list("abcd")),
            "59 texts of the pool occur twice, such as row 1: .* leave out rows 1, 2, 3",
        ),
        (
            lambda: problem(texts=[str(i) for i in range(60)], test_texts=["x", "7", "y", "9"]),
            "2 texts of the pool are test texts too: leave out rows 7, 9",
        ),
        (lambda: Purchase(TASK, {"weak": 50, "oracle": 20}), "more labels were asked for than the pool of 60 rows"),
        (lambda: Purchase(TASK, {"weak": -1}), "expected 0 or more"),
    ],
    ids=range(14),
)
def test_bad_tasks_and_orders_are_refused_in_the_users_words(call, message):
    with pytest.raises(SondeError, match=message):
        call()


def test_repeated_texts_are_listed():
    assert repeated_texts(["a", "b", "a", "c", "b"]) == [2, 4]
