"""The kinds of charts that studies share: lines by layer, intervals, bars, points against a diagonal, matrices.

Each takes rows of plain values and gives an Altair chart that obeys the rules of `sonde.runs.charts`.
"""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from sonde.runs.palette import CIVIDIS

HEIGHT = 220

_SERIES = (
    ("var(--accent)", [1, 0], "circle"),
    ("var(--second)", [1, 0], "square"),
    ("var(--accent)", [5, 3], "triangle-up"),
    ("var(--second)", [5, 3], "diamond"),
)
_CONTROL = ("var(--ctl)", [6, 4], "circle")

Rows = Sequence[Mapping[str, Any]]


def lines(
    rows: Rows,
    *,
    x: str,
    y: str,
    series: str,
    title: str,
    subtitle: str,
    x_title: str,
    y_title: str,
    low: str | None = None,
    high: str | None = None,
    control: Sequence[str] = (),
    x_labels: Sequence[str] | None = None,
    log: bool = False,
) -> Any:
    """Lines over layers or steps, one per value of `series`, with bands from `low` to `high`.

    Series named in `control` are grey and dashed. Each line carries its name at its end, so that no legend is needed.
    `x_labels` name the positions 0, 1, … of `x`, such as sites. The y axis starts at zero unless it is logarithmic.
    """
    import altair as alt

    names = list(dict.fromkeys(row[series] for row in rows))
    looks = _looks(names, control)
    scale = _y_scale([row[f] for row in rows for f in (y, low, high) if f], log)
    field_x = alt.X(f"{x}:Q", title=x_title, axis=_position_axis(x_labels), scale=alt.Scale(zero=False, nice=False))
    ticks = _log_ticks(*scale["domain"]) if log else []
    axis_y = alt.Axis(values=ticks, tickCount=len(ticks), format="~g") if log else alt.Axis()
    field_y = alt.Y(f"{y}:Q", title=y_title + (" (log scale)" if log else ""), scale=alt.Scale(**scale), axis=axis_y)
    colour = alt.Color(f"{series}:N", legend=None, scale=alt.Scale(domain=names, range=[look[0] for look in looks]))
    base = alt.Chart(alt.InlineData(values=[dict(row) for row in rows])).encode(x=field_x)
    layers = []
    if low and high:
        layers.append(base.mark_area(opacity=0.16).encode(y=alt.Y(f"{low}:Q"), y2=f"{high}:Q", color=colour))
    dash = alt.StrokeDash(f"{series}:N", legend=None, scale=alt.Scale(domain=names, range=[look[1] for look in looks]))
    layers.append(base.mark_line().encode(y=field_y, color=colour, strokeDash=dash))
    if max(sum(row[series] == name for row in rows) for name in names) <= 40:
        shape = alt.Shape(f"{series}:N", legend=None, scale=alt.Scale(domain=names, range=[look[2] for look in looks]))
        layers.append(
            base.mark_point(filled=True, size=34, opacity=1, stroke="transparent", strokeWidth=14).encode(
                y=field_y,
                color=colour,
                shape=shape,
                tooltip=[*_tooltips((series,), "N"), *_tooltips((x, y, low, high))],
            )
        )
    ends = _line_ends(rows, x, y, series, names, scale)
    layers.append(
        alt.Chart(alt.InlineData(values=ends))
        .mark_text(align="left", dx=9, fontWeight=500)
        .encode(x=field_x, y=alt.Y("label_at:Q"), text=f"{series}:N", color=colour)
    )
    return _titled(alt, layers, title, subtitle, right=5 + max(map(len, names)))


def intervals(
    rows: Rows,
    *,
    label: str,
    value: str,
    low: str,
    high: str,
    title: str,
    subtitle: str,
    x_title: str,
    y_title: str,
    control: str | None = None,
    reference: tuple[str, float] | None = None,
) -> Any:
    """One row per item: a dot with its interval, and the item's control as a grey tick.

    `control` is the field with each item's control value; `reference` a name and a value that all items share.
    """
    import altair as alt

    labels = [str(row[label]) for row in rows]
    placed = [{**row, "position": i} for i, row in enumerate(rows)]
    field_y = alt.Y("position:Q", title=y_title, axis=_position_axis(labels), scale=alt.Scale(
        domain=[len(rows) - 0.5, -0.5], nice=False))  # fmt: skip
    base = alt.Chart(alt.InlineData(values=placed)).encode(y=field_y)
    field_x = alt.X(f"{value}:Q", title=x_title, scale=alt.Scale(zero=True))
    tips = [*_tooltips((label,), "N"), *_tooltips((value, low, high, control))]
    layers = []
    if control:
        layers.append(base.mark_tick(color="var(--ctl)", thickness=3, size=16).encode(x=f"{control}:Q"))
    layers.append(
        base.mark_rule(color="var(--accent)", strokeWidth=6, opacity=0.35).encode(x=alt.X(f"{low}:Q"), x2=f"{high}:Q")
    )
    layers.append(
        base.mark_point(filled=True, size=60, opacity=1, color="var(--accent)", stroke="transparent", strokeWidth=14)
        .encode(x=field_x, tooltip=tips)
    )  # fmt: skip
    layers += _reference(alt, "x", reference)
    return _titled(alt, layers, title, subtitle, left=14 + max(map(len, labels)) // 2, right=44).properties(
        height=34 * len(rows) + 10
    )


def bars(
    rows: Rows,
    *,
    x: str,
    y: str,
    title: str,
    subtitle: str,
    x_title: str,
    y_title: str,
    low: str | None = None,
    high: str | None = None,
    control: str | None = None,
    control_name: str = "control",
    x_labels: Sequence[str] | None = None,
) -> Any:
    """Bars at positions 0, 1, …, with interval whiskers and the control of each bar as a grey dashed line."""
    import altair as alt

    span = max(row[x] for row in rows) + 0.6
    half = 0.36
    placed = [{**row, "left": row[x] - half, "right": row[x] + half, "base": 0} for row in rows]
    base = alt.Chart(alt.InlineData(values=placed))
    field_x = alt.X(
        "left:Q", title=x_title, axis=_position_axis(x_labels), scale=alt.Scale(domain=[-0.6, span], nice=False)
    )
    field_y = alt.Y(f"{y}:Q", title=y_title, scale=alt.Scale(zero=True))
    tips = _tooltips((x, y, low, high, control))
    layers = [base.mark_rect(color="var(--accent)", opacity=0.45).encode(
        x=field_x, x2="right:Q", y=field_y, y2="base:Q", tooltip=tips)]  # fmt: skip
    if low and high:
        layers.append(base.mark_rule(color="var(--ink)").encode(x=f"{x}:Q", y=alt.Y(f"{low}:Q"), y2=f"{high}:Q"))
    if control:
        grey = base.mark_line(color="var(--ctl)", strokeDash=[6, 4]).encode(x=f"{x}:Q", y=alt.Y(f"{control}:Q"))
        end = {"edge": span, control: max(rows, key=lambda row: row[x])[control]}
        named = alt.Chart(alt.InlineData(values=[end])).encode(x="edge:Q", y=alt.Y(f"{control}:Q"))
        named = named.mark_text(align="left", dx=6, color="var(--ctl)", text=control_name)
        layers += [grey, named]
    return _titled(alt, layers, title, subtitle)


def points(
    rows: Rows,
    *,
    x: str,
    y: str,
    title: str,
    subtitle: str,
    x_title: str,
    y_title: str,
    low: str | None = None,
    high: str | None = None,
    diagonal: str | None = None,
    size: str | None = None,
) -> Any:
    """Points with vertical interval bars. `diagonal` names the line y = x, drawn as the control."""
    import altair as alt

    base = alt.Chart(alt.InlineData(values=[dict(row) for row in rows]))
    field_x, field_y = alt.X(f"{x}:Q", title=x_title), alt.Y(f"{y}:Q", title=y_title)
    layers = []
    if diagonal:
        top = max(float(row[f]) for row in rows for f in (x, y, high) if f and _finite(row[f]))
        line = [{x: 0.0, y: 0.0}, {x: top, y: top}]
        control = alt.Chart(alt.InlineData(values=line)).encode(x=field_x, y=field_y)
        layers.append(control.mark_line(color="var(--ctl)", strokeDash=[6, 4]))
        end = alt.Chart(alt.InlineData(values=[line[1]])).encode(x=field_x, y=field_y)
        layers.append(end.mark_text(text=diagonal, align="right", dx=-18, dy=-2, color="var(--ctl)"))
    if low and high:
        layers.append(base.mark_rule(color="var(--accent)", strokeWidth=4, opacity=0.35).encode(
            x=field_x, y=alt.Y(f"{low}:Q"), y2=f"{high}:Q"))  # fmt: skip
    marks = base.mark_point(filled=True, opacity=0.9, color="var(--accent)", stroke="transparent", strokeWidth=12)
    others = tuple(key for key in (rows[0] if rows else ()) if key not in (x, y, low, high))
    marks = marks.encode(x=field_x, y=field_y, tooltip=_tooltips((x, y, low, high, *others)))
    if size:
        marks = marks.encode(size=alt.Size(f"{size}:Q", legend=None, scale=alt.Scale(range=[24, 220])))
    layers.append(marks)
    return _titled(alt, layers, title, subtitle, right=44)


def heat(
    rows: Rows,
    *,
    x: str,
    y: str,
    value: str,
    title: str,
    subtitle: str,
    x_title: str,
    y_title: str,
    x_labels: Sequence[str],
    y_labels: Sequence[str],
) -> Any:
    """A matrix of values at positions (x, y) in ten steps of cividis from the smallest to the largest value."""
    import altair as alt

    finite = [float(row[value]) for row in rows if _finite(row[value])]
    lowest, highest = (min(finite), max(finite)) if finite else (0.0, 1.0)
    step = (highest - lowest) / len(CIVIDIS) or 1.0
    placed = [{**row, "x2": row[x] + 0.5, "y2": row[y] + 0.5, "x1": row[x] - 0.5, "y1": row[y] - 0.5} for row in rows]
    borders = [float(f"{lowest + step * i:.3g}") for i in range(1, len(CIVIDIS))]
    legend = alt.Legend(orient="right", title=None, gradientLength=HEIGHT - 40, format=".2~g")
    field_x = alt.X("x1:Q", title=x_title, axis=_position_axis(x_labels), scale=alt.Scale(
        domain=[-0.5, len(x_labels) - 0.5], nice=False))  # fmt: skip
    field_y = alt.Y("y1:Q", title=y_title, axis=_position_axis(y_labels), scale=alt.Scale(
        domain=[-0.5, len(y_labels) - 0.5], nice=False))  # fmt: skip
    made = alt.Chart(alt.InlineData(values=placed)).mark_rect().encode(
        x=field_x, x2="x2:Q", y=field_y, y2="y2:Q", tooltip=_tooltips((x, y, value)),
        color=alt.Color(f"{value}:Q", legend=legend, scale=alt.Scale(
            type="threshold", domain=borders, range=list(CIVIDIS))))  # fmt: skip
    return made.properties(
        title=alt.TitleParams(title, subtitle=subtitle), height=max(HEIGHT, min(360, 22 * len(y_labels))),
        padding={"left": 5, "top": 4, "bottom": 5, "right": 8},
    )  # fmt: skip


def _titled(alt: Any, layers: Sequence[Any], title: str, subtitle: str, *, left: int = 14, right: int = 5) -> Any:
    """The layers as one chart with its title, and room for labels in fonts wider than those that were measured."""
    padding = {"left": left, "top": 4, "bottom": 5, "right": right}
    return alt.layer(*layers).properties(title=alt.TitleParams(title, subtitle=subtitle), padding=padding)


def _looks(names: Sequence[str], control: Sequence[str]) -> list[tuple[str, list[int], str]]:
    ours = iter(range(len(names)))
    return [_CONTROL if name in control else _SERIES[next(ours) % len(_SERIES)] for name in names]


def _finite(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _y_scale(values: Sequence[Any], log: bool) -> dict[str, Any]:
    finite = [float(value) for value in values if _finite(value) and (value > 0 or not log)]
    lowest, highest = (min(finite), max(finite)) if finite else (1.0, 1.0)
    if log:
        return {"type": "log", "domain": [lowest / 1.15, highest * 1.15], "nice": False}
    lowest, highest = min(lowest, 0.0), max(highest, 0.0)
    step = 10 ** math.floor(math.log10((highest - lowest) or 1.0)) / 4
    room = 1.02 if not 0.975 < highest <= 1 else 1.0  # a share that reaches 1 needs no room above it
    domain = [math.floor(lowest / step) * step, math.ceil(highest * room / step) * step or 1.0]
    return {"domain": domain, "nice": False}


def _log_ticks(lowest: float, highest: float) -> list[float]:
    """1, 2 and 5 times powers of ten inside the domain; powers of ten alone where those would be many."""
    powers = range(math.floor(math.log10(lowest)), math.ceil(math.log10(highest)) + 1)
    steps = (1,) if len(powers) > 4 else (1, 2, 5)
    ticks = [float(f"{step}e{power}") for power in powers for step in steps]
    return [tick for tick in ticks if lowest <= tick <= highest]


def _line_ends(rows: Rows, x: str, y: str, series: str, names: Sequence[str], scale: Mapping[str, Any]) -> list[dict]:
    """Where each line's name goes: its last point, moved apart vertically to at least 15 pixels from the next."""
    forward = math.log if scale.get("type") == "log" else float
    back = math.exp if scale.get("type") == "log" else float
    bottom, top = (forward(border) for border in scale["domain"])
    gap = 15 / HEIGHT * (top - bottom)
    ends = []
    for name in names:
        own = [row for row in rows if row[series] == name and _finite(row[y]) and (row[y] > 0 or forward is float)]
        if own:
            last = max(own, key=lambda row: row[x])
            ends.append({x: last[x], series: name, "label_at": forward(last[y])})
    ends.sort(key=lambda end: end["label_at"])
    for before, end in itertools.pairwise(ends):
        end["label_at"] = max(end["label_at"], before["label_at"] + gap)
    over = max(0.0, (ends[-1]["label_at"] - top) if ends else 0.0)
    for after in reversed(ends):
        after["label_at"] = min(after["label_at"], top - over if over else after["label_at"])
        over = over and (top - after["label_at"]) + gap
    return [{**end, "label_at": back(end["label_at"])} for end in ends]


def _position_axis(labels: Sequence[str] | None) -> Any:
    """An axis whose positions 0, 1, … have names; as many names are shown as fit."""
    import altair as alt

    if labels is None:
        return alt.Axis(tickMinStep=1)
    names = f"{json.dumps(list(labels))}[datum.value]"
    # Vega thins even given values to its count of ticks.
    return alt.Axis(values=list(range(len(labels))), tickCount=len(labels), labelExpr=names, grid=False)


def _tooltips(fields: Sequence[str | None], kind: str = "Q") -> list[Any]:
    import altair as alt

    titled = [(field, field.replace("_", " ")) for field in fields if field]
    if kind == "N":
        return [alt.Tooltip(f"{field}:N", title=title) for field, title in titled]
    return [alt.Tooltip(f"{field}:Q", title=title, format=".3~g") for field, title in titled]


def _reference(alt: Any, axis: str, reference: tuple[str, float] | None) -> list[Any]:
    if reference is None:
        return []
    name, value = reference
    chart = alt.Chart(alt.InlineData(values=[{"reference": value}])).encode(**{axis: "reference:Q"})
    return [
        chart.mark_rule(color="var(--ctl)", strokeDash=[6, 4]),
        chart.mark_text(text=name, color="var(--ctl)", align="left", dx=6, y=-8),
    ]
