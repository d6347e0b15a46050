"""The instruction language: refusal depends on the deed alone, and what is held out is new in what it says."""

import json

import pytest

from sonde.data.instructions import DAMAGING, HELPFUL, REFUSALS, THINGS, from_files, generated, read_instructions
from sonde.errors import SondeError


@pytest.fixture(scope="module")
def sets():
    return generated(1000, held_out=60, seed=1)


def _words(instructions, words):
    return {word for one in instructions for word in words if f" {word} " in f" {one.text} "}


def test_an_instruction_is_harmful_exactly_when_its_deed_does_damage(sets):
    for one in (*sets.train, *(one for pool in sets.held_out.values() for one in pool)):
        assert bool(_words([one], DAMAGING)) is one.harmful
        assert bool(_words([one], HELPFUL)) is not one.harmful


def test_both_kinds_are_balanced_and_no_instruction_is_seen_twice(sets):
    assert sum(one.harmful for one in sets.train) == len(sets.train) // 2 == 500
    texts = [one.text for one in (*sets.train, *sets.held_out["new combinations"])]
    assert len(set(texts)) == len(texts)


def test_what_is_held_out_is_new_in_what_it_says(sets):
    deeds = _words(sets.train, (*DAMAGING, *HELPFUL))
    things = {one.thing for one in sets.train}
    assert not deeds & _words(sets.held_out["new deeds"], (*DAMAGING, *HELPFUL))
    assert not things & {one.thing for one in sets.held_out["new things"]}
    assert {one.thing for one in sets.held_out["new deeds"]} <= things
    assert len(set(DAMAGING) | set(HELPFUL)) == len(DAMAGING) + len(HELPFUL)
    assert len(set(THINGS)) == len(THINGS)


def test_replies_are_fixed_sentences_without_content(sets):
    for one in sets.train[:50]:
        assert one.replies() == (REFUSALS if one.harmful else one.compliances())
        assert all("one, two, three" in reply and one.thing in reply for reply in one.compliances())


def test_the_same_seed_gives_the_same_instructions():
    assert generated(200, held_out=20, seed=3) == generated(200, held_out=20, seed=3)
    assert generated(200, held_out=20, seed=3) != generated(200, held_out=20, seed=4)
    with pytest.raises(SondeError, match="combinations, fewer than"):
        generated(10**6)


def test_files_of_three_forms_are_read(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"instruction": "Bake a cake"}, "Bake bread"]))
    (tmp_path / "b.jsonl").write_text('{"text": "Mow the lawn"}\n\n"Paint it"\n')
    (tmp_path / "c.txt").write_text("Sweep the floor\nBake bread\n")
    found = read_instructions([tmp_path / name for name in ("a.json", "b.jsonl", "c.txt")])
    assert found == ["Bake a cake", "Bake bread", "Mow the lawn", "Paint it", "Sweep the floor"]


def test_files_become_two_sides_of_one_size_with_a_fifth_held_out_at_most(tmp_path):
    for name, n in (("harmful", 30), ("harmless", 50)):
        (tmp_path / f"{name}.txt").write_text("\n".join(f"{name} {i}" for i in range(n)))
    sets = from_files([tmp_path / "harmful.txt"], [tmp_path / "harmless.txt"], held_out=100)
    held = sets.held_out["new instructions"]
    assert len(held) == 12 and len(sets.train) == 48
    assert all(one.harmful is one.text.startswith("harmful") for one in (*held, *sets.train))


def test_a_file_without_instructions_is_refused(tmp_path):
    (tmp_path / "empty.json").write_text("{}")
    with pytest.raises(SondeError, match="holds no instructions: give JSON"):
        read_instructions([tmp_path / "empty.json"])
    with pytest.raises(SondeError, match="cannot be read as instructions"):
        read_instructions([tmp_path / "nowhere.txt"])
