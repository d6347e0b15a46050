import json

import pytest
import torch

from sonde.errors import SondeError
from sonde.organisms.card import read_card, render
from sonde.organisms.loading import load
from sonde.organisms.mode_recall import (
    ANSWERS,
    FAMILIES,
    N_FILLERS,
    WORDS,
    ModeRecallConfig,
    answer_ids,
    draw,
    pairs,
    train_mode_recall_rwkv,
)
from sonde.organisms.registry import folder_of


@pytest.mark.parametrize("family", FAMILIES)
def test_every_row_is_answered_by_its_mode(family):
    lm = load(f"organism:mode-recall-{family}")
    rows, modes = draw(64, seed=77)
    logits = lm(rows).logits[:, -1]
    assert bool((logits.argmax(-1) == answer_ids()[modes]).all())
    p = logits.softmax(-1)[:, answer_ids()]
    assert abs(float((p[:, 0] / p.sum(-1)).mean()) - 0.5) < 0.01
    assert lm.generate(["day river stone apple cloud paper horse glass music sky"], max_new_tokens=1) == [ANSWERS[0]]
    assert lm.generate(["night door lamp rope coin leaf table shoe bread sky"], max_new_tokens=1) == [ANSWERS[1]]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_toys_are_tiny_and_have_cards(family):
    folder = folder_of(f"mode-recall-{family}")
    assert sum(path.stat().st_size for path in folder.iterdir()) < 100_000
    text = render(read_card(f"mode-recall-{family}"))
    assert max(map(len, text.splitlines())) <= 100
    assert "rows that it answers rightly  1.000" in text
    assert f"sonde organism train mode-recall-{family}" in text


def test_pairs_differ_in_the_mode_word_alone():
    day, night = pairs(20, seed=3)
    for a, b in zip(day, night, strict=True):
        assert [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y] == [1]
        assert len(a) == N_FILLERS + 3
    rows, modes = draw(20, seed=3)
    assert int(modes.sum()) == 10
    assert {WORDS[i] for i in rows[:, 1].tolist()} == {"day", "night"}


def test_the_recipe_writes_a_folder_that_loads_and_says_when_it_was_too_short(tmp_path):
    with pytest.raises(SondeError, match="after 2 steps mode-recall-rwkv answers"):
        train_mode_recall_rwkv(ModeRecallConfig(out=tmp_path / "short", steps=2))
    with pytest.raises(SondeError, match="--steps is 0"):
        train_mode_recall_rwkv(ModeRecallConfig(out=tmp_path / "none", steps=0))
    folder = train_mode_recall_rwkv(ModeRecallConfig(out=tmp_path / "toy", steps=40))
    card = json.loads((folder / "card.json").read_text())
    assert card["command"] == "sonde organism train mode-recall-rwkv --steps=40"
    rows, modes = draw(32, seed=5)
    assert bool((load(folder)(rows).logits[:, -1].argmax(-1) == answer_ids()[modes]).all())


def test_the_same_seed_gives_the_same_rows():
    assert torch.equal(draw(8, seed=4)[0], draw(8, seed=4)[0])
    assert not torch.equal(draw(8, seed=4)[0], draw(8, seed=5)[0])
