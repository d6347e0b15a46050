"""What the guide shows is what happens: its code runs, top to bottom, on the bundled model."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def python_blocks(page):
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_the_guide_runs(capsys):
    names = {}
    blocks = python_blocks("docs/guide.md")
    assert len(blocks) >= 5
    for block in blocks:
        exec(compile(block, "docs/guide.md", "exec"), names)
    assert "6 layers" in capsys.readouterr().out


def test_the_five_lines_of_the_readme_run(capsys):
    (block,) = python_blocks("README.md")
    exec(compile(block, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()
