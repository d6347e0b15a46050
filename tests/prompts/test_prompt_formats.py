"""Prompts on disk: the round trip, PEFT's folder both ways, and what is refused."""

import json
from pathlib import Path

import families
import pytest
import torch

from sonde.errors import SondeError
from sonde.lm.model import LanguageModel
from sonde.prompts.conditional import PromptGenerator
from sonde.prompts.evaluation import evaluate
from sonde.prompts.examples import Examples
from sonde.prompts.formats import save_peft
from sonde.prompts.soft_prompt import Position, SoftPrompt


def prompt(lm: LanguageModel, position: Position = "suffix") -> SoftPrompt:
    noise = 0.1 * torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    return SoftPrompt(SoftPrompt.from_tokens(lm, [4, 5, 6]).vectors + noise, position, {"lr": 0.3, "steps": 10})


@pytest.mark.parametrize("position", ["prefix", "suffix", "random", "slot", 3])
def test_a_prompt_comes_back_as_it_was(tmp_path: Path, position) -> None:
    lm = families.model("llama")
    saved = prompt(lm, position)
    saved.save(tmp_path, lm)
    loaded = SoftPrompt.load(tmp_path, lm)
    assert torch.equal(loaded.vectors, saved.vectors)
    assert (loaded.position, loaded.facts) == (saved.position, saved.facts)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["prompt.json", "prompt.safetensors"]


def test_a_prompt_of_another_model_is_refused_with_both_hashes(tmp_path: Path) -> None:
    lm, twin = families.model("llama"), LanguageModel(families.tiny("llama", seed=1), name="twin")
    prompt(lm).save(tmp_path, lm)
    with pytest.raises(
        SondeError, match=f"other weights: llama .hash {lm.hash[:12]}, that of twin is {twin.hash[:12]}"
    ):
        SoftPrompt.load(tmp_path, twin)
    assert torch.equal(SoftPrompt.load(tmp_path, twin, force=True).vectors, prompt(lm).vectors)
    with pytest.raises(SondeError, match=r"has width 32, xlstm wants 64: it was trained for llama \(hash"):
        SoftPrompt.load(tmp_path, families.model("xlstm"), force=True)


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers for an attribute by its old name
def test_peft_reads_what_is_written_and_gives_the_same_logits(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    lm = LanguageModel(families.tiny("gpt_neox"), name="neox")
    saved = prompt(lm, "prefix")
    save_peft(saved, tmp_path, lm)
    ids = families.tokens(2, 9)
    examples = Examples(ids[:, :3].tolist(), ids[:, 3:].tolist())
    ours = evaluate(lm, saved, examples).nats[0]
    theirs = peft.PeftModel.from_pretrained(families.tiny("gpt_neox"), str(tmp_path))
    with torch.no_grad():
        logp = theirs(input_ids=ids).logits[:, 3 + 2 : -1].log_softmax(-1)
    torch.testing.assert_close(ours, -logp.gather(-1, ids[:, 3:, None])[..., 0].sum(1), atol=1e-4, rtol=1e-5)


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers for an attribute by its old name
def test_a_prompt_that_peft_saved_is_read(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    tuned = peft.get_peft_model(families.tiny("llama"), settings)
    tuned.save_pretrained(str(tmp_path))
    lm = families.model("llama")
    loaded = SoftPrompt.load(tmp_path, lm)
    assert loaded.position == "prefix"
    torch.testing.assert_close(loaded.vectors, tuned.get_prompt_embedding_to_save("default").float())
    with pytest.raises(SondeError, match="has width 32, xlstm wants 64"):
        SoftPrompt.load(tmp_path, families.model("xlstm"))


def test_what_peft_cannot_hold_is_refused(tmp_path: Path) -> None:
    lm = families.model("llama")
    with pytest.raises(SondeError, match="PEFT puts prompts before the text; this one goes to 'suffix'"):
        save_peft(prompt(lm), tmp_path, lm)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(SondeError, match="holds PEFT's LORA"):
        SoftPrompt.load(tmp_path, lm)


def test_damaged_and_missing_files_give_one_line(tmp_path: Path) -> None:
    lm = families.model("llama")
    with pytest.raises(SondeError, match=r"has no prompt\.json: there is no soft prompt in it"):
        SoftPrompt.load(tmp_path / "nothing", lm)
    prompt(lm).save(tmp_path, lm)
    (tmp_path / "prompt.safetensors").write_bytes(b"x" * 30)
    with pytest.raises(SondeError, match="is damaged"):
        SoftPrompt.load(tmp_path, lm)
    (tmp_path / "prompt.safetensors").unlink()
    with pytest.raises(SondeError, match="the prompt is incomplete"):
        SoftPrompt.load(tmp_path, lm)
    (tmp_path / "prompt.json").write_text("{")
    with pytest.raises(SondeError, match="is damaged"):
        SoftPrompt.load(tmp_path, lm)
    PromptGenerator(lm, k=2, n=3).save(tmp_path, lm)
    with pytest.raises(SondeError, match="not the configuration of a soft prompt"):
        SoftPrompt.load(tmp_path, lm)
