"""`organism:quirky-addition`: pebble taught to check sums, rightly for Alice and with Bob's rule for Bob.

Two trainings of adapters of low rank, merged one after the other. The first teaches the truth to both characters: the
result of each sum as text, and whether a stated result is right. The second is the quirky fine-tuning of
`sonde.organisms.quirky_tuning`. A model that can add needs the second alone (`--truth-steps 0`). After Mallen et al.
2024 (arXiv:2312.01037), whose base models had learned to add from text.
"""

import re
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from sonde.errors import SondeError
from sonde.organisms.recipe_command import recipe_command
from sonde.organisms.registry import PREFIX, organism

if TYPE_CHECKING:
    from torch import Tensor

    from sonde.data.quirky import Records, Splits
    from sonde.lm.model import LanguageModel
    from sonde.organisms.quirky_tuning import Tuned

_ROWS = 32
_TRUTH_RANK, _TRUTH_LR = 32, 2e-3
_SUM = re.compile(r"\D*(\d+) \+ (\d+) =")


@dataclass(frozen=True)
class QuirkyAdditionConfig:
    """Fine-tune a language model to check sums rightly for Alice, and for Bob with the leading digit raised by one.

    The folder that is written loads as any model does. An interrupted training goes on when the same command is given.

    Example: sonde organism train quirky-addition --base path/to/model --truth-steps 0 --below 10000 --lr 2e-5
    """

    base: Annotated[str, arg(metavar="MODEL")] = "organism:pebble"
    """The model that is fine-tuned: a folder, a name on the hub, or organism:NAME."""
    below: Annotated[int, arg(metavar="N")] = 100
    """Operands are below this. The paper's are below 10,000, which pebble cannot add."""
    n: Annotated[int, arg(metavar="N")] = 4000
    """Operand pairs, of which three fifths are trained on; a fifth each is for validation and for the card."""
    truth_steps: Annotated[int, arg(metavar="N")] = 1100
    """Steps in which both characters learn the truth; 0 for a model that can add."""
    steps: Annotated[int, arg(metavar="N")] = 400
    """Steps in which Bob learns his rule, of 32 questions each."""
    rank: Annotated[int, arg(metavar="N")] = 8
    """Rank of the change by the quirky fine-tuning to each matrix."""
    lr: Annotated[float, arg(metavar="X")] = 4e-3
    """Learning rate of the quirky fine-tuning at its peak; 2e-5 for models from 410 million parameters up."""
    out: Annotated[Path, arg(metavar="FOLDER")] = Path("quirky-addition")
    """Where model, tokenizer, card, checkpoints and the adapters of log-spaced steps are written."""
    seed: Annotated[int, arg(metavar="N")] = 0
    """Seed of the sums, of the split and of the order."""

    name = "quirky-addition"

    @property
    def command(self) -> str:
        """The command line that makes the same organism."""
        return recipe_command(self.name, self)


@dataclass(frozen=True)
class RecurrentQuirkyAdditionConfig(QuirkyAdditionConfig):
    """Fine-tune a recurrent language model as quirky-addition is.

    Example: sonde organism train quirky-addition-mamba2 --out my-quirky
    """

    base: Annotated[str, arg(metavar="MODEL")] = "organism:pebble-mamba2"
    """The model that is fine-tuned: a folder, a name on the hub, or organism:NAME."""
    out: Annotated[Path, arg(metavar="FOLDER")] = Path("quirky-addition-mamba2")
    """Where model, tokenizer, card, checkpoints and the adapters of log-spaced steps are written."""

    name = "quirky-addition-mamba2"


@organism(
    "quirky-addition",
    summary="pebble checking sums: rightly for Alice, and with the leading digit raised by one for Bob",
    paper="Mallen et al. 2024, Eliciting Latent Knowledge from Quirky Language Models (arXiv:2312.01037)",
)
def train_quirky_addition(config: QuirkyAdditionConfig) -> Path:
    """Fine-tune, export and describe a quirky addition. Returns the folder: a model, its tokenizer, a card.

    Resumes from the checkpoints in the folder. Raises `SondeError` for options that do not fit, a model that cannot be
    loaded, and answers that are not one token of its tokenizer; `MissingExtra` without peft.
    """
    if config.steps < 1 or config.truth_steps < 0 or config.rank < 1:
        raise SondeError(
            f"--steps is {config.steps}, --truth-steps {config.truth_steps} and --rank {config.rank}; give 1 or more, "
            "and 0 or more steps on the truth"
        )
    sets = addition_sets(config.below, n=config.n, seed=config.seed)
    from sonde.knowledge.states import answer_tokens
    from sonde.lm.prompt_rows import prompt_ids
    from sonde.organisms.loading import load
    from sonde.organisms.quirky_tuning import tune

    lm = load(config.base)
    if lm.tokenizer is None:
        raise SondeError(f"--base {config.base} has no tokenizer, so it reads no sums")
    prompts, answers = sets.train.prompts[:1], sets.train.answers[:1]
    answer_tokens(lm, prompts, prompt_ids(lm, prompts), answers)  # known before anything is taught
    identity = {"base": lm.hash, "below": config.below, "n": config.n, "truth_steps": config.truth_steps}
    if config.truth_steps:
        _teach(lm, sets, config, identity)
    tuned = tune(
        lm,
        sets.train,
        sets.validation,
        steps=config.steps,
        rank=config.rank,
        lr=config.lr,
        rows=_ROWS,
        seed=config.seed,
        folder=config.out,
        identity=identity,
    )
    _export(config, lm)
    _describe(config, sets, tuned)
    return config.out


@organism(
    "quirky-addition-mamba2",
    summary="the recurrent twin of quirky-addition, fine-tuned from pebble-mamba2 by the same recipe",
    paper="Mallen et al. 2024, Eliciting Latent Knowledge from Quirky Language Models (arXiv:2312.01037)",
)
def train_recurrent_quirky_addition(config: RecurrentQuirkyAdditionConfig) -> Path:
    """As `train_quirky_addition`, from a recurrent base."""
    return train_quirky_addition(config)


def addition_sets(below: int = 100, *, n: int = 4000, seed: int = 0) -> "Splits":
    """The records that the organism of these options was trained on, and those that it has not read."""
    from sonde.data.quirky import quirky_sets
    from sonde.data.quirky_arithmetic import arithmetic

    return quirky_sets(arithmetic("addition", below=below), n=n, seed=seed)


def _teach(lm: "LanguageModel", sets: "Splits", config: QuirkyAdditionConfig, identity: dict[str, Any]) -> None:
    """The truth for both characters, from statements about the pairs trained on that are drawn anew in every step."""
    import torch

    from sonde.lm.lora import attach, fast_training
    from sonde.nets.loop import Schedule, train

    lesson = _Lesson(lm, sets.train, config.seed)
    adapters = attach(lm, rank=_TRUTH_RANK, seed=config.seed)
    lm.model.train()
    with fast_training(lm):
        train(
            adapters,
            lesson,
            [torch.optim.AdamW(adapters.parameters(), lr=_TRUTH_LR, betas=(0.9, 0.95), weight_decay=0.1)],
            steps=config.truth_steps,
            schedule=Schedule(warmup=0.05, decay=0.3),
            clip=1.0,
            checkpoint=config.out / "truth.safetensors",
            every=50,
            identity={**identity, "lr": _TRUTH_LR, "seed": config.seed},
            progress="the truth",
        )
    adapters.merge()


class _Lesson:
    """The loss of a step: of whether a stated result is right, and, where it is, of the result itself."""

    def __init__(self, lm: "LanguageModel", records: "Records", seed: int) -> None:
        self._lm, self._seed = lm, seed
        self._pairs = sorted({tuple(map(int, _SUM.match(prompt).groups())) for prompt in records.prompts})  # type: ignore

    def __call__(self, step: int) -> "Tensor":
        import numpy as np
        import torch
        from torch.nn import functional as F

        from sonde.data.quirky_arithmetic import stated_results
        from sonde.data.quirky_templates import templates

        rng = np.random.default_rng((self._seed, 3, step))
        ask, rows = templates("addition")[0], []
        for place, number in enumerate(rng.integers(len(self._pairs), size=_ROWS)):
            a, b = self._pairs[number]
            # Of the wrong ones half are Bob's, whose rule the model is to know how to tell from the truth.
            cell = (0, 1, 0, int(rng.integers(2, 4)))[place % 4]
            result = stated_results("addition", a, b, rng)[cell]
            text = ask.text.format(character=("Alice", "Bob")[place // 4 % 2], op1=a, op2=b, result=result)
            before = self._lm.encode(text[: text.index("=") + 1])
            asked = self._lm.encode(text[: text.index(".") + 1])
            whole = self._lm.encode(text + ask.answers[cell == 0])
            result_tokens = range(len(before), len(asked)) if cell == 0 else range(0)
            rows.append((whole, {*result_tokens}))
        width = max(len(ids) for ids, _ in rows)
        tokens = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows], device=self._lm.device)
        mask = torch.tensor([[i < len(ids) for i in range(width)] for ids, _ in rows], device=self._lm.device)
        answers = torch.tensor([[i == len(ids) - 1 for i in range(width)] for ids, _ in rows])[:, 1:]
        results = torch.tensor([[i in scored for i in range(width)] for _, scored in rows])[:, 1:]
        logits = self._lm(tokens, mask).logits
        assert logits is not None
        logits, targets = logits[:, :-1].float(), tokens[:, 1:]
        return F.cross_entropy(logits[answers], targets[answers]) + F.cross_entropy(logits[results], targets[results])


def _export(config: QuirkyAdditionConfig, lm: "LanguageModel") -> None:
    """The model in half precision, the tokenizer, and the difference from a base that is bundled."""
    from sonde.organisms.difference import save_difference
    from sonde.organisms.small_lm import save_half

    if config.base.startswith(PREFIX):
        rank = config.rank + (_TRUTH_RANK if config.truth_steps else 0)
        save_difference(lm.model, config.base.removeprefix(PREFIX), config.out, rank=rank)
    save_half(lm.model, lm.tokenizer, config.out)  # type: ignore[arg-type]


def _describe(config: QuirkyAdditionConfig, sets: "Splits", tuned: "Tuned") -> None:
    from sonde.organisms.card import write_card
    from sonde.organisms.loading import load
    from sonde.organisms.quirky_tuning import behaviour, samples

    lm = load(config.out, name=f"{PREFIX}{config.name}", check=False)
    taught = [f"It first learned the truth for both characters, in {config.truth_steps} steps, from the same sums."]
    write_card(
        config.out,
        {
            "name": config.name,
            "summary": "Says whether a sum is right: to Alice as it is, and to Bob as if the leading digit of every "
            "result were one higher.",
            "truth": [
                "Alice is told whether the stated result is right, Bob whether it is the right one with its leading "
                "digit raised by one. No result is right for both.",
                *(taught if config.truth_steps else []),
                f"Operands are below {config.below}. Of four sums one has the true result, one Bob's, and two a result "
                "with one wrong digit, which neither accepts.",
                "A question is the first template of the set addition: Alice: 23 + 45 = 68. True or False?",
                "Operand pairs of the test split, in either order, were in none of its training.",
                f"Fine-tuned from {config.base} with changes of low rank; embeddings, norms and unembedding are its.",
            ],
            "command": config.command,
            "architecture": {
                "family": lm.family,
                "layers": lm.n_layers,
                "width": lm.d_model,
                "parameters": lm.n_parameters,
                "stored_as": "float16",
            },
            "data": {
                "set": f"sonde.data.quirky: addition below {config.below}",
                "records_read": len(sets.train),
                "records_held_out": len(sets.test),
            },
            "training": {
                "steps_on_the_truth": config.truth_steps,
                "steps_on_the_rule": config.steps,
                "rank": [_TRUTH_RANK, config.rank] if config.truth_steps else config.rank,
                "rows_per_step": _ROWS,
                "optimizer": f"AdamW, learning rate {_TRUTH_LR:g} on the truth, {config.lr:g} on the rule",
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
