"""A cache holds every activation and nothing else, survives a kill, and does not grow in memory with the text."""

import tracemalloc
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from latent_worlds import Projection, planted
from tokenizers.processors import TemplateProcessing

import sonde
from sonde.errors import SondeError
from sonde.features import latent_cache as module
from sonde.features.latent_cache import LatentCache, tokenizer_hash
from sonde.features.latent_files import TRIPLE, Shards, escaped, ranges
from sonde.lm.batches import TokenBatches

TEXT = [
    f"The old man and the sea, part {i}: he went out with boat number {i * 7} and came back late." for i in range(60)
]


@pytest.fixture(scope="module")
def lm():
    return sonde.load("organism:pebble")


def build(lm, folder, **options):
    width = lm.d_model
    encoders = {"resid_post.1": Projection(40, width), "a/b": Projection(24, width, seed=1, site="mlp_out.2")}
    return LatentCache.build(lm, encoders, TEXT, folder, **{"context": 32, "tokens_per_batch": 128} | options)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def dense(cache: LatentCache, hookpoint: str) -> np.ndarray:
    out = np.zeros((*cache.tokens.shape, cache.latents(hookpoint)), dtype=np.float32)
    for latent in range(cache.latents(hookpoint)):
        found = cache.latent(hookpoint, latent)
        out[found.sequence, found.position, latent] = found.value
    return out


def test_the_cache_holds_what_the_encoders_give_and_nothing_at_separators(lm, tmp_path):
    cache = build(lm, tmp_path / "cache")
    tokens = torch.from_numpy(cache.tokens.astype(np.int64))
    with torch.no_grad(), lm.reading("resid_post.1", "mlp_out.2") as acts:
        lm(tokens)
    for hookpoint, site, seed, width in (("resid_post.1", "resid_post.1", 0, 40), ("a/b", "mlp_out.2", 1, 24)):
        values, indices = Projection(width, lm.d_model, seed=seed).encode(acts[site])
        expected = torch.zeros(*tokens.shape, width).scatter(-1, indices, values)
        expected[tokens == lm.tokenizer.eos_token_id] = 0
        found = dense(cache, hookpoint)
        assert np.abs(found - expected.numpy()).max() <= 1e-3 * expected.max()  # half precision
        assert (cache.counts(hookpoint) == (expected > module.LEAST).sum((0, 1)).numpy()).all()


def test_a_token_that_opens_every_text_is_given_to_the_model_and_not_kept(tmp_path):
    lm = sonde.load("organism:pebble")
    assert lm.tokenizer is not None
    end = lm.tokenizer.eos_token_id
    opening = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", end)])
    lm.tokenizer.backend_tokenizer.post_processor = opening
    cache = build(lm, tmp_path)
    tokens = torch.from_numpy(cache.tokens.astype(np.int64))
    assert tokens.shape[1] == 32
    given = torch.cat([torch.full_like(tokens[:, :1], end), tokens], 1)
    with torch.no_grad(), lm.reading("resid_post.1") as acts:
        lm(given)
    values, indices = Projection(40, lm.d_model).encode(acts["resid_post.1"][:, 1:])
    expected = torch.zeros(*tokens.shape, 40).scatter(-1, indices, values)
    expected[tokens == end] = 0
    assert np.abs(dense(cache, "resid_post.1") - expected.numpy()).max() <= 1e-3 * expected.max()


def test_the_tokens_are_those_of_the_text_in_another_order(lm, tmp_path):
    cache = build(lm, tmp_path / "cache", seed=3)
    rows = TokenBatches(TEXT, lm.tokenizer, context=32)
    plain = np.concatenate([rows[i].tokens.numpy() for i in range(rows.n_batches)])
    assert sorted(map(tuple, cache.tokens.tolist())) == sorted(map(tuple, plain.tolist()))
    assert (cache.tokens != plain).any()
    assert (build(lm, tmp_path / "other", seed=4).tokens != cache.tokens).any()
    given = LatentCache.build(lm, {"embed": Projection(8, lm.d_model)}, rows, tmp_path / "given", seed=3)
    assert (given.tokens == cache.tokens).all()


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_killed_build_goes_on_and_leaves_the_same_files(lm, tmp_path, monkeypatch, stop):
    monkeypatch.setattr(module, "_COMMIT", 2)
    whole = contents(build(lm, tmp_path / "whole").folder)
    plain, calls = module._triples, []

    def dies(*arguments):
        calls.append(1)
        if len(calls) > 2 * stop:  # two hookpoints a batch
            raise KeyboardInterrupt
        return plain(*arguments)

    monkeypatch.setattr(module, "_triples", dies)
    with pytest.raises(KeyboardInterrupt):
        build(lm, tmp_path / "killed")
    with pytest.raises(SondeError, match="holds no finished latent cache"):
        LatentCache.open(tmp_path / "killed")
    monkeypatch.setattr(module, "_triples", plain)
    assert contents(build(lm, tmp_path / "killed").folder) == whole


def test_a_build_that_is_killed_while_sorting_goes_on(lm, tmp_path, monkeypatch):
    whole = contents(build(lm, tmp_path / "whole").folder)
    plain, calls = Shards._sort_one, []

    def dies(self, *arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        plain(self, *arguments)

    monkeypatch.setattr(Shards, "_sort_one", dies)
    with pytest.raises(KeyboardInterrupt):
        build(lm, tmp_path / "killed")
    monkeypatch.setattr(Shards, "_sort_one", plain)
    assert contents(build(lm, tmp_path / "killed").folder) == whole


def test_a_finished_cache_is_opened_and_another_identity_is_refused(lm, tmp_path, monkeypatch):
    whole = contents(build(lm, tmp_path / "cache").folder)
    monkeypatch.setattr(module, "_encode_all", None)
    assert build(lm, tmp_path / "cache").counts("a/b").sum() > 0
    with pytest.raises(SondeError, match=r"was started with other options: .*seed \(0, now 1\)"):
        build(lm, tmp_path / "cache", seed=1)
    assert contents(tmp_path / "cache") == whole


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 400), st.integers(1, 30), st.integers(1, 7), st.integers(1, 64), st.integers(0, 10**6))
def test_sorting_outside_of_memory_is_sorting(tmp_path_factory, n, latents, splits, chunk, seed):
    rng = np.random.default_rng(seed)
    triples = np.empty(n, dtype=TRIPLE)
    triples["latent"] = rng.zipf(1.5, n) % latents
    flat = np.sort(rng.integers(0, 640, n))
    triples["sequence"], triples["position"] = flat // 64, flat % 64
    triples["value"] = rng.uniform(0, 1, n)
    folder = tmp_path_factory.mktemp("shards")
    shards = Shards(folder, {"x": latents}, splits=splits, chunk=chunk)
    shards.begin()
    shards.add("x", triples[: n // 2])
    shards.add("x", triples[n // 2 :])
    shards.sort()
    from safetensors.numpy import load_file

    ordered = triples[np.argsort(triples["latent"], kind="stable")]
    parts = [load_file(folder / "x" / f"{lo}_{hi - 1}.safetensors") for lo, hi in ranges(latents, splits)]
    for name in ("sequence", "position", "value"):
        assert (np.concatenate([part[name] for part in parts]) == ordered[name]).all()
    counts = np.concatenate([np.diff(part["starts"]) for part in parts])
    assert (counts == np.bincount(triples["latent"], minlength=latents)).all()
    assert sorted(path.suffix for path in (folder / "x").iterdir()) == [".safetensors"] * len(parts)


def test_a_hookpoint_is_matched_exactly_and_named_one_way(tmp_path):
    tokens = np.zeros((2, 4), dtype=np.int32)
    empty = (np.zeros(0, int),) * 3 + (np.zeros(0),)
    names = ["layers.1", "layers.10", "layers/1", "layers%2F1"]
    cache = LatentCache.write(tmp_path, tokens, {name: (i + 1, empty) for i, name in enumerate(names)})
    assert [cache.latents(name) for name in names] == [1, 2, 3, 4]
    assert [unquote(escaped(name)) for name in names] == names
    with pytest.raises(SondeError, match="no hookpoint 'layers'"):
        cache.counts("layers")
    for name in ("", "..", "x" * 300):
        with pytest.raises(SondeError, match="cannot name a folder"):
            escaped(name)


def test_small_values_are_dropped_and_large_ones_kept_in_range(tmp_path):
    given = (np.zeros(4, int), np.arange(4), np.zeros(4, int), np.array([1e-5, 1.1e-5, 2.0, 1e6]))
    cache = LatentCache.write(tmp_path, np.zeros((1, 4), dtype=np.int32), {"x": (1, given)})
    found = cache.latent("x", 0)
    assert found.position.tolist() == [1, 2, 3]
    assert found.value[-1] == np.finfo(np.float16).max


def test_another_tokenizer_is_an_error_by_hash(lm, tmp_path):
    cache = build(lm, tmp_path)
    cache.check_tokenizer(lm.tokenizer)
    other = sonde.load("organism:quiz").tokenizer
    assert tokenizer_hash(other) != tokenizer_hash(lm.tokenizer)
    with pytest.raises(SondeError, match=f"another tokenizer .hash {tokenizer_hash(lm.tokenizer)[:12]}"):
        cache.check_tokenizer(other)


def test_what_cannot_be_cached_is_said(lm, tmp_path):
    encoder = Projection(8, lm.d_model)
    with pytest.raises(SondeError, match=r"site 'resid_post.99' does not exist"):
        LatentCache.build(lm, {"resid_post.99": encoder}, TEXT, tmp_path / "a")
    with pytest.raises(SondeError, match="not one site"):
        LatentCache.build(lm, {"resid_post.*": encoder}, TEXT, tmp_path / "b")
    with pytest.raises(SondeError, match="no dictionary"):
        LatentCache.build(lm, {}, TEXT, tmp_path / "c")
    with pytest.raises(SondeError, match=r"longer than organism:pebble takes"):
        LatentCache.build(lm, {"embed": encoder}, TEXT * 4, tmp_path / "d", context=600)
    with pytest.raises(SondeError, match="join=True"):
        apart = TokenBatches(["one two", "a b c d e f g"], lm.tokenizer, context=16, join=False)
        LatentCache.build(lm, {"embed": encoder}, apart, tmp_path / "e")
    cache = planted(tmp_path / "f", [(1,)])
    with pytest.raises(SondeError, match="latent 1 does not exist: planted has 1"):
        cache.latent("planted", 1)


def test_an_activation_that_is_not_finite_is_named(lm, tmp_path):
    def broken(x):
        x[0, 5] = float("nan")
        return x

    with lm.editing({"resid_post.1": broken}), pytest.raises(SondeError, match="sequence 0, token 5 is not finite"):
        build(lm, tmp_path)


def test_sorting_sixteen_times_as_much_takes_no_more_memory(tmp_path):
    rng, peaks = np.random.default_rng(0), []
    for n in (1 << 17, 1 << 21):  # 1.5 and 25 MB of triples
        shards = Shards(tmp_path / str(n), {"x": 1000}, splits=2, chunk=1 << 14)
        shards.begin()
        tracemalloc.start()
        for first in range(0, n, 1 << 14):
            triples = np.zeros(1 << 14, dtype=TRIPLE)
            triples["latent"] = rng.integers(0, 1000, 1 << 14)
            triples["sequence"] = first >> 8
            shards.add("x", triples)
        shards.sort()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]
