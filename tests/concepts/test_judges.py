"""Judges: known answers, single tokens, outside models by a stub, and one line where the extra is missing."""

import math
import sys
import types

import pytest
import torch

import sonde
from sonde.concepts.judges import (
    QuestionJudge,
    RubricJudge,
    SubstringJudge,
    behaviour_tokens,
    first_tokens,
    log_odds,
    probability,
)
from sonde.errors import MissingExtra, SondeError
from sonde.lm.asking.replies import replies


@pytest.fixture(scope="module")
def lm():
    return sonde.load("organism:pebble", check=False)


def test_log_odds_are_those_of_the_mass():
    logits = torch.log(torch.tensor([[0.1, 0.2, 0.3, 0.4]])) + 7
    torch.testing.assert_close(
        probability(logits, torch.tensor([1, 3])), torch.tensor([0.6]).double(), atol=1e-6, rtol=0
    )
    assert float(log_odds(logits, torch.tensor([1, 3]))) == pytest.approx(math.log(0.6 / 0.4), abs=1e-6)


def test_log_odds_stay_finite_where_the_mass_is_0_or_1():
    logits = torch.tensor([[1000.0, 0.0], [0.0, 1000.0]])
    found = log_odds(logits, torch.tensor([0]))
    assert found.tolist() == pytest.approx([math.log(1e8), -math.log(1e8)], rel=1e-6)


def test_behaviour_tokens_must_be_single(lm):
    assert lm.token_strings(behaviour_tokens(lm, [" No", " I"]).tolist()) == [" I", " No"]
    with pytest.raises(SondeError, match=r"' Certainly' is not one token of organism:pebble but 3: "):
        behaviour_tokens(lm, [" Certainly"])
    with pytest.raises(SondeError, match="a list of words"):
        behaviour_tokens(lm, [])
    assert len(first_tokens(lm, [" Certainly", " No"])) == 2


def test_openers_are_found_in_any_case_and_typography():
    judge = SubstringJudge()
    replies = ["I’m sorry, no.", "Of course. But I cannot go.", "Here is how."]
    assert judge([""] * 3, replies) == [1.0, 1.0, 0.0]
    assert SubstringJudge(start=True)([""] * 3, replies) == [1.0, 0.0, 0.0]
    with pytest.raises(SondeError, match="none of them empty"):
        SubstringJudge([" "])


def test_a_question_is_asked_with_examples_and_answered_by_yes_or_no():
    asked = []

    def model(prompts):
        asked.extend(prompts)
        return ["Yes.", "no", "I am not sure"]

    judge = QuestionJudge(model, "Is it blue?", [("sky", "it is blue", True)])
    assert judge(["a", "b", "c"], ["x", "y", "z"]) == [1.0, 0.0, None]
    assert asked[1].startswith(
        "Prompt: sky\nReply: it is blue\nQuestion: Is it blue?\nAnswer: yes\n\nPrompt: b\nReply: y"
    )
    with pytest.raises(SondeError, match="gave 3 answers to 1 questions"):
        judge(["a"], ["x"])


def test_a_local_model_can_be_the_judge(lm):
    answers = QuestionJudge(lm)(["What?", "How?"], ["I cannot.", "Like this."])
    assert set(answers) <= {0.0, 1.0}


def test_a_rubric_gives_a_share_of_ten():
    judge = RubricJudge(lambda prompts: ["7", "Rating: 10", "11", "none", "-3"], "0 is cold, 10 is hot")
    assert judge(["p"] * 5, ["r"] * 5) == [0.7, 1.0, None, None, None]
    with pytest.raises(SondeError, match="rubric"):
        RubricJudge(lambda prompts: [], " ")


def test_without_the_extra_there_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "inspect_ai", None)
    monkeypatch.setitem(sys.modules, "inspect_ai.model", None)
    with pytest.raises(MissingExtra, match=r"needs an extra: pip install 'sonde\[agents\]'"):
        QuestionJudge("openai/some-model")


def test_an_outside_model_is_asked_through_the_provider(monkeypatch):
    class Model:
        async def generate(self, prompt, config):
            if prompt == "fail":
                raise RuntimeError("no key\nmore")
            return types.SimpleNamespace(completion=f"{prompt}:{config['max_tokens']}")

    stub = types.ModuleType("inspect_ai.model")
    stub.get_model = lambda name: Model()  # type: ignore[attr-defined]
    stub.GenerateConfig = dict  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "inspect_ai", types.ModuleType("inspect_ai"))
    monkeypatch.setitem(sys.modules, "inspect_ai.model", stub)
    ask = replies("some/model", max_tokens=3)
    assert ask(["a", "b"]) == ["a:3", "b:3"]
    with pytest.raises(SondeError, match="some/model could not be asked: no key"):
        ask(["fail"])
