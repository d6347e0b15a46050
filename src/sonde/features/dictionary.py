"""Activations as a sparse sum of directions: x ≈ Σ_i f_i W_dec[i] + b_dec with few f_i above 0.

f = act(W_enc (x - b_dec) + b_enc), where `Design` says what act is and a transcoder subtracts nothing and predicts
another site, perhaps with a linear map beside (Gao et al. 2406.04093; Paulo et al. 2501.18823). Latents are kept as
(values, numbers) of the few that are active; the matrix of all latents of all tokens is made on request only.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sonde.errors import SondeError
from sonde.features import selection
from sonde.features.design import Design
from sonde.features.sparse_ops import Pattern, decode, read

__all__ = ["Active", "Dense", "Design", "Dictionary", "Sparse"]


class Sparse(NamedTuple):
    """Active latents of every row. A slot that is not used has value 0 and index 0; the order is not promised."""

    values: Float[Tensor, "... k"]
    indices: Int[Tensor, "... k"]


class Active(NamedTuple):
    """The same, flat: the pattern of what is kept and f at its entries (0 where pre <= 0 was kept)."""

    pattern: Pattern
    values: Float[Tensor, " entries"]


class Dense(NamedTuple):
    """All latents of every row, and W_enc (x - b_dec) + b_enc (the gate's, for kind "gated")."""

    values: Float[Tensor, "n latents"]
    pre: Float[Tensor, "n latents"]


class Dictionary(nn.Module):
    """A sparse autoencoder or transcoder of one site.

    Made by `Dictionary.initialised(design)`, by training, or by `Dictionary.load(folder)`; the constructor leaves all
    parameters 0. Called on activations it gives their reconstruction, so that an autoencoder can stand as an edit:
    `lm.editing({site: dictionary})`.

    In training mode (`dictionary.train()`) the kinds "batchtopk" and "matryoshka" choose among all rows of the batch;
    otherwise they keep what is above `threshold`, each row by itself, as soon as training has set it.

    Attributes:
        design: sizes and activation.
        w_enc, b_enc: Float[Parameter, "latents inputs"], Float[Parameter, "latents"]; the gate's for kind "gated".
        w_dec, b_dec: Float[Parameter, "latents outputs"] (row i is the direction of latent i), "outputs".
        w_skip: Float[Parameter, "outputs inputs"] or None.
        threshold: θ: Float[Parameter, "latents"] ("jumprelu"), a number ("batchtopk", "matryoshka"; 0 before training)
            or None.
        r_mag, b_mag: of kind "gated", Float[Parameter, "latents"]: the magnitude is (W_enc ⊙ e^r) x + b_mag.
        site, target: sites read and, of a transcoder, predicted.
        model, model_hash, tokenizer_hash: the language model that the activations came from.
        facts: JSON-able facts about how it was made, saved with it.

    """

    def __init__(self, design: Design, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.design = design
        latents, d, d_out = design.latents, design.inputs, design.outputs

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(*shape, device=device))

        self.w_enc, self.b_enc = zeros(latents, d), zeros(latents)
        self.w_dec, self.b_dec = zeros(latents, d_out), zeros(d_out)
        self.w_skip = zeros(d_out, d) if design.skip else None
        gated = design.kind == "gated"
        self.r_mag = zeros(latents) if gated else None
        self.b_mag = zeros(latents) if gated else None
        self.threshold: Tensor | None
        if design.chooses_across_rows:
            self.register_buffer("threshold", torch.zeros((), device=device))
        elif design.kind == "jumprelu":
            self.threshold = nn.Parameter(torch.full((latents,), design.threshold, device=device))
        else:
            self.threshold = None
        self.site: str | None = None
        self.target: str | None = None
        self.model: str | None = None
        self.model_hash: str | None = None
        self.tokenizer_hash: str | None = None
        self.facts: dict[str, Any] = {}
        self.eval()

    @staticmethod
    def initialised(
        design: Design,
        *,
        mean: Float[Tensor, " inputs"] | None = None,
        target_mean: Float[Tensor, " outputs"] | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> "Dictionary":
        """A dictionary before training: rows of W_enc are random and of length 1.

        An autoencoder has W_dec = W_enc, b_enc = 0 and b_dec = `mean`, the mean or the geometric median of some
        activations; without it many latents die if the activations have one. A transcoder has W_dec = 0,
        b_enc = -W_enc `mean`, b_dec = `target_mean` and W_skip = 0. Whatever is not given counts as 0.
        """
        dictionary = Dictionary(design, device=device)
        rows = torch.randn(design.latents, design.inputs, generator=torch.Generator().manual_seed(seed))
        rows /= rows.norm(dim=1, keepdim=True)
        with torch.no_grad():
            dictionary.w_enc.copy_(rows)
            if design.transcodes:
                if mean is not None:
                    dictionary.b_enc.copy_(-(dictionary.w_enc @ mean.to(dictionary.w_enc)))
                if target_mean is not None:
                    dictionary.b_dec.copy_(target_mean)
            else:
                dictionary.w_dec.copy_(rows)
                if mean is not None:
                    dictionary.b_dec.copy_(mean)
        return dictionary

    def __repr__(self) -> str:
        d = self.design
        sizes = f"{d.inputs} -> {d.latents}" + (f" -> {d.outputs}" if d.transcodes else "")
        return f"Dictionary({d.kind}, {sizes}{'' if d.k is None else f', k={d.k}'}, site={self.site!r})"

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.w_enc.device

    def forward(self, x: Float[Tensor, "... inputs"]) -> Float[Tensor, "... outputs"]:
        """The reconstruction, or a transcoder's prediction, in the type of `x`."""
        return self.reconstruct(x)

    def encode(self, x: Float[Tensor, "... inputs"]) -> Sparse:
        """Active latents of every row. k slots in a row, or as many as the fullest row of the batch has.

        Gradients reach the encoder and `x` through the values. Raises `SondeError` for another width than `inputs`.
        """
        rows, _, _ = self.rows(x)
        pattern, values = self.active(rows)
        if self.design.kind in ("topk", "groupmax") and self.design.k is not None:
            slots = (*x.shape[:-1], self.design.k)
            kept = values.reshape(slots)
            return Sparse(kept, torch.where(kept > 0, pattern.latents.reshape(slots), 0))
        lengths = pattern.starts.diff()
        width = int(lengths.max()) if len(lengths) else 0
        place = pattern.rows * width + torch.arange(len(values), device=values.device) - pattern.starts[pattern.rows]
        flat = values.new_zeros(pattern.n * width).index_put((place,), values)
        indices = torch.zeros_like(flat, dtype=torch.int64).index_put((place,), pattern.latents)
        slots = (*x.shape[:-1], width)
        return Sparse(flat.reshape(slots), torch.where(flat > 0, indices, 0).reshape(slots))

    def decode(self, sparse: Sparse) -> Float[Tensor, "... outputs"]:
        """Σ_i f_i W_dec[i] + b_dec, without a skip: what the latents alone say. Gradients reach values and weights."""
        values, indices = sparse
        flat = indices.reshape(-1, indices.shape[-1])
        out = decode(values.reshape(-1), self.w_dec, Pattern.of_indices(flat, self.design.latents)) + self.b_dec
        return out.reshape(*values.shape[:-1], -1)

    def reconstruct(self, x: Float[Tensor, "... inputs"], *, prefix: int | None = None) -> Float[Tensor, "... outputs"]:
        """The output for `x`, skip included; with `prefix`, from the first latents only (of those that are active).

        In training mode the kinds without k go through all latents, so that thresholds get their gradients.
        """
        rows, mean, scale = self.rows(x)
        if self.training and self.design.k is None:
            values = self.dense(rows).values
            out = values[:, :prefix] @ self.w_dec[:prefix]
        else:
            pattern, values = self.active(rows)
            if prefix is not None:
                values = values * (pattern.latents < prefix)
            out = decode(values, self.w_dec, pattern)
        out = self.finished(out, rows)
        if mean is not None and scale is not None:
            out = out * scale + mean
        return out.reshape(*x.shape[:-1], -1).to(x.dtype)

    def latents_of(self, x: Float[Tensor, "... inputs"], ids: Sequence[int]) -> Float[Tensor, "... ids"]:
        """Values of few latents, dense, under the same choice among all of them."""
        pattern, values = self.active(self.rows(x)[0])
        wanted = torch.as_tensor(list(ids), device=self.device)
        column = torch.full((self.design.latents,), -1, device=self.device)
        column[wanted] = torch.arange(len(wanted), device=self.device)
        found = column[pattern.latents]
        here = found >= 0
        out = values.new_zeros(pattern.n, len(wanted))
        out = out.index_put((pattern.rows[here], found[here]), values[here])
        return out[:, column[wanted]].reshape(*x.shape[:-1], len(wanted))

    def pre(self, x: Float[Tensor, "... inputs"]) -> Float[Tensor, "... latents"]:
        """W_enc (x - b_dec) + b_enc of all latents (the gate's, for kind "gated"): a dense matrix."""
        rows, _, _ = self.rows(x)
        return self.dense_pre(rows).reshape(*x.shape[:-1], -1)

    def splice(
        self, *, error: bool = False, change: Callable[[Sparse], Sparse] | None = None
    ) -> Callable[[Float[Tensor, "... inputs"]], Float[Tensor, "... inputs"]]:
        """An edit that puts the reconstruction in place of the activations, after `change` to the latents.

        With `error` what the dictionary misses is added back, so that without a change nothing changes and a change
        of latents is the only one. Raises `SondeError` for a transcoder, whose output is no version of its input.
        """
        if self.design.transcodes:
            raise SondeError(f"{self!r} is a transcoder: it predicts {self.target}, so it cannot stand for its input")

        def edit(x: Tensor) -> Tensor:
            if change is None:
                out = self.reconstruct(x)
                return out + (x - out).detach() if error else out
            _, mean, scale = self.rows(x)
            latents = self.encode(x)
            changed = self.decode(change(latents))
            offset: Any = 0 if mean is None else mean.reshape(*x.shape[:-1], 1)
            factor: Any = 1 if scale is None else scale.reshape(*x.shape[:-1], 1)
            out = changed * factor + offset
            return (out + (x - (self.decode(latents) * factor + offset)) if error else out).to(x.dtype)

        return edit

    def save(self, folder: str | Path) -> None:
        """Write weights and configuration, each whole or not at all."""
        from sonde.features.dictionary_files import save

        save(self, folder)

    @staticmethod
    def load(folder: str | Path, *, device: torch.device | str = "cpu") -> "Dictionary":
        """Read what `save` wrote. Raises `SondeError` for a folder that is incomplete, damaged or of another format."""
        from sonde.features.dictionary_files import load

        return load(folder, device=device)

    def folded_scale(self, scale: float, *, target: float | None = None) -> "Dictionary":
        """The dictionary of x, of one that was trained on `scale` x; see `sonde.features.folding`."""
        from sonde.features.folding import folded_scale

        return folded_scale(self, scale, target=target)

    def folded_norms(self) -> "Dictionary":
        """The same dictionary with decoder rows of length 1; see `sonde.features.folding`."""
        from sonde.features.folding import folded_norms

        return folded_norms(self)

    def as_jumprelu(self) -> "Dictionary":
        """A dictionary with one threshold for all rows as the JumpReLU that it is; see `sonde.features.folding`."""
        from sonde.features.folding import as_jumprelu

        return as_jumprelu(self)

    def rows(
        self, x: Float[Tensor, "... inputs"]
    ) -> tuple[Float[Tensor, "n inputs"], Float[Tensor, "n 1"] | None, Float[Tensor, "n 1"] | None]:
        """`x` as rows in the type of the weights, and the mean and scale that `layer_norm` took from each.

        Raises `SondeError` for another width than `inputs`.
        """
        if x.ndim < 1 or x.shape[-1] != self.design.inputs:
            width = x.shape[-1] if x.ndim else 0
            raise SondeError(f"activations have width {width}, but {self!r} reads width {self.design.inputs}")
        rows = x.reshape(-1, self.design.inputs).to(self.w_enc.dtype)
        if not self.design.layer_norm:
            return rows, None, None
        mean = rows.mean(1, keepdim=True)
        scale = rows.std(1, keepdim=True)
        return (rows - mean) / (scale + 1e-5), mean, scale

    def finished(
        self, decoded: Float[Tensor, "n outputs"], rows: Float[Tensor, "n inputs"]
    ) -> Float[Tensor, "n outputs"]:
        """What the latents say, with bias and skip."""
        out = decoded + self.b_dec
        return out if self.w_skip is None else out + rows @ self.w_skip.T

    @property
    def centre(self) -> Float[Tensor, " inputs"] | None:
        """What is subtracted from the input."""
        return self.b_dec if self.design.centred else None

    def encoder_input(self, rows: Float[Tensor, "n inputs"]) -> Float[Tensor, "n inputs"]:
        """Rows less the centre."""
        return rows if self.centre is None else rows - self.centre

    def decoder_norms(self) -> Float[Tensor, " latents"]:
        """Norms of decoder rows, with gradients; of a crosscoder, sums over streams of the norms of their parts."""
        parts = self.w_dec.split(self.design.streams, 1) if self.design.streams else (self.w_dec,)
        return sum((part.norm(dim=1) for part in parts[1:]), parts[0].norm(dim=1))

    def worth(self) -> Float[Tensor, " latents"] | None:
        """What ranks are multiplied by: the norms of decoder rows, or nothing."""
        return self.decoder_norms().detach() if self.design.ranked_by_norm else None

    @torch.no_grad()
    def kept(self, rows: Float[Tensor, "n inputs"], *, k: int | None = None) -> selection.Kept:
        """What is kept of each row, and pre there; `k` stands for the design's own."""
        design = self.design
        x, worth, k = self.encoder_input(rows), self.worth(), k or design.k
        match design.kind:
            case "topk" if k is not None:
                return selection.top_k(x, self.w_enc, self.b_enc, k, worth=worth)
            case "groupmax" if k is not None:
                return selection.group_max(x, self.w_enc, self.b_enc, k)
            case "batchtopk" | "matryoshka" if k is not None and self.threshold is not None:
                if self.training or float(self.threshold) <= 0:
                    return selection.batch_top_k(x, self.w_enc, self.b_enc, k, worth=worth)
                return selection.above(x, self.w_enc, self.b_enc, self.threshold, worth=worth)
            case "jumprelu" if self.threshold is not None:
                return selection.above(x, self.w_enc, self.b_enc, self.threshold)
            case _:  # relu, and the gate of gated
                return selection.above(x, self.w_enc, self.b_enc, 0.0)

    def active(self, rows: Float[Tensor, "n inputs"], *, k: int | None = None) -> Active:
        """Active latents of rows (in the type of the weights, from `rows`), with gradients of the values."""
        pattern, pre = self.kept(rows, k=k)
        values = read(rows, self.w_enc, self.b_enc, pattern, pre, centre=self.centre)
        if self.r_mag is not None and self.b_mag is not None:
            latents = pattern.latents
            values = (values - self.b_enc[latents]) * self.r_mag.exp()[latents] + self.b_mag[latents]
        return Active(pattern, values.relu())

    def dense_pre(self, rows: Float[Tensor, "n inputs"]) -> Float[Tensor, "n latents"]:
        """W_enc (x - b_dec) + b_enc of all latents."""
        return torch.addmm(self.b_enc, self.encoder_input(rows), self.w_enc.T)

    def dense(self, rows: Float[Tensor, "n inputs"]) -> Dense:
        """All latents of the kinds without k, with every gradient, straight-through ones included."""
        from sonde.features.straight_through import jump_relu

        pre = self.dense_pre(rows)
        if self.r_mag is not None and self.b_mag is not None:
            magnitude = (pre - self.b_enc) * self.r_mag.exp() + self.b_mag
            return Dense((pre > 0) * magnitude.relu(), pre)
        if self.threshold is not None and self.design.kind == "jumprelu":
            return Dense(jump_relu(pre, self.threshold, self.design.bandwidth), pre)
        return Dense(pre.relu(), pre)
