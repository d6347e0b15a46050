"""A sweep of 54 steering settings: all as rows of one batch, against one cached pass each, and one whole pass each.

    python benchmarks/steering_sweep.py

6 layers x 9 multipliers on a prompt of 128 tokens; random GPT-2, Mamba-2 and Mamba of 6 layers, d 128, V 1,024. The
cached loop keeps the memory of the prompt up to its last token and runs that token once for each setting; the plain
loop runs the prompt anew. One thread; CPU time; medians of paired ratios to the one batch. All must give the same
logits to 1e-5 of their scale.
"""

import argparse
import copy
import warnings

import torch
from pairing import interleave, machine
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from sonde.concepts.affine import AffineEdit
from sonde.concepts.sweep import Choice, residual_steerings, sweep
from sonde.lm.model import LanguageModel

D_MODEL, N_LAYERS, VOCAB, LENGTH = 128, 6, 1024, 128
MULTIPLIERS = (-3.0, -1.5, -1.0, -0.5, 0.25, 0.5, 1.0, 1.5, 3.0)
SHARED = {"vocab_size": VOCAB, "hidden_size": D_MODEL, "num_hidden_layers": N_LAYERS, "bos_token_id": 0}
FAMILIES = {
    "gpt2": {"vocab_size": VOCAB, "n_embd": D_MODEL, "n_layer": N_LAYERS, "n_head": 4, "n_positions": 256},
    "mamba2": {**SHARED, "num_heads": 8, "head_dim": 32, "state_size": 16, "n_groups": 1, "chunk_size": 64},
    "mamba": {**SHARED, "state_size": 16},
}


@torch.no_grad()
def measure(family: str, rounds: int) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**FAMILIES[family]), dtype=torch.float32).eval()
    lm = LanguageModel(model, name=family)
    tokens = torch.randint(3, VOCAB, (1, LENGTH))
    vectors = {f"resid_post.{i}": torch.randn(D_MODEL) for i in range(N_LAYERS)}
    item, steerings = Choice(tokens[0].tolist(), 1, 2), residual_steerings(vectors)
    settings = [(site, m) for site in vectors for m in MULTIPLIERS]

    def one_batch() -> torch.Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a random model says neither answer
            return sweep(lm, [item], steerings, multipliers=MULTIPLIERS).match

    def logits_of_one_batch() -> torch.Tensor:
        with lm.reading("logits") as acts:
            one_batch()
        return acts["logits"][1:, -1]

    def cached_loop() -> torch.Tensor:
        past = lm(tokens[:, :-1], use_cache=True).past
        found = []
        for site, m in settings:
            with lm.editing({site: AffineEdit.add(vectors[site], m)}):
                found.append(lm(tokens[:, -1:], past=copy.copy(past).select(torch.tensor([0]))).logits[0, -1])
        return torch.stack(found)

    def whole_loop() -> torch.Tensor:
        found = []
        for site, m in settings:
            with lm.editing({site: AffineEdit.add(vectors[site], m)}, positions=-1):
                found.append(lm(tokens).logits[0, -1])
        return torch.stack(found)

    expected = whole_loop()
    for name, found in (("one batch", logits_of_one_batch()), ("cached loop", cached_loop())):
        error = float((found - expected).abs().max() / expected.abs().max())
        print(f"{family:8} {name}: logits differ by {error:.1e} of their scale from those of whole passes")
        assert error < 1e-5
    ways = {"one batch": one_batch, "cached loop": cached_loop}
    for name, ratio in interleave(ways, rounds=rounds).items():
        print(f"{family:8} {name:12} {ratio}", flush=True)
    for name, ratio in interleave({"one batch": one_batch, "whole passes": whole_loop}, rounds=3, warmup=1).items():
        print(f"{family:8} {name:12} {ratio}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="*", default=list(FAMILIES), choices=FAMILIES)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    for family in options.family:
        measure(family, options.rounds)


if __name__ == "__main__":
    main()
