import dataclasses

import pytest
import torch

from sonde.errors import SondeError
from sonde.lens.alignment import alignment
from sonde.lens.causal_basis import random_basis
from sonde.lens.tuned import TunedLens
from sonde.lm.surgery import derangement
from sonde.stats import information


def first_rows(batch, rows):
    parts = {name: getattr(batch, name)[:rows] for name in ("tokens", "mask", "documents", "chunks", "n_bytes")}
    return dataclasses.replace(batch, **parts)


def test_after_the_last_block_the_model_responds_exactly_as_the_lens_says(lens_lm, lens_batches):
    lens = TunedLens.logit(lens_lm, sites=["resid_post.2"])
    batches = [lens_batches[0], lens_batches[1]]
    (found,) = alignment(lens_lm, lens, {"resid_post.2": random_basis(8, 32)}, batches)
    assert found.similarity.estimate == pytest.approx(1, abs=1e-4)
    assert found.control.high < 0.9
    assert found.stimulus.estimate == pytest.approx(found.response.estimate, rel=1e-4)
    assert found.stimulus.estimate > 1e-3
    assert found.similarity.n == 16


def test_a_single_batch_by_hand(lens_lm, lens_batches):
    lens, batch, v = TunedLens.logit(lens_lm), lens_batches[0], random_basis(4, 32)
    (found,) = alignment(lens_lm, lens, {"resid_pre.1": v}, [batch], seed=7)
    order = derangement(8, seed=7)
    with torch.no_grad(), lens_lm.reading("resid_pre.1", "logits") as acts:
        lens_lm(batch.tokens)
        hidden, logp = acts["resid_pre.1"], acts["logits"].log_softmax(-1)
        treated = hidden - (hidden - hidden[order]) @ v.T @ v
        with lens_lm.editing({"resid_pre.1": lambda _: treated}):
            logp_treated = lens_lm(batch.tokens).logits.log_softmax(-1)
        logq, logq_treated = (lens(h, 1).log_softmax(-1) for h in (hidden, treated))
    weight = (logp.exp() + logp_treated.exp()) / 2
    similarity = information.aitchison(logq_treated - logq, logp_treated - logp, weight).mean()
    assert found.similarity.estimate == pytest.approx(float(similarity), abs=1e-3)
    assert found.response.estimate == pytest.approx(float(information.kl(logp, logp_treated).mean()), rel=1e-3)
    assert found.stimulus.estimate == pytest.approx(float(information.kl(logq, logq_treated).mean()), rel=1e-3)
    labels = batch.tokens[:, 1:, None]
    change = (logp - logp_treated)[:, :-1].gather(-1, labels).mean()
    assert found.loss_change.estimate == pytest.approx(float(change), abs=1e-4)


def test_pads_exchange_nothing_and_do_not_count(lens_lm, lens_batches):
    lens, batch = TunedLens.logit(lens_lm), lens_batches[0]
    basis = {"resid_pre.1": random_basis(4, 32)}
    (whole,) = alignment(lens_lm, lens, basis, [batch])
    tokens = torch.cat([batch.tokens, torch.zeros(8, 5, dtype=torch.long)], 1)
    mask = torch.cat([batch.mask, torch.zeros(8, 5, dtype=torch.bool)], 1)
    (padded,) = alignment(lens_lm, lens, basis, [dataclasses.replace(batch, tokens=tokens, mask=mask)])
    for name in ("similarity", "stimulus", "response", "loss_change"):
        assert getattr(padded, name).estimate == pytest.approx(getattr(whole, name).estimate, rel=1e-3, abs=1e-5)


def test_what_cannot_be_aligned_is_refused(lens_lm, lens_batches):
    lens, batch, v = TunedLens.logit(lens_lm), lens_batches[0], random_basis(2, 32)
    with pytest.raises(SondeError, match="at least 2"):
        alignment(lens_lm, lens, {"resid_pre.1": v}, [first_rows(batch, 1)])
    with pytest.raises(SondeError, match="orthonormal"):
        alignment(lens_lm, lens, {"resid_pre.1": 2 * v}, [batch])
    with pytest.raises(SondeError, match="has no site"):
        alignment(lens_lm, lens, {"resid_post.1": v}, [batch])
    with pytest.raises(SondeError, match="no text"):
        alignment(lens_lm, lens, {"resid_pre.1": v}, [])
    same = dataclasses.replace(batch, tokens=batch.tokens[:1].expand(8, -1).clone())
    with pytest.raises(SondeError, match="changes no prediction"):
        alignment(lens_lm, lens, {"resid_pre.1": v}, [same])
