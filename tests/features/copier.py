"""A language model that is known to copy: each token is likelier the oftener it stood in the text before."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from sonde.lm.model import LanguageModel

STRENGTH = 40.0  # of what was seen before, against the token itself
GAIN = 0.3  # of the final norm: a token that was seen is about three times as likely as one that was not


def copier(words: int = 120) -> LanguageModel:
    """One layer of uniform attention whose values are the tokens themselves; words w0, w1, … and the end of text."""
    names = ["<end>", *(f"w{i}" for i in range(words))]
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<end>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<end>", eos_token="<end>")
    size = len(names)
    config = GPT2Config(
        vocab_size=size, n_embd=size, n_layer=1, n_head=1, n_positions=256, n_inner=4, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.transformer.wte.weight.copy_(torch.eye(size))
        block = model.transformer.h[0]
        for norm in (block.ln_1, block.ln_2, model.transformer.ln_f):
            norm.weight.fill_(1.0)
        model.transformer.ln_f.weight.fill_(GAIN)
        block.attn.c_attn.weight[:, 2 * size :].copy_(torch.eye(size))  # queries and keys 0: every token weighs alike
        block.attn.c_proj.weight.copy_(STRENGTH * torch.eye(size))
    return LanguageModel(model, tokenizer, name="copier")
