"""What do the latents of a sparse dictionary of this model respond to, and how much of the model do they keep?

For organism:pebble the dictionary comes with the package, for other models it is given with --dictionary. The shared
pass tells what it reconstructs and where its latents fire; on the first windows the model runs with the dictionary in
place of its activations. Controls: a dictionary of the same design with random directions, and zeros.
"""

import shlex
import tempfile
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from sonde.errors import SondeError
from sonde.features.activation_rows import Selection, selected
from sonde.features.controls import random_directions
from sonde.features.dictionary import Dictionary
from sonde.features.input_scale import Sample
from sonde.features.latent_cache import LatentCache
from sonde.features.reconstruction import Reconstruction, ReconstructionSums
from sonde.features.spliced_loss import Losses, LossSums, Spliced
from sonde.lm.stream import Batch, stream
from sonde.organisms.pebble_features import bundled_folder, has_dictionary, load_dictionary, read_records
from sonde.runs.blocks import Block, Chapter, Column, Prose, Table
from sonde.runs.feature_cards import FeatureView
from sonde.runs.finding import Control, Finding
from sonde.runs.report.numbers import number, trimmed
from sonde.studies.chapters.part import Audit, Gathered, Part
from sonde.studies.feature_blocks import EXAMPLES, density_figure, drawn_latents, feature_view

if TYPE_CHECKING:
    from sonde.studies.audit import AuditConfig

_CACHED = 1 << 16  # tokens whose activations are kept
_PREDICTED = 8000  # two batches
_SELECTION = Selection()
_OWN, _RANDOM = "dictionary", "random directions"


class Features(Part):
    """Reconstruction, loss in the model and cards of some latents, for one dictionary."""

    name = "features"

    def __init__(self, audit: Audit) -> None:
        super().__init__(audit)
        self._fires = Gathered()
        self._sums: dict[str, ReconstructionSums] = {}
        self._rows = 0

    @classmethod
    def check(cls, config: "AuditConfig") -> None:
        """Read the user's dictionary."""
        if config.dictionary is not None:
            wrong = _unfit(load_dictionary(config.dictionary))
            if wrong:
                raise SondeError(f"{config.dictionary} {wrong}")

    @cached_property
    def dictionary(self) -> Dictionary | None:
        """The one that is given, the one that is bundled, or none."""
        audit = self.audit
        if audit.config.dictionary is not None:
            return load_dictionary(audit.config.dictionary, lm=audit.lm).to(audit.lm.device)
        if has_dictionary(audit.config.model):
            return load_dictionary(audit.config.model, lm=audit.lm).to(audit.lm.device)
        return None

    @property
    def own(self) -> Dictionary:
        """The dictionary, where there is one."""
        assert self.dictionary is not None
        return self.dictionary

    @cached_property
    def _skipped(self) -> Any:
        return _SELECTION.ids(self.audit.lm)

    @property
    def sites(self) -> tuple[str, ...]:
        """Where the dictionary reads."""
        return () if self.dictionary is None else (self._site,)

    @property
    def _site(self) -> str:
        assert self.own.site is not None
        return self.own.site

    def prepare(self) -> None:
        """A dictionary of the same design around the mean of the fitting half, with random directions."""
        dictionary = self.dictionary
        if dictionary is None:
            return
        batch = next(stream(self.audit.lm, self.audit.fit, sites=(self._site,)))
        rows = batch.acts[self._site][batch.mask].double().cpu()
        if rows.shape[1] != dictionary.design.inputs:
            raise SondeError(
                f"{dictionary!r} reads width {dictionary.design.inputs}, {self._site} of {self.audit.lm.name} has "
                f"{rows.shape[1]}: give a dictionary of this model"
            )
        active = (dictionary.encode(rows[:256].float().to(dictionary.device)).values > 0).sum(-1).double().mean()
        self.random = random_directions(
            Sample.of(rows), dictionary.design.latents, max(1, round(float(active))), seed=self.audit.config.seed
        ).to(dictionary.device)
        for name, one in ((_OWN, dictionary), (_RANDOM, self.random)):
            self._sums[name] = ReconstructionSums(one, self._site, self._site)

    def update(self, batch: Batch) -> None:
        """Sum up the reconstruction, and keep where latents fire."""
        x = batch.acts[self._site]
        taken, mask = selected(batch, (self._site,), _SELECTION, self._skipped)
        rows = taken[self._site]
        unit = torch.arange(len(x), device=mask.device)[:, None].expand_as(mask)[mask]
        for one in self._sums.values():
            one.update(rows, rows, unit, len(x))
        self._fires.add("chunks", batch.chunks)
        if self._rows * batch.tokens.shape[1] >= _CACHED:
            return
        values, indices = self.own.encode(x)
        active = (values > 0) & mask[..., None]
        row, position, _ = active.nonzero(as_tuple=True)
        self._fires.add("tokens", batch.tokens)
        self._fires.add("sequence", (row + self._rows).int())
        self._fires.add("position", position.int())
        self._fires.add("latent", indices[active].int())
        self._fires.add("value", values[active])
        self._rows += len(x)

    def state(self) -> Any:
        """What was kept so far."""
        sums = {name: one.state() for name, one in self._sums.items()}
        return {"fires": self._fires.state(), "sums": sums, "rows": self._rows}

    def load(self, state: Any) -> None:
        """Go on from `state`."""
        self._fires.load(state["fires"])
        self._rows = state["rows"]
        for name, one in self._sums.items():
            one.load(state["sums"][name])

    def write(self) -> Chapter:
        """Two findings, cards of a dozen latents, how often all fire, and a table."""
        audit, question = self.audit, "What do its features respond to?"
        if self.dictionary is None:
            train = f"sonde run sae {audit.config.model}"
            return Chapter(
                id=self.name,
                question=question,
                answer="No sparse dictionary of this model was given, so its features are not known.",
                blocks=[
                    Prose(
                        text=f"Train one with `{train}` (minutes for a small model) and give its folder, "
                        "dictionaries/NAME of that run, as --dictionary; formats of other libraries are read as well."
                    )
                ],
                not_shown="Anything about features.",
                how="Only organism:pebble brings a dictionary of its own.",
            )
        seed = audit.config.seed
        cluster = self._fires["chunks"]
        found = {name: one.result(cluster, seed=seed) for name, one in self._sums.items()}
        with audit.timed("losses with the dictionary"):
            losses = self._losses()
        with audit.timed("cards of latents"):
            view = self._cards()
        own = found[_OWN]
        findings = [self._variance(found), self._loss(losses)]
        blocks: list[Block] = [
            view,
            density_figure(
                "features.density",
                {name: one.density for name, one in found.items()},
                control=(_RANDOM,),
                title=f"{number(100 * own.alive, 3)} % of the latents fire on {own.tokens:,} tokens",
                caption="How often latents fire on this text, beside those of random directions.",
            ),
            _table(found, losses),
        ]
        return Chapter(
            id=self.name,
            question=question,
            answer=" ".join(finding.sentence for finding in findings),
            findings=findings,
            blocks=blocks,
            not_shown=(
                f"The windows are of {EXAMPLES} latents drawn at random, not of the best; a dictionary of another seed "
                "has others. That a latent fires on something does not say that the model uses it, and what the "
                "dictionary misses is not in any latent. Explanations, where there are some, were made on another "
                "text or an overlapping one. `sonde features show` writes the pages of all latents."
            ),
            how=(
                f"{self.own!r}. Variance and densities over the held half; losses on its first "
                f"{losses[_OWN].tokens:,} predicted tokens, with the reconstruction in place of {self._site}. Control: "
                "a TopK dictionary of as many random directions with as many active at a token. Recovered: the share "
                "of the loss that an ablation (mean or zero) costs and the dictionary does not. Bootstrap over windows "
                "of text. After arXiv:2406.04093."
            ),
        )

    def _losses(self) -> dict[str, Losses]:
        """The model's losses on the first windows, with each dictionary and each ablation in place."""
        spliced = {
            _OWN: Spliced(self.own, self._site, self._site),
            _RANDOM: Spliced(self.random, self._site, self._site),
        }
        sums = LossSums(spliced, {self._site: self._sums[_OWN].mean})
        chunks = []
        for batch in stream(self.audit.lm, self.audit.held, sites=(self._site, "logits")):
            taken = selected(batch, (self._site,), _SELECTION, self._skipped)[1]
            sums.update(self.audit.lm, batch, batch.acts["logits"], taken)
            chunks.append(batch.chunks)
            if sums.tokens >= _PREDICTED:
                break
        return {name: sums.result(name, torch.cat(chunks).numpy(), seed=self.audit.config.seed) for name in spliced}

    def _cards(self) -> FeatureView:
        """The index of all latents on this text, with windows of some that were drawn."""
        config, given = self.audit.config, self.audit.config.dictionary
        fires = self._fires
        triples = [fires[name] for name in ("sequence", "position", "latent", "value")]
        known = read_records(bundled_folder(config.model)) if given is None else {}
        with tempfile.TemporaryDirectory() as folder:
            cache = LatentCache.write(
                folder,
                fires["tokens"],
                {self._site: (self.own.design.latents, triples)},
                tokenizer=self.audit.lm.tokenizer,
            )
            view, _ = feature_view(
                "features.latents",
                self.audit.lm,
                cache,
                self._site,
                title=f"Latents of {self._site} on this text",
                command=shlex.join(["sonde", "features", "show", given or config.model]),
                directions=self.own.w_dec,
                records=known.get(self._site, {}),
                shown=drawn_latents(cache, self._site, seed=config.seed),
                left_out="no explanation of it is known",
                seed=config.seed,
            )
        return view

    def _variance(self, found: dict[str, Reconstruction]) -> Finding:
        own, random = found[_OWN], found[_RANDOM]
        return Finding.of(
            own.fvu,
            id="features.fvu",
            chapter=self.name,
            sentence=(
                f"{trimmed(own.l0.estimate)} of {self.own.design.latents:,} latents at a token explain "
                f"{number(100 * (1 - own.fvu.estimate))} % of the variance at {self._site}."
            ),
            metric="fraction of variance unexplained",
            better="lower",
            control=Control.of("random directions", random.fvu),
            command=self.audit.command(self.name),
            figures=("features.density",),
            tables=("features.table",),
        )

    def _loss(self, losses: dict[str, Losses]) -> Finding:
        own, random = losses[_OWN], losses[_RANDOM]
        share = own.ce_recovered["mean"]
        kept = (
            f"{number(100 * share.value)} % of what the mean in their place costs is recovered"
            if share.interval is not None
            else "the mean in their place costs about nothing"
        )
        return Finding.of(
            own.delta,
            id="features.delta-ce",
            chapter=self.name,
            sentence=(
                f"With the dictionary in place of its activations the model loses {number(own.delta.estimate, 2)} nats "
                f"a token; {kept}."
            ),
            metric="rise of the loss with the dictionary in place",
            unit="nats per token",
            better="lower",
            control=Control.of("random directions", random.delta),
            command=self.audit.command(self.name),
            tables=("features.table",),
        )


def _table(found: dict[str, Reconstruction], losses: dict[str, Losses]) -> Table:
    rows = []
    for name, one in found.items():
        loss = losses[name]
        shares = {kind: share.value if share.interval else None for kind, share in loss.ce_recovered.items()}
        row = [name, one.fvu.estimate, one.l0.estimate, one.alive, loss.delta.estimate]
        rows.append([*row, shares["mean"], shares["zero"]])
    return Table(
        id="features.table",
        caption="The dictionary and its control",
        columns=[
            "dictionary",
            Column(name="FVU"),
            Column(name="active at a token"),
            Column(name="alive"),
            Column(name="Δ loss", unit="nats"),
            Column(name="recovered, mean ablation"),
            Column(name="recovered, zero ablation"),
        ],
        rows=rows,
    )


def _unfit(dictionary: Dictionary) -> str:
    """Why a dictionary cannot stand in this chapter; empty where it can."""
    if dictionary.design.transcodes or dictionary.design.streams:
        return "is no autoencoder of one site: give one, such as `sonde run sae` trains"
    if dictionary.site is None:
        return "does not say which site it reads: save it with one, such as resid_post.3"
    return ""
