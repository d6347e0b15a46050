"""The study of transferred lenses: its report on models that were tuned a little, and bad options."""

import pytest
from families import tiny
from kill_and_resume import numbers

from sonde.cli import main
from sonde.data.python_docs import topics
from sonde.organisms.small_lm import train_tokenizer
from sonde.studies.lens_transfer import LensTransferConfig, lens_transfer


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a tiny base model, a version of it that was changed a little, and models that do not belong to it."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = train_tokenizer(topics()[:20], 400)
    base = tiny("gpt_neox", vocab_size=400, num_hidden_layers=4)
    tuned = tiny("gpt_neox", vocab_size=400, num_hidden_layers=4)
    for parameter in tuned.gpt_neox.layers[2].parameters():
        parameter.add_(0.02)
    others = {"base": base, "tuned": tuned, "wide": tiny("gpt_neox", vocab_size=400, hidden_size=64)}
    others["llama"] = tiny("llama", vocab_size=400, num_hidden_layers=4)
    for name, model in others.items():
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def report(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "run"
    small = ["--tokens", "2048", "--steps", "2", "--trainer", "ridge"]
    with pytest.raises(SystemExit) as end:
        main(["run", "lens-transfer", str(models / "base"), *small, "--out", str(folder)])
    assert not end.value.code
    return folder / "report.html"


def test_the_report_says_what_the_lens_gains_and_costs(report):
    found = {finding["id"]: finding for finding in numbers(report.parent)}
    assert set(found) == {"attach.closer", "attach.cost", "transfer.spearman"}
    assert found["attach.cost"]["paper"]["value"] == 0.3
    assert all(finding["control"] for finding in found.values())
    assert (report.parent / "tables" / "transfer.rogue.parquet").exists()


def test_the_fine_tuned_model_is_kept_and_a_finished_study_is_resumed_from_it(report, models):
    import sonde

    lm = sonde.load(report.parent / "tuned", check=False)
    assert lm.hash != sonde.load(models / "base", check=False).hash
    before = numbers(report.parent)
    again = LensTransferConfig(
        str(models / "base"), tokens=2048, steps=2, trainer="ridge", out=report.parent, resume=True
    )
    assert numbers(lens_transfer(again).parent) == before


def test_a_fine_tuned_model_can_be_given(models, tmp_path):
    (tmp_path / "other.txt").write_text("\n".join(topics()[30:45]))
    config = LensTransferConfig(
        str(models / "base"),
        tuned=str(models / "tuned"),
        other=str(tmp_path / "other.txt"),
        tokens=2048,
        trainer="ridge",
        out=tmp_path / "run",
    )
    found = {finding["id"]: finding for finding in numbers(lens_transfer(config).parent)}
    assert found["attach.closer"]["status"] == "found"
    assert not (tmp_path / "run" / "tuned").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tuned", "{root}/wide"], "has width 32"),
        (["--tuned", "{root}/llama"], "is of the family gpt_neox"),
        (["--steps", "0"], "takes 1 step or more"),
        (["--trainer", "crystal"], "trainer 'crystal' is unknown"),
        (["--other", "{root}/nothing.txt"], "does not exist"),
    ],
)
def test_bad_options_are_one_line_and_leave_no_folder(models, tmp_path, capsys, options, words):
    given = [option.format(root=models) for option in options]
    base = ["run", "lens-transfer", str(models / "base"), "--tokens", "2048", "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as end:
        main([*base, *given])
    assert end.value.code == 2
    error = capsys.readouterr().err.strip()
    assert words in error
    assert "\n" not in error
    assert not (tmp_path / "run").exists()
