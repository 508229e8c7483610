"""Retrieval against a slow sort and CLIP_benchmark's recall; classification against stock open_clip on the same model."""

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from clips_core.config import DataConfig, EvaluationConfig
from clips_core.errors import InputError
from clips_core.formats import export_open_clip
from clips_core.model import CLIPS
from clips_core.shards import write_shards
from clips_core.tokenizer import ClipsTokenizer, train_vocab
from clips_core.zero_shot import (
    RetrievalSet,
    accuracy,
    class_weights,
    classification,
    embed,
    embed_images,
    embed_texts,
    imagenet_names,
    probabilities,
    ranks,
    recall,
    retrieval,
)
from tests.test_model import tiny_config

TEMPLATES = open_clip.OPENAI_IMAGENET_TEMPLATES[:7]
CLASSES = {"tabby_cat": "tabby cat", "dog": "dog", "red_fox": "red fox", "owl": "owl", "carp": "carp", "newt": "newt"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[CLIPS, ClipsTokenizer, Path]:
    folder = tmp_path_factory.mktemp("model")
    train_vocab([template(name) for template in TEMPLATES for name in CLASSES.values()], folder / "words.txt")
    torch.manual_seed(0)
    clips = CLIPS(dataclasses.replace(tiny_config(), context_length=24, vocab_size=250)).eval()
    tokenizer = ClipsTokenizer(folder / "words.txt")
    export_open_clip(clips, tokenizer, folder / "open_clip")
    return clips, tokenizer, folder / "open_clip"


def png(seed: int, size: tuple[int, int] = (20, 30)) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


# --- retrieval ------------------------------------------------------------------------------------------------------


def test_ranks_equal_a_sort() -> None:
    torch.manual_seed(0)
    image, text = F.normalize(torch.randn(40, 6), dim=-1), F.normalize(torch.randn(40, 6), dim=-1)
    similarity = (image @ text.T).numpy()
    expected = [int(np.argsort(-row, kind="stable").tolist().index(i)) for i, row in enumerate(similarity)]
    assert ranks(image, text).tolist() == expected
    result = retrieval(image, text)
    assert result["image_to_text"]["R@5"] == np.float32(np.mean([rank < 5 for rank in expected]))
    columns = [int(np.argsort(-column, kind="stable").tolist().index(i)) for i, column in enumerate(similarity.T)]
    assert result["ranks"]["text_to_image"] == columns
    assert result["chance"] == {"R@1": 1 / 40, "R@5": 5 / 40, "R@10": 10 / 40}
    assert result["n"] == result["captions"] == 40


def test_a_collapsed_model_scores_nothing() -> None:
    same = F.normalize(torch.ones(10, 4), dim=-1)
    assert recall(ranks(same, same), 5) == 0.0
    several = retrieval(same[:5], same, torch.arange(10) // 2)
    assert several["image_to_text"]["R@5"] == several["text_to_image"]["R@1"] == 0.0
    assert recall(ranks(same * torch.nan, same), 5) == recall(ranks(same, same * torch.nan), 5) == 0.0


def plain_recall(scores: torch.Tensor, positive: torch.Tensor, k: int) -> float:
    """What CLIP_benchmark's `recall_at_k` makes of it, a query at a time: a hit is any own candidate among the k best."""
    hits = 0
    for row, own in zip(scores.tolist(), positive.tolist(), strict=True):
        best = sorted(range(len(row)), key=lambda i: -row[i])[:k]
        hits += any(own[i] for i in best)
    return hits / len(scores)


def test_several_captions_a_picture_follow_the_fields_protocol() -> None:
    torch.manual_seed(1)
    owner = torch.arange(30).repeat_interleave(5)[torch.randperm(150)][:137]  # some pictures have fewer than five
    text = F.normalize(torch.randn(137, 8), dim=-1)
    image = F.normalize(torch.randn(30, 8) + 0.8 * torch.zeros(30, 8).index_add_(0, owner, text), dim=-1)
    result = retrieval(image, text, owner)
    positive = owner[:, None] == torch.arange(30)  # [captions, pictures], as CLIP_benchmark has it
    scores = text @ image.T
    for k in (1, 5, 10):
        assert result["text_to_image"][f"R@{k}"] == pytest.approx(plain_recall(scores, positive, k))
        assert result["image_to_text"][f"R@{k}"] == pytest.approx(plain_recall(scores.T, positive.T, k))
    assert 0.1 < result["text_to_image"]["R@1"] < 0.9 and 0.1 < result["image_to_text"]["R@1"] < 1.0
    assert (result["n"], result["captions"]) == (30, 137)
    assert len(result["ranks"]["text_to_image"]) == 137 and len(result["ranks"]["image_to_text"]) == 30
    with pytest.raises(ValueError, match="137 captions of 30 pictures"):
        retrieval(image, text)


def test_a_large_set_is_ranked_in_chunks() -> None:
    torch.manual_seed(2)
    image, text = F.normalize(torch.randn(2500, 4), dim=-1), F.normalize(torch.randn(2500, 4), dim=-1)
    similarity = image @ text.T
    assert torch.equal(ranks(image, text), (similarity > similarity.diagonal()[:, None]).sum(dim=1))


def test_a_retrieval_set_reads_one_caption_or_several(
    model: tuple[CLIPS, ClipsTokenizer, Path], tmp_path: Path
) -> None:
    texts = [["a dog", "the dog in the room"], ["an owl"], ["one fox", "a red fox", "a fox in the grass"]]
    write_shards(
        [
            {"__key__": f"{i}", "png": png(i), "txt": "\n".join(own) + "\n", "json": {"all": own, "first": own[0]}}
            for i, own in enumerate(texts)
        ],
        tmp_path,
    )

    def read(caption: str, shards: str = str(tmp_path)) -> RetrievalSet:
        return RetrievalSet(EvaluationConfig(shards=[shards], caption=[caption]), DataConfig(train=["unused"]), 32)  # type: ignore[list-item]

    flat = [text for own in texts for text in own]
    for several in (read("txt"), read("json.all")):
        assert several.captions == flat and several.owner.tolist() == [0, 0, 1, 2, 2, 2]
        assert several.pixels.shape == (3, 3, 32, 32) and several.pixels.dtype == torch.uint8
    for i in range(len(texts)):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    listing = tmp_path / "set.jsonl"
    listing.write_text(
        "".join(json.dumps({"image": f"{i}.png", "caption": "\n".join(own)}) + "\n" for i, own in enumerate(texts))
    )
    listed = read("caption", str(listing))
    assert listed.captions == flat and torch.equal(listed.pixels, several.pixels)
    one = read("json.first")
    assert one.captions == [own[0] for own in texts] and one.owner.tolist() == [0, 1, 2]
    images, features = embed(model[0], several, model[1], batch_size=2)
    assert images.shape == (3, 16) and features.shape == (6, 16)
    torch.testing.assert_close(embed_texts(model[0], model[1], flat[4:5])[0], features[4])
    assert retrieval(images, features, several.owner)["captions"] == 6
    with pytest.raises(InputError, match=r"key '0'"):
        read("json.missing")


# --- classification -------------------------------------------------------------------------------------------------


def test_class_weights_equal_open_clips(model: tuple[CLIPS, ClipsTokenizer, Path]) -> None:
    clips, tokenizer, folder = model
    stock = open_clip.create_model(f"local-dir:{folder}").eval()
    names = list(CLASSES.values())
    words = open_clip.get_tokenizer(f"local-dir:{folder}")
    expected = open_clip.build_zero_shot_classifier(stock, words, names, TEMPLATES, num_classes_per_batch=4)
    torch.testing.assert_close(class_weights(clips, tokenizer, names, TEMPLATES), expected)
    plain = class_weights(clips, tokenizer, names, ["a photo of a {}."])
    torch.testing.assert_close(plain.T, embed_texts(clips, tokenizer, [f"a photo of a {name}." for name in names]))


@torch.no_grad()
def test_the_releases_example(model: tuple[CLIPS, ClipsTokenizer, Path]) -> None:
    """The published zero-shot example, by stock open_clip and by us."""
    clips, tokenizer, folder = model
    stock, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    words = open_clip.get_tokenizer(f"local-dir:{folder}")
    picture = Image.open(io.BytesIO(png(5)))
    prompts = ["a fox", "a dog", "a cat", "an owl"]
    stock.eval()
    image_features = F.normalize(stock.encode_image(preprocess(picture)[None]), dim=-1)
    text_features = F.normalize(stock.encode_text(words(prompts, context_length=stock.context_length)), dim=-1)
    expected = (100.0 * image_features @ text_features.T).softmax(dim=-1)
    pixels = torch.from_numpy(np.asarray(picture.resize((32, 32), Image.Resampling.BILINEAR)).copy()).permute(2, 0, 1)
    ours = probabilities(embed_images(clips, [pixels[None]]), embed_texts(clips, tokenizer, prompts).T)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    assert ours.sum() == pytest.approx(1)


def test_accuracy_by_hand() -> None:
    weights = torch.eye(6)
    image = F.normalize(
        torch.tensor([[9.0, 1, 2, 3, 4, 5], [8, 1, 2, 3, 4, 9], [9, 3, 4, 5, 6, 1], [0, 9, 1, 2, 3, 4]]), dim=-1
    )
    result = accuracy(image, torch.tensor([0, 0, 5, 1]), weights, ["a", "b", "c", "d", "e", "f"])
    assert result["ranks"] == [0, 1, 5, 0]
    assert (result["top1"], result["top5"], result["n"], result["classes"]) == (0.5, 0.75, 4, 6)
    assert result["per_class"] == {"a": {"top1": 0.5, "n": 2}, "b": {"top1": 1.0, "n": 1}, "f": {"top1": 0.0, "n": 1}}
    assert result["mean_per_class"] == 0.5


def test_classification_of_class_folders(model: tuple[CLIPS, ClipsTokenizer, Path], tmp_path: Path) -> None:
    clips, tokenizer, folder = model
    for i, name in enumerate(CLASSES):
        for j in range(1 + i):
            path = tmp_path / name / ("deep" if j % 2 else "") / f"{j}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(10 * i + j))
    (tmp_path / "owl" / "torn.png").write_bytes(png(0)[:50])
    result = classification(clips, tokenizer, tmp_path, TEMPLATES, batch_size=4)

    stock, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    stock.eval()
    words = open_clip.get_tokenizer(f"local-dir:{folder}")
    order = sorted(CLASSES)
    head = open_clip.build_zero_shot_classifier(stock, words, [CLASSES[name] for name in order], TEMPLATES)
    right: dict[str, list[list[bool]]] = {}
    for label, name in enumerate(order):
        for path in sorted((tmp_path / name).rglob("*.png")):
            if path.name == "torn.png":
                continue
            with torch.no_grad():
                logits = stock.encode_image(preprocess(Image.open(path))[None], normalize=True) @ head
            best = logits[0].topk(5).indices.tolist()
            right.setdefault(name, []).append([best[0] == label, label in best])
    every = [hit for hits in right.values() for hit in hits]
    assert [result["top1"], result["top5"]] == pytest.approx(np.mean(every, axis=0).tolist())
    assert {name: value["n"] for name, value in result["per_class"].items()} == {
        name: len(right[name]) for name in order
    }
    for name in order:
        assert result["per_class"][name]["top1"] == pytest.approx(np.mean(right[name], axis=0)[0])
    assert result["n"] == 21 and len(result["bad"]) == 1 and "torn.png" in result["bad"][0]
    renamed = classification(clips, tokenizer, tmp_path, TEMPLATES, names=CLASSES)
    assert renamed["ranks"] == result["ranks"]


def test_folders_that_are_no_classes(model: tuple[CLIPS, ClipsTokenizer, Path], tmp_path: Path) -> None:
    clips, tokenizer, _ = model

    def error() -> str:
        with pytest.raises(InputError) as caught:
            classification(clips, tokenizer, tmp_path / "set", ["{}"], names={"a": "a"})
        return str(caught.value)

    assert "no such folder" in error()
    (tmp_path / "set" / "a").mkdir(parents=True)
    assert "holds no picture" in error()
    (tmp_path / "set" / "a" / "1.png").write_bytes(b"torn")
    assert "at least two" in error()
    (tmp_path / "set" / "b").mkdir()
    (tmp_path / "set" / "b" / "1.png").write_bytes(b"torn")
    assert "set/b: this class has no name" in error()
    with pytest.raises(InputError, match="none of its 2 pictures can be read"):
        classification(clips, tokenizer, tmp_path / "set", ["{}"])
    with pytest.raises(InputError, match="ImageNet has 1,000"):
        imagenet_names(tmp_path / "set")


def test_imagenets_names_go_by_the_sorted_ids(tmp_path: Path) -> None:
    for i in range(1000):
        (tmp_path / f"n{10_000_000 - i:08d}").mkdir()
        (tmp_path / f"n{10_000_000 - i:08d}" / "x.JPEG").touch()
    names = imagenet_names(tmp_path)
    assert [names[key] for key in sorted(names)] == list(open_clip.IMAGENET_CLASSNAMES)
