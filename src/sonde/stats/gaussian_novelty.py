"""How far is a row from the Gaussian of trusted rows, or how much likelier under another one?

With mean m and covariance C of trusted rows, W the whitening of C with eigenvalues below rcond of the largest dropped,
z = Wᵀ(x - m), and u, S the mean and covariance of untrusted rows after the same whitening:

    Mahalanobis²             |z|²                            relative form: less (x - m)ᵀ (diag C)⁻¹ (x - m)
    quantum entropy          zᵀ exp(a S / ‖S‖) z, a = 4      (Dong, Hopkins & Li 1906.11366)
    spectral signature       ((x - mean) · v)², mean and top principal direction v of untrusted rows (1811.00636)
    likelihood ratio         log N(z; u, S) - log N(z; 0, I)
    two Gaussians            the same with u, S fitted by expectation-maximisation to those untrusted rows that the
                             trusted Gaussian does not explain; a row is on one side in all layers

With no more rows than features a covariance is shrunk towards a multiple of the identity, and a warning says so. These
are the scores of Mallen et al. 2312.01037 and of the study of detectors for quirky models, 2504.08812.
"""

import warnings
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sonde.errors import SondeError
from sonde.stats.layered_rows import Novelty
from sonde.stats.moments import Moments
from sonde.stats.solve import shrunk

_RCOND = 1e-3
_ROUNDING = 1e-6  # a standard deviation below this share of the length of the rows is no spread
_FLOOR = 1e-6  # variance added to untrusted rows, in units of the trusted variance
_SHARE = 1e-4  # responsibilities that move less than this have converged
_LEAST_WEIGHT = 2.0  # rows that a second Gaussian needs


@dataclass(frozen=True)
class Gaussian:
    """Means and eigendecomposed covariances of rows, by layer; `kept` are the eigenvalues above rcond and rounding."""

    mean: Float[Tensor, "layers d"]
    covariance: Float[Tensor, "layers d d"]
    values: Float[Tensor, "layers d"]
    vectors: Float[Tensor, "layers d d"]
    kept: Bool[Tensor, "layers d"]

    @staticmethod
    def of(rows: Float[Tensor, "layers n d"], *, rcond: float = _RCOND, ridge: float = 0.0) -> "Gaussian":
        """The Gaussian of rows, with `ridge` added to the variances. Raises `SondeError` where all rows are equal.

        Where there are no more rows than features and no ridge, the covariance is shrunk, with a warning.
        """
        _, n, d = rows.shape
        moments = [Moments(d).update(layer) for layer in rows]
        mean = torch.stack([made.mean for made in moments])
        covariance = torch.stack([made.covariance for made in moments])
        covariance.diagonal(dim1=1, dim2=2).add_(ridge)
        if n <= d and not ridge:
            covariance, weight = shrunk(covariance, n)
            warnings.warn(
                f"{n} rows for a covariance of {d} features: it is shrunk towards a multiple of the identity (weight "
                f"of the sample {float(weight.min()):.2g} to {float(weight.max()):.2g}); give more rows",
                stacklevel=4,
            )
        return Gaussian.with_moments(mean, covariance, rcond=rcond)

    @staticmethod
    def with_moments(
        mean: Float[Tensor, "layers d"], covariance: Float[Tensor, "layers d d"], *, rcond: float = _RCOND
    ) -> "Gaussian":
        """The Gaussian of given moments. Raises `SondeError` where no layer has a spread beyond rounding."""
        values, vectors = torch.linalg.eigh(covariance)
        size = mean.square().sum(-1) + covariance.diagonal(dim1=1, dim2=2).sum(-1)
        kept = values > torch.maximum(rcond * values[:, -1:], _ROUNDING**2 * size[:, None])
        if not bool(kept.any()):
            raise SondeError("all rows are equal, so they have no covariance")
        return Gaussian(mean, covariance, values, vectors, kept)

    def whitened(self, rows: Float[Tensor, "layers n d"]) -> Float[Tensor, "layers n d"]:
        """Coordinates of mean 0 and covariance 1 along the kept principal directions, 0 along the others."""
        scale = torch.where(self.kept, self.values, torch.inf).rsqrt()
        return torch.einsum("lnd,lde->lne", rows - self.mean[:, None], self.vectors * scale[:, None])


class Mahalanobis(Novelty):
    """Squared Mahalanobis distance to the trusted rows, with the pseudo-inverse of the covariance.

    Args:
        relative: take off the distance with the diagonal covariance, so that what is left are broken correlations.
        rcond: eigenvalues (of the diagonal: variances) below this share of the largest are dropped.
        ridge: added to every variance.

    """

    def __init__(self, *, relative: bool = False, rcond: float = _RCOND, ridge: float = 0.0) -> None:
        self.relative, self.rcond, self.ridge = relative, rcond, ridge

    def _fit(self, trusted: Tensor) -> None:
        self.gaussian_ = Gaussian.of(trusted, rcond=self.rcond, ridge=self.ridge)

    def _score(self, rows: Tensor, untrusted: Tensor | None) -> Tensor:
        made = self.gaussian_
        distance = made.whitened(rows).square_().sum(-1)
        if self.relative:
            variance = made.covariance.diagonal(dim1=1, dim2=2)
            kept = variance > self.rcond * variance.amax(-1, keepdim=True)
            inverse = torch.where(kept, variance, torch.inf).reciprocal()
            distance -= torch.einsum("lnd,ld->ln", (rows - made.mean[:, None]).square_(), inverse)
        return distance


class QuantumEntropy(Novelty):
    """Quantum entropy score: directions along which untrusted rows spread more than trusted ones weigh more.

    With `alpha` 0 it is the squared Mahalanobis distance; where untrusted rows spread as trusted ones do, e^alpha times
    that.
    """

    untrusted = "must"

    def __init__(self, *, alpha: float = 4.0, rcond: float = _RCOND) -> None:
        self.alpha, self.rcond = alpha, rcond

    def _fit(self, trusted: Tensor) -> None:
        self.gaussian_ = Gaussian.of(trusted, rcond=self.rcond)

    def _score(self, rows: Tensor, untrusted: Tensor | None) -> Tensor:
        assert untrusted is not None
        _, spread = _moments(self.gaussian_.whitened(untrusted))
        largest = torch.linalg.eigvalsh(spread)[:, -1].clamp(min=torch.finfo(spread.dtype).tiny)
        weights = torch.linalg.matrix_exp(self.alpha * spread / largest[:, None, None])
        z = self.gaussian_.whitened(rows)
        return ((z @ weights) * z).sum(-1)


class SpectralSignature(Novelty):
    """Squared projection on the direction in which the untrusted rows spread most. Trusted rows are not used."""

    untrusted = "must"
    least = 1

    def _fit(self, trusted: Tensor) -> None:
        pass

    def _score(self, rows: Tensor, untrusted: Tensor | None) -> Tensor:
        assert untrusted is not None
        mean, spread = _moments(untrusted)
        top = torch.linalg.eigh(spread).eigenvectors[..., -1]
        return torch.einsum("lnd,ld->ln", rows - mean[:, None], top).square_()


class LikelihoodRatio(Novelty):
    """Log-likelihood under the Gaussian of the untrusted rows less that under the trusted one's."""

    untrusted = "must"

    def __init__(self, *, rcond: float = _RCOND) -> None:
        self.rcond = rcond

    def _fit(self, trusted: Tensor) -> None:
        self.gaussian_ = Gaussian.of(trusted, rcond=self.rcond)

    def _score(self, rows: Tensor, untrusted: Tensor | None) -> Tensor:
        assert untrusted is not None
        return _log_ratio(self.gaussian_.whitened(rows), *self._second(self.gaussian_.whitened(untrusted)))

    def _second(self, z: Float[Tensor, "layers m d"]) -> tuple[Float[Tensor, "layers d"], Float[Tensor, "layers d d"]]:
        """Mean and covariance of the Gaussian that is held against the trusted one."""
        return _weighted(z, torch.ones_like(z[0, :, 0]), self.gaussian_.kept)


class TwoGaussians(LikelihoodRatio):
    """Likelihood ratio to a second Gaussian, found by expectation-maximisation; the first stays the trusted one.

    A row's share in the second Gaussian is the mean over layers. After `score`, `share_` is the share of the untrusted
    rows that the second one explains, `mean_` and `covariance_` its moments in trusted-whitened coordinates.
    """

    def __init__(self, *, rcond: float = _RCOND, iterations: int = 100) -> None:
        super().__init__(rcond=rcond)
        self.iterations = iterations

    def _second(self, z: Tensor) -> tuple[Tensor, Tensor]:
        mean, covariance = super()._second(z)
        share, before = torch.tensor(0.5, dtype=z.dtype), torch.zeros_like(z[0, :, 0])
        for _ in range(self.iterations):
            odds = share.log() - (1 - share).log()
            second = (_log_ratio(z, mean, covariance) + odds).sigmoid().mean(0)
            if second.sum() < _LEAST_WEIGHT or (second - before).abs().max() < _SHARE:
                break
            share = second.mean().clamp(max=1 - 1e-9)
            mean, covariance = _weighted(z, second, self.gaussian_.kept)
            before = second
        self.share_, self.mean_, self.covariance_ = float(share), mean, covariance
        return mean, covariance


def _moments(rows: Float[Tensor, "layers m d"]) -> tuple[Float[Tensor, "layers d"], Float[Tensor, "layers d d"]]:
    mean = rows.mean(1)
    off = rows - mean[:, None]
    return mean, off.mT @ off / (rows.shape[1] - 1)


def _weighted(
    z: Float[Tensor, "layers m d"], weight: Float[Tensor, " m"], kept: Bool[Tensor, "layers d"]
) -> tuple[Float[Tensor, "layers d"], Float[Tensor, "layers d d"]]:
    """Moments of weighted rows, shrunk; a direction that was dropped has variance 1 and so tells nothing."""
    total = weight.sum()
    mean = (z * weight[:, None]).sum(1) / total
    off = z - mean[:, None]
    covariance = off.mT @ (off * weight[:, None]) / total
    covariance.diagonal(dim1=1, dim2=2).add_(_FLOOR + (~kept).to(z.dtype))
    return mean, shrunk(covariance, total)[0]


def _log_ratio(
    z: Float[Tensor, "layers n d"], mean: Float[Tensor, "layers d"], covariance: Float[Tensor, "layers d d"]
) -> Float[Tensor, "layers n"]:
    """Difference log N(z; mean, covariance) - log N(z; 0, I)."""
    factor = torch.linalg.cholesky(covariance)
    off = torch.linalg.solve_triangular(factor, (z - mean[:, None]).mT, upper=False)
    log_det = 2 * factor.diagonal(dim1=1, dim2=2).log().sum(-1)
    return (z.square().sum(-1) - off.square().sum(1) - log_det[:, None]) / 2
