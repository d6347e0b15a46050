"""Text of every Python installation: what is prose stays prose, what is code is code."""

import ast

from sonde.data.python_docs import comments, sources


def test_sources_are_the_files_that_comments_come_from(tmp_path):
    (tmp_path / "a.py").write_text('"""What this module is for."""\nx = 1  # a comment of four words\n')
    (tmp_path / "b.py").write_text("y = 2\n")
    (tmp_path / "empty.py").write_text("\n")
    (tmp_path / "latin.py").write_bytes("café".encode("latin-1"))
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "c.py").write_text("z = 3\n")
    assert list(sources(tmp_path)) == [(tmp_path / name).read_text() for name in ("a.py", "b.py")]
    assert list(comments(tmp_path)) == ["What this module is for.\n\na comment of four words\n"]


def test_the_standard_library_is_code():
    first = next(iter(sources()))
    assert ast.parse(first)
