"""Tokens against the golden ones of the released models, and against stock open_clip."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from transformers import BertTokenizer

from clips_core.errors import InputError
from clips_core.tokenizer import BERT_VOCAB, CLS, EOS, PAD, RESERVED, UNK, ClipsTokenizer, train_vocab

GOLDEN = json.loads((Path(__file__).parent / "data" / "golden_tokens.json").read_text())
# The released tokenizer turns the literal text "[CLS]" into the special token 101. Ours reads it as brackets and letters, so
# that no caption can forge a special token. "[unused0]" is plain text in both.
LITERAL_SPECIAL_TOKENS = {"[CLS] [SEP] [PAD] [MASK] [UNK]"}


@pytest.fixture(params=["vocab.txt", "tokenizer.json"])
def released(request: pytest.FixtureRequest, tmp_path: Path) -> ClipsTokenizer:
    """The released vocabulary in either layout: as it is, and as transformers saves it."""
    if request.param == "tokenizer.json":
        bert = BertTokenizer(vocab=str(BERT_VOCAB), do_lower_case=True, bos_token="[unused0]", eos_token="[unused1]")
        bert.save_pretrained(tmp_path)
    else:
        shutil.copyfile(BERT_VOCAB, tmp_path / request.param)
    return ClipsTokenizer(tmp_path / request.param)


def test_golden_tokens(released: ClipsTokenizer) -> None:
    different = {entry["text"] for entry in GOLDEN if released.encode([entry["text"]], 80)[0].tolist() != entry["ids"]}
    assert len(GOLDEN) == 32 and len(released) == 30_522
    assert different == LITERAL_SPECIAL_TOKENS
    forged = released.encode(list(LITERAL_SPECIAL_TOKENS), 80)[0]
    assert (forged == CLS).sum() == 1 and forged[-1] == CLS


def test_what_is_decoded_encodes_to_the_same_ids(released: ClipsTokenizer) -> None:
    """A property that needs no list of rules: white space beside punctuation means nothing to BERT's splitter."""
    texts = [entry["text"] for entry in GOLDEN]
    texts += [
        "It's a close-up (50% off!), isn't it? We'll see: a 'red' one; [two] & #three @home, $5 - or more…",
        "don 't",
    ]
    texts += ["- - a -b 's 't ( ( ) .", "naïve re-use's rock 'n' roll well - being _a - b_"]
    tried = 0
    for text in texts:
        ids = released.encode([text], 80)[0]
        if UNK in ids:  # its characters are gone
            continue
        tried += 1
        assert released.encode([released.decode(ids[1:])], 80)[0].tolist() == ids.tolist(), text
    assert tried >= 30


def test_decoded_text_reads_as_printed(released: ClipsTokenizer) -> None:
    for text in (
        "it's a close-up, isn't it? we'll see: 50% of them (or more) went!",
        "the tokenizer's pieces, antidisestablishmentarianism among them, join again.",
        "two dogs; one #tagged @home for $5",
    ):
        ids = released.encode_target(text.title(), 80)
        assert released.decode(ids) == text
    body = released.encode_target("a dog", 8)[:2].tolist()
    assert released.decode([PAD, *body, CLS, EOS, *body]) == "a dog"
    assert released.decode([]) == "" and released.decode([EOS]) == ""


def test_long_text_keeps_eos_and_cls() -> None:
    ids = ClipsTokenizer().encode(["word " * 50], 10)[0]
    assert ids[0] == 1 and ids[-2] == EOS and ids[-1] == CLS and (ids[1:-2] == ids[1]).all()


def test_targets_have_no_bos_and_end_in_eos() -> None:
    tokenizer = ClipsTokenizer()
    body = tokenizer.encode(["a dog runs"], 20)[0][1:4]
    assert tokenizer.encode_target("a dog runs", 6).tolist() == [*body, EOS, PAD, PAD]
    assert tokenizer.encode_target("a dog runs", 3).tolist() == [*body[:2], EOS]
    assert tokenizer.decode(tokenizer.encode_target("A beignet, warm", 12)) == "a beignet, warm"


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


def test_a_tokenizer_json_of_another_kind_is_refused(tmp_path: Path) -> None:
    BertTokenizer(vocab=str(BERT_VOCAB), do_lower_case=True).save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    good = json.loads(path.read_text())

    def error(part: str, key: str, value: object) -> str:
        path.write_text(json.dumps({**good, part: {**good[part], key: value}}))
        with pytest.raises(InputError) as caught:
            ClipsTokenizer(path)
        return str(caught.value)

    assert "tokenizer.json: normalizer.lowercase is False, but a CLIPS model has True" in error(
        "normalizer", "lowercase", False
    )
    assert "normalizer.strip_accents is False" in error("normalizer", "strip_accents", False)
    assert "model.type is 'BPE'" in error("model", "type", "BPE")
    assert "not 0 … 2" in error("model", "vocab", {"[PAD]": 0, "a": 1, "b": 7})
    assert "id 1: 'a' where BERT's layout has '[unused0]'" in error("model", "vocab", {"[PAD]": 0, "a": 1})
    path.write_text("{}")
    with pytest.raises(InputError, match=r"not a tokenizer\.json"):
        ClipsTokenizer(path)
    path.write_text("{")
    with pytest.raises(InputError, match=r"tokenizer\.json, line 1: not JSON"):
        ClipsTokenizer(path)


def test_a_loaders_worker_makes_its_own(released: ClipsTokenizer) -> None:
    copy = pickle.loads(pickle.dumps(released))
    assert copy.encode(["a dog"], 9).tolist() == released.encode(["a dog"], 9).tolist()
