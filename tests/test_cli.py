import subprocess
import sys
from pathlib import Path

import pytest

import sonde
from sonde.cli import main
from sonde.errors import SondeError
from sonde.studies import audit as audit_module

HELP_OF = [[], ["audit"], ["run"], ["studies"], ["organism"], ["organism", "train", "pebble"]]
MISTAKES = {
    "adit organism:pebble": "no command 'adit': did you mean audit?",
    "audit": "MODEL",
    "audit x --chaptrs depth": "did you mean --chapters?",
    "audit x --tokens many": "--tokens",
    "audit x --nonsense": "--nonsense",
    "run nonsense": "no study 'nonsense'",
    "run --seed 3": "the study comes first",
    "studies --all": "takes no options",
    "organism lst": "did you mean list?",
    "organism info": "needs the name of an organism",
    "organism info peble": "did you mean 'pebble'?",
    "organism info pebble twice": "one name",
    "organism list all": "takes no options",
    "organism train pebble --steps": "--steps",
}


def run(argv, capsys):
    """Exit code, standard output and standard error of one command."""
    with pytest.raises(SystemExit) as end:
        main(argv)
    out, err = capsys.readouterr()
    return end.value.code or 0, out, err


@pytest.mark.parametrize("command", HELP_OF, ids=" ".join)
def test_every_help_ends_well_and_shows_an_example(command, capsys):
    code, out, err = run([*command, "--help"], capsys)
    assert (code, err) == (0, "")
    assert "usage: sonde" in out
    assert any(part in out for part in ("organism:pebble", "sonde organism", "sonde audit"))


def test_the_bare_command_teaches(capsys):
    _, bare, _ = run([], capsys)
    assert bare == run(["--help"], capsys)[1]
    for command in ("audit", "studies", "run", "organism"):
        assert command in bare


def test_every_study_has_a_help(capsys):
    from sonde.studies.registry import STUDIES

    code, out, _ = run(["studies"], capsys)
    assert code == 0
    for name in STUDIES.entries:
        assert name in out
        code, text, err = run(["run", name, "--help"], capsys)
        assert (code, err) == (0, "") and f"usage: sonde run {name}" in text


@pytest.mark.parametrize("line", MISTAKES, ids=str)
def test_a_mistake_is_one_line_and_exit_code_2(line, capsys):
    code, out, err = run(line.split(), capsys)
    assert (code, out) == (2, "")
    assert err.startswith("sonde: ") and err.count("\n") == 1 and err.endswith("\n")
    assert MISTAKES[line] in err


def test_an_error_of_a_method_is_one_line_and_exit_code_2(monkeypatch, capsys):
    def refuse(config):
        raise SondeError("text is empty:\n give another")

    monkeypatch.setattr(audit_module, "audit", refuse)
    assert run(["audit", "organism:pebble"], capsys) == (2, "", "sonde: text is empty: give another\n")


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("interrupted at batch 3; go on with: sonde …", "sonde: interrupted at batch 3; go on with: sonde …\n"),
        ("", "sonde: interrupted; start again with: sonde audit organism:pebble --out 'my run'\n"),
    ],
)
def test_an_interruption_is_one_line_that_says_how_to_go_on(said, shown, monkeypatch, capsys):
    def stop(config):
        raise KeyboardInterrupt(said) if said else KeyboardInterrupt

    monkeypatch.setattr(audit_module, "audit", stop)
    assert run(["audit", "organism:pebble", "--out", "my run"], capsys) == (130, "", shown)


def test_a_bug_keeps_its_traceback(monkeypatch):
    def break_(config):
        raise RuntimeError("a bug")

    monkeypatch.setattr(audit_module, "audit", break_)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["audit", "organism:pebble"])


def test_options_arrive_typed(monkeypatch, capsys, tmp_path):
    seen = []

    def note(config):
        seen.append(config)
        return tmp_path / "report.html"

    monkeypatch.setattr(audit_module, "audit", note)
    code, out, _ = run(["audit", "gpt2", "--chapters", "card", "loss", "--out", str(tmp_path), "--resume"], capsys)
    assert code == 0 and str(tmp_path / "report.html") in out
    (config,) = seen
    assert (config.model, config.chapters, config.out, config.resume) == ("gpt2", ("card", "loss"), tmp_path, True)


def test_the_module_and_the_script_are_the_same_program():
    by_module = subprocess.run([sys.executable, "-m", "sonde", "--version"], capture_output=True, text=True, check=True)
    assert by_module.stdout == f"sonde {sonde.__version__}\n"
    script = Path(sys.executable).with_name("sonde")
    if script.exists():
        by_script = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
        assert by_script.stdout == by_module.stdout


@pytest.mark.parametrize("argv", [["--help"], ["audit", "--help"], ["studies"], ["organism", "list"]], ids=" ".join)
def test_help_and_lists_import_nothing_heavy(argv):
    code = (
        "import sys; from sonde.cli import main\n"
        f"try: main({argv!r})\n"
        "except SystemExit: pass\n"
        "sys.exit(' '.join({'torch', 'transformers', 'datasets', 'altair'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
