import json

import pytest
import torch
from families import tiny, tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from sonde.concepts.contrast import Contrast, common_norm, contrast, cosines
from sonde.errors import SondeError
from sonde.lm.model import LanguageModel
from sonde.lm.prompt_rows import like_lengths


@pytest.fixture(scope="module")
def lm():
    return LanguageModel(tiny("gpt2"), name="tiny")


def ragged(rows, *, seed=0, shortest=2, longest=12):
    lengths = torch.randint(shortest, longest, (rows,), generator=torch.Generator().manual_seed(seed))
    drawn = tokens(rows, longest, seed=seed)
    return [row[:n].tolist() for row, n in zip(drawn, lengths.tolist(), strict=True)]


@pytest.mark.parametrize("family", ["gpt2", "mamba", "mamba2", "rwkv", "recurrent_gemma", "llama"])
@pytest.mark.parametrize("position", [-1, -2, 1])
def test_means_are_those_of_one_prompt_at_a_time(family, position):
    lm = LanguageModel(tiny(family))
    sides = ragged(7, seed=1), ragged(5, seed=2)
    made = contrast(lm, *sides, sites=["resid_post.*", "mixer_out.1"], position=position, batch=3)
    assert (made.n_positive, made.n_negative) == (7, 5)
    for prompts, means in zip(sides, (made.positive, made.negative), strict=True):
        with lm.reading("resid_post.*", "mixer_out.1") as acts:
            rows = []
            for ids in prompts:
                lm(torch.tensor([ids]))
                rows.append({site: value[0, position] for site, value in acts.items()})
        for site in made.sites:
            expected = torch.stack([row[site] for row in rows]).double().mean(0).float()
            torch.testing.assert_close(means[site], expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(
                made.difference(site), made.positive[site] - made.negative[site], rtol=1e-4, atol=1e-5
            )


def test_the_discriminant_is_fishers(lm):
    sides = ragged(40, seed=1), ragged(40, seed=2)
    made = contrast(lm, *sides, sites="resid_post.1", covariance=True)
    plain = contrast(lm, *sides, sites="resid_post.1")
    torch.testing.assert_close(made.difference("resid_post.1"), plain.difference("resid_post.1"))
    values = []
    for prompts in sides:
        with lm.reading("resid_post.1") as acts:
            rows = []
            for ids in prompts:
                lm(torch.tensor([ids]))
                rows.append(acts["resid_post.1"][0, -1])
        values.append(torch.stack(rows).double())
    s = sum((v - v.mean(0)).T @ (v - v.mean(0)) for v in values) / 78
    s = 0.8 * s + 0.2 * s.diagonal().mean() * torch.eye(len(s), dtype=s.dtype)
    expected = torch.linalg.solve(s, made.difference("resid_post.1").double()).float()
    found = made.discriminant("resid_post.1", shrinkage=0.2)
    assert torch.cosine_similarity(found, expected, 0) > 1 - 1e-5
    torch.testing.assert_close(found.norm(), made.difference("resid_post.1").norm())
    with pytest.raises(SondeError, match="kept no covariance"):
        plain.discriminant("resid_post.1")
    with pytest.raises(ValueError, match="shrinkage is 2"):
        made.discriminant("resid_post.1", shrinkage=2)


def test_lengths_are_set_and_zero_stays_zero(lm):
    made = contrast(lm, [[5, 7, 9]], [[6, 7, 9]], sites=["embed", "resid_post.*"])
    assert not made.difference("embed").any()  # the last token is the same
    units = made.differences(unit=True)
    assert not units["embed"].any()
    torch.testing.assert_close(units["resid_post.2"].norm(), torch.tensor(1.0))
    torch.testing.assert_close(made.differences(norm=3.0)["resid_post.2"].norm(), torch.tensor(3.0))
    with pytest.raises(SondeError, match="do not differ at embed: the vector is zero"):
        made.require_difference("embed")
    assert made.require_difference("resid_post.0").any()


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(1, 9), st.booleans())
def test_batches_hold_every_row_once_and_rows_of_like_length(lengths, batch, equal):
    groups = like_lengths(lengths, batch, equal=equal)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        inside = [lengths[i] for i in group]
        assert len(group) <= batch
        assert min(inside) >= (1.0 if equal else 0.9) * max(inside)


def test_a_contrast_comes_back_from_its_folder(lm, tmp_path):
    made = contrast(lm, ragged(4, seed=1), ragged(4, seed=2), covariance=True)
    made.save(tmp_path)
    back = Contrast.load(tmp_path, lm)
    assert back.sites == made.sites and back.position == -1 and back.model_hash == lm.hash
    assert (back.n_positive, back.n_negative) == (4, 4)
    for site in made.sites:
        assert torch.equal(back.difference(site), made.difference(site))
        assert torch.equal(back.positive[site], made.positive[site])
        assert torch.equal(back.within[site], made.within[site])


def test_a_contrast_of_another_model_width_or_template_is_refused(lm, tmp_path):
    contrast(lm, ragged(4, seed=1), ragged(4, seed=2)).save(tmp_path)
    other = LanguageModel(tiny("gpt2", seed=1), name="other")
    with pytest.raises(SondeError, match="made from tiny, whose weights are not those of other"):
        Contrast.load(tmp_path, other)
    assert Contrast.load(tmp_path, other, force=True).model_name == "tiny"
    with pytest.raises(SondeError, match=r"has width 32 at resid_post\.0, wide has 16"):
        Contrast.load(tmp_path, LanguageModel(tiny("gpt2", n_embd=16), name="wide"), force=True)
    with pytest.raises(SondeError, match=r"has resid_post\.2, which shallow does not have"):
        Contrast.load(tmp_path, LanguageModel(tiny("gpt2", n_layer=2), name="shallow"))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "template": "of another chat"}))
    with pytest.raises(SondeError, match="another chat template"):
        Contrast.load(tmp_path, lm)


def test_a_damaged_folder_is_named(lm, tmp_path):
    with pytest.raises(SondeError, match="is not the folder of a contrast"):
        Contrast.load(tmp_path / "nowhere", lm)
    contrast(lm, [[3, 4]], [[5, 6]]).save(tmp_path)
    (tmp_path / "contrast.safetensors").write_bytes(b"no")
    with pytest.raises(SondeError, match="is missing or damaged"):
        Contrast.load(tmp_path, lm)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SondeError, match="is not the configuration of a contrast"):
        Contrast.load(tmp_path, lm)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(SondeError, match="cannot be read"):
        Contrast.load(tmp_path, lm)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positive": []}, "there are no positive prompts"),
        ({"negative": [[]]}, "prompt 0 is empty"),
        ({"negative": [[3, 4, 5]]}, "do not differ at token -1: every vector is zero"),
        ({"position": -4}, "prompt 0 has 3 tokens: it has no token -4"),
        ({"position": 3}, "prompt 0 has 3 tokens: it has no token 3"),
        ({"sites": "resid_post.9"}, "site 'resid_post.9' does not exist"),
        ({"sites": "logits"}, "logits has no vector at a token"),
        ({"sites": "state.1"}, r"state\.1 has no vector at a token"),
        ({"positive": ["text"]}, "made without a tokenizer"),
    ],
    ids=str,
)
def test_bad_input_is_answered_in_one_line(lm, change, message):
    given = {"positive": [[3, 4, 5]], "negative": [[3, 4, 6]], **change}
    with pytest.raises(SondeError, match=message):
        contrast(lm, given.pop("positive"), given.pop("negative"), **given)


def test_one_string_is_not_a_list_of_prompts(lm):
    with pytest.raises(TypeError, match="not one string"):
        contrast(lm, "one", "two")


def test_several_behaviours_get_one_norm_and_keep_their_directions(lm):
    made = {name: contrast(lm, ragged(4, seed=i), ragged(4, seed=9)) for i, name in enumerate(("one", "two"))}
    scaled = common_norm(made)
    for site in made["one"].sites:
        norms = [vectors[site].norm() for vectors in scaled.values()]
        mean = sum(one.difference(site).norm() for one in made.values()) / 2
        torch.testing.assert_close(torch.stack(norms), mean.expand(2))
        for name, one in made.items():
            assert torch.cosine_similarity(scaled[name][site], one.difference(site), 0) > 1 - 1e-5
    other = contrast(lm, ragged(4, seed=1), ragged(4, seed=2), sites="resid_post.1")
    with pytest.raises(SondeError, match="at the same sites"):
        common_norm({"one": made["one"], "other": other})


def test_cosines_are_of_all_pairs_of_sites_and_need_one_width(lm):
    one = contrast(lm, ragged(4, seed=1), ragged(4, seed=2))
    found = cosines(one, one)
    torch.testing.assert_close(found.diagonal(), torch.ones(len(one.sites)))
    v, w = one.difference("resid_post.0"), one.difference("resid_post.2")
    torch.testing.assert_close(found[0, 2], torch.cosine_similarity(v, w, 0))
    narrow = LanguageModel(tiny("gpt2", n_embd=16), name="narrow")
    with pytest.raises(SondeError, match=r"of width 32 \(tiny\) and 16 \(narrow\) have no cosine"):
        cosines(one, contrast(narrow, ragged(4, seed=1), ragged(4, seed=2)))
