"""Functions on a finite group in their natural pieces: frequencies of a sum, isotypic components of any group.

The real functions on a group of n elements split into components that neither translation leaves: for numbers modulo P
the cosine and sine of each frequency, for a group that does not commute the matrix entries of each representation (and
its dual). With Q_k [n, m_k] an orthonormal basis of component k and T the table of the task, P_S of logits
L [n², classes] along the pairs is Q_k Q_kᵀ of their sums over pairs of one product, and

    K_k(a, b, c) = (n / m_k) Q_k[T(a,b)] · Q_k[c]        cos w_k(a+b-c) modulo P, χ(ab c⁻¹) / χ(1) of a representation

is all that a network which multiplies by this component says (Nanda et al. 2023; Chughtai et al. 2023,
arXiv:2302.03025). The components are the eigenspaces of a random class function acting by convolution, since it is a
different number on each of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sonde.data.groups import check_table
from sonde.dynamics.fourier import basis, frequencies
from sonde.errors import SondeError

_SAME = 1e-6  # of the largest eigenvalue: closer ones are one
_TRIES = 3


@dataclass(frozen=True)
class Harmonics:
    """The components that a task may use, its trivial one left out.

    Attributes:
        table: [n, n], which element a pair gives.
        components: an orthonormal basis [n, m_k] by key.
        noun: what a key is called. of: what it belongs to.

    """

    table: Int[Tensor, "n n"]
    components: dict[int, Float[Tensor, "n m"]]
    noun: str = "component"
    of: str = "of this group"

    @classmethod
    def modulo(cls, modulus: int, table: Int[Tensor, "n n"] | None = None) -> "Harmonics":
        """Frequencies 1 … (P-1)/2 with cosine and sine each; an even P adds P/2, which alternates.

        `table` is that of a + b where not given; that of a - b is as good.
        """
        f = basis(modulus)
        found = {k: f[[2 * k - 1, 2 * k]].T for k in frequencies(modulus)}
        if modulus % 2 == 0:
            found[modulus // 2] = f[-1:].T
        t = torch.arange(modulus)
        table = (t[:, None] + t) % modulus if table is None else table
        return cls(table, found, noun="frequency", of=f"modulo {modulus}")

    @classmethod
    def of_group(cls, table: Int[Tensor, "n n"], *, name: str = "this group") -> "Harmonics":
        """The isotypic components of the real functions on a group, the smallest first, numbered from 1.

        Raises `SondeError` for a table that is not of a group.
        """
        check_table(table)
        n = len(table)
        identity = int((table == torch.arange(n)).all(1).nonzero()[0])
        inverse = (table == identity).long().argmax(1)
        classes = _classes(table, inverse)
        wanted = len({frozenset((int(c), int(classes[inverse[g]]))) for g, c in enumerate(classes)})
        for seed in range(_TRIES):
            drawn = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            of_class = drawn[classes] + drawn[classes[inverse]]
            values, vectors = torch.linalg.eigh(of_class[table[inverse]])  # entry a, b: the function at a⁻¹b
            ends = (values.diff() > _SAME * values.abs().max()).nonzero()[:, 0] + 1
            spaces = vectors.tensor_split(ends, dim=1)
            if len(spaces) == wanted:
                break
        else:
            raise SondeError(f"the components of {name} could not be told apart")
        constant = torch.full((n,), n**-0.5, dtype=torch.float64)
        own = sorted((s for s in spaces if (constant @ s).norm() < 0.5), key=lambda s: s.shape[1])
        return cls(table, dict(enumerate(own, start=1)), of=f"of {name}")

    @property
    def order(self) -> int:
        """n, how many elements there are."""
        return len(self.table)

    def check(self, keys: Sequence[int]) -> None:
        """Raise `SondeError` for a key that does not exist."""
        for k in keys:
            if k not in self.components:
                raise SondeError(f"{self.noun} {k} does not exist {self.of}: it has 1 to {len(self.components)}")

    def project(self, logits: Float[Tensor, "pairs classes"], keys: Sequence[int]) -> Float[Tensor, "pairs classes"]:
        """P_S of the logits: their part that depends on the product alone, in these components."""
        self.check(keys)
        sums = self.by_product(logits)
        inside = sum((self.components[k] @ (self.components[k].T @ sums) for k in keys), torch.zeros_like(sums))
        return inside[self.table.flatten()] / self.order**0.5

    def by_product(self, logits: Float[Tensor, "pairs classes"]) -> Float[Tensor, "n classes"]:
        """Coefficients of the logits on the unit functions "the product is g"."""
        sums = logits.new_zeros(self.order, logits.shape[1])
        return sums.index_add_(0, self.table.flatten(), logits) / self.order**0.5

    def project_wide(
        self, logits: Float[Tensor, "pairs classes"], keys: Sequence[int]
    ) -> Float[Tensor, "pairs classes"]:
        """The part in {1, Q_k} x {1, Q_k} of the two factors for each key, without the constant."""
        self.check(keys)
        n = self.order
        square = logits.view(n, n, -1)
        mean = square.mean((0, 1), keepdim=True)
        found = torch.zeros_like(square)
        for k in keys:
            kept = self.components[k] @ self.components[k].T + 1 / n
            half = (kept @ square.flatten(1)).view_as(square)
            found += kept @ half - mean
        return found.reshape(logits.shape)

    def kernel(self, key: int) -> Float[Tensor, "n n"]:
        """(n / m) Q Qᵀ: what an answer c says of a product g; 1 where they are equal."""
        q = self.components[key]
        return q @ q.T * (self.order / q.shape[1])

    def fit(self, logits: Float[Tensor, "pairs classes"], keys: Sequence[int]) -> dict[int, float]:
        """Least-squares coefficients of the logits on K_k: orthogonal functions of squared norm n³ / m_k."""
        self.check(keys)
        sums = self.by_product(logits) * self.order**0.5
        return {k: float((self.kernel(k) * sums).sum() * self.components[k].shape[1] / self.order**3) for k in keys}


def _classes(table: Tensor, inverse: Tensor) -> Tensor:
    """The number of each element's conjugacy class: the smallest of g x g⁻¹."""
    conjugates = torch.stack([table[table[g], inverse[g]] for g in range(len(table))])  # [g, x]: g x g⁻¹
    return conjugates.min(0).values
