"""Towers measured: against stock open_clip, transformers, CLIP_benchmark and scipy on the same pictures and vectors; files in the
layouts that people have; what happens to bad files and interrupted runs."""

import argparse
import dataclasses
import importlib.util
import io
import json
import math
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import scipy.optimize
import torch
import torch.nn.functional as F
import transformers
import webdataset
from llava_samples import SIZE, WIDTH, make_vision_model
from open_clip_train import zero_shot as open_clip_zero_shot
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor

import eval_suites
import llava_bridge.towers
from clips_core.config import load_config, load_settings
from clips_core.errors import InputError
from clips_core.folders import read_json
from clips_core.formats import export
from clips_core.model import CLIPS
from clips_core.shards import write_shards
from clips_core.tokenizer import ClipsTokenizer, train_vocab
from clips_core.world.captions import brief, whole_scene
from clips_core.world.scenes import Background, Scene, Thing, draw_scene, render
from clips_core.world.settings import WorldConfig, resolve
from eval_suites import prompts
from eval_suites.records import Record
from eval_suites.statistics import paired_difference
from eval_suites.towers import features, probes
from eval_suites.towers.config import KINDS, CaptionSet, ClassSet, KnnConfig, ProbeConfig, TowerEvalConfig, arrange
from eval_suites.towers.embedders import Embedder, load_embedder
from eval_suites.towers.features import Features
from eval_suites.towers.run import eval_towers
from eval_suites.towers.sets import read_caption_set, read_class_set
from eval_suites.towers.table import tower_table
from tests.test_model import tiny_config

CLASSES = ["black_cloud", "blue_star", "green_moon", "pink_flower", "red_heart", "yellow_sun"]
TEMPLATES = open_clip.OPENAI_IMAGENET_TEMPLATES
TEST, TRAIN = 5, 12  # pictures of each class


def scene_of(name: str, rng: random.Random) -> Image.Image:
    """One pictogram somewhere on some background."""
    colour, kind = name.split("_")
    x, y = rng.randint(0, 12), rng.randint(0, 12)
    background = Background(rng.choice(("plain", "striped")), rng.choice(("white", "mint", "sand")))
    return render(Scene(40, (Thing(kind, colour, (x, y, x + 27, y + 27)),), background), rng)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`classes/{test,train}/CLASS/*.png`, the same test pictures in `wds/test/*.tar`, and captions in Karpathy's JSON in `coco`."""
    folder = tmp_path_factory.mktemp("data")
    rng = random.Random(0)
    samples = []
    for split, count in (("test", TEST), ("train", TRAIN)):
        for label, name in enumerate(CLASSES):
            place = folder / "classes" / split / name
            place.mkdir(parents=True)
            for i in range(count):
                picture = png(scene_of(name, rng))
                (place / f"{i:02d}.png").write_bytes(picture)
                if split == "test":
                    samples.append({"__key__": f"s{len(samples):07d}", "png": picture, "cls": str(label)})
    write_shards(samples, folder / "wds" / "test", per_shard=13)
    (folder / "wds" / "classnames.txt").write_text("".join(f"{name.replace('_', ' ')}\n" for name in CLASSES))
    (folder / "wds" / prompts.TEMPLATES).write_text("a photo of a {c}.\na drawing of the {c}.\n")

    rules = resolve(WorldConfig(out=folder / "unused", image_size=40))
    rows = []
    (folder / "coco" / "val2014").mkdir(parents=True)
    for i in range(14):
        scene = draw_scene(rng, rules, "natural")
        render(scene, rng).save(folder / "coco" / "val2014" / f"COCO_{i}.jpg", quality=95)
        texts = [(whole_scene if j % 2 else brief)(scene, rng) + f" {j}" for j in range(7 if i == 3 else 5)]
        sentences = [{"raw": f" {text}\n", "tokens": text.split(), "imgid": i} for text in texts]
        split = "train" if i == 13 else "test"
        rows.append({"filepath": "val2014", "filename": f"COCO_{i}.jpg", "split": split, "sentences": sentences})
    (folder / "coco" / "dataset_coco.json").write_text(json.dumps({"images": rows, "dataset": "coco"}))
    return folder


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A run's export folder: random weights."""
    folder = tmp_path_factory.mktemp("tower")
    words = [template(name.replace("_", " ")) for template in TEMPLATES for name in CLASSES]
    rows = read_json(data / "coco" / "dataset_coco.json")["images"]
    words += [sentence["raw"] for row in rows for sentence in row["sentences"]]
    train_vocab(words, folder / "words.txt")
    torch.manual_seed(0)
    model = CLIPS(dataclasses.replace(tiny_config(), context_length=24, vocab_size=400, decoder=None)).eval()
    export(model, ClipsTokenizer(folder / "words.txt"), folder / "export")
    return folder / "export"


def config(tower: str | list[str], data: Path, out: Path, *overrides: str) -> TowerEvalConfig:
    settings = [f"towers={json.dumps(tower)}", f"data={data}", f"out={out}", "device=cpu", "batch_size=8", "workers=2"]
    return load_config(TowerEvalConfig, None, [*settings, *overrides])


ZERO_SHOT = ("classes.shapes.test=classes/test", "classes.shapes.templates=openai_imagenet")
PROBES = ("classes.shapes.test=classes/test", "classes.shapes.train=classes/train", "classes.shapes.tasks=[probe,knn]")
RETRIEVAL = ("captions.scenes.captions=coco/dataset_coco.json", "captions.scenes.images=coco")


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def class_files(data: Path, split: str) -> list[tuple[Path, int]]:
    return [(path, i) for i, name in enumerate(CLASSES) for path in sorted((data / "classes" / split / name).iterdir())]


@torch.no_grad()
def stock_images(tower: Path, files: list[Path]) -> Tensor:
    """By stock open_clip alone."""
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{tower / 'open_clip'}")
    return model.eval().encode_image(torch.stack([preprocess(Image.open(file)) for file in files]), normalize=True)


@torch.no_grad()
def stock_texts(tower: Path, texts: list[str]) -> Tensor:
    name = f"local-dir:{tower / 'open_clip'}"
    return open_clip.create_model(name).eval().encode_text(open_clip.get_tokenizer(name)(texts), normalize=True)


# ---------------------------------------------------------------------------------------------------------- embedders


@torch.no_grad()
def vectors(embedder: Embedder, files: list[Path], texts: list[str]) -> tuple[Tensor, Tensor]:
    pixels = torch.stack([embedder.to_pixels(Image.open(file).convert("RGB")) for file in files])
    assert embedder.tokens is not None and embedder.texts is not None
    words = embedder.texts(embedder.tokens(texts))
    return F.normalize(embedder.images(pixels), dim=-1), F.normalize(words, dim=-1)


@pytest.mark.parametrize("kind", ["clips", "open_clip", "clips, by its HF export"])
def test_vectors_equal_stock_open_clips(tower: Path, data: Path, kind: str) -> None:
    spec = {"clips": f"clips:{tower}", "open_clip": f"open_clip:{tower / 'open_clip'}"}
    embedder = load_embedder(spec.get(kind, f"clips:{tower / 'hf'}"))
    files = [path for path, _ in class_files(data, "test")[::3]]
    texts = ["a photo of a red heart.", "the origami blue star.", "a mint striped yellow sun " * 9]
    images, words = vectors(embedder, files, texts)
    torch.testing.assert_close(images, stock_images(tower, files), atol=1e-5, rtol=0)
    torch.testing.assert_close(words, stock_texts(tower, texts), atol=1e-5, rtol=0)
    assert embedder.image_size == 32


def save_hf(folder: Path, kind: str) -> Any:
    """A tiny CLIP or SigLIP of transformers with a tokenizer of words and its image processor."""
    names = [
        "<pad>",
        "</s>",
        "?",
        *sorted({word for name in CLASSES for word in name.split("_")} | {"a", "photo", "of"}),
    ]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="?", pad_token="<pad>", eos_token="</s>"
    )
    fast.save_pretrained(folder)
    text = {**WIDTH, "vocab_size": len(names), "max_position_embeddings": 12, "pad_token_id": 0, "bos_token_id": 2,
            "eos_token_id": 1}  # fmt: skip
    vision = {**SIZE, **WIDTH}
    torch.manual_seed(0)
    if kind == "clip":
        model = transformers.CLIPModel(
            transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)
        )
        size = {"height": 48, "width": 48}
        transformers.CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size=size).save_pretrained(folder)
    else:
        model = transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision))
        transformers.SiglipImageProcessorPil(size={"height": 48, "width": 48}).save_pretrained(folder)
    model.eval().save_pretrained(folder)
    return model, fast


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_vectors_equal_transformers(tmp_path: Path, data: Path, kind: str) -> None:
    model, words = save_hf(tmp_path, kind)
    files = [path for path, _ in class_files(data, "test")[::7]]
    texts = ["a photo of a red heart", "blue star", "a unicorn of a sun " * 5]
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    pixels = processor([Image.open(file).convert("RGB") for file in files], return_tensors="pt")["pixel_values"]
    ids = words(texts, padding="max_length", truncation=True, max_length=12, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = model(input_ids=ids, pixel_values=pixels)
    images, texts_found = vectors(load_embedder(f"hf:{tmp_path}"), files, texts)
    torch.testing.assert_close(images, expected.image_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(texts_found, expected.text_embeds, atol=1e-5, rtol=0)
    capitals = vectors(load_embedder(f"hf:{tmp_path}"), files, [text.capitalize() for text in texts])[1]
    assert torch.allclose(capitals, texts_found, atol=1e-5) == (kind == "siglip")  # trained on lower-cased texts
    larger = load_embedder(f"hf:{tmp_path}", image_size=64)
    assert vectors(larger, files[:1], texts)[0].shape == images[:1].shape and larger.image_size == 64
    weights = tmp_path / "model.safetensors"
    state = load_file(weights)
    save_file({**state, "text_model.embeddings.position_ids": torch.arange(12)[None]}, weights, {"format": "pt"})
    assert load_embedder(f"hf:{tmp_path}").hash == load_embedder(f"hf:{tmp_path}").hash  # as older files have it
    save_file({key: value for key, value in state.items() if key != "logit_scale"}, weights, {"format": "pt"})
    with pytest.raises(InputError, match=r"do not fit its config .missing keys: logit_scale"):
        load_embedder(f"hf:{tmp_path}")
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(InputError, match="transformers cannot load it"):
        load_embedder(f"hf:{tmp_path}")


def save_dino(folder: Path) -> Any:
    model = make_vision_model("dinov2")
    model.save_pretrained(folder)
    size = {"height": 48, "width": 48}
    transformers.BitImageProcessorPil(size={"shortest_edge": 56}, crop_size=size).save_pretrained(folder)
    return model


def test_an_image_tower_gives_its_class_token_and_reads_no_text(tmp_path: Path, data: Path) -> None:
    model = save_dino(tmp_path / "dino")
    files = [path for path, _ in class_files(data, "test")[:2]]
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "dino", backend="pil")
    pixels = processor([Image.open(file) for file in files], return_tensors="pt")["pixel_values"]
    embedder = load_embedder(f"hf:{tmp_path / 'dino'}")
    with torch.no_grad():
        expected = model(pixels).last_hidden_state[:, 0]
        found = embedder.images(torch.stack([embedder.to_pixels(Image.open(file)) for file in files]))
    torch.testing.assert_close(found, expected)
    assert embedder.texts is None and "class token" in embedder.feature

    spec = f"hf:{tmp_path / 'dino'}"
    for overrides in (ZERO_SHOT, (*PROBES[:2], "classes.shapes.tasks=[zero_shot,knn]"), RETRIEVAL):
        with pytest.raises(InputError, match=r"has no text encoder \(model type 'dinov2'\).*tasks=\[probe,knn\]"):
            eval_towers(config(spec, data, tmp_path / "out", *overrides))
    assert not (tmp_path / "out").exists()
    (folder,) = eval_towers(config(spec, data, tmp_path / "out", *PROBES, "knn.k=5"))
    assert {path.name for path in (folder / "shapes").iterdir()} == {"probe", "knn"}


def test_a_hash_is_of_weights_and_settings(tower: Path, tmp_path: Path) -> None:
    one = load_embedder(f"clips:{tower}")
    shutil.copytree(tower, tmp_path / "copy")
    again = load_embedder(f"clips:{tmp_path / 'copy'}")
    assert one.hash == again.hash and one.name != again.name
    assert load_embedder(f"clips:{tower}", image_size=64).hash != one.hash
    path = tmp_path / "copy" / "open_clip" / "open_clip_config.json"
    config = read_json(path)
    config["preprocess_cfg"]["interpolation"] = "bicubic"
    stock = load_embedder(f"open_clip:{tower / 'open_clip'}").hash
    path.write_text(json.dumps(config))
    assert load_embedder(f"open_clip:{tmp_path / 'copy' / 'open_clip'}").hash != stock


def test_towers_that_cannot_be_had(tmp_path: Path, tower: Path) -> None:
    for spec, words in {
        "clips:nowhere": "nowhere: no such folder",
        "open_clip:nowhere": "no such folder",
        "open_clip:ViT-B-32/nobody": "open_clip cannot load it",
        "open_clip:ViT-B-32/openai": "write open_clip:ViT-B-32-quickgelu/openai",
        "hf:./nowhere": "no such folder",
        f"hf:{tower / 'hf'}": "write clips:",
        f"hf:{tmp_path}": "config.json: no such file",
        "timm:resnet50": "with KIND one of clips, open_clip, hf",
    }.items():
        with pytest.raises(InputError) as caught:
            load_embedder(spec)
        assert f"tower {spec!r}: " in str(caught.value) and words in str(caught.value), str(caught.value)
    with pytest.raises(InputError, match="device 'cuda:77' cannot be used"):
        load_embedder(f"clips:{tower}", device="cuda:77")


# ----------------------------------------------------------------------------------------------- zero-shot, retrieval


def test_zero_shot_equals_open_clips_own_evaluation(
    tower: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """open_clip's classifier, its evaluation loop and its accuracy, with the 80 prompts."""
    # Its `float` of an array with one number is an error since NumPy 2.4.
    monkeypatch.setattr(open_clip_zero_shot, "float", lambda array: array.item(), raising=False)
    (folder,) = eval_towers(config(f"clips:{tower}", data, tmp_path, *ZERO_SHOT))
    found = read_json(folder / "shapes" / "zero_shot" / "results.json")

    name = f"local-dir:{tower / 'open_clip'}"
    model, preprocess = open_clip.create_model_from_pretrained(name)
    names = [one.replace("_", " ") for one in CLASSES]
    classifier = open_clip.build_zero_shot_classifier(model.eval(), open_clip.get_tokenizer(name), names, TEMPLATES)
    samples = [(preprocess(Image.open(path)), label) for path, label in class_files(data, "test")]
    loader = torch.utils.data.DataLoader(samples, batch_size=4)  # type: ignore[arg-type]
    args = argparse.Namespace(device="cpu", precision="fp32", batch_size=4)
    top1, top5 = open_clip_zero_shot.run(model, classifier, loader, args)
    assert [found["top1"], found["top5"]] == pytest.approx([top1, top5])
    assert 0 < top1 < 1 and found["n"] == TEST * len(CLASSES)

    records = rows(folder / "shapes" / "zero_shot" / "records.jsonl")
    with torch.no_grad():
        logits = (
            torch.stack([model.encode_image(pixels[None], normalize=True)[0] for pixels, _ in samples]) @ classifier
        )
    assert [record["answer"] for record in records] == [names[i] for i in logits.argmax(dim=1)]
    assert [record["image"] for record in records] == [f"{CLASSES[i]}/{p.name}" for p, i in class_files(data, "test")]
    per_class = {one: np.mean([record["score"] for record in records if record["category"] == one]) for one in CLASSES}
    assert {one: own["top1"] for one, own in found["per_class"].items()} == pytest.approx(per_class)
    assert found["mean_per_class"] == pytest.approx(np.mean(list(per_class.values())))
    assert all(record["score"] == (record["rank"] == 0) for record in records)
    assert np.mean([record["rank"] < 5 for record in records]) == pytest.approx(top5)


def plain_recall(scores: Tensor, positive: Tensor, k: int) -> float:
    """A query at a time: a hit is any own candidate among the k best."""
    hits = 0
    for row, own in zip(scores.tolist(), positive.tolist(), strict=True):
        hits += any(own[i] for i in sorted(range(len(row)), key=lambda i: -row[i])[:k])
    return hits / len(scores)


def clip_benchmark_recall(scores: Tensor, positive: Tensor, k: int) -> float:
    from clip_benchmark.metrics.zeroshot_retrieval import batchify, recall_at_k

    return (batchify(recall_at_k, scores, positive, 4, "cpu", k=k) > 0).float().mean().item()


NEEDS_CLIP_BENCHMARK = pytest.mark.skipif(
    importlib.util.find_spec("clip_benchmark") is None, reason="pip install --no-deps clip-benchmark"
)


@pytest.mark.parametrize(
    "recall", [plain_recall, pytest.param(clip_benchmark_recall, marks=NEEDS_CLIP_BENCHMARK)], ids=["plain", "theirs"]
)
def test_retrieval_equals_clip_benchmarks(
    tower: Path, data: Path, tmp_path: Path, recall: Callable[[Tensor, Tensor, int], float]
) -> None:
    (folder,) = eval_towers(config(f"open_clip:{tower / 'open_clip'}", data, tmp_path, *RETRIEVAL))
    found = read_json(folder / "scenes" / "retrieval" / "results.json")
    listed = [row for row in read_json(data / "coco" / "dataset_coco.json")["images"] if row["split"] == "test"]
    files = [data / "coco" / "val2014" / row["filename"] for row in listed]
    captions = [s["raw"].strip() for row in listed for s in row["sentences"][:5]]
    owner = torch.tensor([i for i in range(len(listed)) for _ in range(5)])
    scores = stock_texts(tower, captions) @ stock_images(tower, files).T
    positive = owner[:, None] == torch.arange(len(listed))
    for k in (1, 5, 10):
        assert found["text_to_image"][f"R@{k}"] == pytest.approx(recall(scores, positive, k))
        assert found["image_to_text"][f"R@{k}"] == pytest.approx(recall(scores.T, positive.T, k))
    assert (found["n"], found["captions"]) == (13, 65)

    by_text = rows(folder / "scenes" / "retrieval" / "text_to_image.jsonl")
    assert [row["question"] for row in by_text] == captions
    assert [row["answer"] for row in by_text] == [f"val2014/{files[i].name}" for i in scores.argmax(dim=1)]
    assert [row["cluster"] for row in by_text] == [f"val2014/{files[i].name}" for i in owner]
    by_image = rows(folder / "scenes" / "retrieval" / "image_to_text.jsonl")
    assert [row["answer"] for row in by_image] == [captions[i] for i in scores.T.argmax(dim=1)]
    assert np.mean([row["score"] for row in by_image]) == pytest.approx(found["image_to_text"]["R@1"])


# ------------------------------------------------------------------------------------------------------------- probes


def toy(samples: int, width: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Overlapping clouds, fp64."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, samples)
    values = rng.normal(size=(classes, width))[labels] + 1.3 * rng.normal(size=(samples, width))
    return torch.from_numpy(values), torch.from_numpy(labels)


def scipy_fit(values: np.ndarray, labels: np.ndarray, classes: int, l2: float) -> tuple[np.ndarray, float]:
    """Minimise the same objective, written down anew with finite differences left to nobody: scipy's L-BFGS-B in fp64."""
    samples, width = values.shape

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weight, bias = flat[: classes * width].reshape(classes, width), flat[classes * width :]
        logits = values @ weight.T + bias
        shifted = logits - logits.max(axis=1, keepdims=True)
        p = np.exp(shifted) / np.exp(shifted).sum(axis=1, keepdims=True)
        loss = -np.log(p[np.arange(samples), labels]).mean() + l2 / 2 * (weight**2).sum()
        error = (p - np.eye(classes)[labels]) / samples
        return loss, np.concatenate([(error.T @ values + l2 * weight).ravel(), error.sum(axis=0)])

    assert (
        scipy.optimize.check_grad(
            lambda x: objective(x)[0], lambda x: objective(x)[1], np.full(classes * (width + 1), 0.1)
        )
        < 1e-5
    )
    options = {"maxiter": 20_000, "maxfun": 50_000, "ftol": 1e-16, "gtol": 1e-10}
    start = np.zeros(classes * (width + 1))
    result = scipy.optimize.minimize(objective, start, jac=True, method="L-BFGS-B", options=options)
    return result.x[: classes * width].reshape(classes, width), float(result.fun)


def best_bias(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The bias that goes with a weight at its optimum, fitted alone."""

    def loss(bias: np.ndarray) -> float:
        return F.cross_entropy(torch.from_numpy(logits + bias), torch.from_numpy(labels)).item()

    return scipy.optimize.minimize(loss, np.zeros(logits.shape[1])).x


@pytest.mark.parametrize("l2", [1.0, 1e-2, 1e-4])
def test_a_fit_finds_scipys_optimum(l2: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "LOGITS", 4 * 37)  # several chunks, the last one short
    values, labels = toy(150, 6, 4)
    expected, _ = scipy_fit(values.numpy(), labels.numpy(), 4, l2)
    found = probes.fit(values, labels, 4, l2, tolerance=1e-7)
    np.testing.assert_allclose(found.weight.numpy(), expected, atol=1e-5)
    assert found.converged
    single = probes.fit(values.float(), labels, 4, l2)  # as measured: fp32, to the usual tolerance
    np.testing.assert_allclose(single.weight.numpy(), expected, atol=2e-2 * np.abs(expected).max())
    warm = probes.fit(values, labels, 4, l2, start=probes.fit(values, labels, 4, 10 * l2), tolerance=1e-7)
    np.testing.assert_allclose(warm.weight.numpy(), expected, atol=1e-5)
    assert not probes.fit(values, labels, 4, l2, max_iterations=1, tolerance=1e-9).converged


def test_centring_changes_no_optimum() -> None:
    values, labels = toy(120, 5, 3)
    scale = probes.Scale.of(values + 7)
    torch.testing.assert_close(scale(values + 7) * scale.spread, values - values.mean(dim=0))
    moved = probes.fit(values + 3, labels, 3, 1e-2, tolerance=1e-10)
    plain = probes.fit(values, labels, 3, 1e-2, tolerance=1e-10)
    torch.testing.assert_close(moved.weight, plain.weight, atol=1e-5, rtol=0)


def test_the_penalty_is_chosen_on_held_out_pictures() -> None:
    values, labels = toy(160, 30, 4)
    config = ProbeConfig(l2=[1.0, 1e-1, 1e-2, 1e-6], held_out=0.25, seed=3)
    kept, held_out = probes.split(labels, 0.25, 3)
    assert sorted([*kept.tolist(), *held_out.tolist()]) == list(range(160))
    for label in range(4):
        own = int((labels == label).sum())
        assert int((labels[held_out] == label).sum()) == round(0.25 * own)
    assert not torch.equal(held_out, probes.split(labels, 0.25, 4)[1])

    plain = {}
    for l2 in config.l2:
        x, y = values[kept].numpy(), labels[kept].numpy()
        weight, _ = scipy_fit(x, y, 4, l2)
        bias = best_bias(x @ weight.T, y)
        plain[l2] = ((values[held_out].numpy() @ weight.T + bias).argmax(axis=1) == labels[held_out].numpy()).mean()
    probe = probes.linear_probe(values, labels, 4, config)
    assert probe.held_out == pytest.approx(plain, abs=1.01 / len(held_out))  # one picture may lie on the line
    assert probe.l2 == max(l2 for l2, accuracy in probe.held_out.items() if accuracy == max(probe.held_out.values()))
    assert probe.fitted == len(kept)
    torch.testing.assert_close(probe.linear.weight, probes.fit(values, labels, 4, probe.l2).weight)
    assert probes.at_edge(1.0, config.l2) and not probes.at_edge(1e-2, config.l2) and not probes.at_edge(1.0, [1.0])


def test_a_class_of_one_picture_stays_in_training() -> None:
    kept, held_out = probes.split(torch.tensor([0, 1, 1, 2, 2, 2]), 0.2, 0)
    assert 0 in kept.tolist() and len(held_out) == 2


def test_knn_equals_a_plain_vote(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "LOGITS", 200)  # several chunks
    values, labels = toy(90, 8, 5)
    values = F.normalize(values, dim=-1)
    train, own, queries, truth = values[:70], labels[:70], values[70:], labels[70:]
    found = probes.knn_scores(queries, train, own, 5, KnnConfig(k=7, temperature=0.3))
    for i, query in enumerate(queries.tolist()):
        cosines = [sum(a * b for a, b in zip(query, other, strict=True)) for other in train.tolist()]
        votes = [0.0] * 5
        for j in sorted(range(70), key=lambda j: -cosines[j])[:7]:
            votes[own[j]] += math.exp(cosines[j] / 0.3)
        assert found[i].tolist() == pytest.approx(votes)
        best = sorted(range(5), key=lambda c: -votes[c])
        assert (int(probes.ranks(found[i : i + 1], truth[i : i + 1])[0]) == 0) == (best[0] == truth[i])
    tie = probes.ranks(torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]), torch.tensor([0, 1]))
    assert tie.tolist() == [1, 2]  # what ties with the right class comes before it


def test_probe_and_knn_from_files(tower: Path, data: Path, tmp_path: Path) -> None:
    """The colours and shapes can be read off even a random tower's features; figures follow from the records."""
    overrides = (*PROBES, "knn.k=5", "probe.l2=[1.0,0.1,0.01,0.001]")
    (folder,) = eval_towers(config(f"clips:{tower}", data, tmp_path, *overrides))
    train, test = class_files(data, "train"), class_files(data, "test")
    x, y = stock_images(tower, [path for path, _ in train]), torch.tensor([label for _, label in train])
    queries, truth = stock_images(tower, [path for path, _ in test]), torch.tensor([label for _, label in test])

    knn = read_json(folder / "shapes" / "knn" / "results.json")
    nearest = (queries @ x.T).topk(5)
    votes = torch.zeros(len(truth), 6).index_put_(
        (torch.arange(len(truth))[:, None], y[nearest.indices]), (nearest.values / 0.07).exp(), accumulate=True
    )
    assert knn["top1"] == pytest.approx((votes.argmax(dim=1) == truth).float().mean().item())
    assert (knn["k"], knn["n_train"]) == (5, TRAIN * 6)

    probe = read_json(folder / "shapes" / "probe" / "results.json")
    assert probe["l2"] in (1.0, 0.1, 0.01, 0.001) and probe["n_fitted"] < probe["n_train"] == TRAIN * 6
    centred = (x - x.mean(dim=0)).double()
    spread = (x - x.mean(dim=0)).square().mean().sqrt().double()
    weight, _ = scipy_fit((centred / spread).numpy(), y.numpy(), 6, probe["l2"])
    logits = ((queries - x.mean(dim=0)).double() / spread).numpy() @ weight.T
    bias = best_bias((centred / spread).numpy() @ weight.T, y.numpy())
    expected = ((logits + bias).argmax(axis=1) == truth.numpy()).mean()
    assert probe["top1"] == pytest.approx(expected, abs=1.01 / len(truth))
    assert probe["top1"] > 0.5 and knn["top1"] > 0.5  # chance is 0.17


# -------------------------------------------------------------------------------------------------------------- files


def test_tars_as_clip_benchmark_writes_them(tower: Path, data: Path, tmp_path: Path) -> None:
    one = read_class_set("wds", ClassSet(test="wds/test"), data)
    assert one.spoken == [name.replace("_", " ") for name in CLASSES]
    assert [template("owl") for template in one.templates] == ["a photo of a owl.", "a drawing of the owl."]
    shards = [str(path) for path in sorted((data / "wds" / "test").glob("*.tar"))]
    theirs = list(webdataset.WebDataset(shards, shardshuffle=False).to_tuple("__key__", "png", "cls"))
    assert len(theirs) == len(one.test.pictures) == 30 and len(shards) == 3
    for i, (key, picture, label) in enumerate(theirs):
        assert one.test.pictures.read(i)[0] == picture and int(label) == one.test.labels[i]
        assert one.test.pictures.ids[i].endswith(f".tar/{key}")
    out = eval_towers(
        config(f"clips:{tower}", data, tmp_path, *ZERO_SHOT, "classes.wds.test=wds/test",
               "classes.wds.templates=openai_imagenet")
    )[0]  # fmt: skip
    of_folders, of_tars = (read_json(out / name / "zero_shot" / "results.json") for name in ("shapes", "wds"))
    assert of_folders["top1"] == of_tars["top1"] and of_folders["top5"] == of_tars["top5"]


def test_captions_in_tars(data: Path, tmp_path: Path) -> None:
    texts = [["a dog", "the dog ", "dogs", "one dog", "my dog", "six"], ["an owl"], ["a fox", "red fox"]]
    picture = (data / "classes" / "test" / "red_heart" / "00.png").read_bytes()
    buffer = io.BytesIO()
    Image.open(io.BytesIO(picture)).save(buffer, "WEBP", lossless=True)
    write_shards(
        [{"__key__": f"{i}", "webp": buffer.getvalue(), "txt": "\n".join(own)} for i, own in enumerate(texts)],
        tmp_path / "test",
    )
    (tmp_path / "dataset_type.txt").write_text("retrieval\n")
    five = read_caption_set("c", CaptionSet(captions="test"), tmp_path)
    assert five.captions == ["a dog", "the dog", "dogs", "one dog", "my dog", "an owl", "a fox", "red fox"]
    assert five.owner.tolist() == [0, 0, 0, 0, 0, 1, 2, 2]
    every = read_caption_set("c", CaptionSet(captions="test/*.tar", per_image=None), tmp_path)
    assert len(every.captions) == 9 and every.pictures.read(2)[0] == buffer.getvalue()
    assert five.fingerprint() != every.fingerprint()


def test_sets_that_are_not_whole(data: Path, tmp_path: Path) -> None:
    """A download that was cut off gives no figure unless it is said that it may."""
    n = TEST * len(CLASSES)
    whole = ClassSet("classes/test", "classes/train", ["probe"], test_count=n, train_count=TRAIN * len(CLASSES))
    assert len(read_class_set("s", whole, data).test.pictures) == n
    assert len(read_caption_set("c", CaptionSet("coco/dataset_coco.json", "coco", count=13), data).pictures) == 13
    sets = load_settings(TowerEvalConfig, Path(eval_suites.__file__).parent, ["mscoco", "towers=[clips:x]", "out=x"])
    for read, key, have in (
        (lambda: read_class_set("s", dataclasses.replace(whole, test_count=n + 1), data), "s.test_count=null", n),
        (lambda: read_class_set("s", dataclasses.replace(whole, train_count=1), data), "s.train_count=null", 72),
        (
            lambda: read_caption_set(
                "mscoco", dataclasses.replace(sets.captions["mscoco"], captions="coco/dataset_coco.json", images="coco"), data
            ),
            "captions.mscoco.count=null",
            13,
        ),
    ):  # fmt: skip
        with pytest.raises(InputError, match=rf"has {have} pictures, but .* are published.*{key}"):
            read()


def test_flickrs_json_and_pictures_without_their_folder(data: Path, tmp_path: Path) -> None:
    content = read_json(data / "coco" / "dataset_coco.json")
    (tmp_path / "images").mkdir()
    for row in content["images"]:
        shutil.copy(data / "coco" / "val2014" / row["filename"], tmp_path / "images")
    coco = read_caption_set("c", CaptionSet(captions=str(data / "coco/dataset_coco.json"), images="images"), tmp_path)
    for row in content["images"]:
        del row["filepath"]
    (tmp_path / "flickr.json").write_text(json.dumps(content))
    flickr = read_caption_set("f", CaptionSet(captions="flickr.json", images="images"), tmp_path)
    assert flickr.pictures.ids == coco.pictures.ids == [f"COCO_{i}.jpg" for i in range(13)]
    train = read_caption_set("f", CaptionSet(captions="flickr.json", images="images", split="train"), tmp_path)
    assert train.pictures.ids == ["COCO_13.jpg"]


def test_imagenets_names(tmp_path: Path) -> None:
    ids = sorted(f"n{10_000_000 - 7 * i:08d}" for i in range(1000))
    assert prompts.class_names("imagenet", ids, tmp_path, tmp_path) == list(open_clip.IMAGENET_CLASSNAMES)
    assert prompts.class_names(None, ids, tmp_path, tmp_path) == list(open_clip.IMAGENET_CLASSNAMES)
    assert prompts.class_names("imagenet", None, tmp_path, tmp_path) == list(open_clip.IMAGENET_CLASSNAMES)
    assert prompts.class_names("folders", ids, tmp_path, tmp_path) == ids
    eighty = prompts.templates(None, tmp_path, tmp_path)
    assert [template("x") for template in eighty] == [template("x") for template in TEMPLATES] and len(eighty) == 80
    assert len(prompts.templates("simple_imagenet", tmp_path, tmp_path)) == 7
    with pytest.raises(InputError, match="has 999 class folders; ImageNet has 1,000"):
        prompts.class_names("imagenet", ids[1:], tmp_path, tmp_path)


def test_class_files_that_do_not_fit(data: Path, tmp_path: Path) -> None:
    place = tmp_path / "set"

    def error(test: str = "set/test", **settings: Any) -> str:
        with pytest.raises(InputError) as caught:
            read_class_set("s", ClassSet(test=test, **settings), tmp_path)
        return str(caught.value)

    assert "nowhere" in error("nowhere")
    shutil.copytree(data / "classes", place)
    shutil.rmtree(place / "train" / "red_heart")
    assert "set/train: has no class 'red_heart'" in error(train="set/train", tasks=["knn"])
    assert "one has class folders, the other tars" in error(train=str(data / "wds" / "test"), tasks=["knn"])
    (place / "classnames.txt").write_text("one\ntwo\n")
    assert "classnames.txt: names 2 classes, but" in error()
    (place / "classnames.txt").write_text("one\n\nthree\n")
    assert "classnames.txt, line 2: is empty" in error()
    (place / "classnames.txt").unlink()
    (place / "mine.txt").write_text("a photo of {c}\na photo\n")
    assert "mine.txt, line 2: 'a photo' has no place for the class's name" in error(templates="set/mine.txt")
    assert "gone.txt: no such file" in error(names="set/gone.txt")

    tars = tmp_path / "tars"
    picture = (data / "classes" / "test" / "red_heart" / "00.png").read_bytes()
    write_shards([{"__key__": "a", "png": picture, "cls": "5"}], tars)
    assert "nothing says what its classes are called; put classnames.txt" in error("tars")
    (tars / "classnames.txt").write_text("one\ntwo\n")
    assert "shard-000000.tar/a' is of class 5, but the 2 names are for the numbers 0 to 1" in error("tars")
    for sample, words in (
        ({"png": picture}, "key 'a': no a.cls with the number"),
        ({"png": picture, "cls": "cat"}, "key 'a': its cls is b'cat'"),
        ({"cls": "0"}, "key 'a': no picture"),
    ):
        write_shards([{"__key__": "a", **sample}], tars)
        assert words in error("tars")
    (tars / "shard-000000.tar").write_bytes(b"torn")
    assert "not a tar" in error("tars")


def test_caption_files_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "c.json"

    def error(content: Any, split: str = "test") -> str:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        with pytest.raises(InputError) as caught:
            read_caption_set("c", CaptionSet(captions="c.json", images="images", split=split), tmp_path)
        return str(caught.value)

    one = {"filename": "a.jpg", "split": "test", "sentences": [{"raw": "a dog"}]}
    assert "line 1: not JSON" in error("{")
    assert "holds no list under 'images'" in error({"annotations": []})
    assert "no picture of split 'tset' (splits found: test)" in error({"images": [one]}, "tset")
    assert "has no 'filename'" in error({"images": [{"split": "test"}]})
    assert "inside it" in error({"images": [{**one, "filename": "../../a.jpg"}]})
    assert "'a.jpg' has no caption" in error({"images": [{**one, "sentences": [{"raw": " "}]}]})
    missing = error({"images": [one, {**one, "filename": "b.jpg"}]})
    assert "images: 2 of 2 pictures are missing, for example a.jpg" in missing


# ---------------------------------------------------------------------------------------------------- stopping, table


def test_a_damaged_picture_stops_the_run_and_names_itself(tower: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(data / "classes", tmp_path / "classes")
    bad = tmp_path / "classes" / "test" / "pink_flower" / "02.png"
    whole = bad.read_bytes()
    bad.write_bytes(whole[: len(whole) // 2])
    run = config(f"clips:{tower}", tmp_path, tmp_path / "out", *ZERO_SHOT)
    with pytest.raises(InputError, match=r"pink_flower/02\.png: not a readable picture .*; put a whole one there"):
        eval_towers(run)
    bad.write_bytes(whole)
    eval_towers(run)


def test_a_killed_run_goes_on_with_the_next_part(
    tower: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "PART", 7)
    seen: list[str] = []
    limit = 18
    own = features.open_image

    def counted(source: bytes, name: str) -> Image.Image:
        if len(seen) == limit:
            raise KeyboardInterrupt
        seen.append(name)
        return own(source, name)

    monkeypatch.setattr(features, "open_image", counted)
    run = config(f"clips:{tower}", data, tmp_path / "out", *ZERO_SHOT, "batch_size=4", "workers=1")
    with pytest.raises(KeyboardInterrupt):
        eval_towers(run)
    seen.clear()
    limit = 10**6
    (folder,) = eval_towers(run)
    assert len(seen) == 30 - 14  # two parts of seven were whole
    results = folder / "shapes" / "zero_shot" / "results.json"
    before = results.stat().st_mtime_ns
    seen.clear()
    eval_towers(run)
    assert not seen and results.stat().st_mtime_ns == before
    # Another set with the same pictures, and another task, are served from the same vectors.
    eval_towers(config(f"clips:{tower}", data, tmp_path / "out", "classes.again.test=classes/test",
                       "classes.again.train=classes/test", "classes.again.tasks=[zero_shot,knn]"))  # fmt: skip
    assert not seen
    (direct,) = eval_towers(config(f"clips:{tower}", data, tmp_path / "new", *ZERO_SHOT))
    assert read_json(direct / "shapes/zero_shot/results.json") == read_json(results)
    with pytest.raises(InputError, match=r"holds another result \(config.templates: 80 → 7"):
        eval_towers(
            config(f"clips:{tower}", data, tmp_path / "out", *ZERO_SHOT, "classes.shapes.templates=simple_imagenet")
        )
    part = next((tmp_path / "out" / "embeddings").rglob("pictures-*"))
    part.write_bytes(part.read_bytes()[:20])
    with pytest.raises(InputError, match="delete it, and it is computed again"):
        eval_towers(config(f"clips:{tower}", data, tmp_path / "out", "classes.third.test=classes/test"))


def test_vectors_do_not_depend_on_batches(tower: Path, data: Path, tmp_path: Path) -> None:
    one = read_class_set("s", ClassSet(test="classes/test"), data)
    embedder = load_embedder(f"clips:{tower}")
    small = Features(embedder, tmp_path / "a", "fp32", 3, 1).pictures(one.test.pictures, "a")
    large = Features(embedder, tmp_path / "b", "fp32", 64, 2).pictures(one.test.pictures, "b")
    torch.testing.assert_close(small.values, large.values, atol=1e-6, rtol=0)
    assert small.content == large.content
    half = Features(embedder, tmp_path / "c", "bf16", 64, 2).pictures(one.test.pictures, "c")
    assert not torch.equal(half.values, large.values)
    torch.testing.assert_close(half.values, large.values, atol=0.05, rtol=0)


def test_towers_side_by_side(tower: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_hf(tmp_path / "clip", "clip")
    specs = [f"clips:{tower}", f"open_clip:{tower / 'open_clip'}", f"hf:{tmp_path / 'clip'}"]
    out = tmp_path / "out"
    folders = eval_towers(config(specs, data, out, *ZERO_SHOT, *RETRIEVAL))
    shown = capsys.readouterr().out
    assert "Paired differences" in shown and "Each column is one training" in shown
    table = tower_table(folders, ["shapes", "scenes"])
    assert {figure.set for figure in tower_table(folders).figures} == {"shapes", "scenes"}
    assert json.loads((out / "table.json").read_text()) == json.loads(json.dumps(table.to_dict()))
    assert [(f.set, f.metric) for f in table.figures[::3]] == [
        ("shapes", "top-1"), ("scenes", "R@1 picture → caption"), ("scenes", "R@1 caption → picture")
    ]  # fmt: skip
    for figure in table.figures:
        place = out / figure.tower / figure.set / figure.task
        results = read_json(place / "results.json")
        ways = {"R@1 picture → caption": "image_to_text", "R@1 caption → picture": "text_to_image"}
        way = ways.get(figure.metric)
        assert figure.value == pytest.approx(results["top1"] if way is None else results[way]["R@1"])
        assert figure.interval[0] <= figure.value <= figure.interval[1]
    assert len(table.differences) == 9
    for row in table.differences:
        file = {"top-1": "records", "R@1 picture → caption": "image_to_text"}.get(row.metric, "text_to_image")
        a, b = (rows(out / name / row.set / row.task / f"{file}.jsonl") for name in (row.a, row.b))
        expected = paired_difference([r["score"] for r in a], [r["score"] for r in b], [r["image"] for r in a])
        assert (row.difference, row.p_value) == (expected.difference, expected.p_value)
        assert row.adjusted_p >= row.p_value
        if row.a.startswith("clips") and row.b.startswith("open_clip"):  # the same weights
            assert (row.difference, row.better) == (0.0, None)
    for file in out.glob("*/*/*/*.jsonl"):
        for number, row in enumerate(rows(file)):
            record = Record(**{key: value for key, value in row.items() if key not in ("image", "rank")})
            assert record.doc_id == number and record.right == (row["rank"] == 0)


def test_towers_that_saw_different_pictures_are_not_compared(tower: Path, data: Path, tmp_path: Path) -> None:
    (a,) = eval_towers(config(f"clips:{tower}", data, tmp_path / "a", *ZERO_SHOT))
    shutil.copytree(data / "classes", tmp_path / "classes")
    path = tmp_path / "classes" / "test" / "red_heart" / "00.png"
    path.write_bytes(bytes(path.read_bytes())[:-1] + b"?")  # after the picture's end: names and sizes are the same
    spec = f"open_clip:{tower / 'open_clip'}"
    (b,) = eval_towers(config(spec, tmp_path, tmp_path / "b", *ZERO_SHOT))
    with pytest.raises(InputError, match=r"not measured in the same way \(pictures.test"):
        tower_table([a, b])
    with pytest.raises(InputError, match="holds no finished measurement of nothing"):
        tower_table([a], ["nothing"])
    records = a / "shapes" / "zero_shot" / "records.jsonl"
    records.write_text(records.read_text().replace('"score": 0.0', '"score": 9.0'))
    with pytest.raises(InputError, match=r"records\.jsonl: malformed"):
        tower_table([a])


# ------------------------------------------------------------------------------------------------------- command line


def test_the_command_line_is_sorted_out(tmp_path: Path) -> None:
    given = ["clips:runs/a=b", "mscoco", "imagenet", "open_clip:ViT-B-32/laion2b", f"out={tmp_path}", "data=d"]
    assert arrange(given) == [
        "mscoco", "imagenet", 'towers=["clips:runs/a=b", "open_clip:ViT-B-32/laion2b"]', f"out={tmp_path}", "data=d"
    ]  # fmt: skip
    assert eval_suites.__file__ is not None
    package = Path(eval_suites.__file__).parent
    found = load_settings(TowerEvalConfig, package, arrange(given))
    assert found.towers == ["clips:runs/a=b", "open_clip:ViT-B-32/laion2b"]
    assert set(found.classes) == {"imagenet"} and set(found.captions) == {"mscoco"}
    assert found.captions["mscoco"].per_image == 5 and found.classes["imagenet"].templates == "openai_imagenet"
    more = load_settings(TowerEvalConfig, package, arrange(["imagenet_probe", "flickr30k", *given[:1], "out=o"]))
    assert more.classes["imagenet"].tasks == ["probe", "knn"] and set(more.captions) == {"flickr30k"}
    (tmp_path / "mine.yaml").write_text("classes:\n  pets:\n    test: pets/test\n")
    mine = load_settings(
        TowerEvalConfig, package, arrange([str(tmp_path / "mine.yaml"), "imagenet", *given[:1], "out=o"])
    )
    assert list(mine.classes) == ["pets", "imagenet"]
    with pytest.raises(InputError, match="'clip:runs/a' is no tower"):
        arrange(["clip:runs/a", "imagenet"])
    assert set(KINDS) == set(llava_bridge.towers.KINDS)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ((), "nothing to measure on"),
        (("classes.a.test=x", "classes.a.tasks=[knn]"), "the task knn needs train"),
        (("classes.a.test=x", "classes.a.tasks=[]"), "tasks must name"),
        (("classes.a/b.test=x",), "becomes a folder"),
        (("classes.a.test=x", "captions.a.captions=y"), "names a set of classes and one of captions"),
        (("captions.a.captions=y.json",), "images must name the folder"),
        (("captions.a.captions=y", "captions.a.images=z"), "goes with a .json"),
        (("classes.a.test=x", "probe.l2=[0]"), "strength greater than 0"),
        (("classes.a.test=x", "classes.a.tst=y"), "unknown key 'classes.a.tst'"),
        (("classes.a.test=x", "towers=[resnet]"), "write KIND:NAME"),
    ],
)
def test_settings_that_make_no_sense(overrides: tuple[str, ...], words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        config("clips:a", tmp_path, tmp_path, *overrides)
    assert words in str(caught.value)


def test_too_little_to_learn_from(tower: Path, data: Path, tmp_path: Path) -> None:
    for overrides, words in (
        (("knn.k=73",), "knn.k=73 is more than its 72 training pictures"),
        (("classes.shapes.train=one", "knn.k=1"), "every class has one training picture"),
    ):
        for name in CLASSES:
            (tmp_path / "one" / name).mkdir(parents=True, exist_ok=True)
            shutil.copy(data / "classes" / "train" / name / "00.png", tmp_path / "one" / name)
        absolute = [o.replace("=classes/", f"={data}/classes/") for o in PROBES]
        with pytest.raises(InputError, match=words):
            eval_towers(config(f"clips:{tower}", tmp_path, tmp_path / "out", *absolute, *overrides))


def test_the_config_needs_no_torch() -> None:
    code = "import sys, eval_suites.towers.config; print([n for n in ('torch', 'transformers') if n in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "[]", result.stderr
