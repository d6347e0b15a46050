"""How much does a language model lean on a concept? Erase it from all that its parts are given, and look at the loss.

Cut points are the inputs of attention (or recurrence) and of the MLP, `mixer_in.i` and `mlp_in.i`: the outputs of the
norms, after weight and bias. Concept scrubbing (Belrose et al. 2023, arXiv:2306.03819, section 6) goes through them in
order of depth; at each it runs the text to that point through the erasers already fitted, fits an eraser of the
tokens' labels there, and goes on with it in place. Without the order (`sequential=False`) all are fitted on the clean
run, which is weaker: an eraser lets pass what earlier edits have turned into new directions. Controls: a random
subspace of as many dimensions, taken out in the same way; SAL, which guards as well and costs more; no edit.

The stream is kept at block boundaries, in half precision with a scale for each token, and passes resume from there:
about 1.5 passes over the text for any number of cut points, where recomputing takes half a pass for each.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm import tqdm

from sonde.concepts.affine import AffineEdit
from sonde.concepts.leace import LeaceEraser
from sonde.concepts.sal import SalEraser
from sonde.concepts.statistics import ConceptStatistics
from sonde.errors import SondeError
from sonde.files import load_bundle, save_bundle, write_json
from sonde.lm.batches import TokenBatch, TokenBatches
from sonde.lm.model import LanguageModel
from sonde.lm.resumption import resumed, resumption
from sonde.lm.stream import all_merge

Method = Literal["leace", "sal", "random"]
Where = Literal["all", "mixers", "mlps"]
Keep = Literal["memory", "disk", "recompute"]
METHODS: tuple[Method, ...] = ("leace", "sal", "random")
_KINDS = {"all": ("mixer_in", "mlp_in"), "mixers": ("mixer_in",), "mlps": ("mlp_in",)}
_FORMAT = "sonde scrub 1"
_CONFIG = "scrub.json"


class Labels(Protocol):
    """Classes of the tokens of each batch; `sonde.lm.token_labels.TokenLabels` is one."""

    concept: str
    names: tuple[str, ...]

    def at(self, batches: TokenBatches, index: int) -> Int[Tensor, "batch pos"]:
        """The class of each token of a batch, -1 where unknown and at pads."""
        ...


@dataclass(frozen=True)
class Scrub:
    """Erasers of one concept at the cut points of one model: `with scrub.editing(lm): lm(tokens)`.

    edits: by site, in order of depth. method, sequential, concept: how they were fitted, and of what.
    """

    edits: Mapping[str, AffineEdit]
    method: str
    concept: str
    sequential: bool = True

    @property
    def ranks(self) -> dict[str, int]:
        """Dimensions taken out at each cut point."""
        return {site: edit.rank for site, edit in self.edits.items()}

    def editing(self, lm: LanguageModel) -> AbstractContextManager[None]:
        """Scrub everything that `lm` computes inside the `with` block."""
        return lm.editing(self.edits)

    def save(self, folder: str | Path) -> None:
        """Write one folder for each edit, and `scrub.json` last."""
        folder = Path(folder)
        for site, edit in self.edits.items():
            edit.save(folder / site)
        settings = {"method": self.method, "concept": self.concept, "sequential": self.sequential}
        write_json(folder / _CONFIG, {"format": _FORMAT, **settings, "sites": list(self.edits)})

    @classmethod
    def load(cls, folder: str | Path, *, device: torch.device | str = "cpu") -> "Scrub":
        """Read what `save` wrote, onto a device. Raises `SondeError` for a folder without a scrub, or a damaged one."""
        folder = Path(folder)
        try:
            config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise SondeError(f"{folder} is not the folder of a scrub: {_CONFIG} cannot be read") from error
        if config.get("format") != _FORMAT:
            raise SondeError(f"{folder / _CONFIG} is not the configuration of a scrub")
        edits = {site: AffineEdit.load(folder / site).to(device) for site in config["sites"]}
        return cls(edits, config["method"], config["concept"], config["sequential"])


def cut_points(lm: LanguageModel, where: Where = "all", *, layers: Sequence[int] | None = None) -> tuple[str, ...]:
    """Names of cut points in order of depth: inputs of all parts, of mixers or of MLPs, in all or in chosen blocks.

    Raises `SondeError` for another word, a block that does not exist, and where no part's input can be read.
    """
    if where not in _KINDS:
        raise SondeError(f"cut points are {', '.join(_KINDS)}, not {where!r}")
    for layer in layers or ():
        if not -lm.n_layers <= layer < lm.n_layers:
            raise SondeError(f"layer {layer} does not exist: {lm.name} has layers 0 to {lm.n_layers - 1}")
    chosen = range(lm.n_layers) if layers is None else {layer % lm.n_layers for layer in layers}
    found = tuple(
        site for site in lm.sites if site.partition(".")[0] in _KINDS[where] and int(site.partition(".")[2]) in chosen
    )
    if not found:
        raise SondeError(f"{lm.name} has no cut point ({where}): the inputs of its parts cannot be read one by one")
    return found


@torch.no_grad()
def scrub(
    lm: LanguageModel,
    batches: TokenBatches,
    labels: Labels,
    *,
    method: Method = "leace",
    sites: Sequence[str] | None = None,
    sequential: bool = True,
    ranks: Mapping[str, int] | None = None,
    keep: Keep = "memory",
    folder: str | Path | None = None,
    seed: int = 0,
    progress: str | None = None,
) -> Scrub:
    """Fit erasers at the cut points of `lm` on a labelled text.

    Args:
        lm: any decoder, transformer or recurrent.
        batches: the text to fit on.
        labels: the class of each of its tokens; unknown ones (-1) are run, and not fitted on.
        method: "leace", "sal", or "random": a random subspace, with the mean kept.
        sites: cut points, as patterns; by default all inputs of mixers and MLPs.
        sequential: fit each on the run through those before it; else all on the clean run, in one pass.
        ranks: dimensions of the random subspaces by site; by default the number of classes less one.
        keep: where the stream is kept between cut points: "memory" and "disk" take two bytes a number (and round to
            11 bits), "recompute" runs the text anew for each cut point.
        folder: where finished erasers are written as they come; what lies there is taken up. Needed for "disk".
        seed: of the random subspaces.
        progress: label of a progress bar; None for no bar.

    Raises:
        SondeError: for unknown methods and sites, labels of which fewer than two classes occur in the text, and
            activations that are not finite, naming the site.

    """
    if method not in METHODS:
        raise SondeError(f"method {method!r} is unknown: use {', '.join(METHODS)}")
    if keep not in ("memory", "disk", "recompute"):
        raise SondeError(f"activations are kept in memory or on disk, or recomputed, not {keep!r}")
    if keep == "disk" and folder is None:
        raise SondeError("keeping activations on disk needs a folder")
    chosen = cut_points(lm) if sites is None else lm.match(*sites)
    if other := [site for site in chosen if site in ("logits", "embed") or site.startswith("state.")]:
        raise SondeError(f"{other[0]} is no place to scrub: choose among {', '.join(cut_points(lm)[:2])}, …")
    present = _Present(batches, labels)
    fitting = _Fitting(method, {site: (ranks or {}).get(site, present.k - 1) for site in chosen}, seed)
    folder = None if folder is None else Path(folder)
    edits = (
        {}
        if folder is None
        else {s: AffineEdit.load(folder / s).to(lm.device) for s in chosen if (folder / s).is_dir()}
    )
    with tqdm(desc=progress, unit="batch", disable=progress is None or batches.rank > 0) as bar:
        walk = _Walk(lm, batches, keep, folder, bar)
        if not sequential:
            open_sites = [site for site in chosen if site not in edits]
            found = {site: fitting.collects() for site in open_sites}
            for batch, acts in walk.clean(open_sites):
                z = present.at(batch.index)
                for site in open_sites:
                    _update(found[site], acts[site], z, site)
            edits |= {site: fitting.edit(site, statistics) for site, statistics in found.items()}
        else:
            for site in chosen:
                if site in edits:
                    continue
                statistics = fitting.collects()
                for batch, acts in walk.to(site, edits):
                    _update(statistics, acts[site], present.at(batch.index), site)
                edits[site] = fitting.edit(site, statistics)
                if folder is not None:
                    edits[site].save(folder / site)
            walk.close()
    made = Scrub({site: edits[site] for site in chosen}, method, labels.concept, sequential)
    if folder is not None:
        made.save(folder)
    return made


class CleanRun:
    """Consumer that fits several concepts at once on the run without edits: LEACE, and a random subspace for each.

    `sequential=False` in one pass for all concepts, and over a stream that serves others too.
    """

    def __init__(
        self, sites: Sequence[str], batches: TokenBatches, concepts: Sequence[Labels], *, seed: int = 0
    ) -> None:
        self.sites = tuple(sites)
        self._concepts = [_Present(batches, labels) for labels in concepts]
        self._seed = seed
        self._found = [{site: _Fitting("leace", {}, seed).collects() for site in sites} for _ in concepts]

    def update(self, batch: Any) -> None:
        """Take in a batch with activations at the sites."""
        for labels, found in zip(self._concepts, self._found, strict=True):
            z = labels.at(batch.index)
            for site in self.sites:
                _update(found[site], batch.acts[site], z, site)

    def finish(self) -> list[tuple[Scrub, Scrub]]:
        """For each concept its scrub, and the control."""
        made = []
        for labels, found in zip(self._concepts, self._found, strict=True):
            fitting = _Fitting("leace", {}, self._seed)
            leace = Scrub({s: fitting.edit(s, f) for s, f in found.items()}, "leace", labels.concept, sequential=False)
            fitting = _Fitting("random", leace.ranks, self._seed)
            control = {s: fitting.edit(s, f) for s, f in found.items()}
            made.append((leace, Scrub(control, "random", labels.concept, sequential=False)))
        return made


class _Fitting:
    """What is collected at a cut point, and the edit that is made from it."""

    def __init__(self, method: Method, ranks: Mapping[str, int], seed: int) -> None:
        self._method, self._ranks = method, ranks
        self._generator = {site: torch.Generator().manual_seed(seed + 1000 * i) for i, site in enumerate(ranks)}

    def collects(self) -> ConceptStatistics:
        return ConceptStatistics(categorical=True, covariance="pooled" if self._method == "leace" else "none")

    def edit(self, site: str, statistics: ConceptStatistics) -> AffineEdit:
        statistics = all_merge(statistics)
        if self._method == "random":
            rank = min(self._ranks[site], statistics.dim)
            draw = torch.randn(statistics.dim, rank, dtype=torch.float64, generator=self._generator[site])
            basis = torch.linalg.qr(draw)[0].to(statistics.mean)
            edit = AffineEdit(
                left=basis.to(statistics.dtype),
                right=basis.T.contiguous().to(statistics.dtype),
                reference=statistics.mean.to(statistics.dtype),
            )
            edit.facts = {"n": statistics.n, "k": statistics.k, "random": True}
            return edit
        eraser = LeaceEraser() if self._method == "leace" else SalEraser()
        return eraser.finish(statistics)


class _Walk:
    """Runs the text to cut points, deeper and deeper, from the stream kept at the last block boundary."""

    def __init__(self, lm: LanguageModel, batches: TokenBatches, keep: Keep, folder: Path | None, bar: tqdm) -> None:
        self._lm, self._batches, self._bar = lm, batches, bar
        self._keeps = keep != "recompute" and resumption(lm).works
        self._disk = folder / "stream" if keep == "disk" and folder is not None else None
        self._layer = 0
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def clean(self, sites: Sequence[str]) -> Iterator[tuple[TokenBatch, Mapping[str, Tensor]]]:
        """Every batch with the activations of a run without edits."""
        return self._run(sites, {}, 0)

    def to(self, site: str, edits: Mapping[str, AffineEdit]) -> Iterator[tuple[TokenBatch, Mapping[str, Tensor]]]:
        """Every batch with the activations at `site` of a run through `edits`."""
        layer = int(site.partition(".")[2])
        if self._keeps and layer > self._layer:
            self._advance(layer, edits)
        return self._run([site], edits, self._layer)

    def close(self) -> None:
        """Remove what was kept on disk."""
        if self._disk is not None:
            shutil.rmtree(self._disk, ignore_errors=True)

    def _advance(self, layer: int, edits: Mapping[str, AffineEdit]) -> None:
        """Keep the stream in front of block `layer`."""
        site = f"resid_pre.{layer}"
        for batch, acts in self._run([site], edits, self._layer):
            stream = acts[site].float()
            scale = stream.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
            kept = ((stream / scale).half(), scale)
            if self._disk is None:
                self._kept[batch.index] = kept
            else:
                save_bundle(self._path(layer, batch.index), list(kept))
        if self._disk is not None and self._layer:
            for index in range(self._batches.n_batches):
                self._path(self._layer, index).unlink(missing_ok=True)
        self._layer = layer

    def _run(
        self, sites: Sequence[str], edits: Mapping[str, AffineEdit], layer: int
    ) -> Iterator[tuple[TokenBatch, Mapping[str, Tensor]]]:
        lm = self._lm
        if not sites:
            return
        for batch in self._batches:
            tokens, mask = batch.tokens.to(lm.device), batch.mask.to(lm.device)
            with self._from(layer, batch.index), lm.editing(edits), lm.reading(*sites) as acts:
                lm(tokens, mask)
            self._bar.update()
            yield batch, acts

    @contextmanager
    def _from(self, layer: int, index: int) -> Iterator[None]:
        if not layer:
            yield
            return
        half, scale = self._kept[index] if self._disk is None else load_bundle(self._path(layer, index))
        stream = (half.float() * scale).to(self._lm.dtype).to(self._lm.device)
        with resumed(self._lm, layer, stream):
            yield

    def _path(self, layer: int, index: int) -> Path:
        assert self._disk is not None
        return self._disk / f"{layer}-{index}.safetensors"


def _update(statistics: ConceptStatistics, acts: Tensor, z: Tensor, site: str) -> None:
    try:
        statistics.update(acts, z.to(acts.device))
    except ValueError as error:
        raise SondeError(f"activations at {site} cannot be fitted on: {error}") from error


class _Present:
    """Labels renumbered to the classes that occur in a text, of which there must be two: the others cannot be fitted.

    k: how many they are.
    """

    def __init__(self, batches: TokenBatches, labels: Labels) -> None:
        self._batches, self._labels, self.concept = batches, labels, labels.concept
        found = torch.cat([labels.at(batches, index).unique() for index in range(batches.n_batches)]).unique()
        found = found[found >= 0]
        self.k = len(found)
        if self.k < 2:
            only = f"only {labels.names[int(found[0])]!r} of" if self.k else "no label of"
            raise SondeError(f"nothing to erase: {only} {labels.concept} occurs in the text to fit on")
        self._number = torch.full((len(labels.names) + 1,), -1)  # the last stands for unknown
        self._number[found] = torch.arange(self.k)

    def at(self, index: int) -> Int[Tensor, "batch pos"]:
        return self._number[self._labels.at(self._batches, index)]
