"""What does a model hold at the end of a question, and after each of its two answers?

For every prompt and layer: the state h of the last prompt token, and the contrast pair (h-, h+), the states of the
answer's token when the model is made to read the negative or the positive answer (Burns et al. 2212.03827; Mallen &
Belrose 2312.01037). The model's own log-odds are the difference of the two answers' logits behind the prompt.

The prompt runs once. Its memory is forked for the two answers, so that the second does not follow the first (a cache
that is continued in place gives it that; in a toy model the error is 0.42 of the state). Prompts of nearly one length
share a batch, with pads to the left where the family is known to ignore them, and of exactly one length elsewhere. A
family that cannot be continued from its cache reads prompt and answer whole.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from sonde.errors import SondeError
from sonde.files import load_bundle, save_bundle
from sonde.knowledge.layer_moments import LayerMoments, Part
from sonde.lm.continuation import continuation
from sonde.lm.generation import left_padded
from sonde.lm.model import LanguageModel
from sonde.lm.prompt_rows import Prompts, like_lengths, prompt_ids

FORMAT = "sonde states 1"
_END = 8  # characters of a prompt that decide how the answer behind it is tokenised

Answer = str | int


@dataclass(frozen=True)
class States:
    """States of n prompts at all layers, float32. Made by `extract`, by `States.load`, or from arrays of one's own.

    Attributes:
        last: state of the last prompt token.
        pair: states of the answer's token, for the negative and the positive answer.
        lm_log_odds: logit of the positive answer less that of the negative one.
        sites: what the layers are.
        model_name: name of the model.
        model_hash: hash of its weights; "" where the states come from elsewhere.

    Raises `SondeError` for shapes that do not fit, and for numbers that are not finite, with row and layer.

    """

    last: Float[Tensor, "n layers d"]
    pair: Float[Tensor, "n layers 2 d"]
    lm_log_odds: Float[Tensor, " n"]
    sites: tuple[str, ...]
    model_name: str = "model"
    model_hash: str = ""

    def __post_init__(self) -> None:
        n, layers, d = self.last.shape
        if self.pair.shape != (n, layers, 2, d) or self.lm_log_odds.shape != (n,) or len(self.sites) != layers:
            raise SondeError(
                f"states of shapes {tuple(self.last.shape)}, {tuple(self.pair.shape)} and "
                f"{tuple(self.lm_log_odds.shape)} at {len(self.sites)} sites: expected (n, layers, d), "
                "(n, layers, 2, d), (n) and a site for each layer"
            )
        for name, values in (("last", self.last[:, :, None]), ("pair", self.pair)):
            # A sum is finite unless a term is not, or it overflows: one pass that makes no mask.
            if not bool(values.sum().isfinite()):
                bad = (~values.isfinite()).any(-1).any(-1).nonzero()
                if len(bad):
                    row, layer = bad[0].tolist()
                    raise SondeError(f"the state ({name}) of row {row} at {self.sites[layer]} is not finite")

    def __len__(self) -> int:
        return len(self.last)

    def __getitem__(self, rows: slice | Sequence[int] | Int[Tensor, " m"] | Bool[Tensor, " n"] | Any) -> "States":
        """The states of some rows: a slice, numbers or a mask."""
        if isinstance(rows, int):
            raise TypeError("states are taken by slices, lists of numbers or masks: states[i : i + 1] is one row")
        chosen = torch.arange(len(self))[rows if isinstance(rows, slice) else torch.as_tensor(rows)]
        return States(
            _by_layer(self.last)[:, chosen].transpose(0, 1),
            _by_layer(self.pair)[:, chosen].transpose(0, 1),
            self.lm_log_odds[chosen],
            self.sites,
            self.model_name,
            self.model_hash,
        )

    @property
    def d(self) -> int:
        """Width of a state."""
        return self.last.shape[-1]

    @cached_property
    def moments(self) -> LayerMoments:
        """Means and covariances of these rows, computed once and shared by all probes that are fitted on them."""
        return LayerMoments({"last": self.by_layer("last"), "pair": self.by_layer("pair")})

    def by_layer(self, part: Part) -> Float[Tensor, "layers n width"]:
        """Rows of each layer: "last" (width d), or "pair", (h-, h+) side by side (width 2 d). No copy is made."""
        if part not in ("last", "pair"):
            raise ValueError(f"part {part!r} is unknown: use last or pair")
        rows = _by_layer(self.last if part == "last" else self.pair)
        return rows.flatten(2)

    def require_like(self, sites: Sequence[str], d: int, what: str) -> None:
        """Raise `SondeError` unless the states are of these sites and of width `d`, as `what` is."""
        if len(self.sites) != len(sites) or self.d != d:
            raise SondeError(
                f"{what} is of {len(sites)} layers of width {d}, these states of {len(self.sites)} of width {self.d}"
            )
        if self.sites != tuple(sites):
            one, other = next((a, b) for a, b in zip(sites, self.sites, strict=True) if a != b)
            raise SondeError(f"{what} has {one} where these states have {other}: extract both at the same sites")

    @staticmethod
    def join(parts: Sequence["States"]) -> "States":
        """All rows of several, one after the other. Raises `SondeError` for other sites or widths, or none."""
        if not parts:
            raise SondeError("no states to join")
        first = parts[0]
        for other in parts[1:]:
            other.require_like(first.sites, first.d, "the first of these states")
        return States(
            torch.cat([_by_layer(part.last) for part in parts], 1).transpose(0, 1),
            torch.cat([_by_layer(part.pair) for part in parts], 1).transpose(0, 1),
            torch.cat([part.lm_log_odds for part in parts]),
            first.sites,
            first.model_name,
            first.model_hash,
        )

    def save(self, path: str | Path, *, half: bool = True) -> float:
        """Write one safetensors file; returns what rounding costs: the largest |x - saved x| / |x| of any state.

        In half precision each state has a power of two as its scale, so that nothing overflows and the error stays
        below 2⁻¹¹; `half=False` keeps float32, and the error is 0.
        """
        tree: dict[str, Any] = {
            "format": FORMAT,
            "sites": list(self.sites),
            "model": self.model_name,
            "model_hash": self.model_hash,
            "lm_log_odds": self.lm_log_odds,
        }
        error = 0.0
        for name, values in (("last", _by_layer(self.last)), ("pair", _by_layer(self.pair))):
            if not half:
                tree[name] = values
                continue
            exponent = torch.frexp(values.abs().amax(-1, keepdim=True)).exponent
            kept = torch.ldexp(values, -exponent).half()
            tree[name], tree[f"{name}_exponent"] = kept, exponent.to(torch.int16)
            off = torch.linalg.vector_norm(torch.ldexp(kept.float(), exponent) - values, dim=-1)
            size = torch.linalg.vector_norm(values, dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
            error = max(error, float((off / size).max())) if len(self) else 0.0
        save_bundle(path, {**tree, "rounding": error})
        return error

    @staticmethod
    def load(path: str | Path, *, lm: LanguageModel | None = None) -> "States":
        """Read what `save` wrote.

        Raises `SondeError` for a file that is missing, damaged or something else, and, with `lm`, for the states of
        another model.
        """
        tree = load_bundle(path)
        if not isinstance(tree, dict) or tree.get("format") != FORMAT:
            raise SondeError(f"{path} holds no states")
        if lm is not None and tree["model_hash"] != lm.hash:
            raise SondeError(f"{path} holds states of {tree['model']}, whose weights are not those of {lm.name}")
        rows = {
            name: (
                torch.ldexp(tree[name].float(), tree[f"{name}_exponent"].int())
                if f"{name}_exponent" in tree
                else tree[name]
            ).transpose(0, 1)
            for name in ("last", "pair")
        }
        return States(
            rows["last"], rows["pair"], tree["lm_log_odds"], tuple(tree["sites"]), tree["model"], tree["model_hash"]
        )


@torch.no_grad()
def extract(
    lm: LanguageModel,
    prompts: Prompts,
    answers: Sequence[tuple[Answer, Answer]] | tuple[Answer, Answer],
    *,
    sites: str | Sequence[str] = "resid_post.*",
    batch: int = 64,
    progress: str | None = None,
) -> States:
    """States of every prompt at all `sites`, in one pass over the prompts.

    Args:
        lm: the model. (Encoders and encoder-decoders are refused when it is wrapped.)
        prompts: strings, or token ids.
        answers: the negative and the positive answer, of all prompts or of each (templates differ in theirs): strings
            with their leading space, or token ids.
        sites: names or patterns of sites of one width; no logits, no states.
        batch: most prompts of a forward pass.
        progress: what a progress bar is called; None shows none.

    Raises:
        SondeError: for an empty prompt, a prompt that does not fit the model's context with its answer (nothing is ever
            cut), answers that are not one token or share the first, sites without a vector at a token or of several
            widths, and states that are not finite.

    """
    names = lm.match(*([sites] if isinstance(sites, str) else sites))
    wrong = [site for site in names if site == "logits" or site.startswith("state.")]
    if wrong:
        raise SondeError(f"{wrong[0]} has no vector at a token: give sites such as resid_post.* or mlp_out.*")
    rows = prompt_ids(lm, prompts)
    if not rows:
        raise SondeError("no prompts: there is nothing to read")
    tokens = answer_tokens(lm, prompts, rows, answers)
    _check_lengths(lm, rows)
    how = continuation(lm.model)
    read = _read_whole if how.mode == "none" else _read_forked
    equal = how.ignores_mask and how.mode != "none"
    last = pair = torch.empty(0)
    log_odds = torch.empty(len(rows), dtype=torch.float32)
    with tqdm(total=len(rows), desc=progress, disable=progress is None, unit="prompt") as bar:
        for chosen in like_lengths([len(ids) for ids in rows], batch, equal=equal):
            acts, logits = read(lm, [rows[i] for i in chosen], tokens[chosen], names)
            widths = {site: part.shape[-1] for site, (part, _) in acts.items()}
            if len(set(widths.values())) != 1:
                raise SondeError(f"sites of several widths cannot be read together: {widths}")
            if not last.numel():
                shape = len(names), len(rows)
                last, pair = torch.empty(*shape, *(d := widths[names[0]],)), torch.empty(*shape, 2, d)
            for layer, site in enumerate(names):
                at_prompt, at_answer = acts[site]
                last[layer, chosen] = at_prompt.float().cpu()
                pair[layer, chosen] = at_answer.float().cpu()
            given = logits.float().gather(1, tokens[chosen].to(logits.device)).cpu()
            log_odds[chosen] = given[:, 1] - given[:, 0]
            bar.update(len(chosen))
    return States(last.transpose(0, 1), pair.transpose(0, 1), log_odds, names, lm.name, lm.hash)


def answer_tokens(
    lm: LanguageModel,
    prompts: Prompts,
    rows: Sequence[Sequence[int]],
    answers: Sequence[tuple[Answer, Answer]] | tuple[Answer, Answer],
) -> Int[Tensor, "n 2"]:
    """Ids of the answers as they follow each prompt, whose ids are `rows`.

    An answer is tokenised behind its prompt; where the tokenizer joins the two, alone. Raises `SondeError` for answers
    that are not one token, that share the first, or that are not two for each prompt.
    """
    one = len(answers) == 2 and isinstance(answers[0], str | int)
    pairs = cast("list[tuple[Answer, Answer]]", [answers] * len(rows) if one else list(answers))
    if len(pairs) != len(rows):
        raise SondeError(f"{len(pairs)} pairs of answers for {len(rows)} prompts: give one pair, or one for each")
    known: dict[tuple[str, str], list[int]] = {}
    found = []
    for prompt, ids, both in zip(prompts, rows, pairs, strict=True):
        if len(both) != 2:
            raise SondeError(f"{len(both)} answers: expected two, the negative and the positive")
        split = [_answer_ids(lm, prompt, ids, answer, known) for answer in both]
        if any(len(part) != 1 for part in split) or split[0] == split[1]:
            shown = [lm.token_strings(part) if lm.tokenizer is not None else part for part in split]
            first = split[0][:1] == split[1][:1] and bool(split[0])
            what = "begin with the same token" if first else "are not one token each"
            raise SondeError(f"the answers {both[0]!r} and {both[1]!r} {what}: {shown[0]} and {shown[1]}")
        found.append([part[0] for part in split])
    return torch.tensor(found)


def _answer_ids(
    lm: LanguageModel,
    prompt: str | Sequence[int],
    ids: Sequence[int],
    answer: Answer,
    known: dict[tuple[str, str], list[int]],
) -> list[int]:
    if isinstance(answer, int):
        return [answer]
    end = prompt[-_END:] if isinstance(prompt, str) else ""
    if (answer, end) not in known:
        if lm.tokenizer is None:
            raise SondeError(f"{lm.name} was made without a tokenizer: give answers as token ids instead of text")
        alone = list(lm.tokenizer(answer, add_special_tokens=False, verbose=False)["input_ids"])  # type: ignore[arg-type]
        if isinstance(prompt, str):
            whole = list(lm.tokenizer(prompt + answer, verbose=False)["input_ids"])  # type: ignore[arg-type]
            if whole[: len(ids)] == list(ids) and len(whole) > len(ids):
                alone = whole[len(ids) :]
        known[answer, end] = alone
    return known[answer, end]


def _check_lengths(lm: LanguageModel, rows: Sequence[Sequence[int]]) -> None:
    room = lm.max_positions
    longest = max(range(len(rows)), key=lambda i: len(rows[i]))
    if room is not None and len(rows[longest]) + 1 > room:
        raise SondeError(
            f"prompt {longest} has {len(rows[longest])} tokens, and {lm.name} reads {room} with the answer: shorten it "
            "(prompts are never cut)"
        )


Read = tuple[dict[str, tuple[Float[Tensor, "batch d"], Float[Tensor, "batch 2 d"]]], Float[Tensor, "batch vocab"]]


def _read_forked(
    lm: LanguageModel, rows: Sequence[Sequence[int]], answers: Int[Tensor, "batch 2"], sites: Sequence[str]
) -> Read:
    """One pass over the prompts, one over both answers behind copies of its memory."""
    tokens, mask = left_padded(rows, lm.device)
    with lm.reading(*sites) as acts:
        with _unembedding(lm, slice(-1, None)):
            out = lm(tokens, mask, use_cache=True)
        assert out.past is not None and out.logits is not None
        at_prompt = {site: acts[site][:, -1].clone() for site in sites}
        logits = out.logits[:, -1]
        forked = out.past.select(torch.arange(len(rows)).repeat_interleave(2))
        del out
        with _unembedding(lm, slice(0, 0)):
            lm(answers.reshape(-1, 1).to(lm.device), past=forked)
        return {site: (at_prompt[site], acts[site].view(len(rows), 2, -1)) for site in sites}, logits


def _read_whole(
    lm: LanguageModel, rows: Sequence[Sequence[int]], answers: Int[Tensor, "batch 2"], sites: Sequence[str]
) -> Read:
    """Prompt and answer in one pass, twice a prompt; pads stand to the right, where no causal model sees them."""
    full = [[*ids, int(answer)] for ids, both in zip(rows, answers, strict=True) for answer in both]
    width = max(map(len, full))
    ends = torch.tensor([len(ids) for ids in full], device=lm.device)
    tokens = torch.tensor([ids + [0] * (width - len(ids)) for ids in full], device=lm.device)
    mask = torch.arange(width, device=lm.device) < ends[:, None]
    with lm.reading(*sites, "logits") as acts:
        lm(tokens, mask)
    every = torch.arange(len(full), device=lm.device)
    found = {
        site: (acts[site][every, ends - 2][::2], acts[site][every, ends - 1].view(len(rows), 2, -1)) for site in sites
    }
    return found, acts["logits"][every, ends - 2][::2]


@contextmanager
def _unembedding(lm: LanguageModel, columns: slice) -> Iterator[None]:
    """Unembed some columns only: the logits of all may take more than the blocks, and nobody asks for the others."""

    def cut(_: Any, args: tuple) -> tuple:
        # Contiguous: a view of a few columns is multiplied row by row.
        return (args[0][:, columns].contiguous(), *args[1:])

    hook = lm.structure.head.register_forward_pre_hook(cut)
    try:
        yield
    finally:
        hook.remove()


def _by_layer(values: Float[Tensor, "n layers *rest"]) -> Float[Tensor, "layers n *rest"]:
    """Layers first, as `extract` lays them out in memory."""
    return values.transpose(0, 1).contiguous()
