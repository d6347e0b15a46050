"""A model in this process answers as it does by itself, with the beginning of prompts read once."""

import asyncio
import subprocess
import sys
import types

import pytest
import torch
from families import tiny

import sonde
from sonde.errors import SondeError
from sonde.lm.asking.batching import Batched
from sonde.lm.asking.client import Client
from sonde.lm.asking.completion import Completion, Params, Refused, Temporary, Unanswered, chat
from sonde.lm.asking.inspect_models import InspectModel
from sonde.lm.asking.local import LocalModel
from sonde.lm.model import LanguageModel

BEGIN = "The following is a long beginning which all of these prompts have and which is read once and for all."
QUESTIONS = [chat(BEGIN, text) for text in ("What is it?", "Who was the old man by the sea?", "A", "foo bar", "a b")]
PARAMS = Params(max_tokens=5, top_logprobs=4)


@pytest.fixture(scope="module")
def lm():
    return sonde.load("organism:pebble", check=False)


def plainly(messages):
    return "".join(f"{one['role']}: {one['content']}\n\n" for one in messages) + "assistant:"


def answers(backend, questions, params=PARAMS):
    client = Client(backend)

    async def work():
        return await asyncio.gather(*(client.complete(one, params) for one in questions))

    return client.run(work)


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_answers_are_the_models_own_in_any_batch(lm, batch):
    found = answers(LocalModel(lm, batch=batch), QUESTIONS)
    alone = [lm.generate([plainly(one)], max_new_tokens=5)[0].removeprefix(" ") for one in QUESTIONS]
    assert [one.text for one in found] == alone
    assert all(one.truncated and one.usage.completion == 5 for one in found)
    if batch > 1:
        assert max(one.usage.cached for one in found) > 16


def test_log_probabilities_of_answer_and_prompt_are_those_of_the_whole_run(lm):
    answer = answers(LocalModel(lm), QUESTIONS[:2])[0]
    ids = lm.encode(plainly(QUESTIONS[0]))
    new = lm.generate([ids], max_new_tokens=5)[0]
    with torch.no_grad():
        logp = lm(torch.tensor([ids + new])).logits[0].log_softmax(-1)
    expected = logp[len(ids) - 1 : -1].gather(-1, torch.tensor(new)[:, None])[:, 0]
    assert [token.logprob for token in answer.tokens] == pytest.approx(expected.tolist(), abs=1e-4)
    assert all(len(token.top) == 4 and token.top[0][1] == max(v for _, v in token.top) for token in answer.tokens)
    (read,) = answers(LocalModel(lm), QUESTIONS[:1], Params(max_tokens=1, prompt_logprobs=3))
    own = logp[: len(ids) - 1].gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
    assert [token.logprob for token in read.prompt_tokens[1:]] == pytest.approx(own.tolist(), abs=1e-4)
    assert "".join(token.text for token in read.prompt_tokens) == plainly(QUESTIONS[0])


def test_temperature_draws_by_the_seed(lm):
    texts = [
        answers(LocalModel(lm), QUESTIONS[:1], Params(max_tokens=8, temperature=1.0, seed=i))[0].text for i in (0, 0, 1)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_what_does_not_fit_is_said_with_both_numbers(lm):
    backend = LocalModel(lm)
    long = chat("word " * 2000, "x")
    with pytest.raises(Unanswered, match=rf"need {backend.count(long) + 1} tokens, .* has {lm.max_positions}"):
        answers(backend, [long])
    assert backend.offers.context == lm.max_positions


def test_a_model_without_tokenizer_cannot_be_asked():
    with pytest.raises(SondeError, match="has no tokenizer"):
        LocalModel(LanguageModel(tiny("llama")))


def test_questions_with_other_parameters_are_other_batches():
    seen = []

    def answer(prompts, params):
        seen.append((len(prompts), params.max_tokens))
        return [Completion("x")] * len(prompts)

    async def work():
        batched = Batched(answer, 3)
        asked = [batched.ask(QUESTIONS[0], Params(max_tokens=1 + i % 2)) for i in range(8)]
        await asyncio.gather(*asked)
        await batched.close()

    asyncio.run(work())
    assert sorted(seen) == [(1, 1), (1, 2), (3, 1), (3, 2)]
    with pytest.raises(ValueError, match="at least one"):
        Batched(answer, 0)


def test_a_batch_that_fails_fails_for_all_that_are_in_it():
    def broken(prompts, params):
        raise Unanswered("no")

    async def work():
        batched = Batched(broken, 4)
        found = await asyncio.gather(*(batched.ask(one, PARAMS) for one in QUESTIONS), return_exceptions=True)
        await batched.close()
        return found

    assert all(isinstance(one, Unanswered) for one in asyncio.run(work()))


@pytest.mark.parametrize("module", ["openai_http", "local", "vllm_engine", "inspect_models", "client"])
def test_one_back_end_does_not_import_another(module):
    others = {"openai_http", "local", "vllm_engine", "inspect_models"} - {module}
    code = (
        f"import sys, sonde.lm.asking.{module}; "
        f"print([m for m in {sorted(others)} if f'sonde.lm.asking.{{m}}' in sys.modules], "
        "[m for m in ('vllm', 'inspect_ai') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] []"


def test_an_engine_of_vllm_is_asked_in_its_words(monkeypatch):
    asked = {}

    class Engine:
        def __init__(self, **options):
            asked["options"] = options
            self.llm_engine = types.SimpleNamespace(model_config=types.SimpleNamespace(max_model_len=512))

        def chat(self, conversations, sampling, use_tqdm):
            asked["sampling"] = sampling
            place = {7: types.SimpleNamespace(decoded_token="1", logprob=-0.25)}
            out = types.SimpleNamespace(text="1", token_ids=[7], logprobs=[place], finish_reason="stop")
            return [
                types.SimpleNamespace(
                    outputs=[out], prompt_token_ids=[5, 7], num_cached_tokens=1, prompt_logprobs=[None, place]
                )
            ] * len(conversations)

    module = types.ModuleType("vllm")
    module.LLM, module.SamplingParams = Engine, dict
    module.sampling_params = types.SimpleNamespace(StructuredOutputsParams=dict)
    monkeypatch.setitem(sys.modules, "vllm", module)
    from sonde.lm.asking.vllm_engine import VllmEngine

    backend = VllmEngine("m", dtype="auto")
    backend.count = lambda messages: 2
    assert backend.offers.context == 512 and backend.offers.prompt_logprobs
    params = Params(max_tokens=3, top_logprobs=5, prompt_logprobs=2, schema='{"a": 1}')
    (answer,) = answers(backend, QUESTIONS[:1], params)
    assert asked["options"] == {"model": "m", "enable_prefix_caching": True, "dtype": "auto"}
    assert asked["sampling"]["structured_outputs"] == {"json": {"a": 1}} and asked["sampling"]["logprobs"] == 5
    assert answer.text == "1" and answer.usage.cached == 1
    assert answer.tokens[0].top == (("1", -0.25),) and answer.prompt_tokens[1].logprob == -0.25


def test_without_vllm_there_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    from sonde.lm.asking.vllm_engine import VllmEngine

    with pytest.raises(SondeError, match="vLLM is not installed"):
        VllmEngine("m")


def test_a_providers_errors_are_told_by_their_status(monkeypatch):
    class Failed(Exception):
        def __init__(self, status):
            super().__init__("busy\nmore")
            self.status_code, self.response = status, types.SimpleNamespace(headers={"retry-after": "2"})

    class Model:
        async def generate(self, given, config):
            assert config["max_retries"] == 0 and [type(one).__name__ for one in given] == ["System", "User"]
            if given[1].content == "fine":
                top = types.SimpleNamespace(token="x", logprob=-1.0)
                token = types.SimpleNamespace(token="x", logprob=-1.0, top_logprobs=[top])
                choice = types.SimpleNamespace(logprobs=types.SimpleNamespace(content=[token]))
                usage = types.SimpleNamespace(input_tokens=7, input_tokens_cache_read=3, output_tokens=2)
                return types.SimpleNamespace(completion="ok", usage=usage, choices=[choice], stop_reason="max_tokens")
            raise Failed(int(given[1].content))

    module = types.ModuleType("inspect_ai.model")
    module.get_model, module.GenerateConfig = lambda name: Model(), dict
    for role in ("System", "User", "Assistant"):
        kind = type(role, (), {"__init__": lambda self, content: setattr(self, "content", content)})
        setattr(module, f"ChatMessage{role}", kind)
    monkeypatch.setitem(sys.modules, "inspect_ai", types.ModuleType("inspect_ai"))
    monkeypatch.setitem(sys.modules, "inspect_ai.model", module)
    sys.modules["inspect_ai"].model = module
    backend = InspectModel("some/model")
    fine = asyncio.run(backend.complete(chat("s", "fine"), PARAMS))
    assert fine.text == "ok" and fine.truncated and fine.tokens[0].top == (("x", -1.0),)
    assert (fine.usage.prompt, fine.usage.cached, fine.usage.completion) == (10, 3, 2)
    for status, kind in ((429, Temporary), (401, Refused), (400, Unanswered)):
        with pytest.raises(kind, match=f"{status}: busy$"):
            asyncio.run(backend.complete(chat("s", str(status)), PARAMS))
    with pytest.raises(SondeError, match="no log-probabilities of prompts"):
        asyncio.run(backend.complete(chat("s", "fine"), Params(prompt_logprobs=1)))
