"""N-gram counts against `tokengrams` 0.3.3: building, next-token distributions after many contexts, smoothing.

Run: `python benchmarks/ngrams.py [--tokens 1000000]`, with `pip install tokengrams==0.3.3`; and, where
`pip install pydivsufsort==0.0.20` is there too, the suffix array against it. CPU time, in turn.
"""

import argparse
import importlib.util
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from pairing import interleave, machine
from tokengrams import InMemoryIndex

from sonde.stats.ngram import NgramModel
from sonde.stats.ngram_tables import NgramTables
from sonde.stats.suffix_array import SuffixArray

VOCAB = 50_277


def text(n: int, seed: int) -> np.ndarray:
    """Tokens with Zipf's frequencies; seven in ten are one of the few that like to follow the token before."""
    rng = np.random.default_rng(seed)
    fresh = (rng.zipf(1.2, 1 << 20) - 1) % VOCAB
    likes, table = fresh.tolist(), (rng.zipf(1.3, n) - 1) % 64
    out, token = [], 0
    for draw, alone, own in zip(
        table.tolist(), (rng.random(n) < 0.3).tolist(), rng.permutation(n).tolist(), strict=True
    ):
        token = likes[own & 0xFFFFF] if alone else likes[(token * 7919 + draw) & 0xFFFFF]
        out.append(token)
    return np.array(out, dtype=np.uint16)


def building(tokens: np.ndarray, folder: Path, rounds: int) -> None:
    path = folder / "tokens.bin"
    tokens.tofile(path)
    ways = {
        "tables of trigrams": lambda: NgramTables.build(tokens, vocab_size=VOCAB, order=3),
        "tables of 4-grams": lambda: NgramTables.build(tokens, vocab_size=VOCAB, order=4),
        "tables of 5-grams": lambda: NgramTables.build(tokens, vocab_size=VOCAB, order=5),
        "suffix array": lambda: SuffixArray.build(tokens, vocab_size=VOCAB),
        "tokengrams": lambda: InMemoryIndex.from_token_file(str(path), vocab=VOCAB),
    }
    if importlib.util.find_spec("pydivsufsort") is not None:
        from pydivsufsort import divsufsort

        ways["pydivsufsort"] = lambda: divsufsort(tokens)
    print(f"index of {len(tokens):,} tokens, V = {VOCAB:,}; time over that of our trigrams")
    for name, ratio in interleave(ways, rounds=rounds, warmup=1).items():
        print(f"  {name:20} {ratio}", flush=True)


def contexts(tokens: np.ndarray, folder: Path, rounds: int) -> None:
    theirs = InMemoryIndex.from_token_file(str(folder / "tokens.bin"), vocab=VOCAB)
    model = NgramModel.fit(tokens, vocab_size=VOCAB, order=3, smoothing="none")
    smooth = NgramModel(model.tables)
    places = np.random.default_rng(1).integers(len(tokens) - 2, size=131_072)
    pairs = np.stack([tokens[places], tokens[places + 1]], 1).astype(np.int64)
    few, some = pairs[:256], pairs[:64]
    lists, small = few.tolist(), some.tolist()
    assert np.array_equal(theirs.batch_count_next(small), _counts(model, some))
    ways = {
        "ours, counts": lambda: model.tables.continuations(few),
        "ours, probabilities": lambda: model.rows(few, unseen="empty"),
        "tokengrams, lists": lambda: theirs.batch_count_next(lists),
        "tokengrams, to numpy": lambda: np.array(theirs.batch_count_next(lists)),
    }
    print("next-token distributions after 256 contexts of 2 tokens; time over that of our counts")
    for name, ratio in interleave(ways, rounds=rounds).items():
        print(f"  {name:20} {ratio}", flush=True)
    start = time.process_time()
    rows = model.rows(pairs, unseen="empty")
    print(f"  after {len(pairs):,}: {time.process_time() - start:.3f} CPU-s, {len(rows.values):,} numbers")
    ways = {
        "ours": lambda: smooth.rows(some),
        "ours, made dense": lambda: smooth.rows(some).dense(),
        "tokengrams": lambda: theirs.batch_get_smoothed_probs(small),
    }
    print("smoothed distributions after 64 contexts of 2 tokens; time over ours")
    for name, ratio in interleave(ways, rounds=rounds).items():
        print(f"  {name:20} {ratio}", flush=True)


def constant(folder: Path) -> None:
    print("constant text, CPU-s (tokengrams sorts by comparison: beyond 32,768 it is left out)")
    for n in (8_192, 32_768, 131_072, 1_048_576):
        ids, path = np.full(n, 7, dtype=np.uint16), folder / "constant.bin"
        ids.tofile(path)
        ways = {
            "tables": lambda ids=ids: NgramTables.build(ids, vocab_size=VOCAB, order=4),
            "suffix array": lambda ids=ids: SuffixArray.build(ids, vocab_size=VOCAB),
        }
        if n <= 32_768:
            ways["tokengrams"] = lambda path=path: InMemoryIndex.from_token_file(str(path), vocab=VOCAB)
        found = interleave(ways, rounds=5, warmup=1)
        print(f"  {n:>9,}  " + "  ".join(f"{k} {v.milliseconds / 1e3:.4f}" for k, v in found.items()), flush=True)


def _counts(model: NgramModel, pairs: np.ndarray) -> np.ndarray:
    full = np.zeros((len(pairs), VOCAB), dtype=np.int64)
    begins, tokens, counts = model.tables.continuations(pairs)
    full[np.repeat(np.arange(len(pairs)), np.diff(begins)), tokens] = counts
    return full


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    with tempfile.TemporaryDirectory() as scratch:
        ids = text(args.tokens, args.seed)
        building(ids, Path(scratch), args.rounds)
        contexts(ids, Path(scratch), args.rounds)
        constant(Path(scratch))
