import pytest
import torch

from sonde.errors import SondeError
from sonde.features.absorption import absorption, word_rows
from sonde.features.dictionary import Design, Dictionary
from sonde.organisms.loading import load

D, LETTERS, PER, OWN = 80, "ABCD", 210, 70
pytestmark = pytest.mark.usefixtures("no_grad")


def world(taken=0.0, seed=0):
    """Words x = 2 (letter) + (word); a dictionary with a latent for each letter and for each word.

    `taken` of the words of letter A have a latent of their own that holds the letter too, and silences its latent.
    """
    torch.manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(D, D))[0]
    letters = [letter for letter in LETTERS for _ in range(PER)]
    number = torch.arange(len(LETTERS)).repeat_interleave(PER)
    own = 4 + torch.arange(len(letters)) % OWN
    x = 2 * basis[number] + basis[own] + 0.01 * torch.randn(len(letters), D)
    hit = (number == 0) & ((own - 4) < round(OWN * taken))
    absorbers = round(OWN * taken)
    dictionary = Dictionary(Design("jumprelu", D, 4 + OWN + absorbers, centred=False))
    letter_rows, word_parts = basis[:4], basis[4 : 4 + OWN]
    joint = 2 * basis[0] + word_parts[:absorbers]
    # the letter's latent is suppressed on absorbed words, of whichever letter has it; these stay above for B, C, D
    encoder = torch.cat([letter_rows, word_parts, joint / joint.norm(dim=1, keepdim=True) if absorbers else joint])
    dictionary.w_enc.copy_(encoder)
    dictionary.w_dec.copy_(encoder)
    dictionary.threshold.fill_(0.3)
    if absorbers:
        dictionary.w_enc[0] -= 3 * word_parts[:absorbers].sum(0)  # silent on them
        dictionary.b_enc[4 + OWN :] -= 6 * 1.95  # a joint latent needs both: √5 against 4/√5 for A alone
        dictionary.w_enc[4 + OWN :] *= 6
    return dictionary, x, letters, hit


def test_nothing_is_absorbed_where_each_letter_has_its_latent():
    dictionary, x, letters, _ = world()
    found = absorption(dictionary, x, letters)
    assert found.full.estimate == 0 and found.fraction.estimate == pytest.approx(0, abs=0.05)
    assert [one.main[0] for one in found.letters] == [0, 1, 2, 3]
    assert all(one.words == PER // 2 for one in found.letters)


@pytest.mark.parametrize("taken", [0.2, 0.4])
def test_the_planted_share_of_absorbed_words_is_found_by_both_definitions(taken):
    dictionary, x, letters, hit = world(taken)
    values = dictionary.encode(x)
    fired = ((values.indices == 0) & (values.values > 0)).any(1)
    assert not bool(fired[hit].any()) and bool(fired[(torch.tensor([a == "A" for a in letters])) & ~hit].all())
    found = absorption(dictionary, x, letters)
    letter = found.letters[0]
    assert letter.main == (0,)
    assert letter.full == pytest.approx(taken, abs=0.08)
    assert letter.fraction == pytest.approx(taken, abs=0.12)
    assert set(letter.absorbers) <= set(range(4 + OWN, 4 + OWN + round(OWN * taken)))
    assert found.full.estimate == pytest.approx(taken / 4, abs=0.03) and found.full.n == 2 * PER
    assert all(one.full == 0 for one in found.letters[1:])


def test_words_are_read_after_lines_that_spell_others():
    lm = load("organism:pebble")
    x, words, letters = word_rows(lm, "resid_post.2", limit=60, examples=3)
    assert x.shape == (60, lm.d_model) and len(set(words)) == 60
    assert all(word[0].upper() == letter and word.isalpha() for word, letter in zip(words, letters, strict=True))
    again, same, _ = word_rows(lm, "resid_post.2", limit=60, examples=3)
    assert same == words and torch.equal(again, x)


def test_what_has_no_absorption_is_refused():
    dictionary, x, letters, _ = world()
    with pytest.raises(SondeError, match="2 letters for 840 rows"):
        absorption(dictionary, x, ["A", "B"])
    with pytest.raises(SondeError, match="0 letters have 500 words or more"):
        absorption(dictionary, x, letters, least=500)
    with pytest.raises(SondeError, match="test is 0"):
        absorption(dictionary, x, letters, test=0.0)
    with pytest.raises(SondeError, match="in the space of the words' own activations"):
        absorption(Dictionary(Design("relu", D, 8, transcodes=True)), x, letters)
