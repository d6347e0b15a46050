"""Directions of weights: found by measurement as they stand in checkpoints, and read as the tokens planted there."""

import functools

import numpy as np
import pytest
import torch
from families import FAMILIES, tiny

from sonde.errors import SondeError
from sonde.lens.static import read_directions, token_coherence, weight_directions
from sonde.lens.tuned import TunedLens
from sonde.lm.model import LanguageModel

PARTS = ("w_in", "w_out", "ov_out", "qk_key")
RECURRENT = ("mamba", "mamba2", "falcon_mamba", "rwkv", "falcon_h1", "xlstm", "qwen3_next")
HYBRID = {"recurrent_gemma": 2}  # where block 1 is no attention
WITHOUT_MLP = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "jamba", "qwen3_next", "granitemoehybrid", "rwkv")


@functools.cache
def model(family: str) -> LanguageModel:
    return LanguageModel(tiny(family), name=family)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("part", PARTS)
def test_directions_are_unit_vectors_or_refused_in_a_line(family, part):
    lm, layer = model(family), HYBRID.get(family, 1)
    refused = WITHOUT_MLP if part in ("w_in", "w_out") else RECURRENT
    if family in refused:
        with pytest.raises(SondeError, match=f"block 1 of {family}|{family} has no site"):
            weight_directions(lm, layer, part)
        return
    found = weight_directions(lm, layer, part, k=2)
    heads = 1 if part.startswith("w_") else lm.config.num_attention_heads
    assert found.vectors.shape == (2 * heads, lm.d_model)
    assert torch.allclose(found.vectors.norm(dim=-1), torch.ones(2 * heads), atol=1e-5)
    assert len(set(found.matrices)) == heads
    control = weight_directions(lm, layer, part, k=2, random=0)
    assert control.vectors.shape == found.vectors.shape
    assert not torch.allclose(control.vectors.abs(), found.vectors.abs(), atol=1e-2)


def aligned(found: torch.Tensor, true: torch.Tensor) -> bool:
    """Whether rows are the same directions, up to sign."""
    true = torch.nn.functional.normalize(true.double(), dim=-1)
    return torch.allclose((found.double() * true).sum(-1).abs(), torch.ones(len(true)).double(), atol=1e-3)


def by_hand(family: str) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """Queries, keys and values (d_head, d) and outputs (d, d_head) of the heads of block 1, from the checkpoint."""
    net = tiny(family)
    if family == "gpt2":
        block = net.transformer.h[1].attn
        q, k, v = block.c_attn.weight.T.double().split(32)
        return *(list(x.split(8)) for x in (q, k, v)), list(block.c_proj.weight.T.double().split(8, 1))
    if family == "gpt_neox":
        block = net.gpt_neox.layers[1].attention
        fused = block.query_key_value.weight.double().view(4, 3, 8, 32)
        return *(list(fused[:, i]) for i in range(3)), list(block.dense.weight.double().split(8, 1))
    if family == "falcon":
        block = net.transformer.h[1].self_attention
        q, k, v = block.query_key_value.weight.double().split([32, 8, 8])
        return list(q.split(8)), [k] * 4, [v] * 4, list(block.dense.weight.double().split(8, 1))
    block = net.model.layers[1].self_attn
    kv = [[x for x in m.weight.double().split(8) for _ in range(2)] for m in (block.k_proj, block.v_proj)]
    return list(block.q_proj.weight.double().split(8)), *kv, list(block.o_proj.weight.double().split(8, 1))


def folded(family: str, rows: torch.Tensor) -> torch.Tensor:
    net = tiny(family)
    norms = {
        "gpt2": lambda: net.transformer.h[1].ln_1,
        "gpt_neox": lambda: net.gpt_neox.layers[1].input_layernorm,
        "falcon": lambda: net.transformer.h[1].input_layernorm,
        "llama": lambda: net.model.layers[1].input_layernorm,
    }
    rows = rows * norms[family]().weight.double()
    return rows if family == "llama" else rows - rows.mean(-1, keepdim=True)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "falcon", "llama"])
def test_circuits_are_those_of_the_checkpoint(family):
    lm = model(family)
    queries, keys, values, outputs = by_hand(family)
    found = {part: weight_directions(lm, 1, part, k=2).vectors for part in ("ov_out", "ov_in", "qk_query", "qk_key")}
    for head in range(4):
        centre = 0 if family == "llama" else outputs[head].mean(0, keepdim=True)
        left, _, right = torch.linalg.svd((outputs[head] - centre) @ folded(family, values[head]))
        rows = slice(2 * head, 2 * head + 2)
        assert aligned(found["ov_out"][rows], left[:, :2].T)
        assert aligned(found["ov_in"][rows], right[:2])
        left, _, right = torch.linalg.svd(folded(family, queries[head]).T @ folded(family, keys[head]))
        assert aligned(found["qk_query"][rows], left[:, :2].T)
        assert aligned(found["qk_key"][rows], right[:2])


def test_singular_vectors_and_neurons_of_the_mlp_are_those_of_its_matrices():
    lm, net = model("llama"), tiny("llama").model.layers[1]
    gain = net.post_attention_layernorm.weight.double()
    w_in = torch.cat([net.mlp.gate_proj.weight, net.mlp.up_proj.weight]).double() * gain
    assert aligned(weight_directions(lm, 1, "w_in", k=3).vectors, torch.linalg.svd(w_in).Vh[:3])
    longest = w_in[w_in.norm(dim=-1).argsort(descending=True)[:3]]
    assert aligned(weight_directions(lm, 1, "w_in", k=3, raw=True).vectors, longest)
    w_out = net.mlp.down_proj.weight.double()
    found = weight_directions(lm, -2, "w_out", k=3)
    assert aligned(found.vectors, torch.linalg.svd(w_out).U[:, :3].T)
    assert torch.allclose(found.strength.double(), torch.linalg.svd(w_out).S[:3], rtol=1e-4)


def test_a_matrix_that_writes_words_is_read_as_these_words():
    """Ten tokens share an embedding; the strongest thing that the MLP writes is their unembedding."""
    net = tiny("gpt_neox")
    theme = torch.randn(32)
    net.gpt_neox.embed_in.weight[40:50] = theme + 0.05 * torch.randn(10, 32)
    net.get_output_embeddings().weight[40:50] += 2 * theme
    out = net.gpt_neox.layers[1].mlp.dense_4h_to_h.weight
    aim = theme / net.gpt_neox.final_layer_norm.weight
    out += 6 * torch.outer(aim - aim.mean(), torch.randn(64))
    lm = LanguageModel(net, name="planted")
    strongest = weight_directions(lm, 1, "w_out", k=1)
    read = read_directions(lm, TunedLens.logit(lm), 2, strongest.vectors)
    assert set(read.best(0)) == set(range(40, 50))
    assert read.score[0] > 0.95


def test_random_matrices_say_nothing_in_a_model_without_themes():
    lm = model("gpt_neox")
    control = weight_directions(lm, 1, "w_out", k=8, random=1)
    assert abs(read_directions(lm, TunedLens.logit(lm), 2, control.vectors).score.mean()) < 0.2


def test_both_signs_are_read_and_the_better_one_counts():
    lm = model("gpt_neox")
    vectors = torch.randn(5, 32)
    lens = TunedLens.logit(lm)
    up, down = read_directions(lm, lens, 1, vectors), read_directions(lm, lens, 1, -vectors)
    assert torch.equal(up.promotes, down.suppresses)
    assert np.allclose(up.score, down.score)
    better = torch.where(torch.from_numpy(up.positive)[:, None], up.promotes, up.suppresses)
    assert np.allclose(up.score, token_coherence(lm, better).numpy())


def test_a_direction_is_read_as_the_slope_of_the_lens():
    lm = model("gpt_neox")
    lens = TunedLens.zeros(lm)
    torch.nn.init.normal_(lens.weight, std=0.1)
    v = torch.randn(1, 32)
    state = torch.randn(1, 32)
    slope = (lens(state + 1e3 * v, 1) - lens(state - 1e3 * v, 1))[0].detach()
    assert read_directions(lm, lens, 1, v, k=3).promotes[0].tolist() == slope.topk(3).indices.tolist()


def test_coherence_is_the_mean_over_pairs():
    lm = model("gpt_neox")
    ids = torch.tensor([[3, 9, 27]])
    a, b, c = torch.nn.functional.normalize(lm.structure.embedding.weight[ids[0]].double(), dim=-1)
    assert torch.allclose(token_coherence(lm, ids)[0], (a @ b + a @ c + b @ c) / 3)


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda lm: weight_directions(lm, 1, "w_up"), "use one of w_in"),
        (lambda lm: weight_directions(lm, 3, "w_in"), "has layers 0 to 2"),
        (lambda lm: weight_directions(lm, 0, "w_in", k=0), "ask for 1 direction"),
        (lambda lm: weight_directions(lm, 0, "ov_in", raw=True), "product of two matrices"),
        (lambda lm: read_directions(lm, TunedLens.logit(lm), 0, torch.ones(2, 5)), r"shape \(n, 32\)"),
        (lambda lm: read_directions(lm, TunedLens.logit(lm), 0, torch.zeros(2, 32)), "is zero"),
        (lambda lm: read_directions(lm, TunedLens.logit(lm), 0, torch.ones(2, 32), k=1), "give 2 to 97 tokens"),
        (lambda lm: read_directions(lm, TunedLens.logit(lm), 7, torch.ones(2, 32)), "out of range"),
    ],
)
def test_what_makes_no_sense_is_refused(ask, words):
    with pytest.raises(SondeError, match=words):
        ask(model("gpt_neox"))
