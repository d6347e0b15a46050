"""The card of an organism: what is true of it, what it read, how well it predicts, how to make it again.

A card is `card.json` in the organism's folder, written by its recipe. `render` makes the text of `sonde organism info`.
"""

import hashlib
import json
import textwrap
from pathlib import Path
from typing import Any

from sonde.errors import SondeError
from sonde.files import write_json
from sonde.organisms.registry import DIFFERENCE, folder_of

_WIDTH = 100


def sha256(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_card(folder: Path, card: dict[str, Any]) -> None:
    """Write `card` into an organism's folder, with the hashes of its weights and tokenizer."""
    files = ("model.safetensors", DIFFERENCE, "history.safetensors", "dictionary.safetensors", "tokenizer.json")
    hashes = {name: sha256(folder / name) for name in files if (folder / name).is_file()}
    write_json(folder / "card.json", {**card, "sha256": hashes})


def read_card(organism: str | Path) -> dict[str, Any]:
    """The card of a bundled organism, by name, or of a folder that a recipe wrote.

    Raises `SondeError` when there is no such organism or its folder has no card.
    """
    folder = Path(organism) if Path(organism).is_dir() else folder_of(str(organism))
    try:
        return json.loads((folder / "card.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SondeError(f"{folder} has no readable card.json: it is not an organism's folder") from error


def render(card: dict[str, Any]) -> str:
    """The card as text, at most 100 characters wide."""
    lines = [f"organism:{card['name']}", *_wrapped(card["summary"]), ""]
    lines += _section("What is true of it", [line for fact in card["truth"] for line in _wrapped(fact, bullet="- ")])
    for title in ("architecture", "data", "training"):
        lines += _section(title.capitalize(), _pairs(card[title]))
    if "behaviour" in card:
        lines += _section("What it does on what it has not read (95 % interval)", _rates(card["behaviour"]))
    if "evaluation" in card:
        lines += _section("Bits per byte on text it has not read (95 % interval)", _scores(card["evaluation"]))
    samples = [
        line
        for sample in card["samples"]
        for line in _wrapped(" ".join(f"[{sample['prompt']}]{sample['text']}".split()), bullet="> ")
    ]
    settings = card["sampling"]
    lines += _section(f"Samples at temperature {settings['temperature']}, seed {settings['seed']}", samples)
    lines += _section("Make it again", _wrapped(card["command"]))
    lines += _section("SHA-256", _pairs(card["sha256"]))
    return "\n".join(lines).rstrip()


def _section(title: str, body: list[str]) -> list[str]:
    return [title, *(f"  {line}" for line in body), ""]


def _wrapped(text: str, *, bullet: str = "") -> list[str]:
    return textwrap.wrap(text, _WIDTH - 2, initial_indent=bullet, subsequent_indent=" " * len(bullet))


def _pairs(values: dict[str, Any]) -> list[str]:
    wide = max(map(len, values)) + 2
    lines = []
    for key, value in values.items():
        text = (
            ", ".join(map(str, value)) if isinstance(value, list) else f"{value:,}" if isinstance(value, int) else value
        )
        first, *rest = textwrap.wrap(str(text), _WIDTH - 2 - wide, break_on_hyphens=False) or [""]
        lines += [f"{key.replace('_', ' '):{wide}}{first}", *(" " * wide + line for line in rest)]
    return lines


def _scores(rows: list[dict[str, Any]]) -> list[str]:
    columns = {"model": "model", "ngram": "5-gram", "gain": "5-gram minus model"}
    if all("pebble" in row for row in rows):
        columns = {"model": "model", "pebble": "pebble", "ngram": "5-gram"}
    table = [("text", "bytes", *columns.values())]
    table += [(row["text"], f"{row['bytes']:,}", *(_interval(row[key]) for key in columns)) for row in rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]


def _rates(rows: list[dict[str, Any]]) -> list[str]:
    """Shares by what they are of: each row has `what` and `rate`, an interval as a dict."""
    wide = max(len(row["what"]) for row in rows)
    return [f"{row['what']:{wide}}  {_interval(row['rate'])}  n = {row['rate']['n']:,}" for row in rows]


def _interval(value: dict[str, float]) -> str:
    return f"{value['estimate']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
