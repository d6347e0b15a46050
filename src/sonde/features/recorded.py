"""Does a dictionary belong here? The model, the tokenizer, the sites and the widths that it was trained on and for."""

import warnings

from sonde.errors import SondeError
from sonde.features.activation_rows import matched
from sonde.features.dictionary import Dictionary
from sonde.features.token_matrix import tokenizer_hash
from sonde.lm.model import LanguageModel


def warn_of_another_model(dictionary: Dictionary, lm: LanguageModel) -> None:
    """Warn, with both names, where a dictionary was made for another model or another tokenizer than those of `lm`.

    By their hashes where they are recorded, otherwise by the model's name without its owner.
    """
    made_for = dictionary.model or "a model without a name"
    if dictionary.model_hash is not None:
        same = dictionary.model_hash == lm.hash
    else:
        same = dictionary.model is None or _short(dictionary.model) == _short(lm.name)
    if not same:
        warnings.warn(f"the dictionary was made for {made_for} and is used on {lm.name}", stacklevel=3)
    stored = dictionary.tokenizer_hash
    if stored is not None and lm.tokenizer is not None and stored != (given := tokenizer_hash(lm.tokenizer)):
        warnings.warn(
            f"the dictionary was made for the tokenizer of {made_for} ({stored[:8]}) and is used with that of "
            f"{lm.name} ({given[:8]})",
            stacklevel=3,
        )


def places(
    dictionary: Dictionary, lm: LanguageModel, *, site: str | None = None, target: str | None = None
) -> tuple[str, str]:
    """Where a dictionary reads and where its output belongs: as recorded, or as given where nothing is.

    Raises `SondeError` where neither says, for sites that `lm` does not have, for a transcoder without a target of its
    own, whose output is no reconstruction of its input, and for a crosscoder.
    """
    if dictionary.design.streams:
        raise SondeError(f"{dictionary!r} is a crosscoder of several sites: metrics are of dictionaries of one")
    read, to = site or dictionary.site, target or dictionary.target
    if read is None:
        raise SondeError(f"{dictionary!r} has no recorded site: give site=, such as resid_post.3")
    if dictionary.design.transcodes and to in (None, read):
        raise SondeError(
            f"{dictionary!r} is a transcoder and cannot be evaluated as an autoencoder of {read}: give target=, the "
            "site that it predicts"
        )
    if not dictionary.design.transcodes and to not in (None, read):
        raise SondeError(f"{dictionary!r} is an autoencoder of {read}: it has no target {to}")
    for name in (read, to or read):
        found = matched(lm, name)
        if found != (name,):
            raise SondeError(f"{name!r} is not one site but {', '.join(found)}")
    return read, to or read


def _short(model: str) -> str:
    """A model's name without its owner, in small letters."""
    return model.rstrip("/").rsplit("/", 1)[-1].lower()
