import math

import pytest
import torch
from families import tiny, tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from sonde.errors import SondeError
from sonde.lens import trajectory as module
from sonde.lens.trajectory import decided, prediction_depth, trajectory
from sonde.lens.tuned import TunedLens
from sonde.lm.model import LanguageModel


@pytest.fixture(scope="module")
def lm():
    return LanguageModel(tiny("gemma2"), name="tiny")  # RMSNorm with 1 + w, and a soft-cap


@pytest.fixture(scope="module")
def lens(lm):
    lens = TunedLens.zeros(lm)
    torch.manual_seed(0)
    torch.nn.init.normal_(lens.weight, std=0.2)
    return lens


def every_log_prob(lm, lens, ids):
    with torch.no_grad(), lm.reading(*lens.sites, "logits") as acts:
        lm(ids)
    return torch.stack([*(lens(acts[s], s) for s in lens.sites), acts["logits"]]).log_softmax(-1).detach()


def test_streamed_statistics_are_those_of_the_whole_array(lm, lens, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 1)
    ids, anti = tokens(2, 20), tokens(2, 20, seed=1)
    found = trajectory(lm, ids, lens, anti_targets=anti, choices=[4, 9], top_k=3, keep_log_probs=True)
    logp = every_log_prob(lm, lens, ids)
    near = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(found.log_probs, logp, **near)
    torch.testing.assert_close(found.entropy, -(logp.exp() * logp).sum(-1), **near)
    torch.testing.assert_close(found.kl, (logp[-1].exp() * (logp[-1] - logp)).sum(-1), **near)
    torch.testing.assert_close(found.max_probability, logp.exp().amax(-1), **near)
    torch.testing.assert_close(found.top_log_probs, logp.topk(3).values, **near)
    torch.testing.assert_close(found.choice_log_probs, logp[..., [4, 9]], **near)
    own = logp[:, :, :-1].gather(-1, ids[None, :, 1:, None].expand(4, -1, -1, -1))
    torch.testing.assert_close(found.cross_entropy[..., :-1], -own.squeeze(-1), **near)
    assert torch.equal(found.rank[..., :-1], 1 + (logp[:, :, :-1] > own).sum(-1))
    against = logp[:, :, :-1].gather(-1, anti[None, :, :-1, None].expand(4, -1, -1, -1))
    torch.testing.assert_close(found.log_probability_difference[..., :-1], (own - against).squeeze(-1), **near)
    torch.testing.assert_close(
        found.log_probability_change, found.log_probability_difference.diff(dim=0), equal_nan=True
    )
    assert found.cross_entropy[..., -1].isnan().all()
    assert (found.rank[..., -1] == -1).all()


def test_the_output_does_not_diverge_from_itself(lm, lens):
    assert not trajectory(lm, tokens(1, 9), lens).kl[-1].any()


def test_pads_hold_nothing_and_change_nothing(lm, lens):
    ids = tokens(2, 12)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 7:] = False
    padded, alone = trajectory(lm, ids, lens, mask=mask), trajectory(lm, ids[1, :7], lens)
    torch.testing.assert_close(padded.entropy[:, 1, :7], alone.entropy[:, 0])
    torch.testing.assert_close(padded.cross_entropy[:, 1, :7], alone.cross_entropy[:, 0], equal_nan=True)
    assert padded.entropy[:, 1, 7:].isnan().all()
    assert (padded.top_tokens[:, 1, 7:] == -1).all()
    assert (padded.prediction_depth[1, 7:] == -1).all()


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=4, max_size=4), min_size=1, max_size=6))
def test_the_prediction_depth_is_the_first_row_that_stays(answers):
    answers = torch.tensor(answers)
    for token, depth in enumerate(prediction_depth(answers).tolist()):
        column = answers[:, token].tolist()
        assert all(answer == column[-1] for answer in column[depth:])
        assert depth == 0 or column[depth - 1] != column[-1]


def test_the_share_of_decided_tokens_rises_to_one(lm, lens):
    share = trajectory(lm, tokens(2, 20), lens).decided()
    assert (share.diff() >= 0).all()
    assert share[-1] == 1
    assert decided(torch.tensor([0, 2, 2, 3]), 4).tolist() == [0.25, 0.25, 0.75, 1.0]


def test_removed_tokens_of_the_passage_are_predicted_nowhere(lm, lens):
    ids = tokens(1, 30)
    found = trajectory(lm, ids, lens, mask_input=True, top_k=5)
    assert not torch.isin(found.top_tokens, ids).any()
    assert found.kl.isfinite().all()
    logp = every_log_prob(lm, lens, ids)
    kept = [i for i in range(97) if i not in set(ids[0].tolist())]
    p = logp[..., kept].log_softmax(-1)
    torch.testing.assert_close(found.kl, (p[-1].exp() * (p[-1] - p)).sum(-1), rtol=1e-4, atol=1e-5)


def test_comparisons_are_zero_with_itself_and_within_their_bounds(lm, lens):
    ids = tokens(1, 16)
    first, second = trajectory(lm, ids, lens), trajectory(lm, ids)
    same = first.compare(first)
    assert not same.kl.any()
    assert not same.tv.any()
    other = first.compare(second)
    assert (other.js >= 0).all()
    assert (other.js <= math.log(2)).all()
    assert (other.tv <= 1).all()
    assert (other.max_difference <= 2 * other.tv + 1e-6).all()
    assert (other.tv**2 <= other.kl / 2 + 1e-6).all()  # Pinsker
    assert not other.kl[-1].any()
    torch.testing.assert_close(other.mean_kl, (other.kl + second.compare(first).kl) / 2)


def test_two_models_can_be_compared_on_one_text(lm, lens):
    other = LanguageModel(tiny("llama"))
    found = trajectory(lm, tokens(1, 8), lens).compare(trajectory(other, tokens(1, 8)))
    assert found.kl[-1].min() > 0


def test_bad_input_is_refused_in_the_users_words(lm, lens):
    ids = tokens(1, 8)
    for options, message in [
        ({"targets": ids[:, :5]}, "targets of shape"),
        ({"targets": ids + 97}, "below 97"),
        ({"top_k": 98}, "top_k"),
        ({"choices": [97]}, "choices"),
    ]:
        with pytest.raises(SondeError, match=message):
            trajectory(lm, ids, lens, **options)
    found = trajectory(lm, ids, lens)
    with pytest.raises(SondeError, match="unknown"):
        found.values("surprise")
    with pytest.raises(SondeError, match="anti_targets"):
        found.values("log_probability_difference")
    with pytest.raises(SondeError, match="choices"):
        _ = found.choice_depth
    with pytest.raises(SondeError, match="cannot be compared"):
        found.compare(trajectory(lm, ids[:, :4], lens))
    with pytest.raises(SondeError, match="mask_input"):
        found.compare(trajectory(lm, ids, lens, mask_input=True))
    with pytest.raises(SondeError, match="no text"):
        trajectory(lm, [], lens)
