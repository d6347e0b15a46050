"""What does the model lose when a dictionary's output stands in place of its activations, as a loss to learn from?

The spliced run goes on from the site with gradients, through later blocks whose weights are frozen. KL(clean ‖ spliced)
is the cross-entropy of the spliced prediction against the clean one, less the clean prediction's own entropy (without
which the number is no divergence); "ce" is the cross-entropy of the tokens that come (Braun et al. 2024,
arXiv:2405.12241). Tokens that dictionaries do not learn from (pads, opening and listed ones) keep their activations.
"""

from typing import Literal

from jaxtyping import Bool, Float
from torch import Tensor

from sonde.errors import SondeError
from sonde.lm.batches import TokenBatch
from sonde.lm.model import LanguageModel
from sonde.lm.resumption import first_block, run_from
from sonde.lm.stream import Batch
from sonde.lm.taps import Edit
from sonde.stats.information import cross_entropy, kl, log_probs

Loss = Literal["kl", "ce"]
LOSSES: tuple[Loss, ...] = ("kl", "ce")


def spliced_logits(
    lm: LanguageModel, batch: TokenBatch, site: str, stream: Float[Tensor, "batch pos width"]
) -> Float[Tensor, "batch pos vocab"]:
    """Logits of a pass in which `site` holds `stream`, with gradients of it where the grad mode asks for them.

    From a site of the residual stream only the blocks above run.
    """
    if site.startswith(("resid_pre.", "resid_post.")):
        return lm.unembed(run_from(lm, first_block(lm, site), stream, batch.tokens, batch.mask))
    with lm.editing({site: lambda old: stream.to(old.dtype)}):
        logits = lm(batch.tokens, batch.mask).logits
    assert logits is not None
    return logits


def spliced_stream(
    output: Edit, batch: Batch, site: str, target: str, taken: Bool[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos width"]:
    """What `target` holds when `output` of `site` stands there at the tokens that are `taken`."""
    old = batch.acts[target]
    out = output(batch.acts[site][taken].float())
    if out.shape[-1] != old.shape[-1]:
        raise SondeError(f"the dictionary writes width {out.shape[-1]}, and {target} has width {old.shape[-1]}")
    return old.clone().index_put((taken,), out.to(old.dtype))


def end_to_end_loss(
    lm: LanguageModel,
    output: Edit,
    batch: Batch,
    taken: Bool[Tensor, "batch pos"],
    *,
    site: str,
    target: str | None = None,
    loss: Loss = "kl",
) -> Float[Tensor, ""]:
    """Nats that the splice costs, a mean over the scored tokens: KL to the clean prediction, or CE of the next token.

    `output` is a dictionary, or any function from rows of `site` to rows of `target` (by default `site`). `batch` has
    the activations at both and, for "kl", at "logits". Raises
    `SondeError` for another loss and for a batch without a scored token.
    """
    if loss not in LOSSES:
        raise SondeError(f"loss is {loss!r}; end to end it is kl or ce")
    target = target or site
    logits = spliced_logits(lm, batch, target, spliced_stream(output, batch, site, target, taken))
    # position t predicts token t + 1: both must be real
    here = batch.mask[:, :-1] & batch.mask[:, 1:]
    if not bool(here.any()):
        raise SondeError(f"batch {batch.index} has no token with a token before it: there is nothing to predict")
    logp = log_probs(logits[:, :-1][here])
    if loss == "ce":
        return cross_entropy(logp, batch.tokens[:, 1:][here]).mean()
    return kl(log_probs(batch.acts["logits"][:, :-1][here]), logp).mean()
