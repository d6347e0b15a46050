"""The index of latents and their cards as HTML, made here once, so that every token is escaped by one piece of code.

The card that is open at first stands in the page; the others and all rows of the index go into it compressed, and a
script only chooses among them. Of latents about which nothing but their row is known the script makes the card.
Strength shows as the background of a token, as the thickness of the line under it and as a number in its title.
"""

import base64
import gzip
import json
import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from sonde.runs.feature_cards import Feature, FeatureScore, FeatureView, FeatureWindow
from sonde.runs.report import coding, numbers, token_text

FIRST_ROWS = 25
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 320, 128, 38, 22, 8


def parts(view: FeatureView, environment: Any) -> dict[str, Any]:
    """What the page's template shows of a view."""
    template = environment.get_template("feature.html.j2").module
    tests = view.tests
    known = {feature.number for feature in view.features}
    opened = view.opened.number
    told = [f for f in view.features if f.number == opened or f.windows or f.explanation]
    cards = {str(f.number): str(template.card(_card(f), view.id, known)) for f in told}
    ordered = sorted(view.features, key=lambda f: (not (f.windows and f.explanation), not f.windows, not f.explanation))
    rows = [_row(feature, tests) for feature in ordered]
    packed = {"tests": tests, "rows": rows, "cards": cards}
    return {
        "kind": "feature view",
        "id": view.id,
        "title": view.title,
        "caption": view.caption,
        "command": view.command,
        "tests": tests,
        "statuses": list(dict.fromkeys(feature.status for feature in view.features)),
        "total": len(view.features),
        "rows": rows[:FIRST_ROWS],
        "start": opened,
        "card": Markup(cards[str(opened)]),
        "payload": _compressed(packed),
    }


def _compressed(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode(), compresslevel=9, mtime=0)).decode()


def _row(feature: Feature, tests: Sequence[str]) -> dict[str, Any]:
    """A row of the index: what is shown, what it is sorted by, what is searched."""
    scores = {score.test: score.estimate for score in feature.scores if score.main}
    token = feature.strongest_token
    found = " ".join([str(feature.number), feature.explanation, token, *(text for text, _ in feature.promoted)])
    return {
        "n": feature.number,
        "status": feature.status,
        "says": feature.explanation or feature.reason,
        "explained": bool(feature.explanation),
        "rate": feature.rate,
        "rate_text": _per_cent(feature.rate),
        "largest": feature.largest,
        "largest_text": numbers.number(feature.largest),
        "token": token_text.label(token) if token else "",
        "scores": [scores.get(test) for test in tests],
        "score_texts": [_two(scores.get(test)) for test in tests],
        "find": found.lower(),
    }


def _card(feature: Feature) -> dict[str, Any]:
    top = feature.largest or 0.0
    facts = [
        ("Fires at", f"{_per_cent(feature.rate)} of tokens ({feature.fires:,} of {feature.tokens:,})"),
        *([("Largest activation", numbers.number(feature.largest))] if feature.largest is not None else []),
        *feature.facts,
    ]
    return {
        "number": feature.number,
        "status": feature.status,
        "reason": feature.reason,
        "explanation": feature.explanation,
        "facts": facts,
        "windows": [_window(window, top) for window in feature.windows],
        "histogram": histogram(feature.strengths, top) if any(feature.strengths) else "",
        "scores": [_score(score) for score in feature.scores if score.main],
        "others": [_score(score) for score in feature.scores if not score.main],
        "moved": [
            (title, [(token_text.label(text), token_text.name(text), _signed(value)) for text, value in given])
            for title, given in (("Promoted tokens", feature.promoted), ("Suppressed tokens", feature.suppressed))
            if given
        ],
        "near": [(kind, [(n, _two(value)) for n, value in given]) for kind, given in feature.near.items()],
    }


def _window(window: FeatureWindow, top: float) -> dict[str, Any]:
    pieces = [_token(text, a, top) for text, a in zip(window.tokens, window.activations, strict=True)]
    return {
        "html": Markup("").join(pieces),
        "largest": numbers.number(max(window.activations)),
        "quantile": window.quantile,
    }


def _token(text: str, activation: float, top: float) -> Markup:
    """A token of a window: bare where the latent is silent."""
    shown = token_text.passage_text(text).replace("\n", "")
    if activation <= 0:
        return Markup("{}").format(shown)
    word = shown.lstrip(" ")
    lead = Markup("\u200b") if len(word) < len(shown) else Markup("")
    colour = coding.colour_class(activation, top, "sequential")
    return lead + Markup('<b class="{0}" title="{1}" data-a="{1}">{2}</b>').format(
        "s1" if colour == "s0" else colour,
        numbers.number(activation),
        "\u00a0" * (len(shown) - len(word)) + word,
    )


def _score(score: FeatureScore) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "test": score.test,
        "measure": score.measure,
        "value": _two(score.estimate),
        "range": "",
        "n": score.n,
        "chance": _two(score.chance),
        "reason": score.reason,
        "line": "",
    }
    if score.estimate is None:
        return shown
    low, high = score.low, score.high
    ends = [0.0, 1.0, score.estimate, *(v for v in (low, high, score.chance) if v is not None)]
    least, most = min(ends), max(ends)

    def place(value: float) -> str:
        return f"{3 + 114 * (value - least) / (most - least):.1f}"

    drawn = [Markup('<line class="ax" x1="3" x2="117" y1="8" y2="8"/>')]
    if score.chance is not None:
        drawn.append(Markup('<line class="ch" x1="{0}" x2="{0}" y1="1" y2="15"/>').format(place(score.chance)))
    if low is not None and high is not None:
        width = f"{max(1.0, float(place(high)) - float(place(low))):.1f}"
        drawn.append(Markup('<rect class="iv" x="{}" y="5" width="{}" height="6"/>').format(place(low), width))
        shown["range"] = f"{_two(low)} to {_two(high)}"
    drawn.append(Markup('<circle cx="{}" cy="8" r="3.5"/>').format(place(score.estimate)))
    shown["line"] = Markup('<svg viewBox="0 0 120 16" aria-hidden="true">{}</svg>').format(Markup("").join(drawn))
    return shown


def histogram(counts: Sequence[int], top: float) -> Markup:
    """Numbers of activations by strength, on a logarithmic axis, as a picture with a sentence for who cannot see it."""
    tallest = max(1.0, math.log10(max(counts)) + 0.15)
    wide = (_WIDTH - _LEFT - 6) / len(counts)
    floor, high = _HEIGHT - _BOTTOM, _HEIGHT - _BOTTOM - _TOP

    def y(count: float) -> float:  # the axis begins at 0.7, so that a count of one can be seen
        return floor - high * (math.log10(count) + 0.15) / (tallest + 0.15)

    drawn: list[Markup] = []
    for power in range(math.floor(tallest) + 1):
        at = f"{y(10**power):.1f}"
        drawn.append(
            Markup('<line class="grid" x1="{0}" x2="{1}" y1="{2}" y2="{2}"/>').format(_LEFT, _WIDTH - 6, at)
            + Markup('<text x="{}" y="{}" dy="3.5" text-anchor="end">{}</text>').format(_LEFT - 5, at, _power(power))
        )
    for i, count in enumerate(counts):
        if count:
            at = y(count)
            drawn.append(
                Markup('<rect x="{}" y="{}" width="{}" height="{}"><title>{}</title></rect>').format(
                    f"{_LEFT + i * wide + 0.5:.1f}", f"{at:.1f}", f"{wide - 1:.1f}", f"{floor - at:.1f}",
                    f"{count:,} from {numbers.number(i * top / len(counts))} to "
                    f"{numbers.number((i + 1) * top / len(counts))}",
                )
            )  # fmt: skip
    ticks = ((_LEFT, "0", "start"), ((_LEFT + _WIDTH - 6) / 2, numbers.number(top / 2), "middle"))
    for x, text, anchor in (*ticks, (_WIDTH - 6, numbers.number(top), "end")):
        drawn.append(
            Markup('<text x="{}" y="{}" text-anchor="{}">{}</text>').format(f"{x:.1f}", _HEIGHT - 6, anchor, text)
        )
    said = f"Histogram of {sum(counts):,} activations from 0 to {numbers.number(top)}, log scale"
    return Markup('<svg class="hist" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        _WIDTH, _HEIGHT, said, Markup("").join(drawn)
    )


def _power(power: int) -> str:
    return f"{10**power // 1000:,}k" if power >= 3 else str(10**power)


def _per_cent(share: float) -> str:
    return "0 %" if not share else f"{numbers.number(100 * share, 2)} %"


def _two(value: float | None) -> str:
    return "–" if value is None else numbers.rounded(value, 2)


def _signed(value: float) -> str:
    return ("+" if value > 0 else "") + numbers.rounded(value, 2)
