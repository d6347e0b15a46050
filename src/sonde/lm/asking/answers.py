"""Answers that were paid for, one SQLite file: written one by one, found again by what was asked.

The key of an answer is the hash of model, messages, parameters and seed, so that a rerun costs nothing and a killed run
goes on with the question at which it stopped. Journal in write-ahead mode: a killed process loses no answer that was
written. Failed calls that a server may have charged for are kept too, because a budget has to count them.
"""

import sqlite3
from pathlib import Path

from sonde.errors import SondeError
from sonde.lm.asking.completion import Completion, Usage

_TABLES = """
create table if not exists answers (
    key text primary key, model text not null, answer text not null,
    prompt integer not null, cached integer not null, completion integer not null, cost real
) without rowid;
create table if not exists lost (
    number integer primary key, model text not null, prompt integer not null, cost real, reason text not null
);
create table if not exists results (key text primary key, value text not null) without rowid;
"""


class Answers:
    """Answers in the file `path`, which is made where there is none; None keeps them in memory.

    Raises `SondeError` where the file is no such database or cannot be written.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self._path = ":memory:" if path is None else str(path)
        try:
            if path is not None:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
            # Autocommit: every statement is a transaction of its own, whole in the file before the next call is made.
            self._file = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
            self._file.execute("pragma journal_mode = wal")
            self._file.execute("pragma synchronous = normal")
            self._file.executescript(_TABLES)
        except (OSError, sqlite3.Error) as error:
            raise SondeError(f"{self._path} cannot keep answers: {error}") from error

    def get(self, key: str) -> Completion | None:
        """The answer kept under `key`."""
        row = self._file.execute("select answer from answers where key = ?", (key,)).fetchone()
        return None if row is None else Completion.from_json(row[0])

    def put(self, key: str, model: str, answer: Completion, cost: float | None) -> None:
        """Keep an answer. Raises `SondeError` on a full disk."""
        used = answer.usage
        row = (key, model, answer.to_json(), used.prompt, used.cached, used.completion, cost)
        self._write("insert or replace into answers values (?, ?, ?, ?, ?, ?, ?)", row)

    def lose(self, model: str, prompt: int, cost: float | None, reason: str) -> None:
        """Note a call without an answer that may have been charged: `prompt` tokens, `cost` at most."""
        row = (model, prompt, cost, reason)
        self._write("insert into lost (model, prompt, cost, reason) values (?, ?, ?, ?)", row)

    def result(self, key: str) -> str | None:
        """What was kept under `key` by `keep`."""
        row = self._file.execute("select value from results where key = ?", (key,)).fetchone()
        return None if row is None else row[0]

    def keep(self, key: str, value: str) -> None:
        """Keep a result that was computed here, so that a resumed run need not do it again."""
        self._write("insert or replace into results values (?, ?)", (key, value))

    def totals(self) -> tuple[int, Usage, float, int, float]:
        """Answers, their tokens, their cost; calls that were lost, and their cost at most."""
        count, *tokens, cost = self._file.execute(
            "select count(*), sum(prompt), sum(cached), sum(completion), sum(cost) from answers"
        ).fetchone()
        lost, possible = self._file.execute("select count(*), sum(cost) from lost").fetchone()
        return count, Usage(*(int(n or 0) for n in tokens)), float(cost or 0), lost, float(possible or 0)

    def close(self) -> None:
        """Close the file; its journal is folded in."""
        self._file.close()

    def _write(self, statement: str, row: tuple) -> None:
        try:
            self._file.execute(statement, row)
        except sqlite3.Error as error:
            raise SondeError(f"cannot write {self._path}: {error}") from error
