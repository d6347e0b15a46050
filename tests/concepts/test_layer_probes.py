"""Closed-form probes find what is planted, at the site where it was planted, and nothing in shuffled labels."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from sonde.concepts.layer_probes import LayerProbes, ProbeFitting, ProbeScoring

D, ROWS, LENGTH = 8, 6, 50


class Planted:
    """Labels of four classes, a tenth of them unknown; `site` carries them, `empty` does not."""

    concept, names = "planted", ("a", "b", "c", "d")

    def __init__(self, offset: int) -> None:
        self.offset = offset

    def at(self, batches, index):
        rng = torch.Generator().manual_seed(100 * self.offset + index)
        z = torch.multinomial(torch.tensor([0.4, 0.3, 0.2, 0.1]), ROWS * LENGTH, True, generator=rng)
        z[torch.rand(len(z), generator=rng) < 0.1] = -1
        return z.view(ROWS, LENGTH)


def batch(labels: Planted, index: int, *, apart: float):
    rng = torch.Generator().manual_seed(7 * index + 1)
    z = labels.at(None, index)
    means = apart * torch.randn(5, D, generator=torch.Generator().manual_seed(3))
    noise = torch.randn(ROWS, LENGTH, D, generator=rng) * torch.linspace(0.2, 3, D)
    acts = {"site": means[z] + noise, "empty": noise}
    return SimpleNamespace(index=index, mask=torch.ones(ROWS, LENGTH, dtype=torch.bool), acts=acts)


def fitted(labels: Planted, *, apart: float = 1.0) -> LayerProbes:
    fitting = ProbeFitting(("site", "empty"), None, [labels])
    for index in range(8):
        fitting.update(batch(labels, index, apart=apart))
    return fitting.finish()


def test_the_probe_is_fishers_discriminant():
    labels = Planted(0)
    probes = fitted(labels)
    x = torch.cat([batch(labels, i, apart=1.0).acts["site"].reshape(-1, D) for i in range(8)])
    z = torch.cat([labels.at(None, i).reshape(-1) for i in range(8)])
    peer = LinearDiscriminantAnalysis(solver="lsqr").fit(x[z >= 0], z[z >= 0])
    ours = (x @ probes.weights["site"][:, :4] + probes.bias["site"][:4]).argmax(-1)
    agree = (ours[z >= 0].numpy() == peer.predict(x[z >= 0])).mean()
    assert agree > 0.98


def test_what_is_planted_is_told_at_its_site_and_shuffled_labels_are_not():
    labels = Planted(0)
    scoring = ProbeScoring(fitted(labels, apart=2.0), None, [labels])
    for index in range(20, 28):
        scoring.update(batch(labels, index, apart=2.0))
    majority = scoring.majority(0)
    assert majority.contains(0.4)
    assert scoring.accuracy(0, "site").low > 0.8
    assert scoring.accuracy(0, "empty").high < majority.high + 0.02
    assert scoring.accuracy(0, "site", dealt=True).high < 0.5


def test_scores_go_on_from_their_state():
    labels = Planted(0)
    probes = LayerProbes.from_state(fitted(labels).state())
    whole, first, second, merged = (ProbeScoring(probes, None, [labels]) for _ in range(4))
    for index in range(4):
        whole.update(batch(labels, index, apart=1.0))
        (first if index < 2 else second).update(batch(labels, index, apart=1.0))
    merged.load(first.state())
    merged.merge_state(second.state())
    assert merged.accuracy(0, "site") == whole.accuracy(0, "site")
    assert np.array_equal(merged.state(), whole.state())


def test_probes_need_a_batch():
    with pytest.raises(ValueError, match="no batch was seen"):
        ProbeFitting(("site",), None, [Planted(0)]).finish()
