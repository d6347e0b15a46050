"""Peak memory of a streamed trajectory against the array that holds it all: (layers + 1) x tokens x vocabulary floats.

Run: `python benchmarks/lens_trajectory_memory.py` (Linux: it reads the peak from /proc).
"""

import re
import time
from pathlib import Path

import torch
from pairing import machine
from transformers import GPT2Config, GPT2LMHeadModel

from sonde.lens.trajectory import trajectory
from sonde.lens.tuned import TunedLens
from sonde.lm.model import LanguageModel

TOKENS, VOCAB, LAYERS = 1024, 50257, 12


def resident(which: str) -> float:
    """MiB of this process: "VmRSS" now, "VmHWM" at its peak since the last reset."""
    found = re.search(rf"{which}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = GPT2Config(n_layer=LAYERS, n_embd=64, n_head=4, n_positions=TOKENS, vocab_size=VOCAB)
    lm = LanguageModel(GPT2LMHeadModel(config))
    lens = TunedLens.zeros(lm)
    tokens = torch.randint(VOCAB, (1, TOKENS))
    trajectory(lm, tokens[:, :32], lens)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    start = time.process_time()
    trajectory(lm, tokens, lens)
    seconds = time.process_time() - start
    peak = resident("VmHWM") - before
    stored = (LAYERS + 1) * TOKENS * VOCAB * 4 / 2**20
    print(machine())
    print(f"{LAYERS} layers, {TOKENS} tokens, vocabulary {VOCAB:,}: the array would take {stored:,.0f} MiB")
    print(f"peak above the model: {peak:,.0f} MiB, 1/{stored / peak:.0f} of it, in {seconds:.0f} CPU s")
