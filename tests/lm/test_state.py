"""The memory of every family under one interface: read, replace, copy, choose rows."""

import functools

import pytest
import torch
from families import FAMILIES, N_LAYERS, tiny, tokens

from sonde.errors import SondeError
from sonde.lm.continuation import call, continue_from
from sonde.lm.state import PARTS

ATTENTION = (
    "gpt2 gpt_neox gptj llama mistral qwen2 qwen3 gemma2 gemma3_text phi opt bloom falcon olmo2 cohere stablelm granite"
)
RWKV = {"recurrent.num", "recurrent.den", "recurrent.max", "shift.mixer", "shift.mlp"}
KV, SSM = {"kv.keys", "kv.values"}, {"recurrent", "conv"}
NAMES = {
    **{family: [KV] * 3 for family in ATTENTION.split()},
    **{family: [SSM] * 3 for family in ("mamba", "mamba2", "falcon_mamba")},
    **{family: [SSM, KV, SSM] for family in ("jamba", "bamba", "qwen3_next", "granitemoehybrid")},
    "recurrent_gemma": [SSM, SSM, KV],
    "falcon_h1": [SSM | KV] * 3,
    "lfm2": [{"conv"}, KV, {"conv"}],
    "rwkv": [RWKV] * 3,
    "xlstm": [{"recurrent.c", "recurrent.n", "recurrent.m"}] * 3,
}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@functools.cache
def model(family):
    return tiny(family, **({"rescale_every": 0} if family == "rwkv" else {}))


def prefix(family, rows=2):
    return call(model(family), tokens(rows, 6))[1]


def snapshot(cache):
    return {(layer, name): t for layer in range(cache.n_layers) for name, t in cache.read(layer).items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(tensor, other[key]) for key, tensor in one.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_have_the_parts_of_their_family_with_the_batch_first(family):
    cache = prefix(family)
    assert (cache.n_layers, cache.batch, cache.length) == (N_LAYERS, 2, 6)
    assert [set(cache.read(layer)) for layer in range(N_LAYERS)] == NAMES[family]
    for layer, names in enumerate(NAMES[family]):
        assert cache.parts(layer) == tuple(part for part in PARTS if part in {name.partition(".")[0] for name in names})
    assert all(len(tensor) == 2 for tensor in snapshot(cache).values())
    assert cache.recurs == (family not in ATTENTION.split())


@pytest.mark.parametrize("family", FAMILIES)
def test_continuing_from_a_clone_leaves_the_original_as_it_was(family):
    cache = prefix(family)
    before = snapshot(cache)
    clone = cache.clone()
    assert equal(snapshot(clone), before)
    for length in (1, 3):
        _, clone = continue_from(model(family), clone, tokens(2, length, seed=length))
    assert equal(snapshot(cache), before)
    assert cache.length == 6 and clone.length == 10
    assert not equal(snapshot(clone), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_selected_rows_continue_as_their_rows(family):
    cache = prefix(family, rows=3)
    before = snapshot(cache)
    rows, suffix = torch.tensor([2, 0, 2, 1, 0]), tokens(1, 3, seed=5)
    true, _ = continue_from(model(family), cache.clone(), suffix.expand(3, -1))
    found, _ = continue_from(model(family), cache.select(rows), suffix.expand(5, -1))
    assert torch.allclose(found, true[rows], atol=1e-4)
    assert equal(snapshot(cache), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_is_read_and_nothing_else_changes(family):
    cache = prefix(family)
    for layer, names in enumerate(NAMES[family]):
        for name in sorted(names):
            before = snapshot(cache)
            new = torch.randn(before[layer, name].shape)
            cache.write(layer, {name: new.double()})
            new[:] = 0  # the cache took a copy
            after = snapshot(cache)
            assert after[layer, name].dtype == before[layer, name].dtype
            assert after[layer, name].abs().min() > 0
            assert equal(
                {k: t for k, t in after.items() if k != (layer, name)},
                {k: t for k, t in before.items() if k != (layer, name)},
            )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_read_tensor_is_a_copy(family):
    cache = prefix(family)
    before = snapshot(cache)
    for tensor in snapshot(cache).values():
        tensor += 1
    assert equal(snapshot(cache), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_writing_a_state_into_one_row_changes_the_logits_of_that_row_alone(family):
    cache = prefix(family)
    edited = cache.clone()
    for layer in range(cache.n_layers):
        part = cache.parts(layer)[0]
        name = "kv.values" if part == "kv" else next(iter(cache.read(layer, part)))
        state = cache.read(layer, name)[name]
        state[1] += 3 * torch.randn(state[1].shape)
        edited.write(layer, {name: state})
    suffix = tokens(2, 2, seed=3)
    plain, _ = continue_from(model(family), cache, suffix)
    found, _ = continue_from(model(family), edited, suffix)
    assert torch.allclose(found[0], plain[0], atol=1e-5)
    assert ((found[1] - plain[1]).abs().amax(-1) > 1e-3).all()


def test_a_part_names_all_its_tensors():
    assert set(prefix("llama").read(0, "kv")) == {"kv.keys", "kv.values"}
    assert set(prefix("rwkv").read(1, "recurrent.num", "shift")) == {"recurrent.num", "shift.mixer", "shift.mlp"}


def test_a_prefix_of_one_model_survives_other_calls_of_that_model():
    """RecurrentGemma keeps its states on its modules."""
    kept = prefix("recurrent_gemma")
    true, _ = continue_from(model("recurrent_gemma"), kept.clone(), tokens(2, 3))
    model("recurrent_gemma")(tokens(2, 5, seed=9))
    call(model("recurrent_gemma"), tokens(2, 5, seed=8))
    assert torch.equal(continue_from(model("recurrent_gemma"), kept, tokens(2, 3))[0], true)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda cache: cache.read(3), r"state\.3 does not exist: there are state\.0 … state\.2"),
        (lambda cache: cache.read(0, "kv"), r"state\.0\.kv does not exist: state\.0 has recurrent, conv"),
        (lambda cache: cache.write(0, {"shift": torch.zeros(2)}), r"state\.0\.shift does not exist"),
        (lambda cache: cache.write(0, {"conv": torch.zeros(2)}), r"state\.0\.conv has shape \(2, 64, 4\), not \(2,\)"),
        (lambda cache: cache.select(torch.tensor([0, 2])), r"rows \[0, 2\] do not exist in a cache of 2 rows"),
        (lambda cache: cache.select(torch.tensor([], dtype=torch.long)), "rows .* do not exist"),
    ],
)
def test_what_a_cache_does_not_have_is_named(act, message):
    with pytest.raises(SondeError, match=message):
        act(prefix("mamba"))
