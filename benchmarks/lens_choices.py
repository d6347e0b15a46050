"""Scores of multiple-choice answers at every layer, and 1,000 bootstraps of an AUROC, against the plain way to do each.

Choices: the plain way runs a row for every choice, unpads it and reads every position through every layer; Sonde shares
rows and reads the positions that predict an answer. AUROC: the plain way sorts the scores of every resample with
scikit-learn. Run: `python benchmarks/lens_choices.py`.
"""

import numpy as np
import torch
from pairing import interleave, machine
from sklearn.metrics import roc_auc_score

import sonde
from sonde.data.multiple_choice import prompts
from sonde.data.toy_questions import alive_questions
from sonde.lens.anomaly import bootstrap_auroc
from sonde.lens.choices import choice_scores


@torch.no_grad()
def plainly(lm: sonde.LanguageModel, lens: sonde.TunedLens, asked: list) -> torch.Tensor:
    """Summed log-probabilities [layers, n, k] from one row a choice."""
    pairs = [(lm.encode(p.text), lm.encode(p.text + choice)) for p in asked for choice in p.choices]
    found = torch.zeros(len(lens) + 1, len(pairs))
    for first in range(0, len(pairs), 32):
        part = pairs[first : first + 32]
        rows = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for _, ids in part], batch_first=True)
        with lm.reading(*lens.sites, "logits") as acts:
            lm(rows)
        for layer in range(len(lens) + 1):
            logits = acts["logits"] if layer == len(lens) else lens(acts[lens.sites[layer]], layer)
            logq = logits.log_softmax(-1)
            for row, (before, ids) in enumerate(part):
                found[layer, first + row] = sum(logq[row, i - 1, ids[i]] for i in range(len(before), len(ids)))
    return found.view(len(lens) + 1, len(asked), -1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(machine())
    for name in ("organism:quiz", "organism:pebble"):
        lm = sonde.load(name, check=False)
        lens = sonde.TunedLens.zeros(lm)
        asked = prompts(alive_questions(32, seed=0), shots=3)
        own = choice_scores(lm, asked, lens)["lens"].log_probs
        print(name, "largest difference", float((own - plainly(lm, lens, asked)).abs().max()))
        ways = {"plain": lambda: plainly(lm, lens, asked), "sonde": lambda: choice_scores(lm, asked, lens)}  # noqa: B023
        for way, ratio in interleave(ways, rounds=6, warmup=1).items():
            print(f"{way:8}", ratio)
    rng = np.random.default_rng(0)
    normal, strange = rng.normal(size=200), rng.normal(size=200) + 1
    labels = np.repeat([0, 1], 200)

    def sorting() -> list[float]:
        """1,000 AUROCs by sorting resampled scores."""
        draws = rng.integers(200, size=(1000, 2, 200))
        return [float(roc_auc_score(labels, np.concatenate([normal[a], strange[b]]))) for a, b in draws]

    ways = {"scikit-learn": sorting, "sonde": lambda: bootstrap_auroc(normal, strange, draws=1000, rng=rng)}
    for way, ratio in interleave(ways, rounds=4, warmup=0).items():
        print(f"{way:14}", ratio)
