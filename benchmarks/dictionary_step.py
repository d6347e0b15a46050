"""A whole step of a TopK dictionary (forward, backward, norm projection, Adam) beside three other packages.

    python benchmarks/dictionary_step.py [--rows N] [--sizes 128x1024 …] [--memory]

needs eai-sparsify, sae-lens and dictionary-learning beside Sonde; what is not installed is left out. N = 2048 rows of
k = 32, float32, one thread, CPU time, interleaved. The baseline is Sonde, so that a ratio says how many times as long
another package takes. `--memory` prints the largest extra memory of one of Sonde's steps, in n x M float32 buffers.
"""

import argparse
import contextlib
import io
import resource
import subprocess
import sys
import warnings
from collections.abc import Callable

import pairing
import torch
from torch import Tensor

from sonde.features.dictionary import Design, Dictionary
from sonde.features.step import Step
from sonde.features.step_config import StepConfig

SIZES = ((128, 1024), (128, 4096), (256, 4096), (512, 4096), (512, 16384))
K, LR = 32, 2e-4


def sonde(x: Tensor, latents: int) -> Callable[[], object]:
    """One step of Sonde, with its books (dead latents, checks)."""
    step = Step(Dictionary.initialised(Design("topk", x.shape[1], latents, K), mean=x.mean(0)), StepConfig(lr=LR))
    return lambda: step(x)


def sparsify(x: Tensor, latents: int) -> Callable[[], object]:
    """The parts of a step of its trainer, on one hookpoint."""
    from sparsify import SparseCoder, SparseCoderConfig  # type: ignore

    coder = SparseCoder(x.shape[1], SparseCoderConfig(num_latents=latents, k=K))
    coder.b_dec.data = x.mean(0)
    optimiser = torch.optim.Adam(coder.parameters(), LR)
    coder.set_decoder_norm_to_unit_norm()

    def step() -> None:
        coder(x).fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        torch.nn.utils.clip_grad_norm_(coder.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        coder.set_decoder_norm_to_unit_norm()

    return step


def sae_lens(x: Tensor, latents: int) -> Callable[[], object]:
    """A step of its TopK training SAE, as its trainer takes it without autocast; its norms are folded at the end."""
    from sae_lens.saes.sae import TrainStepInput  # type: ignore
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig  # type: ignore

    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=x.shape[1], d_sae=latents, k=K, device="cpu", dtype="float32"))
    optimiser = torch.optim.Adam(sae.parameters(), LR)

    def step() -> None:
        inputs = TrainStepInput(
            sae_in=x, coefficients={}, dead_neuron_mask=torch.zeros(latents, dtype=torch.bool), n_training_steps=0,
            is_logging_step=False,
        )  # fmt: skip
        sae.training_forward_pass(inputs).loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()

    return step


def dictionary_learning(x: Tensor, latents: int) -> Callable[[], object]:
    """A step of its TopK trainer."""
    from dictionary_learning.trainers.top_k import TopKTrainer  # type: ignore

    trainer = TopKTrainer(
        steps=100_000, activation_dim=x.shape[1], dict_size=latents, k=K, layer=0, lm_name="", lr=LR, device="cpu"
    )
    trainer.update(0, x)
    return lambda: trainer.update(1, x)


WAYS = {"sonde": sonde, "sparsify": sparsify, "sae-lens": sae_lens, "dictionary_learning": dictionary_learning}


def measure(rows: int, d: int, latents: int, rounds: int) -> None:
    """Print one row of the table."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, d, generator=generator)
    ways: dict[str, Callable[[], object]] = {}
    for name, make in WAYS.items():
        try:
            with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ways[name] = make(x, latents)
        except ImportError as error:
            print(f"  {name} is left out: {error}")
    for name, ratio in pairing.interleave(ways, rounds=rounds, warmup=1).items():
        print(f"  {name:20} {ratio}  {rows / ratio.milliseconds:7.2f}k tokens/s")


def extra_memory(rows: int, d: int, latents: int) -> None:
    """Print how far the peak of the process rises in Sonde's third step over what it holds after two."""
    x = torch.randn(rows, d)
    step = Step(Dictionary.initialised(Design("topk", d, latents, K)), StepConfig(lr=LR))
    for _ in range(2):
        step(x[: rows // 64])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step(x)
    rise = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    print(f"  peak rises by {rise / 2**20:.0f} MiB = {rise / (4 * rows * latents):.2f} of an n x M float32 buffer")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sizes", nargs="*", default=[f"{d}x{m}" for d, m in SIZES])
    parser.add_argument("--memory", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(pairing.machine())
    for size in given.sizes:
        d, latents = map(int, size.split("x"))
        print(f"d {d}, M {latents}, N {given.rows}, k {K}", flush=True)
        if not given.memory:
            measure(given.rows, d, latents, given.rounds)
        elif len(given.sizes) == 1:
            extra_memory(given.rows, d, latents)
        else:  # a process has one peak, so each size needs its own
            subprocess.run(
                [sys.executable, __file__, "--rows", str(given.rows), "--memory", "--sizes", size], check=True
            )


if __name__ == "__main__":
    main()
