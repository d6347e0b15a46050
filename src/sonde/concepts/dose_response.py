"""How far does a model lean towards one kind of text when it is steered along a contrast, and how does that grow?

The vector comes from one half of the pairs of texts; the other half is scored under every strength a of h + a r:

    preference(a) = log p(positive text) / tokens - log p(negative text) / tokens

Random directions of the length of r are the control. Nothing about the texts needs to be known but that they differ.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from sonde.concepts.affine import AffineEdit
from sonde.concepts.contrast import contrast
from sonde.concepts.site_edits import SiteEdits
from sonde.errors import SondeError
from sonde.lm.continuation import continuation
from sonde.lm.model import LanguageModel
from sonde.lm.prompt_rows import like_lengths, prompt_ids

_ROWS = 256
_FEWEST = 4
_FRAMES = (
    "In the morning they walked {a} and listened to {b}.",
    "She had lived {a} all her life, and she loved {b}.",
    "The old man told us a story about {b}.",
    "There was nothing to be seen {a} but {b}.",
    "He went back {a}, because he could not forget {b}.",
    "All day long the children played {a} with {b}.",
    "We came home {a}, tired, and dreamt of {b}.",
    "Nobody knew {a} better than he did, nor {b}.",
)
_SEA = (("by the sea", "the waves"), ("on the shore", "the boats"), ("along the beach", "the salt wind"))
_WOOD = (("in the forest", "the trees"), ("in the woods", "the leaves"), ("along the path", "the birds"))


@dataclass(frozen=True)
class TextPairs:
    """Pairs of texts that differ in one thing, and what it is called."""

    name: str
    positive: tuple[str, ...]
    negative: tuple[str, ...]

    def halves(self) -> tuple["TextPairs", "TextPairs"]:
        """Every other pair, and the rest. Raises `SondeError` for too few pairs."""
        if len(self.positive) != len(self.negative) or len(self.positive) < 2 * _FEWEST:
            raise SondeError(
                f"the contrast {self.name!r} has {len(self.positive)} positive and {len(self.negative)} negative "
                f"texts: give as many of both, at least {2 * _FEWEST}"
            )
        even, odd = (TextPairs(self.name, self.positive[i::2], self.negative[i::2]) for i in (0, 1))
        return even, odd


def default_pairs() -> TextPairs:
    """Sentences about the sea and the same sentences about a forest."""
    sides = [tuple(frame.format(a=a, b=b) for frame in _FRAMES for a, b in words) for words in (_SEA, _WOOD)]
    return TextPairs("the sea rather than the forest", *sides)


def read_pairs(path: str | Path) -> TextPairs:
    """A JSON file: an object with `positive` and `negative`, lists of texts that belong together in pairs, and `name`.

    Raises `SondeError` for anything else.
    """
    path = Path(path)
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SondeError(f"{path} cannot be read as a contrast: {error}") from error
    lists = [given.get(key) if isinstance(given, dict) else None for key in ("positive", "negative")]
    if not all(isinstance(texts, list) and all(isinstance(t, str) and t.strip() for t in texts) for texts in lists):
        raise SondeError(f"{path} is not a contrast: give an object with 'positive' and 'negative', lists of texts")
    return TextPairs(str(given.get("name") or path.stem), *(tuple(texts) for texts in lists if texts is not None))


@dataclass(frozen=True)
class DoseResponse:
    """Preferences in nats per token by strength and held pair, of the contrast and of random directions.

    strengths [S], preference [S, pairs], random [directions, S, pairs]; `norm` is the length of the vector.
    """

    site: str
    strengths: tuple[float, ...]
    preference: Float[Tensor, "strengths pairs"]
    random: Float[Tensor, "directions strengths pairs"]
    norm: float


@torch.no_grad()
def dose_response(
    lm: LanguageModel,
    pairs: TextPairs,
    *,
    site: str,
    strengths: Sequence[float],
    position: int = -3,
    n_random: int = 4,
    seed: int = 0,
) -> DoseResponse:
    """Steer along the contrast of one half of the pairs and score the other half.

    The vector is read at token `position`; the last token of a text is often a full stop, which says little.

    Raises `SondeError` where the texts do not differ at `site`.
    """
    fit, held = pairs.halves()
    means = contrast(lm, fit.positive, fit.negative, sites=site, position=position)
    vector = means.require_difference(means.sites[0])
    generator = torch.Generator().manual_seed(seed)
    others = torch.randn(n_random, len(vector), generator=generator).to(vector)
    others *= vector.norm() / others.norm(dim=-1, keepdim=True)
    found = [_preferences(lm, site, one, held, strengths) for one in (vector, *others)]
    return DoseResponse(
        site, tuple(map(float, strengths)), found[0], torch.stack(found[1:]), float(vector.norm())
    )  # fmt: skip


def _preferences(
    lm: LanguageModel, site: str, vector: Tensor, pairs: TextPairs, strengths: Sequence[float]
) -> Float[Tensor, "strengths pairs"]:
    edits = SiteEdits({site: AffineEdit.add(vector)})
    sides = [_log_likelihoods(lm, edits, texts, strengths) for texts in (pairs.positive, pairs.negative)]
    return sides[0] - sides[1]


def _log_likelihoods(
    lm: LanguageModel, edits: SiteEdits, given: Sequence[str], strengths: Sequence[float]
) -> Float[Tensor, "strengths texts"]:
    """Log p per token of texts under every strength, the first token of a text left out."""
    rows = prompt_ids(lm, given)
    if min(map(len, rows)) < 2:
        raise SondeError("a text of the contrast has one token: there is nothing to predict")
    levels = torch.tensor([float(strength) for strength in strengths], device=lm.device)
    out = torch.empty(len(levels), len(rows), dtype=torch.float64)
    equal = continuation(lm.model).ignores_mask
    for numbers in like_lengths([len(ids) for ids in rows], max(1, _ROWS // len(levels)), equal=equal):
        width = max(len(rows[i]) for i in numbers)
        tokens = torch.tensor([rows[i] + [0] * (width - len(rows[i])) for i in numbers], device=lm.device)
        mask = torch.tensor([[True] * len(rows[i]) + [False] * (width - len(rows[i])) for i in numbers])
        times = len(levels)
        with edits.at(levels.repeat_interleave(len(numbers))).on(lm):
            logits = lm(tokens.repeat(times, 1), mask.repeat(times, 1)).logits
        assert logits is not None
        scored = mask[:, 1:].to(lm.device)
        target = tokens[:, 1:].repeat(times, 1)
        nats = -torch.nn.functional.cross_entropy(logits[:, :-1].float().mT, target, reduction="none")
        nats = (nats.view(times, len(numbers), -1) * scored).sum(-1) / scored.sum(-1)
        out[:, numbers] = nats.double().cpu()
    return out
