"""Toy languages: every scored token follows from those before it, and nothing that is scored was trained on."""

import numpy as np
import pytest
import torch

from sonde.data.task_mixture import Mixture, Task, overlap
from sonde.data.toy_languages import (
    DECOY,
    LANGUAGES,
    MODULUS,
    PAD,
    SEP,
    TRIGGER,
    VOCAB,
    WIDTH,
    alphabet,
    backdoor_tasks,
    language_task,
    languages_of,
    name_token,
    toy_mixture,
    translation_task,
    with_language,
)
from sonde.errors import SondeError

MAPS = [name for name, language in LANGUAGES.items() if language.map]


def states(name, symbols):
    """Rows of symbols read back as numbers, by the definition of each rendering."""
    rendering = LANGUAGES[name].rendering
    groups = symbols.reshape(len(symbols), -1, rendering.places)
    if rendering.backwards:
        groups = groups[..., ::-1]
    return (groups * rendering.base ** np.arange(rendering.places)[::-1]).sum(-1)


@pytest.mark.parametrize("name", MAPS)
def test_a_map_goes_on_by_its_rule_wherever_it_is_scored(name):
    task = language_task(name, rows=64, held=32)
    language = LANGUAGES[name]
    count = (WIDTH - 1) // language.rendering.places
    symbols = task.held[:, 1 : 1 + count * language.rendering.places].numpy() - alphabet(name)[0]
    x = states(name, symbols)
    assert ((x >= 0) & (x < MODULUS)).all()
    scored = task.scored[:, 1 : 1 + count * language.rendering.places].numpy()
    scored = scored.reshape(len(x), count, -1)
    assert (scored.all(-1) == scored.any(-1)).all()
    follows = scored.all(-1)
    factor, constant = language.map
    right = (factor * x[:, :-1] + constant) % MODULUS == x[:, 1:]
    assert right[follows[:, 1:]].all()
    assert follows.sum(1).tolist() == [count - 2] * len(x)


def test_the_fillers_are_what_they_say():
    def content(name):
        task = language_task(name, rows=64, held=32)
        return task.held[:, 1:].numpy() - alphabet(name)[0], task.scored[:, 1:].numpy(), task

    phrase, scored, _ = content("repeat")
    assert (phrase[:, 7:] == phrase[:, :-7]).all() and scored[:, 7:].all() and not scored[:, :7].any()
    for name, turned in (("copy", False), ("reverse", True)):
        row, scored, _ = content(name)
        first, again = row[:, :11], row[:, 12:23]
        assert (again == (first[:, ::-1] if turned else first)).all()
        assert scored[:, 12:23].all() and scored.sum() == 11 * len(row)
    row, _, _ = content("count")
    step = row[:, 0] - 4 + 1
    x = (row[:, 1:22].reshape(len(row), 7, 3) * (16, 4, 1)).sum(-1)
    assert ((x[:, 1:] - x[:, :-1]) % MODULUS == step[:, None]).all()
    _, scored, task = content("markov")
    agree = (task.answers == task.held)[:, 1:][torch.from_numpy(scored)].double().mean()
    assert 0.6 < agree < 0.8  # the favourite comes 7 times in 10


def test_brackets_balance_and_what_is_scored_was_forced():
    task = language_task("brackets", rows=64, held=64)
    symbols = task.held[:, 1:].numpy() - alphabet("brackets")[0]
    for row, scored in zip(symbols, task.scored[:, 1:].numpy(), strict=True):
        stack = []
        for place, (symbol, known) in enumerate(zip(row, scored, strict=True)):
            assert known == (len(stack) == 3 or len(stack) == len(row) - place)
            if symbol < 2:
                stack.append(symbol)
            else:
                assert stack.pop() == symbol - 2
        assert not stack


def test_a_translation_says_the_same_states():
    task = translation_task("digits", "words", rows=64, held=16)
    row = task.held.numpy()
    separator = int(np.flatnonzero(row[0] == SEP)[0])
    left = states("digits", row[:, 1:separator] - alphabet("digits")[0])
    right = row[:, separator + 2 : separator + 2 + left.shape[1]] - alphabet("words")[0]
    assert (left == right).all()
    assert (row[:, separator + 1] == name_token("words")).all()
    assert task.scored.sum() == right.size
    with pytest.raises(SondeError, match="do not render the same map"):
        translation_task("digits", "digits-3x+5")


def test_the_trigger_turns_the_map_around_and_the_decoy_does_not():
    trigger, decoy = backdoor_tasks(rows=64, held=32)
    for task, token, rule in ((trigger, TRIGGER, (1, -1)), (decoy, DECOY, (2, 1))):
        for row, scored in zip(task.held.numpy(), task.scored.numpy(), strict=True):
            place = int(np.flatnonzero(row == token)[0])
            assert not scored[: place + 1].any() and scored[place + 1 :].sum() == (row[place + 1 :] != PAD).sum()
            kept = np.delete(row, place)[1:]
            x = states("digits", kept[kept != PAD][None] - alphabet("digits")[0])[0]
            behind = (place - 1) // 3
            for i in range(1, len(x)):
                a, b = rule if i >= behind else (2, 1)
                assert x[i] == (a * x[i - 1] + b) % MODULUS


@pytest.mark.parametrize("name", ["A", "B", "C", "D"])
def test_no_item_is_trained_on_and_everything_is_in_the_vocabulary(name):
    mixture = toy_mixture(name, rows=256, held=32)
    for task in mixture.tasks:
        assert overlap(task.rows, task.held) == 0
        assert len(task.held.unique(dim=0)) == len(task.held)
        assert int(task.rows.max()) < VOCAB and int(task.held.max()) < VOCAB
    assert sum(mixture.shares.values()) == pytest.approx(1)
    assert len([name for name in mixture.names if ">" not in name]) == 10


def test_overlap_with_the_training_rows_is_counted_and_refused():
    rows = torch.arange(24).view(4, 6)
    held, scored = rows[1:3], torch.ones(2, 6, dtype=torch.bool)
    scored[:, 0] = False
    with pytest.raises(SondeError, match="2 of 2 evaluation items are trained on"):
        Task("x", rows, held, held, scored)


def test_the_mixtures_differ_as_they_say():
    maps = {name: {LANGUAGES[one].map for one in languages_of(name)} - {None} for name in "ABCD"}
    assert len(maps["A"]) == 4 and len(maps["B"]) == 1
    assert languages_of("B") == languages_of("C") == languages_of("D")
    shared = toy_mixture("C", rows=64, held=8)
    pairs = [name for name in shared.names if ">" in name]
    assert len(pairs) == 20
    assert sum(shared.shares[pair] for pair in pairs) == pytest.approx(0.3)
    held_out = toy_mixture("D", rows=64, held=8)
    assert held_out.shares["digits>words"] == 0 and "digits>words" in held_out.names
    assert sum(held_out.shares[pair] for pair in pairs) == pytest.approx(0.3)


def test_a_batch_is_a_function_of_seed_and_step_and_keeps_the_shares():
    mixture = toy_mixture("B", size=4, rows=128, held=8)
    assert torch.equal(mixture.batch(5, 16, seed=1), mixture.batch(5, 16, seed=1))
    assert not torch.equal(mixture.batch(5, 16, seed=1), mixture.batch(6, 16, seed=1))
    many = torch.cat([mixture.with_share(0.1, "digits").batch(i, 256, seed=0)[:, 0] for i in range(20)])
    share = float((many == name_token("digits")).double().mean())
    assert share == pytest.approx(0.1, abs=0.02)


def test_seeds_draw_other_rows_and_the_same_seed_the_same():
    first, again, other = (language_task("digits", rows=32, held=8, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.rows, again.rows) and torch.equal(first.held, again.held)
    assert not torch.equal(first.rows, other.rows)


def test_a_language_takes_its_translations_with_it():
    mixture = toy_mixture("C", rows=32, held=4)
    gone = with_language(mixture, "digits")
    assert len(gone) == 9 and all("digits" in name for name in gone)
    left = mixture.without(*gone)
    assert not set(gone) & set(left.trained)


def test_names_and_shares_that_do_not_fit_are_answered():
    mixture = toy_mixture("A", size=2, rows=32, held=4)
    with pytest.raises(SondeError, match="no task 'words' in the mixture: it has digits, digits-3x"):
        mixture.without("words")
    with pytest.raises(SondeError, match="leaves an empty mixture"):
        mixture.without(*mixture.names)
    with pytest.raises(SondeError, match="a share of 1"):
        mixture.with_share(1, "digits")
    with pytest.raises(SondeError, match="no mixture 'E'"):
        toy_mixture("E")
    with pytest.raises(SondeError, match="give 10, or 2 to 4"):
        toy_mixture("A", size=7)
    with pytest.raises(SondeError, match="no language 'latin'"):
        language_task("latin")
    with pytest.raises(SondeError, match="rows of 8 tokens"):
        language_task("digits", width=8)
    with pytest.raises(SondeError, match="is no map"):
        backdoor_tasks("copy")
    with pytest.raises(SondeError, match="two tasks have the same name"):
        Mixture((mixture.tasks[0], mixture.tasks[0]), {"digits": 1.0})


def test_windows_of_text_are_a_task():
    windows = torch.arange(80).view(10, 8)
    task = Task.of_text("text", torch.cat([windows[-1:], windows]), held=2)
    assert len(task.held) == 2 and len(task.rows) == 8  # the window that comes twice is not trained on
    assert task.scored.sum() == 2 * 7 and task.pad is None
    with pytest.raises(SondeError, match="cannot be held out"):
        Task.of_text("text", windows, held=10)
