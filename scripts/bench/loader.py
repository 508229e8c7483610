"""The data loader alone: pictures a second and core, ours against plain PIL and against webdataset's loader.

    python scripts/bench/loader.py [--workers 1 --repeats 5]

From two kinds of shards that the run makes itself, of pictures with a photograph's mixture of smooth, sharp and grainy:

- pre-resized: 112 × 112, what `clips-llava data build` writes;
- original:    500 × 375.

- ours:       `PretrainDataset` and `batches`, as pretraining has them; with the paper's crop; with crop and colour jitter;
- webdataset: its pipeline to the same tensors, with our captions' code, squashed by PIL;
- PIL:        no shards and no captions: `Image.open(bytes).convert("RGB").resize(…)` of bytes that are in memory.

Before anything is timed, all must give the same pixels of the pre-resized pictures. They take turns.
"""

import argparse
import dataclasses
import io
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from clips_core.captions import texts_and_target
from clips_core.config import PretrainConfig, load_config
from clips_core.data import Batch, PretrainDataset, batches, collate
from clips_core.errors import InputError
from clips_core.folders import environment, write_json
from clips_core.measure import in_turns, print_table, spread
from clips_core.shards import Shards, find_shards, write_shards
from clips_core.tokenizer import BERT_VOCAB, RESERVED, ClipsTokenizer, read_vocab

SIZE = 112  # pixels that the model reads
KINDS = {"pre-resized": (SIZE, SIZE), "original": (500, 375)}  # width, height
QUALITY = 90  # of the JPEGs, as `data build` has it
PREFETCHED = 4  # batches a worker, as in `data.batches`


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured, and how often."""

    pictures: int  # pre-resized ones; a quarter as many originals
    batch: int
    workers: int  # loader processes; 0: in this one
    repeats: int


# ---------------------------------------------------------------------------------------------------------------------
# Pictures and captions
# ---------------------------------------------------------------------------------------------------------------------


def picture(width: int, height: int, rng: np.random.Generator) -> Image.Image:
    """Shapes on smooth noise of every scale, with grain: its JPEG is about as large as a photograph's."""
    tint = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    pixels = np.asarray(tint.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32) * 0.5 + 64
    cells, contrast = 4, 28.0
    while cells < max(width, height):
        layer = Image.fromarray(rng.normal(size=(cells, cells)).astype(np.float32))
        pixels += contrast * np.asarray(layer.resize((width, height), Image.Resampling.BILINEAR))[..., None]
        cells, contrast = 2 * cells, 0.78 * contrast
    pixels += rng.normal(scale=5.0, size=(height, width, 1))
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(2, 7)):
        (left, right), (top, bottom) = np.sort(rng.integers(0, width, 2)), np.sort(rng.integers(0, height, 2))
        shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
        shape((int(left), int(top), int(right), int(bottom)), fill=tuple(rng.integers(0, 256, 3).tolist()))
    return image


def make_samples(count: int, width: int, height: int) -> Iterator[dict[str, Any]]:
    """Pictures with a web caption of 10 words and a synthetic one of four sentences and 49 words, as in Recap-DataComp."""
    rng = np.random.default_rng(0)
    words = np.array([token for token in read_vocab(BERT_VOCAB)[len(RESERVED) :] if token.isalpha() and len(token) > 2])
    for number in tqdm(range(count), desc=f"{width} × {height}", unit="picture", leave=False):
        buffer = io.BytesIO()
        picture(width, height, rng).save(buffer, "JPEG", quality=QUALITY)
        sentences = [" ".join(rng.choice(words, length)) for length in (13, 12, 12, 12)]
        yield {
            "__key__": f"{number:09d}",
            "jpg": buffer.getvalue(),
            "txt": " ".join(rng.choice(words, 10)),
            "json": {"re_caption": ". ".join(sentences) + "."},
        }


# ---------------------------------------------------------------------------------------------------------------------
# Loaders: batches of a folder of shards, each sample at most once
# ---------------------------------------------------------------------------------------------------------------------


def make_config(folder: Path, batch: int, crop_area: float = 1.0, colour_jitter: float = 0.0) -> PretrainConfig:
    """A pretraining run on the shards. The index of the shards is kept in the folder's `run`."""
    return load_config(
        PretrainConfig,
        None,
        [f"out={folder / 'run'}", f"data.train={folder}", "model.size=B/16", f"model.image_size={SIZE}",
         "samples=1000000000", f"batch_size={batch}", "learning_rate=1e-4", f"data.crop_area={crop_area}",
         f"data.colour_jitter={colour_jitter}"],
    )  # fmt: skip


def ours(folder: Path, settings: Settings, crop_area: float = 1.0, colour_jitter: float = 0.0) -> Iterable[Any]:
    """`batches` of a `PretrainDataset`. The tokenizer is new each time: it remembers captions, and most are read once."""
    config = make_config(folder, settings.batch, crop_area, colour_jitter)
    dataset = PretrainDataset(config, ClipsTokenizer())
    return batches(dataset, 0, len(dataset) // settings.batch, settings.batch, settings.workers)


def with_webdataset(folder: Path, settings: Settings) -> Iterable[Any]:
    """webdataset's own pipeline: shuffled in a buffer, decoded, and made into the tensors that `batches` gives."""
    try:
        import webdataset
    except ImportError:
        raise InputError("the loader of webdataset is not installed: pip install webdataset") from None
    convert = Converter(make_config(folder, settings.batch))
    shards = [str(path) for path in find_shards(folder)]
    pipeline = (
        webdataset.WebDataset(shards, shardshuffle=False, empty_check=False)
        .shuffle(1000)
        .decode("pilrgb")
        .map(convert)
        .batched(settings.batch, collation_fn=collate, partial=False)
    )
    return webdataset.WebLoader(
        pipeline, batch_size=None, num_workers=settings.workers, prefetch_factor=prefetched(settings)
    )


class Converter:
    """A decoded sample of webdataset → a sample of `PretrainDataset`. A class, so that a worker process can have it."""

    def __init__(self, config: PretrainConfig):
        self.config, self.tokenizer = config, ClipsTokenizer()
        self.rng = np.random.default_rng(0)

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        model = self.config.model
        texts, target = texts_and_target(
            sample["txt"],
            sample["json"]["re_caption"],
            self.config.method,
            self.config.texts,
            self.tokenizer,
            model.context_length,
            model.learnable_tokens,
            self.rng,
        )
        key = f"{sample['__url__']}:{sample['__key__']}"
        return {"image": squashed(sample["jpg"]), "texts": texts, "target": target, "key": key, "skipped": []}


def with_pil(pictures: Sequence[bytes], settings: Settings) -> Iterable[Any]:
    """PIL in torch's own loader."""
    return DataLoader(
        Pictures(pictures),
        batch_size=settings.batch,
        drop_last=True,
        num_workers=settings.workers,
        prefetch_factor=prefetched(settings),
    )


class Pictures(Dataset[Tensor]):
    """uint8 [3, S, S] of JPEGs that are in memory."""

    def __init__(self, pictures: Sequence[bytes]):
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(squashed(Image.open(io.BytesIO(self.pictures[index])).convert("RGB")))


def squashed(image: Image.Image) -> np.ndarray:
    """uint8 [3, S, S], bilinear."""
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR)).transpose(2, 0, 1).copy()


def prefetched(settings: Settings) -> int | None:
    """As in `data.batches`."""
    return PREFETCHED if settings.workers else None


# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------


def pixels_of(loader: Iterable[Any]) -> set[bytes]:
    """The pictures that a loader gives."""
    images = (batch.tensors["image"] if isinstance(batch, Batch) else batch for batch in loader)
    return {image.numpy().tobytes() for part in images for image in part}


def check(folder: Path, settings: Settings) -> int:
    """How many pictures every loader gives, all of them the same.

    Raises:
        RuntimeError: if one differs.
    """
    shards = Shards(folder)
    whole = dataclasses.replace(settings, batch=2, workers=0)
    jpegs = (shards[index]["jpg"] for index in range(len(shards)))
    expected = {squashed(Image.open(io.BytesIO(jpeg)).convert("RGB")).tobytes() for jpeg in jpegs}
    for name, loader in {"ours": ours(folder, whole), "webdataset": with_webdataset(folder, whole)}.items():
        if pixels_of(loader) != expected:
            raise RuntimeError(f"{name} does not give the pictures that PIL gives")
    return len(expected)


def images_per_second_and_core(make: Callable[[], Iterable[Any]], settings: Settings) -> float:
    """Of one pass, without the worker's start: the first batches are not timed, and nothing waits behind them."""
    untimed = max(1, PREFETCHED * settings.workers)
    started, count = 0.0, 0
    for number, _ in enumerate(make(), start=1):
        count = number
        if number == untimed:
            started = time.perf_counter()
    seconds = time.perf_counter() - started
    if count <= untimed:
        raise InputError(
            f"{count} batches are too few: the first {untimed} are not timed; more --pictures, smaller --batch"
        )
    return (count - untimed) * settings.batch / seconds / max(1, settings.workers)


def run(settings: Settings) -> dict[str, Any]:
    """Measure all of it: `{"environment", "settings", "same", "shards": {kind: {"bytes", "images_per_second_and_core": {…}}}}`."""
    result: dict[str, Any] = {"environment": environment(), "settings": dataclasses.asdict(settings), "shards": {}}
    with tempfile.TemporaryDirectory(prefix="clips-llava-bench-") as temporary:
        for kind, (width, height) in KINDS.items():
            folder = Path(temporary) / kind
            count = settings.pictures if kind == "pre-resized" else settings.pictures // 4
            write_shards(make_samples(count, width, height), folder, per_shard=256)
            shards = Shards(folder)
            jpegs = [shards[index]["jpg"] for index in range(len(shards))]
            if kind == "pre-resized":
                result["same"] = check(folder, settings)
            loaders: dict[str, Callable[[], Iterable[Any]]] = {
                "ours": partial(ours, folder, settings),
                "ours, crop": partial(ours, folder, settings, 0.4),
                "ours, crop and jitter": partial(ours, folder, settings, 0.4, 0.4),
                "webdataset": partial(with_webdataset, folder, settings),
                "PIL": partial(with_pil, jpegs, settings),
            }
            rates = in_turns(
                {name: partial(images_per_second_and_core, make, settings) for name, make in loaders.items()},
                settings.repeats,
            )
            result["shards"][kind] = {
                "width": width,
                "height": height,
                "bytes": sum(map(len, jpegs)) / len(jpegs),
                "images_per_second_and_core": {name: spread(values)._asdict() for name, values in rates.items()},
            }
    return result


def report(result: dict[str, Any]) -> None:
    """The rates as a table."""
    settings, kinds = result["settings"], result["shards"]
    where = "in the training process" if not settings["workers"] else f"{settings['workers']} worker processes"
    print(
        f"{where}, batch {settings['batch']}, on {result['environment']['device']}; to {SIZE} px\n"
        f"all loaders give the same {result['same']} pre-resized pictures\n"
        f"images a second and core: median of {settings['repeats']} passes, lowest and highest in brackets"
    )
    heads = [f"{kind}, {v['width']} × {v['height']}, {v['bytes'] / 1000:.1f} kB" for kind, v in kinds.items()]
    names = next(iter(kinds.values()))["images_per_second_and_core"]
    rows = []
    for name in names:
        figures = [value["images_per_second_and_core"][name] for value in kinds.values()]
        rows.append([name, *(f"{f['median']:,.0f} ({f['low']:,.0f}–{f['high']:,.0f})" for f in figures)])
    print_table(["", *heads], rows)


def main(arguments: Sequence[str] = ()) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pictures", type=int, default=2048, help="pre-resized ones; a quarter as many originals (2048)"
    )
    parser.add_argument("--batch", type=int, default=64, help="pictures of a batch (64)")
    parser.add_argument("--workers", type=int, default=1, help="loader processes; 0: in this one (1)")
    parser.add_argument("--repeats", type=int, default=5, help="passes of each loader (5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    values = vars(parser.parse_args(arguments))
    file = values.pop("json")
    if values["pictures"] % 8:
        parser.error("--pictures must be a multiple of 8")
    try:
        result = run(Settings(**values))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    report(result)
    if file is not None:
        write_json(file, result)
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)  # by one core
    sys.exit(main(sys.argv[1:]))
