"""Latent cache: bookkeeping of a batch against `eai-delphi` 0.1.3, windows and samples a second, memory by text length.

Run: `python benchmarks/latent_cache.py`, with `pip install --no-deps eai-delphi==0.1.3` for the comparison; the
packages that only its pipeline uses are stood in for. CPU time, in turn, one thread.
"""

import argparse
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import torch
from pairing import interleave, machine

from sonde.features.latent_cache import LatentCache, _triples
from sonde.features.latent_files import TRIPLE, Shards
from sonde.features.samplers import LatentExamples, Sampling, examples

D, LATENTS, K, ROWS, CONTEXT = 128, 4096, 32, 8, 256


class _TopK:
    latents = LATENTS

    def __init__(self) -> None:
        self.weight = torch.randn(LATENTS, D) / D**0.5

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The k largest."""
        values, indices = (x @ self.weight.T).topk(K, dim=-1, sorted=False)
        return values.relu(), indices


def peer_cache() -> Any | None:
    """Delphi's in-memory cache, or None where it is not installed."""
    for name in ("faiss", "sentence_transformers", "blobfile", "orjson", "vllm", "bitsandbytes", "asyncer"):
        if name not in sys.modules:
            sys.modules[name] = MagicMock()
    try:
        from delphi.latents.cache import InMemoryCache
    except ImportError as error:
        print(f"delphi cannot be imported here: {error}")
        return None
    return InMemoryCache(batch_size=ROWS)


@torch.no_grad()
def bookkeeping(rounds: int) -> None:
    """A batch of 2,048 tokens from activations to triples."""
    encoder = _TopK()
    x = torch.randn(ROWS, CONTEXT, D)
    kept = torch.ones(ROWS, CONTEXT, dtype=torch.bool)
    tokens = torch.zeros(ROWS, CONTEXT, dtype=torch.long)
    peer = peer_cache()

    def dense() -> None:
        values, indices = encoder.encode(x)
        full = torch.zeros(ROWS, CONTEXT, LATENTS).scatter_(-1, indices, values)
        if peer is None:
            torch.nonzero(full.abs() > 1e-5)
            full[full.abs() > 1e-5]
            return
        peer.latent_locations_batches.clear()
        peer.latent_activations_batches.clear()
        peer.tokens_batches.clear()
        peer.add(full, tokens, 0, "x")

    name = "dense and nonzero, as in delphi" if peer is None else "delphi's InMemoryCache"
    ways: dict[str, Callable[[], object]] = {
        "encode alone": lambda: encoder.encode(x.flatten(0, 1)),
        "encode and triples": lambda: _triples("x", encoder, x, kept, 0),
        f"encode and {name}": dense,
    }
    for way, ratio in interleave(ways, rounds=rounds).items():
        print(f"{way:40s} {ratio}")


def sampling(latents: int, windows: int) -> None:
    """Latents a CPU second from the cache on disk to train and test windows."""
    rng = np.random.default_rng(0)
    sequences = 4000
    tokens = rng.integers(0, 50_000, (sequences, CONTEXT), dtype=np.int32)
    slots = sequences * CONTEXT // 32
    place = np.concatenate(
        [rng.choice(slots, windows, replace=False) * 32 + rng.integers(0, 32, windows) for _ in range(latents)]
    )
    latent = np.repeat(np.arange(latents), windows)
    with tempfile.TemporaryDirectory() as folder:
        triples = (place // CONTEXT, place % CONTEXT, latent, rng.uniform(0.1, 5, len(place)))
        cache = LatentCache.write(folder, tokens, {"x": (latents, triples)})
        for mode in ("slot", "centred"):
            for sampler in ("top", "random", "quantiles", "mix"):
                config = Sampling(mode=mode, sampler=sampler)  # type: ignore[arg-type]
                begun = time.process_time()
                found = [examples(cache, "x", i, config=config) for i in range(latents)]
                seconds = time.process_time() - begun
                assert all(isinstance(one, LatentExamples) and one.active == windows for one in found)
                print(f"{mode:8s} {sampler:10s} {latents / seconds:7.0f} latents a second")


def memory(lengths: tuple[int, ...]) -> None:
    """Peak of what is allocated while a text's triples are written and sorted, 32 a token."""
    rng = np.random.default_rng(0)
    for sequences in lengths:
        with tempfile.TemporaryDirectory() as folder:
            shards = Shards(Path(folder), {"x": LATENTS}, splits=5)
            shards.begin()
            tracemalloc.start()
            for first in range(0, sequences, ROWS):
                triples = np.empty(ROWS * CONTEXT * K, dtype=TRIPLE)
                triples["sequence"] = first + np.repeat(np.arange(ROWS), CONTEXT * K)
                triples["position"] = np.tile(np.repeat(np.arange(CONTEXT), K), ROWS)
                triples["latent"], triples["value"] = rng.integers(0, LATENTS, len(triples)), 1
                shards.add("x", triples)
            shards.commit(sequences)
            shards.sort()
            peak = tracemalloc.get_traced_memory()[1] / 2**20
            tracemalloc.stop()
        tokens = sequences * CONTEXT
        print(f"{tokens:10,} tokens: {tokens * K * TRIPLE.itemsize / 2**20:6.0f} MB of triples, peak {peak:5.0f} MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--latents", type=int, default=300, help="latents whose windows are sampled")
    parser.add_argument("--windows", type=int, default=2000, help="active windows of each")
    parser.add_argument(
        "--sequences", type=int, nargs="+", default=[1024, 4096, 16384], help="lengths of text for memory"
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(machine())
    bookkeeping(given.rounds)
    sampling(given.latents, given.windows)
    memory(tuple(given.sequences))
