"""Samples → dict batches for pretraining.

Which sample comes at which position, and what is drawn for it (its sub-caption, its crop), is a pure function of seed and
position. The loader therefore has no state beyond "how many samples were seen": a resumed run is exact, and the same run has the
same batches on any number of workers and processes.
"""

import json
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from clips_core.augment import WHOLE, colour_jitter, crop_and_squash, crop_box, enough_pixels
from clips_core.captions import texts_and_target
from clips_core.config import PretrainConfig
from clips_core.distributed import barrier, is_main
from clips_core.errors import BadSample, InputError
from clips_core.folders import MetricsLog
from clips_core.images import open_image
from clips_core.order import Group, Order, Place, rows
from clips_core.repair import excluded
from clips_core.sources import Reader, Skipped, Sources
from clips_core.tokenizer import PAD, ClipsTokenizer

# The decoder runs as many learnable tokens as the batch's longest target has, rounded up so that few shapes occur.
TARGET_MULTIPLE = 8
MOST_BAD_IN_A_ROW = 100  # of a shuffled group: then it is not the samples that are bad, but a setting or the whole set
SHARE_OVER = 100  # samples: the share of bad ones is taken over no fewer


class Batch(NamedTuple):
    """This process's rows of a global batch.

    Attributes:
        tensors:
            image: uint8 [B, 3, S, S].
            texts: int64 [B, K, T]: web caption and sub-caption for `clips`, else one text.
            target: int64 [B, M]: what the caption decoder shall write, M the longest of these rows (0 if there is none).
        keys: "shard:key" of each row.
        skipped: the samples that were passed over for these rows, see `PretrainDataset`.
    """

    tensors: dict[str, Tensor]
    keys: list[str]
    skipped: list[Skipped]


class PretrainDataset(Dataset[Any]):
    """Training samples by position: `{"image", "texts", "target"}` as in `Batch`, without the batch axis, `"key"`, `"skipped"`.

    In place of a sample that cannot be used comes the next usable one of its group of chunks (see `clips_core.order`), which
    depends on the position alone; `"skipped"` lists those that were passed over.

    Errors are *returned*, since an exception that crosses a worker process arrives as a stack trace; `batches` raises them.

    The numbers of samples in the shards are kept in the run's folder (data_index.jsonl), so that they are counted once. Under
    torchrun every process makes a dataset; the main one counts.

    Raises:
        InputError: as `Sources`, and if there are fewer chunks than lanes.
    """

    def __init__(self, config: PretrainConfig, tokenizer: ClipsTokenizer):
        self.config, self.tokenizer, self.seed = config, tokenizer, config.seed
        for main_is_next in (True, False):
            if is_main() == main_is_next:
                self.sources = Sources(config.data, config.out / "data_index.jsonl")
            barrier()
        counts = [source.counts for source in self.sources.sources]
        weights = [source.weight for source in self.sources.sources]
        self.order = Order(counts, weights, config.seed, config.data.lanes, config.data.shuffle_chunks)
        self.excluded = self._excluded()
        # By source and lane: the group that is being read, its open chunks, and all of this group and the next.
        self._open: dict[tuple[int, int], tuple[Group, dict[int, Reader], set[int]]] = {}

    def _excluded(self) -> set[tuple[str, str]]:
        """Shard and key of every sample that the repair list leaves out."""
        path = self.config.data.exclude
        if path is None:
            return set()
        found = excluded(path)
        shards = {
            self.sources.path(i, chunk)
            for i, source in enumerate(self.sources.sources)
            for chunk in range(len(source.counts))
        }
        if found and not shards & {shard for shard, _ in found}:
            raise InputError(f"{path}: names none of this run's shards; make it with the same data.train")
        return found

    def __len__(self) -> int:
        return len(self.sources)

    def __getstate__(self) -> dict[str, Any]:  # a data loader's worker opens its own files
        return {**self.__dict__, "_open": {}}

    def __getitem__(self, position: int) -> dict[str, Any] | InputError:
        place = self.order(position)
        size = len(place.group.number)
        skipped: list[Skipped] = []
        for attempt in range(min(MOST_BAD_IN_A_ROW, size)):
            sample: dict[str, Any] = {}
            offset = (place.offset + attempt) % size
            try:
                sample = self._read(place, offset)
                if (sample["__shard__"], sample["__key__"]) in self.excluded:
                    continue
                result = self._sample(sample, np.random.default_rng([self.seed, 1, position]))
            except BadSample as error:
                shard = self.sources.path(place.source, place.group.chunks[place.group.chunk[offset]])
                key = sample.get("__key__", f"sample {place.group.number[offset]}")
                skipped.append(Skipped(shard, key, error.cause, str(error)))
            except InputError as error:
                return error
            else:
                return {**result, "key": f"{sample['__shard__']}:{sample['__key__']}", "skipped": skipped}
        causes = Counter(item.cause for item in skipped)
        if not skipped:
            return InputError(f"{self.config.data.exclude}: leaves out all of a group of {size} samples")
        return InputError(
            f"{len(skipped)} samples in a row cannot be used ({_shown(causes)}); the first: {skipped[0].detail}"
        )

    def _read(self, place: Place, offset: int) -> dict[str, Any]:
        key, group = (place.source, place.lane), place.group
        current, readers, wanted = self._open.get(key, (None, {}, set()))
        if current is not group:
            following = self.order.sources[place.source].following(place.lane, group)
            self._open[key] = (group, readers, {*group.chunks.tolist(), *following.tolist()})
            for chunk in wanted - self._open[key][2]:
                if chunk in readers:
                    readers.pop(chunk).close()
                self.sources.drop(place.source, chunk)
            worker = get_worker_info()
            if worker is not None:  # never in a process that may yet fork; each begins with another chunk
                ahead = np.roll(following, -worker.id).tolist()
                self.sources.fetch_ahead(place.source, ahead, lambda chunk: chunk in self._open[key][2])
        chunk, index = int(group.chunks[group.chunk[offset]]), int(group.number[offset])
        if chunk not in readers:
            readers[chunk] = self.sources.open(place.source, chunk)
        reader = readers[chunk]
        if index >= len(reader):
            assert reader.fault is not None  # or it would not have been opened
            cause, detail = reader.fault
            raise BadSample(cause, f"{self.sources.path(place.source, chunk)}, sample {index}: {cause} ({detail})")
        return reader[index]

    def _sample(self, sample: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
        data, model = self.config.data, self.config.model
        web = read_caption(sample, data.web_caption)
        synthetic = read_caption(sample, data.synthetic_caption, optional=True)
        box = crop_box(data.crop_area, rng) if data.crop_area < 1 else WHOLE
        image = read_image(sample, data.image, enough_pixels(box, model.image_size))
        image = crop_and_squash(image, box, model.image_size)
        if data.colour_jitter:
            image = colour_jitter(image, data.colour_jitter, rng)
        texts, target = texts_and_target(
            web,
            synthetic,
            self.config.method,
            self.config.texts,
            self.tokenizer,
            model.context_length,
            model.learnable_tokens,
            rng,
        )
        return {"image": to_pixels(image, model.image_size), "texts": texts, "target": target}

    def check(self, batch_size: int, world_size: int) -> None:
        """Refuse what would leave a process without samples, or with those of another, while the others wait for it.

        Args:
            batch_size: of the global batch.
            world_size: processes.

        Raises:
            InputError: naming the setting to change.
        """
        lanes = self.config.data.lanes
        if batch_size % world_size:
            raise InputError(f"batch_size {batch_size} cannot be split evenly among {world_size} processes")
        if batch_size % lanes:
            raise InputError(f"batch_size {batch_size} is not a multiple of data.lanes={lanes}")
        if lanes % world_size and world_size % lanes:
            raise InputError(
                f"data.lanes={lanes} is neither a multiple nor a divisor of the {world_size} processes; a multiple keeps any "
                "two of them from reading the same shard"
            )
        epoch = sum(source.lane_length * lanes for source in self.order.sources)
        if batch_size > epoch:
            raise InputError(
                f"data.train holds {epoch} samples, fewer than one batch of {batch_size}: a picture would be its own negative"
            )


def batches(
    dataset: PretrainDataset,
    start: int,
    stop: int,
    batch_size: int,
    workers: int,
    rank: int = 0,
    world_size: int = 1,
    log: Path | None = None,
) -> Iterator[Batch]:
    """The batches of the steps `start` … `stop`, in order; the global batch of step s has the positions from s × batch_size on.

    Args:
        batch_size: of the global batch; this process gets its rows alone, B = batch_size / world_size.
        workers: loader processes; 0: in this one.
        rank, world_size: which process this is, of how many.
        log: .jsonl file for what is skipped, with step (from 1), shard, key and cause; cut back to `start` first. Processes
            other than the first have one of their own beside it, `skipped-00001.jsonl`.

    Raises:
        InputError: if more than `max_bad_share` of the samples that this process has read cannot be used, naming causes and
            samples; if a shard cannot be read, or does not hold what was counted.
    """
    loader = DataLoader(
        dataset,
        batch_sampler=_Positions(start, stop, batch_size, dataset.config.data.lanes, rank, world_size),
        num_workers=workers,
        collate_fn=collate,
        prefetch_factor=4 if workers else None,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_ignore_interrupts,
    )
    if log is not None and rank:
        log = log.with_stem(f"{log.stem}-{rank:05d}")
    bad = _BadSamples(dataset, start, rank, world_size, log)
    for step, batch in enumerate(loader, start + 1):
        if isinstance(batch, InputError):
            raise batch
        bad.count(step, batch)
        yield batch


def collate(samples: Sequence[dict[str, Any] | InputError]) -> Batch | InputError:
    """Stack samples; the targets are cut to the longest one, rounded up to a multiple of `TARGET_MULTIPLE`."""
    good: list[dict[str, Any]] = []
    for sample in samples:
        if isinstance(sample, InputError):
            return sample
        good.append(sample)
    stacked = {name: np.stack([sample[name] for sample in good]) for name in ("image", "texts", "target")}
    longest = int((stacked["target"] != PAD).sum(axis=1).max())
    stacked["target"] = stacked["target"][:, : -(-longest // TARGET_MULTIPLE) * TARGET_MULTIPLE]
    return Batch(
        {name: torch.from_numpy(array) for name, array in stacked.items()},
        [sample["key"] for sample in good],
        [item for sample in good for item in sample["skipped"]],
    )


class _Positions:
    """The positions of each of this process's batches."""

    def __init__(self, start: int, stop: int, batch_size: int, lanes: int, rank: int, world_size: int):
        self.steps, self.batch_size = range(start, stop), batch_size
        self.lanes, self.rank, self.world_size = lanes, rank, world_size

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            yield rows(step * self.batch_size, self.batch_size, self.lanes, self.rank, self.world_size).tolist()


class _BadSamples:
    """Logs and counts what this process skips, and stops the run when it is too much.

    Too much is more than `max_bad_share` of what was read so far and four standard errors, since two bad ones among the first
    hundred may be chance; or more than that share of all that this process reads in the whole run.
    """

    def __init__(self, dataset: PretrainDataset, step: int, rank: int, world_size: int, log: Path | None):
        self.share, self.total = dataset.config.data.max_bad_share, dataset.config.samples // world_size
        self.good, self.causes, self.first = 0, Counter[str](), list[str]()
        self.log = MetricsLog(log) if log is not None else None
        if self.log is not None:
            if step:
                self.log.cut_after(step)
            else:
                self.log.path.unlink(missing_ok=True)
                for fault in dataset.sources.faults if rank == 0 else ():
                    self.log.log(step=0, **fault._asdict())

    def count(self, step: int, batch: Batch) -> None:
        self.good += len(batch.keys)
        for item in batch.skipped:
            self.causes[item.cause] += 1
            if len(self.first) < 3:
                self.first.append(item.detail)
            if self.log is not None:
                self.log.log(step=step, **item._asdict())
        bad = self.causes.total()
        expected = self.share * max(self.good + bad, SHARE_OVER)
        if bad > min(expected + 4 * expected**0.5, self.share * self.total):
            raise InputError(
                f"{bad} of the {self.good + bad} samples read so far cannot be used ({_shown(self.causes)}), more than "
                f"data.max_bad_share={self.share} allows. The first: {'; '.join(self.first)}"
            )


def read_caption(sample: dict[str, Any], names: str | Sequence[str], optional: bool = False) -> str:
    """A caption by its extension or column (`txt`), or a field of JSON (`json.re_caption`); of several, the first not empty.

    Raises:
        BadSample: naming shard and key, if it is missing or empty (unless `optional`: then ""), not UTF-8, or not JSON.
    """
    names = [names] if isinstance(names, str) else names
    where = f"{sample['__shard__']}, key {sample['__key__']!r}"
    missing = True
    for name in names:
        file, _, field = (name, "", "") if name in sample else name.partition(".")
        if file not in sample:
            continue
        value = sample[file]
        try:
            if isinstance(value, bytes):
                value = value.decode()
            if field:
                value = (json.loads(value) if isinstance(value, str) else value).get(field)
            if isinstance(value, str):
                value.encode()  # a listing's bytes that are not UTF-8 came as lone surrogates
        except UnicodeError as error:
            message = f"{where}: caption {name!r} cannot be read ({error})"
            raise BadSample("caption is not UTF-8", message) from None
        except (ValueError, AttributeError) as error:
            raise BadSample("caption is not JSON", f"{where}: caption {name!r} cannot be read ({error})") from None
        if isinstance(value, str) and value.strip():
            return value
        missing = False
    if optional:
        return ""
    shown = " or ".join(repr(name) for name in names)
    if missing:
        raise BadSample("no caption", f"{where}: no file or column for the caption {shown}")
    raise BadSample("empty caption", f"{where}: the caption {shown} is empty; drop this sample or give it a caption")


def read_image(sample: dict[str, Any], names: Sequence[str], at_least: tuple[int, int] | None = None) -> Image.Image:
    """The picture of a sample, whole and RGB, by its extension or column; a `BadSample` names shard and key.

    Args:
        at_least: width and height that are enough of a JPEG, see `open_image`.
    """
    where = f"{sample['__shard__']}, key {sample['__key__']!r}"
    for name in names:
        if isinstance(sample.get(name), bytes):
            return open_image(sample[name], where, at_least)
    raise BadSample("no picture", f"{where}: no picture (looked for {', '.join(names)})")


def to_pixels(image: Image.Image, size: int) -> np.ndarray:
    """Squash to `size` × `size`, bilinear: uint8 [3, size, size]."""
    image = crop_and_squash(image, WHOLE, size)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def _shown(causes: Counter[str]) -> str:
    return ", ".join(f"{count} × {cause}" for cause, count in causes.most_common())


def _ignore_interrupts(worker: int) -> None:
    # Ctrl-C reaches the whole process group; the training process decides when the workers end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
