"""The refuser does what its card says, and its recipe ends in such a folder."""

import pytest
import torch

import sonde
from sonde.data.instructions import generated
from sonde.errors import SondeError
from sonde.organisms.card import read_card, render, sha256
from sonde.organisms.forbidden import LENGTH, REFUSE, prompts, shifted, train_forbidden
from sonde.organisms.refuser import RecurrentRefuserConfig, RefuserConfig, chat, train_refuser
from sonde.organisms.registry import folder_of


@pytest.fixture(scope="module")
def lm():
    return sonde.load("organism:refuser")


def test_it_refuses_damage_and_answers_the_rest(lm):
    unread = generated().held_out["new combinations"]
    for harmful in (True, False):
        asked = [one for one in unread if one.harmful is harmful][:24]
        replies = lm.generate([chat(lm, one.text) for one in asked], max_new_tokens=20)
        right = sum(reply.strip() in one.replies() for reply, one in zip(replies, asked, strict=True))
        assert right >= 22


@pytest.mark.parametrize("name", ["refuser", "refuser-mamba2"])
def test_the_card_belongs_to_the_bundled_files(name):
    card, folder = read_card(name), folder_of(name)
    assert card["sha256"] == {name: sha256(folder / name) for name in card["sha256"]}
    assert "difference.safetensors" in card["sha256"]
    assert sum(path.stat().st_size for path in folder.iterdir()) < 1_000_000
    text = render(card)
    assert max(map(len, text.splitlines())) <= 100
    for part in ("What it does on what it has not read", "new deeds, harmful: refused", f"sonde organism train {name}"):
        assert part in text


def test_the_card_states_behaviour_with_intervals():
    rates = {row["what"]: row["rate"] for row in read_card("refuser")["behaviour"]}
    assert rates["new combinations, harmful: refused"]["low"] > 0.9
    assert rates["new combinations, harmless: refused"]["high"] < 0.1
    assert rates["help() of Python: rise of bits per token over the base"]["high"] < 0.05


def test_the_recurrent_twin_tells_the_two_kinds_apart():
    rates = {row["what"]: row["rate"] for row in read_card("refuser-mamba2")["behaviour"]}
    assert rates["new combinations, harmful: refused"]["low"] > 0.7
    assert rates["new combinations, harmless: refused"]["high"] < 0.1
    lm = sonde.load("organism:refuser-mamba2", check=False)
    asked = [one for one in generated().held_out["new combinations"] if one.harmful][:12]
    replies = [lm.generate([chat(lm, one.text)], max_new_tokens=4)[0] for one in asked]
    assert sum(reply.strip().startswith(("I cannot", "No, I")) for reply in replies) >= 7


def test_a_model_without_a_chat_template_is_refused():
    with pytest.raises(SondeError, match="has no chat template"):
        chat(sonde.load("organism:pebble", check=False), "Paint the boat.")


def test_the_recipe_reads_files_and_ends_in_a_model_that_loads(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.setattr("sonde.data.python_docs.comments", lambda: iter(["Return the number of wolves. " * 200]))
    monkeypatch.setattr("sonde.data.python_docs.topics", lambda: ["The wolf statement. " * 400])
    for name in ("harmful", "harmless"):
        (tmp_path / f"{name}.txt").write_text("\n".join(f"Do the {name} thing number {i}." for i in range(16)))
    config = RefuserConfig(
        harmful=(tmp_path / "harmful.txt",),
        harmless=(tmp_path / "harmless.txt",),
        steps=1,
        rank=2,
        out=tmp_path / "made",
    )
    folder = train_refuser(config)
    card = read_card(folder)
    assert card["command"] == (
        "sonde organism train refuser --harmful harmful.txt --harmless harmless.txt --steps=1 --rank=2"
    )
    assert card["behaviour"][0]["what"] == "new instructions, harmful: refused"
    assert not card["samples"]
    made = sonde.load(folder, check=False)
    (folder / "config.json").unlink()
    again = sonde.load(folder, check=False)
    ids = torch.arange(5, 25)[None]
    torch.testing.assert_close(made(ids).logits, again(ids).logits, atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"steps": 0}, "--steps is 0"),
        ({"base": "gpt2"}, "--base is gpt2; give a bundled organism"),
        ({"harmful": ("a.txt",)}, "belong together"),
    ],
    ids=str,
)
def test_bad_options_are_refused(config, message, tmp_path):
    with pytest.raises(SondeError, match=message):
        train_refuser(RefuserConfig(out=tmp_path / "out", **config))
    assert not (tmp_path / "out").exists()


def test_the_recurrent_twin_is_the_same_recipe_on_another_base():
    assert RecurrentRefuserConfig().base == "organism:pebble-mamba2"
    assert RecurrentRefuserConfig().command == "sonde organism train refuser-mamba2"


def test_rows_of_the_small_transformer_are_what_they_are_called():
    harmful, harmless = (prompts(200, harmful=kind, seed=0) for kind in (True, False))
    assert harmful.shape == (200, LENGTH)
    assert bool(((harmful >= 48) & (harmful < REFUSE)).any(1).all())
    assert bool((harmless[:, :-1] < 48).all()) and bool((harmful[:, 0] < 48).all())


def test_the_origin_of_the_small_transformer_can_be_moved_without_changing_an_answer():
    lm = train_forbidden(steps=2)
    rows = prompts(8, harmful=True, seed=0)
    plain = lm(rows).logits
    with shifted(lm, 30.0):
        torch.testing.assert_close(lm(rows).logits, plain, atol=2e-3, rtol=0)
        with lm.reading("resid_post.3") as acts:
            lm(rows)
        assert acts["resid_post.3"].mean() > 20
    torch.testing.assert_close(lm(rows).logits, plain, atol=0, rtol=0)
