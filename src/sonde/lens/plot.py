"""A passage through the layers: one cell a (layer, token), coloured by a statistic, named by its top token.

One Altair chart serves the report, a self-contained HTML page (hover shows the top tokens) and PNG; a table of the same
cells serves the terminal.
"""

import json
import math
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from sonde.errors import SondeError
from sonde.files import replacing, write_text
from sonde.lens.trajectory import Trajectory
from sonde.lm.model import LanguageModel
from sonde.runs.charts import MOST_POINTS, VEGA_LITE, png, spec
from sonde.runs.palette import LIGHT, fixed
from sonde.runs.report.numbers import number

_NAMES = {
    "entropy": "entropy, nats",
    "cross_entropy": "cross entropy to the next token, nats",
    "rank": "rank of the next token",
    "max_probability": "probability of the top token",
    "kl": "KL from the model's output, nats",
    "log_probability_difference": "log-probability of target minus anti-target, nats",
}
_CELL, _CELL_HEIGHT = 52, 24
_TEXT_UP_TO = 24  # tokens in a row of cells that are wide enough for names
_STEPS = 7


def trajectory_chart(
    trajectory: Trajectory,
    lm: LanguageModel,
    *,
    statistic: str = "entropy",
    row: int | None = 0,
    stride: int = 1,
    log: bool = False,
    positions: slice | None = None,
    title: str | None = None,
) -> Any:
    """An Altair chart of one statistic of one row of the batch.

    Args:
        trajectory: what to draw.
        lm: for the text of tokens.
        statistic: one of `sonde.lens.trajectory.STATISTICS`.
        row: of the batch; None averages over the batch, position by position.
        stride: draw every so many layers; the output is always drawn.
        log: colours step by equal factors.
        positions: of the passage; by default all.
        title: the result in words; by default the statistic's name.

    Raises:
        SondeError: for more than 2,000 cells, and statistics that the trajectory lacks.

    """
    values = trajectory.values(statistic)
    mean = values.nanmean(1) if row is None else values[:, _row(trajectory, row)]
    return _chart(
        trajectory, lm, mean, row, stride, positions, log=log, colours="s",
        title=title or f"{_plain(statistic)} at every layer",
        subtitle=f"{_NAMES[statistic]}; the name in a cell is the lens's top token",
    )  # fmt: skip


def difference_chart(
    first: Trajectory,
    second: Trajectory,
    lm: LanguageModel,
    *,
    statistic: str = "kl",
    row: int | None = 0,
    stride: int = 1,
    positions: slice | None = None,
    title: str | None = None,
) -> Any:
    """An Altair chart of a statistic of `first` minus that of `second`: two lenses, models or passages of one length.

    Cells are named by the top tokens of `first`. Raises `SondeError` for other shapes, and as `trajectory_chart` does.
    """
    a, b = first.values(statistic), second.values(statistic)
    if a.shape != b.shape:
        raise SondeError(f"trajectories of shapes {tuple(a.shape)} and {tuple(b.shape)} have no difference")
    difference = a - b
    shown = difference.nanmean(1) if row is None else difference[:, _row(first, row)]
    return _chart(
        first, lm, shown, row, stride, positions, log=False, colours="d",
        title=title or f"{_plain(statistic)} at every layer: the first minus the second",
        subtitle=f"{_NAMES[statistic]}, first minus second; below zero the first is lower",
    )  # fmt: skip


def write_html(chart: Any, path: str | Path) -> None:
    """Write a chart as one HTML file that needs no network."""
    import vl_convert

    made = {**_light(chart), "background": LIGHT["paper"], "width": _width(chart)}
    write_text(path, vl_convert.vegalite_to_html(made, vl_version=VEGA_LITE, bundle=True))


def write_png(chart: Any, path: str | Path) -> None:
    """Write a chart as PNG."""
    with replacing(path) as beside:
        beside.write_bytes(png(_light(chart), width=_width(chart)))


def terminal_table(
    trajectory: Trajectory,
    lm: LanguageModel,
    *,
    statistic: str = "entropy",
    row: int = 0,
    stride: int = 1,
    width: int = 100,
) -> str:
    """Top token and statistic of every (layer, token) as plain text, the output on top, `width` columns wide."""
    values = trajectory.values(statistic)[:, _row(trajectory, row)]
    rows = _rows(trajectory, stride)[::-1]
    real = trajectory.mask[row].nonzero().squeeze(-1).tolist()
    tokens = lm.token_strings(trajectory.tokens[row].tolist())
    labels = [trajectory.rows[r] for r in rows]
    margin, cell = max(map(len, labels)) + 2, 16
    per_block = max(1, (width - margin) // cell)
    lines = [_NAMES[statistic]]
    for start in range(0, len(real), per_block):
        block = real[start : start + per_block]
        lines += ["", " " * margin + "".join(_padded(_shown(tokens[p], 14), cell) for p in block)]
        for r, label in zip(rows, labels, strict=True):
            tops = lm.token_strings(trajectory.top_tokens[r, row, block, 0].tolist())
            cells = [
                _padded(_shown(top, 8), 9) + f"{number(float(values[r, p])):<7}"
                for top, p in zip(tops, block, strict=True)
            ]
            lines.append(f"{label:<{margin}}" + "".join(cells).rstrip())
    return "\n".join(lines) + "\n"


def _chart(
    trajectory: Trajectory,
    lm: LanguageModel,
    values: Float[Tensor, "layers pos"],
    row: int | None,
    stride: int,
    positions: slice | None,
    *,
    log: bool,
    colours: str,
    title: str,
    subtitle: str,
) -> Any:
    import altair as alt

    rows = _rows(trajectory, stride)
    mask = trajectory.mask.any(0) if row is None else trajectory.mask[row]
    chosen = [p for p in range(len(mask))[positions or slice(None)] if mask[p]]
    if not 0 < len(rows) * len(chosen) <= MOST_POINTS:
        raise SondeError(
            f"{len(chosen)} tokens in {len(rows)} layers are {len(rows) * len(chosen):,} cells; a picture holds 1 to "
            f"{MOST_POINTS:,}: give positions=slice(start, stop) or a larger stride"
        )
    labels = [str(p) for p in chosen]
    if row is not None:
        labels = [_shown(text, 8) for text in lm.token_strings(trajectory.tokens[row, chosen].tolist())]
    cells = []
    for y, r in enumerate(rows):
        tops = None if row is None else trajectory.top_tokens[r, row]
        for x, p in enumerate(chosen):
            cell = {
                "x0": x - 0.5, "x1": x + 0.5, "x": x, "y": y, "y0": y - 0.5, "y1": y + 0.5,
                "value": float(values[r, p]), "position": p, "layer": trajectory.rows[r], "token": labels[x],
            }  # fmt: skip
            if row is not None and tops is not None:
                names = [_shown(text, 16) for text in lm.token_strings(tops[p].tolist())]
                shares = trajectory.top_log_probs[r, row, p].exp().tolist()
                cell["top"] = _shown(names[0], 7)
                cell["predicts"] = ", ".join(f"{n} {100 * s:.1f} %" for n, s in zip(names, shares, strict=True))
            cells.append(cell)
    base = alt.Chart(alt.InlineData(values=cells))
    field_x = alt.X(
        "x0:Q", title="token", axis=_axis(alt, labels), scale=alt.Scale(domain=[-0.5, len(chosen) - 0.5], nice=False)
    )
    field_y = alt.Y(
        "y0:Q", title="layer", axis=_axis(alt, [trajectory.rows[r] for r in rows]),
        scale=alt.Scale(domain=[-0.5, len(rows) - 0.5], nice=False),
    )  # fmt: skip
    scale = _scale(alt, [cell["value"] for cell in cells], log=log, colours=colours)
    legend = alt.Legend(orient="right", title=None, format=".2~g", gradientLength=_CELL_HEIGHT * len(rows))
    tips = [alt.Tooltip(f"{name}:N") for name in ("layer", "position", "token", "predicts") if name in cells[0]]
    boxes = base.mark_rect(stroke="var(--card)", strokeWidth=1).encode(
        x=field_x, x2="x1:Q", y=field_y, y2="y1:Q",
        color=alt.Color("value:Q", scale=scale, legend=legend),
        tooltip=[*tips, alt.Tooltip("value:Q", format=".3~g")],
    )  # fmt: skip
    layers = [boxes]
    if row is not None and len(chosen) <= _TEXT_UP_TO:
        layers.append(base.mark_text(fontSize=11, color="var(--ink)").encode(x="x:Q", y="y:Q", text="top:N"))
    return alt.layer(*layers).properties(
        title=alt.TitleParams(title, subtitle=subtitle),
        height=_CELL_HEIGHT * len(rows),
        padding={"left": 5, "top": 20, "bottom": 5, "right": 8},
    )


def _scale(alt: Any, values: Sequence[float], *, log: bool, colours: str) -> Any:
    finite = [value for value in values if math.isfinite(value) and (value > 0 or not log)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    steps = _STEPS
    if colours == "d":
        high, steps = max(abs(low), abs(high)), 9
        low = -high
    if high <= low:
        high = low + 1.0
    if log:
        borders = [low * (high / low) ** (i / steps) for i in range(1, steps)]
    else:
        borders = [low + (high - low) * i / steps for i in range(1, steps)]
    borders = [float(f"{border:.3g}") for border in borders]
    return alt.Scale(type="threshold", domain=borders, range=[f"var(--{colours}{i})" for i in range(steps)])


def _axis(alt: Any, labels: Sequence[str]) -> Any:
    options = {"labelOverlap": "greedy", "grid": False, "tickCount": len(labels)}
    return alt.Axis(values=list(range(len(labels))), labelExpr=f"{json.dumps(list(labels))}[datum.value]", **options)


def _plain(statistic: str) -> str:
    """The statistic's name without its unit, to open a title."""
    name = _NAMES[statistic].partition(",")[0]
    return name[0].upper() + name[1:]


def _light(chart: Any) -> dict[str, Any]:
    """The spec with the cell colours of the light theme, for pictures that stand outside a page."""
    return json.loads(fixed(json.dumps(spec(chart))))


def _width(chart: Any) -> int:
    columns = round(chart.to_dict(validate=False)["layer"][0]["encoding"]["x"]["scale"]["domain"][1] + 0.5)
    return max(480, 140 + _CELL * columns) if columns <= _TEXT_UP_TO else min(1600, 140 + 14 * columns)


def _rows(trajectory: Trajectory, stride: int) -> list[int]:
    if stride < 1:
        raise SondeError(f"stride is {stride}; it must be at least 1")
    last = len(trajectory.rows) - 1
    return [*range(0, last, stride), last]


def _row(trajectory: Trajectory, row: int) -> int:
    if not 0 <= row < len(trajectory.tokens):
        raise SondeError(f"row {row} does not exist in a batch of {len(trajectory.tokens)}")
    return row


def _shown(text: str, most: int) -> str:
    """Text of a token in one line: spaces and line ends visible, control characters spelled out, long ones cut."""
    text = text.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "·")
    # a control character is not XML, and makes the SVG renderer abort the whole process
    text = "".join(f"⟨{ord(sign):02X}⟩" if unicodedata.category(sign)[0] == "C" else sign for sign in text)
    return text if len(text) <= most else text[: most - 1] + "…"


def _padded(text: str, width: int) -> str:
    """Padded to terminal columns, of which East Asian characters take two."""
    taken = sum(2 if unicodedata.east_asian_width(sign) in "WF" else 1 for sign in text)
    return text + " " * max(1, width - taken)
