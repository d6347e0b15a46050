"""How much of a lens's prediction depends on one direction of a hidden state? Energy and gradient of an ablation.

The component of h along a unit vector v is replaced by that of a reference m (a mean, zero, or another token):

    r(h, v) = h - v vᵀ(h - m)        σ(v) = E KL(q(h) || q(r(h, v)))

with q the reading of a lens (Belrose et al. 2303.08112, section 4.1). Ablation moves the translated state y along one
vector, so it moves the centred logits by a matrix of rank one. With y_c centred, s² = var(y), t = vᵀ(h - m) and
u = (I + A) v centred, the ablated logits are

    [Z - t g] / s' + c      Z = y_c Wᵀ,  g = W u,  W = W_U diag(γ),  c = W_U β + b_U
    s'² = s² - 2 t <y_c, u> / d + t² |u|² / d + ε

Z is computed once, so that no product of tokens x vocabulary x width is left in the loop, and the gradient is written
by hand. RMSNorm drops the centring, a scale multiplies Z and g, a soft-cap bends the result elementwise. What the final
norm does is measured; one that is neither kind is differentiated automatically.
"""

import copy
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sonde.lens.fused import Readout
from sonde.lens.tuned import TunedLens

_CACHE = 1 << 30  # bytes of Z that are kept; what does not fit is computed again at every evaluation
_BLOCK = 1 << 24  # elements of Z that are computed in one product
_CHUNK = {"cpu": 1 << 18, "cuda": _BLOCK}  # elements that pass through the loop together: they stay in a core's cache
_TINY = 1e-30


class DirectionLoss(Protocol):
    """σ of directions on fixed hidden states."""

    def __call__(self, direction: Float[Tensor, " d_model"]) -> tuple[float, Float[Tensor, " d_model"]]:
        """σ in nats and its gradient at a direction, which need not be of unit length."""
        ...

    def by_token(self, directions: Float[Tensor, "k d_model"]) -> Float[Tensor, "k n"]:
        """KL(q(h) || q(r(h, v))) in nats of every direction at every token."""
        ...


def direction_loss(
    lens: TunedLens,
    layer: int | str,
    hidden: Float[Tensor, "n d_model"],
    reference: Float[Tensor, "*#n d_model"],
    *,
    cache_bytes: int = _CACHE,
) -> DirectionLoss:
    """The loss of directions at one layer of a lens, by the identity of rank one where the final norm allows it."""
    norm = ClosedNorm.of(lens.unembedding.norm, lens.d_model, hidden.device)
    if norm is None:
        return AutogradLoss(lens, layer, hidden, reference)
    return RankOneLoss(lens, layer, hidden, reference, norm=norm, cache_bytes=cache_bytes)


@dataclass(frozen=True)
class ClosedNorm:
    """A norm as gain ∘ (y - mean y) / sqrt(var y + ε) + shift, without the mean where it does not centre.

    `eps` is None where there is no norm at all: then nothing is divided.
    """

    centred: bool
    gain: Float[Tensor, " d"]
    shift: Float[Tensor, " d"]
    eps: float | None

    @staticmethod
    @torch.no_grad()
    def of(norm: nn.Module | None, d: int, device: torch.device | str = "cpu") -> "ClosedNorm | None":
        """Measure what a module does; None where it is no LayerNorm or RMSNorm, whatever it is called."""
        if norm is None:
            ones = torch.ones(d, device=device)
            return ClosedNorm(False, ones, torch.zeros_like(ones), None)
        module = copy.deepcopy(norm).double().to(device)
        generator = torch.Generator().manual_seed(0)

        def probe(scale: float) -> Tensor:
            return scale * torch.randn(64, d, generator=generator, dtype=torch.float64).to(device)

        shift = module(torch.zeros(1, d, dtype=torch.float64, device=device)).squeeze(0)
        x = probe(1e3)  # ε counts for nothing here
        out = module(x) - shift
        level = module(torch.full((1, d), 1e3, dtype=torch.float64, device=device)) - shift
        centred = bool(level.norm() < 1e-3 * out.norm(dim=-1).mean())
        unit, _ = _normalised(x, centred, 0.0)
        gain = (out * unit).sum(0) / (unit * unit).sum(0)
        x = probe(1e-3)
        unit, variance = _normalised(x, centred, 0.0)
        expected = unit * gain
        shrunk = ((module(x) - shift) * expected).sum(-1, keepdim=True) / (expected * expected).sum(-1, keepdim=True)
        eps = max(float((variance * (shrunk**-2 - 1)).median()), 0.0)
        for scale in (1e-2, 1.0, 30.0):
            x = probe(scale)
            out = module(x)
            if not bool((_normalised(x, centred, eps)[0] * gain + shift - out).abs().max() < 1e-4 * out.abs().max()):
                return None
        return ClosedNorm(centred, gain.float(), shift.float(), eps)

    def centre(self, y: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """`y` less its mean over dimensions, where the norm takes it away."""
        return y - y.mean(-1, keepdim=True) if self.centred else y


class RankOneLoss:
    """σ by the identity of rank one. `Z` is kept as far as `cache_bytes` reach.

    Args:
        lens: the lens whose readings are compared.
        layer: number or site of a layer of the lens.
        hidden: states of n tokens at that layer.
        reference: what the component is replaced by, for all tokens or one each.
        norm: the final norm in closed form.
        cache_bytes: most bytes of tokens x vocabulary that are kept between evaluations.

    """

    @torch.no_grad()
    def __init__(
        self,
        lens: TunedLens,
        layer: int | str,
        hidden: Float[Tensor, "n d_model"],
        reference: Float[Tensor, "*#n d_model"],
        *,
        norm: ClosedNorm,
        cache_bytes: int = _CACHE,
    ) -> None:
        place = lens.layer(layer)
        readout = Readout(lens.unembedding)
        self._norm, self._readout = norm, readout
        self._matrix = None if lens.weight is None else lens.weight[place].detach().float()
        hidden = hidden.float()
        self._away = hidden - reference.float()
        self._centred = norm.centre(lens.translate(hidden, place))
        self._project = lens.unembedding.project
        self._inner = self._to_head(self._centred)  # Z = inner Wᵀ
        self._variance = self._centred.double().square().mean(-1)
        shift = norm.shift if self._project is None else self._project.float()(norm.shift)  # type: ignore[operator]
        constant = readout.weight @ shift if bool(shift.any()) else None
        if readout.bias is not None:
            constant = readout.bias if constant is None else constant + readout.bias
        self._constant = None if constant is None else constant * readout.scale
        self._rows = max(4, _CHUNK.get(hidden.device.type, _CHUNK["cpu"]) // readout.vocab_size)
        self._blocks = list(readout.chunks(len(hidden), max(64, _BLOCK // readout.vocab_size)))
        self._kept: list[Tensor] = []
        self._clean_pass(cache_bytes)

    def __call__(self, direction: Float[Tensor, " d_model"]) -> tuple[float, Float[Tensor, " d_model"]]:
        """σ in nats and its gradient."""
        energies, gradient = self._evaluate(direction.detach().float(), gradient=True)
        assert gradient is not None
        return float(energies.mean()), gradient.to(direction.dtype)

    def by_token(self, directions: Float[Tensor, "k d_model"]) -> Float[Tensor, "k n"]:
        """KL in nats of every direction at every token."""
        return torch.stack([self._evaluate(v.float(), gradient=False)[0] for v in directions])

    def _to_head(self, centred: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_head"]:
        """Gain, projection and scale: what the head's matrix is multiplied with."""
        gained = centred * (self._norm.gain * self._readout.scale)
        return gained if self._project is None else gained @ self._project.weight.float().T  # type: ignore[union-attr]

    def _from_head(self, gradient: Float[Tensor, " d_head"]) -> Float[Tensor, " d_model"]:
        """The transpose of `_to_head`, and of the centring before it."""
        if self._project is not None:
            gradient = gradient @ self._project.weight.float()  # type: ignore[union-attr]
        return self._norm.centre(gradient * (self._norm.gain * self._readout.scale))

    def _inverse(self, variance: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        if self._norm.eps is None:
            return torch.ones_like(variance)
        return (variance + self._norm.eps).clamp(min=1e-12).rsqrt()

    def _clean_pass(self, cache_bytes: int) -> None:
        """What the loop needs of the readings before ablation: lse, the top token, E_q W, and Z where it fits."""
        readout, n = self._readout, len(self._inner)
        self._rest = self._inverse(self._variance)
        self._lse = torch.empty(n, dtype=torch.float64, device=self._inner.device)
        self._top = torch.empty(n, dtype=torch.long, device=self._inner.device)
        self._pull = torch.empty_like(self._inner)
        left = cache_bytes
        for block in self._blocks:
            z = self._inner[block] @ readout.weight.T
            left -= z.nbytes
            if left >= 0:
                self._kept.append(z)
            logits = self._raw(z, self._rest[block])
            self._top[block] = logits.argmax(-1)
            reading, self._lse[block] = _softmax(logits, self._top[block], torch.empty_like(logits))
            self._pull[block] = reading @ readout.weight
        self._expected = torch.einsum("nd,nd->n", self._pull, self._inner).double()

    def _raw(self, z: Float[Tensor, "n vocab"], rate: Float[Tensor, " n"]) -> Float[Tensor, "n vocab"]:
        """Logits before a soft-cap."""
        z = z * rate[:, None].float()
        return z if self._constant is None else z.add_(self._constant)

    @torch.no_grad()
    def _evaluate(
        self, v: Float[Tensor, " d_model"], *, gradient: bool
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, " d_model"] | None]:
        """KL of every token, float64, and the gradient of its mean."""
        n, d = self._away.shape
        moved = v if self._matrix is None else v + self._matrix @ v
        u = self._norm.centre(moved)
        inner = self._to_head(u)
        g = self._readout.weight @ inner
        t = (self._away @ v).double()
        along = (self._centred @ u).double()
        length = float(u.double().square().sum())
        variance = self._variance - (2 * t * along - t * t * length) / d
        rate = self._inverse(variance)
        sums = self._pass(g, t, rate, gradient)
        kl, toward_g, toward_z = sums.first, sums.toward_g, sums.toward_z
        if self._readout.softcap is None:
            pulled = (self._pull @ inner).double()
            kl = kl - self._lse - (rate - self._rest) * self._expected + rate * t * pulled
            toward_g, toward_z = toward_g - pulled, toward_z - self._expected
        if not gradient:
            return kl, None
        share = (rate * t).float()
        head = sums.pushed @ self._readout.weight
        head = share @ self._pull - head if self._readout.softcap is None else -head
        through_u = self._from_head(head)
        by_t = -rate * toward_g
        if self._norm.eps is not None:
            by_variance = -0.5 * rate**3 * (toward_z - t * toward_g)
            by_t = by_t + by_variance * 2 * (t * length - along) / d
            back = (by_variance * -2 * t / d).float() @ self._centred
            through_u = through_u + self._norm.centre(back) + u * float((by_variance * 2 * t * t / d).sum())
        total = by_t.float() @ self._away + through_u
        if self._matrix is not None:
            total = total + through_u @ self._matrix
        return kl, total / n

    def _pass(
        self, g: Float[Tensor, " vocab"], t: Float[Tensor, " n"], rate: Float[Tensor, " n"], gradient: bool
    ) -> "_Sums":
        n, vocab = len(t), len(g)
        sums = _Sums(t.new_empty(n), t.new_zeros(n), t.new_zeros(n), torch.zeros_like(g))
        t32, rate32 = t.float(), rate.float()
        share = t32 * rate32
        first, second = g.new_empty(2, min(self._rows, n), vocab)
        step = self._plain if self._readout.softcap is None else self._capped
        for number, block in enumerate(self._blocks):
            whole = self._kept[number] if number < len(self._kept) else self._inner[block] @ self._readout.weight.T
            for start in range(block.start, block.stop, self._rows):
                part = slice(start, min(start + self._rows, block.stop))
                rows = part.stop - part.start
                z = whole[part.start - block.start : part.stop - block.start]
                logits = torch.addr(z, t32[part], g, alpha=-1, out=first[:rows]).mul_(rate32[part, None])
                if self._constant is not None:
                    logits.add_(self._constant)
                sums.first[part], weight = step(z, logits, part, second[:rows])
                if gradient:
                    sums.toward_g[part] = (weight @ g).double()
                    sums.toward_z[part] = torch.linalg.vecdot(weight, z).double()
                    sums.pushed.addmv_(weight.T, share[part])
        return sums

    def _plain(self, z: Tensor, logits: Tensor, part: slice, out: Tensor) -> tuple[Tensor, Tensor]:
        reading, lse = _softmax(logits, self._top[part], out)
        return lse, reading

    def _capped(self, z: Tensor, logits: Tensor, part: slice, out: Tensor) -> tuple[Tensor, Tensor]:
        cap = self._readout.softcap
        assert cap is not None
        before = (self._raw(z, self._rest[part]).div_(cap).tanh_() * cap).log_softmax(-1)
        bend = logits.div_(cap).tanh_()
        after = (bend * cap).log_softmax(-1)
        kl = (before.exp() * (before - after)).sum(-1, dtype=torch.float64)
        weight = torch.sub(after.exp_(), before.exp_(), out=out)
        return kl, weight.mul_(bend.square_().neg_().add_(1))


@dataclass(frozen=True)
class _Sums:
    """What a pass over tokens x vocabulary leaves, with p' the ablated reading.

    Without a soft-cap `first` is logsumexp, δ is p', and what the clean reading adds is known without the vocabulary.
    With one `first` is the KL and δ is (p' - q) times the slope of the cap.
    """

    first: Float[Tensor, " n"]
    toward_g: Float[Tensor, " n"]  # δ·g
    toward_z: Float[Tensor, " n"]  # δ·Z
    pushed: Float[Tensor, " vocab"]  # sum over tokens of t δ / s'


class AutogradLoss:
    """σ by automatic differentiation through the lens and the model's own norm: right for any norm, and slow.

    The arguments are those of `RankOneLoss`.
    """

    def __init__(
        self,
        lens: TunedLens,
        layer: int | str,
        hidden: Float[Tensor, "n d_model"],
        reference: Float[Tensor, "*#n d_model"],
    ) -> None:
        self._lens, self._place = lens, lens.layer(layer)
        self._readout = Readout(lens.unembedding)
        self._hidden = hidden.float()
        self._away = self._hidden - reference.float()

    def __call__(self, direction: Float[Tensor, " d_model"]) -> tuple[float, Float[Tensor, " d_model"]]:
        """σ in nats and its gradient."""
        v = direction.detach().float().requires_grad_()
        total, gradient = 0.0, torch.zeros_like(v)
        for part in self._readout.chunks(len(self._hidden)):
            with torch.enable_grad():
                kl = self._kl(v, part).sum()
                gradient += torch.autograd.grad(kl, v)[0]
            total += float(kl.detach())
        n = len(self._hidden)
        return total / n, (gradient / n).to(direction.dtype)

    @torch.no_grad()
    def by_token(self, directions: Float[Tensor, "k d_model"]) -> Float[Tensor, "k n"]:
        """KL in nats of every direction at every token."""
        parts = list(self._readout.chunks(len(self._hidden)))
        return torch.stack([torch.cat([self._kl(v.float(), part) for part in parts]) for v in directions]).double()

    def _kl(self, v: Float[Tensor, " d_model"], part: slice) -> Float[Tensor, " n"]:
        moved = self._hidden[part] - (self._away[part] @ v)[:, None] * v
        before, after = (
            self._logits(self._lens.translate(state, self._place)).log_softmax(-1)
            for state in (self._hidden[part], moved)
        )
        return (before.exp() * (before - after)).sum(-1)

    def _logits(self, translated: Float[Tensor, "n d_model"]) -> Float[Tensor, "n vocab"]:
        """The readout's logits, nothing of it in place."""
        readout = self._readout
        bias = 0 if readout.bias is None else readout.bias
        z = readout.scale * (readout.normed(translated) @ readout.weight.T + bias)
        return z if readout.softcap is None else readout.softcap * torch.tanh(z / readout.softcap)


def _softmax(
    logits: Float[Tensor, "n vocab"], known: Int[Tensor, " n"], out: Float[Tensor, "n vocab"]
) -> tuple[Float[Tensor, "n vocab"], Float[Tensor, " n"]]:
    """Softmax, and the logsumexp in float64, read off at one token of each row that is not improbable."""
    torch.softmax(logits, -1, out=out)
    at = known[:, None]
    own = out.gather(-1, at).squeeze(-1).double()
    if bool((own > _TINY).all()):
        return out, logits.gather(-1, at).squeeze(-1).double() - own.log()
    return out, logits.logsumexp(-1).double()


def _normalised(
    x: Float[Tensor, "n d"], centred: bool, eps: float
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n 1"]]:
    """Divide x by its root mean square; also give its mean square."""
    if centred:
        x = x - x.mean(-1, keepdim=True)
    variance = x.square().mean(-1, keepdim=True)
    return x * (variance + eps).rsqrt(), variance
