"""Load a language model from a folder or the Hugging Face hub, and refuse what cannot be trusted or read.

Weights come from safetensors. A pickle runs code when it is opened, so it is read only with `allow_pickle`; a weight
that the checkpoint lacks would be random, so it is an error and not a warning.
"""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from sonde.errors import SondeError
from sonde.lm.model import LanguageModel

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".ckpt"}
_SMALL_BYTES = 500_000_000
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    name_or_path: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    check: bool = True,
    name: str | None = None,
) -> LanguageModel:
    """Load a causal language model with its tokenizer.

    Args:
        name_or_path: a folder with `config.json`, or a name on the Hugging Face hub.
        dtype: "float32", "bfloat16" or "float16"; by default float32 on a CPU and the stored type elsewhere.
        device: "cpu", "cuda", "cuda:1" …; by default the CPU.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run model code that comes with the weights.
        allow_pickle: read `pytorch_model.bin` where there is no safetensors file.
        check: measure on random tokens that sites, unembedding and cache do what their names say.
        name: what reports call the model; by default `name_or_path`.

    Raises:
        SondeError: one line that says what is wrong with the path, the files, the architecture or the self-check.

    """
    where = _resolve(str(name_or_path))
    device = _device(device)
    options = {"revision": revision, "trust_remote_code": trust_remote_code, "local_files_only": where.local}
    label = name or str(name_or_path)
    config = _config(where.name, label, options)
    model = _weights(where.name, label, config, _dtype(dtype, device, config), allow_pickle, options)
    lm = LanguageModel(model.to(device), _tokenizer(where.name, label, options), name=label)
    if lm.tokenizer is not None and len(lm.tokenizer) > lm.vocab_size:
        raise SondeError(
            f"{label}: the tokenizer has {len(lm.tokenizer)} entries but the model {lm.vocab_size};"
            " they do not belong together"
        )
    if check:
        lm.check().raise_if_unusable()
    return lm


class _Place:
    def __init__(self, name: str, *, local: bool) -> None:
        self.name, self.local = name, local


def _resolve(name: str) -> _Place:
    if not name.strip():
        raise SondeError("the model's name is empty; give a folder, a name on the hub or organism:NAME")
    folder = Path(name).expanduser()
    if folder.is_file():
        raise SondeError(f"{name} is a file; give the folder that holds config.json and the weights")
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise SondeError(f"{name} has no config.json: it is not a Hugging Face model folder")
        return _Place(str(folder), local=True)
    if not _HUB_NAME.fullmatch(name):
        raise SondeError(f"{name} does not exist")
    return _Place(name, local=False)


def _device(device: str | torch.device | None) -> torch.device:
    try:
        device = torch.device(device or "cpu")
    except RuntimeError as error:
        raise SondeError(f"device {device!r} is not a device: use cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SondeError(
            f"device {str(device)!r} was asked for, but PyTorch sees no CUDA device here: use --device cpu"
        )
    try:
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise SondeError(f"device {str(device)!r} cannot be used here: {_first_line(error).split('. ')[0]}") from error
    return device


def _dtype(dtype: str | torch.dtype | None, device: torch.device, config: Any) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype is None:
        stored = getattr(config, "dtype", None)
        return stored if device.type != "cpu" and isinstance(stored, torch.dtype) else torch.float32
    if dtype not in _DTYPES:
        raise SondeError(f"dtype {dtype!r} is unknown: use one of {', '.join(_DTYPES)}")
    return _DTYPES[dtype]


def _config(name: str, label: str, options: dict[str, Any]) -> Any:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    try:
        config = AutoConfig.from_pretrained(name, **options)
    except (OSError, ValueError, json.JSONDecodeError) as error:
        if options["local_files_only"]:
            raise SondeError(f"{label}/config.json cannot be used: {_first_line(error)}") from error
        raise SondeError(
            f"{label} is not a folder here, and it could not be had from the Hugging Face hub: {_first_line(error)}"
        ) from error
    known = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or "AutoModelForCausalLM" in getattr(
        config, "auto_map", {}
    )
    if config.is_encoder_decoder:
        raise SondeError(
            f"{label} is an encoder-decoder ({config.model_type}); Sonde reads decoder-only language models"
        )
    architectures = config.architectures or []
    decoder = any("CausalLM" in a or "LMHead" in a or "ConditionalGeneration" in a for a in architectures)
    encodes = architectures and not decoder and not getattr(config, "is_decoder", False) and _is_encoder(config)
    if not known or encodes:
        named = ", ".join(architectures) or "no architecture named"
        raise SondeError(
            f"{label} is not a causal language model ({config.model_type}: {named}):"
            " Sonde reads decoders that predict the next token"
        )
    return config


def _is_encoder(config: Any) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def _weights(
    name: str, label: str, config: Any, dtype: torch.dtype, allow_pickle: bool, options: dict[str, Any]
) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    if options["local_files_only"]:
        _refuse_pickle(Path(name), label, allow_pickle)
    try:
        with _progress_only_if_slow(name):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                name,
                config=config,
                dtype=dtype,
                use_safetensors=None if allow_pickle else True,
                output_loading_info=True,
                **options,
            )
        model, info = loaded
    except SafetensorError as error:
        raise SondeError(
            f"{label}: the safetensors file is damaged ({_first_line(error)}): fetch or save it again"
        ) from error
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise SondeError(f"{label}: the weights could not be loaded: {_first_line(error)}") from error
    wrong = [*sorted(info["missing_keys"]), *(str(key) for key in sorted(info["mismatched_keys"]))]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise SondeError(
            f"{label}: the checkpoint lacks or misfits {', '.join(wrong[:3])}{more}: these weights would be random"
        )
    return model


@contextlib.contextmanager
def _progress_only_if_slow(name: str) -> Iterator[None]:
    """No progress bar of transformers for a folder that loads in no time."""
    from transformers.utils import logging

    small = Path(name).is_dir() and sum(path.stat().st_size for path in Path(name).iterdir()) < _SMALL_BYTES
    if not (small and logging.is_progress_bar_enabled()):
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def _refuse_pickle(folder: Path, label: str, allow_pickle: bool) -> None:
    if any(folder.glob("*.safetensors")):
        return
    pickles = [
        path.name for path in sorted(folder.iterdir()) if path.suffix in {".bin", ".pt", ".pth", ".pkl", ".ckpt"}
    ]
    if not pickles:
        raise SondeError(f"{label} has no weights: expected model.safetensors beside config.json")
    if not allow_pickle:
        raise SondeError(
            f"{label} has its weights only as a pickle ({pickles[0]}), which runs code when it is opened:"
            " save it as safetensors, or pass allow_pickle (--allow-pickle) if you trust it"
        )


def _tokenizer(name: str, label: str, options: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    if options["local_files_only"]:
        names = {path.name for path in Path(name).iterdir()}
        if not names & {"tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json", "spiece.model"}:
            return None
    try:
        return AutoTokenizer.from_pretrained(name, **options)
    except Exception as error:
        raise SondeError(f"{label}: the tokenizer could not be loaded: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]
