"""Reading and editing at sites, on tiny random models of every family."""

import pytest
import torch
from families import FAMILIES, model, tokens

from sonde.errors import SondeError
from sonde.lm.model import LanguageModel

pytestmark = pytest.mark.usefixtures("no_grad")


def forward_sites(lm: LanguageModel) -> list[str]:
    return [site for site in lm.sites if not site.startswith("state.")]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_read_changes_no_logit(family):
    lm, ids = model(family), tokens()
    plain = lm.model(input_ids=ids, use_cache=False).logits
    with lm.reading(*forward_sites(lm)) as acts:
        out = lm(ids)
    assert set(acts) == set(forward_sites(lm))
    assert out.logits is not None
    assert torch.equal(out.logits, plain)
    assert torch.equal(lm(ids).logits, plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_site_has_batch_and_position_first(family):
    lm, ids = model(family), tokens(batch=3, length=6)
    with lm.reading(*forward_sites(lm)) as acts:
        lm(ids)
    assert all(act.shape[:2] == (3, 6) for act in acts.values())
    assert all(acts[site].shape[2] == lm.d_model for site in lm.sites if "resid" in site or "_out" in site)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pass_that_stops_early_reads_the_same_activations(family):
    lm, ids = model(family), tokens()
    with lm.reading("resid_post.0", "resid_post.1", "logits") as whole:
        lm(ids)
    with lm.reading("resid_post.0", "resid_post.1") as part:
        out = lm(ids)
    assert out.logits is None
    assert all(torch.equal(part[site], whole[site]) for site in part)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("site", ["resid_pre.1", "resid_post.1", "mlp_out.1", "mixer_out.1", "embed"])
def test_replacing_a_row_by_another_rows_activations_transplants_it(family, site):
    """Row 0 with row 1's activations at a site gives row 1's stream there, and leaves row 1 alone."""
    lm, ids = model(family), tokens()
    if site not in lm.sites:
        pytest.skip(f"{family} has no {site}")
    with lm.reading(site, "logits") as clean:
        lm(ids)
    with lm.editing({site: lambda h: h.flip(0)}, rows=[0]), lm.reading(site, "logits") as edited:
        lm(ids)
    assert torch.equal(edited[site][0], clean[site][1])
    assert torch.allclose(edited["logits"][1], clean["logits"][1], atol=1e-5)
    assert not torch.allclose(edited["logits"][0], clean["logits"][0], atol=1e-3)
    if site.startswith("resid"):
        assert torch.allclose(edited["logits"][0], clean["logits"][1], atol=1e-4)


PRE_NORM = ("gpt2", "gpt_neox", "llama", "gemma2", "opt", "bloom", "falcon", "mamba2", "rwkv", "jamba", "falcon_h1")
PRE_NORM += ("granitemoehybrid", "xlstm", "lfm2")


@pytest.mark.parametrize("family", PRE_NORM)
def test_what_a_part_is_given_is_the_output_of_a_norm_of_its_block(family):
    lm, ids = model(family), tokens()
    outputs = []
    norms = [child for child in lm.structure.blocks[1].modules() if "Norm" in type(child).__name__]
    hooks = [norm.register_forward_hook(lambda module, args, out: outputs.append(out)) for norm in norms]
    with lm.reading("mixer_in.1", "mlp_in.1") if "mlp_in.1" in lm.sites else lm.reading("mixer_in.1") as acts:
        lm(ids)
    for hook in hooks:
        hook.remove()
    for site, act in acts.items():
        assert any(out.numel() == act.numel() and torch.equal(out.view_as(act), act) for out in outputs), site


@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_adds_what_its_parts_inputs_decide(family):
    lm = model(family)
    assert "mixer_in.1" in lm.sites
    inputs = lm.check().inputs
    assert inputs is not None
    if family == "rwkv":  # its first block also normalises the embedding
        assert inputs > lm.check().tolerance
    else:
        assert inputs <= 1e-6


@pytest.mark.parametrize("family", ["gpt2", "opt", "bloom", "mamba2", "falcon_h1"])
def test_an_edit_of_an_input_leaves_the_stream_alone_until_the_part_has_run(family):
    lm, ids = model(family), tokens()
    with lm.reading("resid_post.0", "resid_pre.1", "mixer_in.1", "resid_post.1") as clean:
        lm(ids)
    with (
        lm.editing({"mixer_in.1": torch.zeros_like}),
        lm.reading("resid_post.0", "resid_pre.1", "mixer_in.1", "resid_post.1") as edited,
    ):
        lm(ids)
    assert torch.equal(edited["resid_pre.1"], clean["resid_pre.1"])
    assert edited["mixer_in.1"].abs().sum() == 0
    assert not torch.allclose(edited["resid_post.1"], clean["resid_post.1"], atol=1e-3)


@pytest.mark.parametrize("family", ["gpt2", "bloom", "falcon", "opt", "mamba2", "rwkv", "falcon_h1"])
def test_an_identity_edit_changes_nothing(family):
    lm, ids = model(family), tokens()
    plain = lm(ids).logits
    with lm.editing({"*": lambda h: h}):
        assert torch.equal(lm(ids).logits, plain)


def test_edits_compose_in_the_order_in_which_they_were_entered():
    lm, ids = model(), tokens()
    with lm.reading("resid_post.1") as clean:
        lm(ids)
    with (
        lm.editing({"resid_post.1": lambda h: h + 1}),
        lm.editing({"resid_post.1": lambda h: h * 2}),
        lm.reading("resid_post.1") as acts,
    ):
        lm(ids)
    assert torch.equal(acts["resid_post.1"], (clean["resid_post.1"] + 1) * 2)


def test_an_edit_that_works_in_place_does_not_reach_back_into_the_model():
    lm, ids = model(), tokens()
    with lm.reading("resid_post.0", "resid_pre.1") as acts, lm.editing({"resid_pre.1": torch.Tensor.zero_}):
        lm(ids)
    assert acts["resid_pre.1"].abs().sum() == 0
    assert acts["resid_post.0"].abs().sum() > 0


def test_positions_choose_real_tokens_and_negatives_count_from_the_end_of_the_prompt():
    lm, ids = model(), tokens(batch=2, length=6)
    mask = torch.tensor([[False, False, True, True, True, True], [True] * 6])
    for positions, chosen in [
        (0, [[2], [0]]),
        (-1, [[5], [5]]),
        ([0, -1], [[2, 5], [0, 5]]),
        (slice(-2, None), [[4, 5], [4, 5]]),
        (slice(1, 3), [[3, 4], [1, 2]]),
        (slice(None, -3), [[2], [0, 1, 2]]),
    ]:
        with (
            lm.editing({"resid_post.0": lambda h: torch.full_like(h, 7.0)}, positions=positions),
            lm.reading("resid_post.0") as acts,
        ):
            lm(ids, mask)
        hit = (acts["resid_post.0"] == 7).all(-1)
        expected = torch.zeros_like(mask)
        for row, columns in enumerate(chosen):
            expected[row, columns] = True
        assert torch.equal(hit, expected), positions


def test_pads_are_edited_only_by_edits_without_rows_or_positions():
    lm, ids = model(), tokens(batch=1, length=4)
    mask = torch.tensor([[False, True, True, True]])
    with lm.editing({"resid_post.0": torch.zeros_like}, rows=[0]), lm.reading("resid_post.0") as acts:
        lm(ids, mask)
    assert acts["resid_post.0"][0, 0].abs().sum() > 0
    assert acts["resid_post.0"][0, 1:].abs().sum() == 0


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        (("resid_post.1",), ["resid_post.1"]),
        (("resid_post.*",), ["resid_post.0", "resid_post.1", "resid_post.2"]),
        (("resid_post.1:",), ["resid_post.1", "resid_post.2"]),
        (("resid_post.-1:",), ["resid_post.2"]),
        (("resid_pre.::2",), ["resid_pre.0", "resid_pre.2"]),
        (("logits", "embed"), ["embed", "logits"]),
        (("mlp_out.:1", "embed"), ["embed", "mlp_out.0"]),
    ],
)
def test_patterns_name_sites_in_order_of_depth(pattern, found):
    assert list(model().match(*pattern)) == found


def test_an_unknown_site_names_what_exists():
    with pytest.raises(SondeError, match=r"'resid_post.13' does not exist: llama has embed, resid_pre.0 … 2"):
        model().match("resid_post.13")


def test_an_edit_of_another_shape_is_refused():
    lm = model()
    with lm.editing({"resid_post.0": lambda h: h[..., 0]}), pytest.raises(SondeError, match="returned"):
        lm(tokens())


def test_rows_outside_the_batch_are_refused():
    lm = model()
    with lm.editing({"resid_post.0": lambda h: h}, rows=[5]), pytest.raises(SondeError, match="batch of 2"):
        lm(tokens())


def test_a_call_that_failed_leaves_no_hook_behind():
    lm, ids = model(), tokens()

    def fail(h):
        raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"), lm.editing({"resid_post.0": fail}), lm.reading("*"):
        lm(ids)
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in lm.model.modules())
    assert torch.equal(lm(ids).logits, lm.model(input_ids=ids, use_cache=False).logits)


def test_gradients_flow_through_edits_and_reads():
    lm, ids = model(), tokens()
    with torch.enable_grad():
        vector = torch.zeros(lm.d_model, requires_grad=True)
        with lm.editing({"resid_post.0": lambda h: h + vector}), lm.reading("resid_post.2") as acts:
            lm(ids)
        acts["resid_post.2"].square().sum().backward()
    assert vector.grad is not None
    assert vector.grad.abs().sum() > 0
    assert all(p.grad is None for p in lm.model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_state_is_read_as_tensors_with_the_batch_first(family):
    lm, ids = model(family), tokens(batch=3)
    with lm.reading("state.*") as acts:
        out = lm(ids)
    assert out.past is not None
    assert set(acts) == {f"state.{i}" for i in range(lm.n_layers)}
    tensors = [tensor for state in acts.values() for tensor in state.values()]
    assert tensors
    assert all(len(tensor) == 3 for tensor in tensors)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_that_is_given_another_rows_states_continues_like_it(family):
    lm, ids = model(family), tokens(batch=2)
    suffix = ids[:1, :3].expand(2, -1)
    clean = lm(suffix, past=lm(ids, use_cache=True).past).logits

    def swapped(state):
        return {name: tensor.flip(0) for name, tensor in state.items()}

    past = lm(ids, use_cache=True).past
    with lm.editing({"state.*": swapped}, rows=[0]):
        edited = lm(suffix, past=past).logits
    assert torch.allclose(edited[0], clean[1], atol=1e-4)
    assert torch.allclose(edited[1], clean[1], atol=1e-4)
    assert not torch.allclose(edited[0], clean[0], atol=1e-3)


def test_a_state_is_edited_once_however_long_the_continuation():
    lm, ids = model("mamba2"), tokens(batch=1)
    calls = []

    def count(state):
        calls.append(1)
        return state

    with lm.editing({"state.1": count}):
        lm.generate(ids.tolist(), max_new_tokens=4)
    assert len(calls) == 1


def test_selected_rows_of_a_past_continue_alone():
    lm, ids = model("llama"), tokens(batch=2)
    past = lm(ids, use_cache=True).past
    twice = past.select(torch.tensor([1, 1, 0]))
    suffix = ids[:, :2]
    together = lm(suffix[[1, 1, 0]], past=twice).logits
    alone = lm(suffix, past=past).logits
    assert torch.allclose(together, alone[[1, 1, 0]], atol=1e-5)


@pytest.mark.parametrize(
    "family", ["gpt2", "gpt_neox", "llama", "qwen3", "gemma2", "olmo2", "phi", "stablelm", "jamba"]
)
def test_residual_streams_are_those_that_transformers_returns(family):
    """In these families hidden_states[i] is the input of block i, and the last one has passed the final norm."""
    lm, ids = model(family), tokens()
    theirs = lm.model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
    with lm.reading("resid_pre.*", "resid_post.-1:") as acts:
        lm(ids)
    for i in range(lm.n_layers):
        assert torch.equal(acts[f"resid_pre.{i}"], theirs[i])
    last = acts[f"resid_post.{lm.n_layers - 1}"]
    assert torch.allclose(lm.unembedding.normed(last), theirs[lm.n_layers], atol=1e-6)
