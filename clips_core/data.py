"""Shards → dict batches for pretraining.

Which sample comes at which position, and what is drawn for it (its sub-caption, its crop), is a pure function of seed and
position. The loader therefore has no state beyond "how many samples were seen", whatever the number of workers.
"""

import functools
import json
import signal
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clips_core.captions import mixed_caption, sub_caption
from clips_core.config import DataConfig, Method
from clips_core.errors import InputError
from clips_core.images import open_image
from clips_core.shards import Shards
from clips_core.tokenizer import PAD, ClipsTokenizer

# The decoder runs as many learnable tokens as the batch's longest target has, rounded up so that few shapes occur.
TARGET_MULTIPLE = 8


class PretrainDataset(Dataset[Any]):
    """Training samples by position: `{"image", "texts", "target"}` as in `batches`, without the batch axis.

    A sample that cannot be used is *returned* as its `InputError`, since an exception that crosses a worker process arrives as
    a stack trace; `batches` raises it.
    """

    def __init__(
        self,
        config: DataConfig,
        method: Method,
        tokenizer: ClipsTokenizer,
        image_size: int,
        context_length: int,
        target_length: int,
        seed: int,
    ):
        self.shards = Shards(config.train)
        self.config, self.method, self.tokenizer, self.seed = config, method, tokenizer, seed
        self.image_size, self.context_length, self.target_length = image_size, context_length, target_length
        self.order = functools.lru_cache(maxsize=2)(self._order)

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, position: int) -> dict[str, np.ndarray] | InputError:
        epoch, offset = divmod(position, len(self.shards))
        index = int(self.order(epoch)[offset])
        try:
            return self._sample(self.shards[index], np.random.default_rng([self.seed, 1, epoch, index]))
        except InputError as error:
            return error

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, 0, epoch]).permutation(len(self.shards))

    def _sample(self, sample: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
        web = read_caption(sample, self.config.web_caption)
        synthetic = read_caption(sample, self.config.synthetic_caption, optional=True)
        image = read_image(sample, self.config.image)
        if self.config.crop_area < 1.0:
            image = random_crop(image, self.config.crop_area, rng)
        texts = {
            "clips": lambda: [web, sub_caption(synthetic, web, rng)],
            "clip": lambda: [web],
            "clip_mix": lambda: [mixed_caption(synthetic, web, rng)],
        }[self.method]()
        if self.method == "clips" and synthetic:
            target = self.tokenizer.encode_target(synthetic, self.target_length)
        else:
            target = np.full(self.target_length, PAD, dtype=np.int64)
        return {
            "image": to_pixels(image, self.image_size),
            "texts": self.tokenizer.encode(texts, self.context_length),
            "target": target,
        }


def batches(
    dataset: PretrainDataset, start: int, stop: int, batch_size: int, workers: int
) -> Iterator[dict[str, Tensor]]:
    """Whole batches of the positions `start` … `stop`, in order; positions run on from epoch to epoch.

    Yields:
        image: uint8 [B, 3, S, S].
        texts: int64 [B, K, T]: web caption and sub-caption for `clips`, else one text.
        target: int64 [B, M]: the full synthetic caption, M the longest of the batch (0 if there is none).

    Raises:
        InputError: for the first sample that cannot be used, naming its shard and key.
    """
    loader = DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=range(start, stop),
        num_workers=workers,
        collate_fn=collate,
        drop_last=True,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_ignore_interrupts,
    )
    for batch in loader:
        if isinstance(batch, InputError):
            raise batch
        yield batch


def collate(samples: Sequence[dict[str, np.ndarray] | InputError]) -> dict[str, Tensor] | InputError:
    """Stack samples; the targets are cut to the longest one, rounded up to a multiple of `TARGET_MULTIPLE`."""
    good: list[dict[str, np.ndarray]] = []
    for sample in samples:
        if isinstance(sample, InputError):
            return sample
        good.append(sample)
    batch = {name: torch.from_numpy(np.stack([sample[name] for sample in good])) for name in good[0]}
    longest = int((batch["target"] != PAD).sum(dim=1).max())
    batch["target"] = batch["target"][:, : -(-longest // TARGET_MULTIPLE) * TARGET_MULTIPLE]
    return batch


def read_caption(sample: dict[str, Any], key: str, optional: bool = False) -> str:
    """A caption by its extension (`txt`) or field (`json.re_caption`).

    Raises:
        InputError: naming shard and key, if it is missing or empty (unless `optional`: then ""), not UTF-8, or not JSON.
    """
    where = f"{sample['__shard__']}, key {sample['__key__']!r}"
    extension, _, field = key.partition(".")
    if extension not in sample:
        if optional:
            return ""
        raise InputError(f"{where}: no .{extension} file for the caption {key!r}")
    try:
        value = sample[extension].decode()
        if field:
            value = json.loads(value).get(field)
    except (UnicodeDecodeError, json.JSONDecodeError, AttributeError) as error:
        raise InputError(f"{where}: caption {key!r} cannot be read ({error})") from None
    if isinstance(value, str) and value.strip():
        return value
    if optional:
        return ""
    raise InputError(f"{where}: the caption {key!r} is empty; drop this sample or give it a caption")


def read_image(sample: dict[str, Any], extensions: Sequence[str]) -> Image.Image:
    """The picture of a sample, whole and RGB; an `InputError` names shard and key."""
    where = f"{sample['__shard__']}, key {sample['__key__']!r}"
    for extension in extensions:
        if extension in sample:
            return open_image(sample[extension], where)
    raise InputError(f"{where}: no picture (looked for {', '.join(extensions)})")


def to_pixels(image: Image.Image, size: int) -> np.ndarray:
    """Squash to `size` × `size`, bilinear: uint8 [3, size, size]."""
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def random_crop(image: Image.Image, least_area: float, rng: np.random.Generator) -> Image.Image:
    """A random part of at least `least_area` of the picture, its sides' ratio changed by at most 4:3 either way."""
    width, height = image.size
    for _ in range(10):
        area = width * height * rng.uniform(least_area, 1.0)
        ratio = width / height * np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(float(np.sqrt(area * ratio))), round(float(np.sqrt(area / ratio)))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return image.crop((left, top, left + w, top + h))
    return image


def fingerprint(shards: Shards) -> str:
    """Number of samples, of shards and of bytes: enough to notice other data, without reading terabytes."""
    size = sum(path.stat().st_size for path in shards.paths)
    return f"{len(shards)} samples, {len(shards.paths)} shards, {size} bytes"


def _ignore_interrupts(worker: int) -> None:
    # Ctrl-C reaches the whole process group; the training process decides when the workers end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
