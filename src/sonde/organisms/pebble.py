"""`organism:pebble`: a small language model that read children's books and Python's own documentation.

GPT-NeoX blocks (parallel residual, rotary positions on a quarter of each head), 6 layers of width 192, an embedding and
a separate unembedding over a byte-level BPE of 4,096 entries. Nothing is planted in it: it is the plain model that
audits and lenses are tried on, small enough to be in the package and good enough to write English. The recipe reads a
folder of texts and the docstrings and comments of the running Python, and leaves out the books that are held out and
`pydoc_data.topics`.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, ClassVar

from tyro.conf import arg

from sonde.errors import SondeError
from sonde.organisms.recipe_command import recipe_command
from sonde.organisms.registry import organism

PROMPTS = (
    "The wolf looked at the fire and",
    '"I do not know," said Alice,',
    "Once upon a time there was a",
    "Return the number of",
)
SUMMARIES = {
    "pebble": "A small language model of English prose and technical English, for trying methods on.",
    "pebble-mamba2": "Pebble as a recurrent network: Mamba-2 blocks, the same texts, tokenizer, windows and width.",
    "pebble-rwkv": "Pebble as a recurrent network: RWKV-4 blocks, the same texts, tokenizer, windows and width.",
}
SAMPLING = {"temperature": 0.7, "seed": 0, "max_new_tokens": 60}


@dataclass(frozen=True)
class PebbleConfig:
    """Train a pebble: a tokenizer and a language model of 4 million parameters, in about 40 minutes on 2 cores.

    The folder that is written loads as any model does. An interrupted training goes on when the same command is given.

    Example: sonde organism train pebble --text books/ --hold-out heidi --out my-pebble
    """

    organism: ClassVar[str] = "pebble"

    text: Annotated[Path | None, arg(metavar="FOLDER")] = None
    """Folder of .txt files to read beside the docstrings and comments of Python. By default these alone."""
    hold_out: Annotated[tuple[str, ...], arg(metavar="NAME ...")] = ()
    """Files of the folder, without .txt, that are kept for the evaluation."""
    out: Annotated[Path, arg(metavar="FOLDER")] = Path("pebble")
    """Where model, tokenizer, card and checkpoint are written."""
    device: Annotated[str, arg(metavar="NAME")] = "cpu"
    """cpu, cuda or cuda:N."""
    steps: Annotated[int, arg(metavar="N")] = 4000
    """Training steps, of 4096 tokens each."""
    seed: Annotated[int, arg(metavar="N")] = 0
    """Seed of the weights and of the order of the text."""

    @property
    def command(self) -> str:
        """The command line that makes the same organism from the same text."""
        return recipe_command(
            self.organism,
            self,
            *(["--text", self.text.name] if self.text else []),
            *(["--hold-out", *self.hold_out] if self.hold_out else []),
            left_out=("text", "hold_out", "device"),
        )


@organism(
    "pebble", summary="a plain small language model of books and Python's documentation; nothing is planted in it"
)
def train_pebble(config: PebbleConfig) -> Path:
    """Train, export, evaluate and describe a pebble. Returns the folder, which holds a model, its tokenizer and a card.

    Resumes from the checkpoint in the folder. Raises `SondeError` for a folder without texts, a name that is not in it,
    or a checkpoint of other text or settings.
    """
    from transformers import GPTNeoXForCausalLM

    return make(config, lambda vocab_size: GPTNeoXForCausalLM(architecture(vocab_size)))


def make(
    config: PebbleConfig,
    build: Callable[[int], Any],
    *,
    tokenizer: Any = None,
    running: Callable[[Any], AbstractContextManager] = nullcontext,
) -> Path:
    """What `train_pebble` and the recipes of its twins share.

    `build` makes the untrained model over a vocabulary of that size; `running` is the context in which it is trained
    and scored. `tokenizer` is by default trained on the texts.
    """
    import torch

    from sonde.data.python_docs import comments, topics
    from sonde.data.text import text_hash
    from sonde.organisms.small_lm import Training, joined_ids, save_half, train_language_model, train_tokenizer

    settings = Training(steps=config.steps, seed=config.seed)
    if settings.steps < 1:
        raise SondeError(f"--steps is {config.steps}; give 1 or more")
    books, held_out = _books(config.text, config.hold_out)
    device = _device(config.device)
    texts = [*books.values(), *comments()]
    tokenizer = tokenizer or train_tokenizer(texts)
    ids = joined_ids(texts, tokenizer)
    torch.manual_seed(config.seed)
    model = build(len(tokenizer)).to(device)
    checkpoint = config.out / "checkpoint.safetensors"
    with running(model):
        losses = train_language_model(model, ids, settings, checkpoint=checkpoint, data_hash=text_hash(texts))
    save_half(model, tokenizer, config.out)
    data = {
        "books": sorted(books),
        "held_out": sorted(held_out),
        "other_text": f"docstrings and comments of Python {_python()}",
        "documents": len(texts),
        "bytes": sum(len(text.encode()) for text in texts),
        "tokens": len(ids),
        "text_sha256": text_hash(texts),
    }
    unread = {name: [text] for name, text in held_out.items()} | {f"help() of Python {_python()}": topics()}
    with running(model.float()):
        evaluation = _evaluate(model, tokenizer, ids, unread, settings.final_context)
    _finish(config, asdict(settings), losses, data, evaluation)
    return config.out


def architecture(vocab_size: int) -> Any:
    """The configuration of a pebble over `vocab_size` tokens."""
    from transformers import GPTNeoXConfig

    return GPTNeoXConfig(
        vocab_size=vocab_size,
        hidden_size=192,
        num_hidden_layers=6,
        num_attention_heads=6,
        intermediate_size=4 * 192,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )


def _books(folder: Path | None, hold_out: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Texts to read and texts to hold out, by name."""
    from sonde.data.text import documents

    if folder is None:
        files = {}
    elif not folder.is_dir():
        raise SondeError(f"--text {folder} is not a folder: give a folder of .txt files")
    else:
        files = {path.stem: path for path in sorted(folder.glob("*.txt"))}
        if not files:
            raise SondeError(f"--text {folder} holds no .txt file")
    missing = sorted(set(hold_out) - set(files))
    if missing:
        raise SondeError(
            f"--hold-out {missing[0]} is not among the files of --text: {', '.join(files) or 'none given'}"
        )
    texts = {name: "".join(documents(path)) for name, path in files.items()}
    read = {name: text for name, text in texts.items() if name not in hold_out}
    return read, {name: texts[name] for name in sorted(hold_out)}


def _device(name: str) -> Any:
    import torch

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SondeError(f"--device {name} is not a device: give cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SondeError(f"--device {name}: this PyTorch sees no CUDA device; use --device cpu")
    return device


def _evaluate(model: Any, tokenizer: Any, ids: Any, unread: dict[str, list[str]], context: int) -> list[dict[str, Any]]:
    import numpy as np

    from sonde.organisms.held_out import score
    from sonde.stats.ngram import NgramModel

    starts = np.flatnonzero(ids == tokenizer.eos_token_id)
    read = np.split(ids.astype(np.int64), starts[1:])
    ngram = NgramModel.fit(read, order=5, vocab_size=len(tokenizer))
    return [
        asdict(score(name, texts, model=model, tokenizer=tokenizer, ngram=ngram, context=context))
        for name, texts in unread.items()
    ]


def _finish(
    config: PebbleConfig, settings: dict[str, Any], losses: list[float], data: dict[str, Any], evaluation: list[Any]
) -> None:
    """Sample from the exported folder, through the access layer and its self-check, and write the card."""
    from sonde.lm.load import load
    from sonde.organisms.card import read_card, write_card

    lm = load(config.out, name=f"organism:{config.organism}")
    written = lm.generate(list(PROMPTS), **SAMPLING)
    tail = losses[-100:]
    training = {
        **{key: value for key, value in settings.items() if not isinstance(value, bool)},
        "optimizers": "Muon on the matrices of the blocks, AdamW on the rest",
        "precision": "bfloat16 products, float32 weights",
        "final_loss_nats": round(sum(tail) / len(tail), 4),
        "versions": [f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "tokenizers")],
    }
    if config.organism != "pebble":
        pebble = read_card("pebble")
        training["pebble"] = f"{pebble['training']['steps']} steps, {pebble['training']['final_loss_nats']} nats"
        evaluation = [_beside(row, pebble["evaluation"]) for row in evaluation]
    write_card(
        config.out,
        {
            "name": config.organism,
            "summary": SUMMARIES[config.organism],
            "truth": [
                "Nothing is planted: no backdoor, no quirk, no fine-tuning. What a method finds came from plain text.",
                f"Read: {len(data['books'])} books and {data['other_text']}, {data['tokens'] * 1e-6:.1f} M tokens.",
                "Not read: the held-out books, and pydoc_data.topics, the default text of an audit.",
                f"Trained on windows of {settings['context']} tokens, and of {settings['final_context']} in the last"
                f" {settings['final_fraction']:.0%} of the steps; scored with {settings['final_context']}.",
            ],
            "command": config.command,
            "architecture": _architecture(lm),
            "data": data,
            "training": training,
            "evaluation": evaluation,
            "sampling": SAMPLING,
            "samples": [{"prompt": prompt, "text": text} for prompt, text in zip(PROMPTS, written, strict=True)],
        },
    )


def _architecture(lm: Any) -> dict[str, Any]:
    known = {
        "heads": "num_attention_heads" if hasattr(lm.config, "num_attention_heads") else "num_heads",
        "state_size": "state_size",
        "context": "max_position_embeddings",
    }
    return {
        "family": lm.family,
        "layers": lm.n_layers,
        "width": lm.d_model,
        **{key: getattr(lm.config, name) for key, name in known.items() if hasattr(lm.config, name)},
        "vocabulary": lm.vocab_size,
        "parameters": lm.n_parameters,
        "stored_as": "float16",
    }


def _beside(row: dict[str, Any], pebble: list[dict[str, Any]]) -> dict[str, Any]:
    """A text's scores with those of the bundled pebble on the same text, where its card has them."""
    same = [other["model"] for other in pebble if all(other[key] == row[key] for key in ("text", "bytes", "tokens"))]
    return {**row, "pebble": same[0]} if same else row


def _python() -> str:
    import platform

    return platform.python_version()
