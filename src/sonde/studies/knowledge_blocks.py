"""Charts and tables that studies on knowledge and the chapter share: AUROC by layer, tables of intervals."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from sonde.knowledge.tables import IntervalTable, Undefined
from sonde.runs import chart_kinds
from sonde.runs.blocks import Figure, Table
from sonde.runs.run import Run
from sonde.stats.intervals import Interval

_MOST = 4  # intervals that a row of a page has room for
RANDOM, SHUFFLED = "random directions", "shuffled labels"


def layer_chart(
    name: str,
    series: Mapping[str, Sequence[Interval | Undefined]],
    controls: Mapping[str, Float[np.ndarray, "draws layers"]],
    sites: Sequence[str],
    *,
    title: str,
    caption: str,
    subtitle: str = "Bands: 95 % intervals over base rows; grey: 95 % of the control's draws",
) -> Figure:
    """AUROC by layer, a line each; controls in grey, the band from their 2.5th to their 97.5th percentile."""
    rows = [
        {"layer": layer, "auroc": one.estimate, "low": one.low, "high": one.high, "what": what}
        for what, found in series.items()
        for layer, one in enumerate(found)
        if isinstance(one, Interval)
    ]
    for what, draws in controls.items():
        for layer, values in enumerate(draws.T):
            if np.isfinite(values).any():
                low, high = np.nanquantile(values, [0.025, 0.975])
                rows.append(
                    {"layer": layer, "auroc": float(np.nanmean(values)), "low": low, "high": high, "what": what}
                )
    chart = chart_kinds.lines(
        rows,
        x="layer",
        y="auroc",
        low="low",
        high="high",
        series="what",
        control=tuple(controls),
        title=title,
        subtitle=subtitle,
        x_title="after block",
        y_title="AUROC",
        x_labels=[short(site) for site in sites],
    )
    return Figure(id=name, chart=chart, caption=caption)


def interval_block(name: str, table: IntervalTable, *, run: Run | None = None) -> Table:
    """A table of intervals as a block of a report; with `run` also as tables/`name`.md, .csv and .tex."""
    if run is not None:
        for suffix in (".md", ".csv", ".tex"):
            table.write(run.path("tables", name + suffix))
    wide = max((sum(isinstance(cell, Interval) for cell in row) for row in table.rows), default=0) > _MOST
    notes = "; ".join(dict.fromkeys(cell.reason for row in table.rows for cell in row if isinstance(cell, Undefined)))
    return Table(
        id=name,
        caption=table.caption
        + (f" (intervals: tables/{name}.csv)" if wide and run is not None else "")
        + (f". Gaps: {notes}" if notes else ""),
        columns=list(table.columns),
        rows=[[_cell(cell, wide=wide) for cell in row] for row in table.rows],
    )


def short(site: str) -> str:
    """The number of a layer, or the name of a site without one."""
    return site.rpartition(".")[2]


def _cell(cell: object, *, wide: bool) -> object:
    if isinstance(cell, Interval):
        if wide:
            return round(cell.estimate, 3)
        return f"{cell.estimate:.3f} ({cell.low:.3f} to {cell.high:.3f})"
    return None if isinstance(cell, Undefined) else cell


def percentiles(values: Float[np.ndarray, " n"]) -> tuple[float, float]:
    """The 2.5th and the 97.5th percentile of what is a number."""
    low, high = np.quantile(values[np.isfinite(values)], [0.025, 0.975])
    return float(low), float(high)
