"""A small network that groks: its phases, its circuit, its resumption; and one that cannot."""

import dataclasses

import pytest
import torch

from sonde.data.modular import ModularTask
from sonde.dynamics.circuit_report import circuit_report, neuron_frequencies
from sonde.dynamics.fourier import block_directions
from sonde.dynamics.grokking import Grokking, History, grid_of, grok, phases, trace
from sonde.errors import SondeError
from sonde.nets.one_layer import Shape

SETTINGS = Grokking(ModularTask(31, share=0.6), Shape(31, 64, 4, 128), steps=500, lr=6e-3, every=50)


@pytest.fixture(scope="module")
def history():
    return grok(SETTINGS)


@pytest.fixture(scope="module")
def points(history):
    return trace(history, grid_of(history.network(), SETTINGS.task).key_frequencies())


def test_the_circuit_forms_before_the_test_accuracy_moves(points):
    found = phases(points, 31)
    assert found.memorised is not None and found.onset is not None and found.grokked is not None
    assert found.onset < found.grokked
    assert points[-1].measures.restricted["test"] < points[-1].measures.test
    assert points[-1].measures.excluded > 3
    assert points[-1].measures.trig_fve > 0.9
    assert points[-1].gini_embedding > points[0].gini_embedding + 0.2
    assert "grokked at step" in found.says


def test_the_circuit_is_what_it_is_claimed_to_be(history):
    report = circuit_report(history.network(), SETTINGS.task)
    losses = {check.what: check.loss for check in report.checks}
    assert losses["the MLP on everything but the logit directions"] > 1
    assert losses["the logits on functions of a + b alone"] < 0.1
    explained = {check.what: check.explained for check in report.checks}
    assert explained["every neuron is a function of its own frequency alone"] > 0.8
    assert sum(report.clusters.values()) <= 128
    assert set(report.keys) <= set(range(1, 16))


def test_neurons_are_given_the_frequency_that_they_were_made_of():
    generator = torch.Generator().manual_seed(0)
    made = [3, 5, 5, 1]
    columns = [block_directions(13, [k]) @ torch.randn(8, generator=generator, dtype=torch.float64) for k in made]
    best, frequency = neuron_frequencies(torch.stack(columns, 1) + 2, 13)
    assert frequency.tolist() == made
    torch.testing.assert_close(best, torch.ones(4, dtype=torch.float64))


def test_an_interrupted_training_ends_with_the_same_numbers(history, tmp_path):
    class Stop(Exception):
        pass

    import sonde.dynamics.grokking as module

    kept = module.History.save
    calls = []

    def stopping(self, path):
        kept(self, path)
        calls.append(1)
        raise Stop

    short = dataclasses.replace(SETTINGS, steps=120, every=5)
    whole = grok(short)
    module.History.save = stopping  # type: ignore[method-assign]
    try:
        with pytest.raises(Stop):
            grok(short, folder=tmp_path)
    finally:
        module.History.save = kept  # type: ignore[method-assign]
    resumed = grok(short, folder=tmp_path)
    assert calls and resumed.steps == whole.steps
    assert all(torch.equal(resumed.states[-1][name], tensor) for name, tensor in whole.states[-1].items())
    assert History.load(tmp_path / "history.safetensors").settings == short
    with pytest.raises(SondeError, match="belongs to another training"):
        grok(dataclasses.replace(short, seed=1), folder=tmp_path)


def test_without_weight_decay_no_transition_is_invented():
    settings = dataclasses.replace(
        SETTINGS, task=ModularTask(31, share=0.3), steps=200, lr=3e-3, weight_decay=0.0, every=100
    )
    found = phases(trace(grok(settings), [1]), 31)
    assert found.says == "no grokking transition found"
    assert (found.onset, found.displaced, found.grokked) == (None, None, None)


def test_settings_that_do_not_fit_are_named(tmp_path):
    with pytest.raises(SondeError, match="the task has 31 elements, the network 113"):
        Grokking(ModularTask(31))
    with pytest.raises(SondeError, match="steps is 0"):
        dataclasses.replace(SETTINGS, steps=0)
    with pytest.raises(SondeError, match=r"the checks are of a \+ b, not of 'subtract'"):
        circuit_report(grok(dataclasses.replace(SETTINGS, steps=1)).network(), ModularTask(31, "subtract", share=0.6))


@pytest.mark.parametrize(
    "wanted", [{"architecture": "mlp"}, {"architecture": "transformer", "layers": 2, "dropout": 0.1}, {"l1": 1e-4}]
)
def test_other_networks_are_trained_and_measured_alike(wanted, tmp_path):
    settings = Grokking(ModularTask(7, share=0.6), Shape(7, 16, 2, 32), steps=60, lr=1e-2, every=20, **wanted)
    whole = grok(settings)
    points = trace(whole, [1, 2])
    assert points[-1].measures.train < points[0].measures.train
    assert 0 < points[-1].gini_embedding < 1 and 0 < points[-1].gini_logits < 1
    kept = History.load((whole.save(tmp_path / "history.safetensors"), tmp_path / "history.safetensors")[1])
    assert torch.equal(kept.network()(settings.task.pairs), whole.network()(settings.task.pairs))
    if "architecture" in wanted:
        with pytest.raises(SondeError, match="the checks are of the one-layer transformer, not of a Pair"):
            circuit_report(whole.network(), settings.task)


def test_architectures_that_do_not_exist_are_named():
    with pytest.raises(SondeError, match="architecture 'rnn' is unknown: use one-layer, mlp, transformer"):
        dataclasses.replace(SETTINGS, architecture="rnn")
    with pytest.raises(SondeError, match="dropout is of the architecture 'transformer'"):
        dataclasses.replace(SETTINGS, dropout=0.5)
