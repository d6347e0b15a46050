"""Words and passages that carry a class, and the class of each token that a model reads.

Labels come as spans of characters of a document: from CoNLL-U (one a word), from JSON with spans, or one for a whole
text. Tokens cut words and join them, so each token is given a class by what it covers: the one class of all labelled
characters in it ("agree"), or that of its first labelled character ("first"). A token that covers nothing labelled, or
words of different classes under "agree", is unknown, -1. Unlabelled white space has no say: " the" is "the".
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int

from sonde.data.text import documents
from sonde.errors import SondeError

UNKNOWN = -1
Rule = Literal["agree", "first"]
_COLUMNS = {"upos": 3, "xpos": 4, "feats": 5, "deprel": 7}
_CONCEPTS = {"upos": "part of speech", "deprel": "relation"}
_AMBIGUOUS = -2
_MOST_CLASSES = 1000

Spans = Iterable[tuple[int, int, str]]


@dataclass(frozen=True)
class LabelledText:
    """Documents whose characters carry the classes of one concept.

    texts: the documents; give these to `TokenBatches`.
    spans: of each document, rows of (first character, character after the last, class).
    names: the names of the classes.
    concept: what the classes are classes of, such as "part of speech".
    rule: how a token that covers several spans is labelled, see the module.
    """

    texts: tuple[str, ...]
    spans: tuple[Int[np.ndarray, "spans 3"], ...]
    names: tuple[str, ...]
    concept: str
    rule: Rule = "agree"

    @classmethod
    def of(
        cls,
        labelled: Iterable[tuple[str, Spans]],
        *,
        concept: str,
        outside: str | None = None,
        rule: Rule = "agree",
        names: Sequence[str] | None = None,
    ) -> "LabelledText":
        """Documents with spans (start, end, class name) in characters. Documents of white space alone are left out.

        `outside` names the class of all other characters that are not white space; without it they are unknown.
        `names` fixes the classes and their order; by default those that occur, sorted.

        Raises `SondeError` for a span outside its text and for no labels at all, naming the document.
        """
        kept: list[tuple[str, list[tuple[int, int, str]]]] = []
        for number, (text, spans) in enumerate(labelled, 1):
            listed = [(int(start), int(end), str(name)) for start, end, name in spans]
            for start, end, name in listed:
                if not 0 <= start < end <= len(text):
                    raise SondeError(
                        f"document {number}: the span {start} to {end} ({name}) is not inside its text of "
                        f"{len(text)} characters"
                    )
            if text.strip():
                kept.append((text, listed + (_rest(text, listed, outside) if outside else [])))
        found = {name for _, spans in kept for *_, name in spans}
        if not found:
            raise SondeError(f"no labels of {concept}: not one of {len(kept)} documents has a labelled span")
        classes = tuple(names) if names is not None else tuple(sorted(found))
        if len(classes) > _MOST_CLASSES:
            raise SondeError(
                f"{len(classes)} classes of {concept}: more than {_MOST_CLASSES}, which is no concept to erase"
            )
        number_of = {name: number for number, name in enumerate(classes)}
        if found - number_of.keys():
            raise SondeError(
                f"the class {min(found - number_of.keys())!r} of {concept} is not among {', '.join(classes)}"
            )
        rows = tuple(
            np.array([(start, end, number_of[name]) for start, end, name in spans], dtype=np.int64).reshape(-1, 3)
            for _, spans in kept
        )
        return cls(tuple(text for text, _ in kept), rows, classes, concept, rule)

    def at(
        self, document: Int[np.ndarray, " tokens"], extents: Int[np.ndarray, "tokens 2"]
    ) -> Int[np.ndarray, " tokens"]:
        """The class of every token, -1 where unknown; the arguments are what `TokenBatches.extents` returns.

        Raises `SondeError` where the tokens are of other texts than these.
        """
        if len(document) and int(document.max()) >= len(self.texts):
            raise SondeError(
                f"labels of {len(self.texts)} documents for tokens of {int(document.max()) + 1}: give both the same"
            )
        labels = np.full(len(document), UNKNOWN, dtype=np.int64)
        edges = np.flatnonzero(np.diff(document, prepend=-1, append=-1))
        for low, high in pairwise(edges):
            number = int(document[low])
            by_byte = self._bytes(number)
            part = extents[low:high]
            if int(part.max()) > len(by_byte):
                raise SondeError(
                    f"document {number + 1} has {len(by_byte)} bytes, but tokens of it reach byte {int(part.max())}: "
                    "the labels belong to another text"
                )
            labels[low:high] = _labels_of(by_byte, part, self.rule)
        return labels

    def counts(self) -> dict[str, int]:
        """How many spans each class has."""
        found = Counter(int(c) for spans in self.spans for c in spans[:, 2])
        return {name: found[number] for number, name in enumerate(self.names)}

    def _bytes(self, number: int) -> Int[np.ndarray, " bytes"]:
        """The class of each byte of a document in UTF-8."""
        text = self.texts[number]
        by_character = np.full(len(text), UNKNOWN, dtype=np.int64)
        for start, end, label in self.spans[number].tolist():
            part = by_character[start:end]
            part[:] = np.where((part == UNKNOWN) | (part == label), label, _AMBIGUOUS)
        if text.isascii():
            return by_character
        codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        return np.repeat(by_character, 1 + (codes >= 0x80).astype(np.int64) + (codes >= 0x800) + (codes >= 0x10000))


def read_labels(source: str | Path, *, column: str = "upos", outside: str | None = None) -> LabelledText:
    """Labels from a file: CoNLL-U (.conllu), or .jsonl / .json with `text` and either `spans` or `label`.

    Args:
        source: the file. `spans` are [start, end, class] or {"start", "end", "label"}, in characters; `label` is one
            class for the whole text, null where it is unknown.
        column: of CoNLL-U: upos, xpos, deprel or feats:NAME, such as feats:Number.
        outside: see `LabelledText.of`.

    Raises:
        SondeError: for a file that is missing or damaged (naming the line), and one without labels.

    """
    path = Path(source).expanduser()
    if path.suffix.lower() == ".conllu":
        return read_conllu([path], column=column)
    if path.suffix.lower() not in (".jsonl", ".json"):
        raise SondeError(f"{path} is no file of labels: give .conllu, or .jsonl or .json with text and spans or label")
    rows = _json_rows(path)
    return LabelledText.of((_json_labels(row, where) for where, row in rows), concept="label", outside=outside)


def read_conllu(paths: Sequence[str | Path], *, column: str = "upos") -> LabelledText:
    """Words of CoNLL-U files with one column of labels. Text is put together from the words and SpaceAfter=No.

    Documents are what `# newdoc` opens, or a whole file where it has none; paragraphs (`# newpar`) are separated by
    line breaks, sentences by spaces. `column` is upos, xpos, deprel or feats:NAME. "_" is unknown. In a multi-word
    token the words share its characters where they spell it ("do" + "n't"); elsewhere (French "du" = "de" + "le") it
    is labelled only if all of them have one label.

    Raises `SondeError` for a column that does not exist, and for a line that is no CoNLL-U, with its number.
    """
    field, _, feature = column.partition(":")
    if field not in _COLUMNS or (field == "feats") != bool(feature):
        raise SondeError(f"column {column!r} does not exist: choose upos, xpos, deprel or feats:NAME")
    found = [document for path in paths for document in _conllu_documents(Path(path), _COLUMNS[field], feature)]
    return LabelledText.of(found, concept=feature or _CONCEPTS.get(field, field))


def labelled_sequences(texts: Iterable[str], labels: Iterable[str | None], *, concept: str) -> LabelledText:
    """One label for each text, which all its tokens carry; None is unknown.

    Raises `SondeError` where there are not as many labels as texts.
    """
    texts, labels = list(texts), list(labels)
    if len(texts) != len(labels):
        raise SondeError(f"{len(labels)} labels for {len(texts)} texts: give one for each, None where it is unknown")
    return LabelledText.of(
        ((text, [] if label is None else [(0, len(text), label)]) for text, label in zip(texts, labels, strict=True)),
        concept=concept,
    )


def _labels_of(
    by_byte: Int[np.ndarray, " bytes"], extents: Int[np.ndarray, "tokens 2"], rule: Rule
) -> Int[np.ndarray, " tokens"]:
    """The class of tokens that cover [start, end) of a document whose bytes have these classes."""
    starts, ends = extents.T
    # A token without bytes is the rest of a character that the one before it covers, or a separator at the very start.
    low = np.where(starts == ends, np.maximum(ends - 1, 0), starts)
    where = np.stack([low, np.maximum(ends, low + 1)], 1).ravel()
    padded = np.append(by_byte, UNKNOWN)  # an end may point behind the last byte
    if rule == "first":
        known = np.where(padded == UNKNOWN, len(padded), np.arange(len(padded)))
        first = np.minimum.reduceat(known, where)[::2]
        labels = np.append(padded, UNKNOWN)[first]
        labels[labels == _AMBIGUOUS] = UNKNOWN
    else:
        largest = np.maximum.reduceat(np.where(padded == _AMBIGUOUS, _MOST_CLASSES, padded), where)[::2]
        smallest = np.minimum.reduceat(np.where(padded == UNKNOWN, _MOST_CLASSES, padded), where)[::2]
        labels = np.where(largest == smallest, largest, UNKNOWN)
    labels[ends == 0] = UNKNOWN
    return labels


def _rest(text: str, spans: Sequence[tuple[int, int, str]], name: str) -> list[tuple[int, int, str]]:
    """Spans of all that is neither labelled nor white space."""
    free = np.array([not character.isspace() for character in text], dtype=bool)
    for start, end, _ in spans:
        free[start:end] = False
    edges = np.flatnonzero(np.diff(free.astype(np.int8), prepend=0, append=0)).reshape(-1, 2)
    return [(int(start), int(end), name) for start, end in edges]


def _conllu_documents(path: Path, column: int, feature: str) -> Iterator[tuple[str, list[tuple[int, int, str]]]]:
    text, spans, between = "", [], ""
    pending: _Word | None = None
    for number, line in _lines(path):
        where = f"{path}, line {number}"
        if not line.strip():
            pending = None
        elif line.startswith("#"):
            if line.startswith("# newdoc"):
                if text:
                    yield text, spans
                text, spans, between = "", [], ""
            elif line.startswith("# newpar"):
                between = "\n"
        else:
            cells = line.split("\t")
            if len(cells) != 10:
                raise SondeError(f"{where} has {len(cells)} columns; CoNLL-U has 10, separated by tabs")
            if "." in cells[0]:  # an empty node, which no text stands for
                continue
            first, dash, last = cells[0].partition("-")
            if not first.isdecimal() or (dash and not last.isdecimal()):
                raise SondeError(f"{where} begins with {cells[0]!r}, not with the number of a word")
            if pending is None or int(first) > pending.last:
                text += between if text else ""
                pending = _Word(len(text), cells[1], int(last) if dash else int(first))
                text += cells[1]
                between = "" if "SpaceAfter=No" in cells[9].split("|") else " "
            if not dash:
                pending.parts.append((cells[1], _cell(cells[column], feature)))
                if int(first) == pending.last:
                    spans += pending.spans()
    if text:
        yield text, spans


class _Word:
    """A word of the text, or a multi-word token with the words that share its characters."""

    def __init__(self, start: int, form: str, last: int) -> None:
        self.start, self.form, self.last = start, form, last
        self.parts: list[tuple[str, str | None]] = []

    def spans(self) -> list[tuple[int, int, str]]:
        """The labelled parts; the whole, where its parts do not spell it but agree."""
        if "".join(form for form, _ in self.parts).lower() == self.form.lower():
            found, place = [], self.start
            for form, label in self.parts:
                if label is not None:
                    found.append((place, place + len(form), label))
                place += len(form)
            return found
        labels = {label for _, label in self.parts}
        label = labels.pop()
        return [] if labels or label is None else [(self.start, self.start + len(self.form), label)]


def _cell(cell: str, feature: str) -> str | None:
    if cell == "_":
        return None
    if not feature:
        return cell
    return next((part.partition("=")[2] for part in cell.split("|") if part.partition("=")[0] == feature), None)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                yield number, line.rstrip("\n")
    except FileNotFoundError as error:
        raise SondeError(f"{path} does not exist: give a file of labels (.conllu, .jsonl or .json)") from error
    except UnicodeDecodeError as error:
        raise SondeError(f"{path} is not UTF-8: convert the file to UTF-8") from error
    except OSError as error:
        raise SondeError(f"{path} cannot be read: {error.strerror or error}") from error


def _json_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    lines = list(_lines(path))
    if path.suffix.lower() == ".json":
        lines = [(1, " ".join(line for _, line in lines))]
    for number, line in lines:
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise SondeError(f"{path}, line {number} is not JSON: {error}") from error
        for place, row in enumerate(value if isinstance(value, list) else [value], 1):
            where = f"{path}, entry {place}" if isinstance(value, list) else f"{path}, line {number}"
            if not isinstance(row, Mapping) or not isinstance(row.get("text"), str):
                raise SondeError(f'{where}: expected an object with a string "text"')
            yield where, row


def _json_labels(row: Mapping[str, Any], where: str) -> tuple[str, Spans]:
    text = row["text"]
    if "spans" in row:
        try:
            return text, [
                (int(span["start"]), int(span["end"]), str(span["label"]))
                if isinstance(span, Mapping)
                else (int(span[0]), int(span[1]), str(span[2]))
                for span in row["spans"]
            ]
        except (TypeError, KeyError, ValueError, IndexError) as error:
            raise SondeError(f'{where}: spans are [start, end, "class"], in characters') from error
    if "label" in row:
        return text, [] if row["label"] is None else [(0, len(text), str(row["label"]))]
    raise SondeError(f'{where} has neither "spans" nor "label" beside its text')


def plain_texts(source: Any, count: int) -> list[str]:
    """The first `count` documents of a text source, as `TokenBatches` numbers them: what a tagger labels."""
    found = documents(source)
    return [text for _, text in zip(range(count), found, strict=False)]
