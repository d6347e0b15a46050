"""Erasers against `concept-erasure` 0.2.4: statistics, solving, applying and quadratic erasure, in turn, in CPU time.

Run: `python benchmarks/erasure.py [--quick]`, with `pip install concept-erasure==0.2.4`.
"""

import argparse
import resource
import warnings

import torch
from pairing import interleave, machine

from sonde.concepts.leace import LeaceEraser
from sonde.concepts.quadratic import QuadraticEraser

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from concept_erasure import LeaceFitter
    from concept_erasure.quadratic import QuadraticFitter


def planted(n: int, d: int, k: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    z = torch.randint(0, k, (n,))
    scale = torch.logspace(0.5, -0.5, d)
    return (torch.randn(n, d) * scale + 0.3 * torch.randn(k, d)[z]).to(dtype), z


def measure(d: int, n: int, dtype: torch.dtype, rounds: int, *, k: int = 17) -> None:
    x, z = planted(n, d, k, dtype)
    columns = torch.nn.functional.one_hot(z).to(dtype)
    state: dict = {}

    def our_update() -> None:
        state["ours"] = LeaceEraser().update(x, z)

    def their_update() -> None:
        state["theirs"] = LeaceFitter(d, k, dtype=dtype, svd_tol=1e-3).update(x, columns)

    update = interleave({"ours": our_update, "theirs": their_update}, rounds=rounds, warmup=1)["theirs"]
    statistics = state["ours"].statistics

    def our_solve() -> None:
        state["eraser"] = LeaceEraser().finish(statistics)

    def their_solve() -> None:
        vars(state["theirs"]).pop("_cached_eraser", None)
        state["reference"] = state["theirs"].eraser

    solve = interleave({"ours": our_solve, "theirs": their_solve}, rounds=rounds, warmup=1)["theirs"]
    ours, theirs = state["eraser"], state["reference"]
    exact = (x - ours(x)).norm()
    difference = float((ours(x) - theirs(x)).norm() / exact)
    buffer = x.clone()
    ways = {"ours": lambda: ours(x), "theirs": lambda: theirs(x), "in place": lambda: ours.erase_(buffer)}
    apply = interleave(ways, rounds=rounds, warmup=1)
    name = str(dtype).removeprefix("torch.")
    print(f"d {d}, n {n}, {name}, k {k}: theirs / ours; edits differ by {difference:.1e} of their size")
    print(f"  update   {update}")
    print(f"  eraser   {solve}")
    print(f"  apply    {apply['theirs']}    in place / ours {apply['in place']}", flush=True)


def measure_quadratic(d: int, n: int, k: int, rounds: int) -> None:
    x, z = planted(n, d, k, torch.float32)
    ours = QuadraticEraser(shrinkage=True)
    statistics = ours.collects().update(x, z)
    theirs = QuadraticFitter.fit(x, z)

    def reference() -> None:
        vars(theirs).pop("_cached_eraser", None)
        _ = theirs.eraser

    ratio = interleave({"ours": lambda: ours.finish(statistics), "theirs": reference}, rounds=rounds, warmup=1)
    print(f"QLEACE d {d}, k {k}, float32 (ours in float64): theirs / ours {ratio['theirs']}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="leave out d 4,096 and large QLEACE")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    print(machine())
    for dtype in (torch.float32, torch.float64):
        measure(768, 8192, dtype, 9)
        measure(2048, 8192, dtype, 5)
    measure_quadratic(256, 4096, 2, 5)
    measure_quadratic(256, 4096, 10, 3)
    if not options.quick:
        measure(4096, 8192, torch.float32, 3)
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")
