"""Distances from n-gram models: exact where the network is one, at the right position, over any series."""

import itertools

import numpy as np
import pytest
import torch
from families import tiny

from sonde.dynamics.ngram_stages import (
    Yardsticks,
    checkpoints_in,
    logits_of,
    lowest,
    measure,
    shuffled,
    step_of,
    trace,
)
from sonde.errors import SondeError
from sonde.lm.model import LanguageModel
from sonde.stats.ngram import NgramModel

V = 6
LENGTH = 20


def text(seed: int, rows: int = 60) -> np.ndarray:
    """A source of order 3: the next token depends on the last two."""
    rng = np.random.default_rng(seed)
    table = np.random.default_rng(0).dirichlet(np.full(V, 0.3), size=(V, V)).cumsum(-1)
    out = rng.integers(V, size=(rows, LENGTH + 1))
    for t in range(2, LENGTH + 1):
        out[:, t] = (rng.random((rows, 1)) > table[out[:, t - 2], out[:, t - 1], :-1]).sum(-1)
    return out


@pytest.fixture(scope="module")
def counted() -> NgramModel:
    return NgramModel.fit(text(1, 400), vocab_size=V, order=3)


@pytest.fixture(scope="module")
def yardsticks(counted) -> Yardsticks:
    models = {str(n): (counted, n) for n in (1, 2, 3)}
    return Yardsticks.build(models, torch.from_numpy(text(2)), sampled=("1", "2", "3"), sequences=300, seed=3)


def network_of(model: NgramModel, order: int, late: int = 0):
    """A network whose logits at t are those of the n-gram model after the tokens up to t - late."""
    contexts = np.array(list(itertools.product(range(V), repeat=order - 1)), dtype=np.int64).reshape(
        V ** (order - 1), order - 1
    )
    table = model.rows(contexts, order=order).dense().log()

    def network(tokens: torch.Tensor) -> torch.Tensor:
        context = torch.zeros_like(tokens)
        for back in range(late, late + order - 1):
            seen = torch.zeros_like(tokens)
            seen[:, back:] = tokens[:, : tokens.shape[1] - back]
            context += V ** (back - late) * seen
        return table[context]

    return network


@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_network_that_is_an_ngram_model_is_at_no_distance_from_it_and_from_no_other(counted, yardsticks, order):
    found = measure(network_of(counted, order), yardsticks)
    for name in yardsticks.predictions:
        kl, js = found["kl"][name], found["js"][name]
        assert len(kl) == 60
        if name == str(order):
            assert kl.abs().max() < 1e-5 and js.abs().max() < 1e-5
        else:
            assert kl.mean() > 0.05 and js.mean() > 0.01


def test_a_prediction_that_comes_one_token_late_is_not_mistaken_for_the_right_one(counted, yardsticks):
    found = measure(network_of(counted, 2, late=1), yardsticks, jensen_shannon=False)
    assert found["kl"]["2"].mean() > 0.05
    assert found["js"] == {}


def test_loss_on_samples_is_at_least_the_entropy_and_reaches_it(counted, yardsticks):
    entropies = [yardsticks.entropies[name] for name in "123"]
    assert entropies == sorted(entropies, reverse=True)
    own = measure(network_of(counted, 2), yardsticks, jensen_shannon=False)
    assert own["sampled"]["2"].mean() == pytest.approx(yardsticks.entropies["2"], abs=0.03)
    assert own["sampled"]["1"].mean() > yardsticks.entropies["1"] + 0.05
    assert own["by_position"]["2"].shape == (LENGTH,)
    assert own["by_position"]["2"].mean() == pytest.approx(float(own["sampled"]["2"].mean()))


def test_any_series_of_steps_and_networks_is_traced(counted, yardsticks):
    series = ((step, network_of(counted, order)) for step, order in ((1, 1), (10, 2), (100, 3)))
    found = trace(series, yardsticks)
    for name, step in (("1", 1), ("2", 10), ("3", 100)):
        assert lowest({s: float(tree["kl"][name].mean()) for s, tree in found.items()}) == step


def test_a_padded_vocabulary_is_refused_with_both_sizes_until_it_is_sliced(counted, yardsticks):
    plain = network_of(counted, 1)

    def padded(tokens: torch.Tensor) -> torch.Tensor:
        logits = plain(tokens)
        return torch.cat([logits, torch.full((*logits.shape[:2], 2), -50.0)], -1)

    with pytest.raises(SondeError, match="over 8 tokens and the counts are over 6"):
        measure(padded, yardsticks)
    assert measure(padded, yardsticks, vocab=V)["kl"]["1"].abs().max() < 1e-5


def test_a_language_model_is_measured_like_a_network():
    lm = LanguageModel(tiny("gpt2"))
    ids = np.random.default_rng(0).integers(lm.vocab_size, size=(8, 12))
    model = NgramModel.fit(ids, vocab_size=lm.vocab_size, order=2)
    held = Yardsticks.build({"2": (model, 2)}, torch.from_numpy(ids[:3]))
    found = measure(logits_of(lm), held)
    with torch.no_grad():
        logits = lm.model(input_ids=torch.from_numpy(ids[:3, :-1])).logits
    expected = model.rows(ids[:3, 1:-1].reshape(-1, 1)).kl(logits[:, 1:].flatten(0, 1)).view(3, -1).mean(1)
    torch.testing.assert_close(found["kl"]["2"], expected)


def test_checkpoints_are_found_by_name_and_ordered_by_step(tmp_path):
    for name in ("step1000", "checkpoint-20", "step3", "step-without", "other7"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "step5").mkdir()
    assert [step for step, _ in checkpoints_in(tmp_path)] == [3, 20, 1000]
    assert checkpoints_in(tmp_path / "nowhere") == []
    assert (step_of("global_step20-hf"), step_of("main")) == (20, None)


def test_shuffled_text_has_the_same_tokens_and_rows_too_short_are_refused(counted):
    ids = text(4)
    mixed = shuffled(ids)
    assert mixed.shape == ids.shape and (np.sort(mixed.ravel()) == np.sort(ids.ravel())).all() and (mixed != ids).any()
    with pytest.raises(SondeError, match="rows of more than 3 tokens"):
        Yardsticks.build({"3": (counted, 3)}, torch.zeros(4, 3, dtype=torch.long))
