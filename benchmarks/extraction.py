"""States of contrast pairs: batched with one forked cache, against batch 1 and against two whole passes a prompt.

    python benchmarks/extraction.py [--model organism:pebble | --width 768 --layers 4] [--prompts 512]

The published way runs one prompt at a time: a pass over the prompt that leaves a cache, then one over each answer
behind a copy of it. "whole rows" reads prompt and answer twice, without a cache, one row at a time. Both
run on every eighth prompt, and their times are multiplied by 8. CPU time.
"""

import argparse
import statistics

import torch
from pairing import Ratio, interleave, machine
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

import sonde
from sonde.data.quirky import quirky_sets
from sonde.knowledge.states import extract
from sonde.lm.model import LanguageModel

SHARE = 8
VOCAB = 50_304  # of Pythia


def random_model(width: int, layers: int) -> LanguageModel:
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=VOCAB,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
        max_position_embeddings=512,
    )
    return LanguageModel(GPTNeoXForCausalLM(config), name=f"random GPT-NeoX of width {width}")


def prompts(n: int) -> list[list[int]]:
    """Records of the quirky addition set in all its templates, in the tokens of pebble."""
    pebble = sonde.load("organism:pebble")
    records = quirky_sets("addition", n=4 * n, mode="mixture").train
    return [pebble.encode(record.prompt) for record in list(records)[:n]]


@torch.no_grad()
def cached_batch_one(lm: LanguageModel, rows: list[list[int]], answers: tuple[int, int]) -> None:
    for ids in rows:
        with lm.reading("resid_post.*") as acts:
            past = lm(torch.tensor([ids]), use_cache=True).past
            [acts[f"resid_post.{i}"][0, -1].clone() for i in range(lm.n_layers)]
            for answer in answers:
                assert past is not None
                lm(torch.tensor([[answer]]), past=past.select(torch.tensor([0])))
                [acts[f"resid_post.{i}"][0, -1].clone() for i in range(lm.n_layers)]


@torch.no_grad()
def whole_rows(lm: LanguageModel, rows: list[list[int]], answers: tuple[int, int]) -> None:
    for ids in rows:
        for answer in answers:
            with lm.reading("resid_post.*", "logits") as acts:
                lm(torch.tensor([[*ids, answer]]))
            [acts[f"resid_post.{i}"][0, -2:].clone() for i in range(lm.n_layers)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="organism:pebble")
    parser.add_argument("--width", type=int, default=0)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    lm = random_model(given.width, given.layers) if given.width else sonde.load(given.model)
    rows = prompts(given.prompts)
    some = sorted(rows, key=len)[SHARE // 2 :: SHARE]
    extract(lm, rows[:2], (3, 4))  # measures how the family continues
    ways = {
        "batched, one forked cache": lambda: extract(lm, rows, (3, 4), batch=given.batch),
        "batch 1, cache for each answer": lambda: cached_batch_one(lm, some, (3, 4)),
        "batch 1, whole rows twice": lambda: whole_rows(lm, some, (3, 4)),
    }
    print(machine())
    print(
        f"{lm.name}, width {lm.d_model}, {lm.n_layers} layers, {len(rows)} prompts, median of "
        f"{statistics.median(map(len, rows)):g} tokens",
        flush=True,
    )
    for place, (name, found) in enumerate(interleave(ways, rounds=given.rounds, warmup=1).items()):
        times = SHARE if place else 1
        numbers = (times * value for value in (found.median, found.low, found.high, found.milliseconds))
        print(f"{name:32} {Ratio(*numbers)}")
