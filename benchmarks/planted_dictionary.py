"""What dictionaries recover of a planted one: recovery, centring, aux-k, thresholds and prefixes, on several seeds.

    python benchmarks/planted_dictionary.py [--seeds 0 1 2] [--only recovery centring auxk thresholds prefixes]

d = 64, 256 directions, firing rates ∝ exp(-3i/256) scaled to a mean L0 of 6, amplitudes U[.5, 1.5]; batches of 1024,
600 Adam steps at 3e-3 with 30 steps of warm-up and a decay over the last 180. One thread, four minutes of CPU time.
"""

import argparse
from typing import Any

import torch
from tqdm import tqdm

from sonde.features.dictionary import Design, Dictionary
from sonde.features.planted import PlantedDictionary, recovery
from sonde.features.step import Step
from sonde.features.step_config import StepConfig
from sonde.stats.intervals import Interval

D, N, L0, BATCH, STEPS = 64, 256, 6, 1024, 600
RECIPE: dict[str, Any] = {"lr": 3e-3, "warmup": 30, "steps": STEPS, "decay": 180, "threshold_start": 300}


def trained(
    planted: PlantedDictionary, dictionary: Dictionary, *, seed: int, steps: int = STEPS, **changes: Any
) -> tuple[Dictionary, Step, dict[str, float]]:
    """A dictionary after some steps on fresh rows, its step, and the terms of the last one."""
    step = Step(dictionary, StepConfig(**{**RECIPE, **changes}))
    terms: dict[str, float] = {}
    for i in tqdm(range(steps), desc=f"{dictionary.design.kind} {seed}", leave=False):
        terms = step(planted.sample(BATCH, seed=1_000_000 * (seed + 1) + i)[0])
    return dictionary, step, terms


def start(planted: PlantedDictionary, design: Design, *, seed: int, centred: bool = True) -> Dictionary:
    """An initialised dictionary, at the mean of one batch or at 0."""
    mean = planted.sample(BATCH, seed=seed)[0].mean(0) if centred else None
    return Dictionary.initialised(design, mean=mean, seed=seed)


def _of(interval: Interval) -> str:
    return f"{interval.estimate:.3f} ({interval.low:.3f} to {interval.high:.3f})"


def show_recovery(seed: int) -> None:
    """TopK on data without an offset."""
    planted = PlantedDictionary.random(D, N, l0=L0, seed=seed)
    made, _, _ = trained(planted, start(planted, Design("topk", D, 1024, 6), seed=seed), seed=seed)
    found = recovery(made, planted.directions)
    print(f"recovery {seed}: mean cosine {_of(found.mean)}, above .9 {_of(found.found)}, chance {found.chance:.3f}")


def show_centring(seed: int) -> None:
    """TopK on data with an offset, from its mean and from 0."""
    planted = PlantedDictionary.random(D, N, l0=L0, offset=True, seed=seed)
    for centred in (True, False):
        dictionary = start(planted, Design("topk", D, 1024, 6), seed=seed, centred=centred)
        made, step, _ = trained(planted, dictionary, seed=seed, dead_after=20 * BATCH, aux_weight=0.0)
        found = recovery(made, planted.directions)
        dead = float((step.since_fired[0] >= 20 * BATCH).double().mean())
        print(f"centring {seed}: from the {'mean' if centred else 'origin'}: {_of(found.mean)}, dead {dead:.3f}")


def show_auxk(seed: int) -> None:
    """Dead latents with and without the auxiliary loss, where half of them start with a bias of -0.6."""
    planted = PlantedDictionary.random(D, N, l0=L0, seed=seed)
    ways: dict[str, dict[str, Any]] = {
        "none": {"aux_weight": 0.0},
        "aux": {},
        "unrectified": {"aux_rectify": False},
    }
    for name, changes in ways.items():
        dictionary = start(planted, Design("topk", D, 320, 6), seed=seed)
        with torch.no_grad():
            dictionary.b_enc[::2] = -0.6
        _, _, terms = trained(planted, dictionary, seed=seed, dead_after=20_000, **changes)
        print(f"aux-k {seed}: {name}: dead {terms['dead']:.3f}, FVU {terms['fvu']:.4f}")


def show_thresholds(seed: int) -> None:
    """L0 on held-out rows of dictionaries that keep what is above a threshold."""
    planted = PlantedDictionary.random(D, N, l0=L0, seed=seed)
    held = planted.sample(8192, seed=99 + seed)[0]
    ways: dict[str, tuple[Design, dict[str, Any]]] = {
        "batchtopk": (Design("batchtopk", D, 1024, 6), {"threshold_decay": 0.99, "dead_after": 20_000}),
        "jumprelu": (
            Design("jumprelu", D, 1024, bandwidth=0.05, threshold=0.05),
            {"target_l0": 6.0, "penalty": "l0_target", "sparsity": 10.0, "sparsity_warmup": 100},
        ),
    }
    for name, (design, changes) in ways.items():
        made, _, terms = trained(planted, start(planted, design, seed=seed), seed=seed, **changes)
        with torch.no_grad():
            l0 = float((made.encode(held).values > 0).sum(1).double().mean())
            fvu = float((held - made(held)).square().sum() / (held - held.mean(0)).square().sum())
        print(
            f"thresholds {seed}: {name}: held-out L0 {l0:.2f} (6), FVU {fvu:.4f}, dead {terms['dead']:.3f}", flush=True
        )


def show_prefixes(seed: int) -> None:
    """FVU of the prefixes of a Matryoshka dictionary on held-out rows."""
    planted = PlantedDictionary.random(D, N, l0=L0, seed=seed)
    held = planted.sample(8192, seed=99 + seed)[0]
    made, _, _ = trained(planted, start(planted, Design("matryoshka", D, 1024, 6), seed=seed), seed=seed)
    spread = (held - held.mean(0)).square().sum()
    with torch.no_grad():
        outputs = [made.reconstruct(held, prefix=m) for m in made.design.prefixes]
    errors = [float((held - output).square().sum() / spread) for output in outputs]
    print(f"prefixes {seed}: FVU of {made.design.prefixes}: {[round(error, 4) for error in errors]}")


SHOWS = {
    "recovery": show_recovery,
    "centring": show_centring,
    "auxk": show_auxk,
    "thresholds": show_thresholds,
    "prefixes": show_prefixes,
}


def main() -> None:
    """Train and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--only", nargs="*", choices=list(SHOWS), default=list(SHOWS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    for name in given.only:
        for seed in given.seeds:
            SHOWS[name](seed)


if __name__ == "__main__":
    main()
