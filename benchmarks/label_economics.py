"""Label economics: the sweep on cached features, the inner fit beside scikit-learn's, a query step beside modAL's.

    python benchmarks/label_economics.py                                          sweep 20,000 x 768, inner fit
    python benchmarks/label_economics.py --parts fit query                        without the sweep
    python benchmarks/label_economics.py --parts generalise errors                weak to strong; learnable errors
    python -m pip install scikit-activeml modAL-python, each in an environment of its own, for the peers of the query

No other package sweeps budgets and shares of two prices; the sweep has a target, not a peer.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from pairing import interleave, machine

from sonde.knowledge.label_choice import Entropy
from sonde.knowledge.label_fit import PENALTIES, fit_path, principal_axes
from sonde.knowledge.label_logistic import Logistic, StageMemory
from sonde.knowledge.label_methods import Sequential
from sonde.knowledge.label_sweep import BUDGETS, SHARES, cells, sweep
from sonde.knowledge.planted_labels import planted_task


def sweep_seconds(seeds: int, *, pool: int, width: int) -> None:
    """5 budgets x 8 shares x seeds on one pool: wall and CPU seconds, without making the data."""
    problem = planted_task(pool=pool, test=1000, width=width, relevant=width // 5)
    todo = cells(problem, BUDGETS, SHARES)
    _ = problem.standardised
    method = Sequential(Logistic(memory=StageMemory()))
    wall, cpu = time.perf_counter(), time.process_time()
    runs = [run for seed in range(seeds) for run in sweep(problem, [method], todo, seed=seed)]
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(f"sweep, {len(runs)} cells on {pool:,} x {width}: {wall:.1f} s, CPU {cpu:.1f} s")


def fits(n: int, width: int, rounds: int, *, decay: float) -> None:
    """A path of 11 penalties: ours, and scikit-learn's from penalty to penalty with warm start.

    decay: of the standard deviations of the principal components with their number, 0 for isotropic features.
    """
    from sklearn.linear_model import LogisticRegression

    generator = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
    x = (torch.randn(n, width, generator=generator) * torch.arange(1, width + 1) ** -decay) @ axes
    x = (x - x.mean(0)) / x.std(0)
    truth = (x @ torch.randn(width, generator=generator) / width**0.5 + 0.2 * torch.randn(n, generator=generator)) > 0
    y = torch.nn.functional.one_hot(truth.long(), 2).float()
    scale = float(x.square().sum() / n)
    rows, labels = x.numpy().astype(np.float64), truth.numpy()

    def ours() -> None:
        fit_path(x, y, prior=torch.zeros(1, width), axes=principal_axes(x))

    def theirs(solver: str, tol: float) -> Callable[[], None]:
        def path() -> None:
            model = LogisticRegression(fit_intercept=False, warm_start=True, solver=solver, tol=tol, max_iter=5000)
            for penalty in PENALTIES:
                model.set_params(C=1 / (penalty * scale)).fit(rows, labels)

        return path

    ways = {"sonde": ours, "lbfgs, tol 1e-4": theirs("lbfgs", 1e-4), "lbfgs, tol 1e-5": theirs("lbfgs", 1e-5)}
    print(f"path of {len(PENALTIES)} penalties, {n:,} x {width}, decay {decay:g}:")
    for name, ratio in interleave(ways, rounds=rounds, warmup=1).items():
        print(f"  {name:16} {ratio}")


def query(pool: int, rounds: int) -> None:
    """Choose 100 of `pool` rows by entropy from scores: ours, and the peers' functions on the same probabilities."""
    scores = torch.randn(pool, 1, dtype=torch.float64)
    p = scores.sigmoid()
    both = torch.cat([1 - p, p], 1).numpy()
    ways: dict[str, Callable[[], object]] = {"sonde": lambda: Entropy().choose(scores, 100)}
    try:
        from modAL.uncertainty import entropy_sampling
    except ImportError:
        print("modAL is not installed")
    else:

        class Known:
            """A classifier whose probabilities are given."""

            def predict_proba(self, rows: np.ndarray) -> np.ndarray:
                return both

        known, rows = Known(), np.zeros((pool, 1))
        ways["modAL"] = lambda: entropy_sampling(known, rows, n_instances=100)
    try:
        from skactiveml.pool import uncertainty_scores
        from skactiveml.utils import simple_batch
    except ImportError:
        print("scikit-activeml is not installed")
    else:
        ways["scikit-activeml"] = lambda: simple_batch(uncertainty_scores(both, method="entropy"), 0, batch_size=100)
    print(f"query of 100 rows among {pool:,}:")
    for name, ratio in interleave(ways, rounds=rounds).items():
        print(f"  {name:16} {ratio}")


def generalise() -> None:
    """Every recipe of weak to strong on two planted tasks: how much of the gap it recovers."""
    from sonde.knowledge.weak_to_strong import RECIPES
    from sonde.knowledge.weak_to_strong import generalise as taught

    tasks = [planted_task(pool=5000, test=1000, seed=seed) for seed in range(2)]
    for recipe in RECIPES:
        one = taught(tasks, recipe, rows=2000)
        gap = one.recovered
        print(
            f"  {recipe.name:20} supervisor {one.supervisor:.3f} student {one.student:.3f} ceiling {one.ceiling:.3f} "
            + ("no gap" if gap is None else f"recovered {gap.estimate:.2f} [{gap.low:.2f}, {gap.high:.2f}]")
        )


def errors(seeds: int) -> None:
    """What 5,000 weak labels alone teach, with their errors where they are and dealt anew among the rows."""
    from dataclasses import replace

    from sonde.knowledge.label_problem import Purchase
    from sonde.knowledge.label_score import rates
    from sonde.knowledge.weak_labels import shuffled_errors

    found: dict[str, list[float]] = {"as they are": [], "shuffled": []}
    for seed in range(seeds):
        task = planted_task(pool=6000, seed=seed)
        weak, oracle = task.sources
        dealt = shuffled_errors(weak.labels, oracle.labels.argmax(1).numpy(), seed=seed)
        for name, labels in (("as they are", weak.labels), ("shuffled", dealt)):
            changed = replace(task, sources=(replace(weak, labels=labels), oracle))
            outcome = Sequential()(changed, Purchase(changed, {"weak": 5000}, seed=seed), seed=seed)
            found[name].append(rates(outcome.scores, task.test_truth)[0])
    for name, values in found.items():
        print(f"  errors {name:12} {np.mean(values):.3f} (s.d. {np.std(values, ddof=1):.3f} over {seeds} seeds)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["sweep", "fit", "query"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(machine())
    if "sweep" in options.parts:
        sweep_seconds(options.seeds, pool=20_000, width=768)
    if "fit" in options.parts:
        for decay in (0.0, 0.75):
            fits(1200, 768, options.rounds, decay=decay)
            fits(4000, 768, options.rounds, decay=decay)
    if "query" in options.parts:
        query(20_000, options.rounds)
    if "generalise" in options.parts:
        generalise()
    if "errors" in options.parts:
        errors(options.seeds)


if __name__ == "__main__":
    main()
