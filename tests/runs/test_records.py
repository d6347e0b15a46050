import json
import math
import os

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sonde.errors import SondeError
from sonde.runs.records import append, append_text, read, repair


def test_scalars_of_torch_and_numpy_are_read_back_as_numbers(tmp_path):
    path = tmp_path / "log.jsonl"
    append(path, {"loss": torch.tensor(0.5), "rank": np.int64(3), "site": "resid_post.3", "none": None})
    assert read(path) == [{"loss": 0.5, "rank": 3, "site": "resid_post.3", "none": None}]


def test_nan_is_null_with_a_reason(tmp_path):
    path = tmp_path / "log.jsonl"
    append(path, {"loss": math.nan, "norm": torch.tensor(math.inf), "step": 1})
    assert "NaN" not in path.read_text()
    assert read(path) == [{"loss": None, "norm": None, "step": 1, "reason": "loss is nan, norm is inf"}]


def test_arrays_and_objects_are_refused(tmp_path):
    with pytest.raises(TypeError, match="x is a list"):
        append(tmp_path / "log.jsonl", {"x": [1]})


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(cut=st.integers(0, 200), tail=st.sampled_from([b"", b"\0\0\0", b"\0\n"]))
def test_wherever_a_log_is_cut_the_whole_lines_before_are_kept(tmp_path, cut, tail):
    path = tmp_path / "log.jsonl"
    path.unlink(missing_ok=True)
    for step in range(6):
        append(path, {"step": step, "text": "é\n"})
    whole = path.read_bytes()
    path.write_bytes(whole[:cut] + tail)
    kept = whole[:cut].count(b"\n")
    assert [line["step"] for line in read(path)] == list(range(kept))
    repair(path)
    append(path, {"step": 99})
    assert [line["step"] for line in read(path)] == [*range(kept), 99]


def test_a_cut_text_log_keeps_its_whole_lines(tmp_path):
    path = tmp_path / "log.txt"
    append_text(path, "one\ntwo")
    path.write_bytes(path.read_bytes() + b"three, unfin")
    repair(path)
    assert path.read_text() == "one\n    two\n"


def test_a_missing_log_is_empty(tmp_path):
    repair(tmp_path / "no.jsonl")
    assert read(tmp_path / "no.jsonl") == []


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 0}\n{"st\n{"step": 2}\n')
    with pytest.raises(SondeError, match="line 2 is damaged"):
        read(path)


def test_a_full_disk_leaves_the_log_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "log.jsonl"
    append(path, {"step": 0})
    before = path.read_bytes()
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:5]))
    with pytest.raises(SondeError, match="No space left"):
        append(path, {"step": 1})
    assert path.read_bytes() == before


def test_a_log_that_cannot_be_opened_is_named(tmp_path):
    with pytest.raises(SondeError, match=r"log\.jsonl"):
        append(tmp_path / "no" / "log.jsonl", {"step": 1})


def test_one_record_is_one_line(tmp_path):
    path = tmp_path / "log.jsonl"
    append(path, {"message": "a\nb\u2028c"})
    assert path.read_bytes().count(b"\n") == 1
    assert json.loads(path.read_text())["message"] == "a\nb\u2028c"
