"""Features of a model's work: effects are derivatives, in every family, and what cannot be measured is refused."""

import pytest
import torch
from families import tiny

from sonde.errors import SondeError
from sonde.knowledge.anomaly_features import ABLATIONS, Ablations, Feature, activations, codes, effects, look, present
from sonde.lm.model import LanguageModel

PROMPTS = [[5, 9, 2, 17], [3, 4], [8, 8, 8, 1, 2, 30], [7, 6, 5]]
ANSWERS = (11, 12)


def model(family: str = "gpt_neox") -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(tiny(family))


def planned(lm: LanguageModel, **options: int) -> Ablations:
    sites = present(lm)
    prompts = torch.randint(0, 40, (60, 5), generator=torch.Generator().manual_seed(0)).tolist()
    return Ablations.of(sites, activations(lm, prompts, sites), **options)


def log_odds(lm: LanguageModel, ids: list[int]) -> float:
    logits = lm(torch.tensor([ids])).logits
    assert logits is not None
    return float((logits[0, -1, ANSWERS[1]] - logits[0, -1, ANSWERS[0]]).double())


@pytest.mark.parametrize("family", ["gpt_neox", "gpt2", "falcon", "llama", "mamba2", "rwkv"])
def test_effects_are_the_first_order_changes_of_the_answer(family):
    lm = model(family)
    plan = planned(lm, components=3)
    found = effects(lm, PROMPTS, ANSWERS, plan, batch=3)
    step = 1e-2
    with torch.no_grad():
        for place, site in enumerate(plan.sites):
            for row, ids in enumerate(PROMPTS):
                changed = []
                for sign in (1, -1):
                    move = lambda h, sign=sign, mean=plan.mean[place]: h + sign * step * (mean - h)  # noqa: E731
                    with lm.editing({site: move}, positions=-1):
                        changed.append(log_odds(lm, ids))
                slope = (changed[0] - changed[1]) / (2 * step)
                assert float(found.answer["mean"][place, row, 0]) == pytest.approx(slope, abs=2e-3, rel=2e-2)


def test_all_kinds_of_ablation_follow_from_values_and_gradients():
    lm = model()
    plan = planned(lm, components=2)
    found = effects(lm, PROMPTS, ANSWERS, plan)
    assert set(found.answer) == set(ABLATIONS) and found.probe is None
    assert found.answer["components"].shape == (len(plan.sites), len(PROMPTS), 2)
    whole = planned(lm, components=lm.d_model)
    # along all directions at once, ablation to the mean
    torch.testing.assert_close(
        effects(lm, PROMPTS, ANSWERS, whole).answer["components"].sum(-1),
        found.answer["mean"][..., 0],
        atol=1e-5,
        rtol=1e-4,
    )
    values, gradients = torch.randn(len(plan.sites), 5, lm.d_model), torch.randn(len(plan.sites), 5, lm.d_model)
    made = plan.effects(values, gradients)
    torch.testing.assert_close(made["zero"][..., 0], -(values * gradients).sum(-1))
    torch.testing.assert_close(made["gradient"][..., 0], gradients.norm(dim=-1))


def test_effects_do_not_depend_on_the_batch():
    lm = model()
    plan = planned(lm)
    probe = (lm.match("resid_post.*"), torch.randn(lm.n_layers, lm.d_model))
    one, all_ = (effects(lm, PROMPTS, ANSWERS, plan, probe=probe, batch=batch) for batch in (1, 32))
    for name in ABLATIONS:
        torch.testing.assert_close(one.answer[name], all_.answer[name], atol=1e-5, rtol=1e-4)
    assert one.probe is not None and all_.probe is not None
    torch.testing.assert_close(one.probe, all_.probe, atol=1e-5, rtol=1e-4)


def test_effects_on_a_probe_are_those_of_earlier_sites_on_its_reading():
    lm = model()
    plan = planned(lm)
    sites, directions = lm.match("resid_post.*"), torch.randn(lm.n_layers, lm.d_model)
    found = effects(lm, PROMPTS, ANSWERS, plan, probe=(sites, directions)).probe
    assert found is not None and found.shape == (lm.n_layers - 1, len(PROMPTS), len(plan.sites))
    depth = {site: number for number, site in enumerate(lm.sites)}
    for layer in range(1, lm.n_layers):
        for place, site in enumerate(plan.sites):
            assert bool((found[layer - 1, :, place] == 0).all()) == (depth[site] > depth[sites[layer]])
    # at its own site the reading is linear, so that the effect is the whole change
    own = plan.sites.index(sites[1])
    values = activations(lm, PROMPTS, sites)[1]
    torch.testing.assert_close(found[0, :, own], (plan.mean[own] - values) @ directions[1], atol=1e-4, rtol=1e-3)


def test_nothing_of_the_model_is_changed_and_no_gradient_stays():
    lm = model()
    before = lm.hash
    effects(lm, PROMPTS, ANSWERS, planned(lm))
    assert all(weight.grad is None for weight in lm.model.parameters())
    del lm.__dict__["hash"]
    assert lm.hash == before


def test_activations_are_those_of_the_last_token():
    lm = model()
    found = activations(lm, PROMPTS, ["mlp_out.1", "resid_post.0"], batch=2)
    with torch.no_grad(), lm.reading("resid_post.0", "mlp_out.1") as acts:
        lm(torch.tensor([PROMPTS[2]]))
    for place, site in enumerate(lm.match("mlp_out.1", "resid_post.0")):
        torch.testing.assert_close(found[place, 2], acts[site][0, -1], atol=1e-5, rtol=1e-4)


def test_all_features_of_trusted_and_test_inputs_are_there_at_once():
    lm = model()

    class Sum:
        direction = torch.ones(lm.n_layers, lm.d_model)

        def log_odds(self, states):
            return states.last.sum(-1)

    trusted = torch.randint(0, 40, (70, 4), generator=torch.Generator().manual_seed(0)).tolist()
    encoders = [torch.nn.functional.relu] * lm.n_layers
    found = look(lm, Sum(), (trusted, ANSWERS), (PROMPTS, ANSWERS), components=3, encoders=encoders)
    shapes = {feature.name: tuple(feature.test.shape) for feature in found.features}
    places, n = len(present(lm)), len(PROMPTS)
    stream = (lm.n_layers, n, lm.d_model)
    assert shapes == {
        "probe's log-odds": (n, lm.n_layers),
        **dict.fromkeys(("residual stream", "mixers", "MLPs", "codes"), stream),
        **dict.fromkeys(("effects: mean", "effects: zero", "effects: gradient"), (n, places)),
        "effects: components": (places, n, 3),
        "effects on the probe": (lm.n_layers - 1, n, places),
    }
    assert [feature.name for feature in found.features if feature.sparse] == ["codes"]
    assert [answer.tolist() for answer in found.answers][1] == [log_odds(lm, ids) > 0 for ids in PROMPTS]
    by_name = {feature.name: feature.test for feature in found.features}
    torch.testing.assert_close(by_name["residual stream"].sum(-1).T, by_name["probe's log-odds"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        by_name["mixers"], activations(lm, PROMPTS, lm.match("mixer_out.*")), atol=1e-5, rtol=1e-4
    )


def test_the_control_pools_trusted_and_test_rows():
    given = Feature("x", torch.arange(12.0).view(2, 3, 2), torch.arange(8.0).view(2, 2, 2) + 100)
    dealt = given.dealt_again(seed=1)
    assert dealt.trusted.shape == given.trusted.shape and dealt.test.shape == given.test.shape
    pools = [torch.cat([made.trusted, made.test], 1).flatten(1).sort(-1).values for made in (given, dealt)]
    assert torch.equal(*pools) and not torch.equal(given.test, dealt.test)
    with pytest.raises(SondeError, match="x: trusted features of shape"):
        Feature("x", torch.zeros(3, 2), torch.zeros(3, 4))


def test_codes_come_from_any_callable():
    states = torch.randn(2, 5, 4)
    found = codes(states, [lambda x: x.relu(), lambda x: (-x).relu()])
    assert torch.equal(found[0], states[0].relu()) and torch.equal(found[1], (-states[1]).relu())


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda lm, plan: effects(lm, [[1], []], ANSWERS, plan), "prompt 1 is empty"),
        (lambda lm, plan: effects(lm, PROMPTS, (11, 11), plan), "begin with the same token"),
        (
            lambda lm, plan: effects(lm, PROMPTS, ANSWERS, plan, probe=(["resid_post.0"], torch.zeros(1, 3))),
            "expected sites in order of depth and a direction of width",
        ),
        (lambda lm, plan: activations(lm, [], ["resid_post.0"]), "no prompts"),
        (lambda lm, plan: activations(lm, PROMPTS, ["logits"]), "logits has no vector at a token"),
        (lambda lm, plan: planned(lm, components=0), "0 components of"),
        (lambda lm, plan: codes(torch.zeros(2, 5, 4), [lambda x: x]), "1 encoders for 2 sites"),
        (lambda lm, plan: codes(torch.zeros(1, 5, 4), [lambda x: x[0]]), r"codes of shapes \[\(4,\)\]"),
        (lambda lm, plan: present(lm, ("attic.*",)), "site 'attic.\\*' does not exist"),
    ],
)
def test_what_cannot_be_measured_is_refused(broken, message):
    lm = model()
    with pytest.raises(SondeError, match=message):
        broken(lm, planned(lm))
