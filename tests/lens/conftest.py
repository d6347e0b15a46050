"""One tiny model with a tokenizer, and the text that the lens tests read."""

import pytest
from families import tiny

from sonde.data.python_docs import topics
from sonde.lm.batches import TokenBatches
from sonde.lm.model import LanguageModel
from sonde.organisms.small_lm import train_tokenizer


@pytest.fixture(scope="session")
def lens_lm():
    return LanguageModel(tiny("gpt_neox", vocab_size=400), train_tokenizer(topics()[:20], 400), name="tiny")


@pytest.fixture(scope="session")
def lens_batches(lens_lm):
    return TokenBatches(None, lens_lm.tokenizer, context=32, rows=8, limit_tokens=6000)
