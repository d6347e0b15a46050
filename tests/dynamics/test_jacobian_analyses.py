"""What the directions of the digits perceptron of 1,210 weights do, and what of it must come out (arXiv:2412.07003)."""

import pytest
import torch
from torch import nn

from sonde.data.digits import digits
from sonde.dynamics.jacobian import TrainingJacobian
from sonde.dynamics.jacobian_analyses import (
    functional_effect,
    invariants,
    nested_masks,
    null_space,
    parameter_function,
    response,
    restricted,
    retrain,
)
from sonde.dynamics.jacobian_operators import membership, top_singular
from sonde.dynamics.jacobian_spectrum import Spectrum, overlap, overlaps
from sonde.dynamics.training_map import TrainingMap, batch_order
from sonde.dynamics.trajectory import record
from sonde.dynamics.update_rules import SGD, Adam
from sonde.errors import SondeError
from sonde.nets.mlp import MLP, MLPShape

pytestmark = pytest.mark.xdist_group("training-jacobian")


def recipe(data, seed=0, hidden=16, epochs=25, **fields):
    module = MLP(MLPShape((64, hidden, 10)), seed=seed, bias_sd=0.125)
    order = batch_order(1600, batch=64, epochs=epochs)
    return TrainingMap(module, data.train_x, data.train_y, order, **fields)


@pytest.fixture(scope="module")
def data():
    return digits()


@pytest.fixture(scope="module")
def trained(data):
    map = recipe(data)
    path = record(map)
    jacobian = TrainingJacobian(path)
    return map, path, jacobian, Spectrum.of(jacobian.dense())


def spectrum_of(map):
    return Spectrum.of(TrainingJacobian(record(map)).dense())


def test_half_of_the_spectrum_is_bulk_and_bulk_directions_stay_where_they_were(trained):
    map, path, jacobian, spectrum = trained
    assert 0.42 <= spectrum.fraction(0.1) <= 0.55
    bulk, rest = spectrum.alignment()[spectrum.order].split(map.n // 2)
    assert bulk.mean() > 0.95 > 0.7 > rest.mean()
    assert spectrum.displaced_share(map.start, path.end, map.n // 2) < 0.15
    inside = membership(jacobian, spectrum.directions("bulk", 40))
    assert inside.max() < 0.05 < 1 < membership(jacobian, spectrum.directions("chaotic", 40)).min()


def test_the_top_of_the_spectrum_needs_no_matrix(trained):
    _, _, jacobian, spectrum = trained
    torch.testing.assert_close(top_singular(jacobian, 8).sigma, spectrum.sigma[:8], rtol=1e-4, atol=0)


def test_the_bulk_is_invisible_on_digits_and_visible_far_from_them(trained, data):
    map, path, _, spectrum = trained
    noise = torch.randn(500, 64)
    found = functional_effect(map, path.end, spectrum.v, {"test": data.test_x, "noise": noise})
    bulk = (spectrum.sigma - 1).abs() < 0.1
    ratio = {name: effect.maximum[~bulk].median() / effect.maximum[bulk].median() for name, effect in found.items()}
    assert ratio["test"] >= 20
    assert ratio["noise"] <= 5
    assert all((effect.mean <= effect.maximum).all() for effect in found.values())


def test_the_bulk_belongs_to_the_inputs_and_not_to_the_seed(data):
    """Of 610 weights here; `sonde run training-jacobian` says it of 1,210."""
    spectrum = spectrum_of(recipe(data, hidden=8))
    half = [spectrum.n // 2]
    noise = data._replace(train_x=torch.rand(data.train_x.shape))
    assert overlaps(spectrum, spectrum_of(recipe(data, seed=1, hidden=8)), half)[0] >= 0.68
    assert overlaps(spectrum, spectrum_of(recipe(noise, hidden=8)), half)[0] <= 0.60


def test_the_bulk_is_what_digits_cannot_see_of_the_weights(trained, data):
    map, _, _, spectrum = trained
    half = map.n // 2
    bulk = spectrum.directions("bulk", half)
    test, noise = (
        overlap(null_space(parameter_function(map, map.start, x), half), bulk)
        for x in (data.test_x, torch.randn(197, 64))
    )
    assert test - noise >= 0.1


def test_training_fails_inside_the_bulk_and_not_inside_its_complement(trained, data):
    map, _, _, spectrum = trained
    masks = nested_masks([spectrum.ranked("bulk"), spectrum.ranked("complement")], [map.n // 4])
    rows, held = (data.train_x, data.train_y), (data.test_x, data.test_y)
    found = restricted(map, spectrum.v, masks, rows=rows, held=held)
    assert found.train_loss[0] >= 1.5 and found.train_loss[1] <= 0.15
    assert found.test_accuracy[1] > 0.9 > found.test_accuracy[0]


def test_a_bulk_direction_answers_linearly_to_steps_of_any_usual_size(trained, data):
    map, path, _, spectrum = trained
    i = [int(spectrum.order[map.n // 4])]
    scales = torch.logspace(-2, 1, 4)
    image = spectrum.u[:, i] * spectrum.sigma[i]
    found = response(map, path.end, spectrum.v[:, i], image, held=(data.test_x, data.test_y), scales=scales)
    torch.testing.assert_close(found.along, found.expected, rtol=0.02, atol=1e-4)
    assert (found.loss - found.loss[0, 0]).abs().max() < 0.02


@pytest.mark.parametrize("fields", [{}, {"clip": 0.5}], ids=["as one", "one by one"])
def test_many_trainings_end_where_each_ends_alone(fields, data):
    map = recipe(data, hidden=2, epochs=1, **fields)
    starts = map.start + 0.1 * torch.randn(3, map.n)
    alone = torch.stack([record(map, start=start).end for start in starts])
    torch.testing.assert_close(retrain(map, starts), alone, rtol=1e-4, atol=1e-5)


def test_a_training_that_diverges_leaves_the_others_alone(data):
    map = recipe(data, hidden=2, epochs=1)
    starts = torch.stack([map.start, torch.full_like(map.start, torch.nan)])
    ends = retrain(map, starts)
    torch.testing.assert_close(ends[0], record(map).end, rtol=1e-4, atol=1e-5)
    assert ends[1].isnan().any()


@pytest.mark.parametrize("rule", [SGD(), Adam()], ids=["sgd", "adam"])
def test_training_in_the_whole_space_is_training(rule, data):
    """In any basis for gradient descent; for Adam in the basis of the weights themselves."""
    map = recipe(data, hidden=2, epochs=1, rule=rule)
    basis = torch.eye(map.n) if isinstance(rule, Adam) else torch.linalg.qr(torch.randn(map.n, map.n)).Q
    held = (data.test_x, data.test_y)
    found = restricted(map, basis, nested_masks([torch.arange(map.n)], [map.n]), rows=held, held=held)
    expected, right = map.evaluate(record(map).end[None], *held)
    torch.testing.assert_close(found.test_loss, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.test_accuracy, right, rtol=0, atol=0.02)


def test_the_parameter_function_jacobian_of_a_linear_map_is_its_inputs():
    x = torch.randn(5, 3)
    map = TrainingMap(nn.Linear(3, 1, bias=False), x, torch.zeros(5, 1), [torch.arange(5)], loss=nn.functional.mse_loss)
    p = parameter_function(map, map.start, x[:2])
    torch.testing.assert_close(p, x[:2])
    unseen = null_space(p, 1)
    assert (p.double() @ unseen).abs().max() < 1e-6


def test_a_step_that_softmax_hides_has_no_effect(data):
    map = recipe(data, hidden=2, epochs=1)
    pixels, shifts = invariants(map)
    x = data.test_x.clone()
    found = functional_effect(map, map.start, torch.cat([shifts, pixels], 1), {"test": x})["test"]
    assert found.maximum.max() < 1e-5


def test_shapes_that_do_not_fit_are_refused(data):
    map = recipe(data, hidden=2, epochs=1)
    held = (data.test_x, data.test_y)
    v = torch.eye(map.n)[:, :2]
    with pytest.raises(SondeError, match=r"starts of shape \(3,\): give \[m, 160\]"):
        retrain(map, torch.zeros(3))
    with pytest.raises(SondeError, match="give two of"):
        response(map, map.start, v, v[:, :1], held=held)
    with pytest.raises(SondeError, match=r"directions of shape \(3, 1\)"):
        functional_effect(map, map.start, torch.zeros(3, 1), {})
    with pytest.raises(SondeError, match="at least one direction in every mask"):
        restricted(map, v, torch.zeros(1, 2, dtype=torch.bool), rows=held, held=held)
    with pytest.raises(SondeError, match="k is 161: give 1 to 160"):
        nested_masks([torch.arange(160)], [161])
    with pytest.raises(SondeError, match="k is 0: give 1 to 160"):
        null_space(torch.zeros(3, 160), 0)
    linear = TrainingMap(nn.Linear(64, 10), data.train_x, data.train_y, [torch.arange(8)])
    with pytest.raises(SondeError, match="Linear is no perceptron"):
        invariants(linear)
