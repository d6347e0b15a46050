"""The affine edit: every row of the table is what its formula says, and one object."""

import pytest
import torch
from families import D_MODEL, tiny, tokens

from sonde.concepts.affine import AffineEdit, mean_difference, overlap
from sonde.errors import SondeError
from sonde.lm.model import LanguageModel

D = 24


@pytest.fixture
def means():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(D, generator=generator) + 3, torch.randn(D, generator=generator)


@pytest.fixture
def h():
    return 5 * torch.randn(4, 7, D, generator=torch.Generator().manual_seed(2))


def _projected(v, u):
    return (v @ u)[..., None] * u


def test_each_row_of_the_table_is_its_formula(means, h):
    positive, negative = means
    r = positive - negative
    u = r / r.norm()
    expected = {
        "add": h + 0.5 * r,
        "ablate": h - _projected(h, u),
        "patch": h - _projected(h, u) + 2.5 * u,
        "mean": h - _projected(h, u) + _projected(negative, u),
        "ace": h - _projected(h, u) + _projected(negative, u) + 0.5 * r,
    }
    found = {
        "add": AffineEdit.add(r, 0.5)(h),
        "ablate": AffineEdit.ablate(r)(h),
        "patch": AffineEdit.patch(r, 2.5)(h),
        "mean": AffineEdit.mean_ablate(r, negative)(h),
        "ace": AffineEdit.ace(positive, negative, 0.5)(h),
    }
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=0)


@pytest.mark.parametrize("strength", [-1.5, 0.0, 0.3, 1.0, 6.0])
def test_after_ace_every_token_has_the_projection_that_was_asked_for(means, h, strength):
    positive, negative = (mean.double() for mean in means)
    u = (positive - negative) / (positive - negative).norm()
    wanted = u @ negative + strength * (positive - negative).norm()
    after = AffineEdit.ace(*means, strength)(h)
    scale = h.norm(dim=-1).max()
    assert ((after.double() @ u - wanted).abs().max() / scale) < 1e-6


def test_ace_without_reference_and_strength_is_directional_ablation(means, h):
    r = means[0] - means[1]
    u = r / r.norm()
    bare = AffineEdit(left=u[:, None], right=u[None], added=r, strength=0.0)
    torch.testing.assert_close(bare(h), AffineEdit.ablate(r)(h), atol=0, rtol=0)


def test_ace_without_projector_is_activation_addition(means, h):
    r = means[0] - means[1]
    torch.testing.assert_close(AffineEdit(added=r, strength=0.7)(h), h + 0.7 * r)


def test_ace_at_zero_is_mean_ablation(means, h):
    zero = AffineEdit.ace(*means, 0.0)
    torch.testing.assert_close(zero(h), AffineEdit.mean_ablate(means[0] - means[1], means[1])(h))


def test_a_negative_mean_without_projection_makes_ace_and_ablation_agree(means, h):
    u = torch.nn.functional.normalize(means[0] - means[1], dim=0)
    negative = means[1] - (u @ means[1]) * u
    zero = AffineEdit.ace(negative + 2 * u, negative, 0.0)
    torch.testing.assert_close(zero(h), AffineEdit.ablate(u)(h), atol=1e-5, rtol=0)


def test_an_oblique_projector_takes_out_what_it_reads(h):
    generator = torch.Generator().manual_seed(3)
    right = torch.randn(2, D, generator=generator, dtype=torch.float64)
    left = (
        torch.linalg.pinv(right) + 0.1 * (torch.eye(D) - torch.linalg.pinv(right) @ right) @ torch.randn(D, 2).double()
    )
    mean = torch.randn(D, generator=generator, dtype=torch.float64)
    edit = AffineEdit(left=left, right=right, reference=mean)
    after = edit(h.double())
    torch.testing.assert_close((after - mean) @ right.T, torch.zeros(4, 7, 2).double(), atol=1e-10, rtol=0)
    torch.testing.assert_close(edit(after), after)


def test_each_row_of_a_batch_may_have_its_own_strength(means, h):
    edit = AffineEdit.ace(*means)
    strengths = torch.tensor([-1.0, 0.0, 0.5, 2.0])
    rows = edit.at(strengths)(h)
    for row, strength in enumerate(strengths):
        torch.testing.assert_close(rows[row], edit.at(float(strength))(h)[row])


def test_another_strength_shares_the_vectors(means):
    edit = AffineEdit.ace(*means, 0.25)
    other = edit.at(3.0)
    assert float(edit.strength) == 0.25
    assert float(other.strength) == 3.0
    assert other.added.data_ptr() == edit.added.data_ptr()


def test_what_was_given_is_not_written_and_gradients_flow(means, h):
    leaf = h.clone().requires_grad_()
    AffineEdit.ace(*means, 1.0)(leaf).square().sum().backward()
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.detach(), h, atol=0, rtol=0)
    u = torch.nn.functional.normalize(means[0] - means[1], dim=0)
    torch.testing.assert_close(leaf.grad @ u, torch.zeros(4, 7), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_edited_in_float32(means, h, dtype):
    half = h.to(dtype)
    edit = AffineEdit.ace(*means, 1.0)
    assert edit(half).dtype == dtype
    torch.testing.assert_close(edit(half), edit(half.float()).to(dtype), atol=0, rtol=0)


def test_two_edits_join_into_one(means, h):
    first = AffineEdit.ace(*means, 0.5)
    generator = torch.Generator().manual_seed(5)
    second = AffineEdit.ace(torch.randn(D, generator=generator), torch.randn(D, generator=generator), -1.0)
    added = AffineEdit.add(torch.randn(D, generator=generator), 2.0)
    for pair in ((first, second), (second, first), (added, first), (first, added), (added, added)):
        torch.testing.assert_close(pair[0].then(pair[1])(h), pair[1](pair[0](h)), atol=1e-4, rtol=1e-4)


def test_overlap_is_the_largest_cosine():
    x, y = torch.eye(D)[:2]
    found = overlap(
        {
            "x": AffineEdit.ablate(x),
            "y": AffineEdit.add(y),
            "between": AffineEdit.add(x + y),
            "again": AffineEdit.add(3 * x),
        }
    )
    assert found["x", "y"] == pytest.approx(0, abs=1e-6)
    assert found["x", "between"] == pytest.approx(0.5**0.5, abs=1e-6)
    assert found["x", "again"] == pytest.approx(1)


def test_a_saved_edit_comes_back(means, h, tmp_path):
    edit = AffineEdit.ace(*means, torch.tensor([0.0, 1.0, 2.0, 3.0]))
    edit.facts = {"site": "resid_post.3"}
    edit.save(tmp_path / "edit")
    again = AffineEdit.load(tmp_path / "edit")
    torch.testing.assert_close(again(h), edit(h), atol=0, rtol=0)
    assert again.facts == edit.facts
    assert not list((tmp_path / "edit").glob("*.p*"))


def test_an_edit_of_another_class_is_refused(means, tmp_path):
    class Other(AffineEdit):
        pass

    AffineEdit.ace(*means).save(tmp_path)
    with pytest.raises(SondeError, match="holds a AffineEdit, not a Other"):
        Other.load(tmp_path)
    with pytest.raises(SondeError, match="is not the folder of an edit"):
        AffineEdit.load(tmp_path / "nothing")
    (tmp_path / "edit.safetensors").write_bytes(b"damaged")
    with pytest.raises(SondeError, match="is damaged"):
        AffineEdit.load(tmp_path)


def test_equal_means_and_broken_ones_are_refused(means):
    with pytest.raises(SondeError, match="no difference"):
        AffineEdit.ace(means[0], means[0] * (1 + 1e-8))
    with pytest.raises(SondeError, match="nan or infinity"):
        mean_difference(means[0], torch.full((D,), float("nan")))


def test_parts_that_do_not_fit_are_refused(means, h):
    with pytest.raises(ValueError, match="belong together"):
        AffineEdit(left=torch.ones(D, 1))
    with pytest.raises(ValueError, match="takes something out"):
        AffineEdit()
    with pytest.raises(ValueError, match="left is"):
        AffineEdit(left=torch.ones(D, 1), right=torch.ones(2, D))
    with pytest.raises(ValueError, match="reference has shape"):
        AffineEdit(left=torch.ones(D, 1), right=torch.ones(1, D), reference=torch.ones(D + 1))
    with pytest.raises(ValueError, match="points nowhere"):
        AffineEdit.ablate(torch.zeros(D))
    with pytest.raises(ValueError, match="added holds nan"):
        AffineEdit.add(torch.full((D,), float("nan")))
    with pytest.raises(ValueError, match="finite number"):
        AffineEdit.add(torch.ones(D), float("inf"))
    with pytest.raises(ValueError, match="width"):
        AffineEdit.ablate(torch.ones(D + 1))(h)
    with pytest.raises(ValueError, match="met a batch of 4"):
        AffineEdit.add(torch.ones(D), torch.ones(3))(h)


@pytest.mark.parametrize("family", ["gpt_neox", "llama", "gpt2", "rwkv", "mamba2"])
def test_both_rows_of_a_batch_are_edited(family):
    lm = LanguageModel(tiny(family))
    u = torch.nn.functional.normalize(torch.randn(D_MODEL), dim=0)
    with lm.editing({"resid_post.1": AffineEdit.patch(u, 4.0)}), lm.reading("resid_post.1") as acts:
        lm(tokens(2, 6))
    torch.testing.assert_close(acts["resid_post.1"] @ u, torch.full((2, 6), 4.0), atol=1e-4, rtol=0)
