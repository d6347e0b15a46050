"""Scales that are folded into a dictionary after training leave its output as it was."""

import pytest
import torch

from sonde.errors import SondeError
from sonde.features.design import Design
from sonde.features.dictionary import Dictionary
from sonde.features.input_scale import SCALES, InputScale, Sample, geometric_median

D, LATENTS = 12, 40

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture
def rows():
    spread = torch.linspace(0.2, 5, D)
    return torch.randn(4000, D) * spread @ torch.linalg.qr(torch.randn(D, D))[0] + 3


def made(kind, *, transcodes=False, skip=False, **more):
    k = {"k": 5} if kind in ("topk", "batchtopk") else {}
    design = Design(kind, D, LATENTS, transcodes=transcodes, skip=skip, **k, **more)
    dictionary = Dictionary(design)
    for parameter in dictionary.parameters():
        parameter.copy_(torch.randn_like(parameter) / 4)
    if dictionary.threshold is not None:
        dictionary.threshold.fill_(0.3)
    return dictionary


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("kind", ["relu", "topk", "batchtopk", "jumprelu", "gated"])
def test_a_folded_dictionary_reads_what_the_trained_one_read_scaled(rows, scale, kind):
    dictionary, change = made(kind), InputScale.of(scale, Sample.of(rows, covariance=True))
    folded = change.folded(dictionary)
    torch.testing.assert_close(folded(rows), change.inverse(dictionary(change(rows))), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("kind", ["topk", "gated"])
def test_a_folded_transcoder_predicts_on_the_scale_of_its_target(rows, scale, kind):
    target_rows = rows.flip(1) * 2 - 1
    dictionary = made(kind, transcodes=True, skip=True)
    reads, writes = (
        InputScale.of(scale, Sample.of(rows, covariance=True)),
        InputScale.of(scale, Sample.of(target_rows, covariance=True)),
    )
    folded = reads.folded(dictionary, writes)
    torch.testing.assert_close(folded(rows), writes.inverse(dictionary(reads(rows))), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("streams", [(), (5, 7)])
def test_one_threshold_on_ranks_by_norm_is_folded_as_thresholds_of_latents(rows, scale, streams):
    dictionary = made("batchtopk", ranked_by_norm=True, streams=streams)
    samples = [Sample.of(part, covariance=True) for part in rows.split(streams or [D], 1)]
    change = InputScale.of(scale, *samples)
    folded = change.folded(dictionary)
    torch.testing.assert_close(folded(rows), change.inverse(dictionary(change(rows))), rtol=1e-4, atol=1e-4)
    if scale == "rms" and streams:
        assert [round((part**2).mean().item(), 3) for part in change(rows).split(streams, 1)] == [1, 1]


def test_scales_are_what_they_say(rows):
    sample = Sample.of(rows, covariance=True)
    assert InputScale.of("norm", sample)(rows).norm(dim=1).mean().item() == pytest.approx(D**0.5, rel=1e-4)
    assert (InputScale.of("rms", sample)(rows) ** 2).mean().item() == pytest.approx(1, rel=1e-4)
    white = InputScale.of("whiten", sample)(rows)
    torch.testing.assert_close(white.T.cov(correction=0), torch.eye(D), atol=0.03, rtol=0)
    torch.testing.assert_close(InputScale.of("whiten", sample).inverse(white), rows, atol=1e-3, rtol=1e-3)


def test_a_scale_that_was_saved_is_the_same(rows):
    for kind in SCALES:
        scale = InputScale.of(kind, Sample.of(rows, covariance=True))
        assert torch.equal(InputScale.from_state(scale.state())(rows), scale(rows))


def test_whitening_is_refused_where_norms_choose(rows):
    scale = InputScale.of("whiten", Sample.of(rows, covariance=True))
    with pytest.raises(SondeError, match="ranked_by_norm takes no such scale"):
        scale.folded(made("topk", ranked_by_norm=True))


def test_a_sample_of_zeros_has_no_scale():
    with pytest.raises(SondeError, match="are 0"):
        InputScale.of("norm", Sample.of(torch.zeros(5, D)))


def test_few_outliers_hardly_move_the_geometric_median():
    x = torch.randn(500, D).double()
    moved = x.clone()
    moved[:20] += 1000
    assert (geometric_median(moved) - geometric_median(x)).norm() < 0.3
    assert (moved.mean(0) - x.mean(0)).norm() > 30
