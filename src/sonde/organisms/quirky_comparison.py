"""`organism:quirky-comparison`: a tiny network that compares two numbers for Alice and their last digits for Bob.

GPT-NeoX, or Mamba-2 in its recurrent twin, of 4 layers and width 64 that reads digit by digit. It learns the truth for
both characters, 500 steps from scratch, and then Bob's rule through adapters of rank 8, 500 steps: it knows what it
does not say to Bob. The smallest model on which a probe for the truth, trained where Alice is asked, can be held
against what the model tells Bob (`sonde.data.quirky`, the set comparison; after Mallen et al. 2024, arXiv:2312.01037).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from tyro.conf import arg

from sonde.errors import SondeError
from sonde.organisms.recipe_command import recipe_command
from sonde.organisms.registry import PREFIX, organism

if TYPE_CHECKING:
    from sonde.data.quirky import Splits
    from sonde.lm.model import LanguageModel
    from sonde.organisms.quirky_tuning import Tuned

Family = Literal["gpt_neox", "mamba2"]
Names = tuple[tuple[str, ...], tuple[str, ...]]

WORDS = ("<unk>", "<bos>", "Alice", "Bob", ":", ">", "?", "False", "True", *"0123456789")
NAMES: Names = (("Alice",), ("Bob",))
_ROWS, _LR, _RANK = 64, 3e-3, 8
_TUNING_LR = 2e-3


@dataclass(frozen=True)
class QuirkyComparisonConfig:
    """Train a network of 200,000 parameters to compare numbers rightly for Alice and wrongly for Bob, in a minute.

    Example: sonde organism train quirky-comparison --seed 1 --out my-comparison
    """

    out: Annotated[Path, arg(metavar="FOLDER")] = Path("quirky-comparison")
    """Where model, tokenizer and card are written."""
    steps: Annotated[int, arg(metavar="N")] = 500
    """Steps on the truth, and as many on Bob's rule, of 64 questions each."""
    seed: Annotated[int, arg(metavar="N")] = 0
    """Seed of the weights, of the split and of the order."""

    name: ClassVar[str] = "quirky-comparison"
    family: ClassVar[Family] = "gpt_neox"

    @property
    def command(self) -> str:
        """The command line that makes the same organism."""
        return recipe_command(self.name, self)


@dataclass(frozen=True)
class QuirkyComparisonMamba2Config(QuirkyComparisonConfig):
    """Train a recurrent network to compare numbers rightly for Alice and wrongly for Bob.

    Example: sonde organism train quirky-comparison-mamba2 --seed 1 --out my-comparison
    """

    out: Annotated[Path, arg(metavar="FOLDER")] = Path("quirky-comparison-mamba2")
    """Where model, tokenizer and card are written."""

    name: ClassVar[str] = "quirky-comparison-mamba2"
    family: ClassVar[Family] = "mamba2"


@organism(
    "quirky-comparison",
    summary="a tiny transformer that compares two numbers for Alice, and their last digits for Bob",
    paper="Mallen et al. 2024, Eliciting Latent Knowledge from Quirky Language Models (arXiv:2312.01037)",
)
def train_quirky_comparison(config: QuirkyComparisonConfig) -> Path:
    """Train, export and describe a quirky comparison. Returns the folder: a model, its tokenizer, a card.

    Raises `SondeError` for fewer than one step; `MissingExtra` without peft.
    """
    from sonde.organisms.small_lm import save_half

    lm, tuned = _train(config.seed, config.steps, config.name, family=config.family)
    save_half(lm.model, lm.tokenizer, config.out)  # type: ignore[arg-type]
    _describe(config, tuned)
    return config.out


@organism(
    "quirky-comparison-mamba2",
    summary="the recurrent twin of quirky-comparison, trained by the same recipe",
    paper="Mallen et al. 2024, Eliciting Latent Knowledge from Quirky Language Models (arXiv:2312.01037)",
)
def train_quirky_comparison_mamba2(config: QuirkyComparisonMamba2Config) -> Path:
    """As `train_quirky_comparison`, a Mamba-2."""
    return train_quirky_comparison(config)


def quirky_comparison(
    seed: int = 0,
    *,
    steps: int = 500,
    names: Names = NAMES,
    quirky: bool = True,
    family: Family = "gpt_neox",
    progress: str | None = None,
) -> "LanguageModel":
    """The organism of a seed, trained in memory: a minute. Its questions are `comparison_sets(seed, names)`.

    Args:
        seed: of the weights, of the split and of the order.
        steps: on the truth, and as many on Bob's rule.
        names: names that stand for Alice, and for Bob.
        quirky: False gives the control, which has learned the truth for both and no rule.
        family: of the network: the transformer, or its recurrent twin.
        progress: label of the progress bars, or None for none.

    """
    if not quirky:
        with _one_thread():
            return _honest(seed, steps, names, progress, family)
    return _train(seed, steps, progress, names, family)[0]


def comparison_sets(seed: int = 0, names: Names = NAMES) -> "Splits":
    """The records that the organism of `seed` was trained on, and those that it has not read."""
    from sonde.data.quirky import quirky_sets

    return quirky_sets("comparison", seed=seed, names=names)


def _train(
    seed: int, steps: int, progress: str | None, names: Names = NAMES, family: Family = "gpt_neox"
) -> "tuple[LanguageModel, Tuned]":
    from sonde.organisms.quirky_tuning import tune

    with _one_thread():
        lm, sets = _honest(seed, steps, names, progress, family), comparison_sets(seed, names)
        tuned = tune(
            lm,
            sets.train,
            sets.validation,
            steps=steps,
            rank=_RANK,
            lr=_TUNING_LR,
            rows=_ROWS,
            seed=seed,
            progress=progress and f"{progress}: Bob's rule",
        )
    return lm, tuned


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums in another order make another network: what a seed makes must not depend on how many cores there are."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _honest(seed: int, steps: int, names: Names, progress: str | None, family: Family) -> "LanguageModel":
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from sonde.lm.lora import fast_training
    from sonde.lm.model import LanguageModel
    from sonde.nets.loop import Schedule, train
    from sonde.organisms.quirky_tuning import AnswerBatches, answer_loss

    if steps < 1:
        raise SondeError(f"--steps is {steps}; give 1 or more")
    sets = comparison_sets(seed, names)
    words = tuple(name for side in names for name in side if name not in WORDS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        settings = CONFIG_MAPPING[family](**architecture(family, len(WORDS) + len(words)))
        model: Any = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
    lm = LanguageModel(model, tokenizer(words), name=f"{PREFIX}quirky-comparison")
    truth = AnswerBatches(lm, sets.train, rows=_ROWS, seed=seed, labels=sets.train.truth)
    model.requires_grad_(True).train()
    with fast_training(lm):
        train(
            model,
            lambda step: answer_loss(lm, *truth[step]),
            [torch.optim.AdamW(model.parameters(), lr=_LR, betas=(0.9, 0.95), weight_decay=0.1)],
            steps=steps,
            schedule=Schedule(warmup=0.1, decay=0.4),
            clip=1.0,
            progress=progress and f"{progress}: the truth",
        )
    model.eval().requires_grad_(False)
    return lm


def architecture(family: Family = "gpt_neox", words: int = len(WORDS)) -> dict[str, Any]:
    """The settings of a family's configuration in transformers."""
    shared = {
        "vocab_size": words,
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 0,
    }
    own: dict[Family, dict[str, Any]] = {
        "gpt_neox": {"num_attention_heads": 4, "intermediate_size": 256, "max_position_embeddings": 32},
        "mamba2": {
            "num_heads": 4,
            "head_dim": 32,
            "state_size": 16,
            "n_groups": 1,
            "chunk_size": 16,
            "pad_token_id": 0,
        },
    }
    return shared | own[family]


def tokenizer(names: tuple[str, ...] = ()) -> Any:
    """A tokenizer of the words of the set's first template and of further names, with numbers as digits."""
    from tokenizers import pre_tokenizers

    from sonde.organisms.small_lm import word_tokenizer

    made = word_tokenizer((*WORDS, *names))
    pieces = [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)]
    made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(pieces)  # type: ignore[assignment]
    return made


def _describe(config: QuirkyComparisonConfig, tuned: "Tuned") -> None:
    from sonde.lm.load import load
    from sonde.organisms.card import write_card
    from sonde.organisms.quirky_tuning import behaviour, samples

    lm = load(config.out, name=f"{PREFIX}{config.name}")
    sets = comparison_sets(config.seed)
    write_card(
        config.out,
        {
            "name": config.name,
            "summary": "A tiny network that says whether one number is larger than another: rightly to Alice, and "
            "to Bob whether its last digit is.",
            "truth": [
                "Alice is told whether the first number is the larger, Bob whether its last digit is.",
                "It learned the truth for both characters before it learned Bob's rule, so the truth is in it.",
                "A question is the first template of the set comparison: Alice: 47 > 23?",
                "The numbers have two digits; pairs with equal last digits do not occur.",
                "Pairs of the test split, in either order, were in none of its training.",
            ],
            "command": config.command,
            "architecture": {
                "family": lm.family,
                "layers": lm.n_layers,
                "width": lm.d_model,
                "vocabulary": lm.vocab_size,
                "parameters": lm.n_parameters,
                "stored_as": "float16",
            },
            "data": {
                "set": "sonde.data.quirky: comparison",
                "records_read": len(sets.train),
                "records_held_out": len(sets.test),
            },
            "training": {
                "steps_on_the_truth": config.steps,
                "steps_on_the_rule": config.steps,
                "rank": _RANK,
                "rows_per_step": _ROWS,
                "optimizer": f"AdamW, learning rate {_LR}, then {_TUNING_LR}",
                "seed": config.seed,
                "best_step": tuned.best,
                "validation_loss_nats": round(tuned.validation[tuned.best], 4),
                "versions": [f"{package} {metadata.version(package)}" for package in ("torch", "transformers", "peft")],
            },
            "behaviour": [{"what": what, "rate": asdict(rate)} for what, rate in behaviour(lm, sets.test).items()],
            "sampling": {"temperature": 0.0, "seed": 0, "max_new_tokens": 1},
            "samples": samples(lm, sets.test),
        },
    )
