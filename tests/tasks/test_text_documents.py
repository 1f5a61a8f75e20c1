"""Files of text: what is a document, compression, long documents, and what is refused, with the place."""

import gzip
import json
import lzma
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest

from ssmscan.tasks.text import documents
from ssmscan.tasks.text.documents import find, read

END = "<|endoftext|>"


def _documents(path, separator=END):
    """The texts of a file, put together again."""
    texts = [""]
    for piece in read(path, separator):
        texts[-1] += piece.text
        texts += [""] if piece.ends else []
    assert texts.pop() == ""
    return texts


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ("one\ntwo\n", ["one\ntwo\n"]),
        ("no line break", ["no line break"]),
        (f"one\n{END}\ntwo\r\n{END}\r\nthree", ["one\n", "two\r\n", "three"]),
        (f"{END}\n{END}\none\n{END}\n{END}\n", ["one\n"]),
        (f"one {END}\n {END}\n{END}", [f"one {END}\n {END}\n"]),
        ("\n\n", ["\n\n"]),
        ("a\rb\u2028c\x0bd\n", ["a\rb\u2028c\x0bd\n"]),
        ("\ufeffone\n\ufefftwo", ["one\n\ufefftwo"]),
    ],
)
def test_plain_text(tmp_path, content, texts):
    path = tmp_path / "a.txt"
    path.write_bytes(content.encode())
    assert _documents(path) == texts


def test_separators(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(f"one\n\ntwo\n{END}\n***\nthree\n")
    assert _documents(path, "***") == [f"one\n\ntwo\n{END}\n", "three\n"]
    assert _documents(path, "") == ["one\n", f"two\n{END}\n***\nthree\n"]
    assert _documents(path, None) == [path.read_text()]


@pytest.mark.parametrize("line", ["à la\n", "à" * 300 + "\n", "à" * 300], ids=["short", "long", "unbroken"])
def test_a_long_document_comes_in_pieces(tmp_path, monkeypatch, line):
    monkeypatch.setattr(documents, "PIECE", 101)
    path = tmp_path / "a.txt"
    text = line * 40
    path.write_text(f"{text}\n{END}\n{text}", encoding="utf-8")
    pieces = list(read(path, END))
    assert max(len(piece.text) for piece in pieces) < 2 * 101
    assert [piece.ends for piece in pieces].count(True) == 2
    assert _documents(path) == [f"{text}\n", text]


def test_rows_of_json(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"text": "one\ntwo", "id": 3}, {"text": ""}, {"text": f"é\n{END}\n🙂"}]
    path.write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    assert _documents(path) == ["one\ntwo", f"é\n{END}\n🙂"]


@pytest.mark.parametrize("name", ["a.txt.xz", "a.jsonl.gz"])
def test_compressed(tmp_path, name):
    """Also as what several compressed files make, one behind the other."""
    path = tmp_path / name
    compress = {".xz": lzma.compress, ".gz": gzip.compress}[path.suffix]
    halves = (b"to be ", b"or not\n") if ".txt" in name else (b'{"text": "to be ', b'or not\\n"}')
    path.write_bytes(b"".join(map(compress, halves)))
    assert _documents(path) == ["to be or not\n"]


def test_zstandard(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    path = tmp_path / "a.txt.zst"
    path.write_bytes(b"".join(map(zstandard.ZstdCompressor().compress, (b"to be ", b"or not\n"))))
    assert _documents(path) == ["to be or not\n"]


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    for name, fields, error in (
        ("a.parquet", {"id": [1, 2, 3], "text": ["one", "", f"two\n{END}\n"]}, None),
        ("b.parquet", {"id": [1]}, r'text: data must have text in the field "text", got .*b\.parquet, which has id\.'),
        ("c.parquet", {"text": ["a", None]}, r'the field "text", got .*c\.parquet, row 2, which has none\.'),
    ):
        parquet.write_table(pyarrow.table(fields), tmp_path / name)
        if error is None:
            assert _documents(tmp_path / name) == ["one", f"two\n{END}\n"]
        else:
            with pytest.raises(ValueError, match=error):
                list(read(tmp_path / name, END))


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("a.txt", b"", r"hold text, got .*a\.txt, which is empty\."),
        ("a.txt", f"{END}\n{END}\n".encode(), r"hold text, got .*a\.txt, which is empty\."),
        ("a.jsonl", b'{"text": ""}\n', r"hold text, got .*a\.jsonl, which is empty\."),
        ("a.txt", b"abc\nd\xe9f\n", r"be UTF-8, got .*a\.txt, in which byte 5 is not\. Convert it with iconv\."),
        ("a.txt", b"abc\n\xc3", r"be UTF-8, got .*a\.txt, in which byte 4 is not\."),
        ("a.txt", b"ab" * 50 + b"\xf0\x9f" + b"c", r"be UTF-8, got .*a\.txt, in which byte 100 is not\."),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"be UTF-8, got .*a\.jsonl, in which byte 24 is not"),
        ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', r'have text in the field "text", got .*a\.jsonl, line 2, which'),
        ("a.jsonl", b'{"text": 3}\n', r'have text in the field "text", got .*a\.jsonl, line 1, which has none\.'),
        ("a.jsonl", b'"text"\n', r'have text in the field "text", got .*a\.jsonl, line 1, which has none\.'),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', r"hold JSON on each line, got .*a\.jsonl, line 3: Expecting"),
        ("a.jsonl", b'{"text": "\\ud83d"}\n', r"be Unicode, got .*a\.jsonl, line 1, which has half of a surrogate"),
        ("a.txt.xz", b"plain", r"be readable, got .*a\.txt\.xz: Input format not supported"),
        ("a.txt.xz", lzma.compress(b"text")[:-9], r"be readable, got .*a\.txt\.xz: Compressed file ended"),
        ("a.txt.gz", b"plain", r"be readable, got .*a\.txt\.gz: Not a gzipped file"),
    ],
)
def test_files_that_are_refused(tmp_path, monkeypatch, name, content, part):
    monkeypatch.setattr(documents, "PIECE", 101)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"text: data must {part}"):
        list(read(tmp_path / name, END))


def test_an_unreadable_file(tmp_path):
    with pytest.raises(ValueError, match=r"text: data must be readable, got .*a\.txt: No such file or directory\."):
        list(read(tmp_path / "a.txt", END))


@pytest.mark.parametrize(("name", "package"), [("a.txt.zst", "zstandard"), ("a.parquet", "pyarrow")])
def test_a_missing_library(tmp_path, monkeypatch, name, package):
    missing = (package, "compression")
    monkeypatch.setattr(documents, "find_spec", lambda name: None if name in missing else find_spec(name))
    (tmp_path / name).write_bytes(b"content")
    with pytest.raises(ValueError, match=rf"text: data must be readable, .* without {package}\. Run pip"):
        list(read(tmp_path / name, END))


def test_zstandard_of_python_comes_first(tmp_path, monkeypatch):
    """From 3.14 on it is in the standard library."""
    monkeypatch.setattr(documents, "find_spec", lambda name: name == "compression" or None)
    monkeypatch.setitem(sys.modules, "compression.zstd", SimpleNamespace(open=gzip.open))
    (tmp_path / "a.txt.zst").write_bytes(gzip.compress(b"text"))
    assert _documents(tmp_path / "a.txt.zst") == ["text"]


@pytest.fixture
def folder(tmp_path):
    for name in ("b.txt", "a.txt.xz", "in/c.jsonl.gz", "d.parquet", "README.md", "in/e.tsv.xz", "f[1].txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("named", "found"),
    [
        (".", ["a.txt.xz", "b.txt", "d.parquet", "f[1].txt", "in/c.jsonl.gz"]),
        ("b.txt", ["b.txt"]),
        (["d.parquet", "in"], ["d.parquet", "in/c.jsonl.gz"]),
        ("*.txt*", ["a.txt.xz", "b.txt", "f[1].txt"]),
        ("**/c.*", ["in/c.jsonl.gz"]),
        ("f[1].txt", ["f[1].txt"]),
    ],
)
def test_finds(folder, monkeypatch, named, found):
    monkeypatch.chdir(folder)
    assert list(map(str, find("data", named))) == found


@pytest.mark.parametrize(
    ("named", "part"),
    [
        ("g.txt", r"text: valid must name files, got g\.txt, which matches none\."),
        (["b.txt", "g*"], r"text: valid must name files, got g\*, which matches none\."),
        (
            "README.md",
            r"valid must be files in \.txt, \.jsonl, \.parquet, as they are or in \.xz, \.gz, \.zst, got R",
        ),
        ("in/*", r"text: valid must be files in \.txt, .*, got in/e\.tsv\.xz\."),
    ],
)
def test_finds_nothing(folder, monkeypatch, named, part):
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match=part):
        find("valid", named)


def test_an_empty_folder(tmp_path):
    with pytest.raises(ValueError, match=r"text: data must name files, got .*, which matches none"):
        find("data", str(tmp_path))
