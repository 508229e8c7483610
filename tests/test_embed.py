"""`embed` on shards and folders: features against stock open_clip's, and what happens to bad pictures and interrupted runs."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from clips_core import embed, pictures
from clips_core.config import load_config
from clips_core.embed import EmbedConfig, embed_pictures
from clips_core.errors import InputError
from clips_core.folders import read_manifest
from clips_core.formats import export
from clips_core.model import CLIPS
from clips_core.shards import write_shards
from clips_core.tokenizer import ClipsTokenizer, train_vocab
from tests.test_model import tiny_config

TEXTS = ["a red heart", "a blue star", "", "heart above star"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's export folder."""
    folder = tmp_path_factory.mktemp("model")
    train_vocab(TEXTS, folder / "words.txt")
    torch.manual_seed(0)
    export(CLIPS(tiny_config()), ClipsTokenizer(folder / "words.txt"), folder / "export")
    return folder / "export"


def png(seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (20 + seed % 7, 30, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards: 7 + 7 + 3 samples, sample 9 with a torn picture, every fourth without a caption."""
    folder = tmp_path_factory.mktemp("shards")
    samples: list[dict[str, Any]] = []
    for i in range(17):
        sample = {"__key__": f"{i:03d}", "png": png(i)[: 60 if i == 9 else None]}
        if TEXTS[i % 4]:
            sample["txt"] = TEXTS[i % 4]
        samples.append(sample)
    write_shards(samples, folder, per_shard=7)
    return folder


def config(model: Path, source: Path, out: Path, *overrides: str) -> EmbedConfig:
    settings = [f"model={model}", f"source={source}", f"out={out}", "batch_size=3", "device=cpu"]
    return load_config(EmbedConfig, None, [*settings, *overrides])


def rows(out: Path) -> list[dict[str, Any]]:
    return [row for path in sorted(out.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def stock_features(model: Path, data: list[bytes], texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Features of the same files by stock open_clip alone."""
    name = f"local-dir:{model / 'open_clip'}"
    stock, preprocess = open_clip.create_model_from_pretrained(name)
    stock.eval()
    with torch.no_grad():
        images = stock.encode_image(torch.stack([preprocess(Image.open(io.BytesIO(d))) for d in data]), normalize=True)
        words = stock.encode_text(open_clip.get_tokenizer(name)(texts), normalize=True)
    return images.numpy(), words.numpy()


def test_features_of_shards_equal_stock_open_clips(model: Path, shards: Path, tmp_path: Path) -> None:
    out = embed_pictures(config(model, shards, tmp_path / "out", "caption=txt", "dtype=float32"))
    found = rows(out)
    assert [row["key"] for row in found] == [f"{i:03d}" for i in range(17) if i != 9]
    assert [row["shard"] for row in found[5:8]] == ["shard-000000.tar"] * 2 + ["shard-000001.tar"]
    images, _ = stock_features(model, [png(i) for i in range(17) if i != 9], ["x"])
    np.testing.assert_allclose(np.array([row["image_embedding"] for row in found]), images, atol=1e-5)
    captioned = [row for row in found if row["caption"] is not None]
    assert [row["caption"] for row in captioned] == [TEXTS[i % 4] for i in range(17) if i != 9 and i % 4 != 2]
    _, words = stock_features(model, [png(0)], [row["caption"] for row in captioned])
    np.testing.assert_allclose(np.array([row["text_embedding"] for row in captioned]), words, atol=1e-5)
    assert all(row["text_embedding"] is None for row in found if row["caption"] is None)

    schema = pq.read_schema(out / "00000-shard-000000.parquet")
    assert schema.field("image_embedding").type == pa.list_(pa.float32(), 16)
    manifest = read_manifest(out, "embed")
    assert manifest["outputs"]["pictures"] == 16 and manifest["outputs"]["bad"] == 1
    assert manifest["inputs"].keys() == {"open_clip_model.safetensors", "decoder.safetensors", "vocab.txt", "pictures"}
    (skipped,) = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert skipped["key"] == "009" and "shard-000001.tar" in skipped["problem"]
    assert not (out / pictures.JOURNAL).exists()


def test_features_of_a_folder(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "FILES_PER_PART", 4)
    source = tmp_path / "pictures"
    names = [f"{'deep/' if i % 2 else ''}{i}.PNG" for i in range(10)]
    for i, name in enumerate(names):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(png(i))
    (source / "0.txt").write_text("a red heart")
    (source / "notes.md").write_text("no picture")
    out = embed_pictures(config(model / "open_clip", source, tmp_path / "out", "caption=txt"))
    found = rows(out)
    assert sorted(row["key"] for row in found) == sorted(names) and {row["shard"] for row in found} == {None}
    assert {row["key"]: row["caption"] for row in found if row["caption"]} == {"0.PNG": "a red heart"}
    by_key = {row["key"]: row["image_embedding"] for row in found}
    images, _ = stock_features(model, [png(i) for i in range(10)], ["x"])
    np.testing.assert_allclose(np.array([by_key[name] for name in names]), images, atol=1e-3)
    assert len(list(out.glob("*.parquet"))) == 3
    assert pq.read_schema(out / "part-00000.parquet").field("image_embedding").type == pa.list_(pa.float16(), 16)
    alone = rows(embed_pictures(config(model / "open_clip", source, tmp_path / "alone")))
    assert alone[0].keys() == {"key", "shard", "image_embedding"}


def test_it_goes_on_after_the_last_whole_shard(
    model: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = rows(embed_pictures(config(model, shards, tmp_path / "whole")))
    reads: list[str] = []
    decode = pictures._decode

    def interrupted(sample: dict[str, Any], *args: Any) -> Any:
        if sample["__key__"] == "010":
            raise KeyboardInterrupt
        return decode(sample, *args)

    def counted(sample: dict[str, Any], *args: Any) -> Any:
        reads.append(sample["__key__"])
        return decode(sample, *args)

    monkeypatch.setattr(pictures, "_decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        embed_pictures(config(model, shards, tmp_path / "out"))
    assert [path.name for path in sorted((tmp_path / "out").glob("*.parquet"))] == ["00000-shard-000000.parquet"]
    with pytest.raises(InputError, match=r"unfinished other result \(settings\.dtype"):
        embed_pictures(config(model, shards, tmp_path / "out", "dtype=float32"))
    monkeypatch.setattr(pictures, "_decode", counted)
    with open(tmp_path / "out" / pictures.JOURNAL, "a") as file:
        file.write('{"part": "000')  # what a kill in the middle of a line leaves
    assert rows(embed_pictures(config(model, shards, tmp_path / "out", "batch_size=5", "workers=2"))) == whole
    assert reads == [f"{i:03d}" for i in range(7, 17)]
    assert read_manifest(tmp_path / "out")["outputs"]["bad"] == 1
    reads.clear()
    embed_pictures(config(model, shards, tmp_path / "out"))
    assert not reads  # finished: left as it is
    with pytest.raises(InputError, match=r"another result \(config\.dtype"):
        embed_pictures(config(model, shards, tmp_path / "out", "dtype=float32"))


def test_other_pictures_or_another_model_are_another_result(model: Path, shards: Path, tmp_path: Path) -> None:
    source = tmp_path / "a"
    write_shards([{"__key__": "1", "png": png(1)}], source)
    embed_pictures(config(model, source, tmp_path / "out"))
    with pytest.raises(InputError, match=r"another result \(inputs\.pictures"):
        embed_pictures(config(model, shards, tmp_path / "out"))
    torch.manual_seed(1)
    export(CLIPS(tiny_config()), ClipsTokenizer(model / "open_clip" / "vocab.txt"), tmp_path / "other")
    with pytest.raises(InputError, match=r"another result \(inputs\.decoder"):
        embed_pictures(config(tmp_path / "other", source, tmp_path / "out"))
    with pytest.raises(InputError, match="holds something else"):
        embed_pictures(config(model, shards, source))


def test_a_cut_off_shard_gives_what_it_still_holds(model: Path, shards: Path, tmp_path: Path) -> None:
    whole = (shards / "shard-000000.tar").read_bytes()
    with tarfile.open(shards / "shard-000000.tar") as tar:
        cut = tar.getmembers()[-2].offset_data + 10
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "cut.tar").write_bytes(whole[:cut])
    out = embed_pictures(config(model, tmp_path / "in" / "cut.tar", tmp_path / "out"))
    assert 1 <= len(rows(out)) < 7
    problems = [json.loads(line)["problem"] for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert len(problems) == 1 and "cut.tar: cut-off tar" in problems[0]


def test_another_resolution_and_precision(model: Path, shards: Path, tmp_path: Path) -> None:
    plain = rows(embed_pictures(config(model, shards, tmp_path / "a", "dtype=float32")))
    half = rows(embed_pictures(config(model, shards, tmp_path / "b", "dtype=float32", "precision=bf16")))
    large = rows(embed_pictures(config(model, shards, tmp_path / "c", "dtype=float32", "image_size=48")))
    vectors = [torch.tensor([row["image_embedding"] for row in found]) for found in (plain, half, large)]
    for vector in vectors:
        torch.testing.assert_close(vector.norm(dim=1), torch.ones(16))
    assert 0 < (vectors[0] - vectors[1]).abs().max() < 0.02
    assert F.cosine_similarity(vectors[0], vectors[2]).min() < 0.9999


def test_what_cannot_be_done_is_said(model: Path, shards: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere: no such folder"):
        embed_pictures(config(model, tmp_path / "nowhere", tmp_path / "out"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"neither a \*\.tar nor a picture"):
        embed_pictures(config(model, tmp_path / "empty", tmp_path / "out"))
    with pytest.raises(InputError, match="device 'tpu7' cannot be used"):
        embed_pictures(config(model, shards, tmp_path / "out", "device=tpu7"))
    with pytest.raises(InputError, match=r"unknown key 'dtyp' \(did you mean 'dtype'"):
        config(model, shards, tmp_path / "out", "dtyp=float32")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "1.png").write_bytes(b"x")
    with pytest.raises(InputError, match="none of its 1 pictures can be read"):
        embed_pictures(config(model, tmp_path / "torn", tmp_path / "out"))


def test_vectors_keep_nulls() -> None:
    array = embed._vectors([np.ones(2, dtype=np.float32), None], 2, "float16")
    assert array.to_pylist() == [[1.0, 1.0], None] and array.type == pa.list_(pa.float16(), 2)
