"""Documents: read from every kind of file, cleaned, each once, and refused where they are none."""

import json
import random
import zipfile

import pytest

from fastserve_jax.errors import DataError
from fastserve_jax.lifecycle import documents as module
from fastserve_jax.lifecycle.documents import Counts, Document, clean, documents


def read(*paths):
    counts = Counts()
    return list(documents(paths, counts)), counts


def test_text_is_apart_by_marks_or_blank_lines(tmp_path):
    marked, plain = tmp_path / "a.txt", tmp_path / "b.txt"
    marked.write_text("One.\n\nStill one.<|endoftext|>Two.<|endoftext|>")
    plain.write_text("Three.\r\n\r\nFour,\nstill four.\n")
    found, counts = read(marked, plain)
    assert [d.text for d in found] == ["One.\n\nStill one.", "Two.", "Three.", "Four,\nstill four."]
    assert (counts.read, counts.empty, counts.repeated, counts.kept) == (5, 1, 0, 4)


@pytest.mark.parametrize("between", ["<|endoftext|>", "\n\n", "\r\n \r\n"])
def test_where_blocks_end_says_nothing(tmp_path, monkeypatch, between):
    path = tmp_path / "a.txt"
    texts = [f"text number {number}" for number in range(40)]
    path.write_bytes(between.join(texts).encode())
    for size in (14, 15, 16, 17, 64, 1 << 20):
        monkeypatch.setattr(module, "_BLOCK_CHARACTERS", size if size > 60 else 60 + size)
        assert [document.text for document in read(path)[0]] == texts
    monkeypatch.setattr(module, "_MOST_CHARACTERS", 100)
    path.write_text("one " * 100)
    with pytest.raises(DataError, match="a document of more than 100 characters"):
        read(path)


def test_lines_and_tables(tmp_path):
    lines, table = tmp_path / "a.jsonl", tmp_path / "b.csv"
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    every = [{"text": "plain"}, {"messages": turns}, {"prompt": "p", "completion": "c"}]
    every += [{"instruction": "Add", "input": "1 2", "output": "3"}]
    lines.write_text("\n".join(map(json.dumps, every)) + "\n\n")
    table.write_text('text,category\n"Where, pray?",place\n')
    found, _ = read(lines, table)
    assert found[0] == Document("plain")
    assert found[1].messages == tuple(turns)
    assert [m["content"] for m in found[2].messages] == ["p", "c"]
    assert found[3].messages[0]["content"] == "Add\n\n1 2"
    assert found[4] == Document("Where, pray?", label="place")


def test_archives(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("one.txt", "in one")
        archive.writestr("deep/two.jsonl", '{"text": "in two"}')
        archive.writestr("picture.png", b"\x89PNG")
        archive.writestr("__MACOSX/._one.txt", b"\x00\x05\x16\x07\xff")
        archive.writestr("deep/.hidden/three.txt", "three")
    found, _ = read(tmp_path / "a.zip")
    assert [d.text for d in found] == ["in two", "in one"]
    locked = bytearray((tmp_path / "a.zip").read_bytes())
    for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # as encrypted
        begins = -1
        while (begins := locked.find(mark, begins + 1)) >= 0:
            locked[begins + at] |= 1
    (tmp_path / "b.zip").write_bytes(locked)
    with pytest.raises(DataError, match=r"b.zip!deep/two.jsonl: cannot read: .* encrypted"):
        read(tmp_path / "b.zip")


@pytest.mark.parametrize(
    ("name", "data", "wanted"),
    [
        ("a.csv", "\ufefftext,label\nhi,a\n", [Document("hi", label="a")]),
        ("a.csv", "text\n" + "long " * 40_000, [Document("long " * 39_999 + "long")]),
        ("a.jsonl", '\ufeff{"text": "hi", "label": 3}', [Document("hi", label="3")]),
        ("a.jsonl", '{"text": "a\\ud800b", "label": null}', [Document("a?b")]),
        ("a.jsonl", '{"prompt": [{"role": "user", "content": "p"}], "completion": []}', ["p"]),
        ("a.json", '[{"prompt": "p", "completion": "c"},\n{"text": "t"}]', ["p", "c", "t"]),
    ],
)
def test_forms_that_others_write(tmp_path, name, data, wanted):
    (tmp_path / name).write_bytes(data.encode())
    found, _ = read(tmp_path / name)
    if isinstance(wanted[0], str):
        found = [
            said for one in found for said in ([m["content"] for m in one.messages] or [one.text])
        ]
    assert found == wanted


def test_what_differs_in_nothing_that_matters_is_there_once(tmp_path):
    path = tmp_path / "a.jsonl"
    texts = ["The cat sat.", "the  cat\nSAT.", "The cat sat on it.", "The cat sat."]
    others = ["12 + 3", "12 - 3", "C++", "C#", "\U0001f44d", "\U0001f44e"]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts + others))
    found, counts = read(path)
    assert [d.text for d in found] == ["The cat sat.", "The cat sat on it.", *others]
    assert counts.repeated == 2


def test_what_is_nearly_the_same_is_there_once(tmp_path):
    """By Jaccard's measure of runs of five words, worked out in full."""
    rng = random.Random(5)
    first = [rng.choice("abcdefghijklmnopqrstuvwxyz") * rng.randint(2, 4) for _ in range(200)]

    def grams(words):
        return {tuple(words[at : at + 5]) for at in range(len(words) - 4)}

    def alike(words):
        one, other = grams(first), grams(words)
        return len(one & other) / len(one | other)

    close, distant = list(first), list(first)
    for at in (20, 90):
        close[at] = "changed"
    for at in range(10, 200, 12):
        distant[at] = "changed"
    assert alike(close) > 0.9
    assert alike(distant) < 0.5
    path = tmp_path / "a.csv"
    rows = [(first, "x"), (distant, "x"), (close, "x"), (close, "y"), (close[:100], "x")]
    rows += [(["short"], "x"), (["shorter"], "x")]
    path.write_text("text,label\n" + "".join(f"{' '.join(w)},{label}\n" for w, label in rows))
    counts = Counts()
    kept = [document.text for document in documents([path], counts, 0.8)]
    assert kept == [" ".join(words) for at, (words, _) in enumerate(rows) if at != 2]
    assert (counts.near, counts.repeated, counts.kept) == (1, 0, 6)


def test_the_same_text_of_two_labels_is_two(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,label\nwell,good\nwell,bad\n")
    assert len(read(path)[0]) == 2


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("e\u0301", "\u00e9"),
        ("a\x00b\x1bc", "abc"),
        ("a  b\t\tc \nd", "a b c\nd"),
        ("    indented  code", "    indented code"),
        ("a\n\n\n\n\nb", "a\n\nb"),
        ("a\r\nb\rc", "a\nb\nc"),
        ("  \n ", ""),
    ],
)
def test_cleaning(given, wanted):
    assert clean(given) == wanted
    assert clean(wanted) == wanted


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"tex', "a.jsonl:2"),
        ("a.jsonl", b'{"words": "x"}', "no field text, content, sentence or messages, but words"),
        ("a.jsonl", b"3", "a.jsonl:1: not an object"),
        ("a.jsonl", b'{"instruction": "x", "output": null}', "output is no text: null"),
        ("a.jsonl", b'{"prompt": [1], "completion": "c"}', r"prompt is no text: \[1\]"),
        ("a.jsonl", b'{"text": "x", "label": ["a"]}', "label is no text"),
        ("a.json", b'[{"text": "x"}, {}]', "a.json: object 2: no field text"),
        ("a.json", b'{"text": "x"}\n{"text": "y"}', "it is a .jsonl"),
        ("a.xml", b"<a>x</a>", r"what ends in .xml is not read, but .jsonl, .* .zip are"),
        ("a.jsonl", b'{"messages": [1]}', "an object with role and content"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl:1"),
        ("a.txt", b"\xff\xfe", "not UTF-8"),
        ("a.zip", b"PK but no", "cannot read"),
    ],
)
def test_what_cannot_be_read_says_where(tmp_path, name, data, reason):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=reason):
        read(tmp_path / name)
    with pytest.raises(DataError, match="nowhere"):
        read(tmp_path / "nowhere.txt")
