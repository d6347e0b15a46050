"""Scrubbing with the stream kept at block boundaries against recomputing it for every cut point, on one model and text.

    python benchmarks/scrubbing.py --model organism:pebble --tokens 8192 --rounds 3

Both give the same erasers up to the rounding of the kept stream, which the last lines show.
"""

import argparse

import torch
from pairing import interleave, machine

import sonde
from sonde.concepts.scrubbing import Keep, Scrub, scrub
from sonde.data.labels import plain_texts
from sonde.data.rule_tags import tagged
from sonde.lm.batches import TokenBatches
from sonde.lm.row_loss import row_loss
from sonde.lm.token_labels import TokenLabels


def main() -> None:
    """Print the ratio, and the loss after both."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="organism:pebble")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    lm = sonde.load(given.model, check=False)
    batches = TokenBatches(None, lm.tokenizer, context=256, limit_tokens=given.tokens)
    labels = TokenLabels.of(batches, tagged(plain_texts(None, int(batches.extents()[0][-1]) + 1), "pos"))
    made: dict[str, Scrub] = {}

    def way(keep: Keep):
        def run() -> None:
            made[keep] = scrub(lm, batches, labels, keep=keep)

        return run

    print(machine())
    ratios = interleave({"memory": way("memory"), "recompute": way("recompute")}, rounds=given.rounds, warmup=0)
    print(f"{lm.name}: {len(made['memory'].edits)} cut points, {batches.n_tokens:,} tokens")
    for name, ratio in ratios.items():
        loss = row_loss(lm, batches, made[name].edits).bits_per_byte().estimate
        print(f"{name:10} {ratio}   {loss:.6f} bits per byte after")


if __name__ == "__main__":
    main()
