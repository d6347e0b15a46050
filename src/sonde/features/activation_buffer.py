"""Activations in the order in which dictionaries learn from them: as the text has them, mixed, or from a disk.

*direct* gives the rows of the text in its order, `batch` at a time. *buffer* keeps `size` rows, gives half of them in
random order and fills up again, so that the rows of a step come from many documents; one permutation serves all sites,
whose rows stay aligned. *disk* first writes all rows to files (an interrupted writing goes on), then gives them in a
random order of the whole text, in every epoch another. What a source has given so far is part of its `state`, and one
that is loaded gives the same rows from there on, to the bit. Rows at the end of the text that fill no batch
are dropped.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from sonde.errors import SondeError
from sonde.features.activation_rows import Passes, Rows, Selection
from sonde.files import replacing, write_json
from sonde.lm.batches import TokenBatches
from sonde.lm.model import LanguageModel

Mode = Literal["direct", "buffer", "disk"]
_SHARD_BYTES = 1 << 27
_INDEX = "rows.json"


@dataclass(frozen=True)
class Order:
    """In what order rows are given.

    mode: see the head of the module. batch: rows of a step, of one process. size: rows of the mixing buffer. folder:
    where a disk's rows are kept. epochs: how often the text is read. seed: of the order.
    """

    mode: Mode = "direct"
    batch: int = 4096
    size: int = 65536
    folder: Path | None = None
    epochs: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.mode not in ("direct", "buffer", "disk"):
            raise SondeError(f"mode is {self.mode!r}; it is direct, buffer or disk")
        if self.batch < 2:
            raise SondeError(f"batch is {self.batch} rows; a step needs 2 or more")
        if self.epochs < 1:
            raise SondeError(f"epochs is {self.epochs}: give 1 or more")
        if self.mode == "buffer" and self.size < self.batch:
            raise SondeError(f"a buffer of {self.size} rows is smaller than a batch of {self.batch}: give more rows")
        if (self.mode == "disk") != (self.folder is not None):
            raise SondeError("mode disk, and it alone, takes a folder for the rows")

    def source(
        self,
        lm: LanguageModel,
        batches: TokenBatches,
        sites: Sequence[str],
        selection: Selection | None = None,
        *,
        device: Any = None,
        progress: str | None = None,
    ) -> "RowSource":
        """The rows of `sites` in this order. For a disk all of them are written first, with a progress bar."""
        epochs = 1 if self.mode == "disk" else self.epochs
        passes = Passes(lm, batches, sites, selection, epochs=epochs, device=device)
        if self.mode == "direct":
            return Direct(passes, self.batch)
        if self.mode == "buffer":
            return MixingBuffer(passes, self.batch, self.size, seed=self.seed)
        assert self.folder is not None
        shards = written(passes, self.folder, progress=progress)
        return DiskRows(shards, self.batch, epochs=self.epochs, seed=self.seed, device=passes.device)


class RowSource(Protocol):
    """Somebody who gives rows, a batch at a time."""

    def take(self) -> Rows | None:
        """The rows of the next step by site, or None when too few are left."""
        ...

    def state(self) -> dict[str, Any]:
        """All that decides what comes next."""
        ...

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        ...


class _Queue:
    """Rows that came and were not given yet, first in first out."""

    def __init__(self, passes: Passes) -> None:
        self.passes = passes
        self._parts: list[Rows] = []
        self.ended = False

    def __len__(self) -> int:
        return sum(_count(part) for part in self._parts)

    def fill(self, n: int) -> None:
        """Read until `n` rows are there, or the text is at its end."""
        while not self.ended and len(self) < n:
            rows = self.passes.next_rows()
            if rows is None:
                self.ended = True
            else:
                self._parts.append(rows)

    def give(self, n: int) -> Rows:
        """The first `n` rows, which must be there."""
        # copies, not views: a view of a batch would keep all of it
        joined = _joined(self._parts)
        self._parts = [{site: rows[n:].clone() for site, rows in joined.items()}]
        return {site: rows[:n].clone() for site, rows in joined.items()}

    def state(self) -> dict[str, Any]:
        return {"passes": self.passes.state(), "rows": _joined(self._parts) if self._parts else None, "end": self.ended}

    def load(self, state: Mapping[str, Any]) -> None:
        self.passes.load(state["passes"])
        self._parts = [] if state["rows"] is None else [self.passes.placed(state["rows"])]
        self.ended = state["end"]


class Direct:
    """Rows in the order of the text."""

    def __init__(self, passes: Passes, batch: int) -> None:
        self._queue, self._batch = _Queue(passes), batch

    def take(self) -> Rows | None:
        """The next `batch` rows of the text."""
        self._queue.fill(self._batch)
        return self._queue.give(self._batch) if len(self._queue) >= self._batch else None

    def state(self) -> dict[str, Any]:
        """The place in the text, and rows that were read and not given."""
        return self._queue.state()

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self._queue.load(state)


class WholeBatches:
    """The rows of one batch of the model at a time, however many; `passes.batch` is the batch that they are of."""

    def __init__(self, passes: Passes) -> None:
        self.passes = passes

    def take(self) -> Rows | None:
        """The rows of the next batch."""
        return self.passes.next_rows()

    def state(self) -> dict[str, Any]:
        """The place in the text."""
        return self.passes.state()

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self.passes.load(state)


class MixingBuffer:
    """Rows in an order that is mixed over `size` rows, of which half are replaced at a time."""

    def __init__(self, passes: Passes, batch: int, size: int, *, seed: int = 0) -> None:
        self._queue, self._batch, self._size = _Queue(passes), batch, size
        self._generator = torch.Generator().manual_seed(seed)
        self._held: Rows = {}
        self._order = torch.zeros(0, dtype=torch.long)  # places of rows that were not given, in the order of giving

    def take(self) -> Rows | None:
        """The next `batch` rows."""
        # what is left may go below half only where nothing more comes
        if len(self._order) - self._batch < self._size // 2 and not self._queue.ended:
            self._refill()
        if len(self._order) < self._batch:
            return None
        now, self._order = self._order[: self._batch], self._order[self._batch :]
        return {site: rows[now.to(rows.device)] for site, rows in self._held.items()}

    def _refill(self) -> None:
        room = self._size - len(self._order)
        self._queue.fill(room)
        rows = self._queue.give(min(room, len(self._queue))) if len(self._queue) else None
        if rows is not None:
            if not self._held:
                self._held = {site: new.new_empty(self._size, new.shape[1]) for site, new in rows.items()}
            free = torch.ones(self._size, dtype=torch.bool)
            free[self._order] = False
            places = free.nonzero()[: _count(rows), 0]
            for site, new in rows.items():
                self._held[site][places.to(new.device)] = new
            self._order = torch.cat([self._order, places])
        self._order = self._order[torch.randperm(len(self._order), generator=self._generator)]

    def state(self) -> dict[str, Any]:
        """The place in the text, the rows that are held, their order, and the state of the random numbers."""
        return {
            "queue": self._queue.state(),
            "held": self._held,
            "order": self._order,
            "generator": self._generator.get_state(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self._queue.load(state["queue"])
        self._held = self._queue.passes.placed(state["held"])
        self._order = state["order"].clone()
        self._generator.set_state(state["generator"])


class DiskRows:
    """Rows from mapped files, in a random order that is a function of the seed and the epoch."""

    def __init__(self, shards: list[Rows], batch: int, *, epochs: int = 1, seed: int = 0, device: Any = None) -> None:
        self._shards, self._batch, self._epochs, self._seed, self._device = shards, batch, epochs, seed, device
        counts = torch.tensor([_count(shard) for shard in shards])
        self._starts = counts.cumsum(0) - counts
        self.n = int(counts.sum())
        """Number of rows."""
        self._epoch, self._given = 0, 0
        self._order: Tensor | None = None

    def take(self) -> Rows | None:
        """The next `batch` rows; a rest of an epoch that fills no batch is left out."""
        if self._given + self._batch > self.n:
            self._epoch, self._given, self._order = self._epoch + 1, 0, None
        if self._epoch >= self._epochs or self._batch > self.n:
            return None
        if self._order is None:
            self._order = torch.from_numpy(np.random.default_rng([self._seed, self._epoch]).permutation(self.n))
        now = self._order[self._given : self._given + self._batch]
        self._given += self._batch
        shard = torch.searchsorted(self._starts, now, right=True) - 1
        found: Rows = {}
        for site, first in self._shards[0].items():
            rows = first.new_empty(self._batch, first.shape[1])
            for i in shard.unique().tolist():
                here = shard == i
                rows[here] = self._shards[i][site][now[here] - self._starts[i]]
            found[site] = rows.to(self._device)
        return found

    def state(self) -> dict[str, Any]:
        """The place in the order."""
        return {"epoch": self._epoch, "given": self._given}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self._epoch, self._given, self._order = state["epoch"], state["given"], None


def written(passes: Passes, folder: str | Path, *, progress: str | None = None) -> list[Rows]:
    """Write the rows of a pass into `folder`, or finish what was begun there; the rows, mapped from the files.

    Files are `rows-00000.safetensors`, … and rows.json; each process of several has a folder of its own. Where they are
    cut does not depend on interruptions. Raises `SondeError` for a folder with rows of another model, text or
    selection.
    """
    folder = Path(folder)
    if passes.batches.world > 1:
        folder /= f"process-{passes.batches.rank}"
    index = _index(folder, passes.identity())
    shards = index["shards"]
    if shards:
        passes.load(shards[-1]["after"])
    hidden = progress is None or passes.batches.rank > 0
    with tqdm(initial=passes.tokens, desc=progress, unit="row", disable=hidden) as bar:
        while not index["done"]:
            parts: list[Rows] = []
            size = 0
            while size < _SHARD_BYTES and (rows := passes.next_rows()) is not None:
                parts.append({site: part.cpu() for site, part in rows.items()})
                size += sum(part.nbytes for part in parts[-1].values())
                bar.update(_count(rows))
            index["done"] = size < _SHARD_BYTES
            if parts:
                name = f"rows-{len(shards):05d}.safetensors"
                with replacing(folder / name) as beside:
                    save_file({site: part.contiguous() for site, part in _joined(parts).items()}, beside)
                shards.append({"file": name, "after": passes.state()})
            write_json(folder / _INDEX, index)
    return [_mapped(folder / shard["file"]) for shard in shards]


def _index(folder: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """What is in the folder of a disk cache so far."""
    path = folder / _INDEX
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        return {"identity": identity, "shards": [], "done": False}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        same = found["identity"] == identity
    except (ValueError, KeyError) as error:
        raise SondeError(f"{path} is damaged: delete the folder") from error
    if not same:
        raise SondeError(f"{folder} holds rows of another model, text, sites or selection: delete it or give another")
    return found


def _mapped(path: Path) -> Rows:
    """The tensors of a file, mapped: only rows that are taken are read."""
    with safe_open(path, framework="pt") as file:
        return {site: file.get_tensor(site) for site in file.keys()}  # noqa: SIM118 - it is no dict


def _count(rows: Rows) -> int:
    return len(next(iter(rows.values())))


def _joined(parts: list[Rows]) -> Rows:
    if len(parts) == 1:
        return parts[0]
    return {site: torch.cat([part[site] for part in parts]) for site in parts[0]}
