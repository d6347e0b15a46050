"""Designs and step configurations check themselves, and name the field that does not fit."""

import pytest

from sonde.features.design import Design
from sonde.features.step_config import StepConfig

BAD_DESIGNS = {
    "kind": {"kind": "softmax"},
    "inputs": {"inputs": 0},
    "latents": {"latents": 0},
    "k is 65, more than": {"k": 65},
    "k is 0": {"k": 0},
    "k is -1": {"k": -1},
    "k is None": {"k": None},
    "but kind 'relu' has none": {"kind": "relu"},
    "not divisible by k = 5": {"kind": "groupmax", "k": 5},
    "prefixes are .16, 16, 64.": {"kind": "matryoshka", "prefixes": (16, 16, 64)},
    "prefixes are .16, 32.": {"kind": "matryoshka", "prefixes": (16, 32)},
    "prefix_weights are": {"kind": "matryoshka", "prefixes": (16, 64), "prefix_weights": (1.0,)},
    "prefixes and prefix_weights are for": {"prefixes": (16, 64)},
    "outputs is 8": {"outputs": 8},
    "skip is for transcoders": {"skip": True},
    "centred subtracts": {"transcodes": True, "outputs": 8, "centred": True},
    "layer_norm": {"transcodes": True, "layer_norm": True},
    "multi_topk is for": {"kind": "batchtopk", "multi_topk": True},
    "ranked_by_norm is not": {"kind": "groupmax", "ranked_by_norm": True},
    "bandwidth": {"kind": "jumprelu", "k": None, "bandwidth": 0.0},
    "threshold": {"kind": "jumprelu", "k": None, "threshold": -0.1},
    "streams are": {"streams": (8, 9)},
}


@pytest.mark.parametrize("message", BAD_DESIGNS)
def test_a_design_that_does_not_fit_names_the_field(message):
    with pytest.raises(ValueError, match=message):
        Design(**({"kind": "topk", "inputs": 16, "latents": 64, "k": 4} | BAD_DESIGNS[message]))


BAD_STEPS = {
    "optimizer is 'sgd'": ("topk", {"optimizer": "sgd"}),
    "penalty is 'l2'": ("topk", {"penalty": "l2"}),
    "penalty is 'l1': kind 'jumprelu'": ("jumprelu", {"penalty": "l1"}),
    "penalty is 'l0': kind 'relu'": ("relu", {"penalty": "l0"}),
    "target_l0 is None": ("jumprelu", {"penalty": "l0_target"}),
    "target_l0 is 0": ("jumprelu", {"target_l0": 0}),
    "sparsity is 0.1": ("topk", {"sparsity": 0.1}),
    "sparsity is -1": ("relu", {"sparsity": -1}),
    "lr is 0": ("topk", {"lr": 0}),
    "clip is -1": ("topk", {"clip": -1}),
    "warmup is -1": ("topk", {"warmup": -1}),
    "decay is 20": ("topk", {"steps": 10, "decay": 20}),
    "momentum is 1": ("topk", {"momentum": 1.0}),
    "norm is 'unit'": ("topk", {"norm": "unit"}),
    "reconstruction is 'l1'": ("topk", {"reconstruction": "l1"}),
    "dead_penalty is for": ("topk", {"dead_penalty": 1.0}),
    "aux_weight is not for": ("gated", {"aux_weight": 1.0}),
    "k_start is 2": ("topk", {"k_start": 2, "k_steps": 5}),
    "k_start is 8: kind 'groupmax'": ("groupmax", {"k_start": 8}),
}


@pytest.mark.parametrize("message", BAD_STEPS)
def test_a_step_that_does_not_fit_names_the_field(message):
    kind, fields = BAD_STEPS[message]
    with pytest.raises(ValueError, match=message):
        StepConfig(**fields).for_design(Design(kind, 16, 64, 4 if kind in ("topk", "groupmax") else None))


def test_a_transcoders_decoder_starts_at_zero_and_so_has_free_norms():
    with pytest.raises(ValueError, match="norm is 'project'"):
        StepConfig(norm="project").for_design(Design("topk", 16, 64, 4, transcodes=True))


def test_a_design_survives_json():
    design = Design("matryoshka", 16, 64, 4, prefixes=(16, 64), prefix_weights=(0.25, 0.75))
    assert Design.from_json(design.to_json()) == design
    with pytest.raises(ValueError, match="no field colour"):
        Design.from_json(design.to_json() | {"colour": "red"})


def test_the_weights_of_prefixes_sum_to_one():
    design = Design("matryoshka", 16, 64, 4)
    assert design.prefixes == (4, 8, 16, 32, 64)
    assert sum(design.prefix_weights) == pytest.approx(1)


def test_the_rate_rises_stays_and_falls_and_k_falls_to_its_own():
    config = StepConfig(warmup=4, steps=20, decay=4, k_start=40, k_steps=10)
    assert [config.factor(i) for i in (0, 3, 10, 15)] == [0.25, 1, 1, 1]
    assert [round(config.factor(i), 6) for i in (16, 17, 18, 19)] == [0.8, 0.6, 0.4, 0.2]
    assert [config.k_at(i, 10) for i in (0, 5, 10, 100)] == [40, 25, 10, 10]
