"""OpenAI's sparse_autoencoder: one pickled state dict, opened without running code.

latents = act(W_enc (x - pre_bias) + latent_bias), output = W_dec latents + pre_bias; `encoder.weight` is M x d,
`decoder.weight` d x M. `activation` names the class; TopK dictionaries standardise every row first (their loader takes
the one as the sign of the other).
"""

from pathlib import Path

from torch import Tensor

from sonde.features.dictionary import Dictionary
from sonde.features.formats.assembly import Origin, assembled
from sonde.features.formats.foreign import Tensors, checked_design, read_pickled, setting, unknown

_STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")


def load(path: Path) -> Dictionary:
    """Read a dictionary from its file.

    Raises `SondeError` for a file that is missing, damaged or not what the format says.
    """
    state = read_pickled(path)
    activation = state.get("activation", "ReLU")
    if activation not in ("ReLU", "TopK"):
        raise unknown(path, "activation", activation, ("ReLU", "TopK"))
    k = None
    if activation == "TopK":
        settings = state.get("activation_state_dict") or {}
        k = int(setting(settings, path, "k"))
        after = settings.get("postact_fn", "ReLU")
        if after != "ReLU":
            raise unknown(path, "postact_fn", after, ("ReLU",))
    tensors = Tensors(path, {name: value for name, value in state.items() if isinstance(value, Tensor)})
    latents, d = tensors.shape("encoder.weight", 2)
    tied = "decoder.linear.weight" in tensors
    encoder = tensors.take("encoder.weight", (latents, d))
    weights = {
        "w_enc": encoder,
        "b_enc": tensors.take("latent_bias", (latents,)),
        "w_dec": tensors.take("decoder.linear.weight", (latents, d))
        if tied
        else tensors.take("decoder.weight", (d, latents)).T,
        "b_dec": tensors.take("pre_bias", (d,)),
    }
    tensors.close(ignored=_STATISTICS)
    kind = "relu" if k is None else "topk"
    design = checked_design(path, kind=kind, inputs=d, latents=latents, k=k, layer_norm=kind == "topk")
    return assembled(design, weights, Origin("OpenAI", path.name))
