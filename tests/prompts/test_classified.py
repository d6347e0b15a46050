"""Prompts for a classifier's score, on a tiny network with letters for tokens."""

import numpy as np
import pytest
from families import tiny

from sonde.errors import SondeError
from sonde.lm.model import LanguageModel
from sonde.prompts.classified import read_score, score_curve
from sonde.prompts.elicitation import Budget


@pytest.fixture(scope="module")
def lm():
    model = LanguageModel(tiny("gpt_neox"))
    model.encode = lambda text: [ord(letter) % 90 for letter in text]
    model.decode = lambda ids: "".join(chr(33 + i % 90) for i in ids)
    return model


def early(texts):
    """Share of letters from the first half."""
    return [sum(ord(letter) < 78 for letter in text) / max(1, len(text)) for text in texts]


def test_reward_raises_the_score_of_the_models_own_texts_on_other_contexts(lm):
    contexts = [f"{a}{b}x" for a in "abcdef" for b in "ghij"]
    found = score_curve(lm, contexts, early, Budget(lengths=(2,), restarts=1, steps=60, batch=8, lrs=(1.0,)), tokens=3)
    assert found.lengths == (0, 2) and found.values.shape == (2, len(found.texts))
    assert found.mean(2).estimate > found.mean(0).estimate
    assert np.allclose(early(found.texts), found.values[1])


def test_a_file_with_a_function_is_read_and_anything_else_is_refused(tmp_path):
    (tmp_path / "own.py").write_text("def score(texts):\n    return [len(text) for text in texts]\nnumber = 3\n")
    assert read_score(f"{tmp_path}/own.py:score")(["ab", "c"]) == [2, 1]
    with pytest.raises(SondeError, match="has no function 'number'"):
        read_score(f"{tmp_path}/own.py:number")
    with pytest.raises(SondeError, match=r"none\.py does not exist"):
        read_score("none.py:score")
    (tmp_path / "bad.py").write_text("1 / 0")
    with pytest.raises(SondeError, match=r"cannot be run: ZeroDivisionError"):
        read_score(f"{tmp_path}/bad.py:score")
