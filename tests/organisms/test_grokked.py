"""The bundled network has grokked, its card says so, and what the card says is measured again here."""

import pytest

import sonde
from sonde.cli import main
from sonde.dynamics.circuit_report import circuit_report
from sonde.dynamics.grokking import grid_of, phases, trace
from sonde.errors import SondeError
from sonde.organisms.card import read_card
from sonde.organisms.grokked import GrokkedConfig, export, load_history, train_grokked


@pytest.fixture(scope="module")
def history():
    return load_history("organism:grokked-113")


def test_the_card_says_what_the_network_does(history):
    grid = grid_of(history.network(), history.settings.task)
    keys = grid.key_frequencies()
    card = read_card("grokked-113")
    assert f"Its key frequencies are {', '.join(map(str, sorted(keys)))}:" in card["truth"][0]
    assert grid.accuracy("test") == 1.0
    assert grid.loss("test") == pytest.approx(card["training"]["test_loss_nats"], rel=0.01)
    report = circuit_report(history.network(), history.settings.task, keys)
    assert report.agree
    assert card["truth"][2].startswith(f"{report.clustered:.1%} of its neurons")


def test_its_checkpoints_show_the_circuit_before_the_answer(history):
    keys = grid_of(history.network(), history.settings.task).key_frequencies()
    points = trace(history, keys)
    found = phases(points, 113)
    assert found.memorised is not None and found.onset is not None and found.grokked is not None
    assert found.memorised < found.onset < found.grokked
    last = points[-1].measures
    assert last.trig_fve >= 0.95
    assert last.restricted["test"] < last.test
    assert last.excluded > 4


def test_it_is_no_language_model():
    with pytest.raises(SondeError, match="grokked-113 is no language model: `sonde organism info grokked-113`"):
        sonde.load("organism:grokked-113")
    with pytest.raises(SondeError, match=r"pebble has no history\.safetensors"):
        load_history("organism:pebble")


def test_the_recipe_ends_in_a_history_and_a_card(history, tmp_path):
    export(history, GrokkedConfig(out=tmp_path))
    assert load_history(tmp_path).steps == history.steps
    written, bundled = read_card(tmp_path)["truth"], read_card("grokked-113")["truth"]
    assert [written[i] for i in (0, 2, 3)] == [bundled[i] for i in (0, 2, 3)]  # 1 tells steps, of fewer checkpoints


def test_a_training_that_is_too_short_has_no_circuit_to_describe(tmp_path):
    with pytest.raises(SondeError, match=r"no frequency has a share above 0\.02"):
        train_grokked(GrokkedConfig(modulus=13, steps=20, out=tmp_path))
    assert (tmp_path / "training/history.safetensors").exists()


def test_a_bad_option_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["organism", "train", "grokked-113", "--modulus", "1", "--out", str(tmp_path / "x")])
    assert ended.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
