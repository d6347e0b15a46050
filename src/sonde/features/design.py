"""What kind of sparse dictionary is it? Sizes, activation and what belongs to each kind, checked when it is made.

With pre = W_enc (x - b_dec) + b_enc (a transcoder subtracts nothing) and f = act(pre), the output is
W_decᵀ f + b_dec (+ W_skip x). act is relu (Bricken et al. 2023); relu of the k largest (Gao et al. 2406.04093); the
largest of each of k groups; relu of the k n largest of n rows (BatchTopK, 2412.06410), also under losses of nested
prefixes (Matryoshka, 2503.17547); pre above a threshold of each latent (JumpReLU, 2407.14435); a gate times a magnitude
(2404.16014).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any, Literal, get_args

Kind = Literal["relu", "topk", "groupmax", "batchtopk", "matryoshka", "jumprelu", "gated"]
KINDS: tuple[Kind, ...] = get_args(Kind)
WITH_K = ("topk", "groupmax", "batchtopk", "matryoshka")
ACROSS_ROWS = ("batchtopk", "matryoshka")  # kinds that choose among all rows of a batch, and by one threshold later


@dataclass(frozen=True)
class Design:
    """Shape and activation of a dictionary.

    Attributes:
        kind: one of `KINDS`.
        inputs: width d of what is read.
        latents: number M of directions.
        k: active latents a row (on average over rows for "batchtopk" and "matryoshka"); None for the other kinds.
        outputs: width of what is written; `inputs` unless it transcodes.
        transcodes: the output is another site than the input.
        skip: a linear map from input to output beside the latents; transcoders only.
        centred: subtract b_dec from the input; by default where the output is the input.
        multi_topk: add an eighth of the FVU with 4k latents to the loss; "topk" only.
        prefixes: "matryoshka": M_1 < … < M_G = M; by default M/16, M/8, M/4, M/2 and M (those that are whole).
        prefix_weights: w_g of the losses Σ_g w_g MSE_g; by default equal and summing to 1, so that the loss is the mean
            over prefixes (one published implementation divides by G twice).
        threshold: "jumprelu": θ at the start, of every latent.
        bandwidth: "jumprelu": width ε of the window of the straight-through gradients.
        ste_to_input: "jumprelu": the straight-through gradient of the penalty also reaches pre, negated.
        ranked_by_norm: choose by pre times the norm of the latent's decoder row; for decoders of free norms.
        layer_norm: every row is standardised on the way in, and the output is scaled back.
        streams: widths of the P streams of a crosscoder, which lie side by side in the input; the norm of a latent is
            then the sum of the norms of its P parts.

    Raises:
        ValueError: for a field that does not fit; the message names it.

    """

    kind: Kind
    inputs: int
    latents: int
    k: int | None = None
    outputs: int = 0
    transcodes: bool = False
    skip: bool = False
    centred: bool | None = None
    multi_topk: bool = False
    prefixes: tuple[int, ...] = ()
    prefix_weights: tuple[float, ...] = ()
    threshold: float = 0.001
    bandwidth: float = 0.001
    ste_to_input: bool = False
    ranked_by_norm: bool = False
    layer_norm: bool = False
    streams: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind is {self.kind!r}: use one of {', '.join(KINDS)}")
        for name in ("inputs", "latents"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        self._fill("outputs", self.outputs or self.inputs)
        self._fill("centred", not self.transcodes if self.centred is None else self.centred)
        self._check_widths()
        self._check_k()
        self._check_prefixes()
        if self.streams and (min(self.streams) < 1 or sum(self.streams) != self.outputs):
            raise ValueError(f"streams are {self.streams}: they must be widths that sum to outputs = {self.outputs}")
        if not self.bandwidth > 0:
            raise ValueError(f"bandwidth is {self.bandwidth}: it must be above 0")
        if self.threshold < 0:
            raise ValueError(f"threshold is {self.threshold}: it must not be negative")

    def _fill(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_widths(self) -> None:
        if self.outputs < 1:
            raise ValueError(f"outputs is {self.outputs}: it must be at least 1")
        if self.outputs != self.inputs and not self.transcodes:
            raise ValueError(
                f"outputs is {self.outputs} and inputs {self.inputs}: only with transcodes=True they differ"
            )
        if self.skip and not self.transcodes:
            raise ValueError("skip is for transcoders: an autoencoder with a linear path copies its input")
        if self.centred and self.outputs != self.inputs:
            raise ValueError("centred subtracts the bias of the output, so it needs outputs = inputs")
        if self.layer_norm and self.transcodes:
            raise ValueError("layer_norm scales the output back by the input's scale: it is for autoencoders")

    def _check_k(self) -> None:
        k = self.k
        if self.kind not in WITH_K:
            if k is not None:
                raise ValueError(f"k is {k}, but kind {self.kind!r} has none: leave it out")
        elif k is None or k < 1:
            raise ValueError(f"k is {k}: kind {self.kind!r} needs at least 1")
        elif k > self.latents:
            raise ValueError(f"k is {k}, more than the {self.latents} latents")
        elif self.kind == "groupmax" and self.latents % k:
            raise ValueError(
                f"latents is {self.latents}, which is not divisible by k = {k}: groupmax takes k equal groups"
            )
        if self.multi_topk and self.kind != "topk":
            raise ValueError(f"multi_topk is for kind 'topk', not {self.kind!r}")
        if self.ranked_by_norm and self.kind == "groupmax":
            raise ValueError("ranked_by_norm is not for kind 'groupmax'")

    def _check_prefixes(self) -> None:
        if self.kind != "matryoshka":
            if self.prefixes or self.prefix_weights:
                raise ValueError(f"prefixes and prefix_weights are for kind 'matryoshka', not {self.kind!r}")
            return
        ends = tuple(self.prefixes) or tuple(
            self.latents // part for part in (16, 8, 4, 2, 1) if self.latents % part == 0
        )
        if ends[0] < 1 or ends[-1] != self.latents or any(a >= b for a, b in pairwise(ends)):
            raise ValueError(f"prefixes are {ends}: they must increase strictly and end at latents = {self.latents}")
        weights = tuple(self.prefix_weights) or (1 / len(ends),) * len(ends)
        if len(weights) != len(ends) or min(weights) < 0:
            raise ValueError(f"prefix_weights are {weights}: they must be {len(ends)} numbers that are not negative")
        self._fill("prefixes", ends)
        self._fill("prefix_weights", weights)

    @property
    def chooses_across_rows(self) -> bool:
        """Whether training chooses among all rows of a batch, and one threshold chooses afterwards."""
        return self.kind in ACROSS_ROWS

    def to_json(self) -> dict[str, Any]:
        """A tree that JSON can hold."""
        return asdict(self)

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> "Design":
        """The design that `to_json` was taken from. Raises `ValueError` for fields that it does not know."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(tree) - known):
            raise ValueError(f"a design has no field {', '.join(unknown)}: it has {', '.join(sorted(known))}")
        lists = {name: tuple(tree[name]) for name in ("prefixes", "prefix_weights", "streams") if name in tree}
        return cls(**{**tree, **lists})
