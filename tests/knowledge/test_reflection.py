"""A reflection mirrors what the probe reads and nothing else, at the last prompt token alone."""

import pytest
import torch
from families import tiny

from sonde.errors import SondeError
from sonde.knowledge.reflection import Reflection, reflect
from sonde.lm.model import LanguageModel

D = 7


def test_it_mirrors_the_direction_and_keeps_the_rest():
    u, m, h = torch.randn(D), torch.randn(D), torch.randn(5, 3, D)
    once = Reflection(u, m)(h)
    unit = u / u.norm()
    torch.testing.assert_close((once - m) @ unit, -(h - m) @ unit)
    across = torch.eye(D) - torch.outer(unit, unit)
    torch.testing.assert_close((once - m) @ across, (h - m) @ across)
    torch.testing.assert_close((once - m).norm(dim=-1), (h - m).norm(dim=-1))
    torch.testing.assert_close(Reflection(u, m)(once), h)


def test_states_keep_their_type_and_are_not_written():
    h = torch.randn(2, D).bfloat16()
    before = h.clone()
    assert Reflection(torch.randn(D), torch.zeros(D))(h).dtype == torch.bfloat16
    assert torch.equal(h, before)


@pytest.mark.parametrize("family", ["gpt_neox", "llama", "mamba2"])
def test_behind_the_last_block_the_answer_is_that_of_the_mirrored_state(family):
    lm = LanguageModel(tiny(family))
    site = f"resid_post.{lm.n_layers - 1}"
    prompts = [[3, 4, 5], [6, 7, 8, 9, 10], [11, 12, 3]]
    answers = torch.tensor([[1, 2], [2, 1], [5, 6]])
    u, m = torch.randn(lm.d_model), torch.randn(lm.d_model)
    found = reflect(lm, prompts, answers, site=site, direction=u, mean=m, draws=2)
    assert found.random.shape == (2, 3)
    for i, ids in enumerate(prompts):
        with lm.reading(site) as acts, torch.no_grad():
            lm(torch.tensor([ids]))
            logits = torch.stack([lm.unembed(x)[0, -1] for x in (acts[site], Reflection(u, m)(acts[site]))])
        pair = logits[:, answers[i]]
        torch.testing.assert_close(
            torch.stack([found.plain[i], found.edited[i]]), pair[:, 1] - pair[:, 0], atol=2e-4, rtol=1e-4
        )


def test_a_planted_answer_flips_and_random_directions_leave_it():
    """A model whose answer is the sign of one coordinate, far from all others."""
    from sonde.knowledge.reflection import Reflected

    plain = torch.tensor([3.0, -3.0, 3.0, -3.0])
    found = Reflected(plain, -plain, plain[None] + torch.randn(8, 4) * 0.1)
    truth = (plain > 0).numpy()
    assert found.flipped().estimate == 1 and found.flipped_at_random().estimate == 0
    assert found.moved(truth).estimate == 6 and found.moved_at_random(truth).estimate < 0.2


def test_a_direction_without_a_plane_is_refused():
    with pytest.raises(SondeError, match="a direction of length 0 has no plane"):
        Reflection(torch.zeros(D), torch.zeros(D))
    with pytest.raises(SondeError, match="expected one vector each"):
        Reflection(torch.ones(D), torch.zeros(D + 1))
    lm = LanguageModel(tiny("gpt_neox"))
    ones = torch.ones(lm.d_model)
    with pytest.raises(SondeError, match="1 prompts and 2 pairs of answers"):
        reflect(lm, [[1]], torch.ones(2, 2, dtype=torch.long), site="resid_post.0", direction=ones, mean=ones)
