"""The command line that makes an organism again, from the options that are not the default ones."""

import dataclasses
import shlex
from typing import Any


def recipe_command(name: str, config: Any, *given: str, left_out: tuple[str, ...] = ()) -> str:
    """`sonde organism train NAME` with what differs from the defaults of the dataclass `config`, but for --out.

    `given` are words that stand before the options, for fields that are `left_out` because they are no plain values.
    """
    default = type(config)()
    keys = [field.name for field in dataclasses.fields(config) if field.name not in ("out", *left_out)]
    options = [
        f"--{key.replace('_', '-')}={getattr(config, key)}"
        for key in keys
        if getattr(config, key) != getattr(default, key)
    ]
    return shlex.join(["sonde", "organism", "train", name, *given, *options])
