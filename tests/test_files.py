"""Files appear whole or not at all, and trees come back as they were."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sonde.errors import SondeError
from sonde.files import load_bundle, replacing, save_bundle, write_json, write_text

leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
)
trees = st.recursive(
    leaves, lambda child: st.lists(child, max_size=4) | st.dictionaries(st.text(max_size=5) | st.integers(), child)
)


@settings(max_examples=50, deadline=None)
@given(tree=trees)
def test_a_tree_of_plain_values_comes_back_equal(tmp_path_factory, tree):
    path = tmp_path_factory.mktemp("bundle") / "tree.safetensors"
    save_bundle(path, tree)
    assert load_bundle(path) == tree


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int16, torch.bool])
def test_tensors_come_back_with_type_and_shape(tmp_path, dtype):
    tensor = torch.arange(6).reshape(2, 3).to(dtype)
    save_bundle(tmp_path / "b", {"a": [tensor, tensor.T], "empty": torch.zeros(0, 3), "scalar": torch.tensor(2.5)})
    found = load_bundle(tmp_path / "b")
    assert found["a"][0].dtype == dtype
    assert torch.equal(found["a"][0], tensor)
    assert torch.equal(found["a"][1], tensor.T)
    assert found["empty"].shape == (0, 3)
    assert found["scalar"] == 2.5


def test_the_state_of_an_optimizer_comes_back(tmp_path):
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    parameter.sum().backward()
    optimizer.step()
    save_bundle(tmp_path / "o", optimizer.state_dict())
    other = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))])
    other.load_state_dict(load_bundle(tmp_path / "o"))
    assert torch.equal(other.state_dict()["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    write_text(tmp_path / "file", "old")
    with pytest.raises(RuntimeError, match="planted"), replacing(tmp_path / "file") as beside:
        beside.write_text("half of the n")
        raise RuntimeError("planted")
    assert (tmp_path / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SondeError, match="cannot write"):
        write_text(tmp_path / "file" / "inside", "text")


def test_json_without_numbers_is_refused(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", {"value": math.nan})
    assert not list(tmp_path.iterdir())


def test_objects_are_not_pickled(tmp_path):
    with pytest.raises(TypeError, match="not object"):
        save_bundle(tmp_path / "b", {"a": object()})


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", b"\xff" * 64])
def test_a_damaged_bundle_is_one_line(tmp_path, content):
    (tmp_path / "b").write_bytes(content)
    with pytest.raises(SondeError, match="damaged or not a safetensors file"):
        load_bundle(tmp_path / "b")


def test_a_missing_bundle_and_a_foreign_file_are_told_apart(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(SondeError, match="does not exist"):
        load_bundle(tmp_path / "b")
    save_file({"a": torch.ones(1)}, tmp_path / "foreign")
    with pytest.raises(SondeError, match="not saved by Sonde"):
        load_bundle(tmp_path / "foreign")
