import sys

import pytest

from sonde.catalogue import Catalogue
from sonde.errors import SondeError

STUDY = '''
"""A study."""
from dataclasses import dataclass
from {package}.register import study

@dataclass
class Config:
    size: int = 3

@study("{name}", summary="what it asks", paper="Someone 2024")
def run(config: Config):
    return config.size
'''
REGISTER = """
from sonde.catalogue import Catalogue
CATALOGUE = Catalogue({package!r}, decorator="study", noun="study")
def study(name, *, summary, paper=None):
    def enter(run):
        CATALOGUE.register(name, run)
        return run
    return enter
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An importable package with a catalogue and the studies `beta` and `alpha`."""
    name = f"house_{tmp_path.name.replace('-', '_')}"
    folder = tmp_path / name
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "register.py").write_text(REGISTER.format(package=name))
    for study in ("beta", "alpha"):
        (folder / f"{study}.py").write_text(STUDY.format(package=name, name=study))
    monkeypatch.syspath_prepend(tmp_path)
    yield folder
    for module in [m for m in sys.modules if m.startswith(name)]:
        del sys.modules[module]


def test_listing_is_alphabetical_and_imports_no_entry(package):
    catalogue = Catalogue(package.name, decorator="study", noun="study")
    assert list(catalogue.entries) == ["alpha", "beta"]
    assert catalogue.entries["beta"].summary == "what it asks"
    assert catalogue.entries["beta"].paper == "Someone 2024"
    assert f"{package.name}.beta" not in sys.modules


def test_an_entry_comes_with_its_options_and_its_function(package):
    catalogue = __import__(f"{package.name}.register", fromlist=["CATALOGUE"]).CATALOGUE
    found = catalogue.get("alpha")
    assert found.run(found.config(size=7)) == 7


def test_an_unknown_name_is_answered_with_what_there_is(package):
    catalogue = Catalogue(package.name, decorator="study", noun="study")
    with pytest.raises(SondeError, match=r"no study 'bta', did you mean 'beta'\? \(there are: alpha, beta\)"):
        catalogue.get("bta")


def test_two_entries_of_one_name_are_refused(package):
    (package / "gamma.py").write_text(STUDY.format(package=package.name, name="beta"))
    with pytest.raises(ValueError, match=r"'beta' is in .*\.(beta|gamma) and in"):
        _ = Catalogue(package.name, decorator="study", noun="study").entries


def test_a_decorator_that_cannot_be_read_without_running_it_is_refused(package):
    text = STUDY.format(package=package.name, name="delta").replace('"what it asks"', "str(1)")
    (package / "delta.py").write_text(text)
    with pytest.raises(TypeError, match=r"delta:\d+: @study takes a literal name"):
        _ = Catalogue(package.name, decorator="study", noun="study").entries
