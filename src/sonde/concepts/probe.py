"""What can a classifier (or regressor) with a given reach read of z in x? Logistic regression, or one hidden layer."""

import warnings
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neural_network import MLPClassifier, MLPRegressor
from torch import Tensor

Reach = Literal["linear", "mlp"]
_HIDDEN = 64
_DEAD = 1e-6  # of the largest deviation


@dataclass(frozen=True)
class Probe:
    """A fitted scikit-learn model of standardised rows, (x - mean) / scale."""

    model: Any
    mean: Float[np.ndarray, " d"]
    scale: Float[np.ndarray, " d"]

    def predict(self, x: Float[Tensor, "n d"]) -> np.ndarray:
        """Labels `[n]`, or values `[n k]`."""
        return self.model.predict((as_real(x) - self.mean) / self.scale)


def fit_probe(x: Float[Tensor, "n d"], z: Tensor, *, reach: Reach, seed: int = 0) -> Probe:
    """A probe of z (labels `[n]`, or values `[n k]`), "linear" or "mlp".

    The network has one hidden layer of 64 and stops when the score on a tenth of the rows no longer rises. Raises
    `ValueError` for another reach.
    """
    labels = z.ndim == 1
    settings: dict[str, Any] = {
        "hidden_layer_sizes": (_HIDDEN,),
        "learning_rate_init": 3e-3,
        "batch_size": min(256, len(x) // 2),
        "max_iter": 60,
        "early_stopping": True,
        "n_iter_no_change": 5,
        "random_state": seed,
    }
    if reach == "linear":
        model = LogisticRegression(max_iter=300) if labels else Ridge(1e-6 * len(x))
    elif reach == "mlp":
        model = MLPClassifier(**settings) if labels else MLPRegressor(**settings)
    else:
        raise ValueError(f"reach {reach!r} is unknown: use linear or mlp")
    rows, targets = as_real(x), z.cpu().numpy()
    mean, scale = rows.mean(0), rows.std(0)
    # A dead coordinate (all-MiniLM has three, of deviation 1e-33 to 3e-9) would get a huge weight in the units of x.
    scale = np.where(scale > _DEAD * scale.max(), scale, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit((rows - mean) / scale, targets[:, 0] if not labels and targets.shape[1] == 1 else targets)
    return Probe(model, mean, scale)


def as_real(x: Float[Tensor, "n d"]) -> Float[np.ndarray, "n width"]:
    """Rows as numpy has them: halves as float32, complex numbers as real and imaginary parts."""
    x = x.detach().cpu()
    if x.is_complex():
        return np.concatenate([x.real.numpy(), x.imag.numpy()], axis=1)
    return x.numpy() if x.element_size() >= 4 else x.float().numpy()
