import json
from pathlib import Path

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sonde.data.python_docs import topics
from sonde.data.text import describe, documents, text_hash
from sonde.errors import SondeError

texts = st.lists(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=40).filter(lambda text: text.strip()),
    min_size=1,
    max_size=6,
)


@pytest.fixture(autouse=True)
def no_bars():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@settings(max_examples=15, deadline=None)
@given(texts)
def test_the_same_documents_come_out_of_every_kind_of_source(tmp_path_factory, given):
    folder = tmp_path_factory.mktemp("sources")
    rows = [{"n": n, "text": text} for n, text in enumerate(given)]
    data = datasets.Dataset.from_list(rows)
    data.to_parquet(folder / "rows.parquet")
    data.save_to_disk(folder / "saved")
    datasets.DatasetDict({"test": data}).save_to_disk(folder / "splits")
    sources = [
        given,
        iter(given),
        rows,
        data,
        data.to_iterable_dataset(),
        write(folder / "rows.jsonl", "\n\n".join(map(json.dumps, rows))),
        write(folder / "strings.jsonl", "\n".join(map(json.dumps, given))),
        write(folder / "rows.json", json.dumps(rows)),
        write(folder / "columns.json", json.dumps({"text": given})),
        write(folder / "lines.json", "\n".join(map(json.dumps, rows))),
        folder / "rows.parquet",
        folder / "saved",
        str(folder / "splits") + ":test",
    ]
    for source in sources:
        assert list(documents(source)) == given


@settings(max_examples=30, deadline=None)
@given(texts, st.integers(1, 60))
def test_a_limit_takes_the_first_characters(given, limit):
    assert "".join(documents(given, limit_chars=limit)) == "".join(given)[:limit]


@pytest.mark.parametrize("limit", range(1, 9))
def test_a_limited_file_is_cut_between_characters(tmp_path, limit):
    path = write(tmp_path / "a.txt", "\ufeffaé€😀b".encode())
    assert list(documents(path, limit_chars=limit)) == ["aé€😀b"[:limit]]


def test_no_source_means_the_help_topics():
    assert list(documents()) == topics()
    assert describe() == "pydoc topics"


def test_a_folder_is_read_in_the_order_of_paths_and_hidden_files_are_not_read(tmp_path):
    write(tmp_path / "b.txt", "second")
    write(tmp_path / "a" / "z.jsonl", '"first"')
    write(tmp_path / "c.TXT", "third")
    write(tmp_path / ".d" / "hidden.txt", "hidden")
    write(tmp_path / "e.py", "no text")
    assert list(documents(tmp_path)) == ["first", "second", "third"]


def test_line_ends_and_byte_order_marks_are_not_part_of_the_text(tmp_path):
    assert list(documents(write(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\ntwo\rthree"))) == ["one\ntwo\nthree"]
    assert list(documents(write(tmp_path / "a.jsonl", b'\xef\xbb\xbf"one"\r\n"two"'))) == ["one", "two"]


def test_documents_without_text_are_left_out(tmp_path):
    assert list(documents(["", "a", " \n", {"text": None}, {"text": "b"}])) == ["a", "b"]


def test_a_column_can_be_named_with_the_source(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"body": "words", "text": "other"}')
    assert list(documents(f"{path}::body")) == ["words"]
    assert list(documents(path, column="body")) == ["words"]


def test_a_path_that_exists_wins_over_a_split(tmp_path):
    assert list(documents(write(tmp_path / "a:b.txt", "words"))) == ["words"]


def test_a_name_on_the_hub_is_streamed(monkeypatch):
    asked = []

    def load_dataset(*args, **options):
        asked.append((args, options))
        return datasets.IterableDataset.from_generator(lambda: ({"body": f"row {n}"} for n in range(10**12)))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = documents("owner/name/config:test:body")
    assert [next(found), next(found)] == ["row 0", "row 1"]
    assert asked == [(("owner/name", "config"), {"split": "test", "streaming": True})]
    assert next(documents("owner/name", column="body")) == "row 0"
    assert asked[1] == (("owner/name", None), {"split": "train", "streaming": True})


def test_a_name_that_is_neither_here_nor_on_the_hub_is_one_line(monkeypatch):
    def load_dataset(*args, **options):
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        SondeError, match=r"^owner/name is no file or folder here.*Couldn't reach 'owner/name' on the Hub$"
    ):
        documents("owner/name")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", "", r"empty\.txt: no text"),
        ("blank.txt", " \n\n", r"blank\.txt: no text"),
        ("empty.json", "", r"empty\.json: no text"),
        ("none.json", "[]", r"none\.json: no text"),
        ("bad.txt", b"good \xff", r"bad\.txt is not UTF-8: byte 0xff at offset 5;"),
        ("bad.jsonl", b'"good"\n"\xe9"', r"bad\.jsonl is not UTF-8: byte 0xe9 at offset 8;"),
        ("bom.txt", b"\xef\xbb\xbfab\xff", r"byte 0xff at offset 5;"),
        ("utf16.txt", "words".encode("utf-16"), r"byte 0xff at offset 0;"),
        ("line.jsonl", '"good"\n\n{"text": "a"\n', r"line\.jsonl, line 3 is not JSON: "),
        ("line.json", '[\n"good",\n"a', r"line\.json, line 3 is not JSON: "),
        ("column.jsonl", '{"body": "a", "n": 1}', r"line 1 has no column 'text'; its columns are body, n: name one as"),
        ("column.json", '[{"body": "a"}]', r"entry 1 has no column 'text'; its columns are body"),
        ("number.jsonl", '{"text": 3}', r"line 1, column 'text': expected a string, found int"),
        ("list.jsonl", "[1]", r"line 1: expected a string, found list"),
        ("half.jsonl", r'"\ud800"', r"half a surrogate pair"),
        ("damaged.parquet", "PAR1", r"damaged\.parquet is damaged or not a parquet file"),
    ],
)
def test_what_is_wrong_in_a_file_is_one_line_that_says_where(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(SondeError, match=message) as caught:
        list(documents(path))
    assert "\n" not in str(caught.value)


def test_a_column_that_a_data_set_lacks_is_answered_with_those_it_has(tmp_path):
    data = datasets.Dataset.from_dict({"body": ["a"], "n": [1]})
    data.to_parquet(tmp_path / "a.parquet")
    data.save_to_disk(tmp_path / "saved")
    for source in (data, tmp_path / "a.parquet", tmp_path / "saved"):
        with pytest.raises(SondeError, match="no column 'text'; its columns are body, n"):
            list(documents(source))


def test_a_split_that_does_not_exist_is_answered_with_those_that_do(tmp_path):
    data = datasets.Dataset.from_dict({"text": ["a"]})
    datasets.DatasetDict({"test": data, "valid": data}).save_to_disk(tmp_path / "splits")
    with pytest.raises(SondeError, match="no split 'train'; it has test, valid"):
        documents(tmp_path / "splits")
    data.save_to_disk(tmp_path / "one")
    with pytest.raises(SondeError, match="has no splits"):
        documents(f"{tmp_path / 'one'}:train")
    with pytest.raises(SondeError, match="has no splits"):
        documents(f"{write(tmp_path / 'a.txt', 'words')}:train")


def test_a_damaged_data_set_is_one_line(tmp_path):
    write(tmp_path / "saved" / "dataset_info.json", "{}")
    with pytest.raises(SondeError, match="damaged data set"):
        documents(tmp_path / "saved")


@pytest.mark.parametrize(
    "name", ["nowhere.txt", "/nowhere/at/all", "./nowhere", "some words to read", "", " ", ":test", "a\nb"]
)
def test_a_source_that_does_not_exist_is_one_line_before_anything_is_read(name):
    with pytest.raises(SondeError) as caught:
        documents(name)
    assert "\n" not in str(caught.value)


def test_a_folder_without_text_is_one_line(tmp_path):
    with pytest.raises(SondeError, match=r"holds no text: expected files that end in \.txt"):
        documents(tmp_path)


def test_a_file_that_may_not_be_read_is_one_line(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt", "words")

    def refuse(*args, **options):
        raise PermissionError(13, "Permission denied")

    for method in ("open", "exists"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, method, refuse)
            with pytest.raises(SondeError, match=r"a\.txt cannot be read: Permission denied"):
                documents(path)


@pytest.mark.parametrize("source", [b"bytes", 3, {"a": "b"}])
def test_what_is_no_text_is_a_type_error(source):
    with pytest.raises(TypeError, match="text is an iterable of strings"):
        documents(source)


def test_a_list_of_other_things_says_which_entry():
    with pytest.raises(SondeError, match="entry 2: expected a string, found int"):
        list(documents(["a", 1]))
    with pytest.raises(SondeError, match="no text"):
        list(documents([]))
    with pytest.raises(SondeError, match="limit_chars is 0"):
        documents(["a"], limit_chars=0)


def test_sources_have_names_for_reports(tmp_path):
    assert describe(write(tmp_path / "books" / "emma.txt", "words")) == "emma.txt"
    assert describe(tmp_path / "books") == "books"
    assert describe("owner/name:test:body") == "owner/name (test)"
    assert describe(["a", "b"]) == "2 given texts"
    assert describe(["a"]) == "1 given text"
    assert describe(iter(["a"])) == "given texts"


def test_the_hash_is_of_documents_and_not_of_their_concatenation():
    assert text_hash(["ab", "c"]) == text_hash(iter(["ab", "c"]))
    assert len({text_hash(["ab", "c"]), text_hash(["a", "bc"]), text_hash(["abc"]), text_hash([])}) == 4
