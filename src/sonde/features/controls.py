"""What a dictionary is to beat: k principal components, and random directions of the same number and sparsity.

The projection on the span of v_1 … v_k is a dictionary: with latents relu(v_i·(x - μ)) and relu(-v_i·(x - μ)) and
decoder rows ±v_i it gives μ + Σ_i v_i v_i·(x - μ), and k of its 2k latents are active. It is the best linear code of k
numbers a row; a sparse dictionary with k active latents may choose them anew for every row.
"""

import torch

from sonde.errors import SondeError
from sonde.features.design import Design
from sonde.features.dictionary import Dictionary
from sonde.features.input_scale import Sample


@torch.no_grad()
def principal_components(sample: Sample, k: int, *, site: str | None = None) -> Dictionary:
    """The projection on the k directions of largest variance of a sample with its covariance, of kind "relu".

    Raises `SondeError` for more components than the rows have numbers.
    """
    d = len(sample.mean)
    if not 1 <= k <= d:
        raise SondeError(f"k is {k}: rows of {d} numbers have 1 to {d} principal components")
    top = torch.linalg.eigh(sample.spread)[1][:, -k:].T.flip(0).float()
    made = Dictionary(Design("relu", d, 2 * k))
    made.w_enc.copy_(torch.cat([top, -top]))
    made.w_dec.copy_(made.w_enc)
    made.b_dec.copy_(sample.mean)
    made.site = site
    return made


def random_directions(sample: Sample, latents: int, k: int, *, site: str | None = None, seed: int = 0) -> Dictionary:
    """A TopK dictionary as it is before training: random rows around the mean of a sample."""
    design = Design("topk", len(sample.mean), latents, k)
    made = Dictionary.initialised(design, mean=sample.mean.float(), seed=seed)
    made.site = site
    return made
