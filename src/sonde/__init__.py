"""Sonde: look inside trained networks.

>>> import sonde
>>> lm = sonde.load("organism:pebble")
>>> with lm.reading("resid_post.3") as acts:
...     _ = lm("The old man and the")
>>> acts["resid_post.3"].shape  # batch, pos, d_model
torch.Size([1, 5, 192])
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sonde.concepts.affine import AffineEdit
    from sonde.concepts.leace import LeaceEraser
    from sonde.errors import SondeError
    from sonde.lens.tuned import TunedLens
    from sonde.lm.model import LanguageModel
    from sonde.organisms.loading import load
    from sonde.studies.audit import audit

__version__ = "0.1.0"

# Imported on first use, so that `import sonde` and `sonde --help` cost nothing.
_HOMES = {
    "AffineEdit": "sonde.concepts.affine",
    "LeaceEraser": "sonde.concepts.leace",
    "SondeError": "sonde.errors",
    "LanguageModel": "sonde.lm.model",
    "TunedLens": "sonde.lens.tuned",
    "load": "sonde.organisms.loading",
    "audit": "sonde.studies.audit",
}

__all__ = ["AffineEdit", "LanguageModel", "LeaceEraser", "SondeError", "TunedLens", "audit", "load"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sonde' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
