"""The colours of pages and charts, each measured against its background in both themes.

Every colour is a CSS variable, so that one chart and one page serve light and dark. The sequential and diverging scales
lie behind text and keep at least 5.7 : 1 against the ink; where there is no text, cividis (Nunez et al. 2018) runs over
its full range. Steps of the scales stay apart under simulated colour blindness (Machado et al. 2009).
"""

import re

LIGHT = {
    "paper": "#fbfaf8",
    "card": "#ffffff",
    "ink": "#13161b",
    "muted": "#585b61",
    "rule": "#dcdad5",
    "wash": "#f1efeb",
    "accent": "#00579a",
    "second": "#a34700",
    "focus": "#b23a00",
    "ctl": "#6f7175",
}
DARK = {
    "paper": "#14161a",
    "card": "#1b1e23",
    "ink": "#e9ebef",
    "muted": "#a1a5ab",
    "rule": "#34383f",
    "wash": "#24282e",
    "accent": "#85bcf5",
    "second": "#f0a565",
    "focus": "#ffb37a",
    "ctl": "#8f9297",
}
SEQUENTIAL = {
    "light": ("#fbfaf6", "#f4eacf", "#eed8ad", "#eac58e", "#e5b170", "#e19d53", "#dd8736"),
    "dark": ("#1c1b16", "#292418", "#382d19", "#49361a", "#5c3e1b", "#6f461e", "#844c23"),
}
DIVERGING = {
    "light": ("#61a3e5", "#88b9ec", "#aecff3", "#d3e5f8", "#fcf9f7", "#f4decd", "#eac3a4", "#e0a779", "#d48b4c"),
    "dark": ("#2f5e8c", "#2a4c6e", "#253b52", "#1f2b37", "#1d1a18", "#34261d", "#4d3220", "#673f22", "#814c23"),
}
CIVIDIS = (
    "#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838",
)  # fmt: skip

_VARIABLE = re.compile(r"var\(--([a-z0-9-]+)\)")


def variables(theme: str) -> str:
    """The CSS declarations of one theme ("light" or "dark")."""
    return ";".join(f"--{role}:{colour}" for role, colour in _roles(theme).items())


def fixed(text: str) -> str:
    """`text` with every colour variable replaced by its light value, for pictures that stand outside a page."""
    roles = _roles("light")
    return _VARIABLE.sub(lambda match: roles[match[1]], text)


def _roles(theme: str) -> dict[str, str]:
    return {
        **(LIGHT if theme == "light" else DARK),
        **{f"s{i}": colour for i, colour in enumerate(SEQUENTIAL[theme])},
        **{f"d{i}": colour for i, colour in enumerate(DIVERGING[theme])},
    }
