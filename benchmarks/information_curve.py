"""Time of a five-point information curve with three restarts on the toy, and of the same grid one prompt at a time.

    python benchmarks/information_curve.py

The toy is a GPT-NeoX of 3 layers and width 64 with a backdoor; its clean twin is the control model. Both ways train the
same prompts on the same batches.
"""

import time

import torch

import sonde
from sonde.data.markov_language import contexts, trigger_ids
from sonde.prompts.bits import measure_bits
from sonde.prompts.claims import claim
from sonde.prompts.elicitation import Budget, elicit, information_curve, parts_of
from sonde.prompts.examples import Examples
from sonde.prompts.training import train_prompts

BUDGET = Budget(lengths=(1, 4, 16, 64), restarts=3, lrs=(0.3,), steps=80, batch=16)


def main() -> None:
    """Print seconds of the processor and of the clock, and what was found."""
    torch.set_num_threads(1)  # so that seconds of the processor mean something on a busy machine
    lm, clean = (sonde.load(f"organism:markov-{which}") for which in ("backdoor", "clean"))
    asked = contexts(80, seed=1)
    examples = Examples(asked, [trigger_ids()[1]] * len(asked))
    parts = parts_of(examples)
    began, used = time.perf_counter(), time.process_time()
    information_curve(lm, parts, BUDGET)
    print(f"five points, three restarts: {time.perf_counter() - began:.1f} s of the clock, ", end="")
    print(f"{time.process_time() - used:.1f} s of the processor")
    began, used = time.perf_counter(), time.process_time()
    for n in BUDGET.lengths:
        for restart in range(BUDGET.restarts):
            train_prompts(
                lm, parts[0], lengths=(n,), restarts=1, steps=BUDGET.steps, batch=16, seed=restart, validation=parts[1]
            )
    print(f"one prompt at a time: {time.perf_counter() - began:.1f} s of the clock, ", end="")
    print(f"{time.process_time() - used:.1f} s of the processor")
    found = elicit(lm, examples, BUDGET, behaviour="write the payload", control=clean)
    for name, curve in found.curves.items():
        points = [f"{row['n']}: {row['nats']:.3g} nats, {row['success']:.0%}" for row in curve.rows()]
        print(f"{name}: {'; '.join(points)}; S = {curve.saturation()}")
    n = found.curve.conditional_distance()
    bits = measure_bits(lm, found.curve.prompt(int(n)), *parts[:2])
    print(claim(found, bits=bits.quantised))
    print(", ".join(f"{ruler} {value:.4g}" for ruler, value in bits.rows()))


if __name__ == "__main__":
    main()
