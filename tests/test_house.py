"""The house keeps its own rules: floors, size, no word of the machine that it was built on, cheap imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src/sonde"
MODULES = sorted(PACKAGE.rglob("*.py"))
FLOORS = {
    **dict.fromkeys(("errors", "files", "catalogue", "stats", "data"), 0),
    **dict.fromkeys(("lm", "nets", "runs"), 1),
    **dict.fromkeys(("lens", "concepts", "knowledge", "features", "prompts"), 2),
    **dict.fromkeys(("dynamics", "circuits", "rewards", "agents", "people"), 2),
    "organisms": 3,
    "studies": 4,
    **dict.fromkeys(("cli", "__main__", "web"), 5),
}
HEAVY = {"torch", "numpy", "scipy", "sklearn", "transformers", "tokenizers", "datasets", "pyarrow", "polars", "altair"}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> set[str]:
    """The parts of the package that a module imports anywhere, as the word after `sonde.`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno} imports relatively"
            names = [node.module or ""]
        found |= {name.split(".")[1] for name in names if name.startswith("sonde.")}
    return found


@pytest.mark.parametrize("path", [path for path in MODULES if path != PACKAGE / "__init__.py"], ids=name_of)
def test_a_module_imports_only_from_lower_floors_and_its_own_wing(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    floor = FLOORS[own]
    for part in imports(path) - {own}:
        allowed = FLOORS[part] < floor or (floor == 0 and FLOORS[part] == 0) or floor == 5
        assert allowed, f"{name_of(path)} (floor {floor}) imports sonde.{part} (floor {FLOORS[part]})"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_fits_in_one_reading(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) < 450


@pytest.mark.parametrize("path", [path for path in MODULES if path.name != "__main__.py"], ids=name_of)
def test_a_module_with_code_opens_with_a_paragraph(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if tree.body:
        assert ast.get_docstring(tree), f"{name_of(path)} does not say what it answers"


@pytest.mark.parametrize(
    "module", ["sonde", "sonde.cli", "sonde.catalogue", "sonde.studies.audit", "sonde.organisms.registry"]
)
def test_importing_costs_nothing_heavy(module):
    code = f"import sys, {module}; print(*sorted({HEAVY} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_every_public_name_can_be_had():
    import sonde

    for name in sonde.__all__:
        assert getattr(sonde, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = sonde.nonsense


def test_no_file_names_the_machine_it_was_written_on():
    workplace = "/" + "work/"
    texts = [*MODULES, *ROOT.glob("*.*"), *ROOT.glob("Makefile"), *(ROOT / ".ci").glob("*")]
    texts += [path for folder in ("tests", "docs", "benchmarks", "tools") for path in (ROOT / folder).rglob("*.*")]
    for path in texts:
        if path.is_file() and path.suffix in {
            "",
            ".py",
            ".md",
            ".toml",
            ".txt",
            ".yml",
            ".json",
            ".css",
            ".js",
            ".html",
        }:
            assert workplace not in path.read_text(encoding="utf-8"), f"{name_of(path)} has {workplace}"
