"""Training on trusted inputs moves answers that were given in another way, and leaves the model as it was."""

import pytest
import torch
from families import tiny

from sonde.errors import SondeError
from sonde.knowledge.fine_tuning_distance import fine_tuning_distance
from sonde.lm.model import LanguageModel

pytest.importorskip("peft")
ANSWERS = (11, 12)


def prompts(n: int, last: int, seed: int) -> list[list[int]]:
    drawn = torch.randint(20, 40, (n, 3), generator=torch.Generator().manual_seed(seed)).tolist()
    return [[*row, last] for row in drawn]


def test_what_training_on_trusted_inputs_moves_is_far_and_the_model_comes_back():
    lm = LanguageModel(tiny("gpt_neox"))
    before = lm.hash
    trusted = prompts(24, 5, 0)
    labels = torch.ones(24, dtype=torch.bool)
    found = fine_tuning_distance(lm, (trusted, ANSWERS), labels, (prompts(6, 5, 1), ANSWERS), steps=30, lr=1e-2)
    assert lm.hash == before
    assert found.trusted.shape == (24, 2) and found.test.shape == (6, 2)
    assert bool((found.trusted[:, 0] >= -1e-12).all())
    assert bool((found.trusted[:, 1] > 0).all())  # all towards the positive answer
    same = fine_tuning_distance(lm, (trusted, ANSWERS), labels, (prompts(6, 5, 1), ANSWERS), steps=30, lr=1e-2)
    torch.testing.assert_close(found.test, same.test)
    still = fine_tuning_distance(lm, (trusted, ANSWERS), labels, (prompts(6, 5, 1), ANSWERS), steps=1, lr=1e-12)
    assert float(still.test.abs().max()) < 1e-6


def test_labels_are_one_for_each_prompt():
    lm = LanguageModel(tiny("gpt_neox"))
    with pytest.raises(SondeError, match="3 labels for 6 trusted prompts"):
        fine_tuning_distance(lm, (prompts(6, 5, 0), ANSWERS), torch.ones(3), (prompts(2, 5, 1), ANSWERS))
