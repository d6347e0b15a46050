"""English that every Python installation carries.

`topics` is the reference text behind `help()` (`pydoc_data.topics`): the default text of an audit, and never part of an
organism's training. `comments` are the docstrings and comments of the standard library, which `organism:pebble` read.
`sources` is the code of the same files, text of another kind.
"""

import ast
import io
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data", "__pycache__"}


def topics() -> list[str]:
    """The `help()` topics of the running Python, one document each, sorted by name."""
    from pydoc_data.topics import topics as by_name

    return [by_name[name].strip() + "\n" for name in sorted(by_name)]


def comments(root: Path | None = None) -> Iterator[str]:
    """Docstrings and comment blocks of the standard library, one document per source file, in path order.

    `root` is the folder to read instead of the running Python's library. Files without text are left out, as are
    installed packages, tests and `pydoc_data`.
    """
    for source in sources(root):
        try:
            blocks = sorted(_docstrings(source) + _comment_blocks(source))
        except (SyntaxError, tokenize.TokenError):
            continue
        if blocks:
            yield "\n\n".join(text for _, text in blocks) + "\n"


def sources(root: Path | None = None) -> Iterator[str]:
    """The source code of the standard library, one document per file that is not empty, in path order.

    `root` and what is left out are as in `comments`.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    for path in sorted(root.rglob("*.py")):
        if _NOT_LIBRARY.intersection(path.relative_to(root).parts):
            continue
        try:
            source = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if source.strip():
            yield source


def _docstrings(source: str) -> list[tuple[int, str]]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and text.strip():
                found.append((node.body[0].lineno, text.strip()))
    return found


def _comment_blocks(source: str) -> list[tuple[int, str]]:
    blocks: list[tuple[int, str]] = []
    last = -2
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        text, line = token.string.lstrip("#").removeprefix(" ").rstrip(), token.start[0]
        if line == last + 1:
            start, so_far = blocks[-1]
            blocks[-1] = (start, so_far + "\n" + text)
        elif text:
            blocks.append((line, text))
        else:
            continue
        last = line
    return [(line, text.strip()) for line, text in blocks if len(text.split()) > 2]
