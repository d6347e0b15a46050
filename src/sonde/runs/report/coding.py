"""A token view as bytes: small integers in planes, compressed, about a fifteenth of the same numbers as JSON.

The header (JSON) names the sizes and the strings that occur, in order of first use. The payload holds little-endian
unsigned arrays in a fixed order: tokens [T], top-k [L, T, K] (indices of those strings), -log2 p [L, T, K] in steps of
1/2048 bit, place of the true token among the top-k [L, T] (0 = absent), each statistic [L, T] or [T] in steps of the
header's `step`, ranks [L, T]. Arrays wider than a byte are stored as planes, all lowest bytes first; the whole is
gzipped without a time stamp, so that equal views have equal bytes. The largest value of each type stands for a gap.
"""

import base64
import gzip
import math
import re
from typing import Any

import numpy as np

from sonde.runs.blocks import Statistic, TokenView
from sonde.runs.report import token_text

BITS_PER_STEP = 2048
STEPS = {"sequential": 7, "diverging": 9}


def encode(view: TokenView) -> tuple[dict[str, Any], str]:
    """The header and the base64 payload of a view."""
    strings: dict[str, int] = {}
    tokens = np.array([strings.setdefault(text, len(strings)) for text in view.tokens])
    top, log2p, hits = _predictions(view, strings)
    wide = "<u4" if len(strings) > 0xFFFE else "<u2"
    statistics = [_statistic(view, statistic) for statistic in view.statistics]
    arrays = [_planes(tokens, wide), _planes(top, wide), _planes(log2p, "<u2"), _planes(hits, "u1")]
    arrays += [_planes(values, "<u2") for _, values in statistics]
    if view.rank is not None:
        arrays.append(_planes(np.clip(view.rank, 0, 0xFFFF), "<u2"))
    header = {
        "T": len(view.tokens),
        "L": len(view.sites),
        "K": int(top.shape[2]),
        "sites": list(view.sites),
        "stats": [described for described, _ in statistics],
        "ranked": view.rank is not None,
        "wide": wide == "<u4",
        "vocab": [token_text.label(text) for text in strings],
        "names": {str(i): token_text.name(text) for text, i in strings.items() if token_text.name(text)},
        "start": [view.start[0] % len(view.tokens), view.start[1] % len(view.sites)],
    }
    packed = gzip.compress(b"".join(arrays), compresslevel=9, mtime=0)
    return header, base64.b64encode(packed).decode()


def first_colours(view: TokenView) -> list[str]:
    """The colour class of every token before any script has run: the first statistic at the first selected layer."""
    statistic = view.statistics[0]
    values = np.asarray(statistic.values, dtype=float)
    row = values if values.ndim == 1 else values[view.start[1]]
    most = _maximum(statistic)
    return [colour_class(float(value), most, statistic.scale) for value in row]


def colour_class(value: float, most: float, scale: str) -> str:
    """The class of the colour step that `value` falls in: s0 to s6, d0 to d8, or "gap"."""
    if not math.isfinite(value):
        return "gap"
    n_steps = STEPS[scale]
    share = value / most if scale == "sequential" else (value / most + 1) / 2
    return f"{scale[0]}{min(n_steps - 1, max(0, math.floor(share * n_steps)))}"


def _predictions(view: TokenView, strings: dict[str, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    shape = (len(view.sites), len(view.tokens))
    if view.top is None or view.top_log2p is None:
        return np.zeros((*shape, 0)), np.zeros((*shape, 0)), np.zeros(shape)
    ids = np.asarray(view.top)
    used, first = np.unique(ids, return_index=True)
    index = {-1: -1}
    for token_id in used[np.argsort(first)].tolist():
        if token_id != -1:
            index[token_id] = strings.setdefault(view.vocabulary[token_id], len(strings))
    top = np.vectorize(index.__getitem__, otypes=[np.int64])(ids) if ids.size else ids
    bits = -np.asarray(view.top_log2p, dtype=float)
    log2p = np.where(np.isfinite(bits), np.clip(np.round(bits * BITS_PER_STEP), 0, 0xFFFE), 0xFFFF)
    if view.target_ids is None:
        return top, log2p, np.zeros(shape)
    same = ids == np.asarray(view.target_ids)[None, :, None]
    return top, log2p, np.where(same.any(axis=2), same.argmax(axis=2) + 1, 0)


def _statistic(view: TokenView, statistic: Statistic) -> tuple[dict[str, Any], np.ndarray]:
    values = np.asarray(statistic.values, dtype=float)
    finite = values[np.isfinite(values)]
    largest = float(np.abs(finite).max()) if finite.size else 1.0
    whole = finite.size > 0 and bool(np.all(finite == np.round(finite))) and largest <= 32766
    step = 1.0 if whole else 10.0 ** (math.floor(math.log10(largest or 1.0)) - 3)
    if statistic.scale == "sequential" and finite.size and finite.min() < 0:
        raise ValueError(
            f"token view {view.id!r}: statistic {statistic.name!r} has negative values; give it scale='diverging'"
        )
    offset = 32767 if statistic.scale == "diverging" else 0
    with np.errstate(invalid="ignore"):
        coded = np.where(np.isfinite(values), np.clip(np.round(values / step) + offset, 0, 0xFFFE), 0xFFFF)
    most = _maximum(statistic)
    described = {
        "name": statistic.name,
        "key": re.sub(r"[^a-z0-9]+", "-", statistic.name.lower()).strip("-") or "value",
        "unit": statistic.unit,
        "scale": statistic.scale,
        "max": most,
        "beyond": largest > most * (1 + 1e-9),
        "step": step,
        "layered": values.ndim == 2,
    }
    return described, coded


def _maximum(statistic: Statistic) -> float:
    if statistic.max is not None:
        return float(statistic.max)
    values = np.abs(np.asarray(statistic.values, dtype=float))
    finite = values[np.isfinite(values)]
    most = float(np.quantile(finite, 0.99)) if finite.size else 0.0
    return float(f"{most:.2g}") if most > 0 else 1.0


def _planes(values: np.ndarray, dtype: str) -> bytes:
    width = np.dtype(dtype).itemsize
    coded = np.asarray(values).astype(np.int64) & (256**width - 1)  # -1, a gap, becomes the largest value
    flat = np.ascontiguousarray(coded.reshape(-1).astype(dtype)).view(np.uint8)
    return flat.reshape(-1, width).T.tobytes()
