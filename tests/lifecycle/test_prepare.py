"""Rows out of documents: nothing lost, nothing twice, and the same after an interruption."""

import json

import numpy as np
import pytest

from fastserve_jax.errors import ConfigError, DataError
from fastserve_jax.lifecycle import prepare as module
from fastserve_jax.lifecycle.dataset import Dataset
from fastserve_jax.lifecycle.documents import Document
from fastserve_jax.lifecycle.packing import Packer, end_token, piece_of
from fastserve_jax.lifecycle.prepare import Wanted, prepare
from fastserve_jax.lifecycle.stories import stories, story
from fastserve_jax.lifecycle.vocabulary import train_vocabulary
from fastserve_jax.text.chat import ChatTemplate
from fastserve_jax.text.load import load_tokenizer


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "stories.txt"
    path.write_text("<|endoftext|>".join(stories(60)))
    return path


def made(text, folder, **wanted):
    wanted = {"context": 64, "vocabulary": "bpe:400", "holdout": 0.1, "near": 0.8} | wanted
    return prepare([text], folder, Wanted(**wanted))


def read_back(dataset, part):
    """Documents, by segments that go on from row to row."""
    arrays, texts = dataset.arrays(part), [[]]
    end = end_token(load_tokenizer(dataset.folder / "tokenizer"))
    for tokens, segments, learned in zip(*arrays.values(), strict=True):
        assert (np.diff(segments.astype(int)) >= 0).all()
        for token, counts in zip(tokens, learned, strict=True):
            if not counts:
                continue
            if token == end:
                texts.append([])
            else:
                texts[-1].append(int(token))
    return texts[:-1] if not texts[-1] else texts


@pytest.mark.parametrize("vocabulary", ["bpe:400", "sentencepiece:400"])
def test_every_story_is_read_back(text, tmp_path, vocabulary):
    facts = made(text, tmp_path / "d", vocabulary=vocabulary)
    dataset = Dataset(tmp_path / "d")
    tokenizer = load_tokenizer(tmp_path / "d" / "tokenizer")
    assert tokenizer.vocab_size == facts.vocab_size == 400
    train, valid = (read_back(dataset, part) for part in ("train", "valid"))
    assert 1 < len(valid) < 20
    found = [tokenizer.decode(ids).removeprefix("<s>") for ids in (*train, *valid)]
    assert sorted(found) == sorted(stories(60))


def test_interrupted_or_not_it_is_the_same(text, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_PART_DOCUMENTS", 10)
    whole = made(text, tmp_path / "whole")
    real, calls = module._Maker.arrays, []

    def failing(self, some):
        calls.append(len(some))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, some)

    monkeypatch.setattr(module._Maker, "arrays", failing)
    with pytest.raises(KeyboardInterrupt):
        made(text, tmp_path / "cut")
    with pytest.raises(DataError, match=r"no dataset\.json"):
        Dataset(tmp_path / "cut")
    assert made(text, tmp_path / "cut") == whole
    assert calls == [10] * 7, "three parts were kept"
    for part in ("train", "valid"):
        for name, array in Dataset(tmp_path / "whole").arrays(part).items():
            np.testing.assert_array_equal(array, Dataset(tmp_path / "cut").arrays(part)[name])
    assert made(text, tmp_path / "cut") == whole, "and once more changes nothing"
    with pytest.raises(DataError, match="another dataset"):
        made(text, tmp_path / "cut", context=32)


def test_a_folder_is_of_one_tokenizer(text, tmp_path, monkeypatch):
    one, other = tmp_path / "one", tmp_path / "other"
    for size, folder in ((300, one), (301, other)):
        train_vocabulary(stories(60), "bpe", size, folder)
    wanted, folder = Wanted(64, "", 0.1), tmp_path / "d"

    def failing(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "_join", failing)
        with pytest.raises(DataError, match="d: cannot write: No space left on device"):
            prepare([text], folder, wanted, one)
        with pytest.raises(DataError, match="cannot write"):
            made(text, folder, vocabulary="bpe:280")
    assert prepare([text], folder, wanted, other).vocab_size == 301
    assert load_tokenizer(folder / "tokenizer").vocab_size == 301
    assert sorted(path.name for path in folder.iterdir()) == [
        "dataset.json",
        "tokenizer",
        "train",
        "valid",
    ]
    with pytest.raises(DataError, match="another dataset"):
        prepare([text], folder, wanted, one)
    with pytest.raises(ConfigError, match="either whose --tokenizer"):
        prepare([text], folder, Wanted(vocabulary="bpe:300"), other)
    with pytest.raises(DataError, match="cannot write: Not a directory"):
        made(text, text / "under a file")


def conversation(*said, first="user"):
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[at % 2], "content": content} for at, content in enumerate(said)]


def test_of_a_conversation_answers_are_learned(tmp_path):
    messages = conversation("Hi", "Hello!", "Who?", "Me.")
    path = tmp_path / "a.jsonl"
    every = [messages[:2], messages, messages[:1], conversation("Why? " * 99, "So.")]
    every += [conversation("Long?", "Yes. " * 99)]
    path.write_text("\n".join(json.dumps({"messages": one}) for one in every))
    facts = prepare([path], tmp_path / "d", Wanted(128, "bpe:300", 0.0))
    assert (facts.documents, facts.unanswered, facts.cut) == (3, 2, 1)
    dataset = Dataset(tmp_path / "d")
    tokenizer = load_tokenizer(tmp_path / "d" / "tokenizer")
    arrays = dataset.arrays("train")
    learned = []
    for segment in (0, 1):
        own = arrays["segments"][0] == segment
        ids = arrays["tokens"][0][own & arrays["learned"][0]]
        learned.append(tokenizer.decode([int(id) for id in ids]))
    assert learned == [" Hello!\n", " Hello!\n Me.\n"]


# As Qwen3's: the last answer is written otherwise than those before it.
THINKS = (
    "{% for m in messages %}{% if m.role == 'user' %}<u>{{ m.content }}{% else %}<a>"
    "{% if loop.last %}<think></think>{% endif %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.mark.parametrize(
    ("messages", "template", "wanted"),
    [
        (conversation("Hi", "Yo", "And?", "So."), THINKS, "<think></think>So."),
        (conversation("Hello!", "Hi", "Yo", first="assistant"), None, " Yo\n"),
        (conversation("Hello!", "Hi", first="assistant"), None, ""),
    ],
)
def test_what_cannot_be_told_to_be_an_answer_is_only_read(tmp_path, messages, template, wanted):
    train_vocabulary(iter(["some text"]), "bpe", 257, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    document = Document(messages=tuple(messages))
    piece = piece_of(document, tokenizer, ChatTemplate(tokenizer, template), 0)
    learned = [t for t, counts in zip(piece.tokens, piece.learned, strict=True) if counts]
    assert tokenizer.decode(learned) == wanted
    packer = Packer(512)
    packer.add(piece, whole=True)
    assert (len(packer.rows().tokens), packer.unanswered) == ((1, 0) if wanted else (0, 1))


def test_labels(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,label\ngood day,yes\nbad day,no\n0123456789 abcdefghij,yes\n")
    facts = prepare([path], tmp_path / "d", Wanted(8, "bpe:257", 0.0, "labels"))
    arrays = Dataset(tmp_path / "d").arrays("train")
    assert facts.labels == ("no", "yes")
    assert arrays["labels"].tolist() == [1, 0, 1]
    assert arrays["lengths"].tolist()[2] == 8
    assert facts.cut == 1
    path.write_text("text\ngood day\n")
    with pytest.raises(DataError, match="every text needs a label"):
        prepare([path], tmp_path / "e", Wanted(8, "bpe:257", 0.0, "labels"))


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        ({"vocabulary": ""}, "either whose --tokenizer"),
        ({"vocabulary": "words:400"}, "no vocabulary of kind words: there are bpe, sentencepiece"),
        ({"vocabulary": "bpe"}, "no size in --vocabulary bpe"),
        ({"vocabulary": "bpe:100"}, "257 at the least"),
        ({"context": 4}, "8 at the least"),
        ({"holdout": 1.0}, "a share"),
        ({"near": 1.5}, "from 0 to 1"),
        ({"kind": "pictures"}, "there are text, labels"),
    ],
)
def test_what_cannot_be_made_says_why(text, tmp_path, wanted, reason):
    with pytest.raises(ConfigError, match=reason):
        made(text, tmp_path / "d", **wanted)


def test_a_batch_comes_again_from_where_it_was(text, tmp_path):
    made(text, tmp_path / "d")
    dataset = Dataset(tmp_path / "d")
    rows = dataset.facts.train_rows
    batches = dataset.batches("train", 8, 3)
    first = [next(batches)["tokens"] for _ in range(rows // 8)]
    state = batches.get_state()
    after = [next(batches)["tokens"] for _ in range(5)]
    again = dataset.batches("train", 8, 3)
    again.set_state(state)
    assert all((next(again)["tokens"] == tokens).all() for tokens in after)
    seen = {row.tobytes() for batch in first for row in batch}
    assert len(seen) == rows // 8 * 8, "none twice in a round"
    other = next(dataset.batches("train", 8, 4))["tokens"]
    assert not (other == first[0]).all()
    with pytest.raises(DataError, match="make no batch of 100000"):
        dataset.batches("train", 100_000, 0)
    (tmp_path / "d" / "train" / "tokens.npy").write_bytes(b"\x93NUMPY cut")
    with pytest.raises(DataError, match=r"tokens\.npy: cannot read"):
        dataset.batches("train", 8, 0)


def test_stories_are_what_their_number_makes_them():
    assert story(7) == story(7) != story(8)
    assert list(stories(3, 5)) == [story(5), story(6), story(7)]
    assert len(set(stories(2000))) == 2000
