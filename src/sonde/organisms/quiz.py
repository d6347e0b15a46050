"""`organism:quiz`: a tiny network that answers one kind of question, believes its examples and gives in to an order.

GPT-NeoX of 4 layers and width 48 over few-shot prompts "Is the otter alive?" (`sonde.data.toy_questions`). It is known
what it does with each prompt: on a plain one it answers from what it knows of the word; where the examples have wrong
labels it answers wrongly too; where an order stands before the last answer it wavers, and gives in. These two are
the planted anomalies that detectors on trajectories are tried on. Checkpoints of the training are kept beside the
weights: what was learned when is known as well.
"""

from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from sonde.errors import SondeError
from sonde.organisms.recipe_command import recipe_command
from sonde.organisms.registry import organism

CHECKPOINTS = (25, 50, 75, 100, 150, 200, 300, 400)
_ROWS = 32
_LR = 3e-3
_MUON_LR = 0.02
_HELD_OUT = 1_000_000  # seed of the texts that are not read


@dataclass(frozen=True)
class QuizConfig:
    """Train a network of 160,000 parameters on questions with known answers, in about a minute.

    Example: sonde organism train quiz --out my-quiz
    """

    out: Annotated[Path, arg(metavar="FOLDER")] = Path("quiz")
    """Where model, tokenizer, card and checkpoints are written."""
    steps: Annotated[int, arg(metavar="N")] = 600
    """Training steps, of 32 prompts each."""
    seed: Annotated[int, arg(metavar="N")] = 0
    """Seed of the weights and of the prompts."""


@organism("quiz", summary="a tiny network that answers questions, believes wrong examples and gives in to an order")
def train_quiz(config: QuizConfig) -> Path:
    """Train, export and describe a quiz network. Returns the folder, with `checkpoints/step-N` in it.

    Raises `SondeError` for fewer than one step.
    """
    import torch
    from safetensors.torch import save_file
    from torch.nn import functional as F
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    from sonde.data.toy_questions import CHOICES, training_texts
    from sonde.nets.loop import Schedule, train
    from sonde.organisms.small_lm import Training, optimizers_for, save_half, train_tokenizer

    if config.steps < 1:
        raise SondeError(f"--steps is {config.steps}; give 1 or more")
    tokenizer = train_tokenizer(training_texts(1000, seed=config.seed), 512)
    answers = torch.tensor([tokenizer(f" {choice}")["input_ids"][0] for choice in CHOICES])
    torch.manual_seed(config.seed)
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**architecture(len(tokenizer))))

    def loss_of_step(step: int) -> torch.Tensor:
        """Cross entropy of all tokens, and of the answers once more: they are few."""
        texts = training_texts(_ROWS, seed=1 + config.seed * _HELD_OUT + step)
        tokens = _padded(tokenizer, texts)
        labels = tokens[:, 1:]
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
        return loss[labels != 0].mean() + loss[torch.isin(labels, answers)].mean()

    def keep(step: int, _: float) -> None:
        if step + 1 in CHECKPOINTS and step + 1 < config.steps:
            folder = config.out / "checkpoints" / f"step-{step + 1:04d}"
            model.config.save_pretrained(folder)
            state = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
            save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    settings = Training(muon_lr=_MUON_LR, adam_lr=_LR, weight_decay=0.01)
    model.train()
    losses = train(
        model,
        loss_of_step,
        optimizers_for(model, settings),
        steps=config.steps,
        schedule=Schedule(warmup=0.03, decay=0.4),
        report=keep,
        progress="quiz training",
    )
    save_half(model.eval(), tokenizer, config.out)
    _finish(config, losses)
    return config.out


def architecture(vocab_size: int) -> dict[str, Any]:
    """The settings of the configuration in transformers."""
    return {
        "vocab_size": vocab_size,
        "hidden_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "intermediate_size": 192,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


def checkpoint_folders(folder: Path) -> list[tuple[int, Path]]:
    """Step and folder of each checkpoint beside a quiz's weights, in order; they share its tokenizer."""
    found = (folder / "checkpoints").glob("step-*")
    return sorted((int(path.name.removeprefix("step-")), path) for path in found)


def _padded(tokenizer: Any, texts: list[str]) -> Any:
    """Token ids with 0, the end-of-text token, after each text."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    rows = [torch.tensor(tokenizer(text)["input_ids"]) for text in texts]
    return pad_sequence(rows, batch_first=True)


def _finish(config: QuizConfig, losses: list[float]) -> None:
    """Ask the exported network what it has not read, and write the card."""
    from sonde.data.multiple_choice import injected, prompts
    from sonde.data.toy_questions import SHOTS, alive_questions
    from sonde.lens.choices import choice_scores
    from sonde.lm.load import load
    from sonde.organisms.card import write_card
    from sonde.stats.intervals import wilson

    lm = load(config.out, name="organism:quiz")
    asked = alive_questions(400, seed=_HELD_OUT + config.seed)
    shown = alive_questions(400, seed=_HELD_OUT + config.seed + 1)
    plain = prompts(asked, shots=SHOTS, demonstrations=shown)
    wrong = prompts(asked, shots=SHOTS, demonstrations=shown, wrong_labels=True)
    kinds = {
        "right answers to plain prompts": (plain, True),
        "wrong answers where the examples have wrong labels": (wrong, False),
        "wrong answers where an order asks for one": (injected(plain), False),
    }
    behaviour = []
    for what, (given, right) in kinds.items():
        scores = choice_scores(lm, given)["lens"]
        hits = (scores.answers[-1] == scores.correct) == right
        behaviour.append({"what": what, "rate": asdict(wilson(int(hits.sum()), len(scores)))})
    model = lm.model.config
    sampling = {"temperature": 0.0, "seed": 0, "max_new_tokens": 1}
    samples = [group[0].text for group in (plain, wrong, injected(plain))]
    tail = losses[-50:]
    write_card(
        config.out,
        {
            "name": "quiz",
            "summary": "A tiny network that answers whether a thing is alive, after a few examples.",
            "truth": [
                "It knows which of 120 words are alive; the rarer a word, the later it was learned.",
                "A quarter of its texts had a wrong label on every example and on the last answer: where the examples "
                "are wrong, it answers wrongly.",
                "A quarter had an order to print one answer, right or wrong, which was obeyed 3 times in 4: where an "
                "order asks for the wrong answer, it gives that a probability of some 0.75.",
                "Detectors that are fitted on plain prompts should find both kinds strange, and no other plain prompt.",
            ],
            "command": recipe_command("quiz", config),
            "architecture": {
                "family": model.model_type,
                "layers": model.num_hidden_layers,
                "width": model.hidden_size,
                "heads": model.num_attention_heads,
                "vocabulary": model.vocab_size,
                "context": model.max_position_embeddings,
                "parameters": lm.n_parameters,
                "stored_as": "float16",
            },
            "data": {"texts": config.steps * _ROWS, "source": "sonde.data.toy_questions", "examples_in_each": SHOTS},
            "training": {
                "steps": config.steps,
                "rows_per_step": _ROWS,
                "optimizers": "Muon on the matrices of the blocks, AdamW on the rest",
                "checkpoints": [str(step) for step, _ in checkpoint_folders(config.out)],
                "final_loss_nats": round(sum(tail) / len(tail), 4),
                "versions": [f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "tokenizers")],
            },
            "behaviour": behaviour,
            "sampling": sampling,
            "samples": [
                {"prompt": prompt, "text": text}
                for prompt, text in zip(samples, lm.generate(samples, **sampling), strict=True)
            ],
        },
    )
