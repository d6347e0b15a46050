"""The digits: sizes, range, split by seed."""

import pytest
import torch

from sonde.data.digits import digits
from sonde.errors import SondeError


def test_the_split_has_the_sizes_the_range_and_every_image_once():
    split = digits()
    assert (len(split.train_x), len(split.test_x)) == (1600, 197)
    assert split.train_x.min() == 0
    assert split.train_x.max() == 1
    other = digits(test=397, seed=3)
    every = [torch.cat([part.train_x, part.test_x]).sum(1).sort().values for part in (split, other)]
    torch.testing.assert_close(*every)
    assert not torch.equal(split.test_x[:100], other.test_x[:100])


@pytest.mark.parametrize("test", [0, 1797])
def test_a_split_without_one_side_is_refused(test):
    with pytest.raises(SondeError, match="cannot be held out"):
        digits(test=test)
