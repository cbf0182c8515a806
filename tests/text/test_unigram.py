"""T5's vocabularies: a Unigram model as spiece.model and as tokenizer.json, closed by the end."""

import json

import pytest
from sentencepiece import SentencePieceProcessor
from sentencepiece import sentencepiece_model_pb2 as proto
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from fastserve_jax.text.load import load_tokenizer
from tests.models.t5 import EXTRA, PIECES, vocabulary, words

TEXTS = [*words(9)[:4], "", "  two   spaces ", "natori </s> <extra_id_0>", "lumo\n\tSE ünknown"]


@pytest.fixture(scope="module")
def stored():
    return vocabulary()


def folder_of(folder, **files):
    folder.mkdir()
    (folder / "config.json").write_text('{"is_encoder_decoder": true, "eos_token_id": 1}')
    for name, content in files.items():
        path = folder / name.replace("_model", ".model").replace("_json", ".json")
        path.write_bytes(content) if isinstance(content, bytes) else path.write_text(content)
    return load_tokenizer(folder)


@pytest.fixture(params=["spiece", "json"])
def tokenizer(request, tmp_path, stored):
    named = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "extra_ids": EXTRA}
    settings = json.dumps(named)
    if request.param == "spiece":
        return folder_of(tmp_path / "it", spiece_model=stored, tokenizer_config_json=settings)
    model = proto.ModelProto.FromString(stored)
    extra = [(f"<extra_id_{number}>", 0.0) for number in reversed(range(EXTRA))]
    pieces = [(piece.piece, piece.score) for piece in model.pieces]
    library = Tokenizer(models.Unigram([*pieces, *extra], unk_id=2))
    library.normalizer = normalizers.Precompiled(model.normalizer_spec.precompiled_charsmap)
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    library.add_special_tokens(["<pad>", "</s>", "<unk>", *(text for text, _ in extra)])
    return folder_of(
        tmp_path / "it", tokenizer_json=library.to_str(), tokenizer_config_json=settings
    )


@pytest.mark.parametrize("text", TEXTS)
def test_a_source_is_as_its_maker_cuts_it_and_closed(tokenizer, stored, text):
    plain = SentencePieceProcessor(model_proto=stored).encode(text)
    assert tokenizer.encode(text) == [*plain, 1]
    assert tokenizer.encode(text, add_special=False) == plain
    assert not any(map(tokenizer.is_control, set(plain) - {2}))


def test_a_folder_that_names_no_end_has_its_configuration_s(tmp_path, stored):
    bare = folder_of(tmp_path / "it", spiece_model=stored)
    assert bare.encode(TEXTS[0])[-1] == 1


def test_sentinels_stand_behind_the_pieces(tokenizer):
    assert tokenizer.vocab_size == PIECES + EXTRA
    assert tokenizer.token_text(PIECES) == f"<extra_id_{EXTRA - 1}>"
    assert tokenizer.is_control(PIECES + EXTRA - 1)
    assert tokenizer.eos_ids == {1}
    assert not tokenizer.add_bos


def test_a_target_is_a_text_of_its_own(tokenizer):
    text = words(9)[0]
    ids = tokenizer.encode(text)
    stream = tokenizer.stream()
    assert "".join(map(stream.push, ids)) + stream.flush() == text == tokenizer.decode(ids)
