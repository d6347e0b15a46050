"""Charts of one house style: drawn by Altair, checked, and rendered to pictures that fit both themes.

The title states the result, the subtitle the quantity, its unit and direction; the control is grey and dashed and
named where its line ends; intervals are bands or bars; zero is in view. Colours are CSS variables
(`sonde.runs.palette`), so that one Vega-Lite spec and one static SVG serve light and dark. A chart has at most 2,000
points: thin or bin before drawing.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from sonde.runs.chart_kinds import HEIGHT, bars, heat, intervals, lines, points
from sonde.runs.palette import fixed

__all__ = ["bars", "check", "heat", "intervals", "lines", "png", "points", "spec", "svg", "theme"]

WIDTH = 736
MOST_POINTS = 2000
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif"
VEGA_LITE = "6.4"

_CONTROL_CHARACTER = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")
_AUTOMATIC_NAME = re.compile(r"\b(view|param|selector)_\d+\b")


def theme() -> dict[str, Any]:
    """The Vega-Lite config of every chart."""
    return {
        "font": FONT,
        "background": None,
        "view": {"stroke": None},
        "axis": {
            "labelColor": "var(--muted)",
            "labelFontSize": 12,
            "titleColor": "var(--muted)",
            "titleFontSize": 12,
            "titleFontWeight": "normal",
            "titlePadding": 8,
            "labelPadding": 6,
            "gridColor": "var(--rule)",
            "gridOpacity": 0.7,
            "domainColor": "var(--rule)",
            "tickColor": "var(--rule)",
            "ticks": False,
            "labelOverlap": "greedy",
        },
        "axisX": {
            "grid": False,
            "tickCount": 8,
            "labelFlush": False,
            "labelSeparation": 8,
            "domainColor": "var(--ctl)",
        },
        "axisY": {
            "tickCount": 5,
            "domain": False,
            "titleAngle": 0,
            "titleAlign": "left",
            "titleAnchor": "start",
            "titleX": 0,
            "titleY": -11,
            "titleBaseline": "bottom",
        },
        "legend": {"labelColor": "var(--muted)", "titleColor": "var(--muted)", "titleFontWeight": "normal"},
        "title": {
            "anchor": "start",
            "frame": "group",
            "color": "var(--ink)",
            "fontSize": 15,
            "fontWeight": 600,
            "subtitleColor": "var(--muted)",
            "subtitleFontSize": 12.5,
            "subtitlePadding": 5,
            "offset": 10,
        },
        "line": {"strokeWidth": 2, "strokeCap": "round"},
        "rule": {"strokeWidth": 1.5},
        "text": {"fontSize": 12, "color": "var(--ink)"},
    }


def spec(chart: Any, name: str = "chart") -> dict[str, Any]:
    """The complete, checked Vega-Lite spec of an Altair chart or Vega-Lite dict, the same for equal charts.

    Values that are not finite become gaps; their number is kept in `usermeta.gaps`. Raises as `check` does.
    """
    given = chart if isinstance(chart, Mapping) else chart.to_dict(validate=False)
    made, gaps = _without_nan(dict(given))
    made = _renamed(made)
    made["config"] = {**theme(), **{k: v for k, v in made.get("config", {}).items() if k not in ("view", *theme())}}
    made["width"] = "container"
    made.setdefault("height", HEIGHT)
    if "view" in made.get("config", {}):
        made["config"]["view"] = {"stroke": None}
    made["autosize"] = {"type": "fit-x", "contains": "padding"}
    made["usermeta"] = {"gaps": gaps}
    check(made, name)
    return made


def check(chart: Any, name: str = "chart") -> None:
    """Raise ValueError that names the chart if it breaks a rule of the house.

    It needs a title with a subtitle, a title on every axis, at most 2,000 points, and to be one picture (layers may be
    used, rows and columns of charts may not).
    """
    given = chart if isinstance(chart, Mapping) else chart.to_dict(validate=False)
    title = given.get("title")
    if not isinstance(title, Mapping) or not str(title.get("text", "")).strip():
        raise ValueError(f"chart {name!r} has no title: state the result in one")
    if not str(title.get("subtitle", "")).strip():
        raise ValueError(f"chart {name!r} has no subtitle: name the quantity, its unit and which direction is better")
    for kind in ("hconcat", "vconcat", "concat", "facet", "repeat"):
        if kind in given:
            raise ValueError(f"chart {name!r} uses {kind}: draw one picture per figure")
    untitled = {"x", "y"}
    for layer in _layers(given):
        for axis, channel in layer.get("encoding", {}).items():
            if axis in untitled and isinstance(channel, Mapping) and _axis_title(channel):
                untitled.discard(axis)
    if untitled:
        raise ValueError(f"chart {name!r} has no title on its {' and '.join(sorted(untitled))} axis")
    points = max((len(values) for values in _datasets(given)), default=0)
    if points > MOST_POINTS:
        raise ValueError(f"chart {name!r} has {points:,} points, more than {MOST_POINTS:,}: thin or bin them first")


def svg(made: Mapping[str, Any], *, width: int = WIDTH) -> str:
    """The static picture of a `spec`, with colours as CSS variables, `width` pixels wide."""
    return _svg(json.dumps({**made, "width": width}))


def png(made: Mapping[str, Any], *, width: int = WIDTH, scale: float = 2.0) -> bytes:
    """The picture of a `spec` as PNG on the light theme's paper."""
    import vl_convert

    on_paper = {**made, "width": width, "padding": 12, "background": "var(--paper)"}
    return vl_convert.vegalite_to_png(
        json.loads(fixed(json.dumps(on_paper))), vl_version=VEGA_LITE, scale=scale, allowed_base_urls=[]
    )


@lru_cache(maxsize=256)
def _svg(source: str) -> str:
    import vl_convert

    return vl_convert.vegalite_to_svg(json.loads(source), vl_version=VEGA_LITE, allowed_base_urls=[])


def _layers(given: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    inner = [found for layer in given.get("layer", ()) for found in _layers(layer)]
    return [given, *inner]


def _axis_title(channel: Mapping[str, Any]) -> bool:
    axis = channel.get("axis")
    return bool(channel.get("title") or (isinstance(axis, Mapping) and axis.get("title")))


def _datasets(given: Mapping[str, Any]) -> list[Sequence[Any]]:
    named = list(given.get("datasets", {}).values())
    inline = [layer["data"].get("values", ()) for layer in _layers(given) if isinstance(layer.get("data"), Mapping)]
    return [values for values in [*named, *inline] if isinstance(values, Sequence)]


def _without_nan(node: Any) -> tuple[Any, int]:
    """`node` with None for every number that is not finite, and how many there were; control characters spelled out."""
    if isinstance(node, Mapping):
        pairs = {key: _without_nan(value) for key, value in node.items()}
        return {key: value for key, (value, _) in pairs.items()}, sum(count for _, count in pairs.values())
    if isinstance(node, list | tuple):
        items = [_without_nan(value) for value in node]
        return [value for value, _ in items], sum(count for _, count in items)
    if hasattr(node, "item") and not isinstance(node, str):  # numpy scalars
        node = node.item()
    if isinstance(node, float) and not math.isfinite(node):
        return None, 1
    if isinstance(node, str):
        # Control characters are not XML: the renderer would abort the whole process.
        return _CONTROL_CHARACTER.sub(lambda found: f"\\x{ord(found[0]):02x}", node), 0
    return node, 0


def _renamed(made: dict[str, Any]) -> dict[str, Any]:
    """Altair numbers its names through the process; numbered by first use they are the same for equal charts."""
    order: dict[str, str] = {}
    text = _AUTOMATIC_NAME.sub(lambda m: order.setdefault(m[0], f"{m[1]}_{len(order) + 1}"), json.dumps(made))
    return json.loads(text)
