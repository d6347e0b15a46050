"""What the study of the training Jacobian measures of one seed, as plain values that a resumed run reads back."""

import copy
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sonde.data.digits import Digits, digits
from sonde.dynamics.jacobian import TrainingJacobian
from sonde.dynamics.jacobian_analyses import (
    functional_effect,
    invariants,
    nested_masks,
    null_space,
    parameter_function,
    response,
    restricted,
)
from sonde.dynamics.jacobian_spectrum import TOLERANCES, Spectrum, overlap, overlaps
from sonde.dynamics.training_map import TrainingMap, batch_order
from sonde.dynamics.trajectory import Trajectory, record
from sonde.nets.mlp import MLP, MLPShape

if TYPE_CHECKING:
    from sonde.studies.training_jacobian import TrainingJacobianConfig

SIZES = 20  # subspaces of so many sizes
SCALES = 30
CURVE = 40  # points of a curve over all directions
REGIONS = ("bulk", "complement", "chaotic", "stable")
_BIAS_SD = 0.125
_RANDOM = 64
_GAUSSIAN = 500
_OTHER = 1000  # seeds this far away are used nowhere else


def measure(config: "TrainingJacobianConfig", seed: int, folder: Path) -> dict[str, Any]:
    """All numbers of one seed. Blocks of columns are kept in `folder` meanwhile."""
    data = digits()
    map = digits_map(config, data, seed)
    path = record(map, progress=f"seed {seed}: training")
    jacobian = TrainingJacobian(path)
    steps = sorted({max(1, map.steps >> i) for i in range(config.looks)})
    during = jacobian.during(steps, folder=folder / "own", progress=f"seed {seed}: Jacobian")
    spectrum = Spectrum.of(during[map.steps])
    generator = torch.Generator().manual_seed(seed)
    return {
        "n": map.n,
        "steps": map.steps,
        "sigma": spectrum.sigma,
        "regions": {f"{t:g}": list(spectrum.regions(t)) for t in TOLERANCES},
        "during": _during(during, map),
        "alignment": spectrum.alignment()[spectrum.order],
        "losses": _losses(map, path, data),
        "checks": checks(map, generator),
        "response": _response(map, path, jacobian, spectrum, data, generator),
        "effect": _effect(map, path, spectrum, data, generator),
        "displacement": _displacement(map, path, spectrum),
        "overlap": _overlaps(config, spectrum, data, seed, folder, generator),
        "blind": _blind(map, path, spectrum, data, generator),
        "restricted": _restricted(map, spectrum, data, generator),
    }


def digits_map(config: "TrainingJacobianConfig", data: Digits, seed: int) -> TrainingMap:
    """The recipe of the config on these digits."""
    module = MLP(MLPShape((64, config.hidden, 10)), seed=seed, bias_sd=_BIAS_SD)
    order = batch_order(len(data.train_x), batch=config.batch, epochs=config.epochs, rest=config.rest)
    return TrainingMap(module, data.train_x, data.train_y, order, config.rule())


def subspace_sizes(n: int, least: int = 100) -> list[int]:
    """Sizes from `least` to n, evenly; of a small network from a twelfth of n."""
    return sorted({round(k) for k in torch.linspace(min(least, n / 12), n, SIZES).clamp_min(1).tolist()})


def checks(map: TrainingMap, generator: torch.Generator) -> dict[str, float]:
    """How exact it is, in float64: invariants, finite differences of whole trainings, and the adjoint."""
    exact = dataclasses.replace(map, module=copy.deepcopy(map.module).double(), inputs=map.inputs.double())
    jacobian = TrainingJacobian(record(exact))
    pixels, shifts = invariants(exact)
    v, u = torch.randn(2, exact.n, 1, generator=generator, dtype=torch.float64)
    image = jacobian.jvp(v)
    ends = [record(exact, start=exact.start + sign * 1e-6 * v[:, 0]).end for sign in (1, -1)]
    difference = (ends[0] - ends[1]) / 2e-6
    held = torch.cat([pixels, shifts], 1)
    moved = (jacobian.jvp(held) - held).norm(dim=0)
    adjoint = float((image * u).sum() / (v * jacobian.vjp(u)).sum() - 1)
    return {
        "pixels": float(moved[: pixels.shape[1]].max()) if pixels.shape[1] else 0.0,
        "shifts": float(moved[pixels.shape[1] :].max()),
        "held": held.shape[1],
        "differences": float((image[:, 0] - difference).norm() / difference.norm()),
        "adjoint": abs(adjoint),
    }


def _during(during: dict[int, Tensor], map: TrainingMap) -> list[dict[str, Any]]:
    found = []
    for step, j in during.items():
        off = torch.linalg.svdvals(j) - 1
        found.append({
            "step": step, "epochs": step / map.steps, "largest": float(off[0] + 1),
            **{f"{t:g}": float((off.abs() < t).double().mean()) for t in TOLERANCES},
        })  # fmt: skip
    return found


def _losses(map: TrainingMap, path: Trajectory, data: Digits) -> dict[str, float]:
    train, _ = map.evaluate(path.end[None], data.train_x, data.train_y)
    test, right = map.evaluate(path.end[None], data.test_x, data.test_y)
    return {"train": float(train), "test": float(test), "accuracy": float(right)}


def _response(map, path, jacobian, spectrum: Spectrum, data: Digits, generator) -> dict[str, Any]:
    """Along the most chaotic direction, the middle of the bulk, a stable one, and at random."""
    stable = int((spectrum.sigma - 0.3).abs().argmin())
    chosen = [0, int(spectrum.order[spectrum.n // 4]), stable]
    random = torch.randn(map.n, 1, generator=generator)
    v = torch.cat([spectrum.v[:, chosen], random / random.norm()], 1)
    image = torch.cat([spectrum.u[:, chosen] * spectrum.sigma[chosen], jacobian.jvp(v[:, 3:])], 1)
    scales = torch.logspace(-3, 3, SCALES)
    found = response(map, path.end, v, image, held=(data.test_x, data.test_y), scales=scales, progress="retraining")
    return {
        "names": ["chaotic", "bulk", "stable", "random"],
        "sigma": [*spectrum.sigma[chosen].tolist(), float(image[:, 3].norm())],
        **found._asdict(),
    }


def _effect(map, path, spectrum: Spectrum, data: Digits, generator) -> dict[str, Any]:
    inputs = {
        "train": data.train_x,
        "test": data.test_x,
        "inverted": 1 - data.test_x,
        "gaussian": torch.randn(_GAUSSIAN, 64, generator=generator),
    }
    random = torch.randn(map.n, _RANDOM, generator=generator)
    effects = functional_effect(map, path.end, torch.cat([spectrum.v, random / random.norm(dim=0)], 1), inputs)
    bulk = (spectrum.sigma - 1).abs() < TOLERANCES[-1]
    found = {}
    for name, effect in effects.items():
        found[name] = {}
        for kind, values in effect._asdict().items():
            own, chance = values[: map.n], values[map.n :]
            found[name][kind] = {
                "bulk": float(own[bulk].median()),
                "rest": float(own[~bulk].median()),
                "random": float(chance.median()),
                "curve": [float(part.median()) for part in own.tensor_split(min(CURVE, map.n))],
            }
    return found


def _displacement(map, path, spectrum: Spectrum) -> dict[str, Any]:
    squared = spectrum.displacement(map.start, path.end) ** 2
    counts = subspace_sizes(map.n, 1)
    total = squared[spectrum.order].cumsum(0) / squared.sum()
    return {
        "counts": counts,
        "share": [float(total[k - 1]) for k in counts],
        "half": spectrum.displaced_share(map.start, path.end, map.n // 2),
        "curve": [float(part.sqrt().median()) for part in squared.tensor_split(min(CURVE, map.n))],
    }


def _overlaps(config, spectrum: Spectrum, data: Digits, seed: int, folder: Path, generator) -> dict[str, Any]:
    """The bulk beside that of other trainings, which have all but one thing in common with this one."""
    rows = len(data.train_y)
    other = {
        "other seed": digits_map(config, data, seed + _OTHER),
        "permuted labels": digits_map(
            config, data._replace(train_y=data.train_y[torch.randperm(rows, generator=generator)]), seed
        ),
        "noise inputs": digits_map(
            config, data._replace(train_x=torch.rand(data.train_x.shape, generator=generator)), seed
        ),
    }
    counts = subspace_sizes(spectrum.n)
    found: dict[str, Any] = {"counts": counts, "names": list(other)}
    for name, map in other.items():
        place = folder / name.replace(" ", "-")
        theirs = Spectrum.of(TrainingJacobian(record(map)).dense(folder=place, progress=f"seed {seed}: {name}"))
        found[name] = {
            "curve": overlaps(spectrum, theirs, counts),
            "half": overlaps(spectrum, theirs, [spectrum.n // 2])[0],
            "fraction": theirs.fraction(TOLERANCES[-1]),
            "sigma": theirs.sigma,
        }
    return found


def _blind(map, path, spectrum: Spectrum, data: Digits, generator) -> dict[str, Any]:
    """Weights that the outputs on some inputs cannot see, against the bulk: at initialisation and after training."""
    counts = subspace_sizes(map.n)
    noise = torch.randn(data.test_x.shape, generator=generator)
    found: dict[str, Any] = {"counts": counts}
    bulk = spectrum.v[:, spectrum.order]
    for when, theta in (("start", map.start), ("end", path.end)):
        for name, x in (("test", data.test_x), ("noise", noise)):
            unseen = null_space(parameter_function(map, theta, x), map.n)
            squared = (unseen.T @ bulk.double()).square()
            found[f"{name} {when}"] = {
                "curve": [float(squared[:k, :k].sum() / k) for k in counts],
                "half": overlap(unseen[:, : map.n // 2], bulk[:, : map.n // 2]),
            }
    return found


def _restricted(map, spectrum: Spectrum, data: Digits, generator) -> dict[str, Any]:
    quarter = map.n // 4
    counts = sorted({*subspace_sizes(map.n), quarter})
    rows, held = (data.train_x, data.train_y), (data.test_x, data.test_y)
    orders = [spectrum.ranked(region) for region in REGIONS]
    own = restricted(map, spectrum.v, nested_masks(orders, counts), rows=rows, held=held, progress="restricted")
    basis = torch.linalg.qr(torch.randn(map.n, map.n, generator=generator)).Q
    masks = nested_masks([torch.arange(map.n)], counts)
    chance = restricted(map, basis, masks, rows=rows, held=held, progress="restricted, random")
    found: dict[str, Any] = {"counts": counts, "quarter": counts.index(quarter), "names": [*REGIONS, "random"]}
    for field in ("train_loss", "test_loss", "test_accuracy"):
        both = torch.cat([getattr(own, field).double(), getattr(chance, field).double()])
        found[field] = both.view(len(REGIONS) + 1, len(counts))
    return found
