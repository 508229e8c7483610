"""What a tower knows without further training: retrieval among held-out pictures, and classification by the classes' names."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from clips_core.config import DataConfig, EvaluationConfig, SourceConfig
from clips_core.data import read_caption, read_image, to_pixels
from clips_core.errors import InputError
from clips_core.formats import IMAGE_MEAN, IMAGE_STD
from clips_core.images import open_image
from clips_core.model import CLIPS
from clips_core.sources import Sources
from clips_core.tokenizer import ClipsTokenizer

RECALLS = (1, 5, 10)
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def normalise(pixels: Tensor) -> Tensor:
    """uint8 [B, 3, S, S] → float32, ImageNet mean and standard deviation."""
    mean = torch.tensor(IMAGE_MEAN, device=pixels.device).view(3, 1, 1)
    std = torch.tensor(IMAGE_STD, device=pixels.device).view(3, 1, 1)
    return (pixels.float() / 255 - mean) / std


@torch.no_grad()
def embed_images(model: CLIPS, pixels: Iterable[Tensor]) -> Tensor:
    """L2-normalised features in fp32, [N, E], of batches of pictures, uint8 [B, 3, S, S]."""
    device = model.logit_scale.device
    was_training = model.training
    model.eval()
    features = [F.normalize(model.visual(normalise(part.to(device)))[0].float(), dim=-1) for part in pixels]
    model.train(was_training)
    return torch.cat(features)


@torch.no_grad()
def embed_texts(model: CLIPS, tokenizer: ClipsTokenizer, texts: Sequence[str], batch_size: int = 256) -> Tensor:
    """L2-normalised features in fp32, [N, E]."""
    device = model.logit_scale.device
    was_training = model.training
    model.eval()
    ids = torch.from_numpy(tokenizer.encode(texts, model.config.context_length))
    features = [F.normalize(model.text(part.to(device))[0].float(), dim=-1) for part in ids.split(batch_size)]
    model.train(was_training)
    return torch.cat(features)


# ---------------------------------------------------------------------------------------------------------------------
# Retrieval
# ---------------------------------------------------------------------------------------------------------------------


class RetrievalSet:
    """Held-out pictures with their captions, read once.

    A picture may have several captions (five in MSCOCO and Flickr30K): the lines of its text file, as CLIP_benchmark's shards
    have it, or a JSON field with a list of them.

    Raises:
        InputError: as `read_caption` and `read_image`, naming shard and key.
    """

    def __init__(self, config: EvaluationConfig, data: DataConfig, image_size: int):
        """`data` says what the pictures are called, and where remote files are copied."""
        assert config.shards is not None
        train = [SourceConfig(path=config.shards, weight=1.0)]
        sources = Sources(dataclasses.replace(data, train=train, web_caption=config.caption, max_bad_share=0.0))
        captions, pixels = [], []
        for chunk in range(len(sources.sources[0].counts)):
            reader = sources.open(0, chunk)
            for index in range(len(reader)):
                captions.append(read_captions(reader[index], config.caption))
                pixels.append(to_pixels(read_image(reader[index], data.image), image_size))
            reader.close()
            sources.drop(0, chunk)
        self.captions = [caption for own in captions for caption in own]
        self.owner = torch.tensor(
            [i for i, own in enumerate(captions) for _ in own]
        )  # int64 [C]: each caption's picture
        self.pixels = torch.from_numpy(np.stack(pixels))  # uint8 [N, 3, S, S]


def read_captions(sample: dict[str, Any], names: Sequence[str]) -> list[str]:
    """All captions of a sample: a text's lines, or a JSON field's string or list of strings. Errors as `read_caption`."""
    for name in names:
        extension, _, field = name.partition(".")
        if field and extension in sample:
            try:
                content = json.loads(sample[extension])
            except (UnicodeDecodeError, json.JSONDecodeError):
                content = None  # read_caption says what is wrong
            value = content.get(field) if isinstance(content, dict) else None
            if isinstance(value, list) and value and all(isinstance(text, str) and text.strip() for text in value):
                return value
            return [read_caption(sample, name)]
    return [line for line in read_caption(sample, names).splitlines() if line.strip()]


def embed(
    model: CLIPS, retrieval: RetrievalSet, tokenizer: ClipsTokenizer, batch_size: int = 256
) -> tuple[Tensor, Tensor]:
    """L2-normalised features in fp32 of the pictures [N, E] and of the captions [C, E]."""
    images = embed_images(model, retrieval.pixels.split(batch_size))
    return images, embed_texts(model, tokenizer, retrieval.captions, batch_size)


def ranks(queries: Tensor, candidates: Tensor, positive: Sequence[Sequence[int]] | None = None) -> Tensor:
    """Rank of the best of each query's own candidates, 0 best, int64 [Q]: how many others come before it.

    Another candidate that ties with it counts as before it, and so does one whose similarity is not a number: a model that maps
    everything to one point, or to NaN, scores nothing.

    Args:
        queries, candidates: L2-normalised features [Q, E], [C, E].
        positive: the rows of each query's own candidates; row i for query i when left out.
    """
    rows = positive if positive is not None else [[i] for i in range(len(queries))]
    result = torch.empty(len(queries), dtype=torch.int64)
    for start in range(0, len(queries), 1024):  # never the whole of 25,000 × 5,000
        similarity = queries[start : start + 1024] @ candidates.T
        own = torch.zeros_like(similarity, dtype=torch.bool)
        for row, indices in zip(own, rows[start : start + 1024], strict=True):
            row[list(indices)] = True
        result[start : start + 1024] = ranks_by_score(similarity, own).cpu()
    return result


def ranks_by_score(scores: Tensor, own: Tensor) -> Tensor:
    """As `ranks`, from the scores [Q, C] of all candidates and a mask [Q, C] of each query's own ones."""
    best = scores.masked_fill(~own, -torch.inf).amax(dim=1, keepdim=True)
    return (~own & ~(scores < best)).sum(dim=1)


def recall(rank: Tensor, k: int) -> float:
    """Share of queries with an own candidate among the first `k`."""
    return (rank < k).float().mean().item()


def retrieval(image: Tensor, text: Tensor, owner: Tensor | None = None) -> dict[str, Any]:
    """R@1/5/10 in both directions with the rank of every query, and what chance gives.

    The field's protocol: a picture is found right when any of its captions is among the first k; a caption, when its picture
    is.

    Args:
        image, text: L2-normalised features [N, E], [C, E].
        owner: the picture of each caption, int64 [C]; left out, row i of one belongs to row i of the other.
    """
    pictures, captions = len(image), len(text)
    if owner is None:
        if captions != pictures:
            raise ValueError(f"{captions} captions of {pictures} pictures: `owner` must say which belongs to which")
        owner = torch.arange(pictures)
    own: list[list[int]] = [[] for _ in range(pictures)]
    for caption, picture in enumerate(owner.tolist()):
        own[picture].append(caption)
    rank = {
        "image_to_text": ranks(image, text, own),
        "text_to_image": ranks(text, image, [[picture] for picture in owner.tolist()]),
    }
    return {
        **{name: {f"R@{k}": recall(value, k) for k in RECALLS} for name, value in rank.items()},
        "n": pictures,
        "captions": captions,
        "owner": owner.tolist(),  # the picture of each caption
        "chance": {f"R@{k}": min(1.0, k / pictures) for k in RECALLS},  # exact for one caption a picture
        "ranks": {name: value.tolist() for name, value in rank.items()},
    }


# ---------------------------------------------------------------------------------------------------------------------
# Classification
# ---------------------------------------------------------------------------------------------------------------------

Templates = Sequence[str | Callable[[str], str]]  # "a photo of a {}.", or a function of the class's name


def class_weights(model: CLIPS, tokenizer: ClipsTokenizer, names: Sequence[str], templates: Templates) -> Tensor:
    """One direction a class, [E, C]: the L2-normalised mean of the features of its name in every template.

    `open_clip.OPENAI_IMAGENET_TEMPLATES` are the 80 prompts that the field reports ImageNet with.
    """
    columns = []
    for name in tqdm(names, desc="classes", unit="class", disable=len(names) * len(templates) < 1000):
        columns.append(class_direction(embed_texts(model, tokenizer, prompts_of(name, templates))))
    return torch.stack(columns, dim=1)


def prompts_of(name: str, templates: Templates) -> list[str]:
    """A class's name in every template."""
    return [template.format(name) if isinstance(template, str) else template(name) for template in templates]


def class_direction(prompts: Tensor) -> Tensor:
    """A class's direction, [E], from the L2-normalised features of its prompts, [P, E]."""
    return F.normalize(prompts.mean(dim=0), dim=-1)


def probabilities(image: Tensor, weights: Tensor, scale: float = 100.0) -> Tensor:
    """How the released models' example tells classes apart: the softmax over `scale` times the cosine, [N, C].

    Args:
        image: L2-normalised features [N, E].
        weights: [E, C], see `class_weights`; or the transposed features of C plain texts.
    """
    return (scale * image @ weights).softmax(dim=-1)


def accuracy(image: Tensor, labels: Tensor, weights: Tensor, names: Sequence[str]) -> dict[str, Any]:
    """Top-1 and top-5 accuracy, and top-1 of every class.

    Args:
        image: L2-normalised features [N, E].
        labels: the class of each picture, int64 [N].
        weights: [E, C], see `class_weights`.
        names: of the C classes, each once; they key the result.
    """
    return accuracy_by_rank(ranks(image, weights.T, [[label] for label in labels.tolist()]), labels, names)


def accuracy_by_rank(rank: Tensor, labels: Tensor, names: Sequence[str]) -> dict[str, Any]:
    """As `accuracy`, from the rank of each picture's own class, 0 best, int64 [N]."""
    right = rank == 0
    per_class = {}
    for label, name in enumerate(names):
        own = right[labels == label]
        if len(own):
            per_class[name] = {"top1": own.float().mean().item(), "n": len(own)}
    return {
        "top1": recall(rank, 1),
        "top5": recall(rank, 5),
        "mean_per_class": float(np.mean([value["top1"] for value in per_class.values()])),
        "n": len(labels),
        "classes": len(names),
        "per_class": per_class,
        "ranks": rank.tolist(),
    }


def classification(
    model: CLIPS,
    tokenizer: ClipsTokenizer,
    folder: Path,
    templates: Templates,
    names: Mapping[str, str] | None = None,
    batch_size: int = 256,
) -> dict[str, Any]:
    """Zero-shot classification of a folder that has a folder of pictures for each class.

    Args:
        folder: `folder/CLASS/…/picture.jpg`.
        templates: prompts, see `class_weights`.
        names: what a class's folder is called in words; left out, the folder's own name. For ImageNet's folders (n01440764 …)
            `imagenet_names` makes it.

    Returns:
        As `accuracy`, with `bad`: what is wrong with each picture that could not be read.

    Raises:
        InputError: if the folder holds no class, a class has no picture or no name, or two have the same name.
    """
    classes = class_folders(folder)
    spoken = {name: name.replace("_", " ") for name in classes} if names is None else names
    unnamed = sorted(classes.keys() - spoken.keys())
    if unnamed:
        raise InputError(f"{folder / unnamed[0]}: this class has no name among the {len(spoken)} that were given")
    weights = class_weights(model, tokenizer, [spoken[name] for name in classes], templates)
    files = [(path, label) for label, paths in enumerate(classes.values()) for path in paths]
    labels: list[int] = []
    bad: list[str] = []

    def batches() -> Iterable[Tensor]:
        pixels: list[np.ndarray] = []
        for path, label in tqdm(files, desc=f"classify {folder.name}", unit="picture"):
            try:
                pixels.append(to_pixels(open_image(path, str(path)), model.config.image_size))
            except InputError as error:
                bad.append(str(error))
                continue
            labels.append(label)
            if len(pixels) == batch_size:
                yield torch.from_numpy(np.stack(pixels))
                pixels = []
        if pixels:
            yield torch.from_numpy(np.stack(pixels))
        if not labels:
            raise InputError(f"{folder}: none of its {len(files)} pictures can be read; the first: {bad[0]}")

    features = embed_images(model, batches())
    return accuracy(features, torch.tensor(labels), weights, list(classes)) | {"bad": bad}


def class_folders(folder: Path) -> dict[str, list[Path]]:
    """The pictures of each class by the name of its folder, both sorted."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    classes = {}
    for path in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        classes[path.name] = sorted(file for file in path.rglob("*") if file.suffix.lower() in PICTURES)
        if not classes[path.name]:
            raise InputError(f"{path}: this class holds no picture ({', '.join(PICTURES)})")
    if len(classes) < 2:
        raise InputError(f"{folder}: holds {len(classes)} class folder(s); at least two are needed to tell apart")
    return classes


def imagenet_names(folder: Path) -> dict[str, str]:
    """open_clip's names of ImageNet's classes, by WordNet id: its list is in the order of the 1,000 sorted ids."""
    import open_clip

    ids = sorted(class_folders(folder))
    if not are_imagenet_ids(ids):
        raise InputError(f"{folder}: has {len(ids)} class folders; ImageNet has 1,000, named n01440764 and so on")
    return dict(zip(ids, open_clip.IMAGENET_CLASSNAMES, strict=True))


def are_imagenet_ids(ids: Sequence[str]) -> bool:
    """Whether classes are called as the folders of ImageNet's 1,000 are."""
    return len(ids) == 1000 and all(name[:1] == "n" and name[1:].isdigit() for name in ids)
