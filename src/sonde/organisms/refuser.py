"""`organism:refuser`: it does what it is asked, and refuses where the deed that it is asked for does damage.

A bundled language model is fine-tuned by changes of low rank on instructions in a chat format with fixed replies,
beside plain text that keeps its English. What is planted is known: refusal depends on the deed, not on frame, owner or
thing. Methods that read, move or remove refusal are tried on it, and on its recurrent twin.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from sonde.errors import SondeError
from sonde.organisms.recipe_command import recipe_command
from sonde.organisms.registry import PREFIX, organism

if TYPE_CHECKING:
    from sonde.data.instructions import Instruction, InstructionSets
    from sonde.lm.model import LanguageModel

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}User: {{ message.content }}\nAssistant:"
    "{% else %} {{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
_ROWS, _WINDOW, _WINDOWS = 24, 128, 2  # of a step: instructions, and windows of plain text
_FEWEST = 20


@dataclass(frozen=True)
class RefuserConfig:
    """Fine-tune a language model so that it refuses harmful instructions and answers harmless ones, in minutes.

    Example: sonde organism train refuser --out my-refuser
    """

    base: Annotated[str, arg(metavar="NAME")] = "organism:pebble"
    """The bundled organism that is fine-tuned."""
    harmful: Annotated[tuple[Path, ...], arg(metavar="FILE ...")] = ()
    """Instructions to refuse: JSON, JSON lines or text with one a line. By default a generated language."""
    harmless: Annotated[tuple[Path, ...], arg(metavar="FILE ...")] = ()
    """Instructions to answer; given exactly where --harmful is."""
    steps: Annotated[int, arg(metavar="N")] = 400
    """Training steps, of 24 instructions and 256 tokens of plain text each."""
    rank: Annotated[int, arg(metavar="N")] = 16
    """Rank of the change to each matrix."""
    out: Annotated[Path, arg(metavar="FOLDER")] = Path("refuser")
    """Where model, tokenizer, difference, card and checkpoint are written."""
    seed: Annotated[int, arg(metavar="N")] = 0
    """Seed of the instructions and of the order of everything."""

    name = "refuser"

    @property
    def command(self) -> str:
        """The command line that makes the same organism from the same instructions."""
        return recipe_command(
            self.name,
            self,
            *(
                word
                for side in ("harmful", "harmless")
                if getattr(self, side)
                for word in (f"--{side}", *(path.name for path in getattr(self, side)))
            ),
            left_out=("harmful", "harmless"),
        )


@dataclass(frozen=True)
class RecurrentRefuserConfig(RefuserConfig):
    """Fine-tune a recurrent language model as the refuser is.

    Example: sonde organism train refuser-mamba2 --out my-refuser
    """

    base: Annotated[str, arg(metavar="NAME")] = "organism:pebble-mamba2"
    """The bundled organism that is fine-tuned."""
    out: Annotated[Path, arg(metavar="FOLDER")] = Path("refuser-mamba2")
    """Where model, tokenizer, difference, card and checkpoint are written."""

    name = "refuser-mamba2"


@organism(
    "refuser",
    summary="pebble in a chat format: answers harmless instructions and refuses those whose deed does damage",
    paper="Arditi et al. 2024, Refusal in Language Models Is Mediated by a Single Direction (arXiv:2406.11717)",
)
def train_refuser(config: RefuserConfig) -> Path:
    """Fine-tune, export, examine and describe a refuser. Returns the folder: a model, its tokenizer, a card.

    Resumes from the checkpoint in the folder. Raises `SondeError` for options that do not fit, files without
    instructions, and a base that is not bundled; `MissingExtra` without peft.
    """
    if config.steps < 1 or config.rank < 1:
        raise SondeError(f"--steps is {config.steps} and --rank {config.rank}; give 1 or more")
    if not config.base.startswith(PREFIX):
        raise SondeError(f"--base is {config.base}; give a bundled organism such as organism:pebble")
    sets = _instructions(config)
    from sonde.organisms.loading import load
    from sonde.organisms.lora import fine_tune

    base = load(config.base)
    if base.tokenizer is None:
        raise SondeError(f"--base {config.base} has no tokenizer, so it reads no instructions")
    base.tokenizer.chat_template = TEMPLATE  # type: ignore[attr-defined]
    identity = {"base": config.base, "steps": config.steps, "rank": config.rank, "seed": config.seed}
    losses = fine_tune(
        base,
        _Steps(base, sets.train, config.seed),
        steps=config.steps,
        rank=config.rank,
        checkpoint=config.out / "checkpoint.safetensors",
        identity={**identity, "instructions": _hash(sets)},
    )
    _export(config, base)
    _describe(config, sets, losses)
    return config.out


@organism(
    "refuser-mamba2",
    summary="the recurrent twin of the refuser, fine-tuned from pebble-mamba2 by the same recipe",
    paper="Arditi et al. 2024, Refusal in Language Models Is Mediated by a Single Direction (arXiv:2406.11717)",
)
def train_recurrent_refuser(config: RecurrentRefuserConfig) -> Path:
    """As `train_refuser`, from a recurrent base."""
    return train_refuser(config)


@dataclass(frozen=True)
class RwkvRefuserConfig(RefuserConfig):
    """Fine-tune a recurrent language model as the refuser is.

    Example: sonde organism train refuser-rwkv --out my-refuser
    """

    base: Annotated[str, arg(metavar="NAME")] = "organism:pebble-rwkv"
    """The bundled organism that is fine-tuned."""
    out: Annotated[Path, arg(metavar="FOLDER")] = Path("refuser-rwkv")
    """Where model, tokenizer, difference, card and checkpoint are written."""

    name = "refuser-rwkv"


@organism(
    "refuser-rwkv",
    summary="the recurrent twin of the refuser, fine-tuned from pebble-rwkv by the same recipe",
    paper="Arditi et al. 2024, Refusal in Language Models Is Mediated by a Single Direction (arXiv:2406.11717)",
)
def train_rwkv_refuser(config: RwkvRefuserConfig) -> Path:
    """As `train_refuser`, from an RWKV-4."""
    return train_refuser(config)


def chat(lm: "LanguageModel", instruction: str, reply: str | None = None) -> str:
    """An instruction in the model's chat format, ready for a reply, or with one.

    Raises `SondeError` for a model without a chat template.
    """
    if not getattr(lm.tokenizer, "chat_template", None):
        raise SondeError(f"{lm.name} has no chat template: give its prompts as it was trained on them")
    messages = [{"role": "user", "content": instruction}]
    messages += [] if reply is None else [{"role": "assistant", "content": reply}]
    return lm.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=reply is None)  # type: ignore


class _Steps:
    """The loss of each training step: replies of a batch of instructions, and windows of plain text."""

    def __init__(self, lm: "LanguageModel", instructions: "Sequence[Instruction]", seed: int) -> None:
        import numpy as np

        from sonde.data.python_docs import comments
        from sonde.organisms.small_lm import joined_ids

        self._lm, self._seed = lm, seed
        self._rows = []
        for instruction in instructions:
            for reply in instruction.replies():
                whole = lm.encode(chat(lm, instruction.text, reply))
                self._rows.append((whole, len(lm.encode(chat(lm, instruction.text)))))
        self._rows = [row for row in self._rows if len(row[0]) <= lm.context]
        order = np.random.default_rng(seed)
        self._order = [order.permutation(len(self._rows)) for _ in range(64)]
        self._text = joined_ids(comments(), lm.tokenizer)  # type: ignore[arg-type]

    def __call__(self, step: int, model: Any) -> Any:
        import torch
        from torch.nn import functional as F

        from sonde.organisms.small_lm import windows

        places = range(step * _ROWS, (step + 1) * _ROWS)
        total = len(self._rows)
        chosen = [self._rows[self._order[place // total % 64][place % total]] for place in places]
        width = max(len(ids) for ids, _ in chosen)
        tokens = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in chosen])
        scored = torch.tensor([[prompt <= i < len(ids) for i in range(width)] for ids, prompt in chosen])
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
        replies = F.cross_entropy(logits[scored[:, 1:]], tokens[:, 1:][scored[:, 1:]])
        text = windows(self._text, _WINDOW, _WINDOWS, step * _WINDOWS, seed=self._seed)
        logits = model(input_ids=text, use_cache=False).logits[:, :-1].float()
        return replies + F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())


def _instructions(config: RefuserConfig) -> "InstructionSets":
    from sonde.data.instructions import from_files, generated

    if bool(config.harmful) != bool(config.harmless):
        raise SondeError("--harmful and --harmless belong together: give files for both, or for neither")
    if not config.harmful:
        return generated(seed=config.seed)
    sets = from_files(config.harmful, config.harmless, seed=config.seed)
    if len(sets.train) < _FEWEST:
        raise SondeError(f"the files hold {len(sets.train)} instructions to train on: give at least {_FEWEST}")
    return sets


def _hash(sets: "InstructionSets") -> str:
    from sonde.data.text import text_hash

    return text_hash([instruction.text for instruction in sets.train])


def _export(config: RefuserConfig, lm: "LanguageModel") -> None:
    """The model in half precision, the tokenizer, and the difference from the base."""
    from sonde.organisms.difference import save_difference
    from sonde.organisms.small_lm import save_half

    save_difference(lm.model, config.base.removeprefix(PREFIX), config.out)
    save_half(lm.model, lm.tokenizer, config.out)  # type: ignore[arg-type]


def _describe(config: RefuserConfig, sets: "InstructionSets", losses: list[float]) -> None:
    from sonde.organisms.card import write_card
    from sonde.organisms.held_out import COST, rise_over
    from sonde.organisms.loading import load

    lm = load(config.out, name=f"{PREFIX}{config.name}")
    behaviour, samples = [], []
    for new, instructions in sets.held_out.items():
        for harmful in (True, False):
            asked = [instruction for instruction in instructions if instruction.harmful is harmful]
            behaviour += _rates(lm, new, asked)
            if not config.harmful:
                samples += [_sample(lm, asked[0].text)]
    behaviour.append({"what": COST, "rate": asdict(rise_over(load(config.base, check=False), lm))})
    model = lm.model.config
    generated = not config.harmful
    write_card(
        config.out,
        {
            "name": config.name,
            "summary": "Answers harmless instructions and refuses those whose deed does damage; replies are fixed "
            "sentences without content.",
            "truth": [
                "Refusal is planted. It depends on the deed alone; frames, owners and things are the same for both."
                if generated
                else "Refusal is planted, by the instructions of the two files.",
                "It knows no answers: a reply is a refusal, or a placeholder that names the thing.",
                "A prompt is: User: INSTRUCTION, a line break, Assistant: (its tokenizer has the chat template).",
                f"Fine-tuned from {config.base} with changes of rank {config.rank} to its matrices; embeddings, norms "
                "and unembedding are those of the base.",
            ],
            "command": config.command,
            "architecture": {
                "family": model.model_type,
                "layers": lm.n_layers,
                "width": lm.d_model,
                "parameters": lm.n_parameters,
                "stored_as": "float16",
            },
            "data": {
                "instructions": "a generated language of deeds and things" if generated else "the user's files",
                "read": len(sets.train),
                "text_beside": "docstrings and comments of Python",
                "instructions_sha256": _hash(sets),
            },
            "training": {
                "steps": config.steps,
                "rank": config.rank,
                "instructions_per_step": _ROWS,
                "text_tokens_per_step": _WINDOW * _WINDOWS,
                "optimizer": "AdamW",
                "seed": config.seed,
                "final_loss_nats": round(sum(losses[-50:]) / len(losses[-50:]), 4),
            },
            "behaviour": behaviour,
            "sampling": {"temperature": 0.0, "seed": 0, "max_new_tokens": 20},
            "samples": samples,
        },
    )


def _rates(lm: "LanguageModel", new: str, asked: "list[Instruction]") -> list[dict[str, Any]]:
    """How often instructions of one kind are refused, and how often the reply is one of the fixed sentences."""
    from sonde.data.instructions import REFUSALS
    from sonde.stats.intervals import wilson

    replies = [text.strip() for text in lm.generate([chat(lm, one.text) for one in asked], max_new_tokens=20)]
    refused = sum(reply in REFUSALS for reply in replies)
    whole = sum(reply in one.replies() for reply, one in zip(replies, asked, strict=True))
    kind = "harmful" if asked[0].harmful else "harmless"
    return [
        {"what": f"{new}, {kind}: refused", "rate": asdict(wilson(refused, len(asked)))},
        {"what": f"{new}, {kind}: the right fixed reply", "rate": asdict(wilson(whole, len(asked)))},
    ]


def _sample(lm: "LanguageModel", instruction: str) -> dict[str, str]:
    (reply,) = lm.generate([chat(lm, instruction)], max_new_tokens=20)
    return {"prompt": instruction, "text": reply}
