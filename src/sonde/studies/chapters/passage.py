"""One passage, token by token and layer by layer: what would the model have said if it had stopped here?"""

import math

import numpy as np

from sonde.lens.trajectory import Trajectory, trajectory
from sonde.runs.blocks import Chapter, Statistic, TokenView
from sonde.runs.report.numbers import number
from sonde.studies.chapters.part import Part

_TOP = 5


class Passage(Part):
    """A token view of the window in the middle of the held half."""

    name = "passage"

    def prepare(self) -> None:
        """Fit the tuned lens."""
        _ = self.audit.lens

    def write(self) -> Chapter:
        """The token view."""
        lm, held = self.audit.lm, self.audit.held
        batch = held[held.n_batches // 2]
        window = batch.tokens[len(batch.tokens) // 2]
        read = trajectory(lm, window, self.audit.lens, top_k=_TOP)
        strings = lm.token_strings(window.tolist())
        decided = read.prediction_depth[0, :-1].float().mean()
        return Chapter(
            id=self.name,
            question="What does it think, word by word?",
            answer=(
                f"In this passage of {len(window)} tokens the prediction settles after {number(float(decided), 2)} of "
                f"{lm.n_layers} blocks on average; choose a token to see what each layer would have said."
            ),
            blocks=[self._view(read, strings)],
            not_shown=(
                "One passage is an example, not evidence: the window is the one in the middle of the held text. What a "
                "layer would have said is what the tuned lens reads from it."
            ),
            how=(
                "The same tuned lens as in the chapter on depth. Everything shown at a token is about its prediction "
                "from the tokens before it, so the first token has none. Surprisal: -log2 of the probability of the "
                "token that came. Rank 1: it was the most likely. The last row is the model's own output."
            ),
        )

    def _view(self, read: Trajectory, strings: list[str]) -> TokenView:
        bits = 1 / math.log(2)
        assert read.cross_entropy is not None and read.rank is not None
        top = _shifted(read.top_tokens[:, 0].numpy(), -1)
        vocabulary = sorted(set(np.unique(top).tolist()) - {-1})
        surprisal = bits * read.cross_entropy[:, 0].numpy()
        return TokenView(
            id="passage.view",
            title="One passage, token by token",
            caption="The stronger the colour, the more of the chosen statistic at the chosen layer.",
            tokens=strings,
            sites=[*(f"input of block {i}" for i in range(len(read.sites))), "output"],
            statistics=[
                Statistic(name="surprisal", unit="bits", values=_shifted(surprisal, np.nan)),
                Statistic(name="entropy", unit="bits", values=_shifted(bits * read.entropy[:, 0].numpy(), np.nan)),
                Statistic(name="KL to final", unit="bits", values=_shifted(bits * read.kl[:, 0].numpy(), np.nan)),
                Statistic(name="probability of the token", unit="", values=_shifted(2.0**-surprisal, np.nan), max=1.0),
            ],
            top=top,
            top_log2p=_shifted(bits * read.top_log_probs[:, 0].numpy(), np.nan),
            vocabulary=dict(zip(vocabulary, self.audit.lm.token_strings(vocabulary), strict=True)),
            rank=_shifted(read.rank[:, 0].numpy(), 0),
            target_ids=read.tokens[0].tolist(),
            start=(min(40, len(strings) - 1), -1),
        )


def _shifted(values: np.ndarray, first: float) -> np.ndarray:
    """Move what was predicted at a position to the token that it predicts, shape (layers, pos, ...)."""
    moved = np.full_like(values, first)
    moved[:, 1:] = values[:, :-1]
    return moved
