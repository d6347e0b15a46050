"""Language models that learn from bought labels, and prompts made of them."""

import families
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from sonde.errors import SondeError
from sonde.knowledge.few_shot import FewShot, Prompted
from sonde.knowledge.label_lm import FineTuned, Parts, stage_settings
from sonde.knowledge.label_losses import LogConfidence
from sonde.knowledge.label_methods import Only, Sequential, UncertaintySampling
from sonde.knowledge.label_problem import LabelSource, Problem, Purchase
from sonde.knowledge.label_score import rates
from sonde.knowledge.label_training import StageSettings
from sonde.knowledge.text_rows import TextRows, Wording, label_tokens
from sonde.lm.model import LanguageModel
from sonde.organisms.small_lm import word_tokenizer

NAMES = ("ann", "ben", "cleo", "dan", "eve", "fay", "gus", "hal", "ida", "jim", "kim", "lee")
GOOD, BAD = ("sun", "tea"), ("rain", "mud")
WORDS = ("<unk>", "<bos>", "no", "yes", "likes", "and", *NAMES, *GOOD, *BAD)
WORDING = Wording(template="{text} ", between=" ")
QUICK = StageSettings(lr=5e-3, passes=1500)


def model(family="gpt_neox"):
    return LanguageModel(families.tiny(family), word_tokenizer(WORDS), name=family)


def statements(n, seed):
    rng = np.random.default_rng(seed)
    seen: dict[str, int] = {}
    while len(seen) < n:
        truth = int(rng.integers(2))
        a, b, c = rng.choice(NAMES, 3)
        seen[f"{a} and {b} and {c} likes {rng.choice(GOOD if truth else BAD)}"] = truth
    texts = list(seen)
    return texts, np.array([seen[text] for text in texts])


def task(pool=160, test=80):
    texts, truth = statements(pool + test, 0)
    rng = np.random.default_rng(1)
    weak = np.where(rng.random(pool + test) < 0.8, truth, 1 - truth) * 0.8 + 0.1
    return Problem(
        texts=texts[:pool],
        test_texts=texts[pool:],
        test_truth=truth[pool:],
        sources=[
            LabelSource.of("weak", weak[:pool], price="1/10", test_labels=weak[pool:]),
            LabelSource.of("oracle", truth[:pool], price=1),
        ],
        name="tastes",
    )


TASK = task()
ORDER = {"weak": 100, "oracle": 40}


def right(method, order, seed=0):
    outcome = method(TASK, Purchase(TASK, order, seed=seed), seed=seed)
    return rates(outcome.scores, TASK.test_truth)[0], outcome


@pytest.mark.parametrize("family", ["gpt_neox", "llama", "gemma3_text", "mamba2", "mamba", "rwkv"])
def test_a_prefix_that_is_run_once_and_forked_gives_what_the_whole_text_gives(family):
    lm, questions = model(family), ["ann likes tea", "ben and dan likes mud", "eve likes sun"]
    prefix = "cleo likes rain no dan likes tea yes"
    forked = TextRows(lm, questions, prefix=prefix).all_last()
    whole = TextRows(lm, [f"{prefix} {question}" for question in questions]).all_last(batch=1)
    assert torch.allclose(forked, whole, atol=2e-4 * float(whole.abs().max()))


def test_gradients_through_the_forked_prefix_are_those_of_the_whole_text():
    lm, questions, prefix = model("llama"), ["ann likes tea", "ben likes mud"], "cleo likes rain no"
    weight = lm.model.get_parameter("model.layers.0.self_attn.k_proj.weight").requires_grad_(True)
    found = []
    for rows in (TextRows(lm, questions, prefix=prefix), TextRows(lm, [f"{prefix} {q}" for q in questions])):
        (gradient,) = torch.autograd.grad(rows.last([0, 1]).square().sum(), weight)
        found.append(gradient)
    lm.model.requires_grad_(False)
    assert float(found[0].abs().max()) > 0
    assert torch.allclose(found[0], found[1], atol=1e-4 * float(found[1].abs().max()))


@pytest.mark.parametrize("rank", [4, None])
def test_it_learns_what_labels_say_and_leaves_the_model_as_it_was(rank):
    lm = model()
    before = {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}
    accuracy, outcome = right(Sequential(FineTuned(lm, rank=rank, stage=QUICK, least_steps=50)), ORDER)
    assert accuracy > 0.9
    assert {name: len(rows) for name, rows in outcome.bought.items()} == ORDER and outcome.cost == 50
    after = lm.model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert not any(p.requires_grad for p in lm.model.parameters())


def test_equal_seeds_give_equal_scores_and_no_labels_say_nothing():
    backend = FineTuned(model(), rank=2, stage=StageSettings(lr=3e-3, passes=60), least_steps=4)
    first, second = (right(Sequential(backend), {"weak": 20, "oracle": 8}, seed=3)[1].scores for _ in range(2))
    assert (first == second).all()
    nothing = right(Sequential(backend), {"weak": 0, "oracle": 0})[1]
    assert nothing.cost == 0 and np.abs(nothing.scores).max() < 0.1


def test_a_stage_can_train_the_head_or_the_body_alone():
    lm = model()
    stages: list[tuple[Parts, ...]] = [("head",), ("head", "all"), ("body",)]
    for parts in stages:
        backend = FineTuned(lm, rank=2, stage=StageSettings(lr=3e-3, passes=40), train=parts, keep_optimiser=True)
        learner = backend.learner(TASK, seed=0)
        head = learner.head.weight.detach().clone()
        purchase = Purchase(TASK, ORDER, seed=0)
        learner.fit(*purchase.take("weak"))
        assert torch.equal(head, learner.head.weight) == (parts == ("body",))
        assert learner._body is not None
        assert any(bool(p.any()) for p in learner._body[1::2]) == (parts == ("body",))  # B, which is 0 at the start
        learner.fit(*purchase.take("oracle"))
        assert any(bool(p.any()) for p in learner._body[1::2]) == (parts != ("head",))


def test_other_methods_and_losses_go_with_it():
    backend = FineTuned(model(), rank=2, stage=QUICK, least_steps=50, loss=LogConfidence(warmup=10))
    for method in (UncertaintySampling(backend=backend), Prompted(backend, 4, wording=WORDING)):
        accuracy, outcome = right(method, ORDER)
        assert accuracy > 0.8 and outcome.cost == 50
        assert outcome.settings["loss"]["name"] == "log-confidence"


def test_rows_of_a_prompt_are_paid_for_and_not_trained_on(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "sonde.knowledge.label_lm.FineTunedLearner.fit", lambda self, rows, labels: seen.append((self, rows)) or ()
    )
    backend = FineTuned(model(), rank=2)
    for source, left in (("oracle", {"weak": 100, "oracle": 32}), ("weak", {"weak": 92, "oracle": 40})):
        seen.clear()
        outcome = right(Prompted(backend, 8, source, WORDING), ORDER)[1]
        assert {name: len(rows) for name, rows in outcome.bought.items()} == ORDER
        assert [len(rows) for _, rows in seen] == list(left.values())
        prompt = seen[0][0]._backend.prefix
        assert prompt.count("likes") == 8
        trained = {TASK.texts[row] for _, rows in seen for row in rows}  # type: ignore[index]
        assert not any(text in prompt for text in trained)


def test_few_shot_scores_are_the_log_odds_of_the_label_words():
    lm = model("llama")
    accuracy, outcome = right(FewShot(lm, WORDING, shots=6, batch=16), ORDER)
    assert {name: len(rows) for name, rows in outcome.bought.items()} == {"weak": 0, "oracle": 6}
    rows = np.random.default_rng([0, 0]).permutation(6)
    taken, labels = Purchase(TASK, ORDER, seed=0).take("oracle", 6)
    classes = labels.argmax(1).numpy()
    prompt = "".join(f"{TASK.texts[taken[i]]} {WORDING.words[classes[i]]} " for i in rows)  # type: ignore[index]
    for place in (0, 7):
        logs = F.log_softmax(lm(prompt + TASK.test_texts[place]).logits[0, -1].double(), -1)  # type: ignore[index]
        assert outcome.scores[place] == pytest.approx(float(logs[3] - logs[2]), abs=2e-3)
    zero = right(FewShot(lm, WORDING, shots=0), {"weak": 0, "oracle": 0})[1]
    assert zero.cost == 0 and 0 <= accuracy <= 1


def test_orders_are_averaged():
    lm, single = model("llama"), []
    for orders in (1, 2):
        single.append(right(FewShot(lm, WORDING, shots=4, orders=orders), ORDER)[1].scores)
    assert np.abs(single[0] - single[1]).max() > 1e-6


def test_one_class_and_too_few_held_out_rows_are_said():
    backend = FineTuned(model(), rank=2, stage=StageSettings(lr=3e-3, passes=20))
    notes = right(Only(backend=backend), {"oracle": 3})[1].notes
    assert any(note.startswith("oracle: no early stopping") for note in notes)
    alone = next(
        seed for seed in range(40) if len(Purchase(TASK, ORDER, seed=seed).take("oracle", 2)[1].argmax(1).unique()) == 1
    )
    outcome = right(FewShot(backend.lm, WORDING, shots=2), ORDER, seed=alone)[1]
    assert outcome.notes and outcome.notes[0].startswith("all 2 rows of the prompt are of class")


def test_what_makes_no_sense_is_refused():
    lm = model()
    with pytest.raises(SondeError, match="all different"):
        label_tokens(lm, ["ann likes tea"], ("no", "no"))
    with pytest.raises(SondeError, match="not one token each"):
        label_tokens(lm, ["ann likes tea"], ("yes yes", "no"))
    with pytest.raises(SondeError, match=r"text 0 has \d+ tokens behind a prompt of \d+, and gpt_neox reads 128"):
        right(Prompted(FineTuned(lm), 30, wording=WORDING), ORDER)
    with pytest.raises(SondeError, match="log-confidence"):
        api = StageSettings(api=True, passes=100)
        right(Only(backend=FineTuned(lm, stage=api, loss=LogConfidence())), {"oracle": 20})
    with pytest.raises(SondeError, match=r"a prompt of 50 rows needs as many labels of 'oracle': 40 were ordered"):
        right(FewShot(lm, WORDING, shots=50), ORDER)
    with pytest.raises(SondeError, match=r"3 label words for 2 classes"):
        right(FewShot(lm, Wording(("a", "b", "c"))), ORDER)
    with pytest.raises(SondeError, match=r"no \{text\}"):
        Wording(template="what")
    features = Problem(
        features=torch.randn(4, 2),
        test_features=torch.randn(2, 2),
        test_truth=np.array([0, 1]),
        sources=[LabelSource.of("oracle", [0, 1, 0, 1], price=1)],
    )
    for method in (Sequential(FineTuned(lm)), FewShot(lm), Prompted(FineTuned(lm))):
        with pytest.raises(SondeError, match="no texts"):
            method(features, Purchase(features, {"oracle": 2}), seed=0)
    with pytest.raises(SondeError, match="expected all, head or body"):
        FineTuned(lm, train=("tail",)).learner(TASK, seed=0)  # type: ignore[arg-type]
    mute = LanguageModel(families.tiny("gpt_neox"), name="mute")
    with pytest.raises(SondeError, match="without a tokenizer"):
        FineTuned(mute).learner(TASK, seed=0)


def test_settings_follow_the_size_of_the_model():
    settings = stage_settings(model())
    assert (settings.lr, settings.passes, settings.batch, settings.patience) == (2e-3, 3000, 32, 4)
    assert FineTuned(model()).settings["rank"] == 8 and FineTuned(model(), rank=None).name == "all weights"
    uncertain = Prompted(FineTuned(model()), 2, method=lambda backend: UncertaintySampling(backend=backend))
    assert uncertain.name == "2-shot prompt, uncertainty"
