"""Restricted, excluded and trigonometric losses of logits whose circuit is known."""

import math

import pytest
import torch

from sonde.data.modular import ModularTask
from sonde.dynamics.fourier import block_directions, sum_directions
from sonde.dynamics.progress_measures import Grid, measures, trigonometric
from sonde.errors import SondeError

P = 13
TASK = ModularTask(P, share=0.5)


def cosines(coefficients: dict[int, float]) -> torch.Tensor:
    a, b = TASK.pairs.double().unbind(1)
    c = torch.arange(P, dtype=torch.float64)
    total = (a + b)[:, None] - c
    return sum(alpha * (2 * math.pi * k / P * total).cos() for k, alpha in coefficients.items())  # type: ignore


def grid(logits: torch.Tensor) -> Grid:
    return Grid(P, logits, TASK.labels, TASK.trained)


def test_the_fit_returns_the_planted_coefficients_and_frequencies():
    planted = {2: 3.0, 5: 1.5}
    noise = torch.randn(P * P, P, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = grid(cosines(planted) + 7.0)
    assert found.key_frequencies() == (2, 5)
    coefficients, fitted = trigonometric(found, [5, 2])
    assert coefficients == pytest.approx({5: 1.5, 2: 3.0})
    torch.testing.assert_close(fitted, cosines(planted))
    known = measures(found, [2, 5])
    assert known.trig_fve == pytest.approx(1)
    assert known.share == pytest.approx(1)
    assert grid(cosines(planted) + 0.1 * noise).key_frequencies() == (2, 5)


def test_restricted_and_excluded_projections_sum_to_the_logits():
    logits = torch.randn(P * P, P, dtype=torch.float64)
    found = grid(logits)
    directions = sum_directions(P, [1, 4])
    inside = found.harmonics.project(logits, [1, 4])
    torch.testing.assert_close(inside, directions @ (directions.T @ logits))
    torch.testing.assert_close(inside + (logits - inside), logits)
    torch.testing.assert_close(found.harmonics.project(inside, [1, 4]), inside)  # a projection
    blocks = block_directions(P, [1, 4])
    torch.testing.assert_close(found.harmonics.project_wide(logits, [1, 4]), blocks @ (blocks.T @ logits))
    only = measures(grid(cosines({3: 4.0})), [3])
    assert only.restricted["all"] == pytest.approx(grid(cosines({3: 4.0})).loss())
    assert only.excluded == pytest.approx(math.log(P))


def test_memory_is_what_is_left_without_the_circuit():
    memory = 20.0 * torch.nn.functional.one_hot(TASK.labels, P).double() * TASK.trained[:, None]
    circuit = cosines({2: 6.0, 5: 6.0})
    known = measures(grid(memory), [2, 5])
    assert known.excluded < 0.1 < 1 < known.test
    both = measures(grid(circuit + memory), [2, 5])
    assert both.excluded < 0.2
    assert both.restricted["test"] < 0.5 * math.log(P)
    alone = measures(grid(circuit), [2, 5])
    assert alone.excluded == pytest.approx(math.log(P))
    assert alone.excluded_by[2] > alone.test


def test_cross_entropy_at_a_margin_of_forty_is_above_zero():
    logits = 40.0 * torch.nn.functional.one_hot(TASK.labels, P).float()
    assert grid(logits).loss() == pytest.approx((P - 1) * math.exp(-40), rel=1e-9)


def test_the_class_of_the_equals_sign_is_dropped():
    logits = torch.randn(P * P, P + 1)
    assert grid(logits).loss() == grid(logits[:, :P]).loss()


@pytest.mark.parametrize(
    ("logits", "line"),
    [
        (torch.zeros(P * P - 1, P), "the projection needs the whole grid: got 168 of 169 pairs"),
        (torch.zeros(P * P, P + 2), "logits have 15 classes: expected 13, or 14 with `=` last"),
    ],
)
def test_logits_of_another_shape_are_refused(logits, line):
    with pytest.raises(SondeError, match=line):
        grid(logits)


def test_no_key_frequency_prints_the_largest_shares():
    logits = torch.randn(P * P, P, generator=torch.Generator().manual_seed(0))
    with pytest.raises(SondeError, match=r"no frequency has a share above 0\.5: the largest are \d: 0\.0"):
        grid(logits).key_frequencies(threshold=0.5)
    with pytest.raises(SondeError, match="no key frequency was given"):
        measures(grid(logits), [])
    with pytest.raises(SondeError, match="frequency 7 does not exist modulo 13"):
        measures(grid(logits), [7])
