"""Loss by row under edits, at the model's own temperature and at the best one."""

import pytest
import torch
from families import tiny

import sonde
from sonde.data.python_docs import topics
from sonde.lm.batches import TokenBatches
from sonde.lm.model import LanguageModel
from sonde.lm.row_loss import RowLoss, best_temperature, row_loss
from sonde.organisms.small_lm import train_tokenizer


def test_losses_are_those_of_the_model_and_are_paired_by_row():
    lm = LanguageModel(tiny("llama", vocab_size=400), train_tokenizer(topics()[:20], 400))
    batches = TokenBatches(topics()[:6], lm.tokenizer, context=24, rows=8, limit_tokens=800)
    whole = row_loss(lm, batches)
    batch = next(iter(batches))
    with torch.no_grad():
        logp = lm(batch.tokens).logits.double().log_softmax(-1)
    expected = -logp[:, :-1].gather(-1, batch.tokens[:, 1:, None]).sum((1, 2))
    assert torch.allclose(torch.from_numpy(whole.nats[: len(expected)]), expected, rtol=1e-5)
    assert whole.tokens.sum() == batches.n_tokens
    assert whole.bytes.sum() == batches.n_bytes
    assert whole.above(whole).estimate == 0
    half = RowLoss(whole.nats[:3], whole.nats[:3], whole.tokens[:3], whole.bytes[:3], whole.chunks[:3])
    assert len(RowLoss.joined([whole, half]).nats) == len(whole.nats) + 3
    with pytest.raises(ValueError, match="cannot be paired"):
        whole.above(half)


def test_a_planted_temperature_is_found():
    lm = sonde.load("organism:pebble", check=False)
    batches = TokenBatches(topics()[:6], lm.tokenizer, context=64, rows=4, limit_tokens=512)
    plain = best_temperature(lm, batches)
    with lm.editing({"logits": lambda logits: 1.4 * logits}):
        found = best_temperature(lm, batches)
        loss = row_loss(lm, batches, temperature=found)
    assert found == pytest.approx(1.4 * plain, rel=0.03)
    assert loss.bits_per_byte(tempered=True).estimate < loss.bits_per_byte().estimate
