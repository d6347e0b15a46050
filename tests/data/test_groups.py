"""Groups by their tables."""

import pytest
import torch

from sonde.data.groups import GroupTask, check_table, group_table
from sonde.errors import SondeError


@pytest.mark.parametrize(("name", "order"), [("c7", 7), ("d5", 10), ("s4", 24)])
def test_a_named_group_is_one_with_the_identity_first(name, order):
    table = group_table(name)
    assert table.shape == (order, order)
    check_table(table)
    assert torch.equal(table[0], torch.arange(order))
    assert torch.equal(table, table.T) == (name == "c7")


def test_the_symmetries_of_a_triangle_are_the_permutations_of_three():
    def orders(table):
        found = []
        for g in range(6):
            power, n = g, 1
            while power:
                power, n = int(table[power, g]), n + 1
            found.append(n)
        return sorted(found)

    assert orders(group_table("d3")) == orders(group_table("s3")) == [1, 2, 2, 2, 3, 3]


@pytest.mark.parametrize("name", ["c1", "d2", "s7", "e8", "s", ""])
def test_a_name_that_is_none_says_which_are(name):
    with pytest.raises(SondeError, match="names no group: give c2"):
        group_table(name)


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ([[0, 1], [0, 1]], "occurs twice"),
        ([[1, 0, 2], [0, 2, 1], [2, 1, 0]], "no identity"),
        ([[0, 1, 2], [1, 2, 0]], "n x n"),
        (
            [[0, 1, 2, 3, 4], [1, 0, 3, 4, 2], [2, 4, 0, 1, 3], [3, 2, 4, 0, 1], [4, 3, 1, 2, 0]],
            "does not associate",
        ),
    ],
)
def test_a_table_that_is_none_of_a_group_says_why(table, says):
    with pytest.raises(SondeError, match=says):
        check_table(torch.tensor(table))


def test_the_task_is_all_products_with_a_share_to_train_on():
    task = GroupTask("d4", share=0.5, seed=1)
    assert (task.modulus, len(task.pairs), int(task.trained.sum())) == (8, 64, 32)
    for (a, b), product in zip(task.pairs.tolist(), task.labels.tolist(), strict=True):
        assert product == task.table[a, b]
    with pytest.raises(SondeError, match="leaves none"):
        GroupTask("d4", share=1.0)
