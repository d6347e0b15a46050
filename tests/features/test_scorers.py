"""Every scorer on latents whose rule is known: what is asked, what is counted, and what is refused."""

import math

import numpy as np
import pytest
from latent_worlds import planted

from sonde.errors import SondeError
from sonde.features import questions
from sonde.features.cases import Subject
from sonde.features.local_scores import Ranking
from sonde.features.marking import spans
from sonde.features.readers import CoinReader, LiteralReader, composed, sentence
from sonde.features.samplers import Sampling, examples
from sonde.features.scorers.generation import Generation
from sonde.features.scorers.intruder import Intruder
from sonde.features.scorers.measures import balanced, f1, of_scores, of_verdicts
from sonde.features.scorers.ranked import Ranked
from sonde.features.scorers.simulation import Simulation, correlation, expected
from sonde.features.scorers.verdicts import Detection, Fuzzing, probabilities, wrong_marks
from sonde.lm.asking.client import Client, Limits
from sonde.lm.asking.completion import Completion, Offers, Temporary, Token
from sonde.stats.intervals import wilson

SETS = [(3, 30, 130), (5, 50), (7,)]
SMALL = Sampling(length=16, min_examples=100)


def words(ids):
    return [f" w{i:03d}" for i in ids]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return planted(tmp_path_factory.mktemp("world"), SETS, strengths=(0.9, 1.1))


@pytest.fixture(scope="module")
def subject(cache):
    return Subject.of(examples(cache, "planted", 0, config=SMALL), words)


TRUE = sentence(words(SETS[0]))
FALSE = sentence(words(SETS[1]))


class Wrapped:
    """A literal reader whose answers are changed."""

    def __init__(self, change):
        self._reader, self._change, self.name, self.offers = LiteralReader(), change, "wrapped", Offers(logprobs=True)
        self.asked = []

    def count(self, messages):
        return self._reader.count(messages)

    async def close(self):
        pass

    async def complete(self, messages, params):
        self.asked.append(messages)
        return self._change(len(self.asked), await self._reader.complete(messages, params))


def score(scorer, subject, text=TRUE, backend=None, **limits):
    client = Client(backend or LiteralReader(), limits=Limits(**limits))
    return client.run(lambda: scorer.score(subject, text, client))


@pytest.mark.parametrize("kind", [Detection, Fuzzing])
def test_the_true_sentence_is_perfect_and_a_wrong_one_is_chance(subject, kind):
    right = score(kind(logprobs=True), subject)
    for name in ("balanced_accuracy", "f1", "precision", "recall", "specificity", "auc", "parsed"):
        assert right.measures[name].interval.estimate == 1.0
    assert {f"recall_q{q}" for q in range(1, 11)} <= set(right.measures)
    assert right.score.chance == 0.5 and right.score.interval.low > 0.9
    assert len(right.records) == 100 and sum(one["label"] for one in right.records) == 50
    wrong = score(kind(), subject, FALSE)
    assert wrong.score.interval.estimate == pytest.approx(0.5, abs=0.1)
    assert "auc" not in wrong.measures


def test_the_last_question_may_be_short_and_nothing_is_lost(subject):
    backend = Wrapped(lambda number, answer: answer)
    found = score(Detection(shown=7), subject, backend=backend)
    assert len(backend.asked) == math.ceil(100 / 7)
    assert all(one["parsed"] for one in found.records)
    assert len({one["example"] + str(one["label"]) for one in found.records}) == 100


def test_answers_that_cannot_be_read_are_counted_and_left_out(subject):
    backend = Wrapped(lambda number, answer: Completion("I think so") if "w050" not in answer.text else answer)
    nothing = score(Detection(), subject, backend=backend)
    assert nothing.measures["parsed"].interval.estimate == 0.0
    assert nothing.score.interval is None and "no window" in nothing.score.reason
    assert nothing.score.to_json()["estimate"] is None
    seen = {}

    def some(number, answer):
        seen[number] = answer
        return Completion(answer.text[:4]) if number in (1, 2, 21, 22) else answer

    found = score(Detection(), subject, backend=Wrapped(some), concurrency=1)
    unread = sum(not one["parsed"] for one in found.records)
    assert unread == 10 and found.measures["parsed"].interval.estimate == 0.9
    assert found.score.interval.estimate == 1.0 and found.score.interval.n == 90


def test_a_question_that_is_never_answered_is_unread(subject):
    def fail(number, answer):
        raise Temporary("503: busy")

    found = score(Fuzzing(), subject, backend=Wrapped(fail), attempts=1)
    assert not any(one["parsed"] for one in found.records) and len(found.records) == 100


def test_probabilities_come_from_the_alternatives_of_each_digit():
    def token(text, **top):
        return Token(text, -0.1, tuple((key[1:], math.log(p)) for key, p in top.items()))

    tokens = (token("["), token("1", _1=0.6, _0=0.2), token(", "), token("0", _0=0.5, x1=0.1, _1=0.0625), token("]"))
    assert probabilities(Completion("[1, 0]", tokens=tokens), [1, 0]) == pytest.approx([0.75, 0.1625 / 0.6625])
    assert probabilities(Completion("[1, 0]", tokens=tokens[:3]), [1, 0]) == [None, None]
    assert probabilities(Completion("[1, 0]"), [1, 0]) == [None, None]


def test_wrong_marks_follow_their_rules(cache, subject):
    rng = np.random.default_rng(0)
    negative, positive = subject.negatives[0], subject.test[0]
    for count in (1, 3):
        marks = wrong_marks(negative, count, rng)
        assert sum(marks) == count and marks[12]  # three quarters of 16
        assert sum(wrong_marks(positive, count, rng)) == count
        assert not any(np.array(wrong_marks(positive, count, rng)) & (positive.window.activations > 0))
    assert subject.marks == max(1, round(np.mean([case.window.marked.sum() for case in subject.test])))
    near = Sampling(length=16, min_examples=100, negative_kind="neighbours")
    other = Subject.of(examples(cache, "planted", 0, config=near, neighbours=[(1, 0.5), (2, 0.25)]), words)
    near_words = words(SETS[1] + SETS[2])
    for case in other.negatives:
        shown = case.marked(wrong_marks(case, 2, rng))
        assert spans(shown) and all(composed(span, near_words) for span in spans(shown))
    found = score(Fuzzing(), other)
    assert found.score.interval.estimate == 1.0
    assert {one["distance"] for one in found.records if not one["label"]} <= {0.5, 0.75}


def test_wrong_marks_can_stand_where_the_latent_fires(subject):
    found = score(Fuzzing(wrong="active"), subject)
    assert found.score.interval.estimate == 1.0
    assert {one["kind"] for one in found.records} == {"active", "wrong marks"}
    with pytest.raises(SondeError, match="silent or active"):
        Fuzzing(wrong="elsewhere")
    with pytest.raises(SondeError, match="at least one passage"):
        Detection(shown=0)


def test_simulation_correlates_over_concatenated_tokens(subject):
    found = score(Simulation(), subject)
    assert found.score.interval.estimate >= 0.95 and found.score.chance == 0.0
    cases = subject.held_out(0)
    truth = np.concatenate([case.window.activations for case in cases])
    guess = np.concatenate([one["answer"] for one in found.records])
    assert found.score.interval.estimate == pytest.approx(np.corrcoef(truth, guess)[0, 1], abs=1e-9)
    assert {"positive", "q1", "q10", "parsed"} <= set(found.measures)
    assert score(Simulation(), subject, FALSE).score.interval.estimate == pytest.approx(0.0, abs=0.1)


def test_a_correlation_that_is_undefined_is_null_with_its_reason(subject):
    cases = subject.test[:5]
    nothing = correlation(cases, [[0.0] * 16] * 5)
    assert nothing.to_json() == {"estimate": None, "reason": "undefined: every prediction is 0", "chance": 0.0}
    silent = correlation(subject.negatives[:5], [[0.0] * 15 + [1.0]] * 5)
    assert silent.reason == "undefined: every activation is 0"
    assert "at least 2" in correlation(cases[:1], [[0.0] * 16]).reason


def test_a_context_too_small_for_simulation_is_said_with_both_numbers(subject):
    client = Client(CoinReader(0, context=200))
    with pytest.raises(SondeError, match=r"needs \d+ tokens for a window of 16, but coin-0 has 200"):
        Simulation().check(subject, client)
    with pytest.raises(SondeError, match="no log-probabilities of prompts"):
        client.run(lambda: Simulation(at_once=True).score(subject, TRUE, client))


def test_expected_strengths_are_read_from_the_prompt():
    def unknown(**top):
        return Token("?", -1.0, tuple((key.strip("_"), math.log(p)) for key, p in top.items()))

    tokens = (
        Token("?", 0.0),
        Token(" a\t", -1.0),
        unknown(_0=0.5, _10=0.25),
        Token("\n", -1.0),
        unknown(_4=0.1, x=0.9),
    )
    assert expected(Completion("", prompt_tokens=tokens), 2) == pytest.approx([10 * 0.25 / 0.75, 4.0])
    assert expected(Completion("", prompt_tokens=tokens[:2]), 2) is None
    assert expected(Completion("", prompt_tokens=(unknown(x=0.9), unknown(_1=0.5))), 2) is None
    assert questions.simulate_at_once("x", [" a", " b"])[-1]["content"].endswith('" a"\t?\n" b"\t?')


def test_an_odd_window_is_told_by_its_marks_and_by_nobody_else(cache):
    subject = Subject.of(examples(cache, "planted", 2, config=SMALL), words)
    found = score(Intruder(rounds=20), subject)
    assert found.score.interval.estimate == 1.0 and found.score.chance == pytest.approx(0.2)
    assert len(found.records) == 20 and all(1 <= one["label"] <= 5 for one in found.records)
    coin = score(Intruder(rounds=40), subject, backend=CoinReader(1))
    assert coin.score.interval.contains(0.2)
    other = score(Intruder(odd="quantile", rounds=5), subject)
    assert len(other.records) == 5 and all(one["kind"] == "active" for one in other.records)
    few = Intruder(shown=9)
    assert "no quantile has 8" in score(few, subject).score.reason
    with pytest.raises(SondeError, match="another quantile"):
        Intruder(odd="other")
    with pytest.raises(SondeError, match="at least 2"):
        Intruder(shown=1)


def test_texts_that_are_written_are_run_and_missing_ones_are_unread(subject):
    def fires(hookpoint, latent, texts):
        return [(2.0 * any(word in text for word in words(SETS[latent])), 32) for text in texts]

    found = score(Generation(fires, 1600), subject)
    assert found.score.interval.estimate == 1.0 and found.score.interval.n == 10
    assert found.score.chance == pytest.approx(subject.examples.active / 1600)
    assert score(Generation(fires, 1600), subject, FALSE).score.interval.estimate == 0.0
    short = Wrapped(lambda number, answer: Completion("\n".join(answer.text.splitlines()[:4])))
    some = score(Generation(fires, 1600), subject, backend=short)
    assert some.measures["parsed"].interval.estimate == 0.4 and some.score.interval.n == 4
    none = score(Generation(fires, 1600), subject, backend=Wrapped(lambda number, answer: Completion("no")))
    assert none.score.reason == "no text could be read" and len(none.records) == 10


def test_what_is_ranked_here_is_kept_beside_the_answers(subject):
    calls = []

    def rank(text, found):
        calls.append(text)
        labels = np.arange(100) < 50
        values = labels.astype(float)
        values[99] = np.nan
        return Ranking(values, labels)

    scorer = Ranked("mine", rank)
    client = Client(LiteralReader())
    first, second = (client.run(lambda: scorer.score(subject, "x", client)) for _ in range(2))
    assert calls == ["x"] and first.records == second.records
    assert first.score.interval.estimate == 1.0 and sum(one["parsed"] for one in first.records) == 99
    with pytest.raises(SondeError, match="gave 2 numbers"):
        client.run(lambda: Ranked("bad", lambda *_: Ranking(np.zeros(2), np.zeros(2, bool))).score(subject, "", client))


def test_measures_are_what_they_are_called():
    verdicts = [(True, 1, 9), (True, 0, 9), (True, 1, 1), (False, 0, None), (False, 1, None), (False, 0, None)]
    records = [
        {"label": label, "answer": answer, "quantile": q, "probability": None, "parsed": True}
        for label, answer, q in verdicts
    ]
    found = of_verdicts(records)
    assert found["balanced_accuracy"].interval.estimate == pytest.approx(2 / 3)
    assert found["precision"].interval.estimate == pytest.approx(2 / 3) == found["f1"].interval.estimate
    assert found["recall_q9"].interval.estimate == 0.5 and found["recall_q1"].interval.n == 1
    assert of_scores([0.1], [True]).interval is None
    for one in found.values():
        assert one.interval.low <= one.interval.estimate <= one.interval.high


def test_intervals_of_balanced_accuracy_hold_what_they_promise():
    rng, inside = np.random.default_rng(0), 0
    for _ in range(400):
        hits, alarms = rng.binomial(50, 0.8), rng.binomial(50, 0.3)
        inside += balanced(wilson(int(hits), 50), wilson(int(50 - alarms), 50)).contains(0.75)
    assert 0.92 <= inside / 400 <= 0.98
    assert f1(25, 50, 25, 50).contains(0.5)
