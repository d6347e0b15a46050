"""Probes of knowledge at all layers: seconds of seven kinds, LogR beside scikit-learn, CCS restarts together or apart.

    python benchmarks/probes.py seven [--layers 24 --rows 4000 --width 1024]
    python benchmarks/probes.py logr
    python benchmarks/probes.py ccs

States are planted: the truth moves every layer along a direction of its own, on top of correlated noise whose spectrum
falls by a factor of 1,000 as that of a residual stream does, with a large mean and a shift between the two answers.
"""

import argparse
import time

import numpy as np
import torch
from pairing import interleave, machine

from sonde.knowledge.probes import fit
from sonde.knowledge.states import States
from sonde.stats.ranks import auroc

SEVEN = ("logr", "logr-pair", "diff-in-means", "lda", "crc", "ccs", "vinc")


def planted(layers: int, n: int, d: int, *, seed: int = 0) -> tuple[States, torch.Tensor]:
    """States and labels."""
    g = torch.Generator().manual_seed(seed)
    fixed = torch.Generator().manual_seed(7)
    y = torch.rand(n, generator=g) < 0.5
    sign = torch.where(y, 1.0, -1.0)
    last, pair = torch.empty(layers, n, d), torch.empty(layers, n, 2, d)
    scale = torch.logspace(0, -3, d)
    for layer in range(layers):
        mix = torch.linalg.qr(torch.randn(d, d, generator=fixed)).Q * scale
        u = torch.nn.functional.normalize(torch.randn(d, generator=fixed), dim=0)
        mean = 3 * torch.randn(3, d, generator=fixed)
        base = torch.randn(n, d, generator=g)
        last[layer] = base @ mix.T + mean[0] + 0.1 * sign[:, None] * u
        for side, way in enumerate((-1, 1)):
            own = 0.7 * base + 0.5 * torch.randn(n, d, generator=g)
            pair[layer, :, side] = own @ mix.T + mean[1 + side] + 0.15 * way * sign[:, None] * u
    sites = tuple(f"resid_post.{i}" for i in range(layers))
    return States(last.transpose(0, 1), pair.transpose(0, 1), sign, sites), y.long()


def seven(layers: int, n: int, d: int) -> None:
    states, y = planted(layers, n, d)
    test, truth = planted(layers, 1000, d, seed=1)
    print(f"{layers} layers x {len(SEVEN)} probes x {n} rows of width {d}")
    whole = 0.0
    for kind in SEVEN:
        start, cpu = time.perf_counter(), time.process_time()
        probe = fit(kind, states, y)
        seconds, used = time.perf_counter() - start, time.process_time() - cpu
        whole += seconds
        area = auroc(probe.log_odds(test).T.numpy(), np.broadcast_to(truth.numpy(), (layers, len(truth))))
        print(f"  {kind:14} {seconds:7.2f} s  (CPU {used:7.2f} s)  mean AUROC {area.mean():.3f}", flush=True)
    print(f"  {'all':14} {whole:7.2f} s")


def logr(n: int, d: int) -> None:
    from sklearn.linear_model import LogisticRegression

    states, y = planted(1, n, d)
    x = states.last[:, 0].numpy()
    model = LogisticRegression(C=1 / (2 * n * 0.001), max_iter=10_000)

    def ours() -> None:
        fit("logr", states[:], y)

    known = states[:]
    known.moments.covariance("last")

    def scaled() -> None:
        model.fit((x - x.mean(0)) / x.std(0), y.numpy())

    ways = {"sonde": ours, "sonde, covariance known": lambda: fit("logr", known, y)}
    ways |= {"scikit-learn, standardised": scaled}
    for name, ratio in interleave(ways, rounds=5, warmup=1).items():
        print(f"{name:30} {ratio}")
    print(f"steps: sonde {fit('logr', known, y).facts['steps']}, scikit-learn {model.n_iter_} (standardised)")


def ccs(n: int, d: int, restarts: int) -> None:
    states, _ = planted(2, n, d)

    def apart() -> None:
        for seed in range(restarts):
            fit("ccs", states, restarts=1, seed=seed)

    ways = {"together": lambda: fit("ccs", states, restarts=restarts), "one by one": apart}
    for name, ratio in interleave(ways, rounds=5, warmup=1).items():
        print(f"{restarts} restarts {name:12} {ratio}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("seven", "logr", "ccs"))
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--restarts", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(machine())
    if given.what == "seven":
        seven(given.layers, given.rows, given.width)
    elif given.what == "logr":
        logr(given.rows, given.width)
    else:
        ccs(given.rows, given.width, given.restarts)
