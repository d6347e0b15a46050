"""At which depth is a label first as readable as it ever gets? The earliest informative layer of Mallen et al. 2023.

It is the first layer l with AUROC_l - 1/2 >= 0.95 (max AUROC - 1/2), on held-out rows of the distribution that the
probe was trained on; the middle layer where no layer reaches 1/2. Late layers of a network that says what it does not
think report what it says, so that a probe that is to transfer is better read early (arXiv:2312.01037, section 3.2).
"""

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

SHARE = 0.95


def earliest_informative_layer(auroc: ArrayLike, *, share: float = SHARE) -> int:
    """The index of the first layer whose `auroc [layers]` is `share` of the way from 1/2 to the largest.

    Layers whose AUROC is nan are passed over. Raises `ValueError` where all are nan, for values that are no AUROC, and
    for a share outside (0, 1].
    """
    values: Float[np.ndarray, " layers"] = np.asarray(auroc, dtype=np.float64)
    if values.ndim != 1 or not np.isfinite(values).any():
        raise ValueError(f"no layer has an AUROC: given {values.tolist()}")
    if np.nanmin(values) < 0 or np.nanmax(values) > 1:
        raise ValueError(f"AUROCs lie between 0 and 1: given {values.tolist()}")
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}: expected more than 0 and at most 1")
    best = np.nanmax(values)
    if best < 0.5:
        return len(values) // 2
    return int(np.flatnonzero(values - 0.5 >= share * (best - 0.5))[0])
