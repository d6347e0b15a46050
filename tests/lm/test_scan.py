"""Chunked scans against the recurrences themselves, one position at a time in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sonde.lm.scan import causal_convolution, selective_scan, ssd_scan, wkv_scan

LENGTHS = [1, 2, 31, 32, 33, 70]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def close(found, true, tolerance=1e-5):
    assert found.shape == true.shape and found.dtype == torch.float32
    assert (found - true).abs().max() <= tolerance * true.abs().max()


def gradients(outputs, inputs):
    parts = [(normal(*out.shape, seed=i).to(out.dtype) * out).sum() for i, out in enumerate(outputs)]
    return torch.autograd.grad(torch.stack(parts).sum(), inputs)


def same_gradients(scan, loop, inputs):
    """Values and gradients of `scan` in float32 against `loop` in float64."""
    single = [t.float().requires_grad_() for t in inputs]
    double = [t.clone().requires_grad_() for t in inputs]
    found, true = scan(*single), loop(*double)
    for new, old in zip(found, true, strict=True):
        close(new, old)
    for new, old in zip(gradients(found, single), gradients(true, double), strict=True):
        close(new, old)


def selective_loop(x, dt, a, b, c, initial):
    state, y = initial, []
    for t in range(x.shape[1]):
        state = torch.exp(dt[:, t, :, None] * a) * state + (dt * x)[:, t, :, None] * b[:, t, None]
        y.append((state * c[:, t, None]).sum(-1))
    return torch.stack(y, 1), state


@pytest.mark.parametrize("length", LENGTHS)
def test_the_scan_of_mamba_is_its_recurrence_in_values_and_gradients(length):
    x, b, c = normal(2, length, 6), normal(2, length, 3), normal(2, length, 3, seed=1)
    dt, a = normal(2, length, 6, seed=1).exp(), -normal(6, 3).exp()
    inputs = [x, dt, a, b, c, normal(2, 6, 3)]
    same_gradients(lambda *args: selective_scan(*args[:-1], initial=args[-1]), selective_loop, inputs)


@pytest.mark.parametrize("chunk", [1, 4, 50, 64])
def test_the_chunk_of_mambas_scan_does_not_matter(chunk):
    inputs = [normal(1, 50, 4), normal(1, 50, 4).exp(), -normal(4, 2).exp(), normal(1, 50, 2), normal(1, 50, 2, seed=1)]
    for found, true in zip(selective_scan(*inputs, chunk=chunk), selective_scan(*inputs), strict=True):
        assert torch.allclose(found, true, atol=1e-5)


def ssd_loop(x, dt, a, b, c, skip, initial):
    groups, state, y = x.shape[2] // b.shape[2], initial, []
    b, c = (t.repeat_interleave(groups, 2) for t in (b, c))
    for t in range(x.shape[1]):
        gain = (dt[:, t, :, None] * x[:, t])[..., None] * b[:, t, :, None]
        state = torch.exp(dt[:, t] * a)[..., None, None] * state + gain
        y.append((state * c[:, t, :, None]).sum(-1) + skip[:, None] * x[:, t])
    return torch.stack(y, 1), state


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_the_scan_of_mamba2_is_its_recurrence_in_values_and_gradients(length, groups):
    x, b, c = normal(2, length, 4, 5), normal(2, length, groups, 3), normal(2, length, groups, 3, seed=1)
    inputs = [x, normal(2, length, 4).exp(), -normal(4).exp(), b, c, normal(4, seed=1), normal(2, 4, 5, 3)]
    same_gradients(lambda *args: ssd_scan(*args[:-2], skip=args[-2], initial=args[-1]), ssd_loop, inputs)


def test_what_was_long_ago_in_steps_of_mamba2_is_gone_without_a_trace_of_infinity():
    """Steps of 50 at a decay of 16 would be exp(800) if a decay were ever inverted."""
    x, b = torch.randn(1, 64, 2, 3), torch.randn(1, 64, 1, 2)
    dt = torch.full((1, 64, 2), 50.0)
    a = torch.tensor([-16.0, -16.0])
    y, state = ssd_scan(x, dt, a, b, b)
    assert torch.allclose(state, 50 * x[:, -1, :, :, None] * b[:, -1, :, None], rtol=1e-5)
    assert torch.isfinite(y).all()


def wkv_loop(decay, first, key, value, num, den, peak):
    num, den, out = num * peak.exp(), den * peak.exp(), []
    for t in range(key.shape[1]):
        now = torch.exp(first + key[:, t])
        out.append((num + now * value[:, t]) / (den + now))
        weight = torch.exp(key[:, t])
        num, den = (torch.exp(-decay) * old + weight * new for old, new in ((num, value[:, t]), (den, 1.0)))
    return torch.stack(out, 1), num / den


def wkv(decay, first, key, value, num, den, peak):
    out, (num, den, _) = wkv_scan(decay, first, key, value, initial=(num, den, peak))
    return out, num / den


@pytest.mark.parametrize("length", LENGTHS)
def test_the_scan_of_rwkv_is_its_recurrence_in_values_and_gradients(length):
    inputs = [normal(5).exp(), normal(5, seed=1), 2 * normal(2, length, 5), normal(2, length, 5, seed=1)]
    initial = [normal(2, 5), normal(2, 5, seed=1).exp(), normal(2, 5, seed=2)]
    same_gradients(wkv, wkv_loop, [*inputs, *initial])


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.sampled_from([1.0, 30.0, 300.0]), st.integers(1, 80), st.floats(-4, 4))
def test_keys_of_any_size_and_order_give_the_weighted_mean(seed, size, length, speed):
    """A single maximum for a chunk is not enough where keys differ by more than float32 spans: chunks are halved."""
    key, value = size * normal(1, length, 3, seed=seed), normal(1, length, 3, seed=seed + 1)
    decay, first = torch.full((3,), speed).double().exp(), normal(3, seed=seed)
    found, (num, den, peak) = wkv_scan(decay.float(), first.float(), key.float(), value.float())
    logs = []
    for i in range(length):
        ages = torch.arange(i - 1, -1, -1, dtype=torch.float64)
        logs.append(torch.cat([key[0, :i] - ages[:, None] * decay, key[0, i : i + 1] + first]))
    true = torch.stack([(log.softmax(0) * value[0, : i + 1]).sum(0) for i, log in enumerate(logs)])[None]
    # rounding a key of 300 to float32 changes its weight by 1e-5
    assert (found - true).abs().max() <= 3e-6 * max(size, 4) * true.abs().max()
    last = key[0] - torch.arange(length - 1, -1, -1, dtype=torch.float64)[:, None] * decay
    assert torch.allclose(peak[0].double(), last.amax(0), rtol=1e-5, atol=1e-4)
    assert bool((den >= 0.99).all()) and torch.isfinite(num).all()


def test_rwkv_keeps_its_state_as_the_library_does():
    """`max` is the largest decayed key, so `den` counts from 1."""
    _, (num, den, peak) = wkv_scan(
        *(t.float() for t in (normal(4).exp(), normal(4), normal(1, 40, 4), normal(1, 40, 4)))
    )
    assert num.shape == den.shape == peak.shape == (1, 4)
    assert (den >= 1).all()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_short_convolution_is_torchs_own_in_values_and_gradients(size):
    def own(x, weight, bias):
        padded = torch.nn.functional.pad(x.mT, (size - 1, 0))
        return [torch.nn.functional.conv1d(padded, weight[:, None], bias, groups=len(weight)).mT]

    inputs = [normal(2, 9, 5), normal(5, size), normal(5)]
    same_gradients(lambda *args: [causal_convolution(*args)], own, inputs)
