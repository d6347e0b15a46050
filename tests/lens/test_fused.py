import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sonde.lens.fused import Readout, Target, divergence


class ToyUnembedding:
    """An unembedding of random numbers, with or without each of the parts that families have."""

    def __init__(self, d=6, vocab=11, *, bias=False, scale=1.0, softcap=None, project=False, seed=0):
        torch.manual_seed(seed)
        d_head = d // 2 if project else d
        self.norm = nn.LayerNorm(d)
        nn.init.normal_(self.norm.weight)
        self.project = nn.Linear(d, d_head, bias=False) if project else None
        self.weight = torch.randn(vocab, d_head)
        self.bias = torch.randn(vocab) if bias else None
        self.scale, self.softcap = scale, softcap

    def __call__(self, hidden):
        normed = self.norm(hidden)
        if self.project is not None:
            normed = self.project(normed)
        logits = self.scale * (normed @ self.weight.to(normed).T + (0 if self.bias is None else self.bias.to(normed)))
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def naive(unembedding, hidden, *, final=None, labels=None):
    log_q = unembedding(hidden).log_softmax(-1)
    if labels is not None:
        return -log_q.gather(-1, labels.expand(hidden.shape[:-1])[..., None]).squeeze(-1)
    log_p = unembedding(final).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


@settings(deadline=None, max_examples=40)
@given(
    bias=st.booleans(),
    scale=st.sampled_from([1.0, 0.25, 3.0]),
    softcap=st.sampled_from([None, 2.0]),
    project=st.booleans(),
    labelled=st.booleans(),
    chunk=st.sampled_from([1, 3, 100, None]),
    seed=st.integers(0, 99),
)
def test_loss_and_gradient_are_those_of_naive_autograd(bias, scale, softcap, project, labelled, chunk, seed):
    unembedding = ToyUnembedding(bias=bias, scale=scale, softcap=softcap, project=project, seed=seed)
    unembedding.norm.double()
    if unembedding.project is not None:
        unembedding.project.double()
    readout = Readout(unembedding, torch.float64)
    hidden = torch.randn(3, 7, 6, dtype=torch.float64, requires_grad=True)
    final = torch.randn(7, 6, dtype=torch.float64)
    labels = torch.randint(0, 11, (7,)) if labelled else None
    weights = torch.rand(3, 7, dtype=torch.float64)

    target = Target.model(readout, final, chunk=chunk) if labels is None else Target.tokens(readout, labels)
    fused = divergence(readout.normed(hidden), target, readout, chunk=chunk)
    (gradient,) = torch.autograd.grad((fused * weights).sum(), hidden)
    plain = naive(unembedding, hidden, final=final, labels=labels)
    (expected,) = torch.autograd.grad((plain * weights).sum(), hidden)

    torch.testing.assert_close(fused, plain, rtol=1e-9, atol=1e-9)
    assert (gradient - expected).norm() <= 1e-6 * expected.norm()


def test_a_half_precision_unembedding_is_read_in_float32_and_left_alone():
    unembedding = ToyUnembedding()
    unembedding.norm.half()
    unembedding.weight = unembedding.weight.half()
    readout = Readout(unembedding)
    assert readout.normed(torch.randn(2, 6)).dtype == readout.weight.dtype == torch.float32
    assert unembedding.norm.weight.dtype == unembedding.weight.dtype == torch.float16


def test_the_final_hidden_state_has_no_divergence_from_itself():
    readout = Readout(ToyUnembedding(vocab=300, bias=True))
    final = torch.randn(40, 6)
    loss = divergence(readout.normed(final)[None], Target.model(readout, final), readout)
    assert loss.abs().max() < 1e-4


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_targets_of_some_tokens_are_their_rows(softcap):
    readout = Readout(ToyUnembedding(softcap=softcap))
    final, hidden = torch.randn(9, 6), torch.randn(2, 9, 6)
    rows = torch.tensor([4, 1, 8])
    whole = divergence(readout.normed(hidden), Target.model(readout, final), readout)
    some = divergence(readout.normed(hidden[:, rows]), Target.model(readout, final)[rows], readout)
    torch.testing.assert_close(some, whole[:, rows])
