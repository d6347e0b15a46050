"""Where a soft prompt should stand, and how long it must be: pebble made to write a harmless string on unseen contexts.

    python benchmarks/soft_prompt_places.py --picture docs/img/soft-prompt-places.svg

24 openings of Python help topics, 12 tokens each, a third of them held out. The control is a string of random tokens of
equal length. Prints the nats of the whole target on held-out contexts, median and range over restarts.
"""

import argparse
import statistics
from pathlib import Path

import torch
from pairing import machine

import sonde
from sonde.data.python_docs import topics
from sonde.prompts.evaluation import evaluate
from sonde.prompts.examples import Examples
from sonde.prompts.soft_prompt import Position
from sonde.prompts.training import train_prompts
from sonde.runs import charts
from sonde.runs.palette import fixed

LENGTHS, RESTARTS, STEPS, BATCH = (1, 2, 4, 8), 3, 40, 6
POSITIONS: tuple[Position, ...] = ("suffix", "prefix")


def main() -> None:
    """Train, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    lm = sonde.load("organism:pebble")
    contexts = [lm.encode(text)[:12] for text in topics()[:24]]
    target = Examples.from_text(lm, ["a"], " silver bells ring").targets[0]
    training, validation, test = Examples(contexts, [target] * len(contexts)).split((0.5, 0.17, 0.33))
    print(machine(), "|", len(target), "target tokens,", len(test), "held-out contexts")
    rows = []
    for name, change in (("", lambda e: e), (", random", lambda e: e.random_targets(lm))):
        trials = train_prompts(
            lm,
            change(training),
            validation=change(validation),
            lengths=(0, *LENGTHS),
            positions=POSITIONS,
            restarts=RESTARTS,
            steps=STEPS,
            batch=BATCH,
            validations=2,
            progress="prompts" + name,
        )
        found = evaluate(lm, [trial.prompt for trial in trials], change(test))
        nats = dict(zip(((t.length, t.position, t.restart) for t in trials), found.nats.mean(1).tolist(), strict=True))
        exact = dict(zip(((t.length, t.position, t.restart) for t in trials), found.success.tolist(), strict=True))
        for position in POSITIONS:
            for n in (0, *LENGTHS):
                keys = [(n, position, r) for r in range(RESTARTS)] if n else [(0, POSITIONS[0], 0)]
                values = [nats[key] for key in keys]
                row = {"n": n, "nats": statistics.median(values), "low": min(values), "high": max(values)}
                rows.append({**row, "series": f"{position}{name}"})
                success = statistics.median(exact[key] for key in keys)
                spread = f"({row['low']:.2f} to {row['high']:.2f})"
                print(f"{row['series']:22} n {n:2}  {row['nats']:6.2f} {spread}  exact {success:.2f}")
    if options.picture:
        chart = charts.lines(
            rows,
            x="n",
            y="nats",
            low="low",
            high="high",
            series="series",
            control=[f"{position}, random" for position in POSITIONS],
            title="A suffix gets further with fewer vectors than a prefix",
            subtitle=f"{len(test)} held-out contexts; median and range of {RESTARTS} restarts",
            x_title="vectors in the prompt",
            y_title="nats of the whole target",
        )
        options.picture.write_text(
            fixed(charts.svg({**charts.spec(chart), "padding": 12, "background": "var(--paper)"}))
        )


if __name__ == "__main__":
    main()
