"""One optimisation step: what it keeps, what it counts, where it stops, and that it goes on to the bit."""

import pytest
import torch

from sonde.errors import SondeError
from sonde.features.cross_layer import CrossLayerTranscoder
from sonde.features.dictionary import Design, Dictionary
from sonde.features.fitting import fit
from sonde.features.step import Step
from sonde.features.step_config import StepConfig
from sonde.files import load_bundle, save_bundle

RUNS = {
    "relu": (Design("relu", 16, 64), {}),
    "relu, free norms": (Design("relu", 16, 64), {"norm": "free"}),
    "topk": (Design("topk", 16, 64, 4), {"dead_after": 400}),
    "topk, muon": (Design("topk", 16, 64, 4, multi_topk=True), {"optimizer": "muon"}),
    "topk, sign": (Design("topk", 16, 64, 4), {"optimizer": "signsgd", "k_start": 16, "k_steps": 9}),
    "groupmax": (Design("groupmax", 16, 64, 4), {}),
    "batchtopk": (Design("batchtopk", 16, 64, 4), {"threshold_start": 3, "micro_rows": 50}),
    "matryoshka": (Design("matryoshka", 16, 64, 4), {"threshold_start": 3}),
    "jumprelu": (Design("jumprelu", 16, 64, threshold=0.1, bandwidth=0.05), {"target_l0": 4.0}),
    "jumprelu, sign": (
        Design("jumprelu", 16, 64, threshold=0.1, bandwidth=0.05, ste_to_input=True),
        {"penalty": "tanh", "optimizer": "signsgd", "dead_penalty": 0.1, "dead_after": 300},
    ),
    "gated": (Design("gated", 16, 64), {}),
    "skip transcoder": (Design("topk", 16, 64, 4, outputs=8, transcodes=True, skip=True), {"micro_rows": 64}),
}
COMMON = {"lr": 3e-3, "warmup": 3, "steps": 20, "decay": 4, "sparsity_warmup": 5}


def batches(many=20, rows=120, *, seed=0):
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(6, 16, generator=g)
    return [torch.randn(rows, 6, generator=g).relu() @ mix + 1 for _ in range(many)]


def started(name, **changes):
    design, fields = RUNS[name]
    mean = batches(1)[0].mean(0)
    dictionary = Dictionary.initialised(design, mean=mean, target_mean=mean[: design.outputs])
    return Step(dictionary, StepConfig(**{**COMMON, **fields, **changes}))


def targets(step, x):
    design = step.module.design
    return 2 * x[:, : design.outputs] if design.transcodes else None


@pytest.mark.parametrize("name", RUNS)
def test_a_step_that_was_saved_goes_on_to_the_bit(name, tmp_path):
    xs, step = batches(), started(name)
    for x in xs[:9]:
        step(x, targets(step, x))
    save_bundle(tmp_path / "step", step.state())
    wanted = [step(x, targets(step, x)) for x in xs[9:]]
    again = Step(Dictionary(step.module.design), step.config)
    again.load(load_bundle(tmp_path / "step"))
    assert [again(x, targets(again, x)) for x in xs[9:]] == wanted
    for a, b in zip(step.module.state_dict().values(), again.module.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert (again.done, again.tokens_seen) == (20, 20 * 120)
    assert torch.equal(again.since_fired[0], step.since_fired[0])


@pytest.mark.parametrize("name", set(RUNS) - {"jumprelu", "jumprelu, sign", "gated", "relu", "relu, free norms"})
def test_the_error_falls(name):
    step = started(name, steps=0, decay=0, k_start=None)
    xs = batches(60)
    history = [step(x, targets(step, x))["fvu"] for x in xs]
    assert sum(history[-5:]) < 0.8 * sum(history[:5])


@pytest.mark.parametrize("name", ["topk", "topk, sign", "jumprelu", "gated", "batchtopk"])
def test_decoder_rows_keep_length_1_after_the_step(name):
    step = started(name)
    for x in batches(5):
        step(x)
        assert torch.allclose(step.module.w_dec.norm(dim=1), torch.ones(64), atol=1e-5)
    step.finish()
    assert torch.allclose(step.module.w_dec.norm(dim=1), torch.ones(64), atol=1e-5)


@pytest.mark.parametrize("name", ["relu, free norms", "skip transcoder"])
def test_free_norms_are_left_alone(name):
    step = started(name)
    for x in batches(5):
        step(x, targets(step, x))
    assert float(step.module.w_dec.detach().norm(dim=1).std()) > 1e-4


@pytest.mark.parametrize("name", ["jumprelu", "jumprelu, sign"])
def test_thresholds_move_and_stay_at_0_or_above(name):
    step = started(name, lr=0.05)
    before = step.module.threshold.detach().clone()
    for x in batches(15):
        step(x)
        assert float(step.module.threshold.detach().min()) >= 0
    assert not torch.equal(before, step.module.threshold)


@pytest.mark.parametrize("name", ["topk", "skip transcoder", "relu"])
def test_micro_batches_add_up_to_the_batch(name):
    moved = []
    for micro in (None, 50):
        step = started(name, micro_rows=micro, dead_after=10**9)
        step.module.double()
        step = Step(step.module, step.config)
        for x in batches(3):
            terms = step(x.double(), targets(step, x.double()))
        moved.append((terms, [p.detach().clone() for p in step.module.parameters()]))
    (one, ones), (many, manys) = moved
    assert one == pytest.approx(many, abs=1e-9)
    for a, b in zip(ones, manys, strict=True):
        assert torch.allclose(a, b, atol=1e-9)
    assert step.done == 3


def test_a_latent_is_dead_after_tokens_whatever_the_number_of_steps():
    dead = []
    for rows in (40, 120):
        step = started("topk", dead_after=480, aux_weight=0.0)
        with torch.no_grad():
            step.module.b_enc[:10] = -100
        dead.append([step(x)["dead"] for x in batches(480 // rows, rows)])
    assert all(history[-2] == 0 and history[-1] >= 10 / 64 for history in dead)
    assert not step.since_fired[0][step.since_fired[0] < 120].any()


def test_a_threshold_follows_the_smallest_value_that_is_kept():
    step = started("batchtopk", micro_rows=None, threshold_start=2, threshold_decay=0.75)
    seen, wanted = [], 0.0
    for x in batches(5):
        step.module.train()
        values = step.module.encode(x).values
        step.module.eval()
        smallest = float(values[values > 0].min().detach())
        step(x)
        wanted = 0.0 if step.done <= 2 else smallest if not wanted else 0.75 * wanted + 0.25 * smallest
        seen.append(float(step.module.threshold.detach()))
        assert seen[-1] == pytest.approx(wanted, rel=1e-5)
    assert seen[:2] == [0, 0]


def test_the_gradient_is_clipped_and_its_norm_reported():
    moved = []
    for clip in (None, 1e-3):
        step = started("topk", optimizer="muon", clip=clip, warmup=0)
        assert step(batches(1)[0])["gradient"] > 1e-3
        moved.append(step.optimisers[1].state[step.module.b_dec]["exp_avg"].norm())
    assert float(moved[1]) < float(moved[0])


def test_the_averaged_weights_are_kept_and_training_goes_on_from_the_others():
    step = started("topk, sign")
    for x in batches(5):
        step(x)
    moving = step.module.w_enc.detach().clone()
    mean = step.optimisers[0].state[step.module.w_enc]["mean"]
    with step.settled():
        assert torch.equal(step.module.w_enc, mean)
    assert torch.equal(step.module.w_enc, moving)
    step.finish()
    assert torch.equal(step.module.w_enc, mean)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stops_with_its_place(value):
    step = started("topk")
    step.module.site = "resid_post.3"
    xs = batches(2)
    step(xs[0])
    before = step.module.w_enc.detach().clone()
    xs[1][17, 3] = value
    with pytest.raises(SondeError, match=r"activations of resid_post.3 hold (nan|inf) in batch 1, row 17"):
        step(xs[1])
    assert torch.equal(before, step.module.w_enc)
    step = started("skip transcoder")
    with pytest.raises(SondeError, match=r"activations of the dictionary hold"):
        step(xs[1], torch.zeros(120, 8) + torch.arange(120.0)[:, None])
    with pytest.raises(SondeError, match="too large"):
        started("topk")(xs[0] * 1e30)


BAD_BATCHES = {
    "no rows: every token was masked": ("topk", torch.zeros(0, 16), None),
    "are all equal": ("topk", torch.ones(5, 16), None),
    "width 12.*width 16": ("topk", torch.zeros(5, 12), None),
    "takes no y": ("topk", torch.randn(5, 16), torch.zeros(5, 16)),
    "needs the targets y of width 8": ("skip transcoder", torch.randn(5, 16), None),
    "targets have width 9.*width 8": ("skip transcoder", torch.randn(5, 16), torch.zeros(5, 9)),
    "5 rows of activations and 6": ("skip transcoder", torch.randn(5, 16), torch.zeros(6, 8)),
}


@pytest.mark.parametrize("message", BAD_BATCHES)
def test_a_batch_that_does_not_fit_is_refused(message):
    name, x, y = BAD_BATCHES[message]
    with pytest.raises(SondeError, match=message):
        started(name)(x, y)


def test_weights_of_half_precision_are_not_trained():
    with pytest.raises(SondeError, match=r"bfloat16.*float32"):
        Step(Dictionary(RUNS["topk"][0]).bfloat16())


def test_the_state_of_another_design_is_refused():
    state = started("topk").state()
    with pytest.raises(SondeError, match="does not fit"):
        started("jumprelu").load(state)


def test_arrays_are_fitted_the_same_way_from_the_same_seed():
    x = torch.cat(batches(10))
    design, config = Design("topk", 16, 64, 4), StepConfig(lr=3e-3, warmup=5)
    one, history = fit(x, design, config, steps=60, rows=128, seed=3)
    two, _ = fit(x, design, config, steps=60, rows=128, seed=3)
    assert torch.equal(one.w_dec, two.w_dec)
    assert history[-1]["fvu"] < 0.5 * history[0]["fvu"]
    with pytest.raises(SondeError, match="fewer than a batch"):
        fit(x[:100], design, config, rows=128)


def test_layers_of_a_cross_layer_transcoder_learn_together(tmp_path):
    xs = [torch.stack([x, x.roll(1, 1), x**2 / 4], 1) for x in batches(60)]
    made = CrossLayerTranscoder.initialised(3, 16, 64, k=4)
    step = Step(made, StepConfig(lr=3e-3, warmup=3, dead_after=2000))
    history = [step(x, x.cumsum(1)) for x in xs]
    assert history[-1]["fvu"] < 0.6 * history[0]["fvu"]
    assert history[-1]["l0"] <= 12
    save_bundle(tmp_path / "step", step.state())
    again = Step(CrossLayerTranscoder.initialised(3, 16, 64, k=4, seed=9), step.config)
    again.load(load_bundle(tmp_path / "step"))
    assert again(xs[0], xs[0].cumsum(1)) == step(xs[0], xs[0].cumsum(1))
    assert torch.equal(made(xs[0]), again.module(xs[0]))
