"""Questions show what they should, in an order that servers can keep, and answers are read strictly."""

import asyncio
import dataclasses

import pytest
from latent_worlds import planted

from sonde.errors import SondeError
from sonde.features import questions
from sonde.features.cases import Subject
from sonde.features.explainers import Explainer
from sonde.features.marking import spans
from sonde.features.readers import CoinReader, LiteralReader, composed, quoted, sentence
from sonde.features.samplers import Sampling, examples
from sonde.lm.asking.client import Client, Limits
from sonde.lm.asking.completion import Completion, Offers, Params, Temporary

SET = (3, 30, 130)


def words(ids):
    return [f" w{i:03d}" for i in ids]


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    cache = planted(tmp_path_factory.mktemp("world"), [SET])
    found = examples(cache, "planted", 0, config=Sampling(length=16, min_examples=100))
    return Subject.of(found, words, ["' up'", "' down'"])


class Says:
    """Answers everything with one text."""

    name, offers = "says", Offers()

    def __init__(self, *texts):
        self.texts, self.asked = list(texts), []

    def count(self, messages):
        return 1

    async def close(self):
        pass

    async def complete(self, messages, params):
        self.asked.append(messages)
        if isinstance(self.texts[0], Exception):
            raise self.texts[0]
        return Completion(self.texts.pop(0) if len(self.texts) > 1 else self.texts[0])


def explained(subject, explainer, backend):
    client = Client(backend)
    return client.run(lambda: explainer.explain(subject, client))


@pytest.mark.parametrize("kind", ["plain", "chain-of-thought", "logits", "single-token", "contrastive"])
def test_every_variant_lets_a_literal_reader_name_the_set(subject, kind):
    found = explained(subject, Explainer(kind, strengths=kind != "single-token"), LiteralReader())
    assert set(quoted(found.text)) == set(words(SET))


def test_variants_show_what_they_are_named_for(subject):
    def shown(kind, **options):
        return Explainer(kind, **options).prompt(subject)

    def last(kind, **options):
        return shown(kind, **options)[-1]["content"]

    texts = questions.read_numbered(last("plain"))
    assert len(texts) == 40
    assert all(set(spans(text)) <= {a + b for a in ["", *words(SET)] for b in words(SET)} for text in texts)
    assert "10)" in last("plain", strengths=True) and "10)" not in last("plain")
    assert "Tokens it makes likelier: ' up', ' down'" in last("logits")
    assert "three short steps" in shown("chain-of-thought")[0]["content"]
    silent = last("contrastive").split("Passages it does not respond to:")[1]
    assert silent.count("\n- ") == 5 and not any(word in silent for word in words(SET))
    assert len(questions.read_numbered(last("contrastive"))) == 15
    assert "<<" not in last("single-token") and "(' w003'" in last("single-token")
    # Three worked examples, and nothing of the latent before them.
    assert [one["role"] for one in shown("plain")] == ["system", *["user", "assistant"] * 3, "user"]


def test_what_stays_the_same_comes_first():
    first, second = (questions.detect(text, ["a", "b"]) for text in ("x", "y"))
    assert first[:-1] == second[:-1] and len(first) == 8
    assert questions.fuzz("x", ["a"])[:-1] == questions.fuzz("y", ["b"])[:-1]


def test_an_explanation_that_is_empty_missing_or_never_came_is_stored_as_failed(subject):
    for text in ("", "no idea", f"{questions.EXPLANATION}  \n"):
        backend = Says(text)
        found = explained(subject, Explainer(), backend)
        assert found.text is None and found.answer == text and "no [EXPLANATION]:" in found.failed
        assert len(backend.asked) == 2 and backend.asked[1][-1]["content"] == questions.AGAIN_EXPLANATION
    assert explained(subject, Explainer(), Says("hm", "[EXPLANATION]: late")).text == "late"
    assert explained(subject, Explainer(), Says("[EXPLANATION]: a\n[EXPLANATION]: b ")).text == "b"

    class Broken(Says):
        async def complete(self, messages, params):
            raise Temporary("503: busy")

    client = Client(Broken(""), limits=Limits(attempts=2, backoff=0.0))
    failed = client.run(lambda: Explainer().explain(subject, client))
    assert failed.text is None and "gave no answer in 2 attempts" in failed.failed


def test_a_contrastive_explanation_needs_silent_windows(subject):
    bare = dataclasses.replace(subject, train_negatives=())
    with pytest.raises(SondeError, match="silent"):
        Explainer("contrastive").prompt(bare)
    with pytest.raises(SondeError, match="no explainer 'poem'"):
        Explainer("poem")


def test_answers_are_read_strictly():
    read = questions.read_digits
    assert read("[1, 0, 1]", 3) == [1, 0, 1] == read('{"answers": [1,0,1]}', 3) == read("I think\n[1, 0, 1].", 3)
    for text in ("1, 0, 1", "[1, 0]", "[1, 2, 0]", "[1, 0, 1", "[]", "[1, -1, 0]", "[1, 0.5, 0]"):
        assert read(text, 3) is None
    assert read("[10, 0]", 2, highest=10) == [10, 0] and read("[11, 0]", 2, highest=10) is None
    assert questions.read_numbered("1. a\n2. b c\nx\n3)  d") == ["a", "b c", " d"]


def test_sentences_of_tokens_are_read_back():
    tokens = [" a", '"', "\n", "\\", "x, y", "<<"]
    assert quoted(sentence(tokens)) == tokens
    assert composed(" a b a", [" a", " b"]) and not composed(" a c", [" a", " b"]) and composed("", [])


def test_the_coin_answers_in_form_and_costs_what_a_model_would(subject):
    coin = CoinReader(0, name="gpt-4o-mini")
    found = explained(subject, Explainer(), coin)
    assert found.text and coin.name == "gpt-4o-mini"
    answer = asyncio.run(coin.complete(questions.simulate("x", [" a"] * 7), Params()))
    assert len(questions.read_digits(answer.text, 7, highest=10)) == 7


def test_an_error_of_the_literal_reader_is_a_share():
    with pytest.raises(ValueError, match="share"):
        LiteralReader(error=1.5)
