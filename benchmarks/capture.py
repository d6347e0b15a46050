"""Capture of all residual streams: what does it cost over the plain forward pass?

    python benchmarks/capture.py                                           # Sonde
    python benchmarks/capture.py --peer nnsight=ENV/bin/python --peer transformer-lens=ENV/bin/python

A peer runs in the Python of its own environment, on the same random GPT-2 (4 layers, d 128, V 1024) and tokens, against
the plain forward pass of that environment. One thread; CPU time; medians of paired ratios.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from pairing import interleave, machine

SHAPES = ((1, 1), (8, 128))
N_LAYERS, D_MODEL, VOCAB = 4, 128, 1024
PEERS = ("sonde", "nnsight", "transformer-lens", "pyvene")


def gpt2() -> torch.nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=N_LAYERS, n_embd=D_MODEL, n_head=4, vocab_size=VOCAB, n_positions=256, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config).eval()


def sonde_ways(model: torch.nn.Module, tokens: torch.Tensor) -> dict[str, Callable[[], object]]:
    from sonde.lm.model import LanguageModel

    lm = LanguageModel(model)

    def read(*sites: str) -> Callable[[], object]:
        def run() -> None:
            with lm.reading(*sites) as acts:
                lm(tokens)
            assert len(acts) == len(lm.match(*sites))

        return run

    return {
        "plain through lm(...)": lambda: lm(tokens),
        "all residual streams and logits": read("resid_post.*", "logits"),
        "all residual streams, no head": read("resid_post.*"),
        "stop at half depth": read(f"resid_post.:{N_LAYERS // 2}"),
    }


def nnsight_ways(model: torch.nn.Module, tokens: torch.Tensor) -> dict[str, Callable[[], object]]:
    from nnsight import NNsight

    net = NNsight(model)

    def trace() -> None:
        saved = []
        with net.trace(tokens):
            for block in net.transformer.h:
                saved.append(block.output[0].save())

    return {"trace": trace}


def transformer_lens_ways(model: torch.nn.Module, tokens: torch.Tensor) -> dict[str, Callable[[], object]]:
    import copy
    import tempfile

    from transformer_lens.model_bridge import TransformerBridge

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        save_tokenizer(folder)
        net = TransformerBridge.boot_transformers(folder, hf_model=copy.deepcopy(model), device="cpu")

    def residual(name: str) -> bool:
        return name.startswith("blocks.") and name.endswith("hook_out")

    return {
        "forward": lambda: net(tokens),
        "run_with_cache, residual streams": lambda: net.run_with_cache(tokens, names_filter=residual),
        "run_with_cache, everything": lambda: net.run_with_cache(tokens),
    }


def save_tokenizer(folder: str) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"t{i}": i for i in range(VOCAB)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="t0", eos_token="t0").save_pretrained(folder)


def pyvene_ways(model: torch.nn.Module, tokens: torch.Tensor) -> dict[str, Callable[[], object]]:
    import pyvene

    net = pyvene.IntervenableModel(
        [
            {"layer": layer, "component": "block_output", "intervention_type": pyvene.CollectIntervention}
            for layer in range(N_LAYERS)
        ],
        model=model,
    )
    places = [[list(range(tokens.shape[1]))] * len(tokens)] * N_LAYERS
    return {"collect": lambda: net({"input_ids": tokens}, unit_locations={"sources->base": (None, places)})}


WAYS = {
    "sonde": sonde_ways,
    "nnsight": nnsight_ways,
    "transformer-lens": transformer_lens_ways,
    "pyvene": pyvene_ways,
}


@torch.no_grad()
def measure(peer: str, rounds: int) -> None:
    torch.set_num_threads(1)
    model = gpt2()
    for batch, length in SHAPES:
        tokens = torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(0))
        plain = {"plain forward": lambda tokens=tokens: model(input_ids=tokens, use_cache=False)}
        for name, ratio in interleave(plain | WAYS[peer](model, tokens), rounds=rounds).items():
            print(f"{peer:17} {batch}x{length:<5} {name:34} {ratio}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON", help="a peer and its Python")
    parser.add_argument("--only", choices=PEERS, help="measure this one, in this Python")
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    if options.only:
        measure(options.only, options.rounds)
        return
    print(machine())
    measure("sonde", options.rounds)
    for entry in options.peer:
        name, _, python = entry.partition("=")
        command = [python, str(Path(__file__)), "--only", name, "--rounds", str(options.rounds)]
        if subprocess.run(command, check=False).returncode:
            print(f"{name}: failed in {python}", file=sys.stderr)


if __name__ == "__main__":
    main()
