"""A finding as it stands on the page: its numbers in words, and the number line that holds estimate against control.

Both are composed from the fields of findings.json, so that page and file cannot disagree. The line includes zero.
"""

from typing import Any

from sonde.runs.report.numbers import decimals, number, rounded, trimmed

MARKS = {"found": "●", "not found": "○", "unclear": "◐", "refused": "✕"}
_METHODS = {"bootstrap": "bootstrap", "wilson": "Wilson", "exact": "exact", "bayes": "Bayesian"}
_DIRECTIONS = {"lower": "lower is better", "higher": "higher is better", "none": ""}


def view(finding: dict[str, Any]) -> dict[str, Any]:
    """What the page shows of a finding given as in findings.json."""
    shown = {**finding, "mark": MARKS[finding["status"]], "line": None}
    if finding["estimate"] is None:
        return shown
    low, high = finding["interval"]
    control = finding["control"]
    places = decimals(finding["estimate"], low, high)
    unit = f" {finding['unit']}" if finding["unit"] else ""
    shown |= {
        "value": rounded(finding["estimate"], places) + unit,
        "range": f"{rounded(low, places)} to {rounded(high, places)}",
        "level": f"{100 * finding['level']:g}\u00a0%",
        "method": _METHODS[finding["interval_method"]],
        "count": number(finding["n"]),
        "direction": _DIRECTIONS[finding["better"]],
        "held_against": None,
        "paper_value": trimmed(finding["paper"]["value"]) if finding["paper"] else "",
    }
    if control is not None:
        c_low, c_high = control["interval"] or (control["estimate"], control["estimate"])
        c_places = decimals(control["estimate"], c_low, c_high) if control["interval"] else places
        shown["held_against"] = {
            "name": control["name"],
            "value": rounded(control["estimate"], c_places),
            "range": f"{rounded(c_low, c_places)} to {rounded(c_high, c_places)}" if control["interval"] else "",
        }
    return shown | {"line": _line(finding)}


def _line(finding: dict[str, Any]) -> dict[str, Any]:
    """Places on the number line, in per cent of its width; labels turn inwards near either end."""
    control = finding["control"]
    around = [0.0, finding["estimate"], *finding["interval"]]
    if control is not None:
        around += [control["estimate"], *(control["interval"] or ())]
    lowest, highest = min(around), max(around)
    span = (highest - lowest) or 1.0

    def place(value: float) -> float:
        return round(2 + 96 * (value - lowest) / span, 2)

    low, high = (place(end) for end in finding["interval"])
    line: dict[str, Any] = {
        "estimate": place(finding["estimate"]),
        "estimate_side": _side(place(finding["estimate"])),
        "low": low,
        "width": round(max(high - low, 0.2), 2),
        "zero": place(0.0),
        "control": None,
    }
    if control is not None:
        at = place(control["estimate"])
        line |= {"control": at, "control_side": _side(at), "control_low": at, "control_width": 0.0}
        line["zero_label"] = abs(at - line["zero"]) > 30
        if control["interval"]:
            c_low, c_high = (place(end) for end in control["interval"])
            line |= {"control_low": c_low, "control_width": round(c_high - c_low, 2)}
    else:
        line["zero_label"] = True
    return line


def _side(place: float) -> str:
    return "start" if place < 25 else "end" if place > 75 else "middle"
