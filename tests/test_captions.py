"""What the text encoder reads, by method and strategy."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clips_core.captions import shorten, split_caption, sub_caption, texts_and_target
from clips_core.config import Method, Strategy, TextConfig
from clips_core.tokenizer import EOS, PAD, ClipsTokenizer, train_vocab

WEB = "one web words here"
SYNTHETIC = "A red cat sits. It is big!! Below there is a blue dog. The end"
PIECES = ["A red cat sits", "It is big", "Below there is a blue dog", "The end"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ClipsTokenizer:
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    train_vocab([WEB, SYNTHETIC], path)
    return ClipsTokenizer(path)


def read(
    tokenizer: ClipsTokenizer, method: Method, seed: int = 0, synthetic: str = SYNTHETIC, **texts: Any
) -> tuple[list[str], str]:
    ids, target = texts_and_target(
        WEB, synthetic, method, TextConfig(**texts), tokenizer, 20, 24, np.random.default_rng(seed)
    )
    assert ids.dtype == target.dtype == np.int64 and ids.shape[1:] == (20,) and target.shape == (24,)
    return [tokenizer.decode(row[1:].tolist()) for row in ids], tokenizer.decode(target.tolist())


def plain(tokenizer: ClipsTokenizer, text: str) -> str:
    """A text as it comes back from its ids."""
    return tokenizer.decode([*tokenizer.body(text), EOS])


def test_captions_split_on_runs_of_full_stops_and_exclamation_marks() -> None:
    assert split_caption(SYNTHETIC) == PIECES
    assert split_caption("... !!") == [] and split_caption("no mark at all") == ["no mark at all"]


def test_sub_captions_are_uniform_and_the_web_caption_stands_in() -> None:
    rng = np.random.default_rng(0)
    counts = Counter(sub_caption(SYNTHETIC, WEB, rng) for _ in range(4000))
    assert set(counts) == set(PIECES)
    assert all(abs(count - 1000) < 5 * (4000 * 0.25 * 0.75) ** 0.5 for count in counts.values())
    assert sub_caption("..!", WEB, rng) == WEB


@pytest.mark.parametrize("strategy", ["truncation", "sub_caption", "block_mask", "random_mask"])
@pytest.mark.parametrize("length", [1, 4, 9, 10, 30])
def test_shortened_bodies_are_ordered_parts_of_the_whole(strategy: Strategy, length: int) -> None:
    body, rng, starts, gaps = list(range(100, 110)), np.random.default_rng(1), set(), False
    for _ in range(300):
        kept = list(shorten(body, strategy, length, rng))
        assert len(kept) == min(length, 10) and kept == sorted(set(kept)) and set(kept) <= set(body)
        starts.add(kept[0])
        gaps |= kept[-1] - kept[0] >= len(kept)
    if length >= 10 or strategy in ("truncation", "sub_caption"):
        assert starts == {100} and not gaps
    elif strategy == "block_mask":
        assert starts == set(range(100, 111 - length)) and not gaps
    else:
        assert len(starts) > 1 and (gaps or length == 1)


def test_random_mask_keeps_every_token_equally_often() -> None:
    rng = np.random.default_rng(2)
    counts = Counter(token for _ in range(3000) for token in shorten(range(8), "random_mask", 3, rng))
    assert all(abs(counts[token] - 3000 * 3 / 8) < 5 * (3000 * 3 / 8 * 5 / 8) ** 0.5 for token in range(8))


def test_clips_reads_web_and_sub_caption_and_writes_the_whole(tokenizer: ClipsTokenizer) -> None:
    seen = set()
    for seed in range(60):
        (web, sub), target = read(tokenizer, "clips", seed)
        assert web == plain(tokenizer, WEB) and target == plain(tokenizer, SYNTHETIC)
        seen.add(sub)
    assert seen == {plain(tokenizer, piece) for piece in PIECES}
    assert read(tokenizer, "clips", synthetic="") == ([plain(tokenizer, WEB)] * 2, "")


def test_clip_reads_one_caption(tokenizer: ClipsTokenizer) -> None:
    assert read(tokenizer, "clip") == ([plain(tokenizer, WEB)], "")
    assert read(tokenizer, "clip", length=2) == (["one web"], "")
    assert read(tokenizer, "clip", source="synthetic", strategy="truncation", length=3) == (["a red cat"], "")
    texts = {read(tokenizer, "clip", seed, source="synthetic", length=2)[0][0] for seed in range(60)}
    assert texts == {" ".join(plain(tokenizer, piece).split()[:2]) for piece in PIECES}
    whole = read(tokenizer, "clip", source="synthetic", strategy="truncation")[0][0]
    assert whole == tokenizer.decode([*tokenizer.body(SYNTHETIC)[:17], EOS])  # cut where bos, eos and CLS need place


def test_coca_writes_the_caption_that_it_reads(tokenizer: ClipsTokenizer) -> None:
    targets: Counter[str] = Counter()
    for seed in range(400):
        (text,), target = read(tokenizer, "coca", seed)
        assert target.startswith(text)  # the encoder's may be cut
        targets[target] += 1
    assert set(targets) == {plain(tokenizer, WEB), plain(tokenizer, SYNTHETIC)}
    assert abs(targets[plain(tokenizer, WEB)] - 320) < 5 * (400 * 0.8 * 0.2) ** 0.5


def test_clip_mix_writes_nothing(tokenizer: ClipsTokenizer, tmp_path: Path) -> None:
    assert all(read(tokenizer, "clip_mix", seed)[1] == "" for seed in range(20))
    assert (
        texts_and_target(WEB, SYNTHETIC, "clip_mix", TextConfig(), tokenizer, 20, 24, np.random.default_rng(0))[1]
        == PAD
    ).all()
