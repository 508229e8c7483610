"""What a tower knows without further training: retrieval among held-out pictures."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clips_core.config import EvaluationConfig
from clips_core.data import read_caption, read_image, to_pixels
from clips_core.formats import IMAGE_MEAN, IMAGE_STD
from clips_core.model import CLIPS
from clips_core.shards import Shards
from clips_core.tokenizer import ClipsTokenizer

RECALLS = (1, 5, 10)


def normalise(pixels: Tensor) -> Tensor:
    """uint8 [B, 3, S, S] → float32, ImageNet mean and standard deviation."""
    mean = torch.tensor(IMAGE_MEAN, device=pixels.device).view(3, 1, 1)
    std = torch.tensor(IMAGE_STD, device=pixels.device).view(3, 1, 1)
    return (pixels.float() / 255 - mean) / std


class RetrievalSet:
    """Held-out pictures with one caption each, read once.

    Raises:
        InputError: as `read_caption` and `read_image`, naming shard and key.
    """

    def __init__(self, config: EvaluationConfig, shards: Path, extensions: list[str], image_size: int):
        samples = Shards(shards)
        items = [samples[i] for i in range(len(samples))]
        self.captions = [read_caption(item, config.caption) for item in items]
        pixels = [to_pixels(read_image(item, extensions), image_size) for item in items]
        self.pixels = torch.from_numpy(np.stack(pixels))  # uint8 [N, 3, S, S]


@torch.no_grad()
def embed(
    model: CLIPS, retrieval: RetrievalSet, tokenizer: ClipsTokenizer, batch_size: int = 256
) -> tuple[Tensor, Tensor]:
    """L2-normalised image and text features, each [N, E], in fp32."""
    device = model.logit_scale.device
    was_training = model.training
    model.eval()
    ids = torch.from_numpy(tokenizer.encode(retrieval.captions, model.config.context_length))
    images = [model.visual(normalise(part.to(device)))[0] for part in retrieval.pixels.split(batch_size)]
    texts = [model.text(part.to(device))[0] for part in ids.split(batch_size)]
    model.train(was_training)
    return F.normalize(torch.cat(images).float(), dim=-1), F.normalize(torch.cat(texts).float(), dim=-1)


def ranks(queries: Tensor, candidates: Tensor) -> Tensor:
    """Rank of each query's own candidate (row i for query i), 0 best, int64 [N].

    A candidate that ties with the right one counts as before it: a model that maps everything to one point scores nothing.
    """
    similarity = queries @ candidates.T
    own = similarity.diagonal().unsqueeze(1)
    return (similarity >= own).sum(dim=1) - 1


def recall(rank: Tensor, k: int) -> float:
    """Share of queries whose own candidate is among the first `k`."""
    return (rank < k).float().mean().item()


def retrieval(image: Tensor, text: Tensor) -> dict[str, Any]:
    """R@1/5/10 in both directions with the rank of every query, and what chance gives.

    Args:
        image, text: L2-normalised features [N, E]; row i of one belongs to row i of the other.
    """
    count = len(image)
    rank = {"image_to_text": ranks(image, text), "text_to_image": ranks(text, image)}
    return {
        **{name: {f"R@{k}": recall(value, k) for k in RECALLS} for name, value in rank.items()},
        "n": count,
        "chance": {f"R@{k}": min(1.0, k / count) for k in RECALLS},
        "ranks": {name: value.tolist() for name, value in rank.items()},
    }
