"""Errors that a user can act on: one line that says what was given, what was expected and what to do."""


class SondeError(Exception):
    """Base of all errors that Sonde raises about its input. The command line prints it as one line and exits with 2."""


class MissingExtra(SondeError):
    """A function needs packages that the core installation leaves out."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} needs an extra: pip install 'sonde[{extra}]'")
