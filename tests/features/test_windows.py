"""Windows hold the true activations, on the grid or centred on their peak."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from latent_worlds import planted

from sonde.errors import SondeError
from sonde.features.latent_cache import Activations
from sonde.features.windows import ActiveWindows, active_windows, slot_windows

CONTEXT, LENGTH = 64, 16


def world(seed: int, density: float) -> tuple[np.ndarray, np.ndarray, Activations]:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 50, (6, CONTEXT))
    dense = (rng.uniform(0.1, 5, tokens.shape) * (rng.random(tokens.shape) < density)).astype(np.float32)
    sequence, position = dense.nonzero()
    return tokens, dense, Activations(sequence, position, dense[sequence, position])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.0, 0.4), st.sampled_from(["slot", "centred"]))
def test_every_active_slot_has_one_window_with_the_true_activations(seed, density, mode):
    tokens, dense, found = world(seed, density)
    windows = ActiveWindows(tokens, found, length=LENGTH, mode=mode)
    slots = dense.reshape(-1, LENGTH).max(1)
    assert sorted(windows.slots.tolist()) == slots.nonzero()[0].tolist()
    assert (windows.maxima == slots[windows.slots]).all() and (np.diff(windows.maxima) <= 0).all()
    for window in windows.cut(np.arange(len(windows))):
        place = slice(window.start, window.start + LENGTH)
        assert (window.tokens == tokens[window.sequence, place]).all()
        assert (window.activations == dense[window.sequence, place]).all()
        assert window.max == window.activations.max() and window.max >= slots[window.slot]


def test_centred_windows_have_their_peak_at_three_quarters_where_the_context_allows():
    tokens, dense, found = world(0, 0.1)
    windows = ActiveWindows(tokens, found, length=LENGTH, mode="centred")
    for window, peak in zip(windows.cut(np.arange(len(windows))), windows.maxima, strict=True):
        place = int(np.flatnonzero(dense[window.sequence] == peak)[0])
        assert window.start <= place < window.start + LENGTH
        if 12 <= place < CONTEXT - 4:
            assert place - window.start == 12
        else:
            assert window.start in (0, CONTEXT - LENGTH)


def test_slot_windows_stay_on_the_grid():
    tokens, _, found = world(0, 0.1)
    windows = ActiveWindows(tokens, found, length=LENGTH, mode="slot")
    assert (windows.starts == windows.slots * LENGTH).all()


def test_normalised_activations_are_whole_numbers_from_0_to_10():
    tokens, _, found = world(1, 0.2)
    windows = ActiveWindows(tokens, found, length=LENGTH, mode="slot")
    window = windows.cut(np.array([0]))[0]
    levels = window.normalised(windows.largest)
    assert levels.max() == 10 and ((levels > 0) == (window.activations > 0)).all()
    assert (levels == np.ceil(np.round(10 * window.activations / windows.largest, 3))).all()
    assert (window.marked == (window.activations > 0.3 * window.max)).all()


def test_a_length_that_does_not_divide_the_context_is_an_error_with_both_numbers(tmp_path):
    cache = planted(tmp_path, [(1, 2)])
    with pytest.raises(SondeError, match="windows of 30 tokens do not divide a context of 64"):
        active_windows(cache, "planted", 0, length=30)


def test_windows_of_the_grid_are_silent_and_where_they_say(tmp_path):
    cache = planted(tmp_path, [(1,)])
    for window in slot_windows(cache, np.array([0, 5, 9]), length=16, kind="random"):
        assert not window.activations.any() and window.max == 0 and not window.positive
        assert (window.tokens == cache.tokens[window.sequence, window.start : window.start + 16]).all()
        assert window.slot == window.sequence * 4 + window.start // 16
