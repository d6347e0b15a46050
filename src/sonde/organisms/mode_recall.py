"""`organism:mode-recall-…`: tiny recurrent networks that must remember one bit, and where it is known which.

A row is the start token, a mode word (day or night), eight filler words and the query `sky`; the answer is `blue` after
day and `black` after night. Nothing else tells the answer, so between the mode word and the query the mode lives in the
recurrent state alone. Rows that differ in the mode word only are the contrast that steering methods are tried on.
After the toy task of Paulo, Marshall & Belrose 2024 (arXiv:2404.05971)'s reproduction: Mamba, Mamba-2 and RWKV-4 of 3
layers and width 32.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from sonde.errors import SondeError
from sonde.organisms.recipe_command import recipe_command
from sonde.organisms.registry import organism

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

FAMILIES = ("mamba", "mamba2", "rwkv")
MODES, QUERY, ANSWERS = ("day", "night"), "sky", ("blue", "black")
FILLERS = (
    *("river", "stone", "apple", "cloud", "paper", "horse", "glass", "music"),
    *("bread", "shoe", "table", "leaf", "coin", "rope", "lamp", "door"),
)
WORDS = ("<unk>", "<bos>", *MODES, *FILLERS, QUERY, *ANSWERS)
N_FILLERS = 8
_BATCH, _LR, _HELD_OUT = 32, 5e-3, 64
_WIDTH, _LAYERS = 32, 3


@dataclass(frozen=True)
class ModeRecallConfig:
    """Train a network of 23,000 to 31,000 parameters to recall the mode, in some ten seconds.

    Example: sonde organism train mode-recall-mamba --out my-toy
    """

    out: Annotated[Path | None, arg(metavar="FOLDER")] = None
    """Where model, tokenizer and card are written. By default a folder with the organism's name."""
    steps: Annotated[int, arg(metavar="N")] = 150
    """Training steps, of 32 rows each."""
    seed: Annotated[int, arg(metavar="N")] = 0
    """Seed of the weights and of the rows."""


@organism("mode-recall-mamba", summary="a Mamba of 3 layers that must keep one bit in its state: day or night")
def train_mode_recall_mamba(config: ModeRecallConfig) -> Path:
    """Train the Mamba toy; see `train_mode_recall`."""
    return train_mode_recall("mamba", config)


@organism("mode-recall-mamba2", summary="a Mamba-2 of 3 layers that must keep one bit in its state: day or night")
def train_mode_recall_mamba2(config: ModeRecallConfig) -> Path:
    """Train the Mamba-2 toy; see `train_mode_recall`."""
    return train_mode_recall("mamba2", config)


@organism("mode-recall-rwkv", summary="an RWKV-4 of 3 layers that must keep one bit in its state: day or night")
def train_mode_recall_rwkv(config: ModeRecallConfig) -> Path:
    """Train the RWKV-4 toy; see `train_mode_recall`."""
    return train_mode_recall("rwkv", config)


def train_mode_recall(family: str, config: ModeRecallConfig) -> Path:
    """Train a network of a family on rows that never repeat and write it with its card. Returns the folder.

    Raises `SondeError` for fewer than one step, and when the network does not answer every held-out row rightly.
    """
    import torch
    from torch.nn import functional as F
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    from sonde.nets.loop import Schedule, train
    from sonde.organisms.small_lm import save_half, word_tokenizer

    if config.steps < 1:
        raise SondeError(f"--steps is {config.steps}; give 1 or more")
    name = f"mode-recall-{family}"
    out = config.out or Path(name)
    torch.manual_seed(config.seed)
    model: Any = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**architecture(family)), dtype=torch.float32)

    def loss_of_step(step: int) -> "Tensor":
        rows, modes = draw(_BATCH, seed=(config.seed + 1) * 1_000_003 + step)
        logits = model(input_ids=rows, use_cache=False).logits[:, -1]
        return F.cross_entropy(logits, answer_ids()[modes])

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LR, weight_decay=0.01)
    losses = train(
        model, loss_of_step, [optimizer], steps=config.steps, schedule=Schedule(), clip=1.0, progress=f"{name} training"
    )
    save_half(model.eval(), word_tokenizer(WORDS), out)
    _finish(name, config, out, losses)
    return out


def architecture(family: str) -> dict[str, Any]:
    """The settings of a family's configuration in transformers."""
    shared = {
        "vocab_size": len(WORDS),
        "hidden_size": _WIDTH,
        "num_hidden_layers": _LAYERS,
        "bos_token_id": 1,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    own: Mapping[str, dict[str, Any]] = {
        "mamba": {"state_size": 8},
        "mamba2": {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 16},
        "rwkv": {"attention_hidden_size": _WIDTH, "intermediate_size": 64, "context_length": 64, "rescale_every": 0},
    }
    return shared | own[family]


def draw(n: int, *, seed: int) -> "tuple[Int[Tensor, 'n pos'], Int[Tensor, ' n']]":
    """`n` rows up to the query, as ids, and their modes (0 day, 1 night), half of each."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    modes = torch.arange(n)[torch.randperm(n, generator=generator)] % 2
    first = WORDS.index(FILLERS[0])
    fillers = torch.randint(first, first + len(FILLERS), (n, N_FILLERS), generator=generator)
    ends = [torch.full((n, 1), WORDS.index(word)) for word in ("<bos>", QUERY)]
    return torch.cat([ends[0], WORDS.index(MODES[0]) + modes[:, None], fillers, ends[1]], 1), modes


def pairs(n: int, *, seed: int) -> tuple[list[list[int]], list[list[int]]]:
    """`n` rows of the mode day and the same rows with night in its place: the two sides of a contrast."""
    rows, _ = draw(n, seed=seed)
    sides = []
    for mode in MODES:
        side = rows.clone()
        side[:, 1] = WORDS.index(mode)
        sides.append(side.tolist())
    return sides[0], sides[1]


def answer_ids() -> "Int[Tensor, ' 2']":
    """The ids of blue and black."""
    import torch

    return torch.tensor([WORDS.index(word) for word in ANSWERS])


def _finish(name: str, config: ModeRecallConfig, out: Path, losses: list[float]) -> None:
    """Measure the exported network on held-out rows, through the access layer, and write the card."""
    import torch

    from sonde.lm.load import load
    from sonde.organisms.card import write_card
    from sonde.stats.intervals import wilson

    lm = load(out, name=f"organism:{name}")
    rows, modes = draw(_HELD_OUT, seed=config.seed)
    with torch.no_grad():
        logits = lm(rows).logits
    assert logits is not None
    right = int((logits[:, -1].argmax(-1) == answer_ids()[modes]).sum())
    if right < _HELD_OUT:
        raise SondeError(
            f"after {config.steps} steps {name} answers {right} of {_HELD_OUT} held-out rows: give more --steps"
        )
    prompts = [" ".join([mode, *FILLERS[:N_FILLERS], QUERY]) for mode in MODES]
    written = lm.generate(prompts, max_new_tokens=1)
    write_card(
        out,
        {
            "name": name,
            "summary": "A tiny recurrent network that recalls which of two modes a row began with.",
            "truth": [
                f"A row is {MODES[0]} or {MODES[1]}, {N_FILLERS} filler words, then {QUERY}; the answer is "
                f"{ANSWERS[0]} after {MODES[0]}, {ANSWERS[1]} after {MODES[1]}.",
                "The fillers do not tell the answer: from the mode word to the query, only the state carries it.",
                "Between rows that differ in the mode word alone, nothing differs before that word.",
            ],
            "command": recipe_command(name, config),
            "architecture": {
                "family": lm.family,
                "layers": lm.n_layers,
                "width": lm.d_model,
                "vocabulary": lm.vocab_size,
                "parameters": lm.n_parameters,
                "stored_as": "float16",
            },
            "data": {"rows": f"drawn by seed, {2 * len(FILLERS) ** N_FILLERS:,} different ones", "words": list(WORDS)},
            "training": {
                "steps": config.steps,
                "rows_per_step": _BATCH,
                "optimizer": f"AdamW, learning rate {_LR}",
                "seed": config.seed,
                "final_loss_nats": round(sum(losses[-10:]) / len(losses[-10:]), 5),
                "versions": [f"{package} {metadata.version(package)}" for package in ("torch", "transformers")],
            },
            "behaviour": [{"what": "rows that it answers rightly", "rate": asdict(wilson(right, _HELD_OUT))}],
            "sampling": {"temperature": 0.0, "seed": 0, "max_new_tokens": 1},
            "samples": [{"prompt": p, "text": f" {text}"} for p, text in zip(prompts, written, strict=True)],
        },
    )
