"""Layers ablated, deleted, permuted and replaced, on tiny random models of every family."""

import contextlib
import functools

import numpy as np
import pytest
import torch
from families import FAMILIES, N_LAYERS, tiny, tokens
from hypothesis import given
from hypothesis import strategies as st

from sonde.errors import SondeError
from sonde.lm.batches import TokenBatches
from sonde.lm.model import LanguageModel
from sonde.lm.surgery import ablated, deleted, deletion_effects, derangement, permuted, replaced
from sonde.organisms.small_lm import train_tokenizer
from sonde.stats import information


@functools.cache
def model(family: str = "llama") -> LanguageModel:
    return LanguageModel(tiny(family), name=family)


def allowed(lm: LanguageModel) -> list[int]:
    """An order in which only blocks of one kind change places; that of RWKV's first is its own."""
    for order in ([2, 0, 1], [2, 1, 0], [0, 2, 1], [1, 0, 2]):
        with contextlib.suppress(SondeError), permuted(lm, order):
            return order
    raise AssertionError(f"no two blocks of {lm.name} are of one kind")


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layer", range(N_LAYERS))
def test_a_deleted_block_leaves_the_stream_as_it_was(family, layer):
    lm, ids = model(family), tokens(2, 8)
    plain = lm(ids).logits
    with deleted(lm, [layer]), lm.reading("resid_pre.*", "resid_post.*", "logits") as acts:
        lm(ids)
    assert torch.equal(acts[f"resid_post.{layer}"], acts[f"resid_pre.{layer}"])
    with lm.reading(f"resid_pre.{layer}") as before:
        lm(ids)
    with lm.editing({f"resid_post.{layer}": lambda _: before[f"resid_pre.{layer}"]}):
        assert torch.allclose(lm(ids).logits, acts["logits"], atol=1e-5)
    assert not torch.allclose(plain, acts["logits"], atol=1e-3)
    assert torch.equal(lm(ids).logits, plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_its_blocks_a_model_unembeds_the_embedding(family):
    lm, ids = model(family), tokens(2, 8)
    with deleted(lm, range(lm.n_layers)), lm.reading("resid_pre.0", "logits") as acts:
        lm(ids)
    assert torch.allclose(lm.unembed(acts["resid_pre.0"]), acts["logits"], atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_split_run_without_a_block_is_the_whole_run_without_it(family):
    lm, ids = model(family), tokens(2, 8)
    with deleted(lm, [1]):
        whole = lm(ids).logits
        past = lm(ids[:, :5], use_cache=True).past
        parts = [lm(ids[:, :5]).logits, lm(ids[:, 5:], past=past).logits]
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_deletion_stops_early_and_lets_the_deleted_part_be_read(family):
    lm, ids = model(family), tokens(2, 8)
    with deleted(lm, [1]), lm.reading("resid_post.1") as part:
        out = lm(ids)
    with deleted(lm, [1]), lm.reading("resid_post.1", "logits") as whole:
        lm(ids)
    assert out.logits is None
    assert torch.equal(part["resid_post.1"], whole["resid_post.1"])
    if "mixer_out.1" in lm.sites:
        with lm.reading("mixer_out.1") as plain:
            lm(ids)
        with deleted(lm, [1]), lm.reading("mixer_out.1") as said:
            lm(ids)
        assert torch.equal(plain["mixer_out.1"], said["mixer_out.1"])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_whose_blocks_were_moved_is_the_permuted_one(family):
    lm, ids = model(family), tokens(2, 8)
    order = allowed(lm)
    with permuted(lm, order):
        found = lm(ids).logits
    moved = tiny(family)
    blocks = LanguageModel(moved, name="moved").structure.blocks
    for place, block in enumerate([blocks[i] for i in order]):
        blocks[place] = block
    assert torch.allclose(moved(input_ids=ids, use_cache=False).logits, found, atol=1e-5)
    with permuted(lm, order):
        past = lm(ids[:, :5], use_cache=True).past
        assert torch.allclose(lm(ids[:, 5:], past=past).logits, found[:, 5:], atol=1e-4)


def test_blocks_of_different_kinds_are_not_exchanged():
    with pytest.raises(SondeError, match="of the kind 'full_attention'"), permuted(model("gemma3_text"), [1, 0, 2]):
        pass
    with pytest.raises(SondeError, match="one of them has"), permuted(model("rwkv"), [1, 0, 2]):
        pass


@pytest.mark.parametrize("layers", [[3], [-4], [0, 7]])
def test_layers_out_of_range_are_refused(layers):
    with pytest.raises(SondeError, match="has layers 0 to 2"), deleted(model(), layers):
        pass


@pytest.mark.parametrize("order", [[0, 1], [0, 0, 1], []])
def test_an_order_that_is_no_permutation_is_refused(order):
    with pytest.raises(SondeError, match="each of the layers 0 to 2 once"), permuted(model(), order):
        pass


def test_negative_layers_count_from_the_last():
    lm, ids = model(), tokens(2, 8)
    with deleted(lm, [-1]):
        last = lm(ids).logits
    with deleted(lm, [2]):
        assert torch.equal(lm(ids).logits, last)


@pytest.mark.parametrize("surgery", [lambda lm: deleted(lm, [1]), lambda lm: permuted(lm, [1, 0, 2])])
def test_an_error_inside_leaves_the_model_as_it_was(surgery):
    lm, ids = model(), tokens(2, 8)
    plain = lm(ids).logits
    with pytest.raises(RuntimeError), surgery(lm):
        raise RuntimeError
    assert torch.equal(lm(ids).logits, plain)
    assert not any("forward" in vars(block) for block in lm.structure.blocks)


def test_surgeries_nest_and_meet_edits():
    lm, ids = model(), tokens(2, 8)
    with permuted(lm, [1, 0, 2]), deleted(lm, [0]):  # place 0 is passed by: block 0 runs second
        nested = lm(ids).logits
    with deleted(lm, [0]), replaced(lm, {1: 0}):  # block 0, deleted already, in place 1
        assert torch.allclose(lm(ids).logits, _only(lm, ids, [2]), atol=1e-5)
    assert torch.allclose(nested, _only(lm, ids, [0, 2]), atol=1e-5)
    with deleted(lm, [1]), lm.editing({"resid_pre.1": torch.zeros_like}), lm.reading("resid_post.1") as acts:
        lm(ids)
    assert not acts["resid_post.1"].any()


def _only(lm: LanguageModel, ids: torch.Tensor, blocks: list[int]) -> torch.Tensor:
    other = tiny("llama")
    kept = [other.model.layers[i] for i in blocks]
    other.model.layers = torch.nn.ModuleList(kept)
    other.config.num_hidden_layers = len(kept)
    return other(input_ids=ids, use_cache=False).logits


def test_a_block_of_another_model_runs_in_place():
    lm, ids = model(), tokens(2, 8)
    donor = LanguageModel(tiny("llama", seed=1), name="donor")
    with replaced(lm, {1: donor.structure.blocks[1]}):
        found = lm(ids).logits
    chimera = tiny("llama")
    chimera.model.layers[1] = tiny("llama", seed=1).model.layers[1]
    assert torch.allclose(chimera(input_ids=ids, use_cache=False).logits, found, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "mamba", "xlstm", "rwkv"])
def test_a_block_in_two_places_runs_without_a_cache_only(family):
    lm, ids = model(family), tokens(2, 8)
    with replaced(lm, {2: 1}):
        assert lm(ids).logits is not None
        with pytest.raises(SondeError, match="which have one memory"):
            lm(ids, use_cache=True)


@pytest.mark.parametrize("over", ["rows", "tokens"])
def test_mean_ablation_adds_the_mean_update(over):
    lm, ids = model(), tokens(3, 8)
    with lm.reading("resid_pre.1", "resid_post.1") as acts:
        lm(ids)
    update = acts["resid_post.1"] - acts["resid_pre.1"]
    mean = update.mean(0, keepdim=True) if over == "rows" else update.mean((0, 1), keepdim=True)
    expected = acts["resid_pre.1"] + mean
    with ablated(lm, [1], "mean", over=over), lm.reading("resid_post.1") as found:
        lm(ids)
    assert torch.allclose(found["resid_post.1"], expected, atol=1e-5)


@pytest.mark.parametrize("over", ["rows", "tokens"])
def test_resampling_gives_every_row_or_token_the_update_of_another(over):
    lm, ids = model(), tokens(3, 8)
    with lm.reading("resid_pre.1", "resid_post.1") as acts:
        lm(ids)
    update = acts["resid_post.1"] - acts["resid_pre.1"]
    with ablated(lm, [1], "resample", over=over, seed=3), lm.reading("resid_post.1") as found:
        lm(ids)
    new = found["resid_post.1"] - acts["resid_pre.1"]
    if over == "rows":
        assert torch.allclose(new, update[derangement(3, seed=3)], atol=1e-5)
    else:
        assert torch.allclose(new.flatten(0, 1), update.flatten(0, 1)[derangement(24, seed=3)], atol=1e-5)


def test_pads_do_not_enter_means_or_other_rows():
    lm, ids = model(), tokens(2, 8)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 5:] = False
    other = torch.where(mask, ids, (ids + 1) % 97)
    found = []
    for padded in (ids, other):
        with ablated(lm, [1], "mean", over="tokens"):
            found.append(lm(padded, mask).logits[mask])
    assert torch.allclose(*found, atol=1e-5)
    with pytest.raises(SondeError, match="without pads"), ablated(lm, [1], "mean"):
        lm(ids, mask)


@pytest.mark.parametrize("by", ["mean", "resample"])
def test_ablation_of_a_single_row_is_refused(by):
    lm = model()
    with pytest.raises(SondeError, match="at least 2 rows, not 1"), ablated(lm, [1], by):
        lm(tokens(1, 8))
    with pytest.raises(SondeError, match="at least 2 tokens, not 1"), ablated(lm, [1], by, over="tokens"):
        lm(tokens(1, 1))


def test_unknown_ablations_are_refused():
    with pytest.raises(SondeError, match="use zero, mean or resample"), ablated(model(), [0], "noise"):
        pass
    with pytest.raises(SondeError, match="use rows or tokens"), ablated(model(), [0], "mean", over="words"):
        pass


@given(n=st.integers(2, 40), seed=st.integers(0, 1000))
def test_a_derangement_moves_everything(n, seed):
    order = derangement(n, seed=seed)
    assert sorted(order.tolist()) == list(range(n))
    assert (order != torch.arange(n)).all()


def test_there_is_no_derangement_of_one():
    with pytest.raises(SondeError, match="at least 2"):
        derangement(1)


def batches(join: bool = True) -> TokenBatches:
    texts = ["the cat sat on the mat and looked", "a dog", "one two three four five six seven", "so it is"] * 4
    return TokenBatches(texts, train_tokenizer(texts, 97 + 160), context=12, rows=4, join=join)


@pytest.mark.parametrize("family", ["gpt_neox", "mamba", "rwkv", "jamba", "gemma2"])
@pytest.mark.parametrize("join", [True, False])
def test_effects_of_deletion_are_those_of_deleting(family, join):
    lm = LanguageModel(tiny(family, vocab_size=257), name=family)
    text = batches(join)
    effects = deletion_effects(lm, text)
    rows = 0
    for batch in text:
        plain = information.log_probs(lm(batch.tokens, batch.mask).logits)
        for layer in range(lm.n_layers):
            with deleted(lm, [layer]):
                changed = information.log_probs(lm(batch.tokens, batch.mask).logits)
            kl = (information.kl(plain, changed) * batch.mask).sum(-1)
            here = slice(rows, rows + len(kl))
            assert np.allclose(effects.kl[layer, here], kl, rtol=1e-3, atol=1e-5)
            target = batch.tokens[:, 1:]
            gap = information.cross_entropy(changed[:, :-1], target) - information.cross_entropy(plain[:, :-1], target)
            assert np.allclose(effects.loss[layer, here], (gap * batch.mask[:, 1:]).sum(-1), rtol=1e-3, atol=1e-4)
        rows += len(batch.tokens)
    assert effects.scored.sum() == text.n_tokens
    assert effects.bytes.sum() == text.n_bytes
    assert all(0 <= kl.low <= kl.estimate for kl in effects.kl_by_layer())
    assert len(effects.loss_by_layer(noise=True)) == lm.n_layers


def test_a_block_that_adds_nothing_is_deleted_without_effect():
    quiet = tiny("llama", vocab_size=257)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        quiet.model.layers[1].get_submodule(name).weight.zero_()
    effects = deletion_effects(LanguageModel(quiet, name="quiet"), batches())
    assert not effects.kl[1].any()
    assert not effects.noise_kl[1].any()
    assert effects.kl[0].min() > 0
