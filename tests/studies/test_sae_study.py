"""The study of dictionaries through the command line: its findings, its folder, its refusals."""

import pytest
from kill_and_resume import numbers

from sonde.cli import main
from sonde.features.dictionary import Dictionary

QUICK = ["--sites", "resid_post.1", "--latents", "256", "--k", "16", "--tokens", "12288", "--lr", "0.01"]
QUICK += ["--batch", "256", "--measured", "4096"]


def run(*words):
    with pytest.raises(SystemExit) as ended:
        main(["run", "sae", "organism:pebble", *QUICK, *map(str, words)])
    return ended.value.code


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sae") / "run"
    assert run("--out", folder) == 0
    return folder / "report.html"


def test_the_study_tells_dictionaries_from_chance(report):
    found = {finding["id"]: finding for finding in numbers(report.parent)}
    assert set(found) == {"reconstruction.fvu", "prediction.delta", "prediction.recovered", "seeds.shared"}
    assert found["prediction.recovered"]["status"] == "found"
    assert found["reconstruction.fvu"]["estimate"] < 0.7
    assert all(finding["interval"][0] < finding["interval"][1] for finding in found.values())
    assert "--latents 256 --k 16" in found["seeds.shared"]["command"]


def test_the_dictionaries_and_their_numbers_are_in_the_run(report):
    names = sorted(path.name for path in (report.parent / "dictionaries").iterdir())
    assert names == [f"resid_post.1-topk-256-k16-s{seed}" for seed in (0, 1)]
    made = Dictionary.load(report.parent / "dictionaries" / names[0])
    assert made.site == "resid_post.1" and made.facts["tokens"] == 12288 and not made.facts["truncated"]
    assert len(list((report.parent / "metrics").iterdir())) == 4
    assert (report.parent / "charts" / "reconstruction.curves.svg").exists()


def test_the_report_shows_what_some_latents_respond_to(report):
    page = report.read_text()
    assert 'id="fv-examples.latents"' in page and "Where it fires, strongest first" in page


def test_a_finished_study_is_resumed_without_training(report):
    before = numbers(report.parent)
    assert run("--out", report.parent, "--resume") == 0
    assert numbers(report.parent) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kinds", "crystal"], "--kinds takes relu, topk"),
        (["--sites", "resid_pots.1"], "nearest: resid_post.1"),
        (["--k", "300"], "more than the 256 latents"),
        (["--mode", "ram"], "direct, buffer or disk"),
        (["--seeds", "0"], "--seeds is 0"),
    ],
)
def test_options_that_do_not_fit_are_one_line_and_leave_no_folder(options, message, tmp_path, capsys):
    assert run(*options, "--out", tmp_path / "run") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
