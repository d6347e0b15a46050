"""Training prompts: one batch is many runs, the model stays as it is, and whatever happens is said and resumed."""

from pathlib import Path
from typing import Any

import families
import pytest
import torch

from sonde.errors import SondeError
from sonde.prompts import training
from sonde.prompts.evaluation import evaluate
from sonde.prompts.examples import Examples
from sonde.prompts.generation import generate
from sonde.prompts.objectives import LabelShift
from sonde.prompts.passes import Passes
from sonde.prompts.soft_prompt import SoftPrompt, embedding_rms
from sonde.prompts.training import Cosine, score_prompts, train_prompts

TARGET = [40, 41]


def examples(n: int = 6) -> Examples:
    return Examples([row[: 4 + i % 3] for i, row in enumerate(families.tokens(n, 8, seed=3).tolist())], [TARGET] * n)


@pytest.mark.parametrize("family", ["gpt_neox", "mamba", "recurrent_gemma", "qwen3_next"])
def test_training_comes_within_a_hundredth_of_a_nat_of_a_planted_hard_prompt(family: str) -> None:
    lm = families.model(family)
    before = {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}
    context = examples().contexts[:1]
    hard = SoftPrompt.from_tokens(lm, [17, 52, 33])
    planted = Examples(context, generate(lm, hard, context, max_new_tokens=2))
    trials = train_prompts(lm, planted, lengths=(0, 3), restarts=2, lrs=(0.3,), steps=40)
    assert [trial.length for trial in trials] == [0, 3, 3]
    found = evaluate(lm, [hard, *(trial.prompt for trial in trials)], planted)
    assert found.loss[1:].tolist() == pytest.approx([trial.validation for trial in trials], rel=1e-4)
    assert min(found.loss[2:]) <= found.loss[0] + 0.01 < found.loss[1]
    assert all(torch.equal(tensor, before[name]) for name, tensor in lm.model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in lm.model.parameters())


def test_a_grid_in_one_batch_is_its_entries_one_by_one() -> None:
    lm, given = families.model("gpt_neox"), examples()
    options: dict[str, Any] = {"validation": given, "restarts": 1, "steps": 5, "batch": 4}
    grid = train_prompts(lm, given, lengths=(1, 3), positions=("prefix", "suffix"), lrs=(0.1, 0.3), **options)
    for trial in grid:
        (alone,) = train_prompts(
            lm, given, lengths=(trial.length,), positions=(trial.position,), lrs=(trial.lr,), **options
        )
        torch.testing.assert_close(trial.prompt.vectors, alone.prompt.vectors, atol=1e-4, rtol=1e-3)
        assert trial.losses == pytest.approx(alone.losses, rel=1e-4)


def test_the_first_step_is_adams_on_the_gradient_of_the_mean_loss() -> None:
    lm, given = families.model("llama"), examples()
    start = SoftPrompt.from_tokens(lm, [10, 20])
    (trial,) = train_prompts(lm, given, validation=given, lengths=(2,), restarts=1, steps=1, batch=6, init=start)
    bank = start.vectors.clone().requires_grad_()
    passes = Passes(lm, given)
    scored = passes.score(bank, passes.rows(range(6), [2], ["suffix"]))
    scored.nats.mean().backward()
    assert trial.losses == pytest.approx([scored.nats.mean().item()], rel=1e-5)
    assert bank.grad is not None
    step = -0.3 * embedding_rms(lm) * Cosine().factor(0, 1) * bank.grad.sign()
    if trial.best_step:
        torch.testing.assert_close(trial.prompt.vectors, start.vectors + step, atol=1e-4, rtol=1e-3)


def test_the_best_step_on_validation_is_kept() -> None:
    lm, given = families.model("gpt_neox"), examples()
    (trial,) = train_prompts(
        lm, given, validation=given, lengths=(2,), restarts=1, lrs=(30.0,), steps=20, validations=20
    )
    again = float(score_prompts(Passes(lm, given), [trial.prompt]).mean())
    assert again == pytest.approx(trial.validation, rel=1e-4)
    assert trial.validation <= min(trial.losses) + 1e-3


def test_a_longer_prompt_that_grows_starts_as_the_best_shorter_one() -> None:
    lm, given = families.model("gpt_neox"), examples()
    trials = train_prompts(
        lm, given, validation=given, lengths=(4, 1, 0), restarts=2, steps=15, init="grow", positions=("suffix",)
    )
    assert [(t.length, t.restart) for t in trials] == [(4, 0), (4, 1), (1, 0), (1, 1), (0, 0)]
    assert max(t.validation for t in trials[:2]) < min(t.validation for t in trials[2:4])


def test_a_rate_too_large_stops_that_prompt_alone_and_says_when() -> None:
    lm, given = families.model("gpt_neox"), examples()

    def fragile(scored):
        return torch.where(scored.nats.amax(1) > 60, torch.nan, scored.nats.mean(1))

    calm, wild = train_prompts(
        lm, given, validation=given, lengths=(2,), restarts=1, lrs=(0.1, 1e30), steps=6, objective=fragile
    )
    assert calm.stopped == "" and len(calm.losses) == 6
    assert wild.stopped.startswith("the loss was no number at step 1 with learning rate 1e+30 r = ")
    assert wild.prompt.vectors.isfinite().all() and len(wild.losses) == 1 and wild.validation < 60


def test_training_ends_when_every_prompt_is_stopped() -> None:
    lm, given = families.model("gpt_neox"), examples()
    (trial,) = train_prompts(lm, given, validation=given, lengths=(1,), restarts=1, lrs=(float("inf"),), steps=50)
    assert trial.stopped and len(trial.losses) == 1


def test_an_interrupted_training_ends_with_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, given = families.model("gpt_neox"), examples()
    options: dict[str, Any] = {
        "validation": given,
        "lengths": (1, 2),
        "restarts": 2,
        "steps": 8,
        "batch": 3,
        "positions": ("random",),
    }
    whole = train_prompts(lm, given, **options)

    def dies(bank, loss, optimizers, **settings):
        def failing(step):
            if step == 5:
                raise KeyboardInterrupt
            return loss(step)

        return real(bank, failing, optimizers, **{**settings, "every": 2})

    real = training.train
    monkeypatch.setattr(training, "train", dies)
    with pytest.raises(KeyboardInterrupt):
        train_prompts(lm, given, **options, checkpoint=tmp_path / "grid.safetensors")
    monkeypatch.setattr(training, "train", real)
    resumed = train_prompts(lm, given, **options, checkpoint=tmp_path / "grid.safetensors")
    for a, b in zip(whole, resumed, strict=True):
        assert torch.equal(a.prompt.vectors, b.prompt.vectors) and a.losses == b.losses
        assert (a.validation, a.best_step) == (b.validation, b.best_step)
    with pytest.raises(SondeError, match="belongs to another configuration"):
        train_prompts(lm, given, **{**options, "steps": 9}, checkpoint=tmp_path / "grid.safetensors")
    with pytest.raises(SondeError, match="belongs to another configuration"):
        train_prompts(lm, given, **options, objective=LabelShift(1), checkpoint=tmp_path / "grid.safetensors")


def test_a_fifth_of_the_contexts_is_held_out_when_nothing_is_given() -> None:
    given = examples(10)
    kept, held = training.held_out(given, 0)
    assert (len(kept), len(held)) == (8, 2)
    assert not {tuple(c) for c in kept.contexts} & {tuple(c) for c in held.contexts}
    one = Examples([[5]], [[6, 7]])
    assert training.held_out(one, 0) == (one, one)


def test_an_empty_grid_is_refused() -> None:
    lm = families.model("gpt_neox")
    wrongs: tuple[dict[str, Any], ...]
    wrongs = ({"lengths": ()}, {"restarts": 0}, {"steps": 0}, {"lrs": (-1.0,)}, {"lengths": (-1,)})
    for wrong in wrongs:
        with pytest.raises(SondeError, match="nothing to train"):
            train_prompts(lm, examples(), **wrong)
    with pytest.raises(SondeError, match="a prompt of 126 and 8 tokens of text are 134, more than the 128 positions"):
        train_prompts(lm, examples(), lengths=(126,))
