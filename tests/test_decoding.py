"""The captions that the decoder writes: against logits written out, and of a model that has learnt them by heart."""

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from clips_core.config import ModelConfig, load_config, to_dict
from clips_core.decoding import CaptionConfig, caption_pictures, decode_captions
from clips_core.errors import InputError
from clips_core.folders import read_manifest, write_manifest
from clips_core.formats import export
from clips_core.model import CLIPS
from clips_core.shards import write_shards
from clips_core.tokenizer import ClipsTokenizer, train_vocab
from clips_core.zero_shot import normalise
from tests.test_model import tiny_config

COLOURS = {"red": (200, 30, 30), "green": (30, 180, 30), "blue": (30, 30, 200)}
CAPTIONS = {"red": "it's a red room, warm.", "green": "green grass!", "blue": "the sea (blue)"}
WEB = {"red": "IMG 1", "green": "", "blue": "sea"}


def small_config() -> ModelConfig:
    return dataclasses.replace(tiny_config(), learnable_tokens=12, vocab_size=200)


def pixels(colour: str) -> torch.Tensor:
    return torch.tensor(COLOURS[colour], dtype=torch.uint8).view(3, 1, 1).expand(3, 32, 32)


def learnt(tokenizer: ClipsTokenizer, teacher_forced: bool) -> CLIPS:
    """A tiny model whose decoder knows the captions of three pictures by heart."""
    torch.manual_seed(0)
    model = CLIPS(small_config())
    assert model.decoder is not None
    images = normalise(torch.stack([pixels(colour) for colour in COLOURS]))
    texts = torch.from_numpy(tokenizer.encode(list(WEB.values()), 12))
    target = torch.from_numpy(np.stack([tokenizer.encode_target(caption, 12) for caption in CAPTIONS.values()]))
    with torch.no_grad():  # random towers tell three pictures apart well enough
        encoded = model.encode(images, texts[:, None])
    optimizer = torch.optim.Adam(model.decoder.parameters(), lr=1e-2)
    for _ in range(80):
        states = model.caption_states(encoded, target, teacher_forced)
        loss = F.cross_entropy(model.decoder.head(states).flatten(0, 1), target.flatten(), ignore_index=0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
    return model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ClipsTokenizer:
    path = tmp_path_factory.mktemp("words") / "vocab.txt"
    train_vocab([*CAPTIONS.values(), *WEB.values()], path)
    return ClipsTokenizer(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tokenizer: ClipsTokenizer) -> Path:
    """A finished run of `clips`."""
    return make_run(tmp_path_factory.mktemp("run"), learnt(tokenizer, False), tokenizer, "clips")


def make_run(folder: Path, model: CLIPS, tokenizer: ClipsTokenizer, method: str) -> Path:
    export(model, tokenizer, folder / "export")
    write_manifest(folder, "pretrain", {"model": to_dict(model.config), "method": method}, {}, {})
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    samples: list[dict[str, Any]] = []
    for colour, text in WEB.items():
        buffer = io.BytesIO()
        Image.fromarray(pixels(colour).permute(1, 2, 0).numpy()).save(buffer, "PNG")
        samples.append({"__key__": colour, "png": buffer.getvalue(), "txt": text})
    samples.insert(1, {"__key__": "torn", "png": samples[0]["png"][:40], "txt": "x"})
    write_shards(samples, folder, per_shard=2)
    return folder


def config(model: Path, source: Path, out: Path, *overrides: str) -> CaptionConfig:
    return load_config(
        CaptionConfig, None, [f"model={model}", f"source={source}", f"out={out}", "device=cpu", *overrides]
    )


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in sorted(out.glob("0*.jsonl")) for line in path.read_text().splitlines()]


@torch.no_grad()
def test_words_are_the_argmax_of_every_learnable_token(tokenizer: ClipsTokenizer) -> None:
    torch.manual_seed(0)
    model = CLIPS(small_config()).train()
    assert model.decoder is not None
    images = torch.randn(3, 3, 32, 32)
    texts = ["", "sea", "a red room, warm."]
    found = decode_captions(model, tokenizer, images, texts)
    assert model.training  # as it was
    model.eval()
    for image, text, caption in zip(images, texts, found, strict=True):
        ids = torch.from_numpy(tokenizer.encode([text], 12))
        states = model.decoder(model.visual(image[None])[1], model.text(ids)[1][:, :-1], 12)[0]
        words = []
        for state in states:  # a place at a time, over the words that the vocabulary has
            scores = [float(state @ row) for row in model.decoder.head.weight[: len(tokenizer)]]
            words.append(int(np.argmax(scores)))
        assert caption == tokenizer.decode(words)
    assert len(set(found)) > 1


def test_what_was_learnt_comes_back_in_one_pass(run: Path, shards: Path, tmp_path: Path) -> None:
    out = caption_pictures(config(run, shards, tmp_path / "out", "web_caption=txt", "batch_size=2"))
    assert lines(out) == [
        {"key": name, "shard": f"shard-00000{i // 2}.tar", "web_caption": WEB[name], "caption": CAPTIONS[name]}
        for i, name in ((0, "red"), (2, "green"), (3, "blue"))
    ]
    assert read_manifest(out, "caption")["outputs"]["bad"] == 1
    assert "torn" in (out / "skipped.jsonl").read_text()
    without = lines(caption_pictures(config(run / "export", shards, tmp_path / "without")))
    assert [row["web_caption"] for row in without] == ["", "", ""]
    assert without[1]["caption"] == CAPTIONS["green"]  # its web caption was empty in training too
    half = lines(caption_pictures(config(run, shards, tmp_path / "half", "web_caption=txt", "precision=bf16")))
    assert [row["caption"] for row in half] == list(CAPTIONS.values())


def test_a_captioner_of_coca_writes_word_after_word(tokenizer: ClipsTokenizer, shards: Path, tmp_path: Path) -> None:
    model = learnt(tokenizer, teacher_forced=True)
    images = normalise(torch.stack([pixels(colour) for colour in COLOURS]))
    assert decode_captions(model, tokenizer, images, [""] * 3, teacher_forced=True) == list(CAPTIONS.values())
    out = caption_pictures(config(make_run(tmp_path / "run", model, tokenizer, "coca"), shards, tmp_path / "out"))
    assert [row["caption"] for row in lines(out)] == list(CAPTIONS.values())


def test_a_model_without_decoder_is_refused(run: Path, shards: Path, tmp_path: Path, tokenizer: ClipsTokenizer) -> None:
    torch.manual_seed(0)
    towers = dataclasses.replace(small_config(), decoder=None)
    with pytest.raises(InputError, match="no caption decoder"):
        decode_captions(CLIPS(towers), tokenizer, torch.randn(1, 3, 32, 32), [""])
    export(CLIPS(towers), tokenizer, tmp_path / "export")
    with pytest.raises(InputError, match="export: has no caption decoder; give a pretraining run"):
        caption_pictures(config(tmp_path / "export", shards, tmp_path / "out"))
