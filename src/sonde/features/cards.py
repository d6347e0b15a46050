"""What is to be seen of every latent of a dictionary: its windows, its tokens, its neighbours, its scores.

A card is made from where the latent fires in a cached text, from the direction that it writes and from what a run of
explanations noted of it. Windows are the strongest ones and then one of every tenth of strength, because the strongest
alone flatter a latent. Every latent has a card; that of one that never fired says so.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from sonde.features.latent_cache import LatentCache
from sonde.features.latent_statistics import POSITIONAL, LatentStatistics, latent_statistics
from sonde.features.logit_effects import LogitEffects, logit_effects
from sonde.features.neighbours import Neighbours, by_cooccurrence, by_cosine
from sonde.features.windows import ActiveWindows, active_windows
from sonde.lm.model import LanguageModel
from sonde.runs.feature_cards import Feature, FeatureScore, FeatureWindow
from sonde.runs.report.numbers import number

STRONGEST, TENTHS = 6, 10
LENGTH = 32
MOST = 1536
_NEAR = 6
_TOKENS = 8
_BINS = 24
_DRAWN = 8
_MEASURES = {"all": "correlation", "auc": "AUC", "f1": "F1"}
_KINDS = (
    ("single_token", "single-token"),
    ("weakly_single_token", "weakly single-token"),
    ("unigram", "few tokens"),
    ("positional", "positional"),
)


def feature_cards(
    lm: LanguageModel,
    cache: LatentCache,
    hookpoint: str,
    *,
    directions: Float[Tensor, "latents d"] | None = None,
    records: Mapping[int, Mapping[str, Any]] | None = None,
    shown: Iterable[int] | None = None,
    left_out: str = "not explained in this run",
    seed: int = 0,
    progress: str | None = None,
) -> list[Feature]:
    """A card for every latent of a hookpoint.

    Args:
        lm: the model, for the text of tokens and its head.
        cache: where the latents fire.
        hookpoint: of the cache.
        directions: what each latent writes; without them nothing is said of tokens and of decoders.
        records: by number what `interp.interpret` noted of latents: status, reason, explanation, measures.
        shown: latents whose windows, tokens and neighbours are shown; all by default.
        left_out: what is said of other latents that have no record.
        seed: of the windows that are drawn from the tenths.
        progress: label of a progress bar; None for no bar.

    Raises `SondeError` for a hookpoint that the cache does not have.

    """
    records = records or {}
    statistics = latent_statistics(cache, hookpoint, seed=seed)
    count = len(statistics.counts)
    chosen = range(count) if shown is None else sorted(set(shown))
    wanted = np.array([i for i in chosen if statistics.counts[i]], dtype=np.int64)
    maker = _Maker(lm, cache, statistics, wanted, directions, seed)
    drawn = set(wanted.tolist())
    cards = []
    for latent in tqdm(range(count), desc=progress, disable=progress is None, unit="latent"):
        record = records.get(latent)
        cards.append(maker.card(latent, record, latent in drawn, left_out))
    return cards


class _Maker:
    def __init__(
        self,
        lm: LanguageModel,
        cache: LatentCache,
        statistics: LatentStatistics,
        wanted: Int[np.ndarray, " k"],
        directions: Tensor | None,
        seed: int,
    ) -> None:
        self.lm, self.cache, self.statistics, self.seed = lm, cache, statistics, seed
        self.place = {latent: i for i, latent in enumerate(wanted.tolist())}
        self.length = next(n for n in range(min(LENGTH, cache.context), 0, -1) if cache.context % n == 0)
        self.near: dict[str, Neighbours] = {}
        self.effects: LogitEffects | None = None
        if len(wanted) and len(statistics.counts) > 1:
            if directions is not None:
                self.near["decoder cosine"] = by_cosine(directions.detach().float().cpu().numpy(), kept=_NEAR)
            firing = by_cooccurrence(cache, statistics.hookpoint, kept=_NEAR)
            self.near["firing together (Jaccard)"] = firing
        if len(wanted) and directions is not None and directions.shape[1] == lm.d_model:
            self.effects = logit_effects(lm, directions[torch.as_tensor(wanted)].detach(), kept=_TOKENS)

    def card(self, latent: int, record: Mapping[str, Any] | None, full: bool, left_out: str) -> Feature:
        fires = int(self.statistics.counts[latent])
        status, reason = _status(record, fires, left_out)
        known: dict[str, Any] = {
            "number": latent,
            "fires": fires,
            "tokens": self.statistics.tokens,
            "status": status,
            "reason": reason,
            "explanation": (record or {}).get("explanation") or "",
            "scores": _scores(record or {}),
        }
        if not fires:
            return Feature(**known)
        windows = active_windows(self.cache, self.statistics.hookpoint, latent, length=self.length)
        known["largest"] = windows.largest
        known["facts"] = self._facts(latent, len(windows))
        if not full:
            return Feature(**known)
        values = self.cache.latent(self.statistics.hookpoint, latent).value
        strengths = np.histogram(values, bins=_BINS, range=(0.0, max(windows.largest, 1e-12)))[0].tolist()
        near = {kind: found.of(latent)[:_NEAR] for kind, found in self.near.items()}
        return Feature(
            **known, windows=self._windows(latent, windows), strengths=strengths, near=near, **self._moved(latent)
        )

    def _windows(self, latent: int, windows: ActiveWindows) -> list[FeatureWindow]:
        """The strongest, and one drawn from every tenth of strength that these leave."""
        n = len(windows)
        tenth = TENTHS - np.arange(n) * TENTHS // n
        first = _distinct(windows, STRONGEST)
        rng = np.random.default_rng([self.seed, latent])
        rest = [self._drawn(rng, windows, np.flatnonzero(tenth == q)) for q in range(TENTHS - 1, 0, -1)]
        chosen = list(dict.fromkeys([*first, *(i for i in rest if i is not None and i > first[-1])]))
        cut = windows.cut(np.array(chosen), tenth[chosen].tolist())
        return [
            FeatureWindow(
                tokens=self.lm.token_strings(window.tokens.tolist()),
                activations=window.activations.tolist(),
                quantile=window.quantile if n >= TENTHS else None,
            )
            for window in cut
        ]

    @staticmethod
    def _drawn(rng: np.random.Generator, windows: ActiveWindows, among: Int[np.ndarray, " k"]) -> int | None:
        """One of some windows, if possible one that brings no stronger activation from beside its slot."""
        drawn = rng.permutation(among)[:_DRAWN]
        if not len(drawn):
            return None
        own = windows.activations_at(windows.starts[drawn]).max(1) <= windows.maxima[drawn]
        return int(drawn[own.argmax()])

    def _facts(self, latent: int, windows: int) -> list[tuple[str, str]]:
        kinds = [name for key, name in _KINDS if getattr(self.statistics, key)[latent]]
        if "single-token" in kinds and "weakly single-token" in kinds:
            kinds.remove("weakly single-token")
        told = float(self.statistics.position_information[latent])
        return [
            ("Windows", f"{windows:,}"),
            ("Kind", ", ".join(kinds) or "neither few tokens nor positional"),
            ("Says of position", f"{number(told, 2)} nats (positional above {POSITIONAL:g})"),
        ]

    def _moved(self, latent: int) -> dict[str, Any]:
        if self.effects is None:
            return {}
        ids, up, low, down = (part[self.place[latent]].tolist() for part in self.effects)
        return {
            "promoted": list(zip(self.lm.token_strings(ids), up, strict=True)),
            "suppressed": list(zip(self.lm.token_strings(low), down, strict=True)),
        }


def _status(record: Mapping[str, Any] | None, fires: int, left_out: str) -> tuple[str, str]:
    if not fires:
        return "never fired", "it fires at no token of the text"
    if record is None:
        return "fires", left_out
    return record["status"], record.get("reason") or ""


def _scores(record: Mapping[str, Any]) -> list[FeatureScore]:
    """All measures of all tests; of each test its own one is the main."""
    return [
        FeatureScore(
            test=test,
            measure=_MEASURES[name] if name in _MEASURES else str(name).replace("_", " "),
            estimate=value["estimate"],
            low=value.get("low"),
            high=value.get("high"),
            n=value.get("n"),
            chance=value.get("chance"),
            reason=value.get("reason") or "",
            main=name == one["main"],
        )
        for test, one in record.get("measures", {}).items()
        for name, value in one["values"].items()
        if name == one["main"] or value["estimate"] is not None
    ]


def _distinct(windows: ActiveWindows, count: int) -> list[int]:
    """The strongest windows, one of those that are the same text."""
    texts = windows.texts[: 8 * count]
    return sorted(np.unique(texts, return_index=True)[1].tolist())[:count]
