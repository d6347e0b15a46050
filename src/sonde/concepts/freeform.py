"""A nonlinear edit with a linear guarantee, for when labels are not known at edit time but can be predicted from x.

With f(x) = E[z | x],

    r(x) = x - Cov(x, f) Cov(f)⁺ (f(x) - E f)

guards z linearly, because Cov(x, z) = Cov(x, f) and Cov(f, z) = Cov(f), and changes x no more than LEACE, whose f is
the best linear one (Belrose et al. 2023, arXiv:2306.03819, appendix). The guarantee is as exact as f is the true
conditional mean: held-out correlations say how far it is (`sonde.concepts.certificate`).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sonde.concepts.estimator import ConceptEraser
from sonde.concepts.oracle import OracleEraser
from sonde.concepts.probe import Probe, fit_probe
from sonde.concepts.row_sample import RowSample
from sonde.concepts.statistics import ConceptStatistics, concept_rows
from sonde.errors import SondeError
from sonde.files import load_bundle, save_bundle

Predictor = Callable[[Float[Tensor, "n d"]], Float[Tensor, "n k"]]


class FreeFormEraser(ConceptEraser, nn.Module):
    """`FreeFormEraser.fit(x, z)(x)`: the oracle's edit with a prediction in place of the label.

    Args:
        predictor: f, from rows `[n d]` to predictions `[n k]` (probabilities for labels); None trains a network with
            one hidden layer, for which the rows are held in memory until `finish`. A given f needs no labels: z may
            be anything of the right length.
        categorical: whether z are labels; None: whole numbers with one label a row are.
        seed: of the network.

    """

    def __init__(self, predictor: Predictor | None = None, *, categorical: bool | None = None, seed: int = 0) -> None:
        nn.Module.__init__(self)
        self.predictor, self.categorical, self.seed = predictor, categorical, seed
        self.network: nn.Sequential | None = None
        self.oracle = OracleEraser(categorical=False)
        self.facts = {}

    @property
    def fitted(self) -> bool:
        """Whether there is something to apply."""
        return self.oracle.fitted

    def collects(self) -> ConceptStatistics | RowSample:
        """The covariance of x with f(x), or all rows where f is still to be trained."""
        if self.predictor is None:
            return RowSample(categorical=self.categorical)
        return ConceptStatistics(categorical=False, covariance="none")

    def update(self, x: Any, z: Any, mask: Any = None) -> Self:
        """Take in rows; with a given predictor f(x) takes the place of z."""
        if self.predictor is None:
            return super().update(x, z, mask)
        rows, _, _ = concept_rows(x, z, mask, categorical=self.categorical)
        return super().update(rows, _predict(self.predictor, rows))

    def solve(self, statistics: Any) -> None:
        """Train the predictor where there is none, then regress x on its predictions."""
        if isinstance(statistics, RowSample):
            x, z = statistics.rows
            self.network = _network(fit_probe(x, z, reach="mlp", seed=self.seed), z.ndim == 1).to(
                x.device, torch.promote_types(x.dtype, torch.float32)
            )
            statistics = ConceptStatistics(categorical=False, covariance="none").update(x, _predict(self.network, x))
        self.oracle.solve(statistics)
        self.facts = {}

    def forward(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """The erased vectors, in the type of x."""
        self.check_fitted()
        f = self.network if self.predictor is None else self.predictor
        assert f is not None
        flat = x.reshape(-1, x.shape[-1])
        if isinstance(f, nn.Sequential):
            flat = flat.to(next(f.parameters()).dtype)
        return self.oracle(x.reshape(-1, x.shape[-1]), f(flat)).reshape(x.shape)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file. Raises `SondeError` for a predictor of your own: a function cannot be saved."""
        self.check_fitted()
        if self.network is None:
            raise SondeError("an eraser with its own predictor cannot be saved: save the predictor, and fit again")
        layers = [
            {"kind": type(layer).__name__, **{name: p.detach() for name, p in layer.named_parameters()}}
            for layer in self.network
        ]
        tree = {
            "kind": type(self).__name__,
            "parameters": {"categorical": self.categorical, "seed": self.seed},
            "layers": layers,
            "oracle": dict(self.oracle._buffers),
            "facts": self.facts,
        }
        save_bundle(path, tree)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote. Raises `SondeError` for anything else."""
        tree = load_bundle(path)
        if not isinstance(tree, dict) or tree.get("kind") != cls.__name__:
            raise SondeError(f"{path} holds no {cls.__name__}")
        eraser = cls(**tree["parameters"])
        layers: list[nn.Module] = []
        for layer in tree["layers"]:
            if layer["kind"] == "Linear":
                layers.append(_linear(layer["weight"], layer["bias"]))
            else:
                layers.append({"ReLU": nn.ReLU(), "Softmax": nn.Softmax(-1)}[layer["kind"]])
        eraser.network = nn.Sequential(*layers)
        for name, value in tree["oracle"].items():
            eraser.oracle.register_buffer(name, value)
        eraser.oracle.facts = {"categorical": False}
        eraser.facts = tree["facts"]
        return eraser


@torch.no_grad()
def _predict(f: Predictor, x: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
    if isinstance(f, nn.Sequential):
        x = x.to(next(f.parameters()).dtype)
    found = f(x)
    return found[:, None] if found.ndim == 1 else found


def _network(probe: Probe, labels: bool) -> nn.Sequential:
    """The trained network as a module, with the scaler in its first layer."""
    model = probe.model
    scale, mean = torch.from_numpy(probe.scale).double(), torch.from_numpy(probe.mean).double()
    weights = [torch.from_numpy(w).double() for w in model.coefs_]
    biases = [torch.from_numpy(b).double() for b in model.intercepts_]
    biases[0] = biases[0] - (mean / scale) @ weights[0]
    weights[0] = weights[0] / scale[:, None]
    if labels and weights[-1].shape[1] == 1:
        # one logit for two classes
        weights[-1] = torch.cat([torch.zeros_like(weights[-1]), weights[-1]], 1)
        biases[-1] = torch.cat([torch.zeros_like(biases[-1]), biases[-1]])
    layers: list[nn.Module] = []
    for weight, bias in zip(weights, biases, strict=True):
        layers += [_linear(weight.T, bias), nn.ReLU()]
    layers[-1] = nn.Softmax(-1)
    return nn.Sequential(*(layers if labels else layers[:-1]))


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return layer.requires_grad_(False)
