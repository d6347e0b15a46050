import pytest
import torch
from families import tiny

from sonde.errors import SondeError
from sonde.lens.descent import Descent, LensTraining, ridge_translators, shuffled
from sonde.lens.fused import Readout, Target
from sonde.lens.training import LensTrainer, fit
from sonde.lens.tuned import TunedLens
from sonde.lm.batches import TokenBatches
from sonde.lm.model import LanguageModel
from sonde.lm.stream import Batch, stream
from sonde.stats.moments import Moments

QUICK = {"steps": 8, "tokens_per_step": 512, "held_out": 512, "evaluate_every": 4}


@pytest.mark.parametrize("trainer", ["ridge+muon", "ridge+adam", "ridge", "muon", "adam", "sgd"])
@pytest.mark.parametrize("kind", ["tuned", "bias"])
@pytest.mark.parametrize("cached", [True, False])
def test_every_trainer_beats_the_logit_lens_at_every_layer(lens_lm, lens_batches, trainer, kind, cached):
    settings = LensTraining(
        trainer=trainer, kind=kind, cache_bytes=1 << 30 if cached else 0, ridge_tokens=1000, **QUICK
    )
    trainer = LensTrainer(lens_lm, settings, expected_tokens=lens_batches.n_tokens)
    assert trainer.caching == cached
    for batch in stream(lens_lm, lens_batches, sites=trainer.sites):
        trainer.update(batch)
    lens = trainer.finish()
    assert (torch.tensor(lens.facts["held_out_loss"]) < torch.tensor(trainer.history[0]["loss"])).all()
    assert lens.facts["steps"] == settings.n_steps


def test_ridge_finds_a_planted_affine_map():
    d = 5
    hidden, weight, bias = torch.randn(200, d).double(), torch.randn(d, d).double(), torch.randn(d).double()
    moments = Moments(d, d).update(hidden, hidden @ weight.T + bias)
    found = ridge_translators([moments], 0.0)
    torch.testing.assert_close(found[0][0], weight)
    torch.testing.assert_close(found[1][0], bias)


def test_strong_ridge_leaves_the_logit_lens_and_a_bias():
    hidden, rest = torch.randn(200, 5), torch.randn(200, 5) + 3
    weight, bias = ridge_translators([Moments(5, 5).update(hidden, rest)], 1e9)
    assert weight.abs().max() < 1e-6
    torch.testing.assert_close(bias[0].float(), rest.mean(0), atol=1e-5, rtol=0)


def test_the_best_parameters_of_each_layer_are_kept(lens_lm):
    lens = TunedLens.zeros(lens_lm)
    readout = Readout(lens_lm.unembedding)
    descent = Descent(lens, readout, LensTraining(steps=4, evaluate_every=1, lr=1e4, trainer="adam"))
    hidden, final = torch.randn(3, 64, 32), torch.randn(64, 32)
    descent.hold_out(hidden, Target.model(readout, final))
    descent.evaluate()
    for _ in range(4):
        descent.descend(hidden, Target.model(readout, final))
    descent.settle()
    assert descent.best.tolist() == [min(losses) for losses in zip(*(h["loss"] for h in descent.history), strict=True)]
    with torch.no_grad():
        torch.testing.assert_close(descent.loss(*descent.held).double(), descent.best)


def test_training_stops_without_progress(lens_lm):
    lens = TunedLens.zeros(lens_lm)
    readout = Readout(lens_lm.unembedding)
    descent = Descent(lens, readout, LensTraining(steps=50, evaluate_every=1, patience=2, lr=1e-12, trainer="adam"))
    hidden, target = torch.randn(3, 16, 32), Target.model(readout, torch.randn(16, 32))
    descent.hold_out(hidden, target)
    descent.evaluate()
    while not descent.done:
        descent.descend(hidden, target)
    assert descent.step == 2


class Killed(Exception):
    pass


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("trainer", ["ridge+muon", "sgd"])
def test_a_killed_training_ends_with_the_same_numbers(lens_lm, lens_batches, tmp_path, monkeypatch, cached, trainer):
    settings = LensTraining(trainer=trainer, cache_bytes=1 << 30 if cached else 0, ridge_tokens=1000, **QUICK)
    whole = fit(lens_lm, lens_batches, settings)
    descend, path = Descent.descend, tmp_path / "checkpoint.safetensors"
    for stop in (3, 5, 6):

        def killed(self, *args, stop=stop, **options):
            if self.step == stop:
                raise Killed
            return descend(self, *args, **options)

        monkeypatch.setattr(Descent, "descend", killed)
        with pytest.raises(Killed):
            fit(lens_lm, lens_batches, settings, checkpoint=path, checkpoint_every=2)
    monkeypatch.setattr(Descent, "descend", descend)
    for _ in range(2):  # going on, and reading what has ended
        resumed = fit(lens_lm, lens_batches, settings, checkpoint=path, checkpoint_every=2)
        assert torch.equal(resumed.weight, whole.weight)
        assert torch.equal(resumed.bias, whole.bias)
        assert resumed.facts == whole.facts


def test_a_checkpoint_of_another_training_is_refused(lens_lm, lens_batches, tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    fit(lens_lm, lens_batches, LensTraining(**QUICK), checkpoint=path)
    with pytest.raises(SondeError, match="another lens training"):
        fit(lens_lm, lens_batches, LensTraining(**QUICK, seed=1), checkpoint=path)


def test_pads_change_nothing(lens_lm):
    settings = LensTraining(steps=2, held_out=40, tokens_per_step=40)
    lenses = []
    for filler in (0, 7):
        trainer = LensTrainer(lens_lm, settings, expected_tokens=200)
        generator = torch.Generator().manual_seed(0)
        for index in range(3):
            tokens = torch.randint(3, 400, (4, 16), generator=generator)
            mask = torch.ones_like(tokens, dtype=torch.bool)
            mask[1, 10:], mask[3, 5:] = False, False
            tokens = tokens.masked_fill(~mask, filler)
            with torch.no_grad(), lens_lm.reading(*trainer.sites) as acts:
                lens_lm(tokens, mask)
            none = torch.zeros(4, dtype=torch.long)
            trainer.update(Batch(tokens, mask, index, none, none, none, acts=dict(acts)))
        lenses.append(trainer.finish())
    assert torch.equal(lenses[0].weight, lenses[1].weight)


@pytest.mark.parametrize("shift", [1, 2, -1])
def test_cross_entropy_is_to_the_token_that_the_shift_names(lens_lm, lens_batches, shift):
    settings = LensTraining(loss="ce", token_shift=shift, steps=1, held_out=512)
    trainer = LensTrainer(lens_lm, settings, expected_tokens=3000)
    batch = next(stream(lens_lm, lens_batches, sites=[*trainer.sites, "logits"]))
    trainer.hold_out(batch)
    for other in stream(lens_lm, lens_batches, sites=trainer.sites, start=1):
        trainer.update(other)
    trainer.finish()
    logits = lens_lm.unembed(batch.acts["resid_pre.2"])
    here, there = (slice(None, -shift), slice(shift, None)) if shift > 0 else (slice(-shift, None), slice(None, shift))
    expected = torch.nn.functional.cross_entropy(logits[:, here].flatten(0, 1), batch.tokens[:, there].flatten())
    assert trainer.history[0]["loss"][2] == pytest.approx(expected.item(), rel=1e-4)


def test_half_precision_models_are_trained_in_float32(lens_batches, lens_lm):
    lm = LanguageModel(tiny("gpt_neox", vocab_size=400).bfloat16(), lens_lm.tokenizer, name="half")
    lens = fit(lm, lens_batches, LensTraining(**QUICK))
    assert lens.weight.dtype == torch.float32
    assert lens(torch.randn(2, 32, dtype=torch.bfloat16), 0).dtype == torch.bfloat16


def test_states_that_are_not_finite_are_refused(lens_lm):
    trainer = LensTrainer(lens_lm)
    tokens = torch.ones(2, 8, dtype=torch.long)
    acts = {site: torch.full((2, 8, 32), torch.inf) for site in trainer.sites}
    none = torch.zeros(2, dtype=torch.long)
    with pytest.raises(SondeError, match="nan or infinity"):
        trainer.update(Batch(tokens, torch.ones_like(tokens, dtype=torch.bool), 0, none, none, none, acts=acts))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainer": "lion"}, "trainer"),
        ({"loss": "mse"}, "loss"),
        ({"kind": "logit"}, "kind"),
        ({"held_out": 0}, "held_out"),
    ],
)
def test_settings_that_mean_nothing_are_refused(changes, message):
    with pytest.raises(SondeError, match=message):
        LensTraining(**changes)


def test_too_little_text_is_refused(lens_lm):
    batches = TokenBatches(None, lens_lm.tokenizer, context=32, limit_tokens=40)
    with pytest.raises(SondeError, match="give more text"):
        fit(lens_lm, batches)


def test_every_epoch_visits_every_row_once():
    for epoch in range(2):
        seen = torch.cat([shuffled(12, 4, 3 * epoch + i, seed=5) for i in range(3)])
        assert sorted(seen.tolist()) == list(range(12))
