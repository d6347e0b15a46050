"""Where does each latent fire? One pass of a model over a text, kept on disk as sparse triples, read back by latent.

Every hookpoint's encoder sees the same tokens; what it gives is (sequence, position, latent, value) of the activations
above 1e-5, in half precision. The triples go to disk as they come and are sorted there (`latent_files`), so memory does
not grow with the text; a pass that is killed goes on and leaves the same files. The text is cut into contexts of one
length, in an order drawn from the seed. The token that a tokenizer puts before every text is given to the model and not
kept, and nothing is kept at the tokens between documents.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from sonde.data.text import describe
from sonde.errors import SondeError
from sonde.features.latent_files import PROGRESS, TRIPLE, Shards, escaped, sorted_files
from sonde.features.token_matrix import mapped, save_tokens, tokenizer_hash, write_tokens
from sonde.files import replacing, write_json
from sonde.lm.batches import TokenBatches
from sonde.lm.model import LanguageModel
from sonde.runs.folder import read_json, refuse_other_config

LEAST = 1e-5
_VERSION = 1
_TOKENS = "tokens.safetensors"
_NOTED = "building.json"
_LARGEST = float(np.finfo(np.float16).max)
_COMMIT = 32  # batches between two notes of progress


class Encoder(Protocol):
    """Whatever turns activations into few latents: a `Dictionary`, neurons, probes.

    It tells its number of latents as `.design.latents` or `.latents`, and may have a `site` that it reads.
    """

    def encode(self, x: Float[Tensor, "... d"], /) -> Any:
        """Values (... k) and indices (... k), as a tuple; unused slots have value 0."""
        ...


class Activations(NamedTuple):
    """All activations of one latent, in the order of sequences and positions."""

    sequence: Int[np.ndarray, " n"]
    position: Int[np.ndarray, " n"]
    value: Float[np.ndarray, " n"]


class LatentCache:
    """The activations of latents over a text, on disk. Made by `build` or `write`, found again by `open`.

    Attributes:
        folder: where it is: `<hookpoint>/tokens.safetensors`, `<hookpoint>/lo_hi.safetensors`, `config.json`.
        config: what it was made of: model, tokenizer, text, context, seed, hookpoints.
        tokens: Int[np.ndarray, "sequences context"], mapped from the disk.

    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / "config.json").exists():
            raise SondeError(
                f"{folder} holds no finished latent cache: build one there, which goes on where it was left"
            )
        self.config = read_json(self.folder / "config.json")
        if self.config.get("version") != _VERSION:
            found = self.config.get("version")
            raise SondeError(
                f"{folder} has version {found} of the latent cache, this sonde reads {_VERSION}: build it again"
            )
        self.hookpoints: tuple[str, ...] = tuple(self.config["hookpoints"])
        path = self.folder / escaped(self.hookpoints[0]) / _TOKENS
        shape = (self.config["sequences"], self.config["context"])
        self.tokens: Int[np.ndarray, "sequences context"] = np.asarray(mapped(path, shape))
        self._open: dict[Path, Any] = {}
        self._files = {name: sorted_files(self.folder / escaped(name)) for name in self.hookpoints}

    @classmethod
    def open(cls, folder: str | Path) -> "LatentCache":
        """The finished cache in `folder`. Raises `SondeError` where there is none."""
        return cls(folder)

    @property
    def context(self) -> int:
        """Tokens in a sequence."""
        return self.tokens.shape[1]

    @property
    def n_tokens(self) -> int:
        """Tokens in all sequences."""
        return self.tokens.size

    def latents(self, hookpoint: str) -> int:
        """Number of latents at a hookpoint, matched exactly. Raises `SondeError` for one that is not there."""
        self._require(hookpoint)
        return self.config["hookpoints"][hookpoint]["latents"]

    def counts(self, hookpoint: str) -> Int[np.ndarray, " latents"]:
        """In how many tokens each latent fires."""
        self._require(hookpoint)
        return np.concatenate([np.diff(self._array(path, "starts")[:]) for _, _, path in self._files[hookpoint]])

    def latent(self, hookpoint: str, latent: int) -> Activations:
        """All activations of one latent. Raises `SondeError` for a hookpoint or latent that is not there."""
        if not 0 <= latent < self.latents(hookpoint):
            raise SondeError(
                f"latent {latent} does not exist: {hookpoint} has {self.latents(hookpoint)}, counted from 0"
            )
        path, lo = next((path, lo) for lo, hi, path in self._files[hookpoint] if lo <= latent <= hi)
        begin, end = self._array(path, "starts")[latent - lo : latent - lo + 2].tolist()
        if begin == end:  # an empty slice at the end of an array is refused
            return Activations(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))
        sequence, position, value = (self._array(path, name)[begin:end] for name in ("sequence", "position", "value"))
        return Activations(sequence.astype(np.int64), position.astype(np.int64), value.astype(np.float32))

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise `SondeError` when the tokens were not made by this tokenizer."""
        stored, given = self.config["tokenizer"], tokenizer_hash(tokenizer)
        if stored and stored != given:
            raise SondeError(
                f"{self.folder} was made with another tokenizer (hash {stored[:12]}, this one's is {given[:12]}): its "
                "tokens would be read as other words; use the tokenizer of the cache"
            )

    @classmethod
    def build(
        cls,
        lm: LanguageModel,
        dictionaries: Mapping[str, Encoder],
        text: Any,
        folder: str | Path,
        *,
        tokens: int | None = None,
        context: int = 256,
        seed: int = 0,
        splits: int = 5,
        tokens_per_batch: int = 4096,
        progress: str | None = None,
    ) -> "LatentCache":
        """Run `lm` over a text and keep where the latents fire. Goes on with a build that was killed.

        Args:
            lm: the model.
            dictionaries: encoder by hookpoint. A hookpoint is a site, or any name for an encoder whose `site` says
                what it reads, so that several can read one site.
            text: whatever `sonde.data.text.documents` reads, or `TokenBatches` of joined rows (whose context counts).
            folder: of the cache.
            tokens: read no more than about this many tokens; None for all of the text.
            context: tokens in a sequence, besides the one that the tokenizer puts before every text.
            seed: of the order of the sequences.
            splits: files for a hookpoint.
            tokens_per_batch: tokens that the model sees at once.
            progress: label of a progress bar; None for no bar.

        Raises:
            SondeError: for unknown sites, a context that is too long, a text that is too short, activations that are
                not finite, and a folder that holds a cache of something else.

        """
        sites = _sites(lm, dictionaries)
        folder = Path(folder)
        where = [folder / escaped(hookpoint) for hookpoint in dictionaries]
        with _fresh(folder) as path:
            lead, shape, digest = write_tokens(lm, text, path, context=context, limit=tokens, seed=seed)
            longest = shape[1] + (lead is not None)
            if lm.max_positions is not None and longest > lm.max_positions:
                raise SondeError(f"sequences of {longest} tokens are longer than {lm.name} takes ({lm.max_positions})")
            hookpoints = {
                name: {"site": sites[name], "latents": n_latents(encoder), "encoder": fingerprint(encoder)}
                for name, encoder in dictionaries.items()
            }
            identity = {
                "version": _VERSION,
                "model": {"name": lm.name, "hash": lm.hash},
                "tokenizer": tokenizer_hash(lm.tokenizer),
                "text": {"source": _called(text), "hash": digest},
                "sequences": shape[0],
                "context": shape[1],
                "seed": seed,
                "splits": splits,
                "tokens_per_batch": tokens_per_batch,
                "hookpoints": hookpoints,
            }
            if _begun(folder, identity, path, where[0]):
                return cls(folder)
        shards = Shards(folder, {name: n_latents(encoder) for name, encoder in dictionaries.items()}, splits=splits)
        matrix = mapped(where[0] / _TOKENS, shape)
        try:
            _encode_all(lm, dictionaries, sites, shards, matrix, lead, tokens_per_batch, progress)
            shards.sort()
        finally:
            shards.close()
        return _finish(folder, where, identity)

    @classmethod
    def write(
        cls,
        folder: str | Path,
        tokens: Int[np.ndarray, "sequences context"],
        triples: Mapping[str, tuple[int, Sequence[Any]]],
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        splits: int = 5,
    ) -> "LatentCache":
        """A cache of given triples, by hookpoint: the number of latents and (sequence, position, latent, value).

        For latents whose activations are known already, planted ones for example. Values of 1e-5 and less are dropped.
        """
        folder = Path(folder)
        where = [folder / escaped(hookpoint) for hookpoint in triples]
        hookpoints = {
            name: {"site": name, "latents": width, "encoder": "given"} for name, (width, _) in triples.items()
        }
        with _fresh(folder) as path:
            digest = save_tokens(path, tokens.shape, [np.asarray(tokens)])
            identity = {
                "version": _VERSION,
                "model": None,
                "tokenizer": tokenizer_hash(tokenizer),
                "text": {"source": "given tokens", "hash": digest},
                "sequences": tokens.shape[0],
                "context": tokens.shape[1],
                "hookpoints": hookpoints,
            }
            if _begun(folder, identity, path, where[0]):
                return cls(folder)
        shards = Shards(folder, {name: width for name, (width, _) in triples.items()}, splits=splits)
        shards.begin()
        for name, (width, given) in triples.items():
            sequence, position, latent, value = (np.asarray(column) for column in given)
            order = np.lexsort((position, sequence))
            kept = order[value[order] > LEAST]
            if len(latent) and int(latent.max()) >= width:
                raise SondeError(f"latent {int(latent.max())} does not exist: {name} has {width}, counted from 0")
            shards.add(name, _packed(sequence[kept], position[kept], latent[kept], value[kept]))
        shards.sort()
        return _finish(folder, where, identity)

    def _array(self, path: Path, name: str) -> Any:
        if path not in self._open:
            self._open[path] = safe_open(path, framework="np")
        return self._open[path].get_slice(name)

    def _require(self, hookpoint: str) -> None:
        if hookpoint not in self._files:
            raise SondeError(f"{self.folder} has no hookpoint {hookpoint!r}: it has {', '.join(self.hookpoints)}")


def n_latents(encoder: Any) -> int:
    """Number of latents of an encoder."""
    design = getattr(encoder, "design", None)
    return int(encoder.latents if design is None else design.latents)


def fingerprint(encoder: Any) -> str:
    """What tells one encoder from another: the hash of a module's numbers, or what the encoder calls itself."""
    if not isinstance(encoder, nn.Module):
        return repr(encoder)
    digest = hashlib.sha256(repr(getattr(encoder, "design", type(encoder).__name__)).encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _sites(lm: LanguageModel, dictionaries: Mapping[str, Encoder]) -> dict[str, str]:
    """The site that each hookpoint reads; exactly one, never a pattern."""
    if not dictionaries:
        raise SondeError("there is no dictionary to read the activations with: give at least one, by its site")
    found = {}
    for hookpoint, encoder in dictionaries.items():
        site = getattr(encoder, "site", None) or hookpoint
        matched = lm.match(site)
        if matched != (site,) or site == "logits" or site.startswith("state."):
            raise SondeError(f"hookpoint {hookpoint!r} reads {site!r}, which is not one site with a vector a token")
        found[hookpoint] = site
    return found


def _called(text: Any) -> str:
    return str(text) if isinstance(text, TokenBatches) else describe(text)


@contextmanager
def _fresh(folder: Path) -> Iterator[Path]:
    """A place for a token matrix that is gone afterwards if it was not moved to where it belongs."""
    path = folder / "tokens.new"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield path
    finally:
        for left in (path, path.with_suffix(".raw")):
            left.unlink(missing_ok=True)


def _begun(folder: Path, identity: dict[str, Any], tokens: Path, where: Path) -> bool:
    """Whether the cache of this identity is finished; one that is not gets its identity noted and its tokens."""
    noted, finished = folder / _NOTED, folder / "config.json"
    for path in (finished, noted):
        if path.exists():
            refuse_other_config(folder, read_json(path), identity)
    if finished.exists():
        _tidy(folder)
        return True
    if not noted.exists():
        write_json(noted, identity)
    where.mkdir(exist_ok=True)
    tokens.replace(where / _TOKENS)
    return False


def _tidy(folder: Path) -> None:
    for name in (_NOTED, PROGRESS):
        (folder / name).unlink(missing_ok=True)


def _finish(folder: Path, where: Sequence[Path], identity: dict[str, Any]) -> LatentCache:
    first = where[0] / _TOKENS
    for other in (path / _TOKENS for path in where[1:]):
        with replacing(other) as beside:
            try:
                os.link(first, beside)
            except OSError:  # a file system without hard links
                beside.write_bytes(first.read_bytes())
    write_json(folder / "config.json", identity)
    _tidy(folder)
    return LatentCache(folder)


def _packed(sequence: np.ndarray, position: np.ndarray, latent: np.ndarray, value: np.ndarray) -> np.ndarray:
    triples = np.empty(len(sequence), dtype=TRIPLE)
    triples["sequence"], triples["position"], triples["latent"] = sequence, position, latent
    triples["value"] = np.minimum(value, _LARGEST)
    return triples


@torch.no_grad()
def _encode_all(
    lm: LanguageModel,
    dictionaries: Mapping[str, Encoder],
    sites: Mapping[str, str],
    shards: Shards,
    tokens: np.ndarray,
    lead: int | None,
    tokens_per_batch: int,
    progress: str | None,
) -> None:
    count, context = tokens.shape
    each = max(1, tokens_per_batch // context)
    begin = shards.sequences
    if begin < count:
        shards.begin()
    special = [getattr(lm.tokenizer, name) for name in ("bos_token_id", "eos_token_id")]
    dropped = torch.tensor([i for i in special if i is not None], dtype=torch.long)
    learning = [encoder for encoder in dictionaries.values() if isinstance(encoder, nn.Module) and encoder.training]
    for encoder in learning:  # in training some kinds choose among all rows of a batch
        encoder.eval()
    with tqdm(total=count, initial=begin, desc=progress, unit="sequence", disable=progress is None) as bar:
        for number, first in enumerate(range(begin, count, each), 1):
            rows = torch.from_numpy(np.array(tokens[first : first + each], dtype=np.int64))
            kept = ~torch.isin(rows, dropped).to(lm.device)
            given = rows if lead is None else torch.cat([torch.full_like(rows[:, :1], lead), rows], 1)
            with lm.reading(*set(sites.values())) as acts:
                lm(given)
            for hookpoint, encoder in dictionaries.items():
                x = acts[sites[hookpoint]][:, -context:]
                shards.add(hookpoint, _triples(hookpoint, encoder, x, kept, first))
            last = first + each >= count
            if number % _COMMIT == 0 or last:
                shards.commit(min(first + each, count))
            bar.update(len(rows))
    for encoder in learning:
        encoder.train()


def _triples(hookpoint: str, encoder: Encoder, x: Tensor, kept: Tensor, first: int) -> np.ndarray:
    """What one batch adds, in the order of its tokens."""
    finite = x.isfinite().all(-1)
    if not bool(finite.all()):
        row, place = (~finite).nonzero()[0].tolist()
        raise SondeError(f"{hookpoint}: the activation of sequence {first + row}, token {place} is not finite")
    values, indices = encoder.encode(x.flatten(0, 1).float())
    chosen = (values > LEAST) & kept.flatten()[:, None]
    token, slot = chosen.nonzero(as_tuple=True)
    context = x.shape[1]
    return _packed(
        (first + token // context).cpu().numpy(),
        (token % context).cpu().numpy(),
        indices[token, slot].cpu().numpy(),
        values[token, slot].float().cpu().numpy(),
    )
