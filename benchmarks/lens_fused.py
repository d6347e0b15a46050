"""The fused lens loss against autograd over tokens x vocabulary: the same gradients, in turn, in CPU time.

Run: `python benchmarks/lens_fused.py`.
"""

import torch
from pairing import interleave, machine
from torch import nn

from sonde.lens.fused import Readout, Target, divergence

LAYERS = 4


class Unembedding:
    """LayerNorm and a head."""

    project = bias = softcap = None
    scale = 1.0

    def __init__(self, d: int, vocab: int) -> None:
        self.norm = nn.LayerNorm(d).requires_grad_(False)
        self.weight = 3 * torch.randn(vocab, d) / d**0.5


def measure(n: int, d: int, vocab: int, rounds: int) -> None:
    unembedding = Unembedding(d, vocab)
    readout = Readout(unembedding)
    hidden = torch.randn(LAYERS, n, d, requires_grad=True)
    final = torch.randn(n, d)

    def naive() -> torch.Tensor:
        hidden.grad = None
        with torch.no_grad():
            log_p = (unembedding.norm(final) @ unembedding.weight.T).log_softmax(-1)
        for layer in hidden:
            log_q = (unembedding.norm(layer) @ unembedding.weight.T).log_softmax(-1)
            (log_p.exp() * (log_p - log_q)).sum(-1).mean().backward()
        assert hidden.grad is not None
        return hidden.grad

    def fused() -> torch.Tensor:
        hidden.grad = None
        divergence(readout.normed(hidden), Target.model(readout, final), readout).mean(-1).sum().backward()
        assert hidden.grad is not None
        return hidden.grad

    exact, ours = naive().clone(), fused().clone()
    error = float((exact - ours).norm() / exact.norm())
    ratios = interleave({"fused": fused, "naive": naive}, rounds=rounds, warmup=1)
    print(f"N {n}, d {d:3d}, V {vocab:6,d}: naive / fused {ratios['naive']}   gradients differ by {error:.1e}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(machine())
    for d, vocab, rounds in [(128, 4096, 12), (256, 16384, 10), (256, 50257, 6)]:
        measure(512, d, vocab, rounds)
