"""Does the answer to an input change when the model is trained further on trusted inputs alone? An alarm by training.

Adapters of low rank are trained on trusted prompts with their labels. Where the model works on an input as it works on
trusted ones, that changes little; where it works in another way, its answer moves towards what the trusted way would
have said. The feature of an input is how far,

    KL(p ‖ p′) over the two answers, and the change of the log-odds

(fine-tuning distance, of Mallen et al. 2504.08812). The model is what it was afterwards.
"""

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from sonde.errors import SondeError
from sonde.knowledge.anomaly_features import Answers, Feature
from sonde.knowledge.states import answer_tokens
from sonde.lm.lora import attach, fast_training
from sonde.lm.model import LanguageModel
from sonde.lm.prompt_rows import Prompts, like_lengths, prompt_ids
from sonde.nets.loop import Schedule, train

NAME = "fine-tuning"
_CLIP = 1.0


def fine_tuning_distance(
    lm: LanguageModel,
    trusted: tuple[Prompts, Answers],
    labels: Bool[Tensor, " n"],
    test: tuple[Prompts, Answers],
    *,
    steps: int = 60,
    rank: int = 4,
    lr: float = 2e-3,
    batch: int = 32,
    seed: int = 0,
    progress: str | None = None,
) -> Feature:
    """Train on each half of the trusted prompts, and measure the other half; of test prompts, the mean of both times.

    Args:
        lm: the model; adapters are taken off again.
        trusted: prompts, and the two answers of all or of each.
        labels: which of the trusted prompts have the positive answer.
        test: prompts that may be anomalous.
        steps: of training, each of `batch` prompts.
        rank: of the adapters.
        lr: learning rate of AdamW.
        batch: most prompts of a pass.
        seed: of the halves, the order and the adapters.
        progress: what the progress bar is called; None shows none.

    Raises:
        SondeError: for labels of another number than prompts, too few prompts, and answers that are not one token.
        MissingExtra: without peft.

    """
    rows = prompt_ids(lm, trusted[0])
    tokens = answer_tokens(lm, trusted[0], rows, trusted[1])
    if len(labels) != len(rows) or len(rows) < 4:
        raise SondeError(f"{len(labels)} labels for {len(rows)} trusted prompts: give one for each of at least 4")
    others = prompt_ids(lm, test[0])
    other_tokens = answer_tokens(lm, test[0], others, test[1])
    sign = torch.as_tensor(labels).float() * 2 - 1
    before, other_before = _log_odds(lm, rows, tokens, batch), _log_odds(lm, others, other_tokens, batch)
    found, other_found = (
        torch.empty(len(rows), 2, dtype=torch.float64),
        torch.zeros(len(others), 2, dtype=torch.float64),
    )
    generator = torch.Generator().manual_seed(seed)
    halves = torch.randperm(len(rows), generator=generator).tensor_split(2)
    for fitted, kept in (halves, halves[::-1]):
        rounds = 1 + steps * batch // len(fitted)
        places = torch.cat([fitted[torch.randperm(len(fitted), generator=generator)] for _ in range(rounds)])

        def loss_of_step(step: int, places: Tensor = places) -> Tensor:
            chosen = places[step * batch : (step + 1) * batch]
            odds = _odds(lm, [rows[i] for i in chosen], tokens[chosen])
            return softplus(-sign[chosen].to(odds.device) * odds).mean()

        adapters = attach(lm, rank=rank, seed=seed)
        try:
            with fast_training(lm):
                train(
                    adapters,
                    loss_of_step,
                    [torch.optim.AdamW(adapters.parameters(), lr=lr, weight_decay=0.0)],
                    steps=steps,
                    schedule=Schedule(warmup=0.1, decay=0.5),
                    clip=_CLIP,
                    progress=progress,
                )
            found[kept] = _moved(before[kept], _log_odds(lm, [rows[i] for i in kept], tokens[kept], batch))
            other_found += _moved(other_before, _log_odds(lm, others, other_tokens, batch)) / 2
        finally:
            adapters.remove()
    return Feature(NAME, found, other_found)


def _moved(before: Tensor, after: Tensor) -> Tensor:
    """KL between the two answers before and after, and the change of the log-odds. Shape (n, 2)."""
    p = before.sigmoid()
    kl = p * (logsigmoid(before) - logsigmoid(after)) + (1 - p) * (logsigmoid(-before) - logsigmoid(-after))
    return torch.stack([kl, after - before], 1)


@torch.no_grad()
def _log_odds(lm: LanguageModel, rows: list[list[int]], tokens: Tensor, batch: int) -> Tensor:
    found = torch.empty(len(rows), dtype=torch.float64)
    for numbers in like_lengths([len(ids) for ids in rows], batch):
        found[numbers] = _odds(lm, [rows[i] for i in numbers], tokens[numbers]).double().cpu()
    return found


def _odds(lm: LanguageModel, rows: list[list[int]], tokens: Tensor) -> Tensor:
    """Logit of the positive answer less that of the negative one, at the last token of each row."""
    lengths = torch.tensor([len(ids) for ids in rows], device=lm.device)
    width = int(lengths.max())
    # pads to the right, where no causal model sees them
    ids = torch.tensor([list(row) + [0] * (width - len(row)) for row in rows], device=lm.device)
    logits = lm(ids, torch.arange(width, device=lm.device) < lengths[:, None]).logits
    assert logits is not None
    last = logits[torch.arange(len(rows), device=lm.device), lengths - 1].float()
    given = last.gather(1, tokens.to(lm.device))
    return given[:, 1] - given[:, 0]
