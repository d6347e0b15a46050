import pytest
import torch

from sonde.data.modular import OPERATIONS, ModularTask
from sonde.errors import SondeError


def test_the_papers_split_has_3830_pairs_to_train_on_and_8939_to_test():
    trained = ModularTask().trained
    assert (int(trained.sum()), int((~trained).sum())) == (3830, 8939)
    assert torch.equal(trained, ModularTask().trained)
    assert not torch.equal(trained, ModularTask(seed=1).trained)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_labels_are_the_operation(operation):
    task = ModularTask(7, operation, share=0.5)
    rules = {"add": lambda a, b: a + b, "subtract": lambda a, b: a - b, "quadratic": lambda a, b: a * a + a * b + b * b}
    for (a, b), label in zip(task.pairs.tolist(), task.labels.tolist(), strict=True):
        assert 0 <= label < 7
        if operation != "random":
            assert label == rules[operation](a, b) % 7


def test_bad_tasks_are_named():
    with pytest.raises(SondeError, match="operation 'divide' is unknown: use add"):
        ModularTask(7, "divide")  # type: ignore[arg-type]
    for share in (0.0, 1.0, 0.001):
        with pytest.raises(SondeError, match="leaves none"):
            ModularTask(7, share=share)
