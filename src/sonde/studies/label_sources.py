"""Where the task of a study of label economics comes from: a planted one, a file of features, or texts and a model."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sonde.errors import SondeError

if TYPE_CHECKING:
    from sonde.knowledge.label_problem import Problem
    from sonde.studies.label_economics import LabelEconomicsConfig

BUDGETS = (8.0, 32.0, 128.0, 512.0, 1500.0)
_LEAST_BUDGET = 8.0
_MOST_PLANTED = 60_000  # rows of 200 features
_TABLES = (".csv", ".jsonl", ".parquet")


def planted_budgets(config: "LabelEconomicsConfig") -> tuple[float, ...]:
    """Pilot budgets for the planted task: those asked for, or the usual ones whose weak labels can be made.

    Raises `SondeError` where a budget asked for buys more weak labels than the planted task makes.
    """
    from sonde.knowledge.label_ledger import exact_price

    price = exact_price(config.weak_price, "a weak label")
    if not price:
        raise SondeError(
            "--weak-price is 0: weak labels without limit need a cap, which a small price such as 0.001 is"
        )
    most = float(_MOST_PLANTED * price)
    if config.budgets:
        if max(config.budgets) > most:
            raise SondeError(
                f"a budget of {max(config.budgets):g} buys {max(config.budgets) / float(price):,.0f} weak labels; the "
                f"planted task makes {_MOST_PLANTED:,} at most, for a budget of {most:g}"
            )
        return tuple(config.budgets)
    fitting = tuple(budget for budget in BUDGETS if budget <= most)
    if len(fitting) < 2:
        raise SondeError(f"at --weak-price {config.weak_price} even small budgets buy more weak labels than there are")
    return fitting


def planted(config: "LabelEconomicsConfig", budgets: Sequence[float], seed: int) -> "Problem":
    """The planted task of one seed, with as many rows as the largest budget can buy."""
    from sonde.knowledge.label_ledger import exact_price
    from sonde.knowledge.planted_labels import planted_task

    price = exact_price(config.weak_price, "a weak label")
    rows = max(Fraction(str(budget)) / min(price, Fraction(1)) for budget in budgets)
    return planted_task(
        pool=int(rows) + max(64, int(rows) // 10), test=config.test, weak_price=config.weak_price, seed=seed
    )


def read_problem(config: "LabelEconomicsConfig") -> "Problem":
    """The task of a user's file, with test rows dealt from those whose truth is known.

    Raises `SondeError` for files that cannot be read, columns that are missing or not numbers, and too few rows.
    """
    import torch

    from sonde.knowledge.label_problem import LabelSource, Problem, repeated_texts

    columns, where = _columns(config)
    truth = _classes(columns[str(config.truth)], str(config.truth), where)
    weak = _numbers(columns[str(config.weak)], str(config.weak), where)
    texts = [str(text) for text in columns["texts"]] if "texts" in columns else None
    keep = np.ones(len(truth), dtype=bool)
    if texts is not None:
        keep[repeated_texts(texts)] = False
    known = np.flatnonzero((truth >= 0) & keep)
    held = min(config.test, len(known) // 3)
    if held < 10:
        raise SondeError(
            f"{where}: the truth of {len(known)} rows is known, of which a third tests: at least 30 needed"
        )
    test = np.sort(np.random.default_rng(config.seed).permutation(known)[:held])
    pool = np.setdiff1d(np.flatnonzero(keep), test)
    x = torch.from_numpy(columns["features"]) if "features" in columns else _activations(config, texts or [])
    seen = np.where(truth[pool] >= 0, truth[pool], np.nan).astype(np.float64)
    return Problem(
        features=x[torch.from_numpy(pool)],
        test_features=x[torch.from_numpy(test)],
        texts=None if texts is None else [texts[i] for i in pool],
        test_texts=None if texts is None else [texts[i] for i in test],
        test_truth=truth[test],
        sources=[
            LabelSource.of(str(config.weak), weak[pool], price=str(config.weak_price)),
            LabelSource.of(str(config.truth), seen, price=str(config.oracle_price)),
        ],
        name=Path(where).stem,
    )


def pilot_budgets(problem: "Problem", asked: Sequence[float] | None) -> tuple[float, ...]:
    """Budgets for a pilot on what the file holds: those asked for, or five up to what can be bought."""
    if asked:
        return tuple(asked)
    weak, oracle = problem.sources
    if not weak.price:
        raise SondeError("--weak-price is 0: weak labels without limit need a cap; give a small price such as 0.001")
    rows = [int(source.available.sum()) for source in (weak, oracle)]
    most = min(rows[0] * weak.price, rows[1] * oracle.price)
    least = _LEAST_BUDGET * float(oracle.price)
    if float(most) < 2 * least:
        raise SondeError(
            f"{rows[0]} weak and {rows[1]} true labels are enough for a pilot of {float(most):g} at these prices; at "
            f"least {2 * least:g} is needed: give more rows"
        )
    return tuple(float(f"{b:.3g}") for b in np.geomspace(least, 0.98 * float(most), 5))


def _columns(config: "LabelEconomicsConfig") -> tuple[Mapping[str, Any], str]:
    """Features (or texts) and both columns of labels of a file, and its name."""
    path = Path(str(config.data)).expanduser()
    if not path.is_file():
        raise SondeError(f"{path} does not exist: give a .npz, .safetensors, .csv, .jsonl or .parquet file")
    suffix = path.suffix.lower()
    if suffix in (".npz", ".safetensors"):
        return _arrays(path, config), path.name
    if suffix not in _TABLES:
        raise SondeError(f"{path} is no .npz, .safetensors, .csv, .jsonl or .parquet file")
    return _table(path, config), path.name


def _arrays(path: Path, config: "LabelEconomicsConfig") -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        if path.suffix.lower() == ".npz":
            with np.load(path, allow_pickle=False) as file:
                arrays = dict(file)
        else:
            arrays = load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise SondeError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    _require(path, arrays, ("features", str(config.weak), str(config.truth)))
    sizes = {len(arrays[name]) for name in ("features", str(config.weak), str(config.truth))}
    if arrays["features"].ndim != 2 or len(sizes) > 1:
        raise SondeError(f"{path}: features are [rows, d], with one weak and one true label a row")
    return {**arrays, "features": arrays["features"].astype(np.float32)}


def _table(path: Path, config: "LabelEconomicsConfig") -> dict[str, Any]:
    import polars as pl

    readers = {".csv": pl.read_csv, ".jsonl": pl.read_ndjson, ".parquet": pl.read_parquet}
    try:
        frame = readers[path.suffix.lower()](path)
    except (pl.exceptions.PolarsError, OSError, UnicodeDecodeError) as error:
        raise SondeError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    labels = [str(config.weak), str(config.truth)]
    found: dict[str, Any] = {}
    if config.model is not None:
        _require(path, frame.columns, [str(config.text), *labels])
        found["texts"] = frame[str(config.text)].cast(pl.String).to_list()
        if None in found["texts"]:
            raise SondeError(f"{path}, column {config.text!r}: row {found['texts'].index(None)} is empty")
    else:
        _require(path, frame.columns, labels)
        numeric = [name for name in frame.columns if name not in labels and frame[name].dtype.is_numeric()]
        if not numeric:
            raise SondeError(
                f"{path} has no columns of numbers beside {' and '.join(labels)}: texts need --model, which reads them"
            )
        found["features"] = frame.select(numeric).to_numpy().astype(np.float32)
    for name in labels:
        found[name] = frame[name].to_numpy()
    return found


def _require(path: Path, there: Any, names: Sequence[str]) -> None:
    for name in names:
        if name not in there:
            raise SondeError(f"{path} has no column {name!r}; there are {', '.join(list(there)[:12])}")


def _numbers(column: np.ndarray, name: str, where: str) -> np.ndarray:
    try:
        return np.array([np.nan if value is None else float(value) for value in column.tolist()])
    except (TypeError, ValueError) as error:
        raise SondeError(f"{where}, column {name!r}: {error}; expected numbers, empty where unknown") from error


def _classes(column: np.ndarray, name: str, where: str) -> np.ndarray:
    """0, 1, or -1 where unknown."""
    values = _numbers(column, name, where)
    wrong = values[np.isfinite(values) & (values != 0) & (values != 1)]
    if len(wrong):
        raise SondeError(f"{where}, column {name!r} holds {wrong[0]:g}: the truth is 0 or 1, empty where unknown")
    return np.where(np.isnan(values), -1, values).astype(np.int64)


def _activations(config: "LabelEconomicsConfig", texts: Sequence[str]) -> Any:
    """The residual stream at the last token of every text, at the site of `config` or in the middle of the model."""
    import torch

    from sonde.lm.prompt_rows import at_position, prompt_ids
    from sonde.organisms.loading import load

    lm = load(str(config.model))
    ids = prompt_ids(lm, texts)
    longest = max(map(len, ids))
    if longest > lm.context:
        raise SondeError(
            f"a text has {longest} tokens, but {lm.name} reads {lm.context}: shorten it, nothing is cut off"
        )
    site = config.site or f"resid_post.{lm.n_layers // 2}"
    x: torch.Tensor | None = None
    for numbers, values in at_position(lm, ids, [site]):
        if x is None:
            x = torch.empty(len(ids), values[site].shape[1])
        x[torch.tensor(numbers)] = values[site].float().cpu()
    return x
