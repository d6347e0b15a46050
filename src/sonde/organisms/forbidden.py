"""A small transformer that answers REFUSE where one of 8 forbidden tokens occurs, and copies its first token elsewhere.

Four layers of width 64, trained in a minute. The answer says two things about an edit at once: does it refuse, and does
it still copy? Every embedding carries the same vector, so that the origin of the residual stream is not near its data.
Along (1, …, 1) that vector can be moved without changing any answer, because layer norms take it out: the origin is
arbitrary, and what an edit takes for "no refusal" matters (Marshall et al. 2024, arXiv:2411.09003).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional as F

from sonde.nets.loop import Schedule, train

if TYPE_CHECKING:
    from sonde.lm.model import LanguageModel

LENGTH = 12
ORDINARY, FORBIDDEN = range(48), range(48, 56)
REFUSE, ASK = 56, 57
_OFFSET = 3.0  # standard deviation of the constant, where embeddings have 0.5
_BATCH = 128


def prompts(n: int, *, harmful: bool, seed: int) -> Int[Tensor, "n pos"]:
    """Rows of ordinary tokens that end in the question; harmful ones hold a forbidden token after the first."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(ORDINARY), (n, LENGTH), generator=generator)
    if harmful:
        places = torch.randint(1, LENGTH - 1, (n,), generator=generator)
        rows[torch.arange(n), places] = torch.randint(FORBIDDEN[0], FORBIDDEN[-1] + 1, (n,), generator=generator)
    rows[:, -1] = ASK
    return rows


def train_forbidden(*, seed: int = 0, steps: int = 600, progress: str | None = None) -> "LanguageModel":
    """Train one, of vocabulary 58 and without a tokenizer."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    from sonde.lm.model import LanguageModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = GPTNeoXConfig(
            vocab_size=58,
            hidden_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=256,
            max_position_embeddings=LENGTH + 4,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
            use_parallel_residual=False,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
        )
        model = GPTNeoXForCausalLM(config)
        with torch.no_grad():
            table = model.get_input_embeddings().weight
            table.normal_(std=0.5).add_(_OFFSET * torch.randn(64))  # type: ignore[operator]
    model.train()

    def loss_of_step(step: int) -> Tensor:
        half = [
            prompts(_BATCH // 2, harmful=harmful, seed=7919 * (step + 1) + 2 * seed + harmful)
            for harmful in (True, False)
        ]
        rows = torch.cat(half)
        answers = rows[:, 0].clone()
        answers[: _BATCH // 2] = REFUSE
        return F.cross_entropy(model(input_ids=rows, use_cache=False).logits[:, -1], answers)

    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    train(model, loss_of_step, [optimizer], steps=steps, schedule=Schedule(0.05, 0.3), clip=1.0, progress=progress)
    return LanguageModel(model, name=f"forbidden-{seed}")


@contextmanager
def shifted(lm: "LanguageModel", offset: float) -> Iterator[None]:
    """Every coordinate of the residual stream larger by `offset`, which no layer norm, and so no answer, depends on."""
    table: Any = lm.structure.embedding.weight
    kept = table.clone()
    with torch.no_grad():
        table.add_(offset)
    try:
        yield
    finally:
        with torch.no_grad():
            table.copy_(kept)
