"""Dictionaries that learn from one pass: alone or together, killed or not, by one process or two."""

import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from families import tiny

from sonde.data.python_docs import topics
from sonde.errors import SondeError
from sonde.features.activation_buffer import Order
from sonde.features.activation_rows import Passes, Selection
from sonde.features.cross_layer import CrossLayerTranscoder
from sonde.features.crosscoder import crosscoder
from sonde.features.data_parallel import Processes
from sonde.features.design import Design
from sonde.features.dictionary import Dictionary
from sonde.features.plan import Plan, grid
from sonde.features.step import Step
from sonde.features.step_config import StepConfig
from sonde.features.trainee import Trainee
from sonde.features.training import measured, train_dictionaries
from sonde.lm.batches import TokenBatches
from sonde.lm.model import LanguageModel
from sonde.organisms.small_lm import train_tokenizer

QUICK = StepConfig(lr=3e-3, dead_after=600)
SMALL = Order(batch=128)


@pytest.fixture(scope="module")
def lm():
    return LanguageModel(tiny("gpt_neox", vocab_size=400), train_tokenizer(topics()[:20], 400), name="tiny")


@pytest.fixture(scope="module")
def text(lm):
    return TokenBatches(None, lm.tokenizer, context=32, rows=8, limit_tokens=4000, shuffle=True)


def same(first, second):
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def of_many_kinds(lm):
    """Several sites, widths, kinds and seeds."""
    d = lm.d_model
    return [
        *grid(lm, ["resid_post.*"], latents=[48], ks=[4], config=QUICK),
        *grid(lm, ["resid_post.1"], kinds=["relu", "jumprelu", "gated"], latents=[64], ks=[4], config=QUICK),
        *grid(lm, ["mlp_out.1"], kinds=["batchtopk", "matryoshka"], latents=[64], ks=[4], seeds=[3], config=QUICK),
        Plan("mlp_in.1", Design("topk", d, 64, 4, transcodes=True, skip=True), QUICK, target="mlp_out.1"),
        Plan(("resid_post.0", "resid_post.1"), crosscoder([d, d], 64, k=4), QUICK, scale="rms"),
        Plan(
            ("mlp_in.0", "mlp_in.1"),
            Design("topk", d, 32, 4, transcodes=True),
            QUICK,
            target=("mlp_out.0", "mlp_out.1"),
        ),
    ]


def test_many_at_once_are_what_each_is_alone_and_explain_more_than_at_first(lm, text):
    plans = of_many_kinds(lm)
    together = train_dictionaries(lm, text, plans, order=SMALL)
    for plan, dictionary in zip(plans, together, strict=True):
        (alone,) = train_dictionaries(lm, text, [plan], order=SMALL)
        assert same(dictionary, alone), plan.name
        facts = (dictionary if isinstance(dictionary, Dictionary) else dictionary.layers[0]).facts
        assert facts["curve"][-1]["fvu"] < 0.9 * facts["curve"][0]["fvu"], plan.name
        assert not facts["truncated"] and facts["tokens"] == facts["steps"] * 128
    assert isinstance(together[-1], CrossLayerTranscoder)


def test_the_model_runs_once_a_batch_whatever_the_number_of_dictionaries(lm, text, monkeypatch):
    calls = []
    whole = LanguageModel.__call__
    monkeypatch.setattr(LanguageModel, "__call__", lambda self, *a, **k: calls.append(1) or whole(self, *a, **k))
    counts = []
    for plans in (of_many_kinds(lm)[:1], of_many_kinds(lm)):
        train_dictionaries(lm, text, plans, tokens=1280, order=SMALL)
        counts.append(len(calls))
    assert counts[1] == 2 * counts[0]


def test_a_dictionary_says_where_it_comes_from_and_is_loaded_as_it_was(lm, text, tmp_path):
    (made,) = train_dictionaries(lm, text, grid(lm, ["resid_post.1"], latents=[48], ks=[4]), tokens=512, order=SMALL)
    made.save(tmp_path)
    loaded = Dictionary.load(tmp_path)
    assert (loaded.site, loaded.model, loaded.model_hash) == ("resid_post.1", "tiny", lm.hash)
    assert loaded.facts["tokens"] == 512 and loaded.facts["text_hash"] == text.hash
    assert same(made, loaded)


@pytest.mark.parametrize("scale", ["norm", "rms", "whiten"])
def test_a_scale_is_folded_in_after_training(lm, text, scale):
    config = StepConfig(lr=1e-2)
    plans = grid(lm, ["resid_post.1"], latents=[96], ks=[8], config=config, scale=scale)
    (made,) = train_dictionaries(lm, text, plans, order=Order(batch=128, epochs=4))
    passes = Passes(lm, text, ["resid_post.1"])
    x = passes.next_rows()["resid_post.1"]
    with torch.no_grad():
        fvu = float((x - made(x)).square().sum() / (x - x.mean(0)).square().sum())
    assert fvu == pytest.approx(made.facts["curve"][-1]["fvu"], abs=0.12)
    assert fvu < 0.6


class Killed(Exception):
    pass


@pytest.mark.parametrize("mode", ["direct", "buffer", "disk"])
def test_a_killed_training_ends_with_the_same_numbers(lm, text, tmp_path, monkeypatch, mode):
    folder = tmp_path / "rows" if mode == "disk" else None
    order = Order(mode, batch=128, size=512, folder=folder, epochs=2)
    plans = of_many_kinds(lm)[2:6]
    arguments = {"tokens": 5000, "order": order, "selection": Selection(outliers=10)}
    whole = train_dictionaries(lm, text, plans, **arguments)
    update, path = Step.update, tmp_path / "checkpoint.safetensors"
    for stop in (5, 12, 30):

        def killed(self, stop=stop):
            if self.done == stop and "jumprelu" in str(self.dictionaries[0]):
                raise Killed
            return update(self)

        monkeypatch.setattr(Step, "update", killed)
        with pytest.raises(Killed):
            train_dictionaries(lm, text, plans, checkpoint=path, checkpoint_every=3, **arguments)
    monkeypatch.setattr(Step, "update", update)
    for _ in range(2):  # going on, and reading what has ended
        resumed = train_dictionaries(lm, text, plans, checkpoint=path, checkpoint_every=3, **arguments)
        for ours, theirs in zip(resumed, whole, strict=True):
            assert same(ours, theirs)
            assert ours.facts == theirs.facts


RUN = """
import sys, time
from pathlib import Path

import torch

torch.set_num_threads(1)
from families import tiny
from sonde.features.activation_buffer import Order
from sonde.features.plan import grid
from sonde.features.step_config import StepConfig
from sonde.features.training import train_dictionaries
from sonde.lm.batches import TokenBatches
from sonde.lm.model import LanguageModel
from transformers import PreTrainedTokenizerFast

out = Path(sys.argv[1])
tokenizer = PreTrainedTokenizerFast.from_pretrained(sys.argv[2])
lm = LanguageModel(tiny("gpt_neox", vocab_size=400), tokenizer, name="tiny")
plans = grid(lm, ["resid_post.*"], kinds=["topk", "relu"], latents=[48], ks=[4], config=StepConfig(lr=3e-3))
text = TokenBatches(None, tokenizer, context=32, rows=4, limit_tokens=6000, shuffle=True)
order = Order("buffer" if "buffer" in sys.argv else "direct", batch=64, size=256)
(out / "began").touch()
found = train_dictionaries(
    lm, text, plans, order=order, checkpoint=out / "checkpoint.safetensors", checkpoint_every=2,
    tokens=int(sys.argv[3]),
)
if text.rank == 0:
    for plan, dictionary in zip(plans, found, strict=True):
        dictionary.save(out / plan.name)
else:
    for plan, dictionary in zip(plans, found, strict=True):
        dictionary.save(out / f"other-{plan.name}")
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
"""


def command(tmp_path, out, *words, processes=1):
    """A training as a program of its own, and its environment."""
    script = tmp_path / "run.py"
    script.write_text(RUN)
    here = Path(__file__).parents[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{here}{os.pathsep}{here.parent / 'src'}"}
    start = [sys.executable]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        start += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
        start += ["--master-addr", "127.0.0.1", "--master-port", port]
    out.mkdir(exist_ok=True)
    return [*start, str(script), str(out), str(tmp_path / "tokenizer"), *words], environment


def files(folder):
    """Weights and configurations of all dictionaries in a folder, as bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.glob("*/*"))
        if path.suffix in (".json", ".safetensors")
    }


def plans_of_a_run(lm):
    config = StepConfig(lr=3e-3)
    return grid(lm, ["resid_post.*"], kinds=["topk", "relu"], latents=[48], ks=[4], config=config)


def trained_here(lm, mode):
    text = TokenBatches(None, lm.tokenizer, context=32, rows=4, limit_tokens=6000, shuffle=True)
    order = Order(mode, batch=64, size=256)
    return train_dictionaries(lm, text, plans_of_a_run(lm), order=order, tokens=4000)


def test_a_process_that_is_killed_leaves_the_same_files_in_the_end(lm, tmp_path):
    lm.tokenizer.save_pretrained(tmp_path / "tokenizer")
    for plan, dictionary in zip(plans_of_a_run(lm), trained_here(lm, "buffer"), strict=True):
        dictionary.save(tmp_path / "whole" / plan.name)
    words, environment = command(tmp_path, tmp_path / "cut", "4000", "buffer")
    process = subprocess.Popen(words, env=environment)
    while process.poll() is None and not (tmp_path / "cut" / "checkpoint.safetensors").exists():
        time.sleep(0.005)
    time.sleep(random.random() / 5)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    subprocess.run(words, env=environment, check=True, timeout=300)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    assert not list((tmp_path / "cut").rglob("*.part"))


def test_two_processes_take_the_steps_of_one(lm, tmp_path):
    lm.tokenizer.save_pretrained(tmp_path / "tokenizer")
    words, environment = command(tmp_path, tmp_path / "two", "1280", processes=2)
    subprocess.run(words, env=environment, check=True, timeout=400)
    found = files(tmp_path / "two")
    kept = {name: data for name, data in found.items() if not name.startswith("other-")}
    assert kept == {name.removeprefix("other-"): data for name, data in found.items() if name.startswith("other-")}
    # one process that is given the rows of both, step by step
    shares = [
        TokenBatches(None, lm.tokenizer, context=32, rows=4, limit_tokens=6000, shuffle=True, rank=rank, world=2)
        for rank in (0, 1)
    ]
    plans = plans_of_a_run(lm)
    sources = [Order(batch=64).source(lm, share, lm.match("resid_post.*")) for share in shares]
    whole = TokenBatches(None, lm.tokenizer, context=32, rows=4, limit_tokens=6000, shuffle=True)
    alone = reference(lm, whole, plans, sources, steps=10)
    for plan, expected in zip(plans, alone, strict=True):
        loaded = Dictionary.load(tmp_path / "two" / plan.name)
        assert loaded.facts["tokens"] == 1280 and loaded.facts["steps"] == 10
        for name, value in expected.state_dict().items():
            torch.testing.assert_close(loaded.state_dict()[name], value, rtol=2e-3, atol=2e-4)


def reference(lm, text, plans, sources, steps):
    """Trainees of one process that step on the rows of several sources, one after the other."""
    processes = Processes(lm.device)
    samples = measured(lm, text, lm.match("resid_post.*"), Selection(), processes)
    trainees = [Trainee(plan, steps, processes, samples) for plan in plans]
    for _ in range(steps):
        taken = [source.take() for source in sources]
        rows = {site: torch.cat([part[site] for part in taken]) for site in taken[0]}
        for trainee in trainees:
            trainee.descend(rows, lm, None, None)
    return [trainee.finished({}, {}) for trainee in trainees]


@pytest.mark.parametrize("centre", ["mean", "median", "none"])
def test_a_bias_starts_at_the_centre_of_a_sample_on_the_scale_of_training(lm, text, centre):
    processes = Processes(lm.device)
    sample = measured(lm, text, ["resid_post.1"], Selection(), processes, median=True)["resid_post.1"]
    plan = Plan("resid_post.1", Design("topk", lm.d_model, 48, 4), scale="norm", centre=centre)
    bias = Trainee(plan, 10, processes, {"resid_post.1": sample}).step.module.b_dec.detach()
    expected = {"mean": sample.mean, "median": sample.median, "none": 0 * sample.mean}[centre]
    torch.testing.assert_close(bias, (expected * lm.d_model**0.5 / sample.norm).float())


@pytest.mark.parametrize("loss", ["kl", "ce"])
@pytest.mark.parametrize("scale", ["none", "norm"])
def test_end_to_end_training_lowers_what_the_model_loses(lm, text, loss, scale, tmp_path):
    config = StepConfig(lr=1e-2)
    design = Design("topk", lm.d_model, 64, 4)
    plans = [Plan("resid_post.1", design, config, end_to_end=loss, scale=scale)]
    path = tmp_path / "checkpoint"
    (made,) = train_dictionaries(lm, text, plans, tokens=2000, checkpoint=path, checkpoint_every=3)
    curve = made.facts["curve"]
    assert curve[-1][loss] < curve[0][loss] - 1e-3
    (again,) = train_dictionaries(lm, text, plans, tokens=2000)
    assert same(made, again)


def test_less_text_than_asked_for_is_said(lm, text):
    plans = grid(lm, ["resid_post.0"], latents=[32], ks=[2])
    with pytest.warns(UserWarning, match=r"fewer than the 100,000 asked for"):
        (made,) = train_dictionaries(lm, text, plans, tokens=100_000, order=SMALL)
    assert made.facts["truncated"] and made.facts["wanted"] == 100_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"site": "resid_pots.1"}, "nearest: resid_post.1"),
        ({"site": "resid_post.*"}, "is a pattern"),
        ({"site": "logits"}, "logits has width 400, and the design 32"),
        ({"site": "state.1"}, "is a memory"),
    ],
)
def test_sites_that_do_not_fit_are_refused(lm, text, changes, message):
    fields = {"site": "resid_post.1", "design": Design("topk", lm.d_model, 32, 2), **changes}
    with pytest.raises(SondeError, match=message):
        train_dictionaries(lm, text, [Plan(**fields)], order=SMALL)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": "mlp_out.1"}, "has a target"),
        ({"scale": "size"}, "scale is"),
        ({"centre": "mode"}, "centre is"),
        ({"site": ("embed", "mlp_out.1")}, "several sites are for a crosscoder"),
        ({"end_to_end": "mse"}, "kl or ce"),
        ({"design": Design("topk", 32, 32, 2, ranked_by_norm=True), "scale": "whiten"}, "takes no such scale"),
        ({"design": Design("topk", 32, 32, 2, layer_norm=True), "scale": "norm"}, "take no scale"),
    ],
)
def test_plans_that_mean_nothing_are_refused(changes, message):
    with pytest.raises(SondeError, match=message):
        Plan(**{"site": "resid_post.1", "design": Design("topk", 32, 32, 2), **changes})


def test_trainings_that_cannot_be_are_refused(lm, text, tmp_path):
    plans = grid(lm, ["resid_post.0"], latents=[32], ks=[2])
    for given, options, message in (
        ([], {}, "nothing to train"),
        ([*plans, *plans], {}, "two dictionaries are called"),
        (plans, {"order": Order(batch=4096)}, "fewer than a batch of 4,096"),
        (plans, {"order": SMALL, "tokens": 0}, "give 1 or more"),
    ):
        with pytest.raises(SondeError, match=message):
            train_dictionaries(lm, text, given, **options)
    ended = [Plan("resid_post.0", Design("topk", 32, 32, 2), end_to_end="kl")]
    with pytest.raises(SondeError, match="mode is direct, not buffer"):
        train_dictionaries(lm, text, ended, order=Order("buffer", batch=32, size=64))
    train_dictionaries(lm, text, plans, tokens=256, order=SMALL, checkpoint=tmp_path / "checkpoint")
    with pytest.raises(SondeError, match="another training"):
        train_dictionaries(lm, text, plans, tokens=512, order=SMALL, checkpoint=tmp_path / "checkpoint")


def test_a_grid_is_every_combination(lm):
    settings = {"latents": [32, 64], "ks": [2, 4], "sparsities": [0.1], "seeds": [0, 1]}
    plans = grid(lm, ["resid_post.*"], kinds=["topk", "relu"], **settings)
    assert len(plans) == 3 * 2 * (2 * 2 + 1 * 2)
    assert len({plan.name for plan in plans}) == len(plans)
    json.dumps([plan.to_json() for plan in plans])
    assert all(a.name != b.name for a, b in itertools.pairwise(plans))
