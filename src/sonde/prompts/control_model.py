"""A control model where no other is given: the same network with its blocks' matrices shuffled.

It has the size, the tokenizer, the embeddings and the unembedding of the model, and weights of the same size in the
same places, but nothing that training put into its blocks. What a prompt can make it do is what prompts can do to any
network of that form. It says nothing about a model trained on other text, which is the better control where there is
one: a model without the backdoor, before the fine-tuning, of another seed.
"""

import copy

import torch

from sonde.lm.model import LanguageModel

SHUFFLED = "the same network with the weights of its blocks shuffled"


@torch.no_grad()
def shuffled(lm: LanguageModel, *, seed: int = 0) -> LanguageModel:
    """A copy of `lm` in which the entries of every matrix of every block are permuted; `lm` stays as it is."""
    model = copy.deepcopy(lm.model)
    control = LanguageModel(model, lm.tokenizer, name=f"{lm.name} (shuffled)")
    generator = torch.Generator().manual_seed(seed)
    for parameter in control.structure.blocks.parameters():
        if parameter.ndim > 1:
            order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
            parameter.copy_(parameter.flatten()[order].view_as(parameter))
    return control
