"""The study of explanations on pebble: all nine tests from one command, with nobody asked; prices and keys refused."""

import dataclasses
import json

import pytest
from kill_and_resume import numbers

from sonde.cli import main
from sonde.errors import SondeError
from sonde.features.dictionary import Design, Dictionary
from sonde.studies.auto_interp import SCORERS, AutoInterpConfig, auto_interp

MODEL = "organism:pebble"
SMALL = {"tokens": 12000, "context": 64, "window": 16, "latents": 2, "min_examples": 40, "examples": 10}


@pytest.fixture(scope="module")
def dictionary(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dictionary") / "small"
    made = Dictionary.initialised(Design("topk", 192, latents=48, k=4), seed=0)
    made.site = "resid_post.2"
    made.save(folder)
    return str(folder)


@pytest.fixture(scope="module")
def report(tmp_path_factory, dictionary):
    out = tmp_path_factory.mktemp("study") / "run"
    return auto_interp(AutoInterpConfig(MODEL, dictionary=(dictionary,), **SMALL, out=out))


def test_one_command_makes_all_nine_tests(report):
    summary = json.loads((report.parent / "summary.json").read_text())
    assert set(summary["scores"]) == set(SCORERS) and summary["statuses"] == {"scored": 2}
    assert {path.stem for path in (report.parent / "scores").iterdir()} == set(SCORERS)
    found = {finding["id"]: finding for finding in numbers(report.parent)}
    assert set(found) == {f"scores.{name}" for name in SCORERS}
    known = [one for one in found.values() if one["status"] != "refused"]
    assert len(known) >= 8 and all(one["control"] is not None and one["n"] == 2 for one in known)
    page = report.read_text(encoding="utf-8")
    for part in ("How far can the explanations be trusted?", "strongest window", "unread share", "fires on"):
        assert part in page


def test_a_finished_run_is_resumed_with_the_same_numbers_at_another_speed(report, dictionary, monkeypatch):
    monkeypatch.setattr("sonde.features.interp.interpret", None)  # nothing is asked again
    before = numbers(report.parent)
    config = AutoInterpConfig(
        MODEL, dictionary=(dictionary,), **SMALL, out=report.parent, resume=True, concurrency=2, timeout=9.0
    )
    assert numbers(auto_interp(config).parent) == before


def test_explanations_of_an_earlier_run_can_be_scored_again(report, dictionary, tmp_path):
    config = AutoInterpConfig(
        MODEL, dictionary=(dictionary,), **SMALL, scorers=("embedding",), out=tmp_path / "run",
        explanations=str(report.parent / "explanations.jsonl"), negatives="neighbours",
    )  # fmt: skip
    page = auto_interp(config)
    given, own = ((folder / "explanations.jsonl").read_text().splitlines() for folder in (page.parent, report.parent))
    assert [json.loads(a)["explanation"] for a in given] == [json.loads(b)["explanation"] for b in own]


def test_a_dry_run_says_what_a_paid_model_would_cost_and_asks_nobody(dictionary, tmp_path, monkeypatch):
    monkeypatch.setattr("sonde.lm.asking.openai_http.OpenAiHttp", None)
    config = AutoInterpConfig(
        MODEL, dictionary=(dictionary,), **SMALL, explainer="chain-of-thought", ask="gpt-4o-mini",
        base_url="http://127.0.0.1:9/v1", dry_run=True, out=tmp_path / "run",
    )  # fmt: skip
    page = auto_interp(config)
    bill = json.loads((page.parent / "estimate/summary.json").read_text())["bill"]
    # An explanation, 4 questions each of detection and fuzzing, 20 windows, ten texts; too few windows for intruders.
    assert bill["answers"] == 2 * (1 + 4 + 4 + 20 + 1)
    assert bill["dollars"] == pytest.approx(
        (bill["prompt_tokens"] * 0.15 + bill["completion_tokens"] * 0.6) / 1e6, abs=1e-6
    )
    assert "would take about" in page.read_text(encoding="utf-8")
    assert not (page.parent / "latents.jsonl").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (("--ask", "m", "--base-url", "http://x/v1"), "the price of m is not known: give --price"),
        (("--ask", "gpt-4o-mini", "--base-url", "http://x/v1"), "costs money: give --budget"),
        (("--ask", "openai/gpt-4o", "--budget", "0"), "buys nothing"),
        (("--ask", "openai/gpt-4o", "--price", "1", "--budget", "1"), "takes two or three numbers"),
        (("--budget", "3"), "a budget needs a price"),
        (("--ask", "nobody", "--no-budget"), "'nobody' is nobody"),
        (("--scorers", "detection", "poetry"), "there is no scorer 'poetry'"),
        (("--window", "24"), "windows of 24 tokens do not divide a context of 128"),
        (("--min-examples", "1"), "min_examples is 1"),
        (("--dictionary", "nowhere"), "nowhere does not exist"),
        (("--tokens", "3000", "--min-examples", "3000"), "no latent of neurons.3 fires at 3000"),
        (("--ask", "vllm:m"), "vLLM is not installed"),
        (("--resume",), "--resume needs --out"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(options, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "vllm", None)
    with pytest.raises(SystemExit) as ended:
        main(["run", "auto-interp", MODEL, *options])
    assert ended.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sonde: ")]
    assert message in line


def test_what_a_call_costs_does_not_decide_the_numbers():
    plain = AutoInterpConfig(MODEL)
    paid = dataclasses.replace(plain, budget=3.0, price=(1.0, 2.0), concurrency=3, timeout=9.0)
    assert plain.settings() == paid.settings() != dataclasses.replace(plain, ask="coin").settings()
    assert "--budget 3.0" in " ".join(paid.command())
    with pytest.raises(SondeError, match="no scorer"):
        _ = dataclasses.replace(plain, scorers=("x",)).chosen
