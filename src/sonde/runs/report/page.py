"""One HTML file per run: opens offline, shows what was found, how sure it is and against what, and digs to the token.

The page holds everything it needs and its policy lets the browser refuse every request. Charts stand as static pictures
that Vega, inflated once from the page, replaces when they come near; token views are drawn from packed arrays. Equal
input gives equal bytes: nothing in the page depends on the time or the process.
"""

import base64
import gzip
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup, escape

from sonde.errors import SondeError
from sonde.files import write_json, write_text
from sonde.runs import charts, palette
from sonde.runs.blocks import Appendix, Block, Chapter, Column, Figure, Header, Prose, Table, TokenView
from sonde.runs.feature_cards import FeatureView
from sonde.runs.finding import Finding, findings_json
from sonde.runs.report import coding, feature_view, numbers, strip, token_text

BUDGET = 8_000_000
MOST_FINDINGS = 12
MOST_ROWS = 200

_HERE = Path(__file__).parent
_SCRIPTS = ("page.js", "charts.js", "token_view.js", "feature_view.js")
_WEB = re.compile(r"https?://[^\s<>\"'()]+[^\s<>\"'().,;:]")


def write_report(
    path: str | Path,
    *,
    header: Header,
    findings: Iterable[Finding],
    chapters: Iterable[Chapter],
    appendix: Appendix | None = None,
    vega: bool = True,
) -> Path:
    """Write `path` (a report.html) and findings.json beside it, each whole or not at all; return the page's path.

    `findings` come first on the page, in the given order. With `vega=False` the charts stay static pictures and the
    page is 0.4 MB smaller. Raises `ValueError` for a block, chart or finding that breaks a rule, `SondeError` when the
    page would exceed 8 MB (with its largest parts) or cannot be written.
    """
    path = Path(path)
    findings, chapters, appendix = list(findings), list(chapters), appendix or Appendix()
    page, twin = render(header=header, findings=findings, chapters=chapters, appendix=appendix, vega=vega)
    write_text(path, page)
    write_json(path.with_name("findings.json"), twin)
    return path


def render(
    *, header: Header, findings: Sequence[Finding], chapters: Sequence[Chapter], appendix: Appendix, vega: bool = True
) -> tuple[str, dict[str, Any]]:
    """The page as text and the content of its findings.json. Raises as `write_report` does."""
    _check_ids(findings, chapters)
    twin = findings_json(header.run_info(), findings, appendix.skipped)
    numbered = {chapter.id: number for number, chapter in enumerate(chapters, 1)}
    shown = [{**strip.view(f), "chapter_number": numbered.get(f["chapter"])} for f in twin["findings"]]
    parts: dict[str, int] = {}
    rendered = [_chapter(chapter, parts) for chapter in chapters]
    has_charts = any(isinstance(block, Figure) for chapter in chapters for block in chapter.blocks)
    script = "".join(
        (_HERE / name).read_text(encoding="utf-8")
        for name in ("page.js", "charts.js", "token_view.js", "feature_view.js")
    )
    context = {
        "header": header,
        "run": twin["run"],
        "findings": shown,
        "most_findings": MOST_FINDINGS,
        "by_id": {finding["id"]: finding for finding in shown},
        "tally": Counter(finding["status"] for finding in shown),
        "chapters": rendered,
        "appendix": _appendix(appendix),
        "twin": _script_json(twin),
        "vega": Markup(_vega()) if vega and has_charts else "",
        "css": Markup(_css()),
        "script": Markup(script),
        "nonce": base64.b64encode(hashlib.sha256(script.encode()).digest()[:18]).decode(),
        "light": _script_json({**palette.LIGHT, "font": charts.FONT}),
    }
    page = _environment().get_template("page.html.j2").render(context)
    size = len(page.encode())
    if size > BUDGET:
        parts = {**parts, "Vega": len(context["vega"]), "findings": len(context["twin"])}
        raise SondeError(_too_large(size, parts))
    return page, twin


def paragraphs(text: str) -> Markup:
    """Plain text as HTML paragraphs; web addresses become links."""
    return Markup("").join(
        Markup("<p>{}</p>").format(linked(part)) for part in re.split(r"\n\s*\n", text.strip()) if part.strip()
    )


def linked(text: str) -> Markup:
    """Plain text as HTML in which web addresses are links."""
    text = numbers.tied(text)
    made, at = Markup(""), 0
    for match in _WEB.finditer(text):
        made += escape(text[at : match.start()]) + Markup('<a href="{0}">{0}</a>').format(match[0])
        at = match.end()
    return made + escape(text[at:])


def _chapter(chapter: Chapter, parts: dict[str, int]) -> dict[str, Any]:
    return {
        "id": chapter.id,
        "question": chapter.question,
        "answer": linked(chapter.answer),
        "failed": chapter.failed,
        "finding_ids": [finding.id for finding in chapter.findings],
        "blocks": [_block(block, parts) for block in chapter.blocks],
        "not_shown": paragraphs(chapter.not_shown),
        "how": paragraphs(chapter.how),
    }


def _block(block: Block, parts: dict[str, int]) -> dict[str, Any]:
    if isinstance(block, Prose):
        return {"kind": "prose", "heading": block.heading, "html": paragraphs(block.text)}
    make = {Figure: _figure, Table: _table, TokenView: _token_view, FeatureView: _feature_view}[type(block)]
    made = make(block)
    parts[f"{made['kind']} {block.id}"] = sum(len(value) for value in made.values() if isinstance(value, str))
    return made


def _figure(figure: Figure) -> dict[str, Any]:
    made = charts.spec(figure.chart, figure.id)
    untitled = {key: value for key, value in made.items() if key != "title"}
    picture = charts.svg(untitled)
    width, height = (float(size) for size in re.findall(r'(?:width|height)="([\d.]+)"', picture)[:2])
    # The picture as a whole has a name; roles of its parts would be read out one by one.
    picture = re.sub(r' (?:role|aria-\w+)="[^"]*"', "", picture)
    picture = re.sub(r"^<svg [^>]*>", f'<svg class="static" viewBox="0 0 {width:g} {height:g}">', picture)
    return {
        "kind": "figure",
        "id": figure.id,
        "title": made["title"]["text"],
        "subtitle": made["title"]["subtitle"],
        "caption": figure.caption,
        "gaps": made["usermeta"]["gaps"],
        "svg": Markup(_own_ids(picture, figure.id)),
        "spec": _script_json(made),
    }


def _own_ids(picture: str, prefix: str) -> str:
    """Ids inside a picture (clips, gradients) are numbered through the process: make them the figure's own."""
    for number, given in enumerate(dict.fromkeys(re.findall(r'id="([^"]+)"', picture))):
        picture = re.sub(rf'(id="|url\(#|href="#){re.escape(given)}(?=["\)])', rf"\g<1>{prefix}-{number}", picture)
    return picture


def _table(table: Table) -> dict[str, Any]:
    columns = [column if isinstance(column, Column) else Column(name=column) for column in table.columns]
    numeric = [
        any(_is_number(row[i]) for row in table.rows)
        and all(row[i] is None or _is_number(row[i]) for row in table.rows)
        for i in range(len(columns))
    ]
    rows = [
        [_cell(value, column, is_number) for value, column, is_number in zip(row, columns, numeric, strict=True)]
        for row in table.rows[:MOST_ROWS]
    ]
    heads = [
        {"text": c.name + (f", {c.unit}" if c.unit else ""), "numeric": n}
        for c, n in zip(columns, numeric, strict=True)
    ]
    hidden = len(table.rows) > MOST_ROWS
    return {
        "kind": "table",
        "id": table.id,
        "caption": table.caption,
        "empty": table.empty,
        "heads": heads,
        "rows": rows,
        "total": len(table.rows),
        "csv": _packed_csv([head["text"] for head in heads], table.rows) if hidden else "",
    }


def _cell(value: Any, column: Column, is_number: bool) -> dict[str, Any]:
    if is_number:
        value = value.item() if isinstance(value, np.number) else value
        raw = "" if value is None or value != value else json.dumps(value)
        return {"text": numbers.number(value, column.digits), "raw": raw, "code": False, "name": ""}
    text = "" if value is None else str(value)
    if column.code:
        return {"text": token_text.label(text), "raw": text, "code": True, "name": token_text.name(text)}
    return {"text": linked(text), "raw": text, "code": False, "name": ""}


def _is_number(value: Any) -> bool:
    return (isinstance(value, int | float) and not isinstance(value, bool)) or isinstance(value, np.number)


def _packed_csv(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    import csv
    import io

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(heads)
    writer.writerows(["" if cell is None or cell != cell else cell for cell in row] for row in rows)
    return base64.b64encode(gzip.compress(text.getvalue().encode(), compresslevel=9, mtime=0)).decode()


def _token_view(view: TokenView) -> dict[str, Any]:
    header, payload = coding.encode(view)
    classes = coding.first_colours(view)
    spans = Markup("").join(_span(text, colour) for text, colour in zip(view.tokens, classes, strict=True))
    return {
        "kind": "token view",
        "id": view.id,
        "title": view.title,
        "caption": view.caption,
        "header": _script_json(header),
        "payload": payload,
        "passage": spans,
        "stats": header["stats"],
        "sites": header["sites"],
        "start": header["start"],
    }


def _feature_view(view: FeatureView) -> dict[str, Any]:
    return feature_view.parts(view, _environment())


def _span(text: str, colour: str) -> Markup:
    """A token of the passage. Lines break before its leading space, never after it, so that a token stays one box."""
    name, shown = token_text.name(text), token_text.passage_text(text)
    word = shown.lstrip(" ")
    start = Markup("\u200b") if len(word) < len(shown) else Markup("")
    label = Markup(' aria-label="{}"').format(name) if name else ""
    shown = "\u00a0" * (len(shown) - len(word)) + word
    return start + Markup('<span class="{}"{}>{}</span>').format(colour, label, shown)


def _appendix(appendix: Appendix) -> dict[str, Any]:
    return {
        "config": [(key, _plain(value)) for key, value in appendix.config.items()],
        "environment": [(key, _plain(value)) for key, value in appendix.environment.items()],
        "timings": [(step, numbers.duration(seconds)) for step, seconds in appendix.timings],
        "skipped": list(appendix.skipped),
        "files": [(name, numbers.size(n_bytes), digest) for name, n_bytes, digest in appendix.files],
    }


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _check_ids(findings: Sequence[Finding], chapters: Sequence[Chapter]) -> None:
    used = Counter(f"chapter {chapter.id}" for chapter in chapters)
    used.update(f"{type(b).__name__} {b.id}" for c in chapters for b in c.blocks if not isinstance(b, Prose))
    twice = [given for given, times in used.items() if times > 1]
    if twice:
        raise ValueError(f"two parts of the report are {twice[0]!r}: ids name what they show and occur once")
    known = {finding.id for finding in findings}
    for chapter in chapters:
        for finding in chapter.findings:
            if finding.id not in known:
                raise ValueError(f"finding {finding.id!r} of chapter {chapter.id!r} is not among the report's findings")


def _too_large(size: int, parts: dict[str, int]) -> str:
    largest = sorted(parts.items(), key=lambda part: -part[1])[:5]
    listed = ", ".join(f"{name} {numbers.size(length)}" for name, length in largest)
    return (
        f"the report would be {numbers.size(size)}, more than {numbers.size(BUDGET)}. Largest parts: {listed}. "
        "Show fewer tokens or layers in token views, thin charts before drawing them, or write it with vega=False"
    )


def _script_json(value: Any) -> Markup:
    """JSON for a script block: no character that could end the block."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)


@lru_cache(maxsize=1)
def _vega() -> str:
    """Vega, Vega-Lite, the embedder and the expression interpreter as one compressed script."""
    import vl_convert

    bundle = vl_convert.javascript_bundle("window.vegaEmbed=vegaEmbed;")
    # In a function of its own: the bundle's top-level constants would collide with the page's.
    return base64.b64encode(gzip.compress(f"(()=>{{{bundle}}})()".encode(), compresslevel=9, mtime=0)).decode()


def _css() -> str:
    themes = {f"/*{theme}*/": palette.variables(theme) for theme in ("light", "dark")}
    text = (_HERE / "style.css").read_text(encoding="utf-8")
    for mark, declarations in themes.items():
        text = text.replace(mark, declarations)
    return text


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True,
    )  # fmt: skip
    made.filters.update(
        number=numbers.number,
        trimmed=numbers.trimmed,
        count=numbers.count,
        tied=numbers.tied,
        duration=numbers.duration,
        date=numbers.date,
        linked=linked,
    )
    return made
