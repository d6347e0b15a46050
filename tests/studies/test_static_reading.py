"""The study of weights as tokens: what its report says of a planted theme, and what it refuses."""

import polars as pl
import pytest
import torch
from families import tiny
from kill_and_resume import numbers

from sonde.data.python_docs import topics
from sonde.errors import SondeError
from sonde.organisms.small_lm import train_tokenizer
from sonde.studies.static_reading import StaticReadingConfig, static_reading


def saved(root, net):
    net.save_pretrained(root)
    train_tokenizer(topics()[:20], 400).save_pretrained(root)
    return str(root)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Ten tokens share an embedding and an unembedding, and every MLP writes it."""
    net = tiny("gpt_neox", vocab_size=400)
    theme = torch.randn(32, generator=torch.Generator().manual_seed(0))
    net.gpt_neox.embed_in.weight[40:50] = theme
    net.get_output_embeddings().weight[40:50] += theme
    for layer in net.gpt_neox.layers:
        layer.mlp.dense_4h_to_h.weight += 4 * torch.outer(theme / net.gpt_neox.final_layer_norm.weight, torch.ones(64))
    root = tmp_path_factory.mktemp("static")
    config = StaticReadingConfig(
        saved(root / "model", net), tokens=2048, trainer="ridge", directions=1, out=root / "run"
    )
    return static_reading(config)


def test_the_planted_theme_is_what_the_mlps_write(report):
    rows = pl.read_parquet(report.parent / "tables" / "static.directions.parquet").filter(part="MLP writes")
    assert rows["block"].to_list() == [0, 1, 2]
    assert rows["logit"].min() > 0.95
    best = pl.read_parquet(report.parent / "tables" / "static.best.parquet")["coherence"].to_list()
    assert best == sorted(best, reverse=True)
    found = {finding["id"]: finding for finding in numbers(report.parent)}
    assert set(found) == {"static.coherence", "static.tuned-gain"}
    assert all(finding["control"] for finding in found.values())


def test_a_model_without_readable_matrices_is_refused_and_says_why(tmp_path):
    model = saved(tmp_path / "model", tiny("mamba", vocab_size=400))
    config = StaticReadingConfig(model, tokens=2048, trainer="ridge", out=tmp_path / "run")
    with pytest.raises(SondeError, match=r"no matrix of .* can be read: .* has no site mlp_in"):
        static_reading(config)


@pytest.mark.parametrize("change", [{"directions": 0}, {"top": 1}, {"trainer": "crystal"}])
def test_bad_options_are_refused_before_anything_is_written(change, tmp_path):
    with pytest.raises(SondeError, match=r"--directions takes|is unknown"):
        static_reading(StaticReadingConfig("organism:pebble", out=tmp_path / "run", **change))
    assert not (tmp_path / "run").exists()
