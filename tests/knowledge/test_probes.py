import itertools

import numpy as np
import pytest
import torch
from planted_states import LAYERS, WIDTH, planted

from sonde.errors import SondeError
from sonde.knowledge.probes import PROBES, FittedProbe, fit
from sonde.knowledge.random_probes import random_probes
from sonde.knowledge.states import States
from sonde.knowledge.vinc import VincStatistics
from sonde.stats.ranks import auroc

UNSUPERVISED = [name for name, kind in PROBES.items() if not kind.supervised]


def areas(probe, states, y, **given):
    scores = probe.log_odds(states, **given).T.numpy()
    return auroc(scores, np.broadcast_to(y.numpy(), scores.shape))


def options(name, n):
    return {"erase": torch.arange(n) % 2} if PROBES[name].erases else {}


@pytest.mark.parametrize("name", PROBES)
def test_every_probe_answers_to_the_same_calls_and_comes_back_from_disk(name, tmp_path):
    states, y, *_ = planted()
    test, truth, *_ = planted(200, seed=1)
    probe = fit(name, states, y, **options(name, len(states)))
    assert probe.sign_known
    assert probe.log_odds(test).shape == (200, LAYERS)
    assert probe.direction.shape == (LAYERS, WIDTH)
    if name != "random":
        assert areas(probe, test, truth).min() > 0.95
    probe.save(tmp_path / "probe.safetensors")
    back = FittedProbe.load(tmp_path / "probe.safetensors")
    assert torch.equal(back.log_odds(test), probe.log_odds(test))
    assert (back.kind, back.sites, back.facts["n"]) == (name, states.sites, 300)
    again = fit(name, states, y, **options(name, len(states)))
    assert torch.equal(again.log_odds(test), probe.log_odds(test))


@pytest.mark.parametrize("name", UNSUPERVISED)
def test_separable_pairs_are_told_apart_before_the_sign_is_known(name):
    states, _, _, u = planted(noise=0.1)
    test, truth, *_ = planted(200, seed=1, noise=0.1)
    probe = fit(name, states)
    assert not probe.sign_known
    assert "sign unknown" in probe.facts["sign"]
    assert set(areas(probe, test, truth).round(6)) <= {0.0, 1.0}
    assert torch.cosine_similarity(probe.direction, u, dim=1).abs().min() > 0.95


@pytest.mark.parametrize("signs", ["platt", "flip"])
@pytest.mark.parametrize("name", UNSUPERVISED)
def test_the_sign_is_that_of_trusted_labels_and_of_no_others(name, signs):
    states, y, *_ = planted()
    test, truth, *_ = planted(200, seed=1)
    trusted = torch.where(torch.arange(len(y)) < 40, y, -1)
    assert areas(fit(name, states, trusted, signs=signs), test, truth).min() > 0.99
    wrong = torch.where(torch.arange(len(y)) < 40, 1 - y, -1)
    assert areas(fit(name, states, wrong, signs=signs), test, truth).max() < 0.01


def test_trusted_labels_of_one_class_leave_the_sign_unknown():
    states, y, *_ = planted()
    probe = fit("crc", states, torch.where(y == 1, 1, -1))
    assert not probe.sign_known
    assert "trusted labels are true: they decide no sign" in probe.facts["sign"]


def test_platts_scale_makes_log_odds():
    states, y, *_ = planted(2000, signal=0.5)
    test, truth, *_ = planted(4000, seed=1, signal=0.5)
    probe = fit("diff-in-means", states, y).calibrated(states, y)
    odds = probe.log_odds(test)[:, 0]
    for low, high in itertools.pairwise((-2.0, -0.7, 0.7, 2.0)):
        within = (odds > low) & (odds < high)
        assert float(odds[within].sigmoid().mean()) == pytest.approx(float(truth[within].double().mean()), abs=0.06)


def test_lda_is_the_whitened_difference_in_means():
    states, y, *_ = planted()
    probe = fit("lda", states, y)
    for layer in range(LAYERS):
        x = states.last[:, layer].double()
        groups = [x[y == c] for c in (0, 1)]
        scatter = sum((g - g.mean(0)).T @ (g - g.mean(0)) for g in groups) / (len(x) - 2)
        values, vectors = torch.linalg.eigh(scatter)
        white = vectors @ ((vectors.T @ (groups[1].mean(0) - groups[0].mean(0))) / values)
        torch.testing.assert_close(probe.direction[layer].double(), white, rtol=1e-4, atol=1e-5)


def test_lda_with_fewer_rows_than_dimensions_tells_them_apart():
    states, y, *_ = planted(14)
    assert areas(fit("lda", states, y), states, y).min() == 1.0


def test_diff_in_means_is_the_unit_difference():
    states, y, *_ = planted()
    probe = fit("diff-in-means-pair", states, y)
    rows = states.by_layer("pair")
    apart = rows[:, y == 1].mean(1) - rows[:, y == 0].mean(1)
    torch.testing.assert_close(probe.weight, torch.nn.functional.normalize(apart, dim=1))


@pytest.mark.parametrize("name", [name for name, kind in PROBES.items() if kind.erases])
def test_an_erased_concept_moves_no_score(name):
    states, y, *_ = planted()
    character = torch.arange(len(states)) % 2
    voice = 5.0 * character[:, None, None] * torch.ones(LAYERS, WIDTH)
    states = States(states.last + voice, states.pair + voice[:, :, None], states.lm_log_odds, states.sites)
    scores = fit(name, states, y, erase=character).log_odds(states)
    apart = scores[character == 1].mean(0) - scores[character == 0].mean(0)
    assert (apart / scores.std(0)).abs().max() < 1e-3
    plain = fit(name.removeprefix("leace-"), states, y).log_odds(states)
    assert (plain[character == 1].mean(0) - plain[character == 0].mean(0)).abs().max() > 1e-3


def test_what_is_erased_may_be_learned_from_other_states():
    states, y, *_ = planted()
    other = planted(200, seed=5)[0]
    shifted = States(states.last + 4.0, states.pair, states.lm_log_odds, states.sites)
    # Every row in both kinds, so that the kinds differ in nothing else.
    both = States.join([other, States(other.last + 4.0, other.pair, other.lm_log_odds, other.sites)])
    probe = fit("leace-logr", states, y, erase=(both, torch.arange(400) // 200))
    assert (probe.log_odds(shifted) - probe.log_odds(states)).abs().max() < 1e-3
    plain = fit("logr", states, y)
    assert (plain.log_odds(shifted) - plain.log_odds(states)).abs().max() > 0.5


@pytest.mark.parametrize("norm", ["leace", "mean", "burns"])
def test_ccs_normalises_by_template(norm):
    states, y, template, _ = planted(600, templates=3, noise=0.1)
    test, truth, other, _ = planted(300, seed=1, templates=3, noise=0.1)
    probe = fit("ccs", states, y, norm=norm, templates=template)
    assert areas(probe, test, truth, templates=other).min() > 0.999


@pytest.mark.parametrize("loss", ["ccs", "prompt-variance", "js"])
@pytest.mark.parametrize("init", ["default", "spherical", "pca"])
def test_ccs_finds_the_plant_with_every_loss_and_start(loss, init):
    states, _, _, _ = planted(noise=0.1)
    groups = torch.arange(len(states)) // 2
    probe = fit("ccs", states, loss=loss, init=init, norm="mean", groups=groups, restarts=4)
    test, truth, *_ = planted(200, seed=1, noise=0.1)
    found = areas(probe, test, truth)
    assert loss == "prompt-variance" or set(found.round(6)) <= {0.0, 1.0}


@pytest.mark.parametrize("loss", ["ccs", "prompt-variance", "js"])
def test_ccs_losses_are_what_they_say_and_their_slopes_theirs(loss):
    from sonde.knowledge.ccs import _slopes
    from sonde.knowledge.fitting import Task

    states, *_ = planted(12)
    groups = torch.arange(12) // 3
    task = Task(states, "pair", states.by_layer("pair"), states.moments, None, None, groups, None, 0)
    m = torch.randn(2, 12, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    p = m.sigmoid()
    true, other = p[..., 1], 1 - p[..., 0]
    if loss == "js":

        def h(q):
            return torch.special.entr(q) + torch.special.entr(1 - q)

        value = (1.5 * h((true + other) / 2) - (h(true) + h(other)) / 2).mean(1) / np.log(2)
    else:
        value = ((true - other) ** 2 + torch.minimum(p[..., 0], p[..., 1]) ** 2).mean(1)
        if loss == "prompt-variance":
            by = p.view(2, 4, 3, 2)
            value = value + (by - by.mean(2, keepdim=True)).square().sum((1, 2, 3)) / 12
    (slope,) = torch.autograd.grad(value.sum(), m)
    found, own = _slopes(loss, task, 0.5)(m.detach().float())
    torch.testing.assert_close(found.double(), value.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(own.double(), slope, rtol=1e-4, atol=1e-6)


def test_restarts_together_end_where_each_ends_alone():
    states, *_ = planted(noise=1.5)
    probe = fit("ccs", states, restarts=5)
    assert len(probe.facts["losses"][0]) == 5
    assert probe.facts["loss"] == [min(row) for row in probe.facts["losses"]]


def test_vinc_streams_to_the_same_direction():
    states, _, template, _ = planted(600, templates=3, noise=0.5)
    groups = torch.arange(600) // 3
    whole = VincStatistics().update(states, groups, template)
    parts = VincStatistics()
    for start in range(0, 600, 150):
        parts.update(states[start : start + 150], groups[start : start + 150], template[start : start + 150])
    assert parts.n == whole.n == 200
    for layer in range(LAYERS):
        one, other = (s.objective(layer, w_var=0.3, w_neg=0.5) for s in (whole, parts))
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        maps = [left @ right for left, right in (s.eraser(layer) for s in (whole, parts))]
        torch.testing.assert_close(*maps, rtol=1e-3, atol=1e-3)


def test_vinc_streamed_with_a_question_a_row_is_the_shared_one():
    states, *_ = planted()
    one = fit("vinc", states, w_var=0.2)
    other = fit("vinc", states, w_var=0.2, groups=torch.arange(len(states)))
    assert torch.cosine_similarity(one.direction, other.direction, dim=1).abs().min() > 0.999


def test_vincs_terms_are_the_covariances_that_it_names():
    states, _, template, _ = planted(300, templates=3)
    groups = torch.arange(300) // 3
    found = VincStatistics().update(states, groups, template)
    x = states.pair[:, 1].double().view(100, 3, 2, WIDTH)
    average = x.mean(1)
    v = torch.cov(average[:, 0].T) + torch.cov(average[:, 1].T)
    apart = (x - average[:, None]) / 3**0.5
    within = torch.einsum("qtsi,qtsj->ij", apart, apart) / 100
    centred = average - average.mean(0)
    cross = centred[:, 0].T @ centred[:, 1] / 99
    expected = 0.2 * v - 0.7 * within - 0.3 * (cross + cross.T)
    torch.testing.assert_close(found.objective(1, w_var=0.2, w_neg=0.3), expected, rtol=1e-4, atol=1e-4)


def test_random_probes_are_at_chance_without_signal_and_above_it_with():
    none, blank = planted(2000, signal=0.0)[0], planted(2000, seed=1)[1]
    chance = random_probes(none[:1000], blank[:1000], none[1000:], blank[1000:], draws=300)
    assert chance.mean == pytest.approx(np.full(LAYERS, 0.5), abs=0.02)
    states, y, *_ = planted()
    test, truth, *_ = planted(200, seed=1)
    found = random_probes(states, y, test, truth, draws=600)
    low, middle, high = found.quantiles()
    assert (middle > 0.6).all()
    assert (low < middle).all() and (middle < high).all()
    one = fit("random", states, y)
    assert found.aurocs.shape == (600, LAYERS)
    assert areas(one, test, truth).min() > 0.3


def test_unlabelled_rows_teach_a_supervised_probe_nothing():
    states, y, *_ = planted()
    some = torch.where(torch.arange(len(y)) < 100, y, -1)
    torch.testing.assert_close(fit("lda", states, some).weight, fit("lda", states[:100], y[:100]).weight)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, y: fit("oracle", s, y), "probe 'oracle' is unknown: use logr"),
        (lambda s, y: fit("logr", s), "logr learns from labels"),
        (lambda s, y: fit("logr", s, 0 * y), "needs labels of both classes: of 300 labels all are false"),
        (lambda s, y: fit("lda", s, 0 * y - 1), "of 0 labels all are none"),
        (lambda s, y: fit("logr", s, y + 1), "labels are 1 for true"),
        (lambda s, y: fit("logr", s, y[:5]), r"labels of shape \(5,\)"),
        (lambda s, y: fit("logr", s[:1], y[:1]), r"1 row\(s\)"),
        (lambda s, y: fit("leace-logr", s, y), "leace-logr needs erase="),
        (lambda s, y: fit("leace-logr", s, y, erase=0 * y), "nothing to erase: all 300 rows are of one class"),
        (lambda s, y: fit("logr", s, y, erase=y), "logr erases nothing: fit leace-logr"),
        (lambda s, y: fit("logr", s, y, restarts=3), "logr has no option 'restarts'"),
        (lambda s, y: fit("ccs", s, norm="batch"), "'batch' is unknown: use leace, mean, burns"),
        (lambda s, y: fit("ccs", s, loss="mse"), "loss 'mse' is unknown"),
        (lambda s, y: fit("ccs", s, loss="prompt-variance"), "prompt-variance needs groups"),
        (lambda s, y: fit("ccs", s, loss="prompt-variance", groups=torch.arange(300)), "every group has one row"),
        (lambda s, y: fit("ccs", s, restarts=0), "0 restarts"),
        (lambda s, y: fit("ccs", s, init="pca", restarts=40), "40 restarts from principal components"),
        (lambda s, y: fit("ccs", s, templates=y - 1), "templates are numbered from 0"),
        (lambda s, y: fit("vinc", s, w_neg=2.0), "w_neg 2.0"),
        (lambda s, y: fit("vinc", s, groups=0 * y), "all 300 rows ask one question"),
        (lambda s, y: fit("lda", s, y).log_odds(States(s.last[:, :2], s.pair[:, :2], s.lm_log_odds, s.sites[:2])),
         r"the probe \(lda\) is of 3 layers of width 16, these states of 2"),
        (lambda s, y: random_probes(s, 0 * y, s, y), "all 300 training labels are False"),
        (lambda s, y: random_probes(s, y, s, y, draws=0), "0 draws"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, message):
    states, y, *_ = planted()
    with pytest.raises(SondeError, match=message):
        call(states, y)


def test_other_files_are_not_probes(tmp_path):
    planted()[0].save(tmp_path / "states.safetensors")
    with pytest.raises(SondeError, match="holds no probe"):
        FittedProbe.load(tmp_path / "states.safetensors")
    fit("random", *planted()[:2]).save(tmp_path / "probe.safetensors")
    with pytest.raises(SondeError, match="holds no states"):
        States.load(tmp_path / "probe.safetensors")
