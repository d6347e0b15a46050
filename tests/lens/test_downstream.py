"""Accuracy by layer: a table whose answers are known, and what calibration by medians undoes."""

import pytest
import torch

from sonde.errors import SondeError
from sonde.lens.choices import ChoiceScores
from sonde.lens.downstream import downstream, median_calibrated
from sonde.stats.calibration import ece


def scores(log_probs: torch.Tensor, correct: torch.Tensor) -> ChoiceScores:
    sites = tuple(f"resid_pre.{layer}" for layer in range(len(log_probs) - 1))
    return ChoiceScores(sites, log_probs, torch.full_like(correct, log_probs.shape[-1]), correct)


@pytest.fixture
def planted():
    """Layer 0 knows nothing; layer 1 knows, but prefers choice 0 by 10 nats; the output knows."""
    correct = torch.arange(60) % 3
    knows = 4.0 * torch.nn.functional.one_hot(correct, 3)
    bias = torch.tensor([10.0, 0.0, 0.0])
    return scores(torch.stack([torch.zeros(60, 3), knows + bias, knows]), correct)


def test_medians_take_the_preference_of_a_layer_away(planted):
    plain, level = downstream(planted), downstream(planted, calibrated=True)
    assert [layer.estimate for layer in plain.accuracy] == pytest.approx([1 / 3, 1 / 3, 1])
    assert [layer.estimate for layer in level.accuracy] == pytest.approx([1 / 3, 1, 1])
    assert plain.chance.estimate == pytest.approx(1 / 3) and plain.rows == ("resid_pre.0", "resid_pre.1", "output")


@pytest.mark.parametrize("n", [30, 31])
def test_after_calibration_every_choice_has_the_median_zero(n):
    table = torch.randn(2, n, 4, generator=torch.Generator().manual_seed(0)) + torch.tensor([3.0, -1.0, 0.5, 9.0])
    medians = torch.quantile(median_calibrated(table), 0.5, dim=1)
    torch.testing.assert_close(medians, torch.zeros(2, 4), atol=1e-6, rtol=0)


def test_confidence_is_the_softmax_over_the_choices(planted):
    found = downstream(planted)
    sure = float(torch.tensor([4.0, 0.0, 0.0]).softmax(-1)[0])
    assert found.ece[-1] == pytest.approx(1 - sure, abs=1e-6) == pytest.approx(ece([sure] * 60, [1] * 60), abs=1e-6)
    assert found.sweep_ece[-1] == pytest.approx(1 - sure, abs=1e-6)


def test_right_choices_of_another_number_and_unequal_questions_are_refused(planted):
    with pytest.raises(SondeError, match="59 right choices for 60 questions"):
        downstream(scores(planted.log_probs, planted.correct[1:]))
    counts = planted.counts.clone()
    counts[0] = 2
    with pytest.raises(SondeError, match="2 to 3 choices"):
        downstream(ChoiceScores(planted.sites, planted.log_probs, counts, planted.correct), calibrated=True)
