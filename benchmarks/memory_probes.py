"""What a recurrent network's memory knows beside its residual stream: probes for the truth, learned from Alice.

    python benchmarks/memory_probes.py [--model quirky-comparison-mamba2]

AUROC against the truth on Bob's records on which truth and his rule part, by layer: 1 follows the truth, 0 the rule.
"""

import argparse

import numpy as np
from pairing import machine

import sonde
from sonde.knowledge.probes import fit
from sonde.knowledge.random_probes import random_probes
from sonde.knowledge.recurrent_states import beside, extract_memory
from sonde.knowledge.states import extract
from sonde.stats.ranks import auroc_interval
from sonde.studies.quirky_organisms import organism_sets


def main() -> None:
    """Print a line for each place and probe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="quirky-comparison-mamba2")
    name = f"organism:{parser.parse_args().model}"
    lm, sets = sonde.load(name), organism_sets(name)
    if sets is None:
        raise SystemExit(f"{name} is no quirky organism")
    learn, test = sets.validation.where(character="Alice"), sets.test.where(character="Bob", disagree=True)
    memory = [extract_memory(lm, records.prompts, records.answers) for records in (learn, test)]
    stream = [extract(lm, records.prompts, records.answers) for records in (learn, test)]
    both = [beside(*pair) for pair in zip(memory, stream, strict=True)]
    print(machine())
    print(f"{name}: {len(learn)} records to learn from, {len(test)} to read")
    for place, (known, unknown) in {"memory": memory, "stream": stream, "both": both}.items():
        for kind in ("logr", "logr-pair"):
            odds = fit(kind, known, learn.truth).log_odds(unknown).numpy()
            found = [auroc_interval(column, test.truth, groups=test.rows) for column in odds.T]
            print(f"{place:8}{kind:12}", "  ".join(f"{a.estimate:.3f} ({a.low:.3f} to {a.high:.3f})" for a in found))
        drawn = random_probes(known, learn.truth, unknown, test.truth, draws=256).mean
        print(f"{place:8}{'random':12}", "  ".join(f"{value:.3f}" for value in np.asarray(drawn)))


if __name__ == "__main__":
    main()
