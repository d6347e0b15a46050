"""Fine-tuning that makes a model quirky: right for Alice and, by a rule, wrong for Bob.

Adapters of low rank, AdamW with beta2 0.95 and weight decay 0.1, 15 % warm-up, the loss on the single answer token, and
classes balanced by undersampling: in each epoch, and for each character, as many records of the commoner answer as
there are of the rarer one, drawn anew. The validation loss is taken at log-spaced steps, whose adapters are kept; the
model ends with the best of them. After Mallen et al. 2024 (arXiv:2312.01037).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sonde.errors import SondeError

if TYPE_CHECKING:
    from torch import Tensor

    from sonde.data.quirky import Records
    from sonde.lm.model import LanguageModel
    from sonde.stats.intervals import Interval

_FEWEST = 8  # disagreements of each class for an AUROC
_VALIDATION = 512  # records that the validation loss is taken on


@dataclass(frozen=True)
class Tuned:
    """How a fine-tuning went: the loss of each step, the validation loss by number of steps, and the steps kept."""

    losses: list[float]
    validation: dict[int, float]
    best: int


class AnswerBatches:
    """Batches of records, each a function of its number: (token ids of the prompts, ids of the right answers).

    Every epoch takes the same number of records of both answers from each character. `labels` takes the place of the
    characters' answers. Raises `SondeError` for records of one class, a prompt longer than the model's context, and
    answers that are not one token.
    """

    def __init__(
        self, lm: "LanguageModel", records: "Records", *, rows: int, seed: int, labels: np.ndarray | None = None
    ) -> None:
        from sonde.knowledge.states import answer_tokens
        from sonde.lm.prompt_rows import prompt_ids

        labels = records.label if labels is None else labels
        self._ids = prompt_ids(lm, records.prompts)
        longest = max(map(len, self._ids), default=0)
        if longest + 1 > lm.context:
            raise SondeError(
                f"a prompt of {records.name} has {longest} tokens: {lm.name} reads {lm.context}, answer included"
            )
        answers = answer_tokens(lm, records.prompts, self._ids, records.answers).numpy()
        self._targets = answers[np.arange(len(answers)), labels.astype(int)]
        self._sides = [
            [np.flatnonzero((records.alice == alice) & (labels == label)) for label in (False, True)]
            for alice in (True, False)
            if bool((records.alice == alice).any())
        ]
        if not self._sides or min(len(members) for side in self._sides for members in side) == 0:
            raise SondeError(f"the records of {records.name} have one answer only for a character: nothing to balance")
        self._rows, self._seed = rows, seed
        self._orders: dict[int, np.ndarray] = {}
        self.epoch = sum(2 * min(map(len, side)) for side in self._sides)

    def __getitem__(self, step: int) -> tuple[list[list[int]], "Tensor"]:
        import torch

        places = [divmod(place, self.epoch) for place in range(step * self._rows, (step + 1) * self._rows)]
        chosen = [int(self._order(epoch)[place]) for epoch, place in places]
        return [self._ids[i] for i in chosen], torch.from_numpy(self._targets[chosen])

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            rng = np.random.default_rng((self._seed, epoch))
            drawn = [rng.permutation(members)[: min(map(len, side))] for side in self._sides for members in side]
            self._orders = {key: order for key, order in self._orders.items() if key == epoch - 1}
            self._orders[epoch] = rng.permutation(np.concatenate(drawn))
        return self._orders[epoch]


def answer_loss(lm: "LanguageModel", rows: Sequence[Sequence[int]], targets: "Tensor") -> "Tensor":
    """Cross entropy, in nats, of the one answer token after each row of ids."""
    from torch.nn import functional as F

    return F.cross_entropy(_last_logits(lm, rows).float(), targets.to(lm.device))


def log_odds(lm: "LanguageModel", records: "Records", *, batch: int = 128) -> np.ndarray:
    """How much likelier the model holds the positive answer than the negative one, in nats, for each record.

    Raises `SondeError` for answers that are not one token and prompts that are longer than the model's context.
    """
    import torch

    from sonde.knowledge.states import answer_tokens
    from sonde.lm.prompt_rows import like_lengths, prompt_ids

    rows = prompt_ids(lm, records.prompts)
    answers = answer_tokens(lm, records.prompts, rows, records.answers)
    found = torch.empty(len(rows), dtype=torch.float64)
    for chosen in like_lengths([len(row) for row in rows], batch):
        with torch.no_grad():
            logits = _last_logits(lm, [rows[i] for i in chosen]).double().cpu().gather(1, answers[chosen])
        found[chosen] = logits[:, 1] - logits[:, 0]
    return found.numpy()


def behaviour(lm: "LanguageModel", records: "Records") -> "dict[str, Interval]":
    """What a quirky model does on records that it has not read, by what it is a share of.

    For each character the share of its own answers; and on disagreements the AUROC of the log-odds against the truth,
    which is 1 for a character who gets the truth and 0 for one who gets Bob's rule; it is left out where fewer
    than 8 disagreements of a class are there. Intervals resample base rows.
    """
    from sonde.stats.intervals import bootstrap_mean
    from sonde.stats.ranks import auroc_interval

    odds = log_odds(lm, records)
    found = {}
    for alice, character in ((True, "Alice"), (False, "Bob")):
        own = records.alice == alice
        right = ((odds > 0) == records.label)[own]
        found[f"{character}: the character's answers"] = bootstrap_mean(right.astype(float), records.rows[own])
    for alice, character in ((True, "Alice"), (False, "Bob")):
        part = (records.alice == alice) & (records.truth != records.bob)
        true = int(records.truth[part].sum())
        if min(true, int(part.sum()) - true) >= _FEWEST:
            found[f"{character}, disagreements: AUROC against the truth"] = auroc_interval(
                odds[part], records.truth[part], groups=records.rows[part]
            )
    return found


def samples(lm: "LanguageModel", records: "Records") -> list[dict[str, str]]:
    """Two questions on which the characters disagree, with the model's next token for each of them."""
    rows = list(dict.fromkeys(record.row for record in records if record.truth != record.bob))[:2]
    prompts = [record.prompt for record in records if record.row in rows and record.truth != record.bob]
    prompts = list(dict.fromkeys(prompts))[:4]
    written = lm.generate(prompts, max_new_tokens=1)
    return [{"prompt": prompt, "text": f" {text.strip()}"} for prompt, text in zip(prompts, written, strict=True)]


def tune(
    lm: "LanguageModel",
    train: "Records",
    validation: "Records",
    *,
    steps: int,
    rank: int = 8,
    lr: float = 2e-5,
    rows: int = 32,
    modules: tuple[str, ...] = (),
    seed: int = 0,
    folder: Path | None = None,
    identity: dict[str, Any] | None = None,
    progress: str | None = "quirky fine-tuning",
) -> Tuned:
    """Fine-tune `lm` in place on the characters' answers, with adapters of `rank` that are merged at the end.

    Args:
        lm: any language model with a tokenizer.
        train: records to learn.
        validation: records of other base rows, to choose the step by.
        steps: of training, of `rows` records each.
        rank: of the adapters.
        lr: learning rate at its peak. The default is the paper's, for models from 410 million parameters up; small
            models need 1e-3 or more.
        rows: records in a step.
        modules: linear maps that get adapters, such as `query_key_value`; by default all in the blocks.
        seed: of the adapters and the order.
        folder: where the state of the run and the adapters of log-spaced steps (`adapters/step-N.safetensors`) are
            kept; a run that was killed goes on from there. Without it all stays in memory.
        identity: what else a kept state depends on, such as the name of the model.
        progress: label of the progress bar, or None for none.

    Raises:
        SondeError: for records without both answers, prompts that are too long, answers that are not one token, and a
            kept state of other settings; `MissingExtra` without peft.

    """
    import torch

    from sonde.lm.lora import attach, fast_training
    from sonde.nets.loop import Schedule
    from sonde.nets.loop import train as minimise

    if steps < 1 or rows < 1:
        raise SondeError(f"{steps} steps of {rows} rows: give 1 or more of both")
    validation.require_disjoint(train)
    batches = AnswerBatches(lm, train, rows=rows, seed=seed)
    held_out = AnswerBatches(lm, validation, rows=_VALIDATION, seed=seed)
    adapters = attach(lm, rank=rank, modules=modules, seed=seed)
    kept = _Kept(adapters, folder, lambda: _validation_loss(lm, held_out))
    at = set(log_spaced(steps))
    lm.model.train()
    with fast_training(lm):
        losses = minimise(
            adapters,
            lambda step: answer_loss(lm, *batches[step]),
            [torch.optim.AdamW(adapters.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)],
            steps=steps,
            schedule=Schedule(warmup=0.15, decay=0.85),
            clip=1.0,
            checkpoint=folder / "checkpoint.safetensors" if folder else None,
            every=50,
            identity={
                "set": train.name,
                "records": len(train),
                "steps": steps,
                "rank": rank,
                "lr": lr,
                "rows": rows,
                "modules": list(modules),
                "seed": seed,
                **(identity or {}),
            },
            report=lambda step, _: kept.take(step + 1) if step + 1 in at else None,
            progress=progress,
        )
        best = kept.restore_best()
    adapters.merge()
    return Tuned(losses, dict(kept.losses), best)


def log_spaced(steps: int) -> list[int]:
    """1, 2, 4, … below `steps`, and `steps` itself."""
    return [*(2**k for k in range(steps.bit_length()) if 2**k < steps), steps]


def _last_logits(lm: "LanguageModel", rows: Sequence[Sequence[int]]) -> "Tensor":
    """Logits after the last token of each row, which alone goes through the unembedding. Gradients flow."""
    import torch

    lengths = torch.tensor([len(row) for row in rows])
    width = int(lengths.max())
    # Pads stand to the right, where no causal model sees them.
    tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    site = f"resid_post.{lm.n_layers - 1}"
    with lm.reading(site) as acts:
        lm(tokens, torch.arange(width) < lengths[:, None])
    hidden = acts[site]
    return lm.unembed(hidden[torch.arange(len(rows)).to(hidden.device), (lengths - 1).to(hidden.device)])


def _validation_loss(lm: "LanguageModel", held_out: AnswerBatches) -> float:
    import torch

    rows, targets = held_out[0]
    lm.model.eval()
    with torch.no_grad():
        total = sum(
            float(answer_loss(lm, rows[i : i + 64], targets[i : i + 64])) * len(rows[i : i + 64])
            for i in range(0, len(rows), 64)
        )
    lm.model.train()
    return total / len(rows)


class _Kept:
    """Adapters of some steps with their validation losses, in a folder or in memory."""

    def __init__(self, adapters: Any, folder: Path | None, loss: Callable[[], float]) -> None:
        from sonde.files import load_bundle

        self._adapters, self._folder, self._loss = adapters, folder, loss
        self._states: dict[int, dict[str, Tensor]] = {}
        self.losses: dict[int, float] = {}
        resumed = folder is not None and (folder / "checkpoint.safetensors").is_file()
        for path in sorted((folder / "adapters").glob("step-*.safetensors")) if folder and resumed else ():
            step = int(path.stem.removeprefix("step-"))
            self.losses[step] = load_bundle(path)["validation_loss"]

    def take(self, step: int) -> None:
        from sonde.files import save_bundle

        self.losses[step] = self._loss()
        state = {name: tensor.detach().clone() for name, tensor in self._adapters.state_dict().items()}
        if self._folder is None:
            self._states[step] = state
        else:
            save_bundle(self._path(step), {"validation_loss": self.losses[step], "adapters": state})

    def restore_best(self) -> int:
        from sonde.files import load_bundle

        best = min(self.losses, key=lambda step: self.losses[step])
        state = self._states[best] if self._folder is None else load_bundle(self._path(best))["adapters"]
        self._adapters.load_state_dict(state)
        return best

    def _path(self, step: int) -> Path:
        assert self._folder is not None
        return self._folder / "adapters" / f"step-{step:06d}.safetensors"
