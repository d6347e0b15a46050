"""All metrics of a dictionary of pebble, beside random directions: the numbers of the page on them, and CPU seconds.

    python benchmarks/dictionary_metrics.py --tokens 1000000

Two TopK dictionaries of two seeds are trained on docstrings of the standard library and measured on the `help()` topics
of Python. Random directions (an untrained dictionary of the same design) are the control.
"""

import argparse
import time

import numpy as np
import torch
from pairing import machine

import sonde
from sonde.data.biographies import biographies
from sonde.data.python_docs import comments, topics
from sonde.data.rule_tags import tagged
from sonde.features.absorption import absorption, word_rows
from sonde.features.activation_buffer import Order
from sonde.features.design import Design
from sonde.features.dictionary import Dictionary
from sonde.features.metrics import Metrics, evaluate, evaluate_all
from sonde.features.plan import Plan
from sonde.features.scr_tpp import pooled_rows, scr, tpp
from sonde.features.seed_overlap import mean_max_cosine, seed_overlap
from sonde.features.sparse_probing import sparse_probing
from sonde.features.step_config import StepConfig
from sonde.features.training import train_dictionaries
from sonde.lm.batches import TokenBatches
from sonde.lm.model import LanguageModel
from sonde.lm.stream import stream
from sonde.lm.token_labels import TokenLabels
from sonde.stats.intervals import Interval

DEFAULTS = {"tokens": 1_000_000, "batch": 512, "measured": 131_072, "latents": 1024, "k": 16, "threads": 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in DEFAULTS.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--site", default="resid_post.3")
    parser.add_argument("--lr", type=float, default=2e-3)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    lm = sonde.load("organism:pebble")
    design = Design("topk", lm.d_model, given.latents, k=given.k)
    started = time.process_time()
    plans = [Plan(given.site, design, StepConfig(lr=given.lr), seed=seed) for seed in (0, 1)]
    order = Order(batch=given.batch)
    first, second = train_dictionaries(lm, list(comments()), plans, tokens=given.tokens, order=order)
    assert isinstance(first, Dictionary) and isinstance(second, Dictionary)
    random = Dictionary.initialised(design, mean=first.b_dec.detach(), seed=2)
    random.site = given.site
    print(
        machine(),
        f"{given.latents} latents, k {given.k}, {given.site}, {given.tokens:,} tokens in steps of {given.batch}",
        sep="\n",
    )
    print(f"training of two: {time.process_time() - started:.0f} CPU s")

    started = time.process_time()
    evaluate(lm, first, quick=True)
    print(f"quick metrics of one: {time.process_time() - started:.1f} CPU s")
    both = {"trained": first, "random": random}
    show(evaluate_all(lm, both, tokens=given.measured, loss_tokens=given.measured // 4))

    overlap, control = seed_overlap(first, second), seed_overlap(first, random)
    print(f"shared by two seeds {interval(overlap.shared)}, with random directions {interval(control.shared)}")
    print(
        f"mean max cosine {interval(mean_max_cosine(first, second))}, "
        f"with random directions {interval(mean_max_cosine(first, random))}"
    )

    x, _, letters = word_rows(lm, given.site)
    rows, nouns = labelled_rows(lm, given.site)
    table = biographies(1500, seed=0)
    tasks = np.array(table.tasks)[table.task]
    women = np.array(table.concepts)[table.concept] == "woman"
    pair = np.isin(tasks, ["nurse", "surgeon", "dietitian", "chef"])
    for name, dictionary in (("trained", first), ("random", random)):
        print(f"\n{name}")
        absorbed = absorption(dictionary, x, letters)
        print(f"  absorption: full {interval(absorbed.full)}, fraction {interval(absorbed.fraction)}")
        probes = sparse_probing(dictionary, rows, nouns)
        shown = ", ".join(f"k={k} {value.estimate:.3f}" for k, value in probes.by_latents.items())
        beside = f"all coordinates {probes.dense.estimate:.3f}, larger class {probes.majority.estimate:.3f}"
        print(f"  nouns: {shown}; {beside}")
        pooled = pooled_rows(lm, dictionary, table.texts)
        found = scr(pooled, pair, women)
        shown = ", ".join(f"n={n} {share.value:.2f}" for n, share in found.score.items())
        print(f"  SCR ({found.direction}): {shown}; biased {found.biased:.3f}, clean {found.clean:.3f}")
        probed = tpp(pooled, tasks.tolist())
        print("  TPP: " + ", ".join(f"n={n} {interval(value)}" for n, value in probed.score.items()))


def show(measured: dict[str, Metrics]) -> None:
    for name, metrics in measured.items():
        r, losses = metrics.reconstruction, metrics.losses
        assert losses is not None
        print(f"\n{name}: {r.tokens:,} tokens, {losses.tokens:,} predicted")
        for what in ("fvu", "l0", "l2_ratio", "cosine", "relative_bias"):
            print(f"  {what:14} {interval(getattr(r, what))}")
        print(f"  {'alive':14} {r.alive:.3f}")
        for what in ("clean", "delta", "kl"):
            print(f"  {what:14} {interval(getattr(losses, what))} nats")
        for kind in losses.ablated:
            print(f"  {kind} ablated   {interval(losses.ablated[kind])} nats", end="; ")
            for share in (losses.ce_recovered[kind], losses.kl_recovered[kind]):
                print(f"recovered {share.value:.3f}" if share.interval is None else interval(share.interval), end=" ")
            print()


def interval(value: Interval | None) -> str:
    return "-" if value is None else f"{value.estimate:.3f} [{value.low:.3f}, {value.high:.3f}]"


def labelled_rows(lm: LanguageModel, site: str, tokens: int = 12_000) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations at tokens whose part of speech the rules know, and whether it is a noun."""
    labelled = tagged(topics(), "pos")
    batches = TokenBatches(labelled.texts, lm.tokenizer, context=256, limit_tokens=tokens)
    labels = TokenLabels.of(batches, labelled)
    rows, classes = [], []
    for batch in stream(lm, batches, sites=[site]):
        found = labels.at(batches, batch.index)
        rows.append(batch.acts[site][found >= 0])
        classes.append(found[found >= 0])
    return torch.cat(rows), torch.cat(classes) == labels.names.index("NOUN")


if __name__ == "__main__":
    main()
