"""How does the prediction form from layer to layer? Statistics of a lens at every (layer, token), streamed.

Row l < L of a trajectory is the lens at its site l, the last row the model's own output. Logits exist for one chunk of
tokens of one layer at a time: what is kept are statistics, the top tokens and the hidden states, so that memory does
not grow with the vocabulary. The *prediction depth* of a token is the first row from which the top token equals the
final one and stays so; a token is *decided* from there on. (Belrose et al. 2303.08112; Baldock et al. 2106.09647.)
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sonde.errors import SondeError
from sonde.lens.rows import paired
from sonde.lens.tuned import TunedLens
from sonde.lm.model import LanguageModel
from sonde.stats import information
from sonde.stats.ranks import rank_of

_CHUNK_ELEMENTS = 1 << 21
STATISTICS = ("entropy", "cross_entropy", "rank", "max_probability", "kl", "log_probability_difference")


@dataclass(frozen=True)
class Trajectory:
    """Statistics of one passage or batch at every layer and token; pads hold nan (or -1 in whole numbers).

    Leading axis: the lens's sites, then the model's output. Statistics that need targets are None without them.
    """

    sites: tuple[str, ...]
    tokens: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    targets: Int[Tensor, "batch pos"] | None
    entropy: Float[Tensor, "layers batch pos"]
    max_probability: Float[Tensor, "layers batch pos"]
    kl: Float[Tensor, "layers batch pos"]
    """KL(model || lens) in nats."""
    top_tokens: Int[Tensor, "layers batch pos k"]
    top_log_probs: Float[Tensor, "layers batch pos k"]
    cross_entropy: Float[Tensor, "layers batch pos"] | None
    rank: Int[Tensor, "layers batch pos"] | None
    """1 + number of tokens with a larger logit than the target."""
    log_probability_difference: Float[Tensor, "layers batch pos"] | None
    """log q(target) - log q(anti-target)."""
    choice_log_probs: Float[Tensor, "layers batch pos choices"] | None
    log_probs: Float[Tensor, "layers batch pos vocab"] | None
    """Everything, where `keep_log_probs` asked for it."""
    views: "tuple[_View, ...]" = field(repr=False)
    removed: Bool[Tensor, "batch vocab"] | None = field(default=None, repr=False)

    @property
    def rows(self) -> tuple[str, ...]:
        """Names of the rows: sites, then "output"."""
        return (*self.sites, "output")

    @property
    def log_probability_change(self) -> Float[Tensor, "steps batch pos"] | None:
        """First difference over the layers of `log_probability_difference`."""
        difference = self.log_probability_difference
        return None if difference is None else difference.diff(dim=0)

    @property
    def prediction_depth(self) -> Int[Tensor, "batch pos"]:
        """First row from which the top token is the final one and stays so; -1 at pads."""
        return torch.where(self.mask, prediction_depth(self.top_tokens[..., 0]), -1)

    @property
    def choice_depth(self) -> Int[Tensor, "batch pos"]:
        """Prediction depth of the most probable of the answer choices."""
        if self.choice_log_probs is None:
            raise SondeError("this trajectory was made without choices: pass choices=[token ids]")
        return torch.where(self.mask, prediction_depth(self.choice_log_probs.argmax(-1)), -1)

    def decided(self) -> Float[Tensor, " layers"]:
        """Share of real tokens that are decided at each row; 1 at the output."""
        return decided(self.prediction_depth[self.mask], len(self.rows))

    def mean(self, statistic: str) -> Float[Tensor, " layers"]:
        """Mean of a statistic over real tokens that have it."""
        return self.values(statistic)[:, self.mask].double().nanmean(-1)

    def values(self, statistic: str) -> Float[Tensor, "layers batch pos"]:
        """A statistic by name. Raises `SondeError` for unknown names and for one that needed targets."""
        if statistic not in STATISTICS:
            raise SondeError(f"statistic {statistic!r} is unknown: use one of {', '.join(STATISTICS)}")
        found = getattr(self, statistic)
        if found is None:
            needed = "targets and anti_targets" if statistic == "log_probability_difference" else "targets"
            raise SondeError(f"{statistic} needs {needed}, and this trajectory was made without")
        found = found.float()
        return found.masked_fill(found < 0, torch.nan) if statistic == "rank" else found

    def compare(self, other: "Trajectory") -> "Comparison":
        """Distances between the predictions of two trajectories of one shape, row by row and token by token.

        Logits are made again from hidden states, chunk by chunk. Raises `SondeError` for other shapes or vocabularies.
        """
        mine, theirs = (len(self.rows), *self.tokens.shape), (len(other.rows), *other.tokens.shape)
        if mine != theirs:
            raise SondeError(f"trajectories of {mine} and {theirs} (rows, batch, pos) cannot be compared")
        if (self.removed is None) != (other.removed is None):
            raise SondeError("one trajectory was made with mask_input and the other without: they cannot be compared")
        if self.views[0].vocab_size != other.views[0].vocab_size:
            raise SondeError(
                f"vocabularies of {self.views[0].vocab_size} and {other.views[0].vocab_size} tokens cannot be compared"
            )
        both = self.mask & other.mask
        found = {name: torch.full((len(self.rows), *both.shape), torch.nan) for name in _DISTANCES}
        place = both.nonzero()
        with torch.no_grad():
            for part in _chunks(len(place), self.views[0].vocab_size):
                b, t = place[part].unbind(1)
                for row in range(len(self.rows)):
                    p, q = (
                        made.views[row].log_probs(b, t, None if made.removed is None else made.removed[b])
                        for made in (self, other)
                    )
                    for name, distance in _DISTANCES.items():
                        found[name][row, b, t] = distance(p, q).cpu().float()
        return Comparison(self.rows, both, **found)


@dataclass(frozen=True)
class Comparison:
    """Distances in nats between two trajectories p and q at every row and token; nan at pads."""

    rows: tuple[str, ...]
    mask: Bool[Tensor, "batch pos"]
    kl: Float[Tensor, "layers batch pos"]
    js: Float[Tensor, "layers batch pos"]
    """Jensen-Shannon divergence, with the mixture: at most ln 2."""
    tv: Float[Tensor, "layers batch pos"]
    """Total variation: half the sum of |p - q|."""
    aitchison: Float[Tensor, "layers batch pos"]
    """Aitchison similarity of the two vectors of log-probabilities, weighted by the mean of p and q."""
    mean_kl: Float[Tensor, "layers batch pos"]
    """Mean of KL(p||q) and KL(q||p): what the `tuned-lens` package calls JS."""
    max_difference: Float[Tensor, "layers batch pos"]
    """Largest |p - q| of one token: what the `tuned-lens` package calls total variation."""


def trajectory(
    lm: LanguageModel,
    text: str | Int[Tensor, "*batch pos"] | Sequence[int],
    lens: TunedLens | None = None,
    *,
    mask: Bool[Tensor, "batch pos"] | None = None,
    targets: Int[Tensor, "*batch pos"] | None = None,
    anti_targets: Int[Tensor, "*batch pos"] | None = None,
    token_shift: int = 1,
    top_k: int = 10,
    choices: Sequence[int] | None = None,
    mask_input: bool = False,
    keep_log_probs: bool = False,
) -> Trajectory:
    """Read a passage (or a padded batch) through a lens.

    Args:
        lm: the model.
        text: a string, the ids of one passage, or ids of shape (batch, pos).
        lens: the logit lens by default.
        mask: True at real tokens.
        targets: ids that predictions are scored against, in the shape of the tokens; by default the tokens
            `token_shift` positions on, and none where the passage has ended. Negative ids mean "no target".
        anti_targets: ids that targets are held against.
        token_shift: see `targets`.
        top_k: how many top tokens to keep.
        choices: ids of the answers of a multiple-choice question, whose log-probabilities are kept.
        mask_input: remove the tokens of the passage from the vocabulary, so that repetition does not hide the rest.
        keep_log_probs: keep all log-probabilities: (layers + 1) x tokens x vocabulary floats.

    Raises:
        SondeError: for targets of another shape, ids outside the vocabulary and too long passages.

    """
    lens = TunedLens.logit(lm) if lens is None else lens
    lens.check_fits(lm, "the lens")
    tokens, mask = _tokens(lm, text, mask)
    last = f"resid_post.{lm.n_layers - 1}"
    with torch.no_grad(), lm.reading(*lens.sites, last) as read:
        lm(tokens, mask)
    tokens, mask = tokens.to(lm.device), mask.to(lm.device)
    states = {site: value.detach() for site, value in read.items()}
    views = (
        *(_View(lens, states[site], layer) for layer, site in enumerate(lens.sites)),
        _View(lens, states[last], None),
    )
    if targets is None:
        here, there = paired(mask, token_shift)
        targets = torch.full_like(tokens, -1)
        targets[here] = tokens[there]
    targets = _beside("targets", targets, tokens, lm)
    anti = None if anti_targets is None else _beside("anti_targets", anti_targets, tokens, lm)
    removed = _removed(tokens, mask, lm) if mask_input else None
    if not 1 <= top_k <= lm.vocab_size:
        raise SondeError(f"top_k is {top_k}; it must be between 1 and the vocabulary's {lm.vocab_size}")
    table = _Table(len(views), tokens, lm.vocab_size, top_k, choices, anti is not None, keep_log_probs)
    place = mask.nonzero()
    with torch.no_grad():
        for part in _chunks(len(place), lm.vocab_size):
            b, t = place[part].unbind(1)
            gone = None if removed is None else removed[b]
            final = views[-1].log_probs(b, t, gone)
            for row, view in enumerate(views):
                logq = final if row == len(views) - 1 else view.log_probs(b, t, gone)
                table.fill(row, b, t, logq, final, targets[b, t], None if anti is None else anti[b, t])
    return Trajectory(
        sites=lens.sites, tokens=tokens.cpu(), mask=mask.cpu(), targets=targets.cpu(), views=views, removed=removed,
        **table.found,
    )  # fmt: skip


def prediction_depth(answers: Int[Tensor, "layers *tokens"]) -> Int[Tensor, "*tokens"]:
    """First index from which the answer equals the last one and stays so.

    Over layers this is the prediction depth; over training checkpoints it is the iteration at which the answer is
    learned.
    """
    same = answers == answers[-1]
    stays = same.flip(0).cumprod(0).sum(0)
    return len(answers) - stays


def decided(depth: Int[Tensor, " tokens"], rows: int) -> Float[Tensor, " rows"]:
    """Share of tokens whose prediction depth is at most each row. Raises `SondeError` without tokens."""
    if not len(depth):
        raise SondeError("there are no tokens whose prediction could be decided")
    return (depth[None].cpu() <= torch.arange(rows)[:, None]).double().mean(-1)


@dataclass(frozen=True)
class _View:
    """One row of a trajectory: hidden states and how to read them."""

    lens: TunedLens
    hidden: Float[Tensor, "batch pos d_model"]
    layer: int | None  # None: the model's own output

    @property
    def vocab_size(self) -> int:
        return self.lens.unembedding.weight.shape[0]

    def log_probs(self, b: Tensor, t: Tensor, removed: Tensor | None) -> Float[Tensor, "n vocab"]:
        hidden = self.hidden[b.to(self.hidden.device), t.to(self.hidden.device)]
        logits = self.lens.unembedding(hidden) if self.layer is None else self.lens(hidden, self.layer)
        if removed is not None:
            logits = logits.masked_fill(removed, -torch.inf)
        return information.log_probs(logits)


class _Table:
    """The statistics of a trajectory while they are filled in."""

    def __init__(
        self, rows: int, tokens: Tensor, vocab: int, top_k: int, choices: Sequence[int] | None, anti: bool, keep: bool
    ) -> None:
        shape = (rows, *tokens.shape)
        self._choices = None
        if choices is not None:
            self._choices = torch.tensor(list(choices), device=tokens.device)
            if not len(self._choices) or self._choices.min() < 0 or self._choices.max() >= vocab:
                raise SondeError(f"choices are one or more token ids below {vocab}, not {list(choices)}")
        self._top_k = top_k

        def gaps(*more: int) -> Tensor:
            return torch.full((*shape, *more), torch.nan)

        self.found: dict[str, Any] = {
            "entropy": gaps(),
            "max_probability": gaps(),
            "kl": gaps(),
            "cross_entropy": gaps(),
            "rank": torch.full(shape, -1),
            "top_tokens": torch.full((*shape, top_k), -1),
            "top_log_probs": gaps(top_k),
            "log_probability_difference": gaps() if anti else None,
            "choice_log_probs": None if self._choices is None else gaps(len(self._choices)),
            "log_probs": gaps(vocab) if keep else None,
        }

    def fill(
        self, row: int, b: Tensor, t: Tensor, logq: Tensor, final: Tensor, target: Tensor, anti: Tensor | None
    ) -> None:
        """Statistics of one chunk of tokens in one row."""
        put = self._putter(row, b, t)
        put("entropy", information.entropy(logq))
        put("kl", information.kl(final, logq))
        top, ids = logq.topk(self._top_k)
        put("max_probability", top[:, 0].exp())
        put("top_tokens", ids)
        put("top_log_probs", top)
        given = target >= 0
        safe = target.clamp(min=0)
        put("cross_entropy", information.cross_entropy(logq, safe).masked_fill(~given, torch.nan))
        put("rank", rank_of(logq, safe).masked_fill(~given, -1))
        if anti is not None:
            difference = logq.gather(-1, torch.stack([safe, anti.clamp(min=0)], -1)).diff(dim=-1).neg().squeeze(-1)
            put("log_probability_difference", difference.masked_fill(~given | (anti < 0), torch.nan))
        if self._choices is not None:
            put("choice_log_probs", logq[:, self._choices])
        if self.found["log_probs"] is not None:
            put("log_probs", logq)

    def _putter(self, row: int, b: Tensor, t: Tensor):
        b, t = b.cpu(), t.cpu()

        def put(name: str, values: Tensor) -> None:
            whole = self.found[name]
            whole[row, b, t] = values.cpu().to(whole.dtype)

        return put


def _aitchison(p: Tensor, q: Tensor) -> Tensor:
    return information.aitchison(p, q, (p.exp() + q.exp()) / 2)


_DISTANCES = {
    "kl": information.kl,
    "js": information.js,
    "tv": information.tv,
    "aitchison": _aitchison,
    "mean_kl": information.mean_kl,
    "max_difference": information.max_difference,
}


def _chunks(n: int, vocab: int) -> list[slice]:
    size = max(16, _CHUNK_ELEMENTS // vocab)
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def _tokens(
    lm: LanguageModel, text: str | Tensor | Sequence[int], mask: Tensor | None
) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
    if isinstance(text, str):
        tokens = torch.tensor([lm.encode(text)])
    elif isinstance(text, Tensor):
        tokens = text if text.ndim == 2 else text[None]
    else:
        tokens = torch.tensor([list(text)])
    if not tokens.numel():
        raise SondeError("there is no text to read through the lens")
    if mask is None:
        mask = torch.ones_like(tokens, dtype=torch.bool)
    return tokens, mask


def _beside(name: str, given: Tensor, tokens: Tensor, lm: LanguageModel) -> Int[Tensor, "batch pos"]:
    given = given if given.ndim == 2 else given[None]
    if given.shape != tokens.shape:
        raise SondeError(f"{name} of shape {tuple(given.shape)} for tokens of shape {tuple(tokens.shape)}")
    if given.is_floating_point() or int(given.max()) >= lm.vocab_size:
        raise SondeError(f"{name} are token ids below {lm.vocab_size}")
    return given.to(tokens.device)


def _removed(tokens: Tensor, mask: Tensor, lm: LanguageModel) -> Bool[Tensor, "batch vocab"]:
    removed = torch.zeros(len(tokens), lm.vocab_size, dtype=torch.bool, device=tokens.device)
    for row, (ids, real) in enumerate(zip(tokens, mask, strict=True)):
        removed[row, ids[real]] = True
    return removed
