import pytest
import torch

from sonde.errors import SondeError
from sonde.features.dictionary import Design, Dictionary
from sonde.features.sparse_probing import sparse_probing

D = 24
pytestmark = pytest.mark.usefixtures("no_grad")


def orthogonal(d=D, seed=0):
    return torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(seed)))[0]


def perfect(directions):
    """A dictionary whose latents are the directions that the data were made of."""
    dictionary = Dictionary(Design("relu", D, len(directions), centred=False))
    dictionary.w_enc.copy_(directions)
    dictionary.w_dec.copy_(directions)
    return dictionary


@pytest.fixture(scope="module")
def world():
    """A concept in direction 7, among others that are as active and say nothing; coordinates mix them all."""
    torch.manual_seed(0)
    directions = orthogonal()
    amplitudes = torch.rand(800, D) * (torch.rand(800, D) < 0.4)
    y = torch.rand(800) < 0.5
    amplitudes[:, 7] = y * (0.5 + torch.rand(800))
    return directions, amplitudes @ directions, y


def test_one_latent_is_enough_where_the_dictionary_has_the_concept(world):
    directions, x, y = world
    found = sparse_probing(perfect(directions), x, y, ks=(1, 2))
    assert found.latents[0] == 7
    assert found.by_latents[1].estimate == 1 and found.dense.estimate > 0.98
    assert found.by_coordinates[1].high < found.by_latents[1].low
    assert found.majority.high < 0.65 and found.majority.n == found.dense.n


def test_a_dictionary_of_other_directions_needs_more_latents(world):
    _, x, y = world
    found = sparse_probing(perfect(orthogonal(seed=1)), x, y, ks=(1, 10))
    assert found.by_latents[1].high < found.dense.low
    assert found.by_latents[1].high < found.by_latents[10].low


def test_shuffled_labels_are_at_chance(world):
    directions, x, y = world
    found = sparse_probing(perfect(directions), x, y[torch.randperm(len(y))], ks=(5,))
    assert found.by_latents[5].contains(0.5) or found.by_latents[5].overlaps(found.majority)


def test_whole_numbers_are_labels_too_and_the_seed_decides_the_split(world):
    directions, x, y = world
    a, b = (sparse_probing(perfect(directions), x, labels, ks=(1,)) for labels in (y, y.long()))
    assert a == b


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (torch.ones(800), {}, "0 rows have the label 0: at least 20"),
        (torch.arange(800) % 3, {}, "a label is 2: expected 0 and 1"),
        (torch.ones(3), {}, r"labels of shape \(3,\) for 800 rows"),
        (torch.arange(800) % 2, {"ks": (0,)}, "give numbers from 1 to the 24 latents"),
        (torch.arange(800) % 2, {"ks": (25,)}, "give numbers from 1 to the 24 latents"),
        (torch.arange(800) % 2, {"test": 1.0}, "test is 1"),
    ],
)
def test_what_cannot_be_probed_is_refused(world, labels, options, message):
    directions, x, _ = world
    with pytest.raises(SondeError, match=message):
        sparse_probing(perfect(directions), x, labels, **options)
