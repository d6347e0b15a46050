"""A run split by the cache gives the logits of the whole run, in every family, where transformers alone does not.

The rows of `TRANSFORMERS` are what transformers 5.23 was measured to do by itself: the largest error of a split run,
relative to the largest logit, for one and for four tokens after a prefix of six, at batch 2.
"""

import functools
import math

import pytest
import torch
import transformers
from families import FAMILIES, VOCAB, tiny, tokens

from sonde.errors import SondeError
from sonde.lm.continuation import call, continuation, continue_from, difference, measure

STEPPED = {"mamba", "falcon_mamba", "jamba", "recurrent_gemma"}
LEAKING = {"rwkv", "xlstm", "recurrent_gemma"}
# family: (one token is right, four tokens in one call are right)
TRANSFORMERS = {
    "mamba": (True, False),
    "falcon_mamba": (True, False),
    "jamba": (True, False),
    "recurrent_gemma": (True, False),
    "rwkv": (False, True),
    "bamba": (False, False),
    **dict.fromkeys(
        FAMILIES.keys() - {"mamba", "falcon_mamba", "jamba", "recurrent_gemma", "rwkv", "bamba"}, (True, True)
    ),
}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@functools.cache
def model(family):
    return tiny(family, **({"rescale_every": 0} if family == "rwkv" else {}))


def split_by_transformers(family, ids, cut):
    """What a user of transformers would write."""
    lm = model(family)
    if family == "recurrent_gemma":
        native = {"past_key_values": transformers.DynamicCache(config=lm.config)}
        lm(ids[:, :cut], use_cache=True, **native)
    else:
        out = lm(ids[:, :cut], use_cache=True)
        name = next(
            name for name in ("past_key_values", "cache_params", "state") if getattr(out, name, None) is not None
        )
        native = {name: out[name]}
    return lm(ids[:, cut:], use_cache=True, **native).logits


@pytest.mark.skipif(not transformers.__version__.startswith("5.23"), reason="records what transformers 5.23 does")
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_alone_is_right_and_wrong_where_the_table_says(family):
    ids = tokens(2, 10)
    whole = model(family)(ids).logits
    errors = [difference(split_by_transformers(family, ids[:, : 6 + n], 6), whole[:, 6 : 6 + n]) for n in (1, 4)]
    assert tuple(error < 1e-4 for error in errors) == TRANSFORMERS[family], errors
    wrong = [error for error, right in zip(errors, TRANSFORMERS[family], strict=True) if not right]
    assert all(error > 1e-3 for error in wrong)


@pytest.mark.skipif(not transformers.__version__.startswith("5.23"), reason="records what transformers 5.23 does")
def test_one_rwkv_token_mixes_the_rows_in_transformers():
    ids = tokens(3, 7)
    assert split_by_transformers("rwkv", ids, 6).shape == (3, 3, VOCAB)
    assert difference(split_by_transformers("rwkv", ids[:1], 6), model("rwkv")(ids[:1]).logits[:, 6:]) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_every_split_gives_the_logits_of_the_whole_run(family):
    ids = tokens(2, 11, seed=2)
    whole = model(family)(ids).logits
    for cuts in ([1], [3, 4], [6, 7, 8], [2, 7]):
        logits, cache = call(model(family), ids[:, : cuts[0]])
        pieces = [logits]
        for start, stop in zip(cuts, [*cuts[1:], 11], strict=True):
            logits, cache = continue_from(model(family), cache, ids[:, start:stop])
            pieces.append(logits)
        assert difference(torch.cat(pieces, 1), whole) < 1e-5
        assert cache.length == 11


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - LEAKING))
def test_left_padding_changes_no_logits_before_or_after_the_cut(family):
    ids, pads = tokens(3, 9, seed=4), torch.tensor([0, 4, 2])
    mask = torch.arange(9) >= pads[:, None]
    logits, cache = call(model(family), ids[:, :6], mask=mask[:, :6])
    for start, stop in ((6, 7), (7, 9)):
        more, cache = continue_from(model(family), cache, ids[:, start:stop], mask[:, :stop])
        logits = torch.cat([logits, more], 1)
    for row, pad in enumerate(pads):
        assert difference(logits[row : row + 1, pad:], model(family)(ids[row : row + 1, pad:]).logits) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_the_mode_and_the_leak_of_pads_are_measured(family):
    how = continuation(model(family))
    assert how.mode == ("step" if family in STEPPED else "chunk")
    assert how.ignores_mask == (family in LEAKING)
    assert how.columns(3) == ([slice(0, 1), slice(1, 2), slice(2, 3)] if family in STEPPED else [slice(0, 3)])
    assert max(how.one, how.step) < 1e-5
    assert continuation(model(family)) is how
    how.require(family)
    if family in LEAKING:
        with pytest.raises(
            SondeError, match=r"pads leak into real tokens \(error .* put rows of equal length into a batch"
        ):
            how.require_mask(family)
        mask = torch.arange(5).expand(2, 5) > 0
        with pytest.raises(SondeError, match="pads leak into real tokens"):
            continue_from(model(family), call(model(family), tokens(2, 4), mask=mask[:, :4])[1], tokens(2, 1), mask)
    else:
        how.require_mask(family)


@pytest.mark.parametrize("spread", [0.02, 0.002])
@pytest.mark.parametrize("family", ["jamba", "mamba", "falcon_mamba"])
def test_a_forgotten_state_is_seen_where_the_logits_hide_it(family, spread):
    """At the initialisation of transformers the error of Jamba is below what rounding explains."""
    config = tiny(family).config
    config.initializer_range = spread
    torch.manual_seed(0)
    how = measure(transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval())
    if family == "jamba":
        assert how.chunk < how.tolerance
    assert how.states == pytest.approx(1.0, abs=0.5)
    assert how.mode == "step"


@pytest.mark.parametrize(
    "family", ["mamba", "jamba", "recurrent_gemma", "mamba2", "bamba", "rwkv", "granitemoehybrid", "llama"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_finds_the_same_mode(family, dtype):
    how = measure(tiny(family, **({"rescale_every": 0} if family == "rwkv" else {})).to(dtype))
    assert how.mode == ("step" if family in STEPPED else "chunk")
    assert how.ignores_mask == (family in LEAKING)


def test_a_model_that_continues_wrongly_is_refused_with_the_measured_error():
    broken = tiny("llama")
    attention = broken.model.layers[1].self_attn
    right = attention.forward
    attention.forward = lambda *args, **kwargs: right(
        *args, **{**kwargs, "past_key_values": None, "attention_mask": None}
    )
    how = measure(broken)
    assert how.mode == "none" and how.step > 1e-2
    with pytest.raises(SondeError, match=r"LlamaForCausalLM cannot continue from its cache: .* differs .* by \d\.\de"):
        continue_from(broken, call(broken, tokens(2, 4))[1], tokens(2, 1))


def test_a_model_that_fails_on_the_way_is_refused_with_its_own_words():
    broken = tiny("gpt2")
    right = broken.forward

    def forward(*args, **kwargs):
        if kwargs.get("past_key_values") is not None:
            raise RuntimeError("no cache today")
        return right(*args, **kwargs)

    broken.forward = forward
    how = measure(broken)
    assert how.mode == "none" and math.isinf(how.step)
    with pytest.raises(SondeError, match="no cache today"):
        how.require("broken")


def test_a_model_without_a_cache_is_refused():
    broken = tiny("gpt2")
    right = broken.forward
    broken.forward = lambda *args, **kwargs: right(*args, **{**kwargs, "use_cache": False})
    how = measure(broken)
    assert how.mode == "none"
    assert "no cache of a known kind" in how.failure


def test_hooks_see_nothing_of_the_measurement_and_do_not_change_it():
    lm, calls = tiny("mamba"), []
    lm.get_submodule("backbone.layers.0").register_forward_hook(
        lambda module, args, output: calls.append(1) or output * 0
    )
    assert measure(lm) == measure(tiny("mamba"))
    assert not calls
    lm(tokens(1, 2))
    assert calls


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda lm, cache: call(lm, tokens(3, 1), cache=cache), "the cache holds 2 rows, the tokens 3"),
        (
            lambda lm, cache: call(lm, tokens(2, 1), cache=cache, mask=torch.ones(2, 1) > 0),
            r"mask has shape \(2, 1\).*\(2, 5\)",
        ),
        (
            lambda lm, cache: call(lm, tokens(2, 4), mask=torch.arange(4).expand(2, 4) < 3),
            "pads to the right of tokens stay",
        ),
    ],
)
@pytest.mark.parametrize("family", ["llama", "mamba2"])
def test_rows_and_masks_that_do_not_fit_are_refused(family, act, message):
    lm = model(family)
    with pytest.raises(SondeError, match=message):
        act(lm, call(lm, tokens(2, 4))[1])
