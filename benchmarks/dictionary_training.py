"""Training of dictionaries of many sites: all from one pass of the model against one pass for each.

Run as

    python benchmarks/dictionary_training.py
    torchrun --nproc-per-node 2 benchmarks/dictionary_training.py     rows a second of several processes

The ways take turns, in CPU time of the process. Every dictionary is the same in both, to the bit, which is checked.
Under torchrun the processes train the same dictionaries together, by gloo on CPUs and by NCCL on CUDA, one device each.
"""

import argparse
import os
import time

import torch
from pairing import interleave, machine

import sonde
from sonde.data.python_docs import topics
from sonde.features.activation_buffer import Order
from sonde.features.plan import Plan, grid
from sonde.features.step_config import StepConfig
from sonde.features.training import train_dictionaries
from sonde.lm.batches import TokenBatches, rank_and_world
from sonde.lm.model import LanguageModel


def text(lm: LanguageModel, tokens: int) -> TokenBatches:
    assert lm.tokenizer is not None
    return TokenBatches(topics(), lm.tokenizer, context=256, limit_tokens=tokens + tokens // 8 + 512, shuffle=True)


def one_pass(lm: LanguageModel, plans: list[Plan], tokens: int, batch: int) -> list[torch.nn.Module]:
    return [*train_dictionaries(lm, text(lm, tokens), plans, tokens=tokens, order=Order(batch=batch))]


def one_by_one(lm: LanguageModel, plans: list[Plan], tokens: int, batch: int) -> list[torch.nn.Module]:
    return [one_pass(lm, [plan], tokens, batch)[0] for plan in plans]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="organism:pebble")
    parser.add_argument("--sites", nargs="+", default=["resid_post.*"])
    parser.add_argument("--latents", type=int, default=1024)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rank, world = rank_and_world()
    cuda = torch.cuda.is_available() and world > 1
    lm = sonde.load(options.model, check=False, device=f"cuda:{os.environ['LOCAL_RANK']}" if cuda else None)
    config = StepConfig(lr=2e-3)
    plans = grid(lm, options.sites, latents=[options.latents], ks=[options.k], config=config)
    work = (lm, plans, options.tokens, options.batch)
    if world > 1:
        one_pass(lm, plans, 2 * options.batch * world, options.batch)
        start = time.perf_counter()
        one_pass(*work)
        seconds = time.perf_counter() - start
        if rank == 0:
            print(f"{world} processes: {options.tokens / seconds:,.0f} rows a second for {len(plans)} dictionaries")
        torch.distributed.destroy_process_group()
        return
    print(machine())
    print(f"{len(plans)} dictionaries of {options.latents} latents, k {options.k}, {options.tokens:,} tokens each")
    for first, second in zip(one_pass(*work), one_by_one(*work), strict=True):
        for name, value in first.state_dict().items():
            assert torch.equal(value, second.state_dict()[name])
    ways = {"one pass": lambda: one_pass(*work), "one by one": lambda: one_by_one(*work)}
    for name, ratio in interleave(ways, rounds=options.rounds, warmup=0).items():
        rate = 1e3 * options.tokens / ratio.milliseconds
        print(f"{name:12} {ratio}   {rate:8,.0f} tokens a CPU-second, each for all {len(plans)} dictionaries")


if __name__ == "__main__":
    main()
