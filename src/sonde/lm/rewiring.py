"""What blocks are given and return, and having places in the network run other functions than their blocks' own.

Blocks take the stream as their first argument or as `hidden_states`, and return it alone or first in a tuple. A place
is rewired by standing in for the module's `forward`: hooks, and so sites, stay with the place.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from sonde.lm.model import LanguageModel

Forward = Callable[..., Any]


@contextmanager
def rewired(lm: LanguageModel, forwards: Mapping[int, Forward]) -> Iterator[None]:
    """Have places run `forwards` instead of their blocks; undone at the end, also on an error."""
    blocks = lm.structure.blocks
    before = {place: blocks[place].__dict__.get("forward") for place in forwards}
    try:
        for place, forward in forwards.items():
            blocks[place].forward = forward
        yield
    finally:
        for place, forward in before.items():
            if forward is None:
                del blocks[place].forward
            else:
                blocks[place].forward = forward


def stream_in(args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
    """The stream among what a block is given."""
    return args[0] if args else kwargs["hidden_states"]


def stream_of(out: Any) -> Tensor:
    """The stream in what a block returns."""
    return out[0] if isinstance(out, tuple | list) else out


def with_stream(out: Any, stream: Tensor) -> Any:
    """What a block returns, with another stream in it."""
    return type(out)((stream, *out[1:])) if isinstance(out, tuple | list) else stream
