"""What every eraser leaves of a planted concept, and what it costs: d 768, 6,000 rows, a linear probe on held-out rows.

The concept is spread over directions of all variances, so that an oblique projection has something to gain over an
orthogonal one. Run: `python benchmarks/erasure_methods.py [--out docs/img/erasure-methods.png]`.
"""

import argparse
import time
from pathlib import Path

import torch

from sonde.concepts.affine import AffineEdit
from sonde.concepts.certificate import certify
from sonde.concepts.freeform import FreeFormEraser
from sonde.concepts.inlp import InlpEraser
from sonde.concepts.leace import LeaceEraser
from sonde.concepts.oracle import OracleEraser
from sonde.concepts.sal import SalEraser
from sonde.runs import chart_kinds, charts


def planted(n: int, d: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gaussian rows of standard deviations 4 to 1/4 and a class difference of 6 standard deviations in all."""
    g = torch.Generator().manual_seed(seed)
    scale = torch.logspace(0.6, -0.6, d)
    mix = torch.linalg.qr(torch.randn(d, d, generator=g))[0]
    z = torch.randint(0, 2, (n,), generator=g)
    direction = torch.randn(d, generator=g)
    x = torch.randn(n, d, generator=g) * scale + (2 * z[:, None] - 1) * direction * 3 / (direction / scale).norm()
    return x @ mix, z


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    x, z = planted(6000, 768, options.seed)
    fit, held = slice(0, 3000), slice(3000, None)
    unit = torch.nn.functional.normalize(torch.randn(768, generator=torch.Generator().manual_seed(1)), dim=0)
    ways = {
        "random direction": lambda: AffineEdit.mean_ablate(unit, x[fit].mean(0)),
        "INLP, 1 direction": lambda: InlpEraser.fit(x[fit], z[fit], directions=1),
        "INLP, 5 directions": lambda: InlpEraser.fit(x[fit], z[fit], directions=5),
        "INLP, 25 directions": lambda: InlpEraser.fit(x[fit], z[fit], directions=25),
        "SAL": lambda: SalEraser.fit(x[fit], z[fit]),
        "LEACE": lambda: LeaceEraser.fit(x[fit], z[fit]),
        "free-form LEACE": lambda: FreeFormEraser.fit(x[fit], z[fit]),
        "oracle": lambda: OracleEraser.fit(x[fit], z[fit]),
    }
    rows, chance, before = [], 0.5, 0.0
    for name, make in ways.items():
        start = time.process_time()
        eraser = make()
        seconds = time.process_time() - start
        found = certify(eraser, x[held], z[held], probes_on=(x[fit], z[fit]))
        fresh = certify(eraser, x[held], z[held]).linear[1]
        chance, before = found.chance.estimate, found.linear[0].estimate
        linear, cost = found.linear[1], found.mean_squared_change
        label = f"{name}: {100 * cost.estimate:.2g} %"
        rows.append({"label": label, "value": linear.estimate, "low": linear.low, "high": linear.high})
        print(
            f"{name:22s} linear {linear.estimate:.3f} ({linear.low:.3f} to {linear.high:.3f})  "
            f"MLP {found.mlp[1].estimate:.3f}  fresh {fresh.estimate:.3f}  "
            f"change {cost.estimate:.4f} ({cost.low:.4f} to {cost.high:.4f})  "
            f"fit {seconds:.2f} s",
            flush=True,
        )
    print(f"before: linear {before:.3f}, chance {chance:.3f}, {len(x[held])} rows")
    if options.out is not None:
        chart = chart_kinds.intervals(
            rows,
            label="label",
            value="value",
            low="low",
            high="high",
            title="LEACE brings a probe to chance at the least change of the rows",
            subtitle=f"Method: share of the variance that it takes. Before, the probe scores {100 * before:.1f} %.",
            x_title="Accuracy of a linear probe on 3,000 held-out rows, 95 % interval",
            y_title="Method",
            reference=("chance", chance),
        )
        options.out.write_bytes(charts.png(charts.spec(chart, "erasure-methods"), width=720))


if __name__ == "__main__":
    main()
