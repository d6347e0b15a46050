"""Components of groups: known ones by dimension, invariant, and the measures on a planted circuit."""

import dataclasses
import math

import pytest
import torch

from sonde.data.groups import GroupTask, group_table
from sonde.data.modular import ModularTask
from sonde.dynamics.fourier import block_directions, sum_directions
from sonde.dynamics.grokking import Grokking, grid_of, grok, trace
from sonde.dynamics.harmonics import Harmonics
from sonde.dynamics.progress_measures import Grid, measures
from sonde.errors import SondeError
from sonde.nets.one_layer import Shape


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("s3", [1, 4]),  # sign; the plane
        ("s4", [1, 4, 9, 9]),
        ("d5", [1, 4, 4]),
        ("d4", [1, 1, 1, 4]),
        ("c7", [2, 2, 2]),
        ("c6", [1, 2, 2]),
    ],
)
def test_components_are_those_of_the_known_representations(name, sizes):
    found = Harmonics.of_group(group_table(name), name=name)
    assert [q.shape[1] for q in found.components.values()] == sizes
    every = torch.cat([torch.full((found.order, 1), found.order**-0.5), *found.components.values()], 1)
    torch.testing.assert_close(every.T @ every, torch.eye(found.order, dtype=torch.float64))


@pytest.mark.parametrize("name", ["d5", "s4", "c6"])
def test_no_translation_leaves_a_component(name):
    table = group_table(name)
    for q in Harmonics.of_group(table).components.values():
        projector = q @ q.T
        for g in range(len(table)):
            for moved in (table[g], table[:, g]):
                torch.testing.assert_close(projector[moved][:, moved], projector)


def test_a_cyclic_group_has_the_frequencies_of_its_sums():
    by_group, by_sum = Harmonics.of_group(group_table("c11")), Harmonics.modulo(11)
    for q in by_group.components.values():
        inside = [float((q.T @ other).square().sum()) for other in by_sum.components.values()]
        assert sorted(inside) == pytest.approx([0, 0, 0, 0, 2], abs=1e-9)


@pytest.mark.parametrize("p", [11, 12])
def test_projections_are_those_of_the_directions(p):
    found, ks = Harmonics.modulo(p), [1, 4]
    logits = torch.randn(p * p, p, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sums, blocks = sum_directions(p, ks), block_directions(p, ks)
    torch.testing.assert_close(found.project(logits, ks), sums @ (sums.T @ logits))
    torch.testing.assert_close(found.project_wide(logits, ks), blocks @ (blocks.T @ logits))
    assert list(found.components) == [*range(1, (p - 1) // 2 + 1), *([p // 2] if p % 2 == 0 else [])]


def test_the_measures_find_a_planted_circuit_that_does_not_commute():
    task = GroupTask("s4", share=0.5)
    harmonics = Harmonics.of_group(task.table, name="the group S4")
    flat = task.table.flatten()
    circuit = 6.0 * harmonics.kernel(4)[flat] + 3.0 * harmonics.kernel(2)[flat]
    memory = 20.0 * torch.nn.functional.one_hot(task.labels, 24).double() * task.trained[:, None]
    grid = Grid(24, circuit, task.labels, task.trained, harmonics)
    assert grid.accuracy() == 1
    assert grid.key_frequencies() == (4, 2)
    alone = measures(grid, [4, 2])
    assert alone.trig_coefficients == pytest.approx({4: 6.0, 2: 3.0})
    assert alone.trig_fve == pytest.approx(1)
    assert alone.excluded == pytest.approx(math.log(24))
    assert alone.restricted["test"] == pytest.approx(alone.test)
    both = measures(dataclasses.replace(grid, logits=circuit + memory), [4, 2])
    assert both.excluded < 0.2
    assert both.restricted["test"] < 0.5 * math.log(24)
    with pytest.raises(SondeError, match="component 9 does not exist of the group S4: it has 1 to 4"):
        measures(grid, [9])


def test_differences_have_frequencies_of_their_own():
    task = ModularTask(13, "subtract", share=0.5)
    a, b = task.pairs.double().unbind(1)
    angle = 2 * math.pi * 3 / 13 * ((a - b)[:, None] - torch.arange(13))

    class Planted(torch.nn.Module):
        def forward(self, pairs):
            return 5 * angle.cos()

    assert grid_of(Planted(), task).key_frequencies() == (3,)


def test_a_network_that_groks_permutations_answers_by_two_components():
    task = GroupTask("s4", share=0.7)
    settings = Grokking(task, Shape(24, 64, 4, 128), steps=2500, lr=1e-2, weight_decay=2.0, every=250)
    history = grok(settings)
    grid = grid_of(history.network(), task)
    keys = grid.key_frequencies()
    last = trace(history, keys)[-1].measures
    assert last.accuracy_test > 0.95
    assert set(keys) <= {1, 2, 3, 4} and len(keys) < 4
    assert last.restricted["test"] < last.test
    assert last.excluded > 4
