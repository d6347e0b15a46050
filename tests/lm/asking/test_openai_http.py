"""A server that fails in every way it can: all questions end, as answers or not, and none is paid for twice."""

import asyncio
import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from sonde.errors import SondeError
from sonde.lm.asking.client import Client, Limits
from sonde.lm.asking.completion import Params, Refused, Unanswered, chat
from sonde.lm.asking.ledger import BudgetSpent, Price
from sonde.lm.asking.openai_http import OpenAiHttp

PARAMS = Params(max_tokens=8)


class Server(ThreadingHTTPServer):
    """`faults` gives for a question what happens to its first requests, in their order."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, faults=None, logprobs=True, schema=True):
        self.faults = {text: list(steps) for text, steps in (faults or {}).items()}
        self.logprobs, self.schema = logprobs, schema
        self.requests, self.answered, self.bodies, self.keys = Counter(), Counter(), [], []
        self.lock, self.closing = threading.Lock(), threading.Event()
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def __exit__(self, *_):
        self.closing.set()
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        server, text = self.server, body["messages"][-1]["content"]
        with server.lock:
            server.bodies.append(body)
            server.keys.append(self.headers.get("authorization"))
            server.requests[text] += 1
            step = server.faults.get(text, [None]).pop(0) if server.faults.get(text) else None
        if body.get("response_format") and not server.schema:
            return self.reply(400, '{"error": "response_format is not supported"}')
        if step == "429":
            return self.reply(429, "slow down", {"Retry-After": "1"})
        if step in ("500", "400", "401"):
            return self.reply(int(step), "no luck")
        if step == "malformed":
            return self.reply(200, '{"choices": [{"mess')
        if step == "hang":
            server.closing.wait(60)
            self.close_connection = True
            return None
        if step == "broken":
            self.close_connection = True
            self.connection.close()
            return None
        with server.lock:
            server.answered[text] += 1
        answer = f"{text}!" if step is None else text[: len(text) // 2]
        choice = {"message": {"content": answer}, "finish_reason": "stop" if step is None else "length"}
        if body.get("logprobs") and server.logprobs:
            choice["logprobs"] = {
                "content": [
                    {"token": "1", "logprob": -0.1, "top_logprobs": [{"token": "1", "logprob": -0.1}]},
                ]
            }
        usage = {"prompt_tokens": 100, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 64}}
        return self.reply(200, json.dumps({"choices": [choice], "usage": usage}))

    def reply(self, status, text, headers=()):
        data = text.encode()
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def asked(client, texts, params=PARAMS):
    async def work():
        every = (client.complete(chat("s", text), params) for text in texts)
        return await asyncio.gather(*every, return_exceptions=True)

    return dict(zip(texts, client.run(work), strict=True))


def test_every_question_ends_and_none_is_charged_twice(tmp_path):
    kinds = ("429", "500", "malformed", "truncated", "hang", "broken", "400", None)
    texts = [f"question {i:03}" for i in range(48)]
    faults = {text: [kinds[i % len(kinds)]] for i, text in enumerate(texts)}
    faults["question 001"] = ["500"] * 20  # never answers
    with Server(faults) as server:
        price = Price(1.0, 1.0)
        client = Client(
            OpenAiHttp("m", server.url),
            answers=tmp_path / "calls.sqlite",
            price=price,
            budget=1.0,
            limits=Limits(concurrency=16, attempts=4, timeout=5.0, backoff=0.01),
        )
        found = asked(client, texts)
        for text, answer in found.items():
            step = None if text == "question 001" else kinds[texts.index(text) % len(kinds)]
            if step == "400" or text == "question 001":
                assert isinstance(answer, Unanswered)
                assert server.requests[text] == (1 if step == "400" else 4)
            elif step == "truncated":
                assert answer.truncated and answer.text == text[: len(text) // 2]
            else:
                assert answer.text == f"{text}!" and not answer.truncated
        assert max(server.answered.values()) == 1
        answered = sum(not isinstance(one, Exception) for one in found.values())
        assert sum(server.answered.values()) == answered == client.totals()["answers"] == 41
        # Six each of malformed, hung and broken replies may have been charged without our seeing it.
        assert client.totals()["lost_calls"] == 18
        assert client.totals()["dollars"] == pytest.approx(answered * 102 / 1e6)
        before = sum(server.requests.values())
        again = asked(client, [text for text, one in found.items() if not isinstance(one, Exception)])
        assert sum(server.requests.values()) == before
        assert all(again[text] == found[text] for text in again)
        client.answers.close()


def test_a_budget_is_kept_while_the_server_fails():
    texts = [f"q{i}" for i in range(60)]
    with Server({text: [("500", None, "malformed")[i % 3]] for i, text in enumerate(texts)}) as server:
        # A call reserves about 10 tokens of prompt and 8 of an answer, and is charged 102: the count is rough.
        client = Client(
            OpenAiHttp("m", server.url), price=Price(1e6, 1e6), budget=2000.0,
            limits=Limits(concurrency=8, backoff=0.01),
        )  # fmt: skip
        found = asked(client, texts)
        assert any(isinstance(one, BudgetSpent) for one in found.values())
        kept = [one for one in found.values() if not isinstance(one, Exception)]
        assert kept and client.ledger.spent <= 2000.0 + 8 * 102
        assert client.totals()["answers"] == len(kept)


def test_usage_key_and_parameters_are_those_of_the_protocol(monkeypatch, tmp_path):
    monkeypatch.setenv("READER_KEY", "very-secret")
    with Server() as server:
        client = Client(
            OpenAiHttp("some/model", server.url + "/", key_variable="READER_KEY"), answers=tmp_path / "calls.sqlite"
        )
        params = Params(max_tokens=8, seed=3, top_logprobs=5, schema='{"type": "object"}')
        answer = asked(client, ["a"], params)["a"]
        body = server.bodies[0]
        assert server.keys == ["Bearer very-secret"]
    assert (answer.usage.prompt, answer.usage.cached, answer.usage.completion) == (100, 64, 2)
    assert answer.tokens[0].top == (("1", -0.1),)
    assert body["model"] == "some/model" and body["seed"] == 3 and body["top_logprobs"] == 5
    assert body["response_format"]["json_schema"]["schema"] == {"type": "object"}
    client.answers.close()
    assert b"very-secret" not in b"".join(path.read_bytes() for path in tmp_path.iterdir())


def test_a_schema_that_the_server_refuses_is_left_out_from_then_on():
    with Server(schema=False) as server:
        client = Client(OpenAiHttp("m", server.url))
        params = Params(max_tokens=8, schema="{}")
        assert asked(client, ["a"], params)["a"].text == "a!"
        assert not client.backend.offers.schema
        assert asked(client, ["b"], params)["b"].text == "b!"
        assert server.requests == {"a": 2, "b": 1}


def test_log_probabilities_are_probed_with_one_token():
    with Server(logprobs=False) as server:
        client = Client(OpenAiHttp("m", server.url))
        with pytest.raises(SondeError, match="no log-probabilities"):
            client.run(client.require_logprobs)
        assert sum(server.requests.values()) == 1 and server.bodies[0]["max_tokens"] == 1
    with Server() as server:
        client = Client(OpenAiHttp("m", server.url))
        client.run(client.require_logprobs)


def test_a_wrong_key_ends_the_work_and_a_server_that_is_not_there_is_said():
    with Server({"a": ["401"]}) as server:
        assert isinstance(asked(Client(OpenAiHttp("m", server.url)), ["a"])["a"], Refused)
        url = server.url
    client = Client(OpenAiHttp("m", url), limits=Limits(attempts=2, backoff=0.001))
    assert "cannot be reached" in str(asked(client, ["a"])["a"])
    assert client.totals()["lost_calls"] == 0  # nobody was there to charge
    with pytest.raises(SondeError, match="is no base URL"):
        OpenAiHttp("m", "localhost:8000")


def test_a_chat_server_has_no_log_probabilities_of_prompts():
    client = Client(OpenAiHttp("m", "http://127.0.0.1:9/v1"))
    assert "no log-probabilities of prompts" in str(asked(client, ["a"], Params(prompt_logprobs=1))["a"])
