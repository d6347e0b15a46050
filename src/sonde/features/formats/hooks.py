"""Names of places in a network: what other projects call them, and the sites of Sonde.

TransformerLens: `blocks.3.hook_resid_post`. sparsify: module paths relative to the base model, `layers.3.mlp`.
Transformers paths with a side: `model.layers.3.output`. What has no site of its own (heads before their output matrix,
say) gives None, and stays readable in `Dictionary.facts`.
"""

import re

_LENS = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_post": "resid_post",
    "hook_mlp_out": "mlp_out",
    "hook_attn_out": "mixer_out",
    "ln2.hook_normalized": "mlp_in",
    "ln1.hook_normalized": "mixer_in",
}
_LENS_OF = {site: hook for hook, site in _LENS.items()}
_BLOCK = r"(?:^|\.)(?:layers|h|blocks|layer|block)[._](?P<layer>\d+)"
_MIXERS = ("attention", "attn", "self_attn", "self_attention", "mixer", "linear_attn")
_MLPS = ("mlp", "feed_forward", "ffn", "fc2", "ff")
_EMBEDDINGS = ("embed_tokens", "embed_in", "wte", "word_embeddings", "embeddings", "hook_embed")


def site_of(hook: str | None, *, side: str = "out") -> str | None:
    """The site of a hook or a module path; `side` "in" for a module's input. None where there is no such site."""
    if not hook:
        return None
    hook = hook.removesuffix(".output")
    if hook.endswith(".input"):
        hook, side = hook.removesuffix(".input"), "in"
    if hook.split(".")[-1] in _EMBEDDINGS:
        return "embed"
    found = re.search(_BLOCK, hook)
    if found is None:
        return None
    layer, rest = found["layer"], hook[found.end() :].lstrip(".")
    if rest in _LENS:
        return f"{_LENS[rest]}.{layer}"
    if not rest:
        return f"{'resid_pre' if side == 'in' else 'resid_post'}.{layer}"
    if rest in _MIXERS:
        return f"mixer_{side}.{layer}"
    if rest in _MLPS:
        return f"mlp_{side}.{layer}"
    if rest == "pre_feedforward_layernorm" and side == "out":
        return f"mlp_in.{layer}"
    if rest == "post_feedforward_layernorm" and side == "out":
        return f"mlp_out.{layer}"
    return None


def lens_hook(site: str | None) -> str | None:
    """What TransformerLens calls a site; None for no site, the site itself where it has no name there."""
    if site is None:
        return None
    if site == "embed":
        return "hook_embed"
    stem, _, layer = site.rpartition(".")
    return f"blocks.{layer}.{_LENS_OF[stem]}" if stem in _LENS_OF else site
