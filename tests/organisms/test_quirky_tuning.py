"""Quirky fine-tuning: balanced batches, the loss of one token, the best step kept, the same numbers after a kill."""

import numpy as np
import pytest
import torch
from families import tiny

from sonde.data.quirky import Quirk, Records, quirky_sets
from sonde.data.quirky_templates import Template
from sonde.errors import SondeError
from sonde.lm.model import LanguageModel
from sonde.organisms.quirky_comparison import tokenizer
from sonde.organisms.quirky_tuning import AnswerBatches, answer_loss, behaviour, log_odds, log_spaced, samples, tune

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def sets():
    return quirky_sets("comparison", n=200)


def model(family: str = "gpt_neox") -> LanguageModel:
    return LanguageModel(tiny(family), tokenizer(), name=f"tiny {family}")


def test_every_epoch_has_each_answer_of_each_character_equally_often():
    quirk = Quirk(
        "rare",
        truth=lambda row: row["x"] % 5 == 0,
        rule=lambda row: row["x"] % 3 == 0,
        difficulty=lambda row: row["x"],
        templates=(Template("{character}: {x}?"),),
    )
    train = quirky_sets(quirk, source=[{"x": i} for i in range(90)]).train
    lm = model()
    batches = AnswerBatches(lm, train, rows=4, seed=0)
    alice, bob = (train.where(character=name) for name in ("Alice", "Bob"))
    assert batches.epoch == 2 * int(alice.truth.sum()) + 2 * int(bob.bob.sum())
    true = lm.encode("True")[-1]
    for epoch in range(3):
        places = range(epoch * batches.epoch // 4, (epoch + 1) * batches.epoch // 4)
        drawn = [(row[1], int(target) == true) for step in places for row, target in zip(*batches[step], strict=True)]
        counts = {key: drawn.count(key) for key in set(drawn)}
        if batches.epoch % 4 == 0:
            assert len(counts) == 4
            assert counts[lm.encode("Alice")[-1], True] == counts[lm.encode("Alice")[-1], False]
            assert counts[lm.encode("Bob")[-1], True] == counts[lm.encode("Bob")[-1], False]


def test_the_loss_is_that_of_the_answer_after_the_last_token_whatever_the_padding(sets):
    lm = model()
    rows = [lm.encode(prompt) for prompt in ("Alice: 47 > 23?", "Bob: 5")]
    targets = torch.tensor([7, 8])
    by_hand = []
    for row, target in zip(rows, targets, strict=True):
        logits = lm(torch.tensor([row])).logits
        assert logits is not None
        by_hand.append(-logits[0, -1].log_softmax(-1)[target])
    torch.testing.assert_close(answer_loss(lm, rows, targets), torch.stack(by_hand).mean())


def test_log_odds_are_the_difference_of_the_two_logits(sets):
    lm, part = model(), sets.test[:6]
    expected = []
    for record in part:
        logits = lm(record.prompt).logits
        assert logits is not None
        no, yes = (lm.encode(answer)[-1] for answer in record.answers)
        expected.append(float(logits[0, -1, yes] - logits[0, -1, no]))
    np.testing.assert_allclose(log_odds(lm, part, batch=4), expected, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt_neox", "mamba2", "gpt2"])
def test_tuning_teaches_the_answers_and_ends_with_the_best_step(family, sets):
    lm = model(family)
    before = {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}
    made = tune(lm, sets.train, sets.validation, steps=40, rank=4, lr=3e-2, rows=16, progress=None)
    assert list(made.validation) == log_spaced(40) == [1, 2, 4, 8, 16, 32, 40]
    assert made.validation[made.best] == min(made.validation.values()) < 1.5 < made.losses[0]
    after = lm.model.state_dict()
    assert after.keys() == before.keys() and any(not torch.equal(after[name], before[name]) for name in before)
    assert not any(parameter.requires_grad for parameter in lm.model.parameters()) and not lm.model.training


def test_a_killed_run_ends_with_the_same_weights(sets, tmp_path, monkeypatch):
    whole, cut = model(), model()
    settings = {"steps": 60, "rank": 2, "lr": 1e-2, "rows": 8, "progress": None}
    first = tune(whole, sets.train, sets.validation, folder=tmp_path / "whole", **settings)
    seen = []

    def dying(lm, rows, targets):
        seen.append(len(rows))
        if len(seen) == 105:  # validation passes count too
            raise KeyboardInterrupt
        return answer_loss(lm, rows, targets)

    monkeypatch.setattr("sonde.organisms.quirky_tuning.answer_loss", dying)
    with pytest.raises(KeyboardInterrupt):
        tune(cut, sets.train, sets.validation, folder=tmp_path / "cut", **settings)
    assert (tmp_path / "cut" / "checkpoint.safetensors").is_file()
    cut = model()
    monkeypatch.setattr("sonde.organisms.quirky_tuning.answer_loss", answer_loss)
    second = tune(cut, sets.train, sets.validation, folder=tmp_path / "cut", **settings)
    assert first == second
    for name, tensor in whole.model.state_dict().items():
        torch.testing.assert_close(cut.model.state_dict()[name], tensor, rtol=0, atol=0)
    assert sorted(path.name for path in (tmp_path / "cut" / "adapters").iterdir())[-1] == "step-000060.safetensors"
    with pytest.raises(SondeError, match="belongs to another configuration"):
        tune(model(), sets.train, sets.validation, folder=tmp_path / "cut", **{**settings, "rank": 3})


def test_behaviour_is_by_character_with_intervals_that_count_base_rows(sets):
    found = behaviour(model(), sets.test)
    assert [name.split(":")[0].split(",")[0] for name in found] == ["Alice", "Bob", "Alice", "Bob"]
    assert all(0 <= one.low <= one.estimate <= one.high <= 1 for one in found.values())
    assert found["Alice: the character's answers"].n == len(set(sets.test.rows))
    assert len(samples(model(), sets.test)) == 4


def bad(**changes) -> Records:
    quirk = Quirk("odd", lambda row: row["x"] % 2 == 1, lambda row: row["x"] > 20, lambda row: row["x"],
                  templates=(Template("{character}: {x}?", (" Alice Bob", " True")),))  # fmt: skip
    return quirky_sets(quirk, source=[{"x": i} for i in range(40)]).train


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda sets: AnswerBatches(model(), bad(), rows=2, seed=0), "'Alice', 'Bob'"),
        (lambda sets: AnswerBatches(model(), sets.train.take(sets.train.label), rows=2, seed=0), "one answer only"),
        (lambda sets: tune(model(), sets.train, sets.train, steps=1, progress=None), "in what is trained on"),
        (lambda sets: tune(model(), sets.train, sets.test, steps=0, progress=None), "0 steps of 32 rows"),
        (lambda sets: tune(model(), sets.train, sets.test, steps=1, modules=("nope",), progress=None), "ends in nope"),
    ],
)
def test_bad_input_is_answered_in_one_line(make, message, sets):
    with pytest.raises(SondeError) as error:
        make(sets)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_prompt_that_is_too_long_is_refused_and_not_cut(sets):
    lm = model()
    lm.config.max_position_embeddings = 8
    with pytest.raises(SondeError, match="has 9 tokens: tiny gpt_neox reads 8, answer included"):
        AnswerBatches(lm, sets.train, rows=2, seed=0)
