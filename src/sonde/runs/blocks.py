"""What a report is made of: a header, chapters, and in them figures, tables, token views and prose.

Blocks are values without HTML. They check themselves when they are made, so that a report never starts with content it
cannot show: every chart has a title, every array its shape. The page that shows them is `sonde.runs.report`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from sonde.runs.feature_cards import FeatureView
from sonde.runs.finding import Finding

_ID = re.compile(r"[a-z0-9][a-z0-9._-]*")


@dataclass(frozen=True, kw_only=True)
class Header:
    """What was run on what. `title` is the question or the name of the audit; `created` an ISO date or time.

    `status` is the exit state of the run: "finished", "failed" or "interrupted". `hash` values are hex SHA-256.
    """

    id: str
    title: str
    study: str
    model: str
    command: str
    created: str
    model_hash: str = ""
    params: int | None = None
    text: str = ""
    tokens: int | None = None
    text_hash: str = ""
    seed: int = 0
    sonde: str = ""
    seconds: float | None = None
    status: str = "finished"
    config_sha256: str = ""

    def run_info(self) -> dict[str, Any]:
        """The `run` part of findings.json."""
        return {
            "id": self.id,
            "study": self.study,
            "status": self.status,
            "model": {"id": self.model, "hash": self.model_hash, "params": self.params},
            "data": {"source": self.text, "tokens": self.tokens, "hash": self.text_hash},
            "seed": self.seed,
            "sonde": self.sonde,
            "created": self.created,
            "seconds": self.seconds,
            "command": self.command,
            "config_sha256": self.config_sha256,
        }


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A chart: an Altair chart (or its Vega-Lite dict) that `sonde.runs.charts.check` accepts.

    `caption` says in one sentence what the chart shows to somebody who cannot see it; it is printed below the chart.
    """

    id: str
    chart: Any
    caption: str

    def __post_init__(self) -> None:
        _check_id("figure", self.id)
        if not self.caption.strip():
            raise ValueError(f"figure {self.id!r} has no caption: say in one sentence what the chart shows")


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of a table. `code` sets its cells as tokens, with white space visible; `digits` are significant ones."""

    name: str
    unit: str = ""
    digits: int = 3
    code: bool = False


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of strings, numbers and None (a gap). The page shows the first 200; all rows are in its CSV.

    `columns` are names or `Column`s. Without rows the page says `empty` instead.
    """

    id: str
    caption: str
    columns: Sequence[str | Column]
    rows: Sequence[Sequence[Any]]
    empty: str = "There are no rows to show."

    def __post_init__(self) -> None:
        _check_id("table", self.id)
        if not self.columns or not self.caption.strip():
            raise ValueError(f"table {self.id!r} needs columns and a caption")
        for number, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(
                    f"table {self.id!r}: row {number} has {len(row)} cells, but there are {len(self.columns)} columns"
                )


@dataclass(frozen=True, kw_only=True)
class Statistic:
    """A number per token, or per layer and token, that can colour the passage.

    `values` has shape [L, T] or [T]; NaN is shown as a gap. Colours run from 0 (diverging: from -`max`) to `max`, by
    default the 99th percentile of the absolute values; larger values take the last colour and keep their number.
    """

    name: str
    unit: str
    values: np.ndarray
    scale: Literal["sequential", "diverging"] = "sequential"
    max: float | None = None


@dataclass(frozen=True, kw_only=True)
class TokenView:
    """A passage coloured by a statistic, with the top predictions of every layer for each token.

    Everything at position t concerns token t: `top`, `top_log2p` and `rank` are about the prediction *of* token t, made
    from the tokens before it, so that the first token of a passage has none (write -1 in `top`, NaN in the others).

    tokens: the text of each token [T].
    sites: the names of the layers, shallowest first [L]; one name where there are no layers.
    statistics: at least one.
    top: ids [L, T, K] of the most likely tokens, most likely first; `vocabulary` gives the text of every id in it.
    top_log2p: log2 of their probabilities [L, T, K].
    rank: rank of the true token, 1 = most likely [L, T]; 0 where there is none.
    target_ids: the id of each token [T], by which the true token is marked among the predictions.
    start: the token and layer that are selected at first (-1 = last layer).
    """

    id: str
    title: str
    caption: str
    tokens: Sequence[str]
    sites: Sequence[str]
    statistics: Sequence[Statistic]
    top: np.ndarray | None = None
    top_log2p: np.ndarray | None = None
    vocabulary: Mapping[int, str] = field(default_factory=dict)
    rank: np.ndarray | None = None
    target_ids: Sequence[int] | None = None
    start: tuple[int, int] = (0, -1)

    def __post_init__(self) -> None:
        _check_id("token view", self.id)
        n_tokens, n_layers = len(self.tokens), len(self.sites)
        if not n_tokens or not n_layers or not self.statistics:
            raise ValueError(f"token view {self.id!r} needs tokens, sites and at least one statistic")
        for statistic in self.statistics:
            if np.shape(statistic.values) not in ((n_layers, n_tokens), (n_tokens,)):
                raise ValueError(
                    f"token view {self.id!r}: statistic {statistic.name!r} has shape {np.shape(statistic.values)}, "
                    f"expected {(n_layers, n_tokens)} or {(n_tokens,)}"
                )
        if (self.top is None) != (self.top_log2p is None):
            raise ValueError(f"token view {self.id!r}: top and top_log2p belong together, give both or none")
        if self.top is not None and self.top_log2p is not None:
            shape, other = np.shape(self.top), np.shape(self.top_log2p)
            if shape[:2] != (n_layers, n_tokens) or other != shape or len(shape) != 3:
                raise ValueError(
                    f"token view {self.id!r}: top has shape {shape} and top_log2p {other}, "
                    f"expected both ({n_layers}, {n_tokens}, K)"
                )
            unknown = set(np.unique(self.top).tolist()) - {-1} - set(self.vocabulary)
            if unknown:
                raise ValueError(f"token view {self.id!r}: vocabulary lacks the id {min(unknown)} that occurs in top")
        if self.rank is not None and np.shape(self.rank) != (n_layers, n_tokens):
            raise ValueError(
                f"token view {self.id!r}: rank has shape {np.shape(self.rank)}, expected {(n_layers, n_tokens)}"
            )
        if self.target_ids is not None and len(self.target_ids) != n_tokens:
            raise ValueError(f"token view {self.id!r}: {len(self.target_ids)} target ids for {n_tokens} tokens")


@dataclass(frozen=True, kw_only=True)
class Prose:
    """Paragraphs of plain text, separated by an empty line. Web addresses become links; nothing else is marked up."""

    text: str
    heading: str = ""


Block = Figure | Table | TokenView | FeatureView | Prose


@dataclass(frozen=True, kw_only=True)
class Chapter:
    """One method's part of a report: question, answer in a sentence, evidence, what it does not show, how it was done.

    `failed` is the reason why a chapter has nothing else to say. Without evidence or that reason it is refused.
    """

    id: str
    question: str
    answer: str = ""
    findings: Sequence[Finding] = ()
    blocks: Sequence[Block] = ()
    not_shown: str = ""
    how: str = ""
    failed: str = ""

    def __post_init__(self) -> None:
        _check_id("chapter", self.id)
        if self.failed:
            return
        if not self.blocks and not self.findings:
            raise ValueError(f"chapter {self.id!r} is empty: give it blocks or findings, or `failed` with the reason")
        for name in ("question", "answer", "not_shown", "how"):
            if not getattr(self, name).strip():
                raise ValueError(f"chapter {self.id!r} has no {name!r}: every chapter says it in a sentence")


@dataclass(frozen=True, kw_only=True)
class Appendix:
    """What stands at the end: settings, machine, time by step, skipped steps with reasons, files of the run.

    `timings` are (step, seconds), `skipped` (step, reason), `files` (path, bytes, SHA-256 in hex).
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    timings: Iterable[tuple[str, float]] = ()
    skipped: Iterable[tuple[str, str]] = ()
    files: Iterable[tuple[str, int, str]] = ()


def _check_id(kind: str, given: str) -> None:
    if not _ID.fullmatch(given):
        raise ValueError(f"{kind} id {given!r}: use lower-case letters, digits, '.', '-' and '_', made from names")
