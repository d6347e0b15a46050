"""What is fine-tuned from a bundled organism is kept as its difference from it: a few hundred kilobytes instead of all.

For each parameter, W = W_base + D with D stored as A B (its numerical rank, or the best of a given rank), as the rows
that changed, or as it is, whichever is smallest; parameters that did not change are left out. Numbers are stored in
half precision. Loading adds the difference to the base in float32 and refuses a base of other weights.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sonde.errors import SondeError
from sonde.files import replacing
from sonde.organisms.card import sha256
from sonde.organisms.registry import DIFFERENCE, PREFIX, folder_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sonde.lm.model import LanguageModel

FORMAT = "sonde difference 1"
_RELATIVE = 1e-4  # singular values below this share of the largest are rounding


def save_difference(model: "PreTrainedModel", base: str, folder: str | Path, *, rank: int | None = None) -> float:
    """Write `difference.safetensors`: `model` less the bundled organism `base`, such as `pebble`.

    `rank` bounds the rank of every matrix; by default the whole difference is kept. Returns the share of the squared
    difference that is lost. Raises `SondeError` for a model that is not of the base's shape, or does not differ.
    """
    from sonde.lm.load import load

    start = load(folder_of(base), check=False).model.state_dict()
    state = model.state_dict()
    if {name: part.shape for name, part in state.items()} != {name: part.shape for name, part in start.items()}:
        raise SondeError(f"the model does not have the parameters of organism:{base}: it was not fine-tuned from it")
    tensors: dict[str, Tensor] = {}
    lost = total = 0.0
    seen: set[int] = set()
    for name, tensor in state.items():
        if tensor.data_ptr() in seen:  # tied to one that was kept
            continue
        seen.add(tensor.data_ptr())
        change = tensor.detach().cpu().float() - start[name].float()
        if not change.any():
            continue
        kept = _compressed(change, rank)
        tensors |= {f"{kind}:{name}": part for kind, part in kept.items()}
        total += float(change.square().sum())
        lost += float((change - _expanded(kept, change.shape)).square().sum())
    if not tensors:
        raise SondeError(f"the model is organism:{base} itself: there is no difference to keep")
    about = {"format": FORMAT, "base": base, "base_sha256": sha256(folder_of(base) / "model.safetensors")}
    with replacing(Path(folder) / DIFFERENCE) as beside:
        save_file(tensors, beside, metadata={"sonde": json.dumps(about)})
    return lost / total


def load_difference(folder: str | Path, *, name: str, **options: Any) -> "LanguageModel":
    """The base with the difference in `folder` added; `options` are those of `sonde.lm.load.load`.

    The tokenizer in the folder, where there is one, takes the place of the base's. Raises `SondeError` for a damaged
    file, a base that is not bundled or has other weights, and as `load` does.
    """
    from transformers import AutoTokenizer

    from sonde.lm.load import load
    from sonde.lm.model import LanguageModel

    about, kept = _read(Path(folder) / DIFFERENCE)
    check = options.pop("check", True)
    base = load(folder_of(about["base"]), **{**options, "check": False, "name": f"{PREFIX}{about['base']}"})
    parameters = base.model.state_dict()
    with torch.no_grad():
        for parameter, parts in kept.items():
            weight = parameters[parameter]
            change = _expanded(parts, weight.shape).to(weight.device)
            weight.copy_(weight.float() + change)
    own = (Path(folder) / "tokenizer.json").is_file()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True) if own else base.tokenizer
    lm = LanguageModel(base.model, tokenizer, name=name)
    if check:
        lm.check().raise_if_unusable()
    return lm


def _read(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("sonde", "{}"))
            kept: dict[str, dict[str, Tensor]] = {}
            for key in file.keys():  # noqa: SIM118 - not a dict
                kind, _, parameter = key.partition(":")
                kept.setdefault(parameter, {})[kind] = file.get_tensor(key)
    except (OSError, SafetensorError, ValueError) as error:
        raise SondeError(f"{path} is damaged or not a safetensors file: {error}") from error
    if about.get("format") != FORMAT:
        raise SondeError(f"{path} is a safetensors file but not a difference that Sonde saved")
    if sha256(folder_of(about["base"]) / "model.safetensors") != about["base_sha256"]:
        raise SondeError(f"{path} was made from other weights of organism:{about['base']} than the bundled ones")
    return about, kept


def _compressed(change: Tensor, rank: int | None) -> dict[str, Tensor]:
    """The smallest of: factors, changed rows, everything."""
    dense = {"dense": change.half()}
    if change.ndim != 2:
        return dense
    rows = change.any(1).nonzero()[:, 0]
    u, s, v = torch.linalg.svd(change.double(), full_matrices=False)
    found = int((s > _RELATIVE * s[0]).sum())
    kept = found if rank is None else min(rank, found)
    root = s[:kept].sqrt()
    factors = {
        "left": (u[:, :kept] * root).half().contiguous(),
        "right": (root[:, None] * v[:kept]).half().contiguous(),
    }
    options = [{"rows": rows.int(), "values": change[rows].half()}, factors]
    smallest = min(options, key=_bytes)
    return smallest if _bytes(smallest) < _bytes(dense) else dense


def _expanded(parts: dict[str, Tensor], shape: torch.Size) -> Tensor:
    if "dense" in parts:
        return parts["dense"].float()
    if "left" in parts:
        return parts["left"].float() @ parts["right"].float()
    change = torch.zeros(shape)
    change[parts["rows"].long()] = parts["values"].float()
    return change


def _bytes(parts: dict[str, Tensor]) -> int:
    return sum(part.numel() * part.element_size() for part in parts.values())
