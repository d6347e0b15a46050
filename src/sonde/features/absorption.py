"""Does a latent for "begins with S" go silent on "short", because a latent for "short" has taken that over?

Feature absorption (Chanin et al. 2409.14507), on rows x of single words with the class of each, its first letter. For
each letter, a logistic probe w on the activations says what the letter is, and its main latents are found by k-sparse
probing: latents are added while the F1 of a probe on them rises by more than 0.03. On test words that the probe gets
right, with a_i = f_i W_dec[i]·ŵ the part of the projection x·ŵ that latent i gives, and c_i = cos(W_dec[i], w):

- *full*: no main latent fires, the latent of the largest a_i has c_i >= 0.025, x·ŵ >= 0 and a_i >= 0.4 x·ŵ;
- *fraction*: the up to three largest a_i > 0 of latents that are not main and have c_i >= 0.1 are the absorbers. Where
  their sum A is under 0.4 x·ŵ, or the main latents' sum M reaches x·ŵ, it is 0; where M <= 0, 1; otherwise
  A' / (A' + M) with A' = min(A, x·ŵ - M).

Both are averaged over those words. Departures from SAEBench: main latents are ranked by the difference of their
means and not by an L1 probe, and a_i uses the decoder row as it is in place of its direction, which is the same for
rows of length 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sonde.errors import SondeError
from sonde.features.dictionary import Dictionary, Sparse
from sonde.features.sparse_probing import by_mean_difference, columns, encoded, probe_margins
from sonde.lm.model import LanguageModel
from sonde.lm.prompt_rows import at_position
from sonde.stats.intervals import Interval, bootstrap_mean
from sonde.stats.logistic import logistic

FULL_COSINE, FRACTION_COSINE, PROPORTION, MOST_ABSORBERS = 0.025, 0.1, 0.4, 3
F1_RISE, MOST_MAIN = 0.03, 10
_LEAST = 10


@dataclass(frozen=True)
class LetterAbsorption:
    """One class: its main latents, words that the probe gets right, and both rates of absorption on them.

    absorbers: the latents that took a word over in full, each as often as it did.
    """

    letter: str
    main: tuple[int, ...]
    words: int
    full: float
    fraction: float
    absorbers: tuple[int, ...]


@dataclass(frozen=True)
class Absorption:
    """Rates over all words that probes get right, with bootstrap intervals over words; and by letter."""

    full: Interval
    fraction: Interval
    letters: tuple[LetterAbsorption, ...]


def absorption(
    dictionary: Dictionary,
    x: Float[Tensor, "n d"],
    letters: Sequence[str],
    *,
    test: float = 0.5,
    least: int = _LEAST,
    seed: int = 0,
) -> Absorption:
    """Absorption of classes of words.

    Args:
        dictionary: of the site that the rows were read at.
        x: an activation of each word.
        letters: the class of each word.
        test: share of the words of each class that probes are not fitted on; absorption is counted there.
        least: classes with fewer words are left out.
        seed: of the split.

    Raises:
        SondeError: for a transcoder (it explains another site), fewer than two classes of enough words, and where no
            probe gets a test word right.

    """
    if dictionary.design.transcodes or dictionary.design.layer_norm:  # its rows are not parts of the words' vectors
        raise SondeError(f"{dictionary!r}: absorption needs decoder rows in the space of the words' own activations")
    if len(letters) != len(x):
        raise SondeError(f"{len(letters)} letters for {len(x)} rows: give one a row")
    if not 0 < test < 1:
        raise SondeError(f"test is {test}: give a share between 0 and 1")
    names, number = np.unique(np.asarray(letters), return_inverse=True)
    counts = np.bincount(number)
    kept = [i for i in range(len(names)) if counts[i] >= least]
    if len(kept) < 2:
        raise SondeError(f"{len(kept)} letters have {least} words or more: at least 2 are needed")
    x = x.float()
    sparse = encoded(dictionary, x)
    held = _held(number, test, seed)
    train = (~held).nonzero()[:, 0]
    of_words: list[Tensor] = []
    found = []
    for i in kept:
        y = torch.from_numpy(number == i)
        probe = logistic(x[train][None], y[train].double())
        margins = x.double() @ probe.weight[0] + probe.bias[0]
        right = (held & y & (margins > 0)).nonzero()[:, 0]
        main = _main_latents(dictionary, sparse, y, train)
        chosen = Sparse(*(part[right] for part in sparse))
        full, fraction, top = _measures(dictionary, x[right], chosen, probe.weight[0], main)
        of_words.append(torch.stack([full.double(), fraction], 1))
        found.append(
            LetterAbsorption(
                str(names[i]),
                tuple(main.tolist()),
                len(right),
                float(full.double().mean()) if len(right) else 0.0,
                float(fraction.mean()) if len(right) else 0.0,
                tuple(sorted(top[full].tolist())),
            )
        )
    table = torch.cat(of_words).numpy()
    if len(table) < 2:
        raise SondeError(f"the probes get {len(table)} test words right: there is nothing that could be absorbed")
    full, fraction = (bootstrap_mean(table[:, column], seed=seed) for column in range(2))
    return Absorption(full, fraction, tuple(found))


def word_rows(
    lm: LanguageModel, site: str, *, examples: int = 5, limit: int = 4000, seed: int = 0, batch: int = 64
) -> tuple[Float[Tensor, "n d"], list[str], list[str]]:
    """Activations at single-token words after lines that spell others (" tree: T"), the words and their first letters.

    Words are the tokens of the vocabulary that are a space and three letters or more; `limit` of them are drawn. All
    lines before a word are drawn anew from the words. Raises `SondeError` for a model without a tokenizer or words.
    """
    if lm.tokenizer is None:
        raise SondeError(f"{lm.name} was made without a tokenizer: it has no words")
    ids = list(range(lm.vocab_size))
    words = {i: text.strip() for i, text in zip(ids, lm.token_strings(ids), strict=True) if _is_word(text)}
    if len(words) < 2:
        raise SondeError(f"{lm.name} has {len(words)} tokens that are whole words: at least 2 are needed")
    rng = np.random.default_rng(seed)
    pool = np.array(sorted(words))
    chosen = rng.permutation(pool)[:limit]
    letters = {word[0].upper() for word in words.values()}
    spelled = {letter: lm.tokenizer(f": {letter}\n", add_special_tokens=False)["input_ids"] for letter in letters}
    prompts = []
    for word in chosen.tolist():
        lines = [[other, *spelled[words[other][0].upper()]] for other in rng.choice(pool, examples).tolist()]
        prompts.append([token for line in lines for token in line] + [word])
    x = torch.zeros(len(prompts), 0)
    for numbers, acts in at_position(lm, prompts, [site], batch=batch):
        rows = acts[site].float().cpu()
        if not x.shape[1]:
            x = torch.zeros(len(prompts), rows.shape[1])
        x[numbers] = rows
    texts = [words[word] for word in chosen.tolist()]
    return x, texts, [text[0].upper() for text in texts]


def _measures(
    dictionary: Dictionary,
    x: Float[Tensor, "n d"],
    sparse: Sparse,
    weight: Float[Tensor, " d"],
    main: Int[Tensor, " k"],
) -> tuple[Bool[Tensor, " n"], Float[Tensor, " n"], Int[Tensor, " n"]]:
    """Whether each word is absorbed in full, the fraction that is, and the latent of its largest projection."""
    rows = dictionary.w_dec.detach().double().cpu()
    direction = weight / weight.norm()
    along = rows @ direction
    cosine = along / rows.norm(dim=1).clamp(min=torch.finfo(torch.float64).tiny)
    part = sparse.values.double() * along[sparse.indices]
    whole = x.double() @ direction
    if not part.shape[1] or not len(x):
        nothing = torch.zeros(len(x))
        return nothing.bool(), nothing.double(), nothing.long()
    is_main = torch.isin(sparse.indices, main)
    fired = (sparse.values > 0) & is_main
    best = part.argmax(1, keepdim=True)
    top = sparse.indices.gather(1, best)[:, 0]
    full = ~fired.any(1) & (cosine[top] >= FULL_COSINE) & (whole >= 0)
    full &= part.gather(1, best)[:, 0] >= PROPORTION * whole
    of_main = (part * is_main).sum(1)
    able = part.masked_fill(is_main | (cosine[sparse.indices] < FRACTION_COSINE), 0).clamp(min=0)
    absorbed = able.topk(min(MOST_ABSORBERS, able.shape[1]), dim=1).values.sum(1)
    rest = torch.minimum(absorbed, whole - of_main)
    fraction = torch.where(of_main <= 0, 1.0, (rest / (rest + of_main)).clamp(0, 1))
    none = (whole <= 0) | (of_main >= whole) | (absorbed < PROPORTION * whole)
    return full, fraction.masked_fill(none, 0.0), top


def _main_latents(
    dictionary: Dictionary, sparse: Sparse, y: Bool[Tensor, " n"], train: Int[Tensor, " m"]
) -> Int[Tensor, " k"]:
    """The latents that a class is in: the best, and the next ones while they raise the F1 of a probe by 0.03."""
    best = by_mean_difference(sparse, y, train, dictionary.design.latents, MOST_MAIN, larger=True)
    values = columns(sparse, best)
    reached = -1.0
    for k in range(1, len(best) + 1):
        if not bool(values[train, k - 1].any()):
            return best[: max(1, k - 1)]
        f1 = _f1(probe_margins(values[:, :k], y, train)[train] > 0, y[train])
        if k > 1 and f1 <= reached + F1_RISE:
            return best[: k - 1]
        reached = f1
    return best


def _f1(said: Bool[Tensor, " n"], truth: Bool[Tensor, " n"]) -> float:
    right = int((said & truth).sum())
    return 2 * right / max(1, int(said.sum()) + int(truth.sum()))


def _held(number: np.ndarray, test: float, seed: int) -> Bool[Tensor, " n"]:
    """The words that are tested on: a share of every class."""
    rng = np.random.default_rng(seed)
    held = torch.zeros(len(number), dtype=torch.bool)
    for value in np.unique(number):
        rows = rng.permutation(np.flatnonzero(number == value))
        held[torch.from_numpy(rows[: max(1, round(test * len(rows)))])] = True
    return held


def _is_word(text: str) -> bool:
    return text.startswith(" ") and len(text) > 3 and text[1:].isascii() and text[1:].isalpha()
