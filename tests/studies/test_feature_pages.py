"""`sonde features show`: from what is bundled, from a folder, from a run; and what it says to bad input."""

import json
from pathlib import Path

import pytest

from sonde.cli import main
from sonde.features.design import Design
from sonde.features.dictionary import Dictionary
from sonde.organisms.registry import folder_of
from sonde.studies.feature_pages import FeaturesShowConfig

SMALL = ("--tokens", "4096")


def run(argv, capsys) -> tuple[int | str, str, str]:
    with pytest.raises(SystemExit) as end:
        main(["features", *map(str, argv)])
    out, err = capsys.readouterr()
    return end.value.code or 0, out, err


def said(folder: Path) -> dict:
    return json.loads((folder / "findings.json").read_text())


@pytest.fixture
def dictionary(tmp_path) -> Path:
    made = Dictionary.initialised(Design("topk", 192, 40, 3))
    made.site, made.model = "resid_post.1", "organism:pebble"
    made.save(tmp_path / "dictionary")
    return tmp_path / "dictionary"


def test_the_bundled_dictionary_is_shown_by_default(tmp_path, capsys):
    code, out, _ = run(["show", "--out", tmp_path / "pages", *SMALL], capsys)
    assert (code, out) == (0, f"page: {tmp_path / 'pages' / 'features.html'}\n")
    page = (tmp_path / "pages" / "features.html").read_text()
    assert "978 of 1,024 latents have an explanation" in page and "of 1,024 latents fire" in page
    (finding,) = said(tmp_path / "pages")["findings"]
    assert finding["control"]["estimate"] == 0.5 and finding["status"] == "found"
    assert "default-src 'none'" in page and "connect-src" not in page


def test_a_number_is_the_page_of_one_latent_and_its_command_makes_it_again(tmp_path, capsys):
    code, out, _ = run(["show", "163", "--out", tmp_path, *SMALL], capsys)
    assert (code, out) == (0, f"page: {tmp_path / 'latent-163.html'}\n")
    page = (tmp_path / "latent-163.html").read_text()
    assert "What is latent 163?" in page and ">Latent 163</h4>" in page
    command = FeaturesShowConfig(latent=163, tokens=4096).command()
    assert command == ["sonde", "features", "show", "organism:pebble", "163", "--tokens", "4096"]
    assert FeaturesShowConfig().command() == ["sonde", "features", "show"]


def test_a_dictionary_of_ones_own_has_pages_without_explanations(tmp_path, dictionary, capsys):
    code, _, _ = run(["show", dictionary, "--out", tmp_path / "pages", *SMALL], capsys)
    assert code == 0
    page = (tmp_path / "pages" / "features.html").read_text()
    assert "None is explained" in page and "Promoted tokens" in page
    (finding,) = said(tmp_path / "pages")["findings"]
    assert finding["id"] == "features.alive"


def test_a_run_of_explanations_has_pages_with_its_scores(tmp_path, dictionary, capsys):
    folder = tmp_path / "run"
    with pytest.raises(SystemExit) as end:
        main([
            "run", "auto-interp", "organism:pebble", "--dictionary", str(dictionary), "--tokens", "8192",
            "--latents", "3", "--min-examples", "20", "--examples", "10", "--scorers", "detection", "fuzzing",
            "--out", str(folder),
        ])  # fmt: skip
    assert not end.value.code
    report = (folder / "report.html").read_text()
    assert 'id="fv-latents.resid_post.1"' in report and "How far the explanation can be trusted" in report
    capsys.readouterr()
    code, _, _ = run(["show", folder, "--out", tmp_path / "pages"], capsys)
    page = (tmp_path / "pages" / "features.html").read_text()
    assert code == 0 and "3 of 40 latents have an explanation" in page
    assert "not explained in this run" in page
    code, _, err = run(["show", folder, "--hookpoint", "resid_post.9"], capsys)
    assert code == 2 and "has no hookpoint 'resid_post.9': it has resid_post.1" in err
    (dictionary / "config.json").unlink()
    run(["show", folder, 2, "--out", tmp_path / "pages"], capsys)
    assert "The dictionary cannot be read" in (tmp_path / "pages" / "latent-2.html").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sow"], "did you mean show?"),
        (["show", "nowhere"], "nowhere does not exist: give the folder of a dictionary or of a run"),
        (["show", "organism:quiz"], "no dictionary of organism:quiz is bundled"),
        (["show", "organism:pebble", "1024"], "latent 1024 does not exist: organism:pebble has 1024, counted from 0"),
        (["show", "organism:pebble", "-1"], "latent -1 does not exist"),
        (["show", "organism:pebble", "--hookpoint", "mlp_out.1"], "reads resid_post.3, not mlp_out.1"),
        (["show", "--tokens", "1"], "--tokens is 1"),
        (["show", str(folder_of("pebble"))], "holds no dictionary"),
    ],
    ids=["verb", "nowhere", "no dictionary", "latent", "negative", "hookpoint", "tokens", "model"],
)
def test_a_mistake_is_one_line_exit_code_2_and_no_folder(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(words, capsys)
    assert (code, out) == (2, "")
    assert err.startswith("sonde: ") and err.count("\n") == 1 and message in err
    assert not list(tmp_path.iterdir())


def test_a_dictionary_that_does_not_say_its_model_needs_one(tmp_path, capsys):
    made = Dictionary.initialised(Design("topk", 192, 8, 2))
    made.save(tmp_path / "d")
    assert "give --model" in run(["show", tmp_path / "d"], capsys)[2]
    assert "save it with one" in run(["show", tmp_path / "d", "--model", "organism:pebble"], capsys)[2]


@pytest.mark.parametrize("words", [[], ["--help"], ["show", "--help"]], ids=["bare", "help", "show"])
def test_every_help_teaches(words, capsys):
    code, out, err = run(words, capsys)
    assert (code, err) == (0, "") and "usage: sonde features show" in out and "organism:pebble 12" in out
