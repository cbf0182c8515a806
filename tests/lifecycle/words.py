"""A WordPiece vocabulary of a few words, as tokenizer.json."""

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

WORDS = ("the", "a", "cat", "dog", "sat", "on", "mat", "and", "did", "not", "good", "bad")
WORDS += ("##s", "##ing")


def write_words(folder, size):
    """Unused ones fill it up to `size`."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    names += [f"[unused{number}]" for number in range(size - len(names))]
    vocab = {name: number for number, name in enumerate(names)}
    library = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    library.normalizer = normalizers.BertNormalizer()
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])],
    )
    library.save(str(folder / "tokenizer.json"))
