"""A language model with named sites: read activations, edit them, stop early, continue from a cache.

`LanguageModel` wraps any Hugging Face causal language model without changing what it computes. Everything else in Sonde
that takes a model takes one of these.
"""

import hashlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sonde.errors import SondeError
from sonde.lm.continuation import call, continuation
from sonde.lm.state import Cache
from sonde.lm.structure import find_structure
from sonde.lm.taps import Edit, Frame, Positions, Taps
from sonde.lm.token_text import token_strings
from sonde.lm.unembedding import Unembedding

if TYPE_CHECKING:
    from sonde.lm.selfcheck import Check
    from sonde.lm.stream import Batch

_UNBOUNDED_CONTEXT = 2048


@dataclass
class Past:
    """What a forward pass left behind to continue from: the cache, the mask so far, the number of real prompt tokens.

    `fresh` until it has been continued from: edits of `state.i` apply to a fresh one only.
    """

    cache: Cache
    mask: Bool[Tensor, "batch pos"]
    prompt: Int[Tensor, " batch"]
    fresh: bool = True

    def select(self, rows: Int[Tensor, " rows"]) -> "Past":
        """An independent copy of chosen rows, which may repeat: one prompt, then many ways on."""
        rows = rows.to(self.mask.device)
        return Past(self.cache.select(rows), self.mask[rows], self.prompt[rows], self.fresh)


@dataclass
class Output:
    """Result of a forward pass: `logits`, or None when it stopped early; `past` where a cache was asked for."""

    logits: Float[Tensor, "batch pos vocab"] | None
    past: Past | None = None


class LanguageModel:
    """A causal language model, its tokenizer and its sites. Made by `sonde.load`, or from a model in memory.

    Args:
        model: any decoder-only Hugging Face model with an unembedding. It is put into eval mode and its weights are
            frozen.
        tokenizer: its tokenizer, or None when only token ids are used.
        name: what reports call it.

    Raises:
        SondeError: for encoders, encoder-decoders and models whose blocks cannot be found.

    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, *, name: str = "model"
    ) -> None:
        if isinstance(model, LanguageModel):
            raise SondeError(f"{model.name} is wrapped already: use it as it is, or wrap its .model")
        _undo_rescaling(model)
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self.structure = find_structure(model)
        self.config = model.config.get_text_config(decoder=True)
        self.unembedding = Unembedding(self.structure, self.config)
        self._taps = Taps(self.structure, name)
        self._accepts = frozenset(inspect.signature(model.forward).parameters)

    def __repr__(self) -> str:
        return f"LanguageModel({self.name!r}, {self.family}, {self.n_layers} layers, d_model {self.d_model})"

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of all sites in order of depth."""
        return self._taps.sites

    @property
    def family(self) -> str:
        """The architecture's name in transformers, such as `gpt_neox`."""
        return self.config.model_type

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return len(self.structure.blocks)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.config.hidden_size

    @property
    def vocab_size(self) -> int:
        """Number of logits."""
        return self.unembedding.weight.shape[0]

    @property
    def max_positions(self) -> int | None:
        """The longest context that the configuration allows, or None where it states no limit."""
        return getattr(self.config, "max_position_embeddings", None)

    @property
    def context(self) -> int:
        """Context to read text with: `max_positions`, or 2,048 where there is no limit."""
        return self.max_positions or _UNBOUNDED_CONTEXT

    @property
    def device(self) -> torch.device:
        """Where the embedding is, and so where tokens go."""
        return self.structure.embedding.weight.device  # type: ignore[return-value]

    @property
    def dtype(self) -> torch.dtype:
        """Number type of the weights."""
        return self.model.dtype

    @property
    def n_parameters(self) -> int:
        """Number of parameters; tied weights count once."""
        return sum(p.numel() for p in self.model.parameters())

    @cached_property
    def hash(self) -> str:
        """SHA-256 over names and numbers of all weights."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    def match(self, *patterns: str) -> tuple[str, ...]:
        """Site names that patterns name, in order of depth: names, globs (`mlp_out.*`), slices (`resid_post.2:5`)."""
        return self._taps.match(*patterns)

    def reading(self, *patterns: str) -> AbstractContextManager[dict[str, Any]]:
        """Collect activations at sites: `with lm.reading("resid_post.3") as acts: lm(tokens)`.

        The dict holds Float[Tensor, "batch pos d_model"] by site after each call ("logits": "batch pos vocab";
        `state.i`: a dict of tensors, the memory after the last token). A call stops after the deepest site that is read
        unless "logits" or a state is among them.
        """
        return self._taps.reading(*patterns)

    def editing(
        self, edits: Mapping[str, Edit], *, rows: Sequence[int] | None = None, positions: Positions = None
    ) -> AbstractContextManager[None]:
        """Replace activations by functions of themselves: `with lm.editing({"resid_post.3": f}): lm.generate(...)`.

        `f` takes and returns Float[Tensor, "batch pos d_model"]; at `state.i`, a dict of the memory's tensors, once,
        before a call continues from a `past`. `rows` limits the edit to rows of the batch;
        `positions` (an int, several, or a slice) to real tokens, counted without pads; negative positions count from
        the end of the prompt, so `slice(-1, None)` is the prompt's last token and everything after it. Contexts nest:
        edits at one site apply in the order in which they were entered, and what is read is the edited value.
        """
        return self._taps.editing(edits, rows=rows, positions=positions)

    def __call__(
        self,
        tokens: Int[Tensor, "batch pos"] | str,
        mask: Bool[Tensor, "batch pos"] | None = None,
        *,
        past: Past | None = None,
        use_cache: bool = False,
    ) -> Output:
        """One forward pass under the current reading and editing contexts and the current grad mode.

        Args:
            tokens: ids, or a string to encode.
            mask: True at real tokens; pads stand at one side of each row.
            past: continue after an earlier call that was made with `use_cache=True`. It is used up by this.
            use_cache: return an `Output.past` to continue from.

        Raises:
            SondeError: for ids outside the vocabulary, masks of another shape, and contexts that are too long.

        """
        ids = self._ids(tokens)
        mask = self._mask(ids, mask)
        if past is not None or use_cache or self._taps.reads_state:
            return self._with_cache(ids, mask, past)
        lengths = mask.sum(-1)
        frame = Frame.of(mask, torch.zeros_like(lengths), lengths)
        kwargs: dict[str, Any] = {"use_cache": False} if "use_cache" in self._accepts else {}
        if not bool(mask[:, 0].all()):
            # A causal model never looks at pads to the right of a token: only pads to the left need the mask.
            continuation(self.model).require_mask(self.name)
            kwargs["attention_mask"] = mask.long()
            if "position_ids" in self._accepts:
                kwargs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = None
        with self._taps.forward(frame, stoppable=True):
            logits = self._taps.visit_logits(self.model(input_ids=ids, **kwargs).logits)
        return Output(logits)

    def _with_cache(self, ids: Tensor, mask: Tensor, past: Past | None) -> Output:
        """A pass that leaves a cache, after `past` where there is one, in as many calls as the family needs."""
        how = continuation(self.model)
        columns = [slice(0, ids.shape[1])]
        if past is None:
            cache, before, prompt, seen = None, torch.zeros_like(ids[:, 0]), mask.sum(-1), mask[:, :0]
        else:
            how.require(self.name)
            if len(past.prompt) != len(ids):
                raise SondeError(
                    f"the cache holds {len(past.prompt)} rows, the tokens {len(ids)}: select() the rows that are meant"
                )
            columns = how.columns(ids.shape[1])
            if past.fresh:
                self._taps.edit_states(past.cache)
            cache, before, prompt, seen = past.cache, past.mask.sum(-1), past.prompt, past.mask
        self._fits(seen.shape[1] + ids.shape[1])
        frame = Frame.of(mask, before, prompt)
        mask = torch.cat([seen, mask], 1)
        pieces = []
        with self._taps.joined() as keep:
            for part in columns:
                with self._taps.forward(frame.columns(part), stoppable=False):
                    logits, cache = call(
                        self.model, ids[:, part], cache=cache, mask=mask[:, : seen.shape[1] + part.stop]
                    )
                    pieces.append(self._taps.visit_logits(logits))
                keep()
        assert cache is not None
        self._taps.read_states(cache)
        return Output(torch.cat(pieces, 1), Past(cache, mask, prompt, fresh=past is None))

    def unembed(self, hidden: Float[Tensor, "... d_model"]) -> Float[Tensor, "... vocab"]:
        """Logits of a residual stream after the last block: final norm, head, soft-cap or scale."""
        return self.unembedding(hidden)

    def generate(
        self,
        prompts: Sequence[str] | Sequence[Sequence[int]],
        *,
        max_new_tokens: int = 50,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[Any]:
        """Continue prompts under the current edits; strings give strings, ids give ids (without the prompt).

        `temperature` 0 takes the most likely token; above, tokens are sampled with `seed`. A row ends at the
        tokenizer's end-of-text token.
        """
        from sonde.lm.generation import generate

        if self._taps.reads:
            raise SondeError("generate() runs many forward passes: read activations with lm(tokens) on what it returns")
        return generate(self, prompts, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)

    def stream(self, text: Any = None, *, sites: Sequence[str] = (), **layout: Any) -> "Iterator[Batch]":
        """Batches of tokens with their activations over a text; see `sonde.lm.stream.stream`."""
        from sonde.lm.stream import stream

        return stream(self, text, sites=sites, **layout)

    def check(self) -> "Check":
        """What this model was measured to do: see `sonde.lm.selfcheck.self_check`. Measured once."""
        return self._check

    @cached_property
    def _check(self) -> "Check":
        from sonde.lm.selfcheck import self_check

        return self_check(self)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with the special tokens that the tokenizer adds."""
        return list(self._tokenizer(text)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens included."""
        return str(self._tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    def token_strings(self, ids: Sequence[int]) -> list[str]:
        """The text of each token alone."""
        return token_strings(self._tokenizer, ids)

    @property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise SondeError(f"{self.name} was made without a tokenizer: give token ids instead of text")
        return self.tokenizer

    def _ids(self, tokens: Tensor | str) -> Int[Tensor, "batch pos"]:
        ids = torch.tensor([self.encode(tokens)]) if isinstance(tokens, str) else tokens
        if ids.ndim != 2 or ids.is_floating_point() or not ids.numel():
            raise SondeError(f"tokens are ids of shape (batch, pos), not {ids.dtype} of shape {tuple(ids.shape)}")
        ids = ids.to(self.device)
        low, high = (int(bound) for bound in ids.aminmax())
        if low < 0 or high >= self.vocab_size:
            raise SondeError(f"token id {high if low >= 0 else low} is outside the vocabulary of {self.vocab_size}")
        return ids

    def _mask(self, ids: Tensor, mask: Tensor | None) -> Bool[Tensor, "batch pos"]:
        if mask is None:
            mask = torch.ones_like(ids, dtype=torch.bool)
        if mask.shape != ids.shape:
            raise SondeError(f"the mask has shape {tuple(mask.shape)}, the tokens {tuple(ids.shape)}")
        self._fits(ids.shape[1])
        return mask.to(ids.device, torch.bool)

    def _fits(self, length: int) -> None:
        if self.max_positions is not None and length > self.max_positions:
            raise SondeError(f"{length} tokens are more than the {self.max_positions} positions of {self.name}")


def _undo_rescaling(model: PreTrainedModel) -> None:
    """Run RWKV on the weights that it was trained with.

    Against float16 overflow it halves its residual stream every few blocks in eval mode, by dividing weights in place
    on the first forward pass. Logits do not depend on it; activations, and weights that others hold, do.
    """
    if not hasattr(model.config, "rescale_every"):
        return
    model.train()
    for module in model.modules():
        if hasattr(module, "_rescale_layers"):
            module._rescale_layers()  # type: ignore[operator]
    model.config.rescale_every = 0
