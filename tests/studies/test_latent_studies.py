"""The studies of latents by token sets: neurons against latents, and layers against one another."""

import json
from pathlib import Path

import pytest

from sonde.cli import main

SMALL = ["--tokens", "6144", "--epochs", "1", "--k", "8", "--min-examples", "20"]


def run(words: list[str], out: Path) -> list[dict]:
    for more in ([], ["--resume"]):
        with pytest.raises(SystemExit) as ended:
            main(["run", *words, "--out", str(out), *more])
        assert ended.value.code == 0
    return json.loads((out / "findings.json").read_text(encoding="utf-8"))["findings"]


def test_neurons_against_latents_has_gaps_controls_and_all_kinds(tmp_path, capsys):
    out = tmp_path / "run"
    words = [
        "neurons-vs-latents",
        "organism:pebble",
        "--layer",
        "0",
        "--expansion",
        "1",
        "--seeds",
        "2",
        "--units",
        "12",
    ]
    found = {one["id"]: one for one in run([*words, *SMALL], out)}
    assert found["neurons.latents"]["control"]["name"] == "the token set of another latent"
    assert found["neurons.gap-largest-neurons"]["control"]["estimate"] == 0
    assert (out / "charts/neurons.kinds.svg").exists() and (out / "cache/config.json").exists()
    assert not (out / "rows").exists()
    capsys.readouterr()


def test_layer_similarity_has_a_margin_against_shuffles(tmp_path, capsys):
    out = tmp_path / "run"
    words = ["layer-similarity", "organism:pebble", "--sites", "resid_post.0", "resid_post.1", "resid_post.5"]
    found = {one["id"]: one for one in run([*words, "--latents", "64", "--draws", "4", *SMALL], out)}
    margin = found["similarity.margin"]
    assert margin["control"]["name"] == "tokens dealt out anew within each layer"
    assert margin["interval"][0] <= margin["estimate"] <= margin["interval"][1]
    assert (out / "charts/similarity.distance.svg").exists() and (out / "charts/similarity.layers.svg").exists()
    capsys.readouterr()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["neurons-vs-latents", "organism:pebble", "--layer", "9"],
            "--layer is 9: organism:pebble has the blocks 0 to 5",
        ),
        (["neurons-vs-latents", "organism:pebble", "--units", "0"], "--units is 0"),
        (["neurons-vs-latents", "organism:pebble", "--k", "5000"], "--k is 5000, more than the 1536 latents"),
        (
            ["neurons-vs-latents", "organism:pebble", "--neurons", "5000"],
            "k is 5000: block 0 of organism:pebble has 768",
        ),
        (
            ["layer-similarity", "organism:pebble", "--sites", "embed"],
            "embed: near and distant layers need at least three",
        ),
        (["layer-similarity", "organism:pebble", "--k", "999"], "--k takes 1 to the number of latents"),
    ],
)
def test_bad_options_are_one_line_and_leave_nothing(words, line, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["run", *words])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert line in said and len(said.splitlines()) == 1
    assert not list(tmp_path.iterdir())
