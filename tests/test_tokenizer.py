"""Tokens against the golden ones of the released models, and against stock open_clip."""

import json
from pathlib import Path

import numpy as np
import pytest

from clips_core.errors import InputError
from clips_core.tokenizer import BERT_VOCAB, CLS, EOS, PAD, RESERVED, ClipsTokenizer, train_vocab

GOLDEN = json.loads((Path(__file__).parent / "data" / "golden_tokens.json").read_text())
# The released tokenizer turns the literal text "[CLS]" into the special token 101. Ours reads it as brackets and letters, so
# that no caption can forge a special token. "[unused0]" is plain text in both.
LITERAL_SPECIAL_TOKENS = {"[CLS] [SEP] [PAD] [MASK] [UNK]"}


def test_golden_tokens() -> None:
    tokenizer = ClipsTokenizer()
    different = {entry["text"] for entry in GOLDEN if tokenizer.encode([entry["text"]], 80)[0].tolist() != entry["ids"]}
    assert len(GOLDEN) == 32
    assert different == LITERAL_SPECIAL_TOKENS
    forged = tokenizer.encode(list(LITERAL_SPECIAL_TOKENS), 80)[0]
    assert (forged == CLS).sum() == 1 and forged[-1] == CLS


def test_long_text_keeps_eos_and_cls() -> None:
    ids = ClipsTokenizer().encode(["word " * 50], 10)[0]
    assert ids[0] == 1 and ids[-2] == EOS and ids[-1] == CLS and (ids[1:-2] == ids[1]).all()


def test_targets_have_no_bos_and_end_in_eos() -> None:
    tokenizer = ClipsTokenizer()
    body = tokenizer.encode(["a dog runs"], 20)[0][1:4]
    assert tokenizer.encode_target("a dog runs", 6).tolist() == [*body, EOS, PAD, PAD]
    assert tokenizer.encode_target("a dog runs", 3).tolist() == [*body[:2], EOS]
    assert tokenizer.decode(tokenizer.encode_target("A beignet, warm", 12)) == "a beignet , warm"


def test_trained_vocab_keeps_berts_layout_and_ignores_order(tmp_path: Path) -> None:
    texts = ["a red heart", "a blue star", "a red star"]
    train_vocab(texts, tmp_path / "a.txt")
    train_vocab(reversed(texts), tmp_path / "b.txt")
    assert (tmp_path / "a.txt").read_bytes() == (tmp_path / "b.txt").read_bytes()
    tokenizer = ClipsTokenizer(tmp_path / "a.txt")
    assert tuple(tokenizer.tokens[: len(RESERVED)]) == RESERVED == tuple(ClipsTokenizer(BERT_VOCAB).tokens[:104])
    ids = tokenizer.encode(["A blue heart", "rats"], 10)
    assert [tokenizer.tokens[i] for i in ids[0][1:4]] == ["a", "blue", "heart"]
    assert [tokenizer.tokens[i] for i in ids[1][1:5]] == ["r", "##a", "##t", "##s"]
    assert np.all(ids[:, -1] == CLS)


def test_bad_vocab_names_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[PAD]\nhello\n")
    with pytest.raises(InputError, match=r"vocab\.txt, line 2"):
        ClipsTokenizer(tmp_path / "vocab.txt")
    with pytest.raises(InputError, match=r"missing\.txt"):
        ClipsTokenizer(tmp_path / "missing.txt")
