"""Text → ids, as the released CLIPS models have it: `[bos] body [eos] pad … pad [CLS]`, lower-cased WordPiece."""

import functools
import html
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import ftfy
import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from clips_core.errors import InputError
from clips_core.folders import read_json, write_bytes

PAD, BOS, EOS, UNK, CLS = 0, 1, 2, 100, 101
BERT_VOCAB = Path(__file__).with_name(
    "bert_vocab.txt"
)  # BERT's 30,522 lower-case entries: the released models' vocabulary
# BERT's first 104 lines, which every vocabulary of ours shares: ids 1 and 2 ([unused0], [unused1]) serve as bos and eos.
RESERVED = ("[PAD]", *(f"[unused{i}]" for i in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class ClipsTokenizer:
    """WordPiece over a `vocab.txt` (or the vocabulary of a `tokenizer.json`) whose first 104 entries are BERT's.

    `ends_in_cls`: whether CLS stands at the last place of every text, where the released models pool; without it the last real
    token is eos (`text_padding: masked`).

    Special tokens written literally in a caption (`[CLS]`, `[unused0]`) are plain characters here, as in the released
    models: a caption cannot forge a bos or eos.
    """

    def __init__(self, vocab: Path | str = BERT_VOCAB, ends_in_cls: bool = True):
        self.vocab_path, self.ends_in_cls = Path(vocab), ends_in_cls
        self.tokens = read_vocab(self.vocab_path)
        ids = {token: i for i, token in enumerate(self.tokens)}
        self._tokenizer = Tokenizer(models.WordPiece(vocab=ids, unk_token="[UNK]", max_input_chars_per_word=100))
        self._tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        self._tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        self._body = functools.lru_cache(maxsize=2**16)(self._encode)  # captions recur from epoch to epoch

    def __len__(self) -> int:
        return len(self.tokens)

    def __reduce__(self) -> tuple[type, tuple[Path, bool]]:  # a data loader's worker makes its own
        return ClipsTokenizer, (self.vocab_path, self.ends_in_cls)

    def encode(self, texts: Sequence[str], length: int) -> np.ndarray:
        """Ids for the text encoder, int64 [len(texts), length]; a body that is too long is cut so that eos and CLS stay."""
        return self.frame([self.body(text) for text in texts], length)

    def body(self, text: str) -> tuple[int, ...]:
        """The ids of a text alone, of whatever length."""
        return self._body(text)

    def frame(self, bodies: Sequence[Sequence[int]], length: int) -> np.ndarray:
        """`[bos] body [eos] pad … pad [CLS]` of each body, int64 [len(bodies), length], cut as in `encode`."""
        ids = np.full((len(bodies), length), PAD, dtype=np.int64)
        for row, body in zip(ids, bodies, strict=True):
            body = body[: length - (3 if self.ends_in_cls else 2)]
            row[0], row[1 + len(body)] = BOS, EOS
            row[1 : 1 + len(body)] = body
        if self.ends_in_cls:
            ids[:, -1] = CLS
        return ids

    def encode_target(self, text: str, length: int) -> np.ndarray:
        """Targets of the caption decoder, int64 [length]: `body [eos] pad …`, without bos; one too long ends in eos."""
        ids = np.full(length, PAD, dtype=np.int64)
        body = self._body(text)[: length - 1]
        ids[: len(body)], ids[len(body)] = body, EOS
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text up to the first eos, lower-cased as the ids are; pads and reserved ids are left out.

        Pieces (`##s`) join the word before them, and punctuation is set as in print where that is clear: "it's a close-up, no?".
        Encoding the result again gives the same ids: white space beside punctuation means nothing to the tokenizer.
        """
        words: list[str] = []
        for i in ids:
            if i == EOS:
                break
            token = self.tokens[i] if i < len(self.tokens) else "[UNK]"
            if i != UNK and i < len(RESERVED):
                continue
            if token.startswith("##") and len(token) > 2 and words:
                words[-1] += token[2:]
            else:
                words.append(token)
        return _set_punctuation(" ".join(words))

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(clean(text), add_special_tokens=False).ids)


def clean(text: str) -> str:
    """Repaired Unicode, HTML unescaped twice, runs of white space folded."""
    if not (text.isascii() and text.isprintable() and "&" not in text):  # ftfy changes none of the others, and is slow
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


def _set_punctuation(text: str) -> str:
    """White space around punctuation as in print, for texts whose every punctuation mark stands alone."""
    text = re.sub(r" ([.,!?;:%)\]}…])", r"\1", text)
    text = re.sub(r"([(\[{$#@]) ", r"\1", text)
    text = re.sub(r"(?<=[^\W_]) ' (s|t|re|ve|m|ll|d)\b", r"'\1", text)
    return re.sub(r"(?<=[^\W_]) - (?=[^\W_])", "-", text)


def read_vocab(path: Path | str) -> list[str]:
    """The tokens of a `vocab.txt`, one a line, or of a `tokenizer.json`, by id.

    Raises:
        InputError: if the file is missing, its first 104 entries are not BERT's, or a `tokenizer.json` is not lower-cased
            WordPiece.
    """
    if Path(path).suffix == ".json":
        tokens, place = _read_tokenizer_json(path), "id"
    else:
        try:
            tokens, place = Path(path).read_text(encoding="utf-8").splitlines(), "line"
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"vocabulary {path}: cannot be read ({error})") from None
    for number, (token, expected) in enumerate(zip(tokens, RESERVED, strict=False), start=int(place == "line")):
        if token != expected:
            raise InputError(f"vocabulary {path}, {place} {number}: {token!r} where BERT's layout has {expected!r}")
    if len(tokens) <= len(RESERVED):
        raise InputError(
            f"vocabulary {path}: {len(tokens)} entries; it needs the {len(RESERVED)} reserved ones and words"
        )
    return tokens


def _read_tokenizer_json(path: Path | str) -> list[str]:
    """The vocabulary of a tokenizer that works as BERT's lower-casing one does."""
    content = read_json(path)
    try:
        model, normalizer, splitter = content["model"], content["normalizer"], content["pre_tokenizer"]
        settings = {
            "model.type": (model["type"], ("WordPiece",)),
            "model.unk_token": (model["unk_token"], ("[UNK]",)),
            "model.continuing_subword_prefix": (model["continuing_subword_prefix"], ("##",)),
            "model.max_input_chars_per_word": (model["max_input_chars_per_word"], (100,)),
            "normalizer.type": (normalizer["type"], ("BertNormalizer",)),
            "normalizer.lowercase": (normalizer["lowercase"], (True,)),
            "normalizer.clean_text": (normalizer["clean_text"], (True,)),
            "normalizer.handle_chinese_chars": (normalizer["handle_chinese_chars"], (True,)),
            "normalizer.strip_accents": (normalizer["strip_accents"], (None, True)),
            "pre_tokenizer.type": (splitter["type"], ("BertPreTokenizer",)),
        }
        ids = {int(i): str(token) for token, i in model["vocab"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"vocabulary {path}: not a tokenizer.json of a WordPiece tokenizer ({error!r})") from None
    for key, (value, allowed) in settings.items():
        if value not in allowed:
            raise InputError(f"vocabulary {path}: {key} is {value!r}, but a CLIPS model has {allowed[0]!r}")
    if sorted(ids) != list(range(len(ids))):
        raise InputError(f"vocabulary {path}: its ids are not 0 … {len(ids) - 1}, each once")
    return [ids[i] for i in range(len(ids))]


def train_vocab(texts: Iterable[str], path: Path | str, max_size: int = 30_522) -> None:
    """Write a `vocab.txt` for a small corpus: BERT's reserved lines, its characters, and its most frequent whole words.

    The same texts give the same file, whatever their order.
    """
    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    words: Counter[str] = Counter()
    for text, count in Counter(texts).items():
        for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(clean(text))):
            words[word] += count
    characters = sorted({character for word in words for character in word})
    pieces = [*characters, *(f"##{character}" for character in characters)]
    whole = sorted((word for word in words if len(word) > 1), key=lambda word: (-words[word], word))
    tokens = [*RESERVED, *pieces, *whole][:max_size]
    write_bytes(path, "".join(f"{token}\n" for token in tokens).encode())
