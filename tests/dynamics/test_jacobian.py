"""The training Jacobian against closed forms, finite differences, generic autodiff and its own transpose."""

import math

import pytest
import torch
from torch import nn
from torch.func import jacrev

from sonde.data.digits import digits
from sonde.dynamics.jacobian import TrainingJacobian
from sonde.dynamics.jacobian_analyses import invariants
from sonde.dynamics.jacobian_spectrum import Spectrum
from sonde.dynamics.training_map import CONSTANT, TrainingMap, batch_order
from sonde.dynamics.trajectory import gradient, record
from sonde.dynamics.update_rules import SGD, Adam
from sonde.errors import SondeError
from sonde.nets.mlp import MLP, MLPShape

_RULES = {
    "sgd": (SGD(momentum=0.0), {}),
    "momentum": (SGD(l2=1e-2, decoupled=1e-2), {}),
    "nesterov": (SGD(nesterov=True, l2=1e-2, decoupled=1e-2), {}),
    "adam": (Adam(), {}),
    "adamw": (Adam(l2=1e-2, decoupled=1e-2), {}),
    "clipped": (SGD(), {"clip": 0.5}),
    "clipped-adam": (Adam(l2=1e-2), {"clip": 0.3}),
}
_NETS = {
    "gelu-tanh": MLPShape((6, 5, 3)),
    "deep": MLPShape((6, 5, 4, 3), "tanh"),
    "linear": MLPShape((6, 3)),
    "sigmoid": MLPShape((6, 4, 3), "sigmoid"),
    "gelu": MLPShape((6, 4, 3), "gelu"),
}


def small(shape=_NETS["gelu-tanh"], rule=SGD(), **fields):  # noqa: B008
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 6, generator=generator, dtype=torch.float64)
    y = torch.randint(shape.sizes[-1], (30,), generator=generator)
    order = batch_order(30, batch=8, epochs=3, rest="ragged")
    return TrainingMap(MLP(shape, bias_sd=0.3).double(), x, y, order, rule, **fields)


def on_digits(hidden, epochs=6):
    data = digits()
    module = MLP(MLPShape((64, hidden, 10)), bias_sd=0.125).double()
    return TrainingMap(module, data.train_x.double(), data.train_y, batch_order(1600, batch=64, epochs=epochs))


def columns(n, k, seed=0):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def differences(map, v, s=1e-6):
    forth, back = (record(map, start=map.start + sign * s * v).end for sign in (1, -1))
    return (forth - back) / (2 * s)


def test_gradient_descent_on_a_quadratic_has_a_power_for_its_jacobian():
    """θ' = θ - η(Aθ - b): J = (I - ηA)^T, whatever b."""
    x = columns(12, 4)
    map = TrainingMap(
        nn.Linear(4, 1, bias=False).double(),
        x,
        columns(12, 1, seed=1),
        [torch.arange(12)] * 9,
        SGD(lr=0.05, momentum=0.0),
        CONSTANT,
        loss=nn.functional.mse_loss,
    )
    step = torch.eye(4, dtype=torch.float64) - 0.05 * 2 / 12 * x.T @ x
    found = TrainingJacobian(record(map)).dense()
    torch.testing.assert_close(found, torch.linalg.matrix_power(step, 9), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", list(_RULES))
def test_it_is_the_derivative_of_retraining_and_its_transpose_is_its_transpose(name):
    rule, fields = _RULES[name]
    map = small(rule=rule, **fields)
    jacobian = TrainingJacobian(record(map, stride=4))
    v, u = columns(map.n, 2), columns(map.n, 2, seed=1)
    image = jacobian.jvp(v)
    expected = differences(map, v[:, 0])
    assert (image[:, 0] - expected).norm() < 1e-6 * expected.norm()
    torch.testing.assert_close(image.T @ u, v.T @ jacobian.vjp(u), rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(image, TrainingJacobian(record(map), fused=False).jvp(v), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", list(_NETS))
def test_the_fused_way_is_the_generic_way(name):
    path = record(small(_NETS[name]))
    fused, plain = TrainingJacobian(path, block=7), TrainingJacobian(path, fused=False)
    torch.testing.assert_close(fused.dense(), plain.dense(), rtol=1e-11, atol=1e-12)
    u = columns(fused.n, 9)
    torch.testing.assert_close(fused.vjp(u), plain.vjp(u), rtol=1e-11, atol=1e-12)
    for step in (0, 5):
        expected = gradient(path.map, path[step].theta, step)
        torch.testing.assert_close(fused.curve.gradient(step), expected, rtol=1e-11, atol=1e-13)


def test_it_is_what_autodiff_through_the_loop_gives():
    map = small(rule=SGD(lr=0.2))

    def trained(theta):
        m = torch.zeros_like(theta)
        for t in range(map.steps):
            m = 0.9 * m + torch.func.grad(lambda w, t=t: map.loss_at(w, t))(theta)
            theta = theta - map.rate(t) * m
        return theta

    torch.testing.assert_close(
        TrainingJacobian(record(map)).dense(), jacrev(trained)(map.start), rtol=1e-10, atol=1e-11
    )


def test_relu_has_no_curvature_of_its_own():
    with pytest.warns(UserWarning, match="kinks"):
        path = record(small(MLPShape((6, 5, 3), "relu")))
    fused, plain = (TrainingJacobian(path, fused=fused).dense() for fused in (True, False))
    torch.testing.assert_close(fused, plain, rtol=1e-11, atol=1e-12)


@pytest.mark.filterwarnings("ignore:the network has kinks")
def test_a_network_with_convolution_and_dropout():
    module = nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(4, 3)
    )
    plain = small()
    map = TrainingMap(module.double(), plain.inputs, plain.targets, plain.order, seed=7)
    jacobian, v, u = TrainingJacobian(record(map)), columns(map.n, 1), columns(map.n, 1, seed=1)
    image, expected = jacobian.jvp(v), differences(map, v[:, 0])
    assert (image[:, 0] - expected).norm() < 1e-6 * expected.norm()
    torch.testing.assert_close(image.T @ u, v.T @ jacobian.vjp(u), rtol=1e-10, atol=1e-11)


def test_what_softmax_and_still_pixels_hide_is_carried_through_and_makes_exact_unit_singular_values():
    """3 pixels are 0 in every digit: 3 · hidden weights, and hidden + 1 shifts; 65 for 16 hidden units."""
    map = on_digits(4)
    jacobian = TrainingJacobian(record(map))
    pixels, shifts = invariants(map)
    assert (pixels.shape[1], shifts.shape[1]) == (3 * 4, 4 + 1)
    held = torch.cat([pixels, shifts], 1)
    torch.testing.assert_close(held.T @ held, torch.eye(17, dtype=torch.float64))
    assert (jacobian.jvp(held) - held).norm(dim=0).max() < 1e-12
    assert Spectrum.of(jacobian.dense()).regions(1e-9).bulk == 17


def test_single_precision_is_that_of_six_digits():
    exact = small()
    plain = TrainingMap(MLP(exact.module.shape, bias_sd=0.3), exact.inputs.float(), exact.targets, exact.order)
    found, true = TrainingJacobian(record(plain)).dense(), TrainingJacobian(record(exact)).dense()
    assert found.dtype == torch.float32
    assert (found.double() - true).norm() < 1e-5 * true.norm()


def test_jacobians_on_the_way_come_from_the_same_pass():
    map = small()
    jacobian = TrainingJacobian(record(map))
    during = jacobian.during([0, 5, 12])
    assert during[0].equal(torch.eye(map.n, dtype=torch.float64)) and during[12].equal(jacobian.dense())
    v = columns(map.n, 2)
    torch.testing.assert_close(during[5] @ v, jacobian.jvp(v, step=5))
    torch.testing.assert_close(during[5].T @ v, jacobian.vjp(v, step=5))


def test_columns_on_disk_are_used_again_and_never_those_of_another_training(tmp_path):
    jacobian = TrainingJacobian(record(small()), block=10)
    found = jacobian.dense(folder=tmp_path)
    files = sorted(tmp_path.glob("columns-*"))
    assert len(files) == math.ceil(jacobian.n / 10)
    files[2].unlink()
    before = files[0].stat().st_mtime_ns
    assert jacobian.dense(folder=tmp_path).equal(found)
    assert files[0].stat().st_mtime_ns == before and files[2].exists()
    with pytest.raises(SondeError, match="columns of another training"):
        TrainingJacobian(record(small(rule=SGD(lr=0.2)))).dense(folder=tmp_path)
    with pytest.raises(SondeError, match="columns of another training or other steps"):
        jacobian.during([3], folder=tmp_path)


def test_too_large_a_matrix_says_its_bytes_and_what_to_call_instead():
    jacobian = TrainingJacobian(record(small()))
    with pytest.raises(SondeError, match=rf"take {jacobian.n**2 * 8:,} bytes.*top_singular\(jacobian, k\)"):
        jacobian.dense(memory=1000)


def test_adam_without_a_floor_inside_the_root_names_the_weights_that_never_moved():
    map = small(rule=Adam(eps_root=0.0))
    still = TrainingMap(map.module, map.inputs * (torch.arange(6) > 0), map.targets, map.order, map.rule)
    with pytest.warns(UserWarning, match=r"infinite derivative.*layers.0.weight \(5 of 30\)"):
        jacobian = TrainingJacobian(record(still))
    assert jacobian.dense().isfinite().all()


def test_columns_of_another_size_kind_or_step_are_refused():
    jacobian = TrainingJacobian(record(small()))
    with pytest.raises(SondeError, match=r"v has shape \(3, 1\): give \[53, columns\]"):
        jacobian.jvp(columns(3, 1))
    with pytest.raises(SondeError, match=r"u is torch\.float32"):
        jacobian.vjp(columns(jacobian.n, 1).float())
    with pytest.raises(SondeError, match="step 13 is outside this training of 12 steps"):
        jacobian.jvp(columns(jacobian.n, 1), step=13)
    with pytest.raises(SondeError, match="block is 0"):
        TrainingJacobian(jacobian.path, block=0)
