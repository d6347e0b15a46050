"""One training step of a soft prompt: Sonde against PEFT's prompt tuning, on the same model, tokens and loss.

    python benchmarks/soft_prompts.py

Random weights of GPT-NeoX: 16 vectors before 64 tokens of text, of which the last 8 are scored, AdamW. PEFT unembeds
every position and masks labels; Sonde unembeds the scored ones. `suffix` puts the vectors before the scored tokens, so
that the 56 tokens of context are kept between steps; PEFT has prefixes only.
"""

import argparse
import warnings
from collections.abc import Callable

import torch
from pairing import interleave, machine
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from sonde.lm.model import LanguageModel
from sonde.prompts.examples import Examples
from sonde.prompts.passes import Passes
from sonde.prompts.soft_prompt import embedded

SOFT, TEXT, SCORED = 16, 64, 8
MODELS = {"d128 L6 V50304": (6, 50304, 8), "d128 L4 V1024": (4, 1024, 16)}


def network(layers: int, vocab: int) -> GPTNeoXForCausalLM:
    """Build a network of width 128 with random weights."""
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=vocab,
        hidden_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=256,
    )
    return GPTNeoXForCausalLM(config).eval()


def peft_step(layers: int, vocab: int, tokens: torch.Tensor) -> Callable[[], object]:
    """Return a step of PEFT's prompt tuning."""
    from peft import PromptTuningConfig, get_peft_model

    settings = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=SOFT)
    tuned = get_peft_model(network(layers, vocab), settings)
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-3, weight_decay=0)
    labels = tokens.clone()
    labels[:, :-SCORED] = -100
    mask = torch.ones_like(tokens)

    def step() -> float:
        optimizer.zero_grad()
        loss = tuned(input_ids=tokens, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def sonde_step(layers: int, vocab: int, tokens: torch.Tensor, position: str) -> Callable[[], object]:
    """Return a step of Sonde's."""
    lm = LanguageModel(network(layers, vocab))
    rows = tokens.tolist()
    passes = Passes(lm, Examples([row[:-SCORED] for row in rows], [row[-SCORED:] for row in rows]))
    vectors = torch.nn.Parameter(embedded(lm, torch.arange(SOFT)))
    optimizer = torch.optim.AdamW([vectors], lr=1e-3, weight_decay=0)
    members = list(range(len(rows)))

    def step() -> float:
        optimizer.zero_grad()
        batch = passes.rows(members, [SOFT], [position])  # type: ignore[list-item]
        loss = passes.score(vectors, batch).nats.mean()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def main() -> None:
    """Print the ratios of each model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore", FutureWarning)
    print(machine())
    for name, (layers, vocab, batch) in MODELS.items():
        tokens = torch.randint(vocab, (batch, TEXT), generator=torch.Generator().manual_seed(0))
        ways = {
            "peft, prefix": peft_step(layers, vocab, tokens),
            "sonde, prefix": sonde_step(layers, vocab, tokens, "prefix"),
            "sonde, suffix": sonde_step(layers, vocab, tokens, "suffix"),
        }
        print(f"{name}, {batch} rows of {SOFT} + {TEXT}, {SCORED} scored")
        for way, ratio in interleave(ways, rounds=options.rounds).items():
            print(f"  {way:16} {ratio}   {1 / ratio.median:.2f} x")


if __name__ == "__main__":
    main()
