"""The main job: an audit of the bundled model, what it says, and what it does with bad input."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import polars as pl
import pytest
import torch
from families import tiny
from kill_and_resume import disturb, numbers
from transformers import BertConfig, T5Config

from sonde.cli import main
from sonde.errors import SondeError
from sonde.runs.finding import schema
from sonde.studies.audit import AuditConfig, audit
from sonde.studies.chapters import CHAPTERS

MODEL = "organism:pebble"
TOKENS = 8192
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("audit") / "run"
    return audit(AuditConfig(MODEL, tokens=TOKENS, out=folder))


def findings(report: Path) -> dict[str, dict]:
    return {finding["id"]: finding for finding in numbers(report.parent)}


def test_an_audit_writes_every_chapter_and_a_valid_machine_twin(report):
    page = report.read_text()
    twin = json.loads(report.with_name("findings.json").read_text())
    jsonschema.validate(twin, schema())
    assert not twin["skipped"]
    assert all(f'id="c-{name}"' in page for name in CHAPTERS)
    assert {finding["chapter"] for finding in twin["findings"]} <= set(CHAPTERS)
    assert report.stat().st_size < 8e6


def test_every_number_has_a_control_and_a_command(report):
    for finding in findings(report).values():
        assert finding["control"] is not None
        assert finding["interval"][0] <= finding["estimate"] <= finding["interval"][1]
        assert finding["command"].startswith(f"sonde audit {MODEL}")


def test_the_command_of_a_chapter_gives_its_numbers_again(report, tmp_path):
    again = audit(AuditConfig(MODEL, tokens=TOKENS, chapters=("loss",), out=tmp_path / "loss"))
    found = findings(report)
    assert findings(again)
    for name, finding in findings(again).items():
        assert finding["estimate"] == found[name]["estimate"]
        assert finding["interval"] == found[name]["interval"]


def test_loss_is_that_of_a_plain_forward_pass(report):
    import math

    import sonde
    from sonde.lm.batches import TokenBatches

    lm = sonde.load(MODEL)
    assert lm.tokenizer is not None
    held = TokenBatches(None, lm.tokenizer, context=512, limit_tokens=TOKENS).split(0.5)[1]
    nats = 0.0
    with torch.no_grad():
        for batch in held:
            nats += float(lm.model(input_ids=batch.tokens, labels=batch.tokens).loss) * int(batch.scored.sum())
    expected = nats / math.log(2) / held.n_bytes
    assert findings(report)["loss.bits-per-byte"]["estimate"] == pytest.approx(expected, rel=1e-5)


def test_tables_and_charts_are_files_of_the_run(report):
    run = report.parent
    assert len(pl.read_parquet(run / "tables" / "loss.worst.parquet")) == 20
    for kind in ("vl.json", "svg", "png"):
        assert (run / "charts" / f"loss.position.{kind}").stat().st_size > 500


def test_a_finished_audit_is_not_overwritten(report):
    with pytest.raises(SondeError, match="already holds a run"):
        audit(AuditConfig(MODEL, tokens=TOKENS, out=report.parent))


def test_an_audit_is_resumed_with_its_own_options_only(report):
    with pytest.raises(SondeError, match="tokens"):
        audit(AuditConfig(MODEL, tokens=TOKENS * 2, out=report.parent, resume=True))


@pytest.mark.timeout(1800)
def test_killed_audits_end_with_the_numbers_of_one_that_was_left_alone(tmp_path):
    assert disturb(tmp_path, kills=2, audit=(MODEL, "--tokens", "4096", "--chapters", "loss", "depth"), seed=1)


@pytest.fixture(scope="module")
def bad(tmp_path_factory) -> Path:
    """A folder of everything that can be wrong with a text or a model."""
    root = tmp_path_factory.mktemp("bad")
    (root / "empty.txt").write_text("")
    (root / "short.txt").write_text("Too short.")
    (root / "latin.txt").write_bytes("café".encode("latin-1") * 100)
    (root / "bytes.txt").write_bytes(bytes(range(256)) * 100)
    (root / "zeros.txt").write_bytes(bytes(5000))
    (root / "bad.jsonl").write_text('{"text": "good"}\n{"text":\n')
    (root / "no-config").mkdir()
    for name in ("no-tokenizer", "torn", "pickle"):
        tiny("gpt2").save_pretrained(root / name)
    weights = root / "torn" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    (root / "pickle" / "model.safetensors").rename(root / "pickle" / "pytorch_model.bin")
    BertConfig(architectures=["BertModel"]).save_pretrained(root / "encoder")
    T5Config(architectures=["T5ForConditionalGeneration"]).save_pretrained(root / "encoder-decoder")
    return root


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing/here/at-all"], "does not exist"),
        (["no-config"], "has no config.json"),
        (["no-tokenizer"], "has no tokenizer"),
        ([MODEL, "--chapters", "astrology"], "there is no chapter 'astrology': the audit has card, loss"),
        ([MODEL, "--text", "nowhere.txt"], "nowhere.txt"),
        ([MODEL, "--text", "empty.txt"], "empty.txt"),
        ([MODEL, "--text", "short.txt"], "fewer than one chunk"),
        ([MODEL, "--text", "latin.txt"], "UTF-8"),
        ([MODEL, "--text", "bytes.txt"], "UTF-8"),
        ([MODEL, "--text", "zeros.txt"], "zero bytes"),
        ([MODEL, "--text", "bad.jsonl"], "bad.jsonl, line 2 is not JSON"),
        ([MODEL, "--text", "no-config"], "holds no text"),
        ([""], "name is empty"),
        (["short.txt"], "is a file"),
        (["torn"], "the safetensors file is damaged"),
        (["pickle"], "--allow-pickle"),
        (["encoder"], "is not a causal language model"),
        (["encoder-decoder"], "is an encoder-decoder"),
        ([MODEL, "--tokens", "0"], "--tokens is 0"),
        ([MODEL, "--tokens", "-5"], "--tokens is -5"),
        ([MODEL, "--tokens", "10"], "fewer than one chunk"),
        ([MODEL, "--tokens", "1024"], "1024 tokens of pydoc topics are too few: at least 2048 are needed"),
        ([MODEL, "--seed", "-1"], "--seed is -1"),
        ([MODEL, "--chapters"], "--chapters names none"),
        ([MODEL, "--out", "/proc/run", "--tokens", "2048"], "cannot write to /proc/run"),
        ([MODEL, "--device", "abacus"], "abacus"),
        ([MODEL, "--device", "meta"], "meta"),
        pytest.param([MODEL, "--device", "cuda"], "no CUDA device", marks=no_gpu),
        ([MODEL, "--dtype", "int3"], "int3"),
        ([MODEL, "--tokens", "many"], "many"),
        ([MODEL, "--resume"], "--resume needs --out"),
        ([MODEL, "--out", "short.txt"], "short.txt"),
        ([MODEL, "--out", "no-tokenizer"], "holds no run"),
        (["organism:martian"], "martian"),
    ],
)
def test_bad_input_is_one_line_with_exit_code_2_and_nothing_written(bad, words, message, monkeypatch, capsys):
    before = sorted(path.relative_to(bad) for path in bad.rglob("*"))
    monkeypatch.chdir(bad)
    with pytest.raises(SystemExit) as ended:
        main(["audit", *words])
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if line.startswith("sonde: ")]
    assert ended.value.code == 2
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in said
    assert sorted(path.relative_to(bad) for path in bad.rglob("*")) == before


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A disk of 300 kB: smaller than a run."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "none", disk], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a small disk needs the right to mount: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_is_one_line_and_the_run_goes_on_once_there_is_room(small_disk, capsys):
    words = [MODEL, "--tokens", "2048", "--chapters", "card", "loss", "--out", str(small_disk / "run")]
    with pytest.raises(SystemExit) as ended:
        main(["audit", *words])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sonde: ")]
    assert ended.value.code == 2 and "cannot write" in line and "No space left" in line
    assert not list(small_disk.rglob("*.part"))
    subprocess.run(["mount", "-o", "remount,size=20m", small_disk], check=True)
    with pytest.raises(SystemExit) as ended:
        main(["audit", *words, "--resume"])
    assert not ended.value.code
    assert (small_disk / "run" / "report.html").exists()


def test_the_data_folder_of_a_user_is_read_as_text(tmp_path):
    text = tmp_path / "own.txt"
    text.write_text("The cat sat on the mat. It was a fine day, and the dog was away.\n" * 400)
    report = audit(AuditConfig(MODEL, text=str(text), chapters=("card", "loss"), out=tmp_path / "run"))
    assert "own.txt" in report.read_text()
    shutil.rmtree(report.parent)
