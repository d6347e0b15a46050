"""Networks judged on edited and on made data while they learn."""

import pytest
import torch

from sonde.data.digits import digits
from sonde.data.three_orders import ThreeOrders
from sonde.dynamics.image_stages import EDITED, MADE, REAL, Rows, Stage, course, edited_sets, follow, peak
from sonde.nets.mlp import MLP, MLPShape


def test_sets_are_rows_in_the_box_with_the_label_they_follow():
    data = digits(test=397)
    sets, errors = edited_sets(data, per_class=20, steps=40)
    assert set(sets) == {REAL, *EDITED, *MADE}
    for name in EDITED:
        assert (sets[name].y != data.test_y).all()
    for name in ("mean shift", "quantiles", "independent coordinates", *[n for n in MADE if "box" in n]):
        assert sets[name].x.min() >= 0 and sets[name].x.max() <= 1
    assert len(sets["Gaussian"].x) == 200
    assert set(errors) == {"order 1 in the box", "order 2 in the box", "order 3 in the box"}


def test_networks_are_followed_side_by_side_and_go_on_after_a_stop(tmp_path):
    task = ThreeOrders(cues=3, shift=1.5)
    sets = {REAL: Rows(*task.draw(300, 10**6)), "order 1": Rows(*task.draw(300, 10**6 + 1, orders=(1,)))}

    def run(path, stop=None):
        def batch(step):
            if step == stop:
                raise KeyboardInterrupt
            return task.draw(64, step)

        nets = [MLP(MLPShape((task.width, 16, 2)), seed=seed) for seed in range(2)]
        return follow(nets, batch, sets, steps=250, lr=0.05, checkpoint=path)

    whole = run(tmp_path / "whole.safetensors")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut.safetensors", stop=230)
    assert run(tmp_path / "cut.safetensors") == whole
    last = [stage for stage in whole if stage.step == 250]
    assert len(last) == 4
    assert all(stage.accuracy > 0.75 for stage in last)


def test_a_course_has_its_least_and_its_rise_and_a_peak_its_first_step():
    losses = {0: 0.1, 1: 2.0, 2: 0.5, 4: 0.5, 8: 1.5}
    stages = [Stage(step, 0, "x", loss, 1 - loss / 10) for step, loss in losses.items()]
    found = course(stages, "x", 0)
    assert (found.least, found.at, found.last, found.rise) == (0.5, 2, 1.5, 3.0)
    assert peak(stages, "x", 0) == 0
    assert peak(stages[1:], "x", 0) == 2


@pytest.mark.parametrize("order", [1, 2, 3])
def test_moments_of_the_planted_order_alone_differ_between_the_classes(order):
    task = ThreeOrders(cues=2, shift=0.5)
    x, y = task.draw(60_000, 5, orders=(order,))
    groups = [x[y == c].double() for c in (0, 1)]

    def moments(rows):
        first = rows.mean(0)
        second = torch.cov(rows.T)
        centred = rows - first
        third = torch.einsum("ni,nj,nk->ijk", centred, centred, centred) / len(rows)
        return first, second, third

    gaps = [float((a - b).abs().max()) for a, b in zip(*map(moments, groups), strict=True)]
    assert gaps[order - 1] > 0.5
    assert all(gap < 0.15 for k, gap in enumerate(gaps, start=1) if k != order)
