"""Training as a map: what makes it one, and what is refused because it does not."""

import pytest
import torch
from torch import nn

from sonde.dynamics.training_map import CONSTANT, TrainingMap, batch_order
from sonde.dynamics.trajectory import record
from sonde.dynamics.update_rules import SGD, Adam
from sonde.errors import SondeError
from sonde.nets.mlp import MLP, MLPShape

_X = torch.randn(24, 3, generator=torch.Generator().manual_seed(1))
_Y = torch.arange(24) % 4


def small(module=None, **fields):
    order = batch_order(24, batch=8, epochs=4)
    return TrainingMap(module or MLP(MLPShape((3, 5, 4))), _X, _Y, **{"order": order, **fields})


def test_batches_are_the_same_every_epoch_or_shuffled_by_seed():
    plain = batch_order(6, batch=3, epochs=2)
    assert [rows.tolist() for rows in plain] == [[0, 1, 2], [3, 4, 5]] * 2
    mixed = batch_order(6, batch=3, epochs=2, shuffle=3)
    assert sorted(torch.cat(mixed[:2]).tolist()) == list(range(6))
    assert all(a.equal(b) for a, b in zip(mixed, batch_order(6, batch=3, epochs=2, shuffle=3), strict=True))


def test_rows_that_fill_no_batch_are_dropped_or_ragged_but_never_silently():
    with pytest.raises(SondeError, match="leave 1 of 7 rows over: choose rest='drop' or rest='ragged'"):
        batch_order(7, batch=3, epochs=1)
    assert [len(rows) for rows in batch_order(7, batch=3, epochs=2, rest="drop")] == [3, 3, 3, 3]
    assert [len(rows) for rows in batch_order(7, batch=3, epochs=1, rest="ragged")] == [3, 3, 1]
    with pytest.raises(SondeError, match="batches of 8 out of 7 rows"):
        batch_order(7, batch=8, epochs=1)


def test_dropout_needs_a_seed_and_then_repeats_itself():
    module = nn.Sequential(nn.Linear(3, 6), nn.Dropout(0.5), nn.Linear(6, 4))
    with pytest.raises(SondeError, match=r"not deterministic.*pass seed=…"):
        small(module)
    map = small(module, seed=3)
    assert record(map).end.equal(record(map).end)
    assert not record(map).end.equal(record(small(module, seed=50)).end)


def test_an_order_that_is_not_recorded_is_refused():
    with pytest.raises(SondeError, match=r"not deterministic: pass order=…, a list .* not RandomSampler"):
        small(order=torch.utils.data.RandomSampler(range(24)))
    with pytest.raises(SondeError, match="rows that do not exist"):
        small(order=[torch.tensor([24])])
    with pytest.raises(SondeError, match="order is empty"):
        small(order=[])


def test_half_precision_is_refused():
    with pytest.raises(SondeError, match=r"layers.0.weight is bfloat16.*call module.float"):
        small(MLP(MLPShape((3, 5, 4))).bfloat16())


def test_running_statistics_are_refused():
    with pytest.raises(SondeError, match="1 keeps running statistics"):
        small(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))


def test_kinks_are_named_in_a_warning():
    with pytest.warns(UserWarning, match=r"kinks \(Relu\)"):
        small(MLP(MLPShape((3, 5, 4), "relu")))
    with pytest.warns(UserWarning, match=r"kinks \(MaxPool2D"):
        small(nn.Sequential(nn.Linear(3, 8), nn.Unflatten(1, (1, 8)), nn.MaxPool1d(2), nn.Flatten()))


def test_a_diverged_training_says_step_and_loss():
    with pytest.raises(SondeError, match=r"the loss became (nan|inf) at step \d+"):
        record(small(rule=SGD(lr=1e30), schedule=CONSTANT))


@pytest.mark.parametrize("rule", [SGD(nesterov=True, l2=0.01), Adam(decoupled=0.1)], ids=["sgd", "adam"])
def test_a_sparse_path_recomputes_the_steps_between_snapshots(rule):
    full, sparse = (record(small(rule=rule, clip=0.5), stride=stride) for stride in (1, 5))
    assert set(sparse.snapshots) == {0, 5, 10, 12}
    for step in (*range(13), 7, 3):
        torch.testing.assert_close(sparse[step].theta, full[step].theta)
        for mine, other in zip(sparse[step].moments, full[step].moments, strict=True):
            torch.testing.assert_close(mine, other)


def test_an_interrupted_recording_goes_on(tmp_path):
    file = tmp_path / "training.safetensors"
    first = record(small(), checkpoint=file)
    again = record(small(), checkpoint=file)
    assert again.end.equal(first.end) and set(again.snapshots) == set(first.snapshots)
    with pytest.raises(SondeError, match="another configuration"):
        record(small(rule=SGD(lr=0.2)), checkpoint=file)
