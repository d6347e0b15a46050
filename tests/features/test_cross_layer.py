"""Latents of a layer write to that layer and all later ones, and the outputs add up."""

import shutil

import pytest
import torch

from sonde.errors import SondeError
from sonde.features.cross_layer import CrossLayerTranscoder
from sonde.features.crosscoder import crosscoder, decoders, joined, parted, stream_norms
from sonde.features.dictionary import Design, Dictionary
from sonde.features.objective import Part, Scale, losses, variance
from sonde.features.step import Step
from sonde.features.step_config import StepConfig


def made(kind="topk"):
    k = 3 if kind in ("topk", "batchtopk") else None
    clt = CrossLayerTranscoder.initialised(3, 8, 32, kind=kind, k=k)
    with torch.no_grad():
        for i, p in enumerate(clt.parameters()):
            p.copy_(0.4 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return clt


def rows(seed=0):
    return torch.randn(20, 3, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["topk", "relu"])
def test_a_layer_writes_to_itself_and_to_later_ones(kind):
    clt, x = made(kind), rows()
    wanted = torch.zeros(20, 3, 8)
    for source, latents in enumerate(clt.encode(x)):
        f = torch.zeros(20, 32).scatter_add(1, latents.indices, latents.values)
        for target in range(source, 3):
            bias = clt.layers[source].b_dec[8 * (target - source) :][:8]
            wanted[:, target] += f @ clt.decoder(source, target) + bias
    assert torch.allclose(clt(x), wanted, atol=1e-5)
    with pytest.raises(ValueError, match="layer 2 do not write to layer 1"):
        clt.decoder(2, 1)


def test_its_loss_is_that_of_the_sum():
    clt, x, y = made().double(), rows().double(), rows(1).double()
    config = StepConfig(aux_weight=0.0).for_design(clt.layers[0].design)
    flat, target = clt.checked(x, y)
    parts = [Part(d, r, torch.zeros(32, dtype=torch.bool), column) for d, r, column in clt.parts(flat)]
    found = losses(parts, target, config, Scale(variance(target), 20))
    wanted = (y - clt(x)).square().sum() / (y - y.mean(0)).square().sum()
    assert float((found.total - wanted).abs().detach()) < 1e-10


def test_other_shapes_kinds_and_missing_targets_are_refused():
    clt = made()
    with pytest.raises(SondeError, match=r"expected \(..., 3, 8\)"):
        clt(torch.zeros(20, 2, 8))
    with pytest.raises(SondeError, match="needs the targets"):
        Step(clt)(rows())
    with pytest.raises(ValueError, match="kind is 'gated'"):
        CrossLayerTranscoder.initialised(3, 8, 32, kind="gated")
    with pytest.raises(ValueError, match="n_layers is 0"):
        CrossLayerTranscoder.initialised(0, 8, 32, k=3)
    with pytest.raises(ValueError, match="outputs of layer 0 is 8"):
        CrossLayerTranscoder([Dictionary(Design("topk", 8, 32, 3, transcodes=True)) for _ in range(2)])


@pytest.mark.parametrize("kind", ["relu", "batchtopk"])
def test_the_penalty_and_the_ranks_of_a_crosscoder_weigh_by_the_sum_of_norms(kind):
    design = crosscoder((5, 3), 32, kind=kind, k=3 if kind == "batchtopk" else None)
    d = Dictionary(design).train()
    with torch.no_grad():
        for i, p in enumerate(d.parameters()):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    x = joined([rows()[:, 0, :5], rows()[:, 1, :3]])
    weights = d.w_dec[:, :5].norm(dim=1) + d.w_dec[:, 5:].norm(dim=1)
    pre = x @ d.w_enc.T + d.b_enc
    if kind == "relu":
        config = StepConfig().for_design(design)
        assert config.norm == "free"
        found = losses([Part(d, x, torch.zeros(32, dtype=torch.bool))], x, config, Scale(variance(x), 20), sparsity=0.1)
        wanted = (x - pre.relu() @ d.w_dec - d.b_dec).square().sum() / 20 + 0.1 * (pre.relu() * weights).sum(1).mean()
        assert float(found.total.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    else:
        kept = torch.zeros(640).index_fill(0, (pre * weights).flatten().topk(60)[1], 1).view(20, 32)
        assert torch.allclose(d(x), (pre * kept) @ d.w_dec + d.b_dec, atol=1e-4)
    assert torch.allclose(stream_norms(d).sum(1), weights)
    assert [part.shape for part in decoders(d)] == [(32, 5), (32, 3)]
    assert [part.shape for part in parted(d, d(x))] == [(20, 5), (20, 3)]


def test_a_crosscoder_finds_what_two_streams_share_and_what_is_ones_own():
    g = torch.Generator().manual_seed(0)
    directions = torch.randn(24, 32, generator=g)
    directions[:8, 16:] = 0
    directions[8:16, :16] = 0
    directions /= directions.norm(dim=1, keepdim=True)
    design = crosscoder((16, 16), 48, kind="batchtopk", k=2)
    step = Step(Dictionary.initialised(design), StepConfig(lr=3e-3, warmup=10, aux_weight=0.0))
    for _ in range(300):
        active = (torch.rand(256, 24, generator=g) < 1.5 / 24) * (0.5 + torch.rand(256, 24, generator=g))
        terms = step(active @ directions)
    norms = stream_norms(step.module)
    share = norms[:, 0] / norms.sum(1)
    best = (directions @ (step.module.w_dec / step.module.w_dec.norm(dim=1, keepdim=True)).T).max(1)[1]
    assert terms["fvu"] < 0.2
    assert float(share[best[:8]].mean()) > 0.9
    assert float(share[best[8:16]].mean()) < 0.1
    assert float((share[best[16:]] - 0.5).abs().mean()) < 0.1


def test_streams_of_other_rows_or_of_one_model_alone_are_refused():
    with pytest.raises(SondeError, match="same rows"):
        joined([torch.zeros(4, 3), torch.zeros(5, 3)])
    with pytest.raises(ValueError, match="at least two"):
        crosscoder((8,), 32, k=3)
    with pytest.raises(ValueError, match="kind is 'topk'"):
        crosscoder((8, 8), 32, kind="topk", k=3)
    with pytest.raises(SondeError, match="no crosscoder"):
        stream_norms(Dictionary(Design("topk", 8, 32, 3)))


def test_a_cross_layer_transcoder_comes_back_from_its_folder(tmp_path):
    made = CrossLayerTranscoder.initialised(3, 8, 20, k=4, seed=1)
    made.save(tmp_path / "kept")
    x = torch.randn(5, 3, 8)
    assert torch.equal(CrossLayerTranscoder.load(tmp_path / "kept")(x), made(x))
    shutil.rmtree(tmp_path / "kept/layer.2")
    with pytest.raises(SondeError, match=r"layer\.2"):
        CrossLayerTranscoder.load(tmp_path / "kept")
    CrossLayerTranscoder.initialised(2, 8, 20, k=4).save(tmp_path / "short")
    shutil.copytree(tmp_path / "short/layer.1", tmp_path / "kept/layer.2")
    shutil.copytree(tmp_path / "short/layer.0", tmp_path / "kept/layer.1", dirs_exist_ok=True)
    assert CrossLayerTranscoder.load(tmp_path / "kept")(x).shape == (5, 3, 8)
    shutil.copytree(tmp_path / "short/layer.1", tmp_path / "kept/layer.1", dirs_exist_ok=True)
    with pytest.raises(SondeError, match="layers of different transcoders"):
        CrossLayerTranscoder.load(tmp_path / "kept")
