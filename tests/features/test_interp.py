"""From latents to files: known error rates come out, kills change nothing, nothing is asked or paid for twice."""

import asyncio
import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from latent_worlds import VOCAB, planted

from sonde.errors import SondeError
from sonde.features.explainers import Explainer
from sonde.features.interp import Given, Lexical, candidates, interpret, read_explanations
from sonde.features.latent_cache import LatentCache
from sonde.features.readers import CoinReader, LiteralReader, quoted
from sonde.features.samplers import Sampling
from sonde.features.scorers.intruder import Intruder
from sonde.features.scorers.simulation import Simulation
from sonde.features.scorers.verdicts import Detection, Fuzzing
from sonde.lm.asking.client import Client, Limits
from sonde.lm.asking.completion import Completion, Offers, as_error, request_key
from sonde.lm.asking.ledger import Price

SMALL = Sampling(length=16, min_examples=100)


def words(ids):
    return [f" w{i:03d}" for i in ids]


def sets(count, seed):
    return [
        tuple(map(int, row)) for row in np.random.default_rng(seed).permutation(VOCAB)[: 3 * count].reshape(count, 3)
    ]


@pytest.fixture(scope="module", params=[0, 1, 2])
def world(request, tmp_path_factory):
    """Fifty latents that fire on three tokens each, all with nearly the same strength."""
    folder = tmp_path_factory.mktemp("world")
    return planted(folder, sets(50, request.param), seed=request.param, strengths=(0.9, 1.1)), request.param


def through(cache, folder, reader, latents=range(50), scorers=None, explainer=None, answers=None, **client):
    client = Client(reader, answers=answers, **client)
    try:
        return interpret(
            candidates(cache, {"planted": latents}, sampling=SMALL),
            explainer=explainer or Explainer(),
            scorers=scorers or [Detection(), Fuzzing()],
            client=client,
            words=words,
            folder=folder,
        ), client
    finally:
        client.answers.close()


def means(summary):
    return {name: np.mean(scores.values) for (name, _), scores in summary.scores.items()}


def files(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file() and not path.name.startswith("calls.sqlite")
    }


def test_a_reader_that_errs_one_time_in_ten_scores_nine_tenths(world, tmp_path):
    cache, seed = world
    found = means(through(cache, tmp_path, LiteralReader(error=0.1, seed=seed))[0])
    assert found["detection"] == pytest.approx(0.9, abs=0.02)
    assert found["fuzzing"] == pytest.approx(0.9, abs=0.02)


def test_a_coin_scores_one_half(world, tmp_path):
    cache, seed = world
    found = means(through(cache, tmp_path, CoinReader(seed))[0])
    assert found["detection"] == pytest.approx(0.5, abs=0.02)
    assert found["fuzzing"] == pytest.approx(0.5, abs=0.02)


def test_a_reader_without_error_is_perfect(world, tmp_path):
    cache, seed = world
    scorers = [Detection(), Fuzzing(), Simulation()]
    summary, client = through(cache, tmp_path, LiteralReader(seed=seed), range(12), scorers)
    for name in ("detection", "fuzzing"):
        assert set(summary.scores[name, "planted"].values) == {1.0}
    assert min(summary.scores["simulation", "planted"].values) >= 0.95
    assert client.counts["asked"] == client.counts["calls"] == 12 * (1 + 20 + 20 + 100)
    assert summary.scores["detection", "planted"].to_json()["weighted_f1"] == 1.0


def test_the_files_are_what_the_head_of_the_module_says(tmp_path):
    cache = planted(tmp_path / "world", sets(3, 0))
    through(cache, tmp_path / "run", LiteralReader(), range(3), [Detection(), Intruder(rounds=4)])
    latents = [json.loads(line) for line in (tmp_path / "run/latents.jsonl").read_text().splitlines()]
    assert [one["latent"] for one in latents] == [0, 1, 2]
    first = latents[0]
    assert set(first) == {
        "hookpoint", "latent", "count", "active", "largest", "status", "reason", "explanation", "promoted", "windows",
        "measures",
    }  # fmt: skip
    assert first["status"] == "scored" and set(quoted(first["explanation"])) == set(words(sets(3, 0)[0]))
    assert first["count"] == cache.counts("planted")[0]
    assert len(first["windows"]) == 10 and len(first["windows"][0]["tokens"]) == 16
    score = first["measures"]["detection"]["values"][first["measures"]["detection"]["main"]]
    assert set(score) == {"estimate", "low", "high", "n", "chance"}
    records = [json.loads(line) for line in (tmp_path / "run/scores/detection.jsonl").read_text().splitlines()]
    assert len(records) == 300 and set(records[0]) == {
        "hookpoint", "latent", "example", "kind", "quantile", "distance", "label", "answer", "probability", "parsed",
    }  # fmt: skip
    assert read_explanations(tmp_path / "run/explanations.jsonl")["planted", 0] == first["explanation"]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["statuses"] == {"scored": 3} and summary["bill"]["answers"] == 3 * (1 + 20 + 4)
    assert summary["scores"]["intruder"]["planted"]["chance"] == pytest.approx(0.2)


def test_rare_dense_and_failed_latents_are_listed_with_their_reason(tmp_path):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCAB, (200, 64))
    fires = [np.isin(tokens, (3, 4)), np.isin(tokens, (5, 6)), tokens == -1, np.ones_like(tokens, bool)]
    fires[2][0, :4] = True
    columns = [(*at.nonzero(), np.full(at.sum(), i), np.ones(at.sum())) for i, at in enumerate(fires)]
    triples = tuple(np.concatenate(column) for column in zip(*columns, strict=True))
    cache = LatentCache.write(tmp_path / "world", tokens, {"planted": (4, triples)})

    given = Given({("planted", 0): 'fires on " w003", " w004"', ("planted", 1): "  "})
    summary, _ = through(cache, tmp_path / "run", LiteralReader(), range(4), [Detection(), Intruder()], given)
    assert summary.statuses == {"scored": 1, "failed": 1, "too rare": 1, "too dense": 1}
    assert summary.failed == [("planted", 1)] and summary.too_rare == [("planted", 2)]
    assert summary.too_dense == [("planted", 3)]
    latents = [json.loads(line) for line in (tmp_path / "run/latents.jsonl").read_text().splitlines()]
    # What failed is not scored by what needs an explanation, and not as if the failure were one.
    assert latents[1]["explanation"] is None and set(latents[1]["measures"]) == {"intruder"}
    assert "fires in 1 windows" in latents[2]["reason"] and latents[2]["measures"] == {}
    assert "no negatives" in latents[3]["reason"]


def test_the_lexical_explainer_asks_nobody(tmp_path):
    cache = planted(tmp_path / "world", sets(2, 0))
    summary, client = through(cache, tmp_path / "run", LiteralReader(), range(2), [Detection()], Lexical(words))
    assert means(summary) == {"detection": 1.0} and client.counts["calls"] == 40


class Stops(LiteralReader):
    """Fails for good at one of its calls."""

    def __init__(self, at):
        super().__init__(error=0.2, seed=5)
        self.at, self.calls = at, Counter()

    async def complete(self, messages, params):
        self.calls[messages[-1]["content"]] += 1
        if sum(self.calls.values()) == self.at:
            raise KeyboardInterrupt
        return await super().complete(messages, params)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_after_a_stop_at_any_call_the_files_and_the_number_of_calls_are_those_of_one_run(tmp_path, seed):
    cache = planted(tmp_path / "world", sets(6, 0))
    scorers = [Detection(), Fuzzing(), Intruder(rounds=5)]
    whole = Stops(at=-1)
    through(cache, tmp_path / "whole", whole, range(6), scorers, answers=tmp_path / "whole/calls.sqlite")
    total = sum(whole.calls.values())
    at = int(np.random.default_rng(seed).integers(1, total))
    folder = tmp_path / "stopped"
    first, second = Stops(at), Stops(at=-1)
    with pytest.raises(KeyboardInterrupt):
        through(cache, folder, first, range(6), scorers, answers=folder / "calls.sqlite", limits=Limits(concurrency=1))
    assert not list(folder.rglob("*.jsonl"))  # nothing half written
    through(cache, folder, second, range(6), scorers, answers=folder / "calls.sqlite")
    assert files(folder) == files(tmp_path / "whole")
    # The call at which it stopped had no answer; no other was made twice.
    assert sum((first.calls + second.calls).values()) == total + 1


KILLED = """
    import sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from test_interp import *
    class Noted(LiteralReader):
        async def complete(self, messages, params):
            answer = await super().complete(messages, params)
            with open({log!r}, "a") as file:
                file.write("x\\n")
            return answer
    through(LatentCache.open({world!r}), {folder!r}, Noted(error=0.2, seed=5), range(6), [Detection(), Fuzzing()],
            answers={folder!r} + "/calls.sqlite")
"""


def test_a_killed_process_goes_on_and_leaves_the_same_files(tmp_path):
    cache = planted(tmp_path / "world", sets(6, 0))
    summary, client = through(
        cache, tmp_path / "whole", LiteralReader(error=0.2, seed=5), range(6), answers=tmp_path / "whole/calls.sqlite"
    )
    total, log, folder = client.counts["calls"], tmp_path / "log", tmp_path / "killed"
    values = {"tests": str(Path(__file__).parent), "log": str(log), "world": str(cache.folder), "folder": str(folder)}
    code = textwrap.dedent(KILLED).format(**values)
    at = int(np.random.default_rng(0).integers(1, total))
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    while process.poll() is None and (not log.exists() or log.stat().st_size < 2 * at):
        time.sleep(0.001)
    if process.poll() is None:
        os.kill(process.pid, signal.SIGKILL)
    process.wait()
    made = log.stat().st_size // 2
    again = Client(LiteralReader(error=0.2, seed=5), answers=folder / "calls.sqlite")
    kept = again.totals()["answers"]
    # An answer is in the file before the next question is asked: at most the calls in flight have none.
    assert made - again.limits.concurrency <= kept <= made
    again.answers.close()
    found, rest = through(cache, folder, LiteralReader(error=0.2, seed=5), range(6), answers=folder / "calls.sqlite")
    assert kept + rest.counts["calls"] == total == found.bill["answers"]
    assert files(folder) == files(tmp_path / "whole") and found.to_json() == summary.to_json()


def test_a_budget_ends_the_work_keeps_what_is_finished_and_goes_on_later(tmp_path):
    cache = planted(tmp_path / "world", sets(6, 0))
    price, answers = Price(1e3, 1e3), tmp_path / "run/calls.sqlite"
    whole, _ = through(cache, tmp_path / "whole", LiteralReader(), range(6), price=price)
    budget = whole.bill["dollars"] / 2
    short, _ = through(
        cache, tmp_path / "run", LiteralReader(), range(6), answers=answers, price=price, budget=budget,
        limits=Limits(concurrency=4),
    )  # fmt: skip
    assert "the budget of" in short.stopped and short.statuses["not asked"] > 0
    assert 0 < short.bill["dollars"] <= budget
    rest, client = through(
        cache, tmp_path / "run", LiteralReader(), range(6), answers=answers, price=price, budget=2 * budget + 1000
    )
    assert rest.to_json() == whole.to_json()
    assert client.counts["calls"] == whole.bill["answers"] - short.bill["answers"]


def test_what_cannot_be_done_is_said_before_anybody_is_asked(tmp_path):
    cache = planted(tmp_path / "world", sets(2, 0))

    class Mute(LiteralReader):
        offers = Offers(logprobs=False)

        async def complete(self, messages, params):
            raise AssertionError("asked")

    with pytest.raises(SondeError, match="gives no log-probabilities"):
        through(cache, tmp_path / "a", Mute(), range(2), [Detection(logprobs=True)])
    with pytest.raises(SondeError, match=r"needs \d+ tokens"):
        through(cache, tmp_path / "b", CoinReader(0, context=100), range(2), [Simulation()])
    for scorers in ([Detection(), Detection()], []):
        with pytest.raises(SondeError, match="different names"):
            interpret([], explainer=Explainer(), scorers=scorers, client=Client(Mute()), words=words, folder=tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"hookpoint": "x"}\n')
    with pytest.raises(SondeError, match="line 1: expected an object"):
        read_explanations(tmp_path / "bad.jsonl")
    with pytest.raises(SondeError, match="cannot be read"):
        read_explanations(tmp_path / "none.jsonl")


def test_hookpoints_are_kept_apart_whatever_they_are_called(tmp_path):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCAB, (200, 64))
    triples = {}
    for name, members in (("layers.1", (3, 4)), ("layers.10", (5, 6))):
        at = np.isin(tokens, members)
        triples[name] = (1, (*at.nonzero(), np.zeros(at.sum(), int), np.ones(at.sum())))
    cache = LatentCache.write(tmp_path / "world", tokens, triples)
    client = Client(LiteralReader())
    summary = interpret(
        candidates(cache, {"layers.1": [0], "layers.10": [0]}, sampling=SMALL),
        explainer=Given({("layers.1", 0): 'fires on " w003", " w004"', ("layers.10", 0): 'fires on " w003"'}),
        scorers=[Detection()],
        client=client,
        words=words,
        folder=tmp_path / "run",
    )
    assert summary.scores["detection", "layers.1"].values == [1.0]
    assert summary.scores["detection", "layers.10"].values[0] < 0.7
    one = summary.scores["detection", "layers.1"].to_json()["mean"]
    assert one == {"estimate": 1.0, "reason": "one latent has no interval", "n": 1}


def test_unread_answers_are_exact_in_the_summary(tmp_path):
    cache = planted(tmp_path / "world", sets(2, 0))

    class Mumbles(LiteralReader):
        async def complete(self, messages, params):
            answer = await super().complete(messages, params)
            first = messages[7]["content"] if len(messages) > 7 else ""
            return Completion("hm") if "w1" in first.split("\n\n")[1][:40] else answer

    summary, _ = through(cache, tmp_path / "run", Mumbles(), range(2), [Detection()], Lexical(words))
    records = [json.loads(line) for line in (tmp_path / "run/scores/detection.jsonl").read_text().splitlines()]
    scores = summary.scores["detection", "planted"]
    assert scores.examples == len(records) == 200
    assert scores.unparsed == sum(not one["parsed"] for one in records) > 0
    assert scores.to_json()["unparsed_rate"] == scores.unparsed / 200


class Faulty(LiteralReader):
    """Fails in five ways, drawn from a seed; counts the answers that it charged for."""

    def __init__(self, seed):
        super().__init__()
        self.rng, self.charged = np.random.default_rng(seed), Counter()

    async def complete(self, messages, params):
        fault = self.rng.choice(["429", "500", "hang", "malformed", "cut", ""], p=[0.1, 0.1, 0.02, 0.1, 0.1, 0.58])
        if fault in ("429", "500"):
            raise as_error(int(fault), "no", "0.01" if fault == "429" else None)
        if fault == "hang":
            await asyncio.sleep(60)
        answer = await super().complete(messages, params)
        self.charged[request_key(self.name, messages, params)] += 1
        text = {"malformed": "{'answers': 1 0", "cut": answer.text[: len(answer.text) // 2]}.get(fault, answer.text)
        return dataclasses.replace(answer, text=text, truncated=fault == "cut")


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_whatever_fails_every_example_is_read_or_not_and_nothing_is_charged_twice(tmp_path, seed):
    cache = planted(tmp_path / "world", sets(4, seed), seed=seed)
    reader = Faulty(seed)
    limits = Limits(concurrency=16, timeout=0.5, backoff=0.002)
    summary, client = through(
        cache, tmp_path / "run", reader, range(4), [Detection(), Fuzzing()], Lexical(words), limits=limits,
        price=Price(1.0, 1.0), budget=10.0,
    )  # fmt: skip
    assert max(reader.charged.values()) == 1
    assert sum(reader.charged.values()) == summary.bill["answers"] == client.counts["calls"] - client.counts["retries"]
    for name in ("detection", "fuzzing"):
        lines = (tmp_path / f"run/scores/{name}.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        assert len(records) == 400 and all((one["answer"] is not None) == one["parsed"] for one in records)
        scores = summary.scores[name, "planted"]
        assert scores.unparsed == sum(not one["parsed"] for one in records)
        # One in five answers cannot be read, and neither can one in five of those asked for again.
        assert 0 < scores.unparsed < 0.15 * 400
        assert set(scores.values) == {1.0}  # what was read is right
