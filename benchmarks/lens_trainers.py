"""The ways to train a lens, on one text and model: held-out KL by layer and CPU time, against the paper's SGD recipe.

Run as

    python benchmarks/lens_trainers.py --model /tmp/bytes      trains a byte-level GPT-2 there first, if it is not there
    python benchmarks/lens_trainers.py --model organism:pebble

The byte-level GPT-2 has 6 layers, d 64 and context 64, and reads the source of Python's standard library.
"""

import argparse
import random
import sysconfig
import time
from hashlib import sha256
from pathlib import Path

import torch
from pairing import machine
from transformers import GPT2Config, GPT2LMHeadModel

import sonde
from sonde.lens.evaluation import (
    LensEvaluation,
    LensSample,
    covariance_similarity,
    transfer_correlation,
    transfer_penalty,
)
from sonde.lens.tuned import TunedLens
from sonde.lm.batches import TokenBatches
from sonde.lm.stream import feed
from sonde.organisms.small_lm import Training, joined_ids, train_language_model, train_tokenizer

RECIPE = {"trainer": "sgd", "steps": 250, "tokens_per_step": 4096, "patience": 1000}
WAYS = {
    "sgd recipe": RECIPE,
    "adam": {"trainer": "adam", "steps": 250, "tokens_per_step": 4096, "patience": 1000},
    "muon": {"trainer": "muon", "steps": 250, "tokens_per_step": 4096, "patience": 1000},
    "ridge": {"trainer": "ridge"},
    "ridge+adam": {"trainer": "ridge+adam"},
    "ridge+60": {"trainer": "ridge+adam", "steps": 60},
    "default": {},
}


def source() -> tuple[list[str], list[str]]:
    """The standard library's modules in pieces of 2,000 characters, in random order: some 4 MB, and 200 held out."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [file.read_text(encoding="utf-8") for file in files]
    pieces = [text[start : start + 2000] for text in texts for start in range(0, len(text), 2000)]
    random.Random(0).shuffle(pieces)
    return pieces[200:], pieces[:200]


def train_bytes(folder: Path, texts: list[str], steps: int) -> None:
    """A byte-level GPT-2 on `texts`."""
    tokenizer = train_tokenizer(texts[:1], 257)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=257, n_positions=64, n_embd=64, n_layer=6, n_head=4, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    settings = Training(steps=steps, context=64, final_context=64, bfloat16=False)
    train_language_model(
        model, joined_ids(texts, tokenizer), settings,
        checkpoint=folder.with_suffix(".safetensors"), data_hash=sha256("".join(texts).encode()).hexdigest(),
    )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--steps", type=int, default=600, help="of training the byte-level GPT-2")
    parser.add_argument("--tokens", type=int, default=131072, help="for the lenses to read")
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    fitting, held = (None, None) if ":" in options.model else source()
    if fitting is not None and not Path(options.model).exists():
        train_bytes(Path(options.model), fitting, options.steps)
    lm = sonde.load(options.model)
    context = min(256, lm.context)
    batches = TokenBatches(fitting, lm.tokenizer, context=context, limit_tokens=options.tokens)
    if held is None:
        batches, test = batches.split(0.1)
    else:
        test = TokenBatches(held, lm.tokenizer, context=context, limit_tokens=16384)
    lenses, seconds = {"logit": TunedLens.logit(lm)}, {"logit": 0.0}
    for name in options.ways:
        start = time.process_time()
        lenses[name] = TunedLens.fit(lm, batches, tokens=options.tokens, **WAYS[name])
        seconds[name] = time.process_time() - start
    evaluation = LensEvaluation(lm, lenses, draws=200)
    feed(lm, test, [evaluation])
    scores = evaluation.scores()
    means = {name: sum(layer.estimate for layer in score.kl) / len(score.kl) for name, score in scores.items()}
    print(f"{lm}: cross entropy {scores['logit'].cross_entropy[-1].estimate:.2f} nats; held-out KL in nats by layer")
    base = "sgd recipe" if "sgd recipe" in lenses else options.ways[0]
    for name, score in scores.items():
        layers = " ".join(f"{layer.estimate:6.3f}" for layer in score.kl)
        print(
            f"{name:11s} {layers}  mean {means[name]:.3f} = {means[name] / means[base]:.2f} x {base}, "
            f"{seconds[name]:5.1f} CPU s = {seconds[name] / seconds[base]:.2f} x"
        )
    if "default" in lenses:
        pairs = zip(scores["logit"].bias, scores["default"].bias, strict=True)
        print("bias, logit / default, by layer:", " ".join(f"{logit / tuned:.1f}" for logit, tuned in pairs))
        sample = LensSample(lm, lenses["default"].sites)
        feed(lm, test, [sample])
        penalty = transfer_penalty(lenses["default"], sample.rows())
        for without in (0, 1, 3):
            rho = transfer_correlation(penalty, covariance_similarity(sample.rows().hidden, without=without))
            print(f"transfer penalty v. covariance similarity without {without} dimensions: Spearman {rho:.2f}")


if __name__ == "__main__":
    main()
