"""Steering: known truth on the mode-recall organisms, and the batch of all settings against one setting at a time."""

import itertools
import warnings

import pytest
import torch
from families import tiny, tokens

import sonde
from sonde.concepts.affine import AffineEdit
from sonde.concepts.contrast import contrast
from sonde.concepts.state_steering import state_contrast
from sonde.concepts.sweep import (
    Choice,
    Steering,
    Sweep,
    both_steerings,
    by_suffix,
    residual_steerings,
    state_steerings,
    sweep,
)
from sonde.errors import SondeError
from sonde.lm.model import LanguageModel
from sonde.organisms.mode_recall import FAMILIES, answer_ids, draw, pairs

MULTIPLIERS = (-3.0, -1.5, -1.0, -0.5, 0.5, 1.0, 1.5, 3.0)


def choices(n, *, seed):
    match, other = answer_ids().tolist()
    return [Choice(row, match, other) for row in draw(n, seed=seed)[0].tolist()]


class Toy:
    """A mode-recall organism with its contrasts and the sweep over all layers and multipliers."""

    def __init__(self, family):
        self.lm = sonde.load(f"organism:mode-recall-{family}", check=False)
        self.day, self.night = pairs(64, seed=1)
        self.vectors = contrast(self.lm, self.day, self.night, sites=["embed", "resid_post.*"])
        self.states = state_contrast(self.lm, [row[:-1] for row in self.day], [row[:-1] for row in self.night])
        self.items = choices(64, seed=2)
        steerings = [
            *residual_steerings(self.vectors),
            *state_steerings(self.states),
            *both_steerings(self.vectors, self.states),
        ]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # at three times the difference some layers say neither word
            self.sweep = sweep(self.lm, self.items, steerings, multipliers=MULTIPLIERS, rows=512)

    def best(self, name, multiplier):
        layer = self.sweep.best_layer(name, multiplier)
        return self.sweep.mean(name, layer, multiplier), self.sweep.mean(name, layer, -multiplier)


@pytest.fixture(scope="module", params=FAMILIES)
def toy(request):
    return Toy(request.param)


def test_without_steering_each_answer_has_half_of_the_probability(toy):
    assert abs(float(toy.sweep.base_match.mean()) - 0.5) <= 0.01
    assert float(toy.sweep.base_nonsense.mean()) < 0.01


def test_the_residual_vector_decides_the_answer_at_the_best_layer(toy):
    up, down = toy.best("residual", 1.0)
    assert up >= 0.98
    assert down <= 0.02


def test_the_states_difference_decides_the_answer_at_the_best_layer(toy):
    if toy.lm.family == "rwkv":
        up, down = toy.best("state", 3.0)
        assert up >= 0.9
        assert down <= 0.05
    else:
        up, down = toy.best("state", 1.0)
        assert up >= 0.85
        assert down <= 0.40


def test_the_ratio_form_acts_monotonely_in_rwkv():
    toy = Toy("rwkv")
    for layer in toy.states.layers:
        means = [toy.sweep.mean("state", layer, m) for m in MULTIPLIERS]
        assert all(a <= b + 1e-3 for a, b in itertools.pairwise(means)), (layer, means)


def test_both_edits_move_the_answer_as_far_as_the_better_one_alone(toy):
    base = float(toy.sweep.base_match.mean())
    for multiplier in (-0.5, 0.5):
        moved = {
            name: max(abs(toy.sweep.mean(name, layer, multiplier) - base) for layer in toy.states.layers)
            for name in ("residual", "state", "both")
        }
        assert moved["both"] >= max(moved["residual"], moved["state"]) - 0.02, moved


def test_sites_where_the_pairs_do_not_differ_change_nothing(toy):
    assert not toy.vectors.difference("embed").any()  # the query is the same word
    for multiplier in MULTIPLIERS:
        assert abs(toy.sweep.mean("residual", -1, multiplier) - float(toy.sweep.base_match.mean())) < 0.01


def test_shuffled_pairs_change_little(toy):
    swap = torch.randperm(64, generator=torch.Generator().manual_seed(0))[:32].tolist()
    sides = [
        [(b if i in swap else a) for i, (a, b) in enumerate(zip(one, other, strict=True))]
        for one, other in ((toy.day, toy.night), (toy.night, toy.day))
    ]
    shuffled = contrast(toy.lm, *sides)
    states = state_contrast(toy.lm, *([row[:-1] for row in side] for side in sides))
    found = sweep(toy.lm, toy.items, both_steerings(shuffled, states), rows=512)
    assert found.largest("both") < 0.1


def test_the_states_effect_fades_with_the_tokens_after_it(toy):
    layer = toy.sweep.best_layer("state", 3.0)
    steering = [one for one in state_steerings(toy.states) if one.layer == layer]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = by_suffix(toy.lm, toy.items[:16], steering, (1, 4, 8), multipliers=(-3.0, 3.0), rows=512)
    assert set(found) == {1, 4, 8}
    assert found[1].largest("state") >= found[8].largest("state") - 0.05


@pytest.mark.parametrize(
    "family", ["gpt2", "llama", "mamba", "mamba2", "rwkv", "recurrent_gemma", "qwen3_next", "xlstm"]
)
@pytest.mark.parametrize("suffix", [1, 3])
def test_all_settings_in_one_batch_are_those_of_one_whole_pass_each(family, suffix):
    lm = LanguageModel(tiny(family))
    rows = [row[: 9 - i % 3].tolist() for i, row in enumerate(tokens(5, 9, seed=1))]
    items = [Choice(row, 5, 7) for row in rows]
    vectors = {f"resid_post.{i}": torch.randn(lm.d_model, generator=torch.Generator().manual_seed(i)) for i in (0, 2)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a random model says neither
        found = sweep(lm, items, residual_steerings(vectors), multipliers=(-1.0, 0.5), suffix=suffix, rows=7)
    for number, row in enumerate(rows):
        ids = torch.tensor([row])
        settings = [(None, found.base_match[number])]
        settings += [
            ((site, m), found.match[i, j, number])
            for i, site in enumerate(vectors)
            for j, m in enumerate(found.multipliers)
        ]
        for setting, match in settings:
            edits = {} if setting is None else {setting[0]: AffineEdit.add(vectors[setting[0]], setting[1])}
            with lm.editing(edits, positions=slice(-suffix, None)):
                p = lm(ids).logits[0, -1].softmax(-1)
            torch.testing.assert_close(match, p[5] / (p[5] + p[7]), rtol=1e-4, atol=1e-5)


def test_the_table_has_a_row_for_every_setting_with_intervals(toy):
    rows = [effect.row() for effect in toy.sweep.effects()]
    assert len(rows) == len(toy.sweep.names) * len(MULTIPLIERS)
    for row in rows:
        assert row["match_low"] <= row["match"] <= row["match_high"]
        assert row["change"] == pytest.approx(row["match"] - float(toy.sweep.base_match.mean()), abs=1e-5)


def test_a_sweep_comes_back_from_a_bundle(toy, tmp_path):
    from sonde.files import load_bundle, save_bundle

    save_bundle(tmp_path / "sweep.safetensors", toy.sweep.state())
    back = Sweep.from_state(load_bundle(tmp_path / "sweep.safetensors"))
    assert torch.equal(back.match, toy.sweep.match) and list(back.names) == list(toy.sweep.names)
    assert back.effects() == toy.sweep.effects()


def test_multipliers_that_overflow_or_end_in_nonsense_are_told():
    lm = sonde.load("organism:mode-recall-rwkv", check=False)
    day, night = pairs(8, seed=1)
    steering = residual_steerings(contrast(lm, day, night, sites="resid_post.2"))
    nan = [Steering("nan", 1, {"resid_post.1": _Nan(added=torch.ones(lm.d_model))})]
    with pytest.warns(UserWarning, match="nan at layer 1, multiplier 1, gives numbers that are not finite"):
        found = sweep(lm, choices(4, seed=1), nan, multipliers=(1.0,))
    (effect,) = found.effects()
    assert effect.match is None and effect.row()["match"] is None
    out = torch.zeros(lm.d_model)
    out[:] = lm.unembedding.weight[3] - lm.unembedding.weight[answer_ids()].mean(0)
    away = [Steering("away", 2, {"resid_post.2": AffineEdit.add(50 * out)})]
    with pytest.warns(UserWarning, match=r"away at layer 2, multiplier 1, leaves .* to neither answer \(0.00 without"):
        sweep(lm, choices(4, seed=1), away, multipliers=(1.0,))
    pebble = sonde.load("organism:pebble", check=False)
    with pytest.warns(UserWarning, match=r"without steering the model gives \d\.\d\d of the probability to neither"):
        sweep(pebble, [Choice([5, 6, 7], 8, 9)], [Steering("x", 1, {"resid_post.1": AffineEdit.add(torch.ones(192))})])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sweep(lm, choices(4, seed=1), steering, multipliers=(0.5,))


class _Nan(AffineEdit):
    def forward(self, h):
        return h * torch.nan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"items": []}, "at least one item"),
        ({"steerings": []}, "at least one item, one steering"),
        ({"multipliers": ()}, "one multiplier"),
        ({"items": [Choice([3], 5, 7)]}, "item 0 has 1 tokens: a suffix of 1 leaves no prefix"),
        ({"items": [Choice([3, 4], 5, 5)]}, "both answers of item 0 are token 5"),
        (
            {"steerings": [Steering("x", 9, {"resid_post.9": AffineEdit.add(torch.ones(32))})]},
            r"'resid_post\.9' does not",
        ),
        ({"steerings": [Steering("x", 9, {"logits": AffineEdit.add(torch.ones(97))})]}, "logits is not a site of"),
        (
            {"steerings": [Steering("x", 0, {"resid_post.0": AffineEdit.add(torch.ones(16))})]},
            r"has width 16, .* has 32",
        ),
        ({"steerings": [Steering("x", 7, state={7: {}})]}, "edits nothing|layer 7 does not exist"),
        ({"steerings": [Steering("x", 0, state={0: {"recurrent": torch.ones(3)}})]}, "no|not"),
    ],
    ids=str,
)
def test_bad_input_is_answered_in_one_line(change, message):
    lm = LanguageModel(tiny("gpt2"), name="tiny")
    steering = [Steering("x", 0, {"resid_post.0": AffineEdit.add(torch.ones(32))})]
    given = {"items": [Choice([3, 4, 5], 5, 7)], "steerings": steering, "multipliers": (1.0,), **change}
    with pytest.raises(SondeError, match=message) as error:
        sweep(lm, given["items"], given["steerings"], multipliers=given["multipliers"])
    assert "\n" not in str(error.value)


def test_what_was_not_run_cannot_be_asked_for(toy):
    with pytest.raises(SondeError, match="state at layer 9, multiplier 1, was not run"):
        toy.sweep.mean("state", 9, 1.0)
    with pytest.raises(SondeError, match="no steering 'prompt' was run: there are residual, state, both"):
        toy.sweep.best_layer("prompt")
    with pytest.raises(SondeError, match="no steering 'prompt'"):
        toy.sweep.largest("prompt")
    with pytest.raises(ValueError, match="edits nothing"):
        Steering("x", 0)
    with pytest.raises(ValueError, match="suffix is 0"):
        sweep(toy.lm, toy.items, state_steerings(toy.states), suffix=0)


def test_a_model_in_training_mode_is_refused():
    lm = LanguageModel(tiny("gpt2"), name="tiny")
    steering = [Steering("x", 0, {"resid_post.0": AffineEdit.add(torch.ones(32))})]
    lm.model.train()
    with pytest.raises(SondeError, match="is in training mode"):
        sweep(lm, [Choice([3, 4], 5, 7)], steering)
    lm.model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the name is about to change
        lm.model.gradient_checkpointing_enable()
    with pytest.raises(SondeError, match="recomputes activations"):
        sweep(lm, [Choice([3, 4], 5, 7)], steering)


def test_a_crashed_edit_leaves_no_hook_behind():
    lm = LanguageModel(tiny("gpt2"))

    class Crash(AffineEdit):
        def forward(self, h):
            raise RuntimeError("crash")

    before = lm(torch.tensor([[3, 4, 5]])).logits
    with pytest.raises(RuntimeError, match="crash"):
        sweep(lm, [Choice([3, 4], 5, 7)], [Steering("x", 0, {"resid_post.0": Crash(added=torch.ones(32))})])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in lm.model.modules())
    assert torch.equal(lm(torch.tensor([[3, 4, 5]])).logits, before)


def test_a_model_that_is_wrapped_already_is_refused():
    with pytest.raises(SondeError, match="tiny is wrapped already"):
        LanguageModel(LanguageModel(tiny("gpt2"), name="tiny"))
