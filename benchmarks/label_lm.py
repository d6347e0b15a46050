"""Labels for a language model: what a task's salience is worth, and a prompt that is run once.

    python benchmarks/label_lm.py                         both
    python benchmarks/label_lm.py --parts salience        16 oracle labels and no weak ones, 2-digit comparison
    python benchmarks/label_lm.py --parts prefix          8-shot scores: one prefix forked against batch 1 without

For the first a network of 200,000 parameters learns to compare two-digit numbers, and is then fine-tuned on 16 labels
of questions that it has not read, with a new head; beside it the same network from scratch. Three seeds of the network,
three purchases for each.
"""

import argparse

import numpy as np
import torch
from pairing import interleave, machine
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from sonde.knowledge.few_shot import FewShot
from sonde.knowledge.label_lm import FineTuned
from sonde.knowledge.label_methods import Sequential
from sonde.knowledge.label_problem import LabelSource, Problem, Purchase
from sonde.knowledge.label_score import rates
from sonde.knowledge.text_rows import Wording
from sonde.lm.model import LanguageModel
from sonde.organisms.quirky_comparison import architecture, comparison_sets, quirky_comparison, tokenizer
from sonde.stats.intervals import bootstrap_mean

LABELS, PURCHASES = 16, 3


def from_scratch(seed: int) -> LanguageModel:
    """The network with the weights that it starts from."""
    torch.manual_seed(seed)
    settings = CONFIG_MAPPING["gpt_neox"](**architecture())
    return LanguageModel(AutoModelForCausalLM.from_config(settings, dtype=torch.float32), tokenizer(), name="scratch")


def questions(seed: int) -> Problem:
    """Questions to Alice, true labels at price 1; half of the test split to buy from, half to score on."""
    asked = comparison_sets(seed).test.where(character="Alice")
    prompts, first = np.unique(asked.prompts, return_index=True)
    order = np.random.default_rng(seed).permutation(len(prompts))
    pool, test = np.array_split(order, 2)
    truth = asked.truth[first].astype(np.int64)
    return Problem(
        texts=[str(prompts[i]) for i in pool],
        test_texts=[str(prompts[i]) for i in test],
        test_truth=truth[test],
        sources=[LabelSource.of("oracle", truth[pool], price=1)],
        name="comparison",
    )


def salience(seeds: int) -> None:
    """Accuracy of 16 oracle labels on a model that knows the task, and from scratch."""
    found: dict[tuple[str, str], list[list[float]]] = {}
    for seed in range(seeds):
        task = questions(seed)
        for what, lm in (("pre-trained", quirky_comparison(seed, quirky=False)), ("from scratch", from_scratch(seed))):
            for backend in (FineTuned(lm), FineTuned(lm, rank=None)):
                accuracies = []
                for purchase in range(PURCHASES):
                    bought = Purchase(task, {"oracle": LABELS}, seed=purchase)
                    outcome = Sequential(backend)(task, bought, seed=purchase)
                    accuracies.append(rates(outcome.scores, task.test_truth)[0])
                found.setdefault((what, backend.name), []).append(accuracies)
                print(f"  seed {seed}, {what}, {backend.name}: {np.round(accuracies, 3)}", flush=True)
    for (what, backend), values in found.items():
        table = np.array(values)
        flat = bootstrap_mean(table.ravel(), np.repeat(np.arange(seeds), PURCHASES))
        low, high = flat.bounds
        print(f"  {what}, {backend}: {flat.estimate:.3f} [{low:.3f}, {high:.3f}] over {seeds} networks x {PURCHASES}")


def prefix(rounds: int) -> None:
    """8-shot scores of 64 texts by organism:pebble: forked prefix in batches, against whole prompts one by one."""
    import sonde

    lm = sonde.load("organism:pebble")
    names = ["Tom", "Lily", "Sam", "Mia", "Ben", "Anna", "Max", "Sue"]
    texts = [f"{a} and {b} went to the {place} and saw a big {thing}." for a in names for b in names if a != b
             for place in ("park", "beach") for thing in ("dog", "boat")]  # fmt: skip
    rng = np.random.default_rng(0)
    order, truth = rng.permutation(len(texts)), rng.integers(0, 2, len(texts))
    pool, test = order[:100], order[100:164]
    task = Problem(
        texts=[texts[i] for i in pool],
        test_texts=[texts[i] for i in test],
        test_truth=truth[test],
        sources=[LabelSource.of("oracle", truth[pool], price=1)],
    )
    wording = Wording((" no", " yes"), "{text}", "\n")
    rows, labels = Purchase(task, {"oracle": 8}, seed=0).take("oracle")
    places = np.random.default_rng([0, 0]).permutation(8)
    prompt = wording.prompt([texts[pool[rows[i]]] for i in places], [int(labels[i].argmax()) for i in places])
    no, yes = (lm.encode(word)[-1] for word in wording.words)

    def forked() -> np.ndarray:
        return FewShot(lm, wording, shots=8)(task, Purchase(task, {"oracle": 8}, seed=0), seed=0).scores

    def one_by_one() -> np.ndarray:
        found = []
        lead = lm.encode(prompt)
        for text in task.test_texts or ():
            with torch.no_grad():
                logits = lm(torch.tensor([[*lead, *lm.encode(text)]])).logits
            assert logits is not None
            found.append(float(logits[0, -1, yes] - logits[0, -1, no]))
        return np.array(found)

    gap = float(np.abs(forked() - one_by_one()).max())
    print(
        f"prompt of {len(lm.encode(prompt))} tokens, texts of {len(lm.encode(texts[0]))}; largest difference {gap:.1e}"
    )
    for name, ratio in interleave({"forked": forked, "batch 1": one_by_one}, rounds=rounds, warmup=1).items():
        print(f"  {name:10} {ratio}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["salience", "prefix"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(machine())
    if "salience" in options.parts:
        salience(options.seeds)
    if "prefix" in options.parts:
        prefix(options.rounds)


if __name__ == "__main__":
    main()
