"""Does the model use what a probe reads? Its last-token state is reflected through the plane of the probe.

    h <- m + (c - 2 (c . u) u),    c = h - m,

with u the probe's unit direction and m the mean state: what the probe reads changes its sign, everything at right
angles to u and the distance from m stay. If the answers follow, the direction has a part in them; a reflection along a
random direction says how much any such blow does (Mallen et al. 2023, arXiv:2312.01037, section 4.4).
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from sonde.errors import SondeError
from sonde.lm.model import LanguageModel
from sonde.lm.prompt_rows import Prompts, like_lengths, prompt_ids
from sonde.stats.intervals import Interval, bootstrap_mean


class Reflection(nn.Module):
    """The edit, `[... d] -> [... d]` in the input's type; `lm.editing({site: Reflection(u, m)}, positions=-1)`.

    `direction` is given at any length. Raises `SondeError` for a direction of length 0 or not finite, and for a mean of
    another shape.
    """

    direction: Float[Tensor, " d"]
    mean: Float[Tensor, " d"]

    def __init__(self, direction: Float[Tensor, " d"], mean: Float[Tensor, " d"]) -> None:
        super().__init__()
        length = float(direction.norm())
        if direction.ndim != 1 or direction.shape != mean.shape:
            raise SondeError(
                f"a direction of shape {tuple(direction.shape)} and a mean of shape {tuple(mean.shape)}: expected one "
                "vector each, as wide as the residual stream"
            )
        if not 0 < length < float("inf"):
            raise SondeError(f"a direction of length {length:g} has no plane to reflect through")
        self.register_buffer("direction", direction.detach().float() / length)
        self.register_buffer("mean", mean.detach().float())

    def forward(self, h: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """The mirrored states."""
        c = h.float() - self.mean
        return (h.float() - 2 * (c @ self.direction)[..., None] * self.direction).to(h.dtype)


@dataclass(frozen=True)
class Reflected:
    """Answers of `n` prompts as they are, under the reflection, and under reflections along random directions.

    Log-odds of the positive answer against the negative: `plain [n]`, `edited [n]`, `random [draws n]`.
    """

    plain: Float[Tensor, " n"]
    edited: Float[Tensor, " n"]
    random: Float[Tensor, "draws n"]

    @property
    def changed(self) -> Float[np.ndarray, " n"]:
        """1 for each prompt whose answer is the other one under the reflection."""
        return ((self.plain > 0) != (self.edited > 0)).double().numpy()

    @property
    def changed_at_random(self) -> Float[np.ndarray, " n"]:
        """For each prompt the share of random directions along which its answer is the other one."""
        return ((self.plain > 0) != (self.random > 0)).double().mean(0).numpy()

    def flipped(self, groups: Int[np.ndarray, " n"] | None = None) -> Interval:
        """Share of the prompts whose answer is the other one under the reflection; resampled by `groups`."""
        return bootstrap_mean(self.changed, groups)

    def flipped_at_random(self, groups: Int[np.ndarray, " n"] | None = None) -> Interval:
        """The same under reflections along random directions, averaged over them."""
        return bootstrap_mean(self.changed_at_random, groups)

    def moved(self, truth: Bool[np.ndarray, " n"], groups: Int[np.ndarray, " n"] | None = None) -> Interval:
        """Mean nats by which the reflection moves the answer away from the truth; negative where towards it."""
        away = torch.from_numpy(1.0 - 2.0 * truth)
        return bootstrap_mean(((self.edited - self.plain).double() * away).numpy(), groups)

    def moved_at_random(self, truth: Bool[np.ndarray, " n"], groups: Int[np.ndarray, " n"] | None = None) -> Interval:
        """The same along random directions, as the mean of their absolute means."""
        away = torch.from_numpy(1.0 - 2.0 * truth)
        each = ((self.random - self.plain).double() * away).mean(1)
        signed = ((self.random - self.plain).double() * away * each.sign()[:, None]).mean(0)
        return bootstrap_mean(signed.numpy(), groups)

    def state(self) -> dict[str, Tensor]:
        """The tensors by name, for `sonde.files.save_bundle`."""
        return dict(vars(self))


@torch.no_grad()
def reflect(
    lm: LanguageModel,
    prompts: Prompts,
    answers: Int[Tensor, "n 2"],
    *,
    site: str,
    direction: Float[Tensor, " d"],
    mean: Float[Tensor, " d"],
    draws: int = 16,
    batch: int = 256,
    seed: int = 0,
    progress: str | None = None,
) -> Reflected:
    """Answer every prompt as it is, with its last token's state at `site` reflected, and along random directions.

    Args:
        lm: the model.
        prompts: strings or token ids.
        answers: ids of the negative and the positive answer of each prompt.
        site: where, such as "resid_post.3".
        direction: of the probe, at any length.
        mean: of the states at `site`.
        draws: number of random directions.
        batch: prompts in a forward pass.
        seed: of the random directions.
        progress: what the progress bar says; none without it.

    Raises:
        SondeError: for directions that have no plane, sites that do not exist, prompts and answers of other numbers.

    """
    if len(prompts) != len(answers) or not prompts:
        raise SondeError(f"{len(prompts)} prompts and {len(answers)} pairs of answers: expected one pair for each")
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(draws, len(mean), generator=generator)
    edits = [None, Reflection(direction, mean), *(Reflection(one, mean) for one in random)]
    edits = [edit if edit is None else edit.to(lm.device) for edit in edits]
    rows = prompt_ids(lm, prompts)
    deepest = f"resid_post.{lm.n_layers - 1}"
    found = torch.empty(len(edits), len(rows))
    groups = like_lengths([len(ids) for ids in rows], batch, equal=False)
    for chosen in tqdm(groups, desc=progress, unit="batch", disable=progress is None):
        lengths = torch.tensor([len(rows[i]) for i in chosen])
        # Pads to the right, where no causal model sees them: an edit of one token needs no cache.
        tokens = pad_sequence([torch.tensor(rows[i]) for i in chosen], batch_first=True)
        mask = torch.arange(tokens.shape[1]) < lengths[:, None]
        for number, edit in enumerate(edits):
            with lm.editing({} if edit is None else {site: edit}, positions=-1), lm.reading(deepest) as acts:
                lm(tokens, mask)
            ends = acts[deepest][torch.arange(len(chosen)), lengths - 1]
            last = lm.unembed(ends).float().cpu()
            pair = last.gather(1, answers[chosen])
            found[number, chosen] = pair[:, 1] - pair[:, 0]
    return Reflected(found[0], found[1], found[2:])
