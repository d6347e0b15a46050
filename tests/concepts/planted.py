"""Rows with a planted concept: labels move the mean, and where asked the covariance."""

import torch

DOUBLE = torch.float64


def planted(n=2048, d=16, k=3, *, seed=0, dtype=DOUBLE, shift=1.0, spread=False, spare=0):
    """Correlated rows `[n d]` and labels `[n]`, the last `spare` classes without any row."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=g, dtype=DOUBLE) / d**0.5 + torch.eye(d, dtype=DOUBLE) / 2
    z = torch.arange(n) % (k - spare)
    z = z[torch.randperm(n, generator=g)]
    x = torch.randn(n, d, generator=g, dtype=DOUBLE)
    if spread:
        x = x * (0.5 + torch.rand(k, d, generator=g, dtype=DOUBLE) * 2)[z]
    x = (
        x @ mix
        + shift * torch.randn(k, d, generator=g, dtype=DOUBLE)[z]
        + 3 * torch.randn(d, generator=g, dtype=DOUBLE)
    )
    return x.to(dtype), z


def gap(x, z):
    """Largest distance of two class means in a coordinate."""
    means = torch.stack([x[z == c].mean(0) for c in z.unique() if c >= 0])
    return float((means[:, None] - means).abs().max())


def one_hot(z, k=None):
    return torch.nn.functional.one_hot(z, int(z.max()) + 1 if k is None else k).double()


def mse(x, y):
    return float((x - y).abs().square().sum(-1).double().mean())
