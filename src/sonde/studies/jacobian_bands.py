"""What the chapters on the training Jacobian share: means over seeds with their intervals, and lines of them."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from sonde.runs import chart_kinds
from sonde.stats.intervals import Interval, bootstrap_mean, bootstrap_means

if TYPE_CHECKING:
    from sonde.studies.training_jacobian import TrainingJacobianConfig

CITE = "Belrose & Scherlis 2024, arXiv:2412.07003"

Seeds = Sequence[dict[str, Any]]
"""What each seed left: the result of `sonde.studies.jacobian_measures.measure`."""


def over(seeds: Seeds, value: Callable[[dict[str, Any]], float]) -> Interval:
    """The mean over seeds with its interval."""
    return bootstrap_mean([float(value(each)) for each in seeds])


def band(seeds: Seeds, curve: Callable[[dict[str, Any]], Sequence[float]], xs: Sequence[float], of: str) -> list[dict]:
    """Rows of a line over `xs` with its interval over seeds."""
    intervals = bootstrap_means([[float(value) for value in curve(each)] for each in seeds])
    return [
        {"x": float(x), "y": i.estimate, "low": i.low, "high": i.high, "of": of}
        for x, i in zip(xs, intervals, strict=True)
    ]


def flat(xs: Sequence[float], values: Sequence[float], of: str) -> list[dict]:
    """A line that is known, without an interval."""
    return [{"x": float(x), "y": y, "low": y, "high": y, "of": of} for x, y in zip(xs, values, strict=True)]


def lines(rows: list[dict], **words: Any) -> Any:
    """The chart of such rows."""
    return chart_kinds.lines(rows, x="x", y="y", low="low", high="high", series="of", **words)


def recipe(config: "TrainingJacobianConfig", seeds: Seeds) -> str:
    """What was trained and how, in a sentence."""
    return (
        f"Perceptron 64-{config.hidden}-10 with tanh-approximate GELU, LeCun normal kernels, biases of sd 1/8; "
        f"{config.rule()}, cosine to 0 over {seeds[0]['steps']:,} steps, batches of {config.batch} in one order; mean "
        f"over {len(seeds)} seeds with a bootstrap interval of them ({CITE})."
    )
