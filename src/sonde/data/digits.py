"""Handwritten digits, 8 x 8 pixels: the set that scikit-learn carries (Alpaydin & Kaynak 1998), split by seed."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sonde.errors import SondeError


class Digits(NamedTuple):
    """Images with values in [0, 1], 64 pixels each, and their classes 0 to 9."""

    train_x: Float[Tensor, "train 64"]
    train_y: Int[Tensor, " train"]
    test_x: Float[Tensor, "test 64"]
    test_y: Int[Tensor, " test"]


def digits(*, test: int = 197, seed: int = 0) -> Digits:
    """1,797 images of which `test` are held out, as scikit-learn's `train_test_split` deals them for `seed`."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    if not 0 < test < len(x):
        raise SondeError(f"{test} of {len(x):,} digits cannot be held out: give 1 to {len(x) - 1:,}")
    train_x, test_x, train_y, test_y = train_test_split(x / 16, y, test_size=test, random_state=seed)
    return Digits(
        torch.tensor(train_x, dtype=torch.float32),
        torch.tensor(train_y),
        torch.tensor(test_x, dtype=torch.float32),
        torch.tensor(test_y),
    )
