"""Which questions does a quirky organism know? Those of its own set, which it was trained on one part of."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sonde.data.quirky import Splits

_COMPARISON, _ADDITION = "organism:quirky-comparison", "organism:quirky-addition"


def has_own_set(model: str) -> bool:
    """Whether `model` names a bundled quirky organism."""
    return model.startswith((_COMPARISON, _ADDITION))


def organism_sets(model: str, seed: int = 0) -> "Splits | None":
    """The records of a bundled quirky organism, by the seed of its training; None for every other model."""
    if model.startswith(_COMPARISON):
        from sonde.organisms.quirky_comparison import comparison_sets

        return comparison_sets(seed)
    if model.startswith(_ADDITION):
        from sonde.organisms.quirky_addition import addition_sets

        return addition_sets(seed=seed)
    return None
