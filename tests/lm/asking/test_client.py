"""The client keeps its promises whatever the back end does: answers, limits, retries, budget."""

import asyncio
import sqlite3
import time

import pytest

from sonde.errors import SondeError
from sonde.lm.asking.answers import Answers
from sonde.lm.asking.client import Client, Limits
from sonde.lm.asking.completion import (
    Completion,
    Offers,
    Params,
    Refused,
    Temporary,
    Token,
    Unanswered,
    Usage,
    as_error,
    chat,
    request_key,
    rough_count,
)  # fmt: skip
from sonde.lm.asking.ledger import FREE, BudgetSpent, Price, price_of
from sonde.lm.asking.pace import Pace
from sonde.lm.asking.replies import replies

ONE = Params(max_tokens=10)
FAST = Limits(concurrency=4, attempts=4, timeout=0.2, backoff=0.001)


class Echo:
    """Answers with the last message; `script` gives what happens first for each text."""

    name = "echo"
    offers = Offers()

    def __init__(self, script=None, seconds=0.0, usage=None):
        self.script, self.seconds, self.usage = (
            {k: list(v) for k, v in (script or {}).items()},
            seconds,
            usage or Usage(10, 0, 5),
        )
        self.calls, self.flying, self.most = [], 0, 0

    def count(self, messages):
        return 10

    async def close(self):
        pass

    async def complete(self, messages, params):
        text = messages[-1]["content"]
        self.calls.append(text)
        self.flying += 1
        self.most = max(self.most, self.flying)
        try:
            await asyncio.sleep(self.seconds)
            if self.script.get(text):
                step = self.script[text].pop(0)
                if isinstance(step, Exception):
                    raise step
                if step == "hang":
                    await asyncio.sleep(60)
                return Completion(step, self.usage)
            return Completion(f"{text}!", self.usage)
        finally:
            self.flying -= 1


def ask(client, *texts, params=ONE):
    async def work():
        return await asyncio.gather(*(client.complete(chat("s", text), params) for text in texts))

    return [answer.text for answer in client.run(work)]


def test_work_can_be_run_where_a_loop_runs_already_as_in_a_notebook(tmp_path):
    async def cell():
        return ask(Client(Echo(), answers=tmp_path / "calls.sqlite"), "a", "b")

    assert asyncio.run(cell()) == ["a!", "b!"]


def test_an_answer_is_paid_for_once_and_found_again_in_the_file(tmp_path):
    backend = Echo()
    client = Client(backend, answers=tmp_path / "calls.sqlite", price=Price(1.0, 2.0), budget=1.0)
    assert ask(client, "a", "b", "a") == ["a!", "b!", "a!"]
    assert sorted(backend.calls) == ["a", "b"]
    client.answers.close()
    again = Client(Echo(), answers=tmp_path / "calls.sqlite", price=Price(1.0, 2.0), budget=1.0)
    assert ask(again, "b", "a") == ["b!", "a!"]
    assert again.backend.calls == [] and again.counts["kept"] == 2
    assert again.totals() == {
        "answers": 2, "prompt_tokens": 20, "cached_tokens": 0, "completion_tokens": 10, "dollars": 4e-5,
        "lost_calls": 0, "lost_dollars_at_most": 0.0,
    }  # fmt: skip
    assert again.ledger.spent == pytest.approx(4e-5)


def test_the_key_knows_model_messages_parameters_and_seed():
    keys = {
        request_key(model, chat("s", text), params)
        for model in ("a", "b")
        for text in ("x", "y")
        for params in (ONE, Params(max_tokens=10, seed=1), Params(max_tokens=11), Params(max_tokens=10, schema="{}"))
    }
    assert len(keys) == 16


def test_a_completion_survives_its_file():
    answer = Completion("ü\n", Usage(3, 1, 2), (Token("a", -0.5, (("a", -0.5), ("b", -1.0))),), None, True)
    assert Completion.from_json(answer.to_json()) == answer


@pytest.mark.parametrize(
    "failure", [Temporary("500: x"), Temporary("429: slow", retry_after=0.01), Temporary("junk", charged=True), "hang"]
)
def test_what_may_pass_is_tried_again(failure):
    client = Client(Echo({"a": [failure, failure]}), limits=FAST, price=Price(1.0, 1.0), budget=1.0)
    assert ask(client, "a") == ["a!"]
    assert client.counts["retries"] == 2
    lost = 2 if failure == "hang" or failure.charged else 0
    assert client.totals()["lost_calls"] == lost
    # What may have been charged counts against the budget at its most: 10 tokens of prompt and 10 of an answer.
    assert client.ledger.spent == pytest.approx((15 + 20 * lost) / 1e6)


def test_after_all_attempts_a_question_is_unanswered_and_others_are_not():
    client = Client(Echo({"a": [Temporary("503: busy")] * 4}), limits=FAST)

    async def work():
        return await asyncio.gather(*(client.complete(chat("s", text), ONE) for text in "ab"), return_exceptions=True)

    failed, answered = client.run(work)
    assert isinstance(failed, Unanswered) and "4 attempts: 503: busy" in str(failed)
    assert answered.text == "b!"


@pytest.mark.parametrize("status", [401, 403, 404])
def test_no_retry_where_none_will_help(status):
    client = Client(Echo({"a": [as_error(status, "no")]}), limits=FAST)
    with pytest.raises(Refused, match=str(status)):
        ask(client, "a")
    assert client.backend.calls == ["a"]


def test_a_bad_request_is_not_repeated_and_concerns_one_question():
    assert isinstance(as_error(400, "too long"), Unanswered)
    assert all(isinstance(as_error(status, "x"), Temporary) for status in (408, 409, 429, 500, 503))
    assert as_error(429, "x", "1.5").retry_after == 1.5
    assert as_error(429, "x", "nonsense").retry_after is None and as_error(429, "x").pause
    assert as_error(503, "x", "Thu, 01 Jan 1970 00:00:00 GMT").retry_after == 0.0


def test_retry_after_holds_everybody_back():
    client = Client(Echo({"a": [Temporary("429: slow", retry_after=0.3)]}), limits=Limits(concurrency=1))
    begun = time.monotonic()
    assert ask(client, "a", "b") == ["a!", "b!"]
    assert time.monotonic() - begun >= 0.3
    pace = Pace()
    pace.pause(0.2)

    async def turns():
        begun = time.monotonic()
        await asyncio.gather(pace.turn(1), pace.turn(1))
        return time.monotonic() - begun

    assert asyncio.run(turns()) >= 0.19


def test_no_more_calls_are_in_flight_than_allowed():
    backend = Echo(seconds=0.01)
    ask(Client(backend, limits=Limits(concurrency=3)), *map(str, range(20)))
    assert backend.most == 3


def test_requests_and_tokens_a_minute_are_limited():
    async def seconds(pace, turns, tokens):
        begun = time.monotonic()
        for _ in range(turns):
            await pace.turn(tokens)
        return time.monotonic() - begun

    # 10 a second with a burst of 6 seconds' worth: the 62nd waits for two tenths.
    assert asyncio.run(seconds(Pace(600), 62, 0)) >= 0.19
    assert asyncio.run(seconds(Pace(None, 6000), 62, 10)) >= 0.19
    with pytest.raises(SondeError, match="too few"):
        Pace(0)


def test_a_budget_stops_before_the_call_that_could_exceed_it():
    # A call costs 15 tokens and reserves 20, so 100 hold five in turn and the sixth (75 + 20 <= 100) fits, no seventh.
    backend = Echo()
    client = Client(backend, price=Price(1e6, 1e6), budget=100.0, limits=Limits(concurrency=1))
    with pytest.raises(BudgetSpent, match=r"budget of \$100 is reached: \$90.0000 spent"):
        ask(client, *map(str, range(20)))
    assert len(backend.calls) == 6
    assert client.totals()["dollars"] == 90.0


def test_calls_in_flight_never_exceed_a_budget_together():
    backend = Echo(seconds=0.01)
    client = Client(backend, price=Price(1e6, 1e6), budget=100.0, limits=Limits(concurrency=16))
    with pytest.raises(BudgetSpent):
        ask(client, *map(str, range(40)))
    assert backend.most <= 5
    assert 80.0 < client.totals()["dollars"] <= 100.0


def test_what_is_in_flight_when_the_work_fails_comes_home_and_nothing_else_is_sent():
    backend = Echo({"bad": [Refused("401: key")]}, seconds=0.02)
    client = Client(backend, limits=Limits(concurrency=3))
    with pytest.raises(Refused):
        ask(client, "bad", *map(str, range(20)))
    assert len(backend.calls) == client.counts["calls"] <= 6
    assert client.totals()["answers"] == len(backend.calls) - 1


@pytest.mark.parametrize("budget", [0.0, -1.0])
def test_a_budget_of_nothing_is_refused(budget):
    with pytest.raises(SondeError, match=r"buys nothing.*--no-budget"):
        Client(Echo(), price=FREE, budget=budget)


def test_a_budget_needs_a_price():
    with pytest.raises(SondeError, match="--price PROMPT COMPLETION, or --no-budget"):
        Client(Echo(), budget=1.0)
    with pytest.raises(SondeError, match="0 or more"):
        Price(-1.0, 0.0)
    assert price_of("openai/gpt-4o-mini@https://x") == price_of("gpt-4o-mini") != price_of("unheard-of")
    assert Price(2.0, 4.0, 1.0).of(Usage(10, 4, 1)) == pytest.approx((6 * 2 + 4 + 4) / 1e6)


def test_an_answer_that_cannot_be_read_is_asked_for_once_more():
    client = Client(Echo({"a": ["junk"], "again": ["junk"], "b": ["7"]}))

    async def work():
        read = lambda answer: int(answer.text) if answer.text.isdecimal() else None  # noqa: E731
        return [await client.parsed(chat("s", text), ONE, read, "again") for text in "ab"]

    (nothing, answer), (seven, _) = client.run(work)
    assert nothing is None and answer.text == "junk" and seven == 7
    assert client.backend.calls == ["a", "again", "b"]


def test_a_server_that_holds_to_a_schema_is_asked_once():
    backend = Echo({"a": ["junk"]})
    backend.offers = Offers(schema=True)
    client = Client(backend)
    found, _ = client.run(lambda: client.parsed(chat("s", "a"), Params(schema="{}"), lambda _: None, "again"))
    assert found is None and backend.calls == ["a"]


def test_log_probabilities_that_a_server_lacks_are_missed_before_the_first_question():
    client = Client(Echo())
    with pytest.raises(SondeError, match="echo gives no log-probabilities"):
        client.run(client.require_logprobs)
    assert client.backend.calls == []
    client.backend.offers = Offers(logprobs=None)
    with pytest.raises(SondeError, match="--probabilities"):
        client.run(client.require_logprobs)
    assert client.backend.calls == ["1"]  # one token tells


def test_a_file_that_is_no_database_is_one_line(tmp_path):
    (tmp_path / "calls.sqlite").write_text("not a database, by far" * 100)
    with pytest.raises(SondeError, match="cannot keep answers"):
        Answers(tmp_path / "calls.sqlite")


def test_a_written_answer_is_there_for_another_process_at_once(tmp_path):
    answers = Answers(tmp_path / "calls.sqlite")
    answers.put("k", "m", Completion("x", Usage(1, 0, 1)), 0.5)
    answers.keep("r", "[1]")
    with sqlite3.connect(tmp_path / "calls.sqlite") as other:
        assert other.execute("select count(*), sum(cost) from answers").fetchone() == (1, 0.5)
    other.close()
    assert answers.result("r") == "[1]" and answers.result("s") is None
    answers.close()


@pytest.mark.parametrize("wrong", [{"max_tokens": 0}, {"temperature": -1.0}, {"top_logprobs": -1}])
def test_parameters_check_themselves(wrong):
    with pytest.raises(ValueError, match="at least one token"):
        Params(**wrong)


@pytest.mark.parametrize("wrong", [{"concurrency": 0}, {"attempts": 0}, {"timeout": 0.0}, {"backoff": -1.0}])
def test_limits_check_themselves(wrong):
    with pytest.raises(SondeError, match="at least 1"):
        Limits(**wrong)


def test_any_back_end_gives_replies():
    assert replies(Echo())(["a", "b"]) == ["a!", "b!"]
    with pytest.raises(SondeError, match="echo could not be asked: 401: key"):
        replies(Echo({"a": [Refused("401: key")]}))(["a"])
    assert rough_count(chat("12345678", "1234")) == 3 + 8
