"""A tower's vectors of pictures and texts, kept on disk: part by part, so that a killed run goes on with the next part.

A part is named by the tower and by what it holds, so it serves every set and task that asks for the same, and no other.
"""

import collections
import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from clips_core.errors import InputError
from clips_core.folders import write_bytes
from clips_core.images import open_image
from clips_core.zero_shot import class_direction, prompts_of
from eval_suites.prompts import Template
from eval_suites.towers.embedders import Embedder
from eval_suites.towers.sets import Pictures

PART = 1024  # pictures, or texts
CLASSES = 16  # in a part of a classifier

Out = TypeVar("Out")


class Part(NamedTuple):
    """Some vectors, and the hash of what they were made from."""

    values: Tensor  # fp32 [N, E], L2-normalised
    content: str  # hex SHA-256 of the pictures' bytes; "" for texts


class Features:
    """The vectors that one tower gives, in a folder of its own below `cache`."""

    def __init__(self, embedder: Embedder, cache: Path, precision: str, batch_size: int, workers: int):
        self.embedder, self.precision, self.batch_size, self.workers = embedder, precision, batch_size, workers
        self.folder = cache / f"{embedder.hash[:32]}-{precision}"

    def pictures(self, pictures: Pictures, name: str) -> Part:
        """Of all pictures, in their order.

        Args:
            name: what the progress bar calls them.

        Raises:
            InputError: naming the first picture that cannot be read. Fewer pictures would give another figure, so none is left out.
        """
        parts = []
        with tqdm(total=len(pictures), unit="picture", desc=name, delay=1) as bar:
            for first in range(0, len(pictures), PART):
                last = min(first + PART, len(pictures))
                key = f"pictures-{pictures.fingerprint(first, last)[:32]}"
                parts.append(self._kept(key, partial(self._embed, pictures, range(first, last), bar)))
                bar.n = last
                bar.refresh()
        content = hashlib.sha256("".join(part.content for part in parts).encode()).hexdigest()
        return Part(torch.cat([part.values for part in parts]), content)

    def texts(self, texts: Sequence[str], name: str) -> Tensor:
        """Of all texts, in their order: L2-normalised, fp32 [N, E]."""
        parts = []
        for first in tqdm(range(0, len(texts), PART), unit="part", desc=name, delay=1):
            ids = self._tokens(texts[first : first + PART])
            parts.append(self._kept(f"texts-{_hash_of(ids)}", partial(self._embed_texts, ids)).values)
        return torch.cat(parts)

    def classifier(self, names: Sequence[str], templates: Sequence[Template], name: str) -> Tensor:
        """One direction a class, [E, C], as `clips_core.zero_shot.class_weights`."""
        parts = []
        for first in tqdm(range(0, len(names), CLASSES), unit="part", desc=name, delay=1):
            prompts = [prompts_of(own, templates) for own in names[first : first + CLASSES]]
            ids = self._tokens([prompt for own in prompts for prompt in own])
            key = f"classes-{len(templates)}-{_hash_of(ids)}"
            parts.append(self._kept(key, partial(self._directions, ids, len(templates))).values)
        return torch.cat(parts).T

    def _kept(self, key: str, make: Callable[[], Part]) -> Part:
        """A part from its file, which is written where it is not there yet."""
        path = self.folder / f"{key}.safetensors"
        if not path.is_file():
            part = make()
            write_bytes(path, save({"values": part.values}, metadata={"content": part.content}))
            return part
        try:
            with safe_open(path, framework="pt") as file:
                return Part(file.get_tensor("values"), file.metadata()["content"])
        except (SafetensorError, OSError, KeyError, TypeError) as error:
            raise InputError(f"{path}: damaged ({error}); delete it, and it is computed again") from None

    @torch.no_grad()
    def _embed(self, pictures: Pictures, indices: Sequence[int], bar: tqdm) -> Part:
        def load(index: int) -> tuple[Tensor, bytes]:
            data, name = pictures.read(index)
            try:
                image = open_image(data, name)
            except InputError as error:
                raise InputError(f"{error}; put a whole one there, and the same command goes on") from None
            return self.embedder.to_pixels(image), hashlib.sha256(data).digest()

        values, content = [], hashlib.sha256()
        with ThreadPoolExecutor(self.workers) as pool:
            for batch in _batches(_ahead(pool, load, indices, 2 * self.batch_size), self.batch_size):
                pixels = torch.stack([pixels for pixels, _ in batch]).to(self.embedder.device, non_blocking=True)
                with self._autocast():
                    values.append(self._normalised(self.embedder.images(pixels)))
                for _, digest in batch:
                    content.update(digest)
                bar.update(len(batch))
        return Part(torch.cat(values), content.hexdigest())

    def _tokens(self, texts: Sequence[str]) -> Tensor:
        assert self.embedder.tokens is not None, "checked before anything was loaded"
        return self.embedder.tokens(texts)

    def _directions(self, ids: Tensor, per_class: int) -> Part:
        """The directions of classes, [C, E], from the tokens of all their prompts, class after class."""
        by_class = self._embed_texts(ids).values.split(per_class)
        return Part(torch.stack([class_direction(own) for own in by_class]), "")

    @torch.no_grad()
    def _embed_texts(self, ids: Tensor) -> Part:
        assert self.embedder.texts is not None
        values = []
        for part in ids.split(self.batch_size):
            with self._autocast():
                values.append(self._normalised(self.embedder.texts(part.to(self.embedder.device))))
        return Part(torch.cat(values), "")

    def _normalised(self, values: Tensor) -> Tensor:
        return F.normalize(values.float(), dim=-1).cpu()

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.embedder.device.type, torch.bfloat16)


def _hash_of(ids: Tensor) -> str:
    """Hash of token ids: the text and its tokenizer in one."""
    return hashlib.sha256(f"{tuple(ids.shape)}".encode() + ids.numpy().tobytes()).hexdigest()[:32]


def _ahead(pool: ThreadPoolExecutor, function: Callable[[int], Out], items: Sequence[int], depth: int) -> Iterator[Out]:
    """`map` over threads, in order, at most `depth` items ahead of whoever takes the results."""
    waiting: collections.deque[Future[Out]] = collections.deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _batches(items: Iterator[Out], size: int) -> Iterator[list[Out]]:
    batch: list[Out] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
