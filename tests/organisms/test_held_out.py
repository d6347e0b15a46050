import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from sonde.organisms.held_out import score, token_nats
from sonde.organisms.small_lm import train_tokenizer
from sonde.stats.ngram import NgramModel

CONTEXT = 16


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=CONTEXT,
    )
    return GPTNeoXForCausalLM(config).eval()


@pytest.mark.parametrize("n", [2, 9, 15, 16, 17, 24, 25, 33, 70])
def test_every_token_is_scored_once_with_at_least_half_a_context_before_it(model, n):
    ids = np.random.default_rng(n).integers(0, 40, n)
    got = token_nats(model, ids, batch=3)
    assert got.shape == (n - 1,)
    for place in range(1, n):
        starts = range(0, n, CONTEXT // 2)
        (start, *_) = [s for s in starts if s < place < s + CONTEXT and (s == 0 or place - s >= CONTEXT // 2)]
        with torch.inference_mode():
            logits = model(torch.tensor(ids[start:place])[None]).logits[0, -1]
        want = F.cross_entropy(logits, torch.tensor(ids[place])).item()
        assert got[place - 1] == pytest.approx(want, abs=1e-5)


def test_a_model_that_knows_nothing_pays_log2_of_the_vocabulary_for_every_token(model):
    documents = ["the wolf looked at the fire again and again", "naïve café"]
    tokenizer = train_tokenizer(documents, vocab_size=280)
    vocabulary = len(tokenizer)
    blank = GPTNeoXForCausalLM(GPTNeoXConfig(**{**model.config.to_dict(), "vocab_size": vocabulary})).eval()
    torch.nn.init.zeros_(blank.get_output_embeddings().weight)
    ngram = NgramModel.fit([tokenizer(text)["input_ids"] for text in documents], vocab_size=vocabulary)
    found = score("both", documents, model=blank, tokenizer=tokenizer, ngram=ngram)
    assert found.bytes == sum(len(text.encode()) for text in documents)
    assert found.model.estimate == pytest.approx(math.log2(vocabulary) * found.tokens / found.bytes, rel=1e-5)
    assert found.gain.estimate == pytest.approx(found.ngram.estimate - found.model.estimate)
    assert found.gain.high < 0
