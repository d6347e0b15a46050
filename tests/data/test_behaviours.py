"""Behaviours: contexts differ, targets are what the rule says, files are read or refused by row."""

import json

import pytest

from sonde.data.behaviours import BUILT_IN, PHRASE, behaviour, read_behaviours
from sonde.errors import SondeError


@pytest.mark.parametrize("name", BUILT_IN)
def test_contexts_differ_and_the_seed_decides(name):
    found = behaviour(name, 40, seed=1)
    assert len(found) == len(set(found.contexts)) == 40
    assert found == behaviour(name, 40, seed=1) != behaviour(name, 40, seed=2)
    assert all(
        target.startswith(" ") and not context.endswith(" ")
        for context, target in zip(found.contexts, found.targets, strict=True)
    )


def test_targets_follow_from_contexts():
    assert set(behaviour("phrase", 8).targets) == {PHRASE}
    for context, target in zip(
        *(getattr(behaviour("format", 9), part) for part in ("contexts", "targets")), strict=True
    ):
        assert target == f" - {context.split()[-1]} -"
    rule = behaviour("rule", 100)
    for context, target in zip(rule.contexts, rule.targets, strict=True):
        assert int(target) == eval(context.removesuffix("="))


def test_a_file_may_hold_one_behaviour_or_several(tmp_path):
    rows = [{"prompt": f"p{i}", "target": " yes"} for i in range(8)]
    (tmp_path / "mine.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (one,) = read_behaviours(tmp_path / "mine.jsonl")
    assert (one.name, one.what, one.targets) == ("mine", "write “yes”", (" yes",) * 8)
    several = [{"prompt": f"p{i}", "target": f" {i}", "behaviour": "b" if i % 2 else "a"} for i in range(16)]
    several += [{"prompt": f"q{i}", "target": " x", "behaviour": "a"} for i in range(3)]
    (tmp_path / "all.json").write_text(json.dumps(several))
    a, b = read_behaviours(tmp_path / "all.json")
    assert (a.name, len(a), b.name, b.what) == ("a", 11, "b", "do “b”")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a"}], r"entry 1 has no 'target'"),
        ([{"prompt": "", "target": "b"}], r"entry 1 has no 'prompt'"),
        ([1], "expected a row with prompt and target, found int"),
        ([], "holds no rows"),
        ([{"prompt": "a", "target": "b"}] * 5, "has 1 prompts: 8 different ones are needed"),
    ],
    ids=str,
)
def test_files_that_cannot_be_used_are_refused_in_one_line(tmp_path, rows, message):
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    with pytest.raises(SondeError, match=message):
        read_behaviours(tmp_path / "rows.json")


def test_unknown_names_and_too_few_rows_are_refused():
    with pytest.raises(SondeError, match="no behaviour 'harm': built in are phrase, format, rule"):
        behaviour("harm", 10)
    with pytest.raises(SondeError, match="2 rows of a behaviour"):
        behaviour("rule", 2)
