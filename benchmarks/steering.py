"""What an edit costs beside the forward pass, and what a sweep of strengths costs beside generating one at a time.

python benchmarks/steering.py                       both
python benchmarks/steering.py --only overhead       hooks at d 768, batch 8 x 64
python benchmarks/steering.py --only sweep          11 strengths, prompts and samples of organism:refuser
"""

import argparse

import torch
from pairing import interleave, machine
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

import sonde
from sonde.concepts.affine import AffineEdit
from sonde.concepts.site_edits import SiteEdits
from sonde.concepts.strength_sweep import reply_sweep
from sonde.data.instructions import generated
from sonde.lm.model import LanguageModel
from sonde.organisms.refuser import chat

STRENGTHS = [-2.0, -1.5, -1.0, -0.5, 0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0]


def overhead(rounds: int) -> None:
    """ACE at one site and at all blocks, against the plain forward pass."""
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=4096, hidden_size=768, num_hidden_layers=4, num_attention_heads=12, intermediate_size=3072
    )
    lm = LanguageModel(GPTNeoXForCausalLM(config))
    tokens = torch.randint(4096, (8, 64))
    edit = AffineEdit.ace(torch.randn(768), torch.randn(768), 0.5)
    per_row = edit.at(torch.linspace(-1, 1, 8))

    def run(edits: dict[str, AffineEdit]) -> None:
        with torch.no_grad(), lm.editing(edits):
            lm(tokens)

    ways = {
        "plain": lambda: run({}),
        "ACE, one block": lambda: run({"resid_post.1": edit}),
        "ACE, one block, a strength a row": lambda: run({"resid_post.1": per_row}),
        "ACE, all blocks": lambda: run(dict.fromkeys(lm.match("resid_post.*"), edit)),
    }
    print("hook overhead, d 768, 4 layers, batch 8 x 64")
    for name, ratio in interleave(ways, rounds=rounds, warmup=1).items():
        print(f"  {name:36} {ratio}")


def sweep(rounds: int, prompts: int, samples: int) -> None:
    """The same replies in one sweep and in one call of generate each."""
    lm = sonde.load("organism:refuser", check=False)
    made = generated()
    sides = [[chat(lm, one.text) for one in made.train if one.harmful is kind][:32] for kind in (True, False)]
    asked = [chat(lm, one.text) for one in made.held_out["new combinations"]][:prompts]
    for where in ("all", "reply"):
        edits = SiteEdits.fit(lm, *sides, sites="resid_post.2", where=where)

        def one_at_a_time(edits: SiteEdits = edits) -> None:
            for strength in STRENGTHS:
                for prompt in asked:
                    for sample in range(samples):
                        with edits.at(strength).on(lm):
                            lm.generate([prompt], max_new_tokens=20, temperature=1.5, seed=sample)

        def together(edits: SiteEdits = edits) -> None:
            reply_sweep(lm, edits, asked, STRENGTHS, samples=samples, max_new_tokens=20, temperature=1.5)

        ways = {"one at a time": one_at_a_time, "sweep": together}
        print(f"{len(STRENGTHS)} strengths x {prompts} prompts x {samples} samples, edited tokens: {where}")
        for name, ratio in interleave(ways, rounds=rounds, warmup=0).items():
            print(f"  {name:36} {ratio}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["overhead", "sweep"])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--samples", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    if given.only != "sweep":
        overhead(given.rounds)
    if given.only != "overhead":
        sweep(max(2, given.rounds // 6), given.prompts, given.samples)
