import pytest
import torch
from families import tiny, tokens

from sonde.errors import SondeError
from sonde.lens.extended import ExtendedLens
from sonde.lm.batches import TokenBatches
from sonde.lm.model import LanguageModel


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "gemma2", "opt", "mamba", "rwkv", "recurrent_gemma"])
@pytest.mark.parametrize("blocks", [1, 2])
def test_a_translator_that_hits_the_blocks_input_gives_the_models_logits(family, blocks):
    lm = LanguageModel(tiny(family))
    extended = ExtendedLens(lm, blocks=blocks)
    ids = tokens(2, 10)
    # blocks that add nothing make every earlier state the input of the kept blocks
    skipped = {f"resid_post.{i}": None for i in range(extended.first)}
    with torch.no_grad(), lm.reading("resid_pre.0") as acts:
        lm(ids)
    start = acts["resid_pre.0"]
    with torch.no_grad(), lm.editing({site: lambda _: start for site in skipped}):
        expected = lm(ids).logits
    torch.testing.assert_close(extended.logits(ids, 0), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("trainer", ["ridge+muon", "ridge+adam", "muon", "sgd"])
def test_training_beats_untrained_translators(lens_lm, trainer):
    batches = TokenBatches(None, lens_lm.tokenizer, context=32, rows=8, limit_tokens=6000)
    options = {"steps": 6, "evaluate_every": 3, "held_out": 256, "ridge_tokens": 1000}
    extended = ExtendedLens.fit(lens_lm, batches, blocks=1, trainer=trainer, **options)
    untrained = ExtendedLens(lens_lm, blocks=1)
    batch = batches[len(batches) - 1]
    with torch.no_grad():
        logp = lens_lm(batch.tokens).logits.log_softmax(-1)

    def loss(lens, layer):
        logq = lens.logits(batch.tokens, layer).log_softmax(-1)
        return (logp.exp() * (logp - logq)).sum(-1).mean()

    for layer in range(2):
        assert loss(extended, layer) < loss(untrained, layer)


def test_impossible_numbers_of_blocks_are_refused(lens_lm):
    for blocks in (0, 3):
        with pytest.raises(SondeError, match="keeps 1 to 2 blocks"):
            ExtendedLens(lens_lm, blocks=blocks)


def test_too_little_text_is_refused(lens_lm, lens_batches):
    with pytest.raises(SondeError, match="too few"):
        ExtendedLens.fit(lens_lm, lens_batches, held_out=10**6)
