"""The earliest informative layer is where its definition says, whatever the layers after it do."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sonde.knowledge.earliest_layer import SHARE, earliest_informative_layer

AUROCS = st.lists(st.floats(0, 1), min_size=1, max_size=12)


def test_it_is_the_first_layer_with_95_per_cent_of_the_best():
    assert earliest_informative_layer([0.5, 0.7, 0.876, 0.85, 0.9]) == 4
    assert earliest_informative_layer([0.5, 0.7, 0.881, 0.85, 0.9]) == 2


def test_it_is_the_middle_layer_where_no_layer_reaches_chance():
    assert earliest_informative_layer([0.3, 0.49, 0.2, 0.4]) == 2
    assert earliest_informative_layer([0.1, 0.2, 0.3]) == 1


def test_layers_without_a_number_are_passed_over():
    assert earliest_informative_layer([np.nan, 0.6, 0.9, np.nan]) == 2


@given(AUROCS)
def test_it_satisfies_its_definition(values):
    layer = earliest_informative_layer(values)
    if max(values) >= 0.5:
        reached = [value - 0.5 >= SHARE * (max(values) - 0.5) for value in values]
        assert reached[layer] and not any(reached[:layer])


@pytest.mark.parametrize("values", [[], [np.nan], [[0.5]], [1.2], [-0.1, 0.5]])
def test_what_is_no_auroc_is_refused(values):
    with pytest.raises(ValueError, match="AUROC"):
        earliest_informative_layer(values)


def test_a_share_of_zero_is_refused():
    with pytest.raises(ValueError, match="share is 0"):
        earliest_informative_layer([0.5], share=0)
