import math

import numpy as np
import pytest
import torch
from families import tiny

from sonde.errors import SondeError
from sonde.features.activation_rows import Selection
from sonde.features.crosscoder import crosscoder
from sonde.features.dictionary import Design, Dictionary
from sonde.features.formats import sparsify
from sonde.features.formats.detection import load_dictionary
from sonde.features.metrics import Metrics, evaluate, evaluate_all
from sonde.features.reconstruction import ReconstructionSums, density_edges, density_histogram
from sonde.features.spliced_loss import recovered
from sonde.features.splicing import ablation, splice
from sonde.features.token_matrix import tokenizer_hash
from sonde.lm.batches import TokenBatches
from sonde.lm.model import LanguageModel
from sonde.organisms.loading import load

SITE = "resid_post.1"
pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture(scope="module")
def lm():
    return load("organism:pebble")


@pytest.fixture(scope="module")
def batches(lm):
    return TokenBatches(None, lm.tokenizer, context=24, rows=8, limit_tokens=1000)


def identity(d, **fields):
    """relu(x) - relu(-x) = x."""
    dictionary = Dictionary(Design("relu", d, 2 * d, **fields))
    eye = torch.eye(d)
    dictionary.w_enc.copy_(torch.cat([eye, -eye]))
    dictionary.w_dec.copy_(torch.cat([eye, -eye]))
    dictionary.site = SITE
    return dictionary


def constant(d, value):
    dictionary = Dictionary(Design("topk", d, 8, k=2))
    dictionary.b_dec.copy_(value)
    dictionary.site = SITE
    return dictionary


def random(d, kind="topk", **fields):
    dictionary = Dictionary.initialised(Design(kind, d, 64, **({"k": 4} if kind == "topk" else {}), **fields))
    dictionary.site = SITE
    return dictionary


def all_rows(lm, batches, site=SITE):
    rows = []
    for batch in batches:
        with lm.reading(site) as acts:
            lm(batch.tokens, batch.mask)
        rows.append(acts[site][batch.mask])
    return torch.cat(rows)


def test_a_perfect_dictionary_loses_nothing_and_a_constant_one_is_the_ablation(lm, batches):
    mean = all_rows(lm, batches).double().mean(0)
    dictionaries = {
        "perfect": identity(lm.d_model),
        "zero": constant(lm.d_model, torch.zeros(lm.d_model)),
        "mean": constant(lm.d_model, mean),
    }
    found = evaluate_all(
        lm, dictionaries, batches, tokens=10**6, loss_tokens=10**6, selection=Selection(keep_opening=True)
    )
    perfect = found["perfect"]
    r, losses = perfect.reconstruction, perfect.losses
    assert r.fvu.estimate == pytest.approx(0, abs=1e-10)
    for ratio in (r.cosine, r.l2_ratio, r.relative_bias):
        assert ratio.estimate == pytest.approx(1, abs=1e-6)
    assert r.l0.estimate == pytest.approx(lm.d_model) and r.alive > 0.95
    assert losses.delta.estimate == pytest.approx(0, abs=1e-6) and losses.kl.estimate == pytest.approx(0, abs=1e-6)
    for share in (losses.ce_recovered, losses.kl_recovered):
        assert share["zero"].value == pytest.approx(1, abs=1e-5) and share["mean"].value == pytest.approx(1, abs=1e-5)
    assert found["mean"].reconstruction.fvu.estimate == pytest.approx(1, abs=1e-6)
    assert found["mean"].reconstruction.alive == 0 and found["mean"].reconstruction.l0.estimate == 0
    assert found["mean"].losses.ce_recovered["mean"].value == pytest.approx(0, abs=1e-5)
    assert found["zero"].reconstruction.relative_bias is None
    assert found["zero"].losses.ce_recovered["zero"].value == pytest.approx(0, abs=1e-9)
    assert found["zero"].losses.kl_recovered["zero"].value == pytest.approx(0, abs=1e-9)
    assert found["zero"].losses.spliced == found["zero"].losses.ablated["zero"]


@pytest.mark.parametrize("kind", ["topk", "relu", "gated"])
def test_sums_over_batches_are_the_definitions_over_all_tokens(lm, batches, kind):
    dictionary = random(lm.d_model, kind)
    found = evaluate(lm, dictionary, batches, tokens=10**6, loss_tokens=0, selection=Selection(keep_opening=True))
    y = all_rows(lm, batches)
    out = dictionary(y).double()
    sparse = dictionary.encode(y)
    y = y.double()
    r = found.reconstruction
    assert r.tokens == len(y) and found.losses is None and found.truncated
    expected = {
        "fvu": (y - out).square().sum() / (y - y.mean(0)).square().sum(),
        "l0": (sparse.values > 0).sum(1).double().mean(),
        "l2_ratio": (out.norm(dim=1) / y.norm(dim=1)).mean(),
        "cosine": torch.cosine_similarity(out, y).mean(),
        "relative_bias": out.square().sum() / (out * y).sum(),
    }
    for name, value in expected.items():
        interval = getattr(r, name)
        assert interval.estimate == pytest.approx(float(value), rel=1e-9)
        assert interval.low <= interval.estimate <= interval.high
    fires = torch.bincount(sparse.indices[sparse.values > 0], minlength=64)
    assert r.alive == float((fires > 0).double().mean())
    assert sum(r.density) == int((fires > 0).sum()) and r.density == density_histogram(fires, len(y))


def test_losses_are_those_of_the_model_with_the_dictionary_in_it(lm, batches):
    dictionary = random(lm.d_model)
    losses = evaluate(lm, dictionary, batches, loss_tokens=10**6, selection=Selection(keep_opening=True)).losses
    clean, spliced, kl, n = 0.0, 0.0, 0.0, 0
    for batch in batches:
        p = lm(batch.tokens).logits.double().log_softmax(-1)
        with lm.editing({SITE: dictionary}):
            q = lm(batch.tokens).logits.double().log_softmax(-1)
        target = batch.tokens[:, 1:, None]
        clean -= float(p[:, :-1].gather(-1, target).sum())
        spliced -= float(q[:, :-1].gather(-1, target).sum())
        kl += float((p.exp() * (p - q))[:, :-1].sum())
        n += target.numel()
    assert losses.tokens == n == batches.n_tokens
    assert losses.clean.estimate == pytest.approx(clean / n, rel=1e-6)
    assert losses.delta.estimate == pytest.approx((spliced - clean) / n, rel=1e-4)
    assert losses.kl.estimate == pytest.approx(kl / n, rel=1e-4)
    zero = losses.ablated["zero"].estimate
    assert losses.ce_recovered["zero"].value == pytest.approx((zero - spliced / n) / (zero - clean / n), rel=1e-3)


def test_a_large_common_mean_costs_no_digits():
    x = torch.randn(500, 6, dtype=torch.float64) + 1e4
    dictionary = Dictionary(Design("topk", 6, 12, k=3)).double()
    dictionary.b_dec.copy_(x.mean(0))
    sums = ReconstructionSums(dictionary, "a", "a")
    for start in range(0, 500, 50):
        sums.update(x[start : start + 50], x[start : start + 50], torch.arange(50) // 10, 5)
    found = sums.result(np.arange(50), draws=100)
    assert found.fvu.estimate == pytest.approx(1, abs=1e-9)
    torch.testing.assert_close(sums.mean, x.mean(0), atol=1e-9, rtol=0)


def test_several_dictionaries_in_one_pass_get_the_numbers_that_each_gets_alone(lm, batches):
    dictionaries = {"a": random(lm.d_model), "deep": random(lm.d_model, "relu")}
    dictionaries["deep"].site = "mlp_out.2"
    together = evaluate_all(lm, dictionaries, batches, tokens=400, loss_tokens=200, draws=50)
    for name, dictionary in dictionaries.items():
        assert together[name] == evaluate(lm, dictionary, batches, tokens=400, loss_tokens=200, draws=50)


def test_the_perfect_transcoder_of_a_copied_stream(lm, batches):
    transcoder = Dictionary(Design("topk", lm.d_model, 8, k=2, transcodes=True, skip=True))
    transcoder.w_skip.copy_(torch.eye(lm.d_model))
    transcoder.site, transcoder.target = "resid_post.0", "resid_pre.1"
    found = evaluate(lm, transcoder, batches, tokens=500, loss_tokens=500, draws=50)
    assert found.reconstruction.fvu.estimate == pytest.approx(0, abs=1e-10)
    assert found.losses.delta.estimate == pytest.approx(0, abs=1e-6)
    assert found.losses.ce_recovered["mean"].value == pytest.approx(1, abs=1e-5)
    transcoder.w_skip.mul_(0.5)  # what stands at the target is half of what was read, wherever it was read
    worse = evaluate(lm, transcoder, batches, tokens=500, loss_tokens=500, draws=50)
    half = {"resid_pre.1": lambda x: x / 2}
    batch = next(iter(batches))
    with lm.editing(splice(transcoder, "resid_post.0", "resid_pre.1")):
        spliced = lm(batch.tokens).logits
    with lm.editing(half):
        torch.testing.assert_close(spliced, lm(batch.tokens).logits)
    assert worse.reconstruction.fvu.estimate > 0.1


def test_tokens_that_are_left_out_keep_their_activations_and_are_not_counted(lm, batches):
    batch = next(iter(batches))
    common = int(batch.tokens.flatten().mode().values)
    selection = Selection(skip=(common,), keep_opening=True)
    found = evaluate(lm, random(lm.d_model), batches, tokens=10**6, loss_tokens=0, selection=selection)
    everything = sum(int((b.tokens != common).sum()) for b in batches)
    assert found.reconstruction.tokens == everything
    taken = batch.tokens != common
    with lm.editing(ablation(SITE, 3.0, taken)), lm.reading(SITE) as acts:
        lm(batch.tokens)
    with lm.reading(SITE) as own:
        lm(batch.tokens)
    assert torch.equal(acts[SITE][~taken], own[SITE][~taken]) and bool((acts[SITE][taken] == 3).all())


def test_metrics_come_back_from_their_file(lm, batches, tmp_path):
    found = evaluate(lm, random(lm.d_model), batches, tokens=300, loss_tokens=300, draws=50)
    found.save(tmp_path / "metrics.json")
    assert Metrics.load(tmp_path / "metrics.json") == found
    (tmp_path / "other.json").write_text('{"format": "x"}')
    with pytest.raises(SondeError, match="does not hold the metrics of a dictionary"):
        Metrics.load(tmp_path / "other.json")


def test_nothing_to_recover_is_nan_with_its_reason_and_not_a_large_number(lm, batches, tmp_path):
    tokens, top = np.full(40, 10.0), np.random.default_rng(0).normal(size=40)
    share = recovered(top, 1e-4 * tokens, tokens, "zero ablation")
    assert math.isnan(share.value) and share.interval is None
    assert share.reason.startswith("zero ablation costs 0.0001 nats a token") and "nothing to recover" in share.reason
    noisy = recovered(top, top - top.mean() + 0.02, tokens, "mean ablation")
    assert math.isnan(noisy.value)
    # an untrained model loses nothing by an ablation: its predictions are noise with or without it
    untrained = LanguageModel(tiny("gpt_neox", vocab_size=lm.vocab_size), name="untrained")
    found = evaluate(untrained, random(untrained.d_model), batches, tokens=300, loss_tokens=300, draws=50)
    assert math.isnan(found.losses.ce_recovered["mean"].value)
    found.save(tmp_path / "metrics.json")
    again = Metrics.load(tmp_path / "metrics.json").losses.ce_recovered["mean"]
    assert math.isnan(again.value) and again.reason == found.losses.ce_recovered["mean"].reason


def test_density_edges_hold_the_bins():
    fires = torch.tensor([0, 1, 10, 100, 1000])
    edges = density_edges()
    histogram = density_histogram(fires, 1000)
    assert len(edges) == len(histogram) + 1 and sum(histogram) == 4
    filled = [edges[i] for i, count in enumerate(histogram) if count]
    assert filled == [-3, -2, -1, -0.25]


# bad input


def test_a_transcoder_is_not_evaluated_as_an_autoencoder(lm, batches):
    transcoder = Dictionary(Design("topk", lm.d_model, 8, k=2, transcodes=True))
    transcoder.site = SITE
    with pytest.raises(SondeError, match=r"is a transcoder and cannot be evaluated as an autoencoder of resid_post\.1"):
        evaluate(lm, transcoder, batches)
    with pytest.raises(SondeError, match=r"is an autoencoder of resid_post\.1: it has no target mlp_out\.0"):
        evaluate(lm, random(lm.d_model), batches, target="mlp_out.0")


def test_reading_a_dictionary_for_another_model_warns_with_both_names(lm, tmp_path):
    sparsify.save(random(lm.d_model), tmp_path / "layers.1")
    (tmp_path / "config.json").write_text('{"model": "EleutherAI/pythia-70m"}')
    with pytest.warns(UserWarning, match="made for EleutherAI/pythia-70m and is used on organism:pebble"):
        found = load_dictionary(tmp_path / "layers.1", lm=lm)
    assert found.site == SITE


def test_a_crosscoder_is_not_measured_at_one_site(lm, batches):
    several = Dictionary(crosscoder((lm.d_model, lm.d_model), 8, kind="relu"))
    with pytest.raises(SondeError, match="is a crosscoder of several sites"):
        evaluate(lm, several, batches, site=SITE)


def test_places_and_widths_that_do_not_fit_are_named(lm, batches):
    lost = random(lm.d_model)
    lost.site = None
    with pytest.raises(SondeError, match="has no recorded site: give site="):
        evaluate(lm, lost, batches)
    assert evaluate(lm, lost, batches, site=SITE, tokens=300, loss_tokens=0, draws=20).site == SITE
    lost.site = "resid_post.11"
    with pytest.raises(SondeError, match=r"resid_post\.1"):
        evaluate(lm, lost, batches)
    wide = random(lm.d_model + 1)
    with pytest.raises(SondeError, match=rf"resid_post.1 has width {lm.d_model}, but .* has {lm.d_model + 1} there"):
        evaluate(lm, wide, batches)
    with pytest.raises(SondeError, match="no dictionary to evaluate"):
        evaluate_all(lm, {}, batches)
    with pytest.raises(SondeError, match="tokens is 0"):
        evaluate(lm, random(lm.d_model), batches, tokens=0)


def test_a_text_of_which_no_token_is_left_is_an_error_and_not_nan(lm, batches):
    with pytest.raises(SondeError, match=r"every token of .* is left out"):
        evaluate(lm, random(lm.d_model), batches, selection=Selection(skip=tuple(range(lm.vocab_size))))


def test_activations_that_are_not_finite_stop_with_site_batch_and_token(batches):
    broken = LanguageModel(tiny("gpt_neox", vocab_size=4096), name="broken")
    broken.structure.embedding.weight[int(batches[1].tokens[2, 5])] = math.nan
    with pytest.raises(SondeError, match=r"resid_post.1 holds nan or infinity in batch \d+, row \d+, position \d+"):
        evaluate(broken, random(broken.d_model), batches)


def test_another_model_or_tokenizer_than_recorded_is_a_warning_with_both_names(lm, batches):
    dictionary = random(lm.d_model)
    dictionary.model = "EleutherAI/pythia-70m"
    with pytest.warns(UserWarning, match="made for EleutherAI/pythia-70m and is used on organism:pebble"):
        evaluate(lm, dictionary, batches, tokens=300, loss_tokens=0, draws=20)
    dictionary.model, dictionary.model_hash = "somebody/stone", lm.hash
    dictionary.tokenizer_hash = tokenizer_hash(lm.tokenizer)
    evaluate(lm, dictionary, batches, tokens=300, loss_tokens=0, draws=20)
    dictionary.tokenizer_hash = "0" * 64
    with pytest.warns(
        UserWarning, match="the tokenizer of somebody/stone .00000000. and is used with that of organism:pebble"
    ):
        evaluate(lm, dictionary, batches, tokens=300, loss_tokens=0, draws=20)
