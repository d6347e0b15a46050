"""Novelty detectors over all layers at once, against loops of scikit-learn over layers: ratios of CPU time.

    python benchmarks/novelty.py --layers 24 --rows 2000 --width 64

Fit on as many trusted rows as are scored. Scores agree: the largest difference is printed beside the ratio.
"""

import argparse
from collections.abc import Callable

import numpy as np
import torch
from pairing import interleave, machine
from sklearn.covariance import EmpiricalCovariance
from sklearn.neighbors import LocalOutlierFactor as Peer

from sonde.stats.gaussian_novelty import Mahalanobis
from sonde.stats.local_outliers import LocalOutlierFactor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("layers", 24), ("rows", 2000), ("width", 64), ("rounds", 5), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rng = np.random.default_rng(0)
    trusted, rows = (rng.normal(size=(given.layers, given.rows, given.width)) for _ in range(2))

    def distances() -> np.ndarray:
        made = [EmpiricalCovariance().fit(layer) for layer in trusted]
        # the maximum-likelihood covariance divides by n
        shrink = (given.rows - 1) / given.rows
        return np.stack([one.mahalanobis(x) * shrink for one, x in zip(made, rows, strict=True)])

    def factors(**options: str) -> np.ndarray:
        made = [Peer(n_neighbors=20, novelty=True, **options).fit(layer) for layer in trusted]
        return -np.stack([one.score_samples(x) for one, x in zip(made, rows, strict=True)])

    pairs: dict[str, dict[str, Callable[[], np.ndarray]]] = {
        "Mahalanobis": {
            "scikit-learn, a loop": distances,
            "sonde, all layers": lambda: Mahalanobis(rcond=0).fit(trusted).score(rows),
        },
        "local outlier factor": {
            "scikit-learn, a loop": factors,
            "scikit-learn, brute force": lambda: factors(algorithm="brute"),
            "sonde, all layers": lambda: LocalOutlierFactor().fit(trusted).score(rows),
        },
    }
    print(machine(), f"layers {given.layers}, rows {given.rows}, width {given.width}")
    for name, ways in pairs.items():
        results = [way() for way in ways.values()]
        apart = max(float(np.abs(one - results[0]).max()) for one in results[1:])
        print(f"\n{name}: scores differ by up to {apart:.1e}")
        for way, ratio in interleave(ways, rounds=given.rounds, warmup=1).items():
            print(f"  {way:28} {ratio}")


if __name__ == "__main__":
    main()
