"""How the activations of latents lie on disk: raw triples while a model runs, then files sorted by latent.

A triple is (sequence, position, latent, value), 12 bytes. The pass over the text knows its triples in the order of the
tokens; a reader wants them by latent. So they are appended to a raw file for each range of latents, and at the end each
raw file is sorted outside of memory: the firing counts say how the range falls into buckets of latents that fit, one
pass over the raw file deals its triples to the buckets, and each bucket is sorted by itself. No step holds more than a
fixed number of triples, however many there are.

What is left is `lo_hi.safetensors` (both ends included) with `starts` (where each latent's triples begin), `sequence`,
`position` and `value`: 8 bytes a triple.
"""

import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from jaxtyping import Int

from sonde.errors import SondeError
from sonde.files import replacing, write_json

TRIPLE = np.dtype([("latent", "<u4"), ("sequence", "<u4"), ("position", "<u2"), ("value", "<f2")])
_DTYPES = {"I64": "<i8", "U32": "<u4", "U16": "<u2", "F16": "<f2", "I32": "<i4"}
_RANGE = re.compile(r"(\d+)_(\d+)\.safetensors")
PROGRESS = "progress.json"
_LONGEST = 200  # characters of a folder's name


def escaped(hookpoint: str) -> str:
    """The folder's name of a hookpoint: percent-encoding, so that names with "/" and only they change, both ways.

    Raises `SondeError` for names that no folder can have.
    """
    name = quote(hookpoint, safe="")
    if not name.strip(".") or len(name) > _LONGEST:
        raise SondeError(
            f"hookpoint {hookpoint!r} cannot name a folder: give 1 to {_LONGEST} characters, not only dots"
        )
    return name


def ranges(latents: int, splits: int) -> list[tuple[int, int]]:
    """`splits` ranges [lo, hi) of nearly one length that cover all latents; fewer where there are fewer latents."""
    splits = min(splits, latents)
    edges = [i * latents // splits for i in range(splits + 1)]
    return list(itertools.pairwise(edges))


class ArrayFile:
    """A safetensors file that is written piece by piece: the shapes are known, the numbers come in any order."""

    def __init__(
        self, path: Path, arrays: Mapping[str, tuple[str, Sequence[int]]], metadata: Mapping[str, str]
    ) -> None:
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        begin, self._begins = 0, {}
        for name, (kind, shape) in arrays.items():
            size = int(np.prod(shape)) * np.dtype(_DTYPES[kind]).itemsize
            header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [begin, begin + size]}
            self._begins[name] = (begin, np.dtype(_DTYPES[kind]))
            begin += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._offset = 8 + len(text)
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.truncate(self._offset + begin)

    def put(self, name: str, first: int, values: np.ndarray) -> None:
        """Write `values` into array `name` (flattened) from element `first` on."""
        begin, dtype = self._begins[name]
        self._file.seek(self._offset + begin + first * dtype.itemsize)
        self._file.write(np.ascontiguousarray(values, dtype=dtype).data)

    def close(self) -> None:
        """Finish the file."""
        self._file.close()


class Shards:
    """Raw triples of several hookpoints, appended batch by batch, that become sorted files.

    Args:
        folder: of the cache; a hookpoint has a folder in it.
        latents: number of latents by hookpoint.
        splits: number of files that a hookpoint's latents are divided into.
        chunk: triples that are in memory at once while sorting.

    """

    def __init__(self, folder: Path, latents: Mapping[str, int], *, splits: int, chunk: int = 1 << 21) -> None:
        self._folder, self._chunk = folder, chunk
        self._ranges = {hookpoint: ranges(width, splits) for hookpoint, width in latents.items()}
        self._files: dict[tuple[str, int], Any] = {}
        self._progress = folder / PROGRESS

    @property
    def sequences(self) -> int:
        """Number of sequences that the raw files are known to hold."""
        return self._held()["sequences"]

    def begin(self) -> None:
        """Open the raw files as they were when last noted: what came after is cut off.

        Raises `SondeError` where one is shorter than that.
        """
        held = self._held()
        for hookpoint, parts in self._ranges.items():
            for number, (lo, _) in enumerate(parts):
                raw = self._raw(hookpoint, lo)
                raw.parent.mkdir(parents=True, exist_ok=True)
                file, size = raw.open("ab"), held["bytes"].get(f"{hookpoint}:{lo}", 0)
                if file.tell() < size:
                    file.close()
                    raise SondeError(f"{raw} has lost what was written to it: remove {self._folder} and build it again")
                file.truncate(size)
                file.seek(0, os.SEEK_END)
                self._files[hookpoint, number] = file

    def add(self, hookpoint: str, triples: np.ndarray) -> None:
        """Append triples, which come in the order of sequences and positions."""
        parts = self._ranges[hookpoint]
        number = np.searchsorted([lo for lo, _ in parts], triples["latent"], side="right") - 1
        for part in range(len(parts)):
            self._files[hookpoint, part].write(triples[number == part].data)

    def commit(self, sequences: int) -> None:
        """Note that the raw files hold the first `sequences` sequences: a killed pass goes on from here."""
        sizes = {}
        for (hookpoint, number), file in self._files.items():
            file.flush()
            os.fsync(file.fileno())
            sizes[f"{hookpoint}:{self._ranges[hookpoint][number][0]}"] = file.tell()
        write_json(self._progress, {"sequences": sequences, "bytes": sizes})

    def close(self) -> None:
        """Close the raw files as they are."""
        for file in self._files.values():
            file.close()
        self._files = {}

    def sort(self) -> None:
        """Turn every raw file into its sorted file. May be killed and called again."""
        self.close()
        for hookpoint, parts in self._ranges.items():
            for lo, hi in parts:
                raw = self._raw(hookpoint, lo)
                if raw.exists():
                    self._sort_one(raw, lo, hi)
                    raw.unlink()

    def _held(self) -> dict[str, Any]:
        if not self._progress.exists():
            return {"sequences": 0, "bytes": {}}
        return json.loads(self._progress.read_text(encoding="utf-8"))

    def _raw(self, hookpoint: str, lo: int) -> Path:
        return self._folder / escaped(hookpoint) / f"{lo}.raw"

    def _sort_one(self, raw: Path, lo: int, hi: int) -> None:
        counts = np.zeros(hi - lo, dtype=np.int64)
        for triples in _chunks(raw, self._chunk):
            counts += np.bincount(triples["latent"] - np.uint32(lo), minlength=hi - lo)
        starts = np.concatenate([[0], np.cumsum(counts)])
        with replacing(raw.with_name(f"{lo}_{hi - 1}.safetensors")) as beside:
            n = int(starts[-1])
            arrays = {"starts": ("I64", [len(starts)]), "sequence": ("U32", [n])}
            arrays |= {"position": ("U16", [n]), "value": ("F16", [n])}
            out = ArrayFile(beside, arrays, {})
            try:
                out.put("starts", 0, starts)
                for first, triples in self._in_order(raw, lo, counts):
                    for name in ("sequence", "position", "value"):
                        out.put(name, first, triples[name])
            finally:
                out.close()

    def _in_order(self, raw: Path, lo: int, counts: Int[np.ndarray, " latents"]) -> Iterator[tuple[int, np.ndarray]]:
        """Triples in the order of latents, each piece with the number of its first."""
        bucket = _buckets(counts, self._chunk)
        if bucket[-1] == 0:
            triples = np.fromfile(raw, dtype=TRIPLE)
            yield 0, triples[_order(triples["latent"], lo)]
            return
        paths = [raw.with_suffix(f".{number}.bucket") for number in range(int(bucket[-1]) + 1)]
        for path in paths:
            path.unlink(missing_ok=True)
        for triples in _chunks(raw, self._chunk):
            number = bucket[triples["latent"] - np.uint32(lo)]
            order = np.argsort(number, kind="stable")
            cuts = np.searchsorted(number[order], np.arange(len(paths) + 1))
            for path, begin, end in zip(paths, cuts[:-1], cuts[1:], strict=True):
                if end > begin:
                    with path.open("ab") as file:
                        file.write(triples[order[begin:end]].data)
        first = 0
        for number, path in enumerate(paths):
            if not path.exists():
                continue
            one = int((counts[bucket == number] > 0).sum()) == 1
            # a latent that fills a bucket alone is in order as it was dealt, however long it is
            for triples in _chunks(path, self._chunk) if one else [np.fromfile(path, dtype=TRIPLE)]:
                yield first, triples if one else triples[_order(triples["latent"], lo)]
                first += len(triples)
            path.unlink()


def _buckets(counts: Int[np.ndarray, " latents"], most: int) -> Int[np.ndarray, " latents"]:
    """The bucket of each latent: neighbours share one while they have no more than `most` triples together."""
    bucket, held, number = np.zeros(len(counts), dtype=np.int64), 0, 0
    for latent, count in enumerate(counts.tolist()):
        if held and held + count > most:
            number, held = number + 1, 0
        bucket[latent] = number
        held += count
    return bucket


def _order(latent: np.ndarray, lo: int) -> Int[np.ndarray, " n"]:
    """A stable order by latent. Sixteen bits are sorted three times as fast."""
    offset = latent - np.uint32(lo)
    narrow = len(offset) == 0 or int(offset.max()) < 1 << 16
    return np.argsort(offset.astype(np.uint16) if narrow else offset, kind="stable")


def _chunks(path: Path, chunk: int) -> Iterator[np.ndarray]:
    with path.open("rb") as file:
        while len(triples := np.fromfile(file, dtype=TRIPLE, count=chunk)):
            yield triples


def sorted_files(folder: Path) -> list[tuple[int, int, Path]]:
    """The sorted files of a hookpoint's folder as (lo, hi, path), both ends included, in order."""
    found = ((_RANGE.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted((int(match[1]), int(match[2]), path) for match, path in found if match)
