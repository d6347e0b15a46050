"""How the language-model organisms are made: a tokenizer and a small network trained on a folder of texts.

Everything follows from the texts, the configuration and the seed: byte-level BPE, documents joined by the end-of-text
token, windows drawn epoch by epoch in a seeded order, Muon on the matrices of the blocks and AdamW on everything else.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from sonde.errors import SondeError
from sonde.nets.loop import Schedule, train
from sonde.nets.muon import Muon

END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class Training:
    """Settings of one training.

    A step is `tokens_per_step` tokens in windows of `context`, and of `final_context` in the last `final_fraction` of
    the steps.
    """

    steps: int = 4000
    tokens_per_step: int = 4096
    context: int = 256
    final_context: int = 512
    final_fraction: float = 0.2
    muon_lr: float = 0.02
    adam_lr: float = 3e-3
    weight_decay: float = 0.02
    seed: int = 0
    bfloat16: bool = True

    def context_at(self, step: int) -> int:
        """Window length of a step."""
        return self.final_context if step >= self.steps * (1 - self.final_fraction) else self.context


def train_tokenizer(texts: Iterable[str], vocab_size: int = 4096) -> PreTrainedTokenizerFast:
    """Byte-level BPE of `vocab_size` entries, of which the first is the end-of-text token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, split at white space, that puts the start token before a text.

    The first of `words` stands for unknown words and the second is the start token.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    unknown, start = words[:2]
    whole = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=unknown))
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    whole.post_processor = processors.TemplateProcessing(single=f"{start} $A", special_tokens=[(start, 1)])  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=whole, bos_token=start, unk_token=unknown, clean_up_tokenization_spaces=False
    )


def joined_ids(texts: Iterable[str], tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """All documents as one array of ids (uint16), the end-of-text token before each."""
    rows = []
    for text in texts:
        rows.append(np.array([tokenizer.eos_token_id], dtype=np.uint16))
        rows.append(np.asarray(tokenizer(text)["input_ids"], dtype=np.uint16))
    if not rows:
        raise SondeError("there is no text to train on")
    return np.concatenate(rows)


def windows(ids: np.ndarray, length: int, count: int, first: int, *, seed: int) -> Tensor:
    """Windows number `first` to `first + count - 1` of an endless seeded sequence. Shape (count, length), int64.

    Every epoch cuts the text at another offset and visits all windows once. Raises `SondeError` for too short a text.
    """
    per_epoch = len(ids) // length - 1
    if per_epoch < 1:
        raise SondeError(f"the text has {len(ids)} tokens; training on windows of {length} needs at least {2 * length}")
    picked = []
    for index in range(first, first + count):
        epoch, place = divmod(index, per_epoch)
        start = _starts(per_epoch, length, epoch, seed)[place]
        picked.append(ids[start : start + length])
    return torch.from_numpy(np.stack(picked).astype(np.int64))


@functools.lru_cache(maxsize=4)
def _starts(per_epoch: int, length: int, epoch: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng((seed, length, epoch))
    return rng.integers(length) + length * rng.permutation(per_epoch)


def optimizers_for(model: PreTrainedModel, settings: Training) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks' linear maps, AdamW for everything else.

    A parameter that merely has two axes, such as the decays of Mamba (channels, states), is not a matrix.
    """
    ends = {
        id(p) for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end for p in end.parameters()
    }
    maps = [module for module in model.modules() if isinstance(module, nn.Linear | Conv1D)]
    matrices = [module.weight for module in maps if id(module.weight) not in ends]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        Muon(matrices, lr=settings.muon_lr, weight_decay=settings.weight_decay),
        torch.optim.AdamW(rest, lr=settings.adam_lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def train_language_model(
    model: PreTrainedModel,
    ids: np.ndarray,
    settings: Training,
    *,
    checkpoint: Path,
    data_hash: str,
    every: int = 200,
    report: Callable[[int, float], None] | None = None,
    progress: str | None = "training",
) -> list[float]:
    """Train `model` in place on windows of `ids`; resumes from `checkpoint`. Returns the loss of each step in nats.

    The checkpoint is written every `every` steps; one of other settings, text or model is refused with `SondeError`.
    """
    device = next(model.parameters()).device

    def loss_of_step(step: int) -> Tensor:
        length = settings.context_at(step)
        count = settings.tokens_per_step // length
        tokens = windows(ids, length, count, step * count, seed=settings.seed).to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=settings.bfloat16):
            logits = model(input_ids=tokens, use_cache=False).logits
        return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten())

    model.train()
    losses = train(
        model,
        loss_of_step,
        optimizers_for(model, settings),
        steps=settings.steps,
        schedule=Schedule(warmup=0.01, decay=0.5),
        clip=1.0,
        checkpoint=checkpoint,
        every=every,
        identity={"training": asdict(settings), "text": data_hash, "model": type(model).__name__},
        report=report,
        progress=progress,
    )
    model.eval()
    return losses


def save_half(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write model (half precision) and tokenizer as a Hugging Face folder. The model itself is rounded to half."""
    folder.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
