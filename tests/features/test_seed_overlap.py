import numpy as np
import pytest
import torch

from sonde.errors import SondeError
from sonde.features.dictionary import Design, Dictionary
from sonde.features.seed_overlap import mean_max_cosine, seed_overlap, unshared

D, M = 24, 60
pytestmark = pytest.mark.usefixtures("no_grad")


def dictionary(seed=0, **fields):
    return Dictionary.initialised(Design("topk", **({"inputs": D, "latents": M, "k": 4} | fields)), seed=seed)


def test_latents_in_another_order_are_all_shared_with_those_they_were():
    first, second = dictionary(), dictionary()
    order = torch.randperm(M)
    second.w_enc.copy_(3 * first.w_enc[order])
    second.w_dec.copy_(first.w_dec[order] / 3)
    found = seed_overlap(first, second)
    assert found.shared.estimate == 1
    assert torch.equal(order[torch.from_numpy(found.partner)], torch.arange(M))
    np.testing.assert_allclose(found.decoder, 1, atol=1e-6)
    assert mean_max_cosine(first, second).estimate == pytest.approx(1, abs=1e-6)


def test_exactly_the_planted_latents_are_shared():
    first, second = dictionary(0), dictionary(1)
    second.w_enc[:25], second.w_dec[:25] = first.w_enc[:25], first.w_dec[:25]
    found = seed_overlap(first, second)
    assert set(np.flatnonzero(found.partner >= 0)) == set(range(25))
    assert found.shared.estimate == pytest.approx(25 / M) and found.shared.contains(25 / M)
    third = dictionary(2)
    third.w_enc[20:40], third.w_dec[20:40] = first.w_enc[20:40], first.w_dec[20:40]
    assert unshared(first, [second, third]).estimate == pytest.approx(20 / M)


def test_the_same_decoder_row_under_another_encoder_is_not_shared():
    first, second = dictionary(0), dictionary(1)
    second.w_dec.copy_(first.w_dec)
    assert seed_overlap(first, second).shared.estimate == 0
    assert mean_max_cosine(first, second).estimate == pytest.approx(1, abs=1e-6)


def test_dictionaries_of_different_sizes_are_paired_as_far_as_they_go():
    first, second = dictionary(), dictionary(latents=40)
    second.w_enc.copy_(first.w_enc[:40])
    second.w_dec.copy_(first.w_dec[:40])
    assert seed_overlap(first, second).shared.estimate == pytest.approx(40 / M)
    assert seed_overlap(second, first).shared.estimate == 1


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(SondeError, match="inputs of 24 and 16 cannot be compared"):
        seed_overlap(dictionary(), dictionary(inputs=16))
    with pytest.raises(SondeError, match="threshold is 1"):
        seed_overlap(dictionary(), dictionary(), threshold=1.0)
    with pytest.raises(SondeError, match=r"16,385 latents are more than the 16,384"):
        seed_overlap(dictionary(), dictionary(latents=16385))
    with pytest.raises(SondeError, match="give one other dictionary"):
        unshared(dictionary(), [])
