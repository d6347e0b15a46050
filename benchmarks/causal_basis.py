"""Energy and gradient of one direction: the identity of rank one against autograd through the lens, in turn, CPU time.

Run: `python benchmarks/causal_basis.py`. The naive way ablates the states, translates, normalises and unembeds them,
and differentiates; what it compares with (the reading before ablation) is given to it for nothing.
"""

import torch
from pairing import interleave, machine
from torch import nn

from sonde.lens.direction_loss import direction_loss
from sonde.lens.tuned import TunedLens

TOKENS = 512


class Unembedding:
    """LayerNorm and a head."""

    project = bias = softcap = None
    scale = 1.0

    def __init__(self, d: int, vocab: int) -> None:
        self.norm = nn.LayerNorm(d).requires_grad_(False)
        self.norm.weight.copy_(1 + 0.2 * torch.randn(d))
        self.norm.bias.copy_(0.2 * torch.randn(d))
        self.weight = 3 * torch.randn(vocab, d) / d**0.5


def measure(d: int, vocab: int, rounds: int) -> None:
    unembedding = Unembedding(d, vocab)
    lens = TunedLens(unembedding, ["resid_pre.0"], d)  # type: ignore[arg-type]
    assert lens.weight is not None
    with torch.no_grad():
        lens.weight.normal_(std=0.1 / d**0.5)
    lens.requires_grad_(False)
    hidden = torch.randn(TOKENS, d) * torch.linspace(0.3, 3, d)
    mean = hidden.mean(0)
    direction = nn.functional.normalize(torch.randn(d), dim=0).requires_grad_()
    with torch.no_grad():
        before = (unembedding.norm(lens.translate(hidden, 0)) @ unembedding.weight.T).log_softmax(-1)
        given = before.exp()
    entropy = (given * before).sum(-1)

    def naive() -> tuple[float, torch.Tensor]:
        direction.grad = None
        ablated = hidden - torch.outer((hidden - mean) @ direction, direction)
        after = (unembedding.norm(lens.translate(ablated, 0)) @ unembedding.weight.T).log_softmax(-1)
        energy = (entropy - (given * after).sum(-1)).mean()
        energy.backward()
        assert direction.grad is not None
        return energy.item(), direction.grad

    loss = direction_loss(lens, 0, hidden, mean)
    recomputed = direction_loss(lens, 0, hidden, mean, cache_bytes=0)
    (e, g), (e1, g1) = loss(direction), naive()
    error = f"energies differ by {abs(e / e1 - 1):.0e}, gradients by {float((g - g1).norm() / g1.norm()):.0e}"
    ways = {"kept": lambda: loss(direction), "Z again": lambda: recomputed(direction), "naive": naive}
    ratios = interleave(ways, rounds=rounds, warmup=1)
    print(f"d {d:3d}, V {vocab:6,d}: naive / rank one {ratios['naive']}   {error}")
    print(f"{'':16s} Z computed again / rank one {ratios['Z again']}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(machine(), f"{TOKENS} tokens")
    for d, vocab, rounds in [(64, 256, 40), (192, 4096, 20), (256, 50257, 8), (768, 50257, 6)]:
        measure(d, vocab, rounds)
