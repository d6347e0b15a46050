"""What the pages say of the program comes from the program: help texts and cards are put in while the site is built."""

import contextlib
import io
import re
from typing import Any

_CALL = re.compile(r"^<!-- sonde (?P<line>.*?) -->$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace every `<!-- sonde ARGUMENTS -->` by what that command prints."""
    return _CALL.sub(lambda call: _output(call["line"]), markdown)


def _output(line: str) -> str:
    from sonde.cli import main

    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        main(line.split())
    if not said.getvalue():
        raise RuntimeError(f"`sonde {line}` printed nothing")
    return f"```text\n$ sonde {line}\n{said.getvalue().rstrip()}\n```"
