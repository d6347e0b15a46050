"""A task whose truth is planted, with a weak labeller that is wrong in a way that can be learnt.

Features are Gaussian, `[n d]`. Truth = sign of a direction over the first `relevant` of them, plus noise. The weak
labeller sees .75 of that direction and .65 of one spurious feature, plus noise: right on 75 % of the rows, and many of
its labels teach the spurious feature as well. Few oracle labels teach little of either. So small budgets are best spent
on quantity and large ones on quality, with a mixture between: the small-scale acceptance of label economics.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from sonde.knowledge.label_ledger import Price
from sonde.knowledge.label_problem import LabelSource, Problem

WEAK_SIGNAL = 0.75
SPURIOUS = 0.65
_TRUTH_NOISE = 0.2
_WEAK_NOISE = 0.3
_SHARPNESS = 2.0


def planted_task(
    *,
    pool: int = 16_500,
    test: int = 4_000,
    width: int = 200,
    relevant: int = 40,
    weak_price: Price = "1/10",
    spurious: float = SPURIOUS,
    seed: int = 0,
) -> Problem:
    """The planted task as features. `seed` draws everything; `spurious` is the weak labeller's weight on feature 40.

    Raises `ValueError` where there is no feature left to be spurious.
    """
    if not 0 < relevant < width:
        raise ValueError(f"{relevant} relevant of {width} features: one more is the spurious one")
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Float[Tensor, "..."]:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = normal(pool + test, width)
    direction = torch.zeros(width, dtype=torch.float64)
    direction[:relevant] = normal(relevant)
    along = x @ (direction / torch.linalg.vector_norm(direction))
    truth = (along + _TRUTH_NOISE * normal(len(x)) > 0).long()
    seen = WEAK_SIGNAL * along + spurious * x[:, relevant] + _WEAK_NOISE * normal(len(x))
    weak = torch.sigmoid(_SHARPNESS * seen)
    return Problem(
        features=x[:pool].float(),
        test_features=x[pool:].float(),
        test_truth=truth[pool:].numpy(),
        sources=[
            LabelSource.of("weak", weak[:pool], price=weak_price, test_labels=weak[pool:]),
            LabelSource.of("oracle", truth[:pool], price=1, test_labels=truth[pool:]),
        ],
        name="planted task",
    )
