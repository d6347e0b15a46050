"""Chunked scans against the library's own, of the same model on the same tokens, in turn, in CPU time.

Run: `python benchmarks/scan.py`. A forward pass without gradients over 4 x 512 tokens, and one with its backward pass
over 4 x 128 (the library's Mamba fills a tensor of all positions for every position on the way back), of 4 layers.
"""

from collections.abc import Callable
from functools import partial

import torch
from pairing import interleave, machine
from torch.nn import functional as F
from transformers import (
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    RwkvConfig,
    RwkvForCausalLM,
)

from sonde.lm.chunked import chunked_scans

SIZE = {"vocab_size": 512, "hidden_size": 128, "num_hidden_layers": 4, "tie_word_embeddings": False}
ROWS, LENGTH, TRAINED = 4, 512, 128


def models() -> dict[str, PreTrainedModel]:
    """Each family at d 128, as the library initialises it."""
    torch.manual_seed(0)
    return {
        "Mamba": MambaForCausalLM(MambaConfig(**SIZE, state_size=16)),
        "Mamba-2": Mamba2ForCausalLM(Mamba2Config(**SIZE, num_heads=4, head_dim=64, state_size=64, n_groups=1)),
        "RWKV-4": RwkvForCausalLM(RwkvConfig(**SIZE, rescale_every=0)),
    }


def measure(name: str, model: PreTrainedModel, rounds: int) -> None:
    """Print the ratios of one family."""
    ids = torch.randint(0, SIZE["vocab_size"], (ROWS, LENGTH))

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False).logits

    def train() -> None:
        logits = model(input_ids=ids[:, :TRAINED], use_cache=False).logits
        F.cross_entropy(logits.flatten(0, 1), ids[:, :TRAINED].flatten()).backward()
        model.zero_grad()

    with chunked_scans(model) as gate:
        replaced = {module: module.forward for module in model.modules() if "forward" in vars(module)}

    def chunked(run: Callable[[], object]) -> None:
        for mixer, scan in replaced.items():
            mixer.forward = scan
        try:
            run()
        finally:
            for mixer in replaced:
                del mixer.forward

    for what, run in {"forward": forward, "with gradients": train}.items():
        ratios = interleave({"chunked": partial(chunked, run), "library": run}, rounds=rounds, warmup=1)
        print(f"{name:8s} {what:15s} library / chunked {ratios['library']}   gate {gate.worst:.1e}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(machine())
    for name, model in models().items():
        measure(name, model, rounds=5)
