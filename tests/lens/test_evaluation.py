import pytest
import torch
from families import tiny

from sonde.errors import SondeError
from sonde.files import load_bundle, save_bundle
from sonde.lens.evaluation import (
    LensEvaluation,
    LensSample,
    attach_report,
    covariance_similarity,
    transfer_correlation,
    transfer_penalty,
)
from sonde.lens.trajectory import trajectory
from sonde.lens.tuned import TunedLens
from sonde.lm.batches import TokenBatches
from sonde.lm.model import LanguageModel
from sonde.lm.stream import feed, stream


def estimates(intervals):
    return torch.tensor([interval.estimate for interval in intervals], dtype=torch.float64)


@pytest.fixture(scope="module", params=["gpt_neox", "gemma2", "opt"])
def lm(request, lens_lm):
    return LanguageModel(tiny(request.param, vocab_size=400), lens_lm.tokenizer, name=request.param)


@pytest.mark.parametrize("join", [True, False])
def test_scores_are_means_over_all_tokens_of_the_trajectory(lm, join):
    batches = TokenBatches(None, lm.tokenizer, context=24, rows=5, limit_tokens=1500, join=join)
    lens = TunedLens.zeros(lm)
    torch.nn.init.normal_(lens.weight, std=0.1)
    evaluation = LensEvaluation(lm, {"lens": lens, "logit": TunedLens.logit(lm)}, draws=50)
    feed(lm, batches, [evaluation])
    scores = evaluation.scores()["lens"]
    seen = [trajectory(lm, b.tokens, lens, mask=b.mask, keep_log_probs=True) for b in batches]

    def mean(statistic):
        return torch.cat([t.values(statistic)[:, t.mask] for t in seen], -1).double().nanmean(-1)

    near = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(estimates(scores.kl), mean("kl")[:-1], **near)
    torch.testing.assert_close(estimates(scores.cross_entropy), mean("cross_entropy"), **near)
    depth = torch.cat([t.prediction_depth[t.mask] for t in seen])
    share = (depth[None] <= torch.arange(4)[:, None]).double().mean(-1)
    torch.testing.assert_close(estimates(scores.decided), share, **near)
    assert scores.n_tokens == batches.n_tokens
    assert scores.n_bytes == batches.n_bytes
    p = torch.cat([t.log_probs[:, t.mask] for t in seen], 1).exp().double().mean(1)
    bias = (p[-1] * (p[-1] / p[:-1]).log()).sum(-1)
    torch.testing.assert_close(torch.tensor(scores.bias, dtype=torch.float64), bias, **near)
    other = evaluation.scores()["logit"]
    torch.testing.assert_close(
        estimates(evaluation.difference("lens", "logit")), estimates(scores.kl) - estimates(other.kl), **near
    )


def test_shards_merge_to_the_whole_and_state_survives_a_file(lens_lm, lens_batches, tmp_path):
    lens = TunedLens.logit(lens_lm)
    whole = LensEvaluation(lens_lm, lens, draws=20)
    halves = [LensEvaluation(lens_lm, lens, draws=20) for _ in range(2)]
    for batch in stream(lens_lm, lens_batches, sites=whole.sites):
        whole.update(batch)
        halves[batch.index % 2].update(batch)
    save_bundle(tmp_path / "state", halves[1].state())
    halves[0].merge_state(load_bundle(tmp_path / "state"))
    merged, expected = halves[0].scores()["lens"], whole.scores()["lens"]
    torch.testing.assert_close(estimates(merged.kl), estimates(expected.kl))
    torch.testing.assert_close(torch.tensor(merged.bias), torch.tensor(expected.bias))
    halves[1].load(whole.state())
    assert halves[1].scores()["lens"] == expected


def test_lenses_of_different_sites_are_not_compared(lens_lm):
    with pytest.raises(SondeError, match="same sites"):
        LensEvaluation(lens_lm, {"a": TunedLens.logit(lens_lm), "b": TunedLens.logit(lens_lm, sites="mlp_out.*")})
    with pytest.raises(SondeError, match="no text"):
        LensEvaluation(lens_lm, TunedLens.logit(lens_lm)).scores()


def test_a_translator_costs_nothing_on_its_own_layer(lens_lm, lens_batches):
    lens = TunedLens.fit(lens_lm, lens_batches, trainer="ridge", held_out=512)
    sample = LensSample(lens_lm, lens.sites, tokens=700)
    feed(lens_lm, lens_batches, [sample])
    rows = sample.rows()
    assert len(rows) == 700
    penalty = transfer_penalty(lens, rows)
    assert not penalty.diagonal().any()
    logits = lens(lens.translate(rows.hidden[2], 0) - lens.translate(rows.hidden[2], 2) + rows.hidden[2], 2)
    assert logits.shape == (700, 400)
    expected = torch.nn.functional.cross_entropy(lens_lm.unembed(lens.translate(rows.hidden[2], 0)), rows.labels)
    own = torch.nn.functional.cross_entropy(lens(rows.hidden[2], 2), rows.labels)
    assert penalty[0, 2].item() == pytest.approx((expected - own).item(), abs=1e-4)
    assert -1 <= transfer_correlation(penalty, covariance_similarity(rows.hidden)) <= 1


def test_covariance_similarity_is_a_cosine_and_blind_to_scale_and_mean():
    hidden = torch.randn(3, 400, 6) * torch.tensor([1.0, 2, 3, 1, 1, 1])
    hidden[1] = 5 * hidden[0] + 7
    hidden[2] = hidden[2].flip(-1)
    similarity = covariance_similarity(hidden)
    torch.testing.assert_close(similarity.diagonal(), torch.ones(3, dtype=torch.float64))
    assert similarity[0, 1].item() == pytest.approx(1, abs=1e-6)
    assert 0 <= similarity[0, 2] < 0.9


def test_without_its_rogue_dimension_a_covariance_is_that_of_the_rest():
    hidden = torch.randn(2, 300, 5)
    hidden[..., 3] *= 100
    raw, rest = covariance_similarity(hidden), covariance_similarity(hidden, without=1)
    assert raw[0, 1] > 0.999
    torch.testing.assert_close(rest, covariance_similarity(hidden[..., [0, 1, 2, 4]]))
    with pytest.raises(SondeError, match="without"):
        covariance_similarity(hidden, without=5)


@pytest.mark.parametrize("family", ["gpt_neox", "gemma2", "opt"])
def test_behind_the_last_block_a_lens_at_zero_reads_the_model_itself(family, lens_lm, lens_batches):
    lm = LanguageModel(tiny(family, vocab_size=400), lens_lm.tokenizer, name=family)
    evaluation = LensEvaluation(lm, TunedLens.zeros(lm, sites=("resid_post.*",)))
    feed(lm, lens_batches, [evaluation])
    scores = evaluation.scores()["lens"]
    assert abs(scores.kl[-1].estimate) < 1e-5  # rounding of float32 logits up to 16; 3e-16 in float64
    assert scores.agreement[-1].estimate == 1
    assert scores.bias[-1] < 1e-9
    assert scores.kl[-2].estimate > 1e-2


def test_attaching_reports_what_it_costs(lens_lm, lens_batches):
    lens = TunedLens.fit(lens_lm, lens_batches, trainer="ridge", held_out=512)
    same = attach_report(lens, lens_lm, lens_lm, lens_batches)
    assert estimates(same.before).tolist() == estimates(same.after).tolist()
    changed = tiny("gpt_neox", vocab_size=400)
    for parameter in changed.gpt_neox.layers[2].parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    tuned = LanguageModel(changed, lens_lm.tokenizer, name="tuned")
    own = TunedLens.fit(tuned, lens_batches, trainer="ridge", held_out=512)
    report = attach_report(lens, lens_lm, tuned, lens_batches, own=own)
    assert report.lens.model_name == "tuned"
    assert (estimates(report.after) < estimates(report.logit_lens)).all()
    assert (estimates(report.gain) < 0).all()
    assert torch.allclose(estimates(report.gain), estimates(report.after) - estimates(report.logit_lens), atol=1e-6)
    attached, own_loss = (estimates(report.tuned[name].cross_entropy)[:-1] for name in ("attached", "own"))
    assert report.cost is not None
    assert torch.allclose(estimates(report.cost), attached - own_loss, atol=1e-6)
