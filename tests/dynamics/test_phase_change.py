"""Endless data against a fixed set, and how a training is read."""

import pytest

from sonde.data.sequence_tasks import SkipTrigram
from sonde.dynamics.phase_change import Arm, Look, Training, change, learn
from sonde.errors import SondeError
from sonde.nets.transformer import TransformerShape

TASK = SkipTrigram(classes=4, fillers=4, length=6)
SHAPE = TransformerShape(TASK.vocab, 32, 1, 4, TASK.length, 0, layer_norm=False)


def test_a_sudden_fall_is_read_with_its_delay():
    steps = (0, 1, 2, 4, 8, 16, 32, 64)
    tests = (3.0, 3.0, 3.0, 2.9, 2.9, 2.9, 0.2, 0.0)
    looks = [
        Look(step, 3.0 if step < 4 else 0.1, test, 1.0 if test < 1 else 0.1)
        for step, test in zip(steps, tests, strict=True)
    ]
    found = change(looks)
    assert (found.memorised, found.learned, found.delay) == (4, 32, 8.0)
    assert found.sharpest == pytest.approx(0.9)


def test_a_slow_fall_has_no_sharp_doubling_and_no_step_is_invented():
    looks = [Look(0, 2.0, 2.0, 0.1)] + [Look(2**i, 2 - 0.1 * i, 2 - 0.1 * i, 0.2) for i in range(8)]
    found = change(looks)
    assert (found.memorised, found.learned, found.delay) == (None, None, None)
    assert found.sharpest == pytest.approx(1 / 7)
    with pytest.raises(SondeError, match="2 looks"):
        change(looks[:2])


def test_endless_data_teach_a_rule_and_two_examples_are_memorised():
    training = Training(SHAPE, steps=300, batch=64, lr=1e-2, test=256)
    endless = learn(TASK, Arm(None, 0.0), training)
    assert endless[-1].accuracy > 0.95
    few = learn(TASK, Arm(2, 0.0), training)
    assert few[-1].train < 0.01
    assert few[-1].accuracy < 0.8
    assert [look.step for look in few][:5] == [0, 1, 2, 3, 4]
    assert change(endless).learned is not None


def test_an_interrupted_training_sees_the_same(tmp_path):
    training = Training(SHAPE, steps=40, batch=8, test=16)
    whole = learn(TASK, Arm(20), training)
    path = tmp_path / "checkpoint.safetensors"
    assert learn(TASK, Arm(20), training, checkpoint=path) == whole
    assert learn(TASK, Arm(20), training, checkpoint=path) == whole
    with pytest.raises(SondeError, match="another configuration"):
        learn(TASK, Arm(21), training, checkpoint=path)


def test_what_cannot_be_trained_is_refused():
    with pytest.raises(SondeError, match="0 examples are none"):
        learn(TASK, Arm(0), Training(SHAPE))
    with pytest.raises(SondeError, match="too small"):
        Training(SHAPE, steps=1)
