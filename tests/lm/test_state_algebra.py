"""Sums and differences of states in canonical form, in every family that recurs."""

import functools

import pytest
import torch
from families import tiny, tokens

from sonde.errors import SondeError
from sonde.lm.continuation import call, continue_from
from sonde.lm.state_algebra import (
    canonical,
    difference,
    interpolated,
    mean,
    moved,
    on_heads,
    shifted,
    states,
    swapped,
)

LINEAR = [
    "mamba",
    "mamba2",
    "falcon_mamba",
    "jamba",
    "bamba",
    "falcon_h1",
    "granitemoehybrid",
    "qwen3_next",
    "recurrent_gemma",
]
STABILISED = ["rwkv", "xlstm"]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@functools.cache
def model(family):
    return tiny(family, **({"rescale_every": 0} if family == "rwkv" else {}))


def prefix(family, seed=0, rows=2):
    return call(model(family), tokens(rows, 6, seed=seed))[1]


def logits(family, cache):
    return continue_from(model(family), cache.clone(), tokens(cache.batch, 3, seed=7))[0]


def rescaled(cache, by):
    """The same memory of RWKV or xLSTM under another stabiliser."""
    copy = cache.clone()
    for layer in range(cache.n_layers):
        old = cache.read(layer)
        *sums, peak = [name for name in old if name.startswith("recurrent.")]
        copy.write(layer, {**{name: old[name] * torch.exp(torch.tensor(-by)) for name in sums}, peak: old[peak] + by})
    return copy


@pytest.mark.parametrize("family", LINEAR + STABILISED)
def test_adding_the_difference_of_two_contexts_gives_the_other_ones_canonical_state(family):
    one, other = prefix(family), prefix(family, seed=1)
    delta = difference(states(other, 0), states(one, 0))
    new = shifted(one, 0, delta)
    assert torch.allclose(states(new, 0)["recurrent"], states(other, 0)["recurrent"], atol=1e-5)
    half = shifted(one, 0, delta, torch.tensor([0.5, 0.0]))
    middle = (states(one, 0)["recurrent"] + states(other, 0)["recurrent"]) / 2
    assert torch.allclose(states(half, 0)["recurrent"][0], middle[0], atol=1e-5)
    assert torch.equal(logits(family, half)[1], logits(family, one)[1])
    assert not torch.allclose(logits(family, half)[0], logits(family, one)[0], atol=1e-4)


@pytest.mark.parametrize("family", STABILISED)
def test_the_canonical_form_does_not_depend_on_the_stabiliser(family):
    cache = prefix(family)
    same = rescaled(cache, 3.0)
    # what is equal in the model is equal in canonical form, though the raw numbers differ by e^3
    assert torch.allclose(logits(family, same), logits(family, cache), atol=1e-4)
    assert torch.allclose(states(same, 1)["recurrent"], states(cache, 1)["recurrent"], rtol=1e-4)
    delta = difference(mean(states(prefix(family, seed=1), 1)), mean(states(cache, 1)))
    one, other = (logits(family, shifted(c, 1, delta, 2.0)) for c in (cache, same))
    assert torch.allclose(one, other, atol=1e-4)


def test_rwkv_adds_to_the_numerator_and_leaves_normaliser_and_maximum():
    cache = prefix("rwkv")
    old = cache.read(1)
    delta = torch.randn(old["recurrent.num"].shape[1])
    new = shifted(cache, 1, {"recurrent": delta}, -1.5).read(1)
    assert torch.allclose(new["recurrent.num"], old["recurrent.num"] - 1.5 * delta * old["recurrent.den"])
    assert all(torch.equal(new[name], old[name]) for name in old if name != "recurrent.num")


@pytest.mark.parametrize("family", LINEAR + STABILISED)
def test_interpolation_runs_from_one_context_to_the_other(family):
    one, other = prefix(family), prefix(family, seed=1)
    if "kv" in {part for layer in range(3) for part in one.parts(layer)}:
        other = swapped(one, other, [i for i in range(3) if set(one.parts(i)) - {"kv"}])  # the same keys and values
    ends = [logits(family, interpolated(one, other, t)) for t in (0.0, 1.0)]
    assert torch.allclose(ends[0], logits(family, one), atol=1e-4)
    assert torch.allclose(ends[1], logits(family, other), atol=1e-4)
    by_row = logits(family, interpolated(one, other, torch.tensor([0.0, 1.0])))
    assert torch.allclose(by_row, torch.stack([ends[0][0], ends[1][1]]), atol=1e-4)
    between = interpolated(one, other, 0.25, layers=[0])
    expected = 0.75 * states(one, 0)["recurrent"] + 0.25 * states(other, 0)["recurrent"]
    if family != "xlstm":  # whose normaliser is a vector: the mean of two has another length
        assert torch.allclose(states(between, 0)["recurrent"], expected, atol=1e-5)
    assert all(torch.equal(between.read(2)[name], value) for name, value in one.read(2).items())


@pytest.mark.parametrize("family", ["mamba2", "rwkv", "xlstm", "lfm2"])
def test_a_swap_of_every_layer_is_the_other_context(family):
    one, other = prefix(family), prefix(family, seed=1)
    layers = [layer for layer in range(3) if set(one.parts(layer)) - {"kv"}]
    new = swapped(one, other, layers)
    for layer in layers:
        for part in set(one.parts(layer)) - {"kv"}:
            assert all(torch.equal(new.read(layer, part)[n], v) for n, v in other.read(layer, part).items())
    if len(layers) == 3:
        assert torch.equal(logits(family, new), logits(family, other))
    partly = swapped(one, other, layers[:1], one.parts(layers[0])[0])
    assert not torch.equal(logits(family, partly), logits(family, one))


def test_a_whole_sweep_is_one_batch():
    cache, strengths = prefix("mamba2", rows=1), torch.tensor([-2.0, 0.0, 0.5, 3.0])
    delta = {"recurrent": torch.randn(states(cache, 1)["recurrent"].shape[1:])}
    rows = shifted(cache.select(torch.zeros(4, dtype=torch.long)), 1, delta, strengths)
    alone = [logits("mamba2", shifted(cache, 1, delta, float(m))) for m in strengths]
    found = continue_from(model("mamba2"), rows, tokens(1, 3, seed=7).expand(4, -1))[0]
    assert torch.allclose(found, torch.cat(alone), atol=1e-5)


def test_convolution_windows_are_added_on_request():
    one, other = prefix("mamba"), prefix("mamba", seed=1)
    delta = difference(states(other, 0, "recurrent", "conv"), states(one, 0, "recurrent", "conv"))
    new = shifted(one, 0, delta)
    assert torch.allclose(new.read(0)["conv"], other.read(0)["conv"], atol=1e-5)
    assert set(delta) == {"recurrent", "conv"}


def test_states_of_half_precision_are_rounded_once_at_the_end():
    cache = prefix("mamba2")
    half = {name: value.bfloat16() for name, value in cache.read(0).items()}
    delta = {"recurrent": torch.full(half["recurrent"].shape[1:], 1e-3)}
    new = moved(half, delta, 100.0)["recurrent"]
    assert new.dtype == torch.bfloat16
    assert torch.equal(new, (half["recurrent"].float() + 0.1).bfloat16())


def test_heads_are_chosen_by_number():
    delta = {"recurrent": torch.ones(4, 16, 8)}
    assert on_heads(delta, [1, 3])["recurrent"].sum((1, 2)).tolist() == [0, 128, 0, 128]
    with pytest.raises(SondeError, match="head 4 does not exist: there are 0 … 3"):
        on_heads(delta, [0, 4])
    with pytest.raises(SondeError, match="heads are of the recurrent state; this difference has conv"):
        on_heads({"conv": torch.ones(4)}, [0])


def delta(shape=(4, 16, 8), **parts):
    return {"recurrent": torch.ones(shape), **parts}


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: states(prefix("llama"), 0), r"state\.0 has no recurrent memory to edit: it has kv"),
        (lambda: states(prefix("llama"), 0, "kv"), "keys and values have the length of their context"),
        (lambda: states(prefix("jamba"), 1), r"state\.1 has no recurrent memory to edit: it has kv"),
        (lambda: states(prefix("mamba2"), 3), r"state\.3 does not exist: there are state\.0 … state\.2"),
        (lambda: swapped(prefix("llama"), prefix("llama"), [0]), r"state\.0 has kv: there is no state to edit"),
        (lambda: interpolated(prefix("gpt2"), prefix("gpt2"), 0.5), "keeps keys and values alone"),
        (lambda: shifted(prefix("mamba2"), 0, delta((4, 16, 9))), r"has shape \(4, 16, 9\); .* takes \(4, 16, 8\)"),
        (lambda: shifted(prefix("mamba2"), 0, delta((3, 4, 16, 8))), r"or \(2, 4, 16, 8\) for each row"),
        (lambda: shifted(prefix("mamba2"), 0, delta(kv=torch.ones(2))), "the state has recurrent, conv, not 'kv'"),
        (lambda: shifted(prefix("mamba2"), 0, delta(), torch.ones(3)), r"\(3,\) strengths for 2 rows"),
        (lambda: shifted(prefix("mamba2"), 0, delta(), float("nan")), "the strength is nan"),
        (lambda: shifted(prefix("mamba2"), 0, delta(), torch.tensor([1.0, float("inf")])), "a strength is not finite"),
        (lambda: shifted(prefix("mamba2"), 0, {"recurrent": torch.full((4, 16, 8), float("nan"))}), "not finite"),
        (lambda: difference(delta(), {"conv": torch.ones(2)}), "different parts: recurrent and conv"),
        (lambda: interpolated(prefix("mamba2"), prefix("mamba2", rows=3), 0.5), "use as many rows in both"),
        (lambda: canonical({}, of="state.1"), r"state\.1 has no recurrent memory to edit: it has none"),
    ],
)
def test_what_cannot_be_added_is_refused_with_the_reason(act, message):
    with pytest.raises(SondeError, match=message):
        act()
