"""Types of the options that several studies share: what the command line calls their values in its help."""

from pathlib import Path
from typing import Annotated

from tyro.conf import arg

Model = Annotated[str, arg(metavar="MODEL")]
Text = Annotated[str | None, arg(metavar="TEXT")]
Folder = Annotated[Path | None, arg(metavar="FOLDER")]
Names = Annotated[tuple[str, ...] | None, arg(metavar="NAME ...")]
Name = Annotated[str | None, arg(metavar="NAME")]
Count = Annotated[int, arg(metavar="N")]
