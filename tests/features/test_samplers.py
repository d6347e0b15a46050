"""Train and test share nothing, negatives are silent and distinct, whatever the sampler."""

import dataclasses

import numpy as np
import pytest
from latent_worlds import VOCAB, planted

from sonde.errors import SondeError
from sonde.features.latent_cache import LatentCache
from sonde.features.neighbours import by_cooccurrence
from sonde.features.samplers import HardPool, LatentExamples, Sampling, TooDense, TooRare, examples
from sonde.features.windows import Window

SMALL = Sampling(length=16, train=40, test=50, negatives=50, train_negatives=20, min_examples=100)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    sets = [(1, 2, 3), (2, 3, 4), (50,), tuple(range(100, 140)), (7,) * 1, (VOCAB + 1,)]
    return planted(tmp_path_factory.mktemp("cache"), sets, sequences=600)


def spans(windows: list[Window]) -> set[tuple[int, int]]:
    return {(w.sequence, w.start + i) for w in windows for i in range(len(w.tokens))}


def sampled(cache, latent, **changes) -> LatentExamples:
    found = examples(cache, "planted", latent, config=dataclasses.replace(SMALL, **changes))
    assert isinstance(found, LatentExamples)
    return found


@pytest.mark.parametrize("mode", ["slot", "centred"])
@pytest.mark.parametrize("sampler", ["top", "random", "quantiles", "mix"])
@pytest.mark.parametrize("latent", [0, 2, 3])
def test_train_and_test_share_no_token_and_no_text(cache, sampler, mode, latent):
    found = sampled(cache, latent, sampler=sampler, mode=mode)
    assert not spans(found.train) & spans(found.test)
    texts = [{w.tokens.tobytes() for w in part} for part in (found.train, found.test)]
    assert not texts[0] & texts[1]
    assert len({w.slot for w in found.train}) == len(found.train)
    assert len({w.slot for w in found.test}) == len(found.test) == 50


def test_the_same_text_elsewhere_is_not_in_both(tmp_path):
    tokens = np.tile(np.arange(64), (300, 1))  # four different windows, 300 times each
    sequence, position = np.divmod(np.arange(300 * 4), 4)
    given = (sequence, position * 16 + 3, np.zeros(1200, int), np.random.default_rng(0).uniform(1, 2, 1200))
    cache = LatentCache.write(tmp_path, tokens, {"x": (1, given)})
    found = examples(cache, "x", 0, config=dataclasses.replace(SMALL, mode="slot", train_negatives=0))
    assert isinstance(found, TooDense)
    half = tuple(column[: 1200 // 2] for column in given)
    cache = LatentCache.write(tmp_path / "half", tokens, {"x": (1, half)})
    found = examples(cache, "x", 0, config=dataclasses.replace(SMALL, mode="slot"))
    assert isinstance(found, LatentExamples) and found.train == [] and len(found.test) == 50


@pytest.mark.parametrize("sampler", ["top", "random", "quantiles", "mix"])
def test_samplers_choose_what_they_say(cache, sampler):
    found = sampled(cache, 0, sampler=sampler, mode="slot")
    assert len(found.train) == 40 and [w.max for w in found.train] == sorted((w.max for w in found.train), reverse=True)
    quantiles = [w.quantile for w in found.test]
    assert [quantiles.count(q) for q in range(1, 11)] == [5] * 10
    assert found.active > 400
    everyone = sampled(cache, 0, sampler="random", train=found.active, mode="slot")
    strengths = np.sort([w.max for w in (*everyone.train, *everyone.test)])[::-1]
    tenths = np.searchsorted(-strengths, [-w.max for w in found.train]) * 10 // len(strengths)
    counts = np.bincount(tenths, minlength=10)
    if sampler == "quantiles":
        assert counts.max() - counts.min() <= 1
    elif sampler == "top":
        assert counts[0] == 40
    elif sampler == "mix":
        assert counts[0] >= 8 and (counts[1:] >= 2).all()


def test_test_windows_do_not_depend_on_the_sampler_of_the_explainer(cache):
    chosen = [[w.slot for w in sampled(cache, 0, sampler=s).test] for s in ("top", "random", "quantiles", "mix")]
    assert all(slots == chosen[0] for slots in chosen)


def test_draws_depend_on_the_seed_and_the_latent_alone(cache):
    first = [[w.slot for w in sampled(cache, latent).negatives] for latent in (0, 2)]
    again = [[w.slot for w in sampled(cache, latent).negatives] for latent in (2, 0)]
    assert first == again[::-1] and first[0] != first[1]
    other = examples(cache, "planted", 0, config=SMALL, seed=1)
    assert isinstance(other, LatentExamples) and [w.slot for w in other.negatives] != first[0]


def test_negatives_are_silent_distinct_and_not_those_of_the_explainer(cache):
    found = sampled(cache, 3)
    slots = [w.slot for w in (*found.train_negatives, *found.negatives)]
    assert len(found.train_negatives) == 20 and len(found.negatives) == 50 and len(set(slots)) == 70
    for window in (*found.train_negatives, *found.negatives):
        assert not np.isin(window.tokens, range(100, 140)).any()


def test_negatives_of_neighbours_hold_the_neighbour_and_not_the_latent(cache):
    near = by_cooccurrence(cache, "planted").of(0)
    assert near[0][0] == 1
    found = examples(
        cache, "planted", 0, config=dataclasses.replace(SMALL, negative_kind="neighbours"), neighbours=near
    )
    assert isinstance(found, LatentExamples)
    counts = np.bincount([w.neighbour for w in found.negatives], minlength=2)
    assert counts.max() <= 10 and counts[1] == 10
    for window in found.negatives:
        assert window.kind == "neighbours" and not np.isin(window.tokens, (1, 2, 3)).any()
        assert window.marks is not None and window.marks.any()
        if window.neighbour == 1:
            assert ((window.marks > 0) == (window.tokens == 4)).all()


def test_hard_negatives_are_the_nearest_silent_windows(cache):
    def embed(texts):
        counts = np.zeros((len(texts), VOCAB))
        for row, text in enumerate(texts):
            np.add.at(counts[row], [int(word) for word in text.split()], 1)
        return counts

    pool = HardPool(cache, embed, lambda ids: " ".join(map(str, ids)), length=16, size=1500)
    config = dataclasses.replace(SMALL, negative_kind="hard")
    found = examples(cache, "planted", 0, config=config, pool=pool)
    assert isinstance(found, LatentExamples) and len(found.negatives) == 50
    distances = [w.distance for w in found.negatives]
    assert distances == sorted(distances) and distances[-1] < 0.9
    assert all(not np.isin(w.tokens, (1, 2, 3)).any() and w.kind == "hard" for w in found.negatives)


def test_rare_and_dense_latents_are_listed_and_not_scored(cache, tmp_path):
    config = dataclasses.replace(SMALL, min_examples=200)
    found = examples(cache, "planted", 5, config=config)
    assert isinstance(found, TooRare) and found.reason == "fires in 0 windows, fewer than 200"
    everywhere = planted(tmp_path, [tuple(range(VOCAB))], sequences=60)
    found = examples(everywhere, "planted", 0, config=config)
    assert isinstance(found, TooDense) and "no negatives" in found.reason


def test_a_test_set_smaller_than_asked_is_what_there_is(cache):
    config = dataclasses.replace(SMALL, test=2000, train=10, min_examples=10, negatives=5000)
    found = examples(cache, "planted", 2, config=config)
    assert isinstance(found, LatentExamples)
    assert len(found.test) == found.active < 2000 and found.train == []
    assert 0 < len(found.negatives) < 5000


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"sampler": "best"}, "sampler is 'best': use one of top, random, quantiles, mix"),
        ({"mode": "middle"}, "mode is 'middle'"),
        ({"negative_kind": "easy"}, "negative_kind is 'easy'"),
        ({"test": 0}, "test is 0"),
        ({"train_negatives": -1}, "train_negatives is -1"),
        ({"min_examples": 1}, "min_examples is 1"),
    ],
)
def test_settings_out_of_range_are_named(changes, line):
    with pytest.raises(SondeError, match=line):
        Sampling(**changes)


def test_negatives_without_what_they_need_are_refused(cache):
    with pytest.raises(SondeError, match="list of the latent's neighbours"):
        sampled(cache, 0, negative_kind="neighbours")
    with pytest.raises(SondeError, match="give a HardPool"):
        sampled(cache, 0, negative_kind="hard")
    with pytest.raises(SondeError, match="windows of 30 tokens do not divide"):
        sampled(cache, 0, length=30)
