import math

import numpy as np
import pytest
import torch

from sonde.data.biographies import biographies
from sonde.errors import SondeError
from sonde.features.dictionary import Design, Dictionary
from sonde.features.scr_tpp import PooledRows, _restored, pooled_rows, scr, tpp
from sonde.organisms.loading import load

D = 30
pytestmark = pytest.mark.usefixtures("no_grad")


def orthogonal(seed=0):
    return torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(seed)))[0]


def of_directions(directions):
    dictionary = Dictionary(Design("relu", D, len(directions), centred=False))
    dictionary.w_enc.copy_(directions)
    dictionary.w_dec.copy_(directions)
    return dictionary


def classes(seed=0):
    """Rows of four classes, each with a direction of its own, among ten that say nothing."""
    torch.manual_seed(seed)
    number = torch.arange(1200) % 4
    amplitudes = torch.zeros(1200, D)
    amplitudes[:, 4:14] = torch.rand(1200, 10)
    amplitudes[torch.arange(1200), number] = 1 + torch.rand(1200)
    return amplitudes @ orthogonal(), [f"class {i}" for i in number.tolist()]


def correlated(seed=0):
    """Rows in which a concept and another, three times as strong, each have one direction for yes and one for no."""
    rng = np.random.default_rng(seed)
    concept, spurious = rng.random((2, 1600)) < 0.5
    amplitudes = rng.random((1600, D)) * 0.2
    for side, label, size in ((0, concept, 1), (2, spurious, 3)):
        amplitudes[:, side] = label * (size + 0.3 * rng.random(1600))
        amplitudes[:, side + 1] = ~label * (size + 0.3 * rng.random(1600))
    noise = rng.normal(size=(1600, D)) * 0.3
    return torch.from_numpy(amplitudes + noise).float() @ orthogonal(), concept, spurious


def test_latents_that_are_the_classes_break_their_own_probe_alone():
    x, names = classes()
    found = tpp(PooledRows.of(of_directions(orthogonal()), x), names, ns=(1, 2))
    assert min(found.before.values()) > 0.98
    assert found.score[1].estimate == pytest.approx(0.5, abs=0.03)
    assert found.own[1].estimate == pytest.approx(0.5, abs=0.03)
    assert found.others[1].estimate == pytest.approx(0, abs=0.02)


def test_latents_that_mix_classes_break_the_others_too():
    x, names = classes()
    basis = orthogonal()
    mixed = basis.clone()
    mixed[0], mixed[1] = (basis[0] + basis[1]) / math.sqrt(2), (basis[2] + basis[3]) / math.sqrt(2)
    mixed[2], mixed[3] = basis[20], basis[21]
    clean = tpp(PooledRows.of(of_directions(basis), x), names, ns=(1,))
    found = tpp(PooledRows.of(of_directions(mixed), x), names, ns=(1,))
    assert found.score[1].high < clean.score[1].low
    nothing = tpp(PooledRows.of(of_directions(basis[20:]), x), names, ns=(1,))
    assert abs(nothing.score[1].estimate) < 0.05


def test_removing_the_latents_of_the_spurious_concept_restores_the_probe():
    x, concept, spurious = correlated()
    found = scr(PooledRows.of(of_directions(orthogonal()), x), concept, spurious, ns=(2,))
    assert found.direction == "concept" and set(found.latents[2]) == {2, 3}
    assert found.biased < 0.9 < found.clean
    assert found.score[2].value > 0.8 and found.score[2].interval.low > 0.6


def test_latents_that_do_not_separate_the_concepts_restore_less():
    x, concept, spurious = correlated()
    basis = orthogonal()
    joint = torch.cat([(basis[[0, 1]] + basis[[2, 3]]) / math.sqrt(2), basis[4:]])
    found = scr(PooledRows.of(of_directions(joint), x), concept, spurious, ns=(2,))
    perfect = scr(PooledRows.of(of_directions(basis), x), concept, spurious, ns=(2,))
    nothing = scr(PooledRows.of(of_directions(basis[10:]), x), concept, spurious, ns=(2,))
    assert found.score[2].interval.high < perfect.score[2].interval.low
    assert nothing.score[2].value == pytest.approx(0, abs=0.1)


def test_no_bias_is_nan_with_its_reason():
    share = _restored(np.ones(50), np.ones(50), np.ones(50), seed=0)
    assert math.isnan(share.value) and share.interval is None
    assert share.reason.startswith("the biased probe is right on 100.0% of rows") and "no bias" in share.reason
    rng = np.random.default_rng(0)
    barely = _restored(rng.random(50) < 0.5, np.arange(50) > 0, np.ones(50), seed=0)
    assert not math.isnan(barely.value) or "too small" in barely.reason


def test_averages_over_tokens_commute_with_ablation():
    torch.manual_seed(0)
    dictionary = Dictionary.initialised(Design("topk", D, 64, k=6))
    x, text = torch.randn(50, D), torch.arange(50) // 5
    rows = PooledRows.of(dictionary, x, text)
    gone = np.array([3, 17, 40])
    values = torch.zeros(50, 64)
    sparse = dictionary.encode(x)
    values.scatter_add_(1, sparse.indices, sparse.values)
    by_token = x - values[:, gone] @ dictionary.w_dec[gone]
    expected = torch.stack([by_token[text == i].mean(0) for i in range(10)])
    torch.testing.assert_close(rows.without(gone, np.arange(10)).float(), expected, atol=1e-5, rtol=1e-5)


def test_made_up_biographies_through_a_model():
    lm = load("organism:pebble")
    table = biographies(240, seed=0)
    dictionary = Dictionary.initialised(Design("topk", lm.d_model, 256, k=16))
    dictionary.site = "resid_post.2"
    rows = pooled_rows(lm, dictionary, table.texts, context=48)
    assert rows.x.shape == (240, lm.d_model) and rows.latents.shape == (240, 256)
    opened = [lm.tokenizer.eos_token_id, *lm.encode(table.texts[3])][:48]  # a document follows the end of another
    with lm.reading("resid_post.2") as acts:
        lm(torch.tensor([opened]))
    hidden = acts["resid_post.2"][0]
    near = [float((hidden[start:].mean(0) - rows.x[3]).norm()) for start in (0, 1)]
    assert min(near) < 1e-3
    women = np.array(table.concepts)[table.concept] == "woman"
    female = np.isin(np.array(table.tasks)[table.task], ["nurse", "dietitian", "paralegal"])
    found = scr(rows, women, women ^ (np.arange(240) % 3 == 0), ns=(2,))
    assert 0 <= found.biased <= 1 and female.any()


def test_what_cannot_be_ablated_or_counted_is_refused():
    x, names = classes()
    rows = PooledRows.of(of_directions(orthogonal()), x)
    with pytest.raises(SondeError, match="at least two classes of 20 rows"):
        tpp(rows, ["a"] * 1199 + ["b"], ns=(1,))
    with pytest.raises(SondeError, match="3 labels for 1200 rows"):
        tpp(rows, ["a", "b", "a"], ns=(1,))
    with pytest.raises(SondeError, match="give numbers from 1 to the 30 latents"):
        tpp(rows, names, ns=(31,))
    with pytest.raises(SondeError, match="four combinations of both labels"):
        scr(rows, np.arange(1200) % 2 == 0, np.arange(1200) % 2 == 0, ns=(1,))
    with pytest.raises(SondeError, match="ablations need latents that add"):
        PooledRows.of(Dictionary(Design("relu", D, 8, transcodes=True)), x)
    with pytest.raises(SondeError, match="text 1 has no token left"):
        PooledRows.of(of_directions(orthogonal()), x[:2], torch.tensor([0, 2]))
