"""What a package offers, known by name without importing it.

Studies and organisms are functions under a decorator, `@study("tuned-lens", summary="…")`. A catalogue reads the
decorators from the sources of a package, so that listing everything costs a few milliseconds and no import of torch;
the module of an entry is imported when that entry is asked for. The decorator's arguments are therefore literals.
"""

import ast
import difflib
import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from typing import Any, get_type_hints

from sonde.errors import SondeError


@dataclass(frozen=True)
class Entry:
    """One line of a catalogue: the name, what it is in one sentence, the paper it follows, the module that has it."""

    name: str
    summary: str
    paper: str | None
    module: str


@dataclass(frozen=True)
class Registered:
    """A decorated function and the dataclass that holds its options: the type of its only argument."""

    name: str
    config: type
    run: Callable[[Any], Any]


class Catalogue:
    """The functions of `package` under the decorator called `decorator`; `noun` is what errors call them.

    An instance is made by `register`, which the package wraps as its decorator.
    """

    def __init__(self, package: str, *, decorator: str, noun: str) -> None:
        self.package, self.decorator, self.noun = package, decorator, noun
        self._loaded: dict[str, Registered] = {}

    @functools.cached_property
    def entries(self) -> dict[str, Entry]:
        """All entries by name, in alphabetical order. Nothing is imported.

        Raises `TypeError` when a decorator's arguments are not literals, `ValueError` when two entries share a name.
        """
        found: dict[str, Entry] = {}
        for file in resources.files(self.package).iterdir():
            if not file.name.endswith(".py"):
                continue
            module = f"{self.package}.{file.name.removesuffix('.py')}"
            for node in ast.parse(file.read_text(encoding="utf-8")).body:
                for call in getattr(node, "decorator_list", ()):
                    if isinstance(call, ast.Call) and getattr(call.func, "id", None) == self.decorator:
                        entry = self._entry(call, module)
                        if entry.name in found:
                            raise ValueError(
                                f"{self.noun} {entry.name!r} is in {found[entry.name].module} and in {module}"
                            )
                        found[entry.name] = entry
        return dict(sorted(found.items()))

    def _entry(self, call: ast.Call, module: str) -> Entry:
        try:
            (name,) = (ast.literal_eval(argument) for argument in call.args)
            given = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
            return Entry(name, given["summary"], given.get("paper"), module)
        except (ValueError, KeyError) as error:
            line = f"{module}:{call.lineno}"
            raise TypeError(f"{line}: @{self.decorator} takes a literal name and a literal summary=") from error

    def register(self, name: str, run: Callable[[Any], Any]) -> None:
        """Note that `run`, a function of one argument annotated with a dataclass, is the entry `name`."""
        (parameter,) = inspect.signature(run).parameters
        self._loaded[name] = Registered(name, get_type_hints(run, include_extras=True)[parameter], run)

    def entry(self, name: str) -> Entry:
        """The line of `name`. Raises `SondeError` that lists what exists."""
        if name not in self.entries:
            close = difflib.get_close_matches(name, self.entries, n=1)
            hint = f", did you mean {close[0]!r}?" if close else ""
            raise SondeError(f"there is no {self.noun} {name!r}{hint} (there are: {', '.join(self.entries) or 'none'})")
        return self.entries[name]

    def get(self, name: str) -> Registered:
        """Import the module of `name` and return its function and config. Raises `SondeError` for an unknown name."""
        importlib.import_module(self.entry(name).module)
        return self._loaded[name]
