"""Dictionaries find what was planted: recovery, centring, aux-k, thresholds that keep L0, nested prefixes.

`benchmarks/planted_dictionary.py` repeats each at full length on three seeds.
"""

import pytest
import torch

from sonde.features.dictionary import Design, Dictionary
from sonde.features.planted import PlantedDictionary, recovery
from sonde.features.step import Step
from sonde.features.step_config import StepConfig

D, ROWS = 64, 1024
RECIPE = {"lr": 3e-3, "warmup": 30, "aux_weight": 0.0}


def trained(planted, dictionary, *, steps, rows=ROWS, **fields):
    step = Step(dictionary, StepConfig(**{**RECIPE, "steps": steps, "decay": int(0.3 * steps), **fields}))
    for i in range(steps):
        terms = step(planted.sample(rows, seed=1000 + i)[0])
    return dictionary, terms


def test_planted_rows_have_the_l0_and_the_offset_that_were_asked_for():
    planted = PlantedDictionary.random(D, 256, l0=6, offset=True)
    x, amplitudes = planted.sample(20_000, seed=0)
    active = amplitudes > 0
    assert float(active.sum(1).double().mean()) == pytest.approx(6, abs=0.1)
    assert torch.allclose(x, amplitudes @ planted.directions + planted.offset, atol=1e-5)
    assert float(amplitudes[active].min()) >= 0.5
    assert float(amplitudes.max()) <= 1.5
    assert float(active[:, 0].double().mean() / active[:, 255].double().mean()) == pytest.approx(20, rel=0.3)
    with pytest.raises(ValueError, match="l0 is 200"):
        PlantedDictionary.random(D, 256, l0=200)


def test_the_planted_directions_are_found_and_random_ones_are_not():
    planted = PlantedDictionary.random(D, 256, l0=6)
    perfect = recovery(planted.directions.flip(0) * 3, planted.directions)
    assert perfect.mean.estimate == pytest.approx(1)
    assert perfect.latents.tolist() == list(range(255, -1, -1))
    start = Dictionary.initialised(Design("topk", D, 1024, 6))
    assert recovery(start, planted.directions).mean.estimate == pytest.approx(perfect.chance, abs=0.08)


def test_topk_recovers_a_planted_dictionary():
    planted = PlantedDictionary.random(D, 256, l0=6)
    dictionary, _ = trained(planted, Dictionary.initialised(Design("topk", D, 1024, 6)), steps=600)
    found = recovery(dictionary, planted.directions)
    assert found.mean.estimate >= 0.93
    assert found.found.estimate >= 0.85
    assert found.chance < 0.5


def test_without_centring_a_mean_kills_latents_and_hides_directions():
    planted = PlantedDictionary.random(D, 128, l0=4, offset=True)
    mean = planted.sample(ROWS, seed=5)[0].mean(0)
    found = []
    for start in (mean, None):
        dictionary = Dictionary.initialised(Design("topk", D, 512, 4), mean=start)
        found.append(recovery(trained(planted, dictionary, steps=250)[0], planted.directions).mean.estimate)
    assert found[0] > 0.9
    assert found[1] < found[0] - 0.2


def test_aux_k_revives_latents():
    planted = PlantedDictionary.random(D, 256, l0=6)
    dead = {}
    for weight in (0.0, 1 / 32):
        dictionary = Dictionary.initialised(Design("topk", D, 320, 6))
        with torch.no_grad():
            dictionary.b_enc[::2] = -0.6
        fields = {"dead_after": 20_000, "aux_weight": weight}
        dead[weight] = trained(planted, dictionary, steps=600, **fields)[1]["dead"]
    assert dead[0.0] > 0.15
    assert dead[1 / 32] <= 0.65 * dead[0.0]


@pytest.mark.parametrize("kind", ["batchtopk", "jumprelu"])
def test_thresholds_keep_l0_on_rows_that_were_not_seen(kind):
    planted = PlantedDictionary.random(D, 128, l0=4)
    held = planted.sample(4096, seed=77)[0]
    if kind == "batchtopk":
        design, tolerance = Design(kind, D, 256, 4), 0.05
        fields = {"threshold_start": 100, "threshold_decay": 0.95}
    else:
        design, tolerance = Design(kind, D, 256, threshold=0.05, bandwidth=0.05), 0.1
        fields = {"target_l0": 4.0, "sparsity": 3.0, "sparsity_warmup": 50}
    dictionary, terms = trained(planted, Dictionary.initialised(design), steps=300, rows=512, **fields)
    with torch.no_grad():
        l0 = float((dictionary.encode(held).values > 0).sum(1).double().mean())
    assert l0 == pytest.approx(4, rel=tolerance)
    assert terms["fvu"] < 0.25


def test_each_prefix_of_a_matryoshka_dictionary_explains_no_less_than_the_one_before():
    planted = PlantedDictionary.random(D, 128, l0=4)
    held = planted.sample(4096, seed=77)[0]
    dictionary = Dictionary.initialised(Design("matryoshka", D, 256, 4))
    trained(planted, dictionary, steps=300, rows=512, threshold_start=100, threshold_decay=0.95)
    spread = (held - held.mean(0)).square().sum()
    with torch.no_grad():
        outputs = [dictionary.reconstruct(held, prefix=m) for m in dictionary.design.prefixes]
    errors = [float((held - out).square().sum() / spread) for out in outputs]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.5 * errors[0]
