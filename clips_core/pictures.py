"""A trained model over a whole collection of pictures: batch by batch, part by part, resumable.

A part is one shard, or 10,000 files of a folder. Its result is one file, which appears under its name once it is whole, so an
interrupted run goes on after its last whole part. A picture that cannot be read is left out, counted and listed.
"""

import collections
import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor
from tqdm import tqdm

from clips_core import formats
from clips_core.config import FORBID, to_dict
from clips_core.data import read_caption, read_image, to_pixels
from clips_core.errors import InputError
from clips_core.folders import MetricsLog, first_difference, is_finished, write_bytes, write_manifest
from clips_core.formats import ModelFiles
from clips_core.model import CLIPS
from clips_core.shards import Tar, find_shards
from clips_core.tokenizer import ClipsTokenizer

FILES_PER_PART = 10_000
JOURNAL = "progress.jsonl"  # which parts are whole; there while a run is unfinished
NOT_IN_THE_RESULT = (
    "model",
    "source",
    "out",
    "batch_size",
    "workers",
    "device",
)  # what they stand for is hashed, or no matter


@dataclass(config=FORBID)
class PicturesConfig:
    """Which model goes over which pictures, and how."""

    model: str  # pretraining run, its export, a folder in open_clip's layout, or hf-hub:ORG/NAME
    source: Path  # folder of pictures (and of folders), or shards: a folder of *.tar, a glob pattern, or one .tar
    out: Path  # folder for the result
    image: list[str] = dataclasses.field(
        default_factory=lambda: ["jpg", "jpeg", "png", "webp"]
    )  # extensions of the picture
    image_size: int | None = Field(default=None, ge=1)  # pixels; null: the model's own
    batch_size: int = Field(default=64, ge=1)
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: autocast
    device: str = "auto"  # auto: cuda where there is one, else cpu
    workers: int = Field(default_factory=lambda: min(8, os.cpu_count() or 1), ge=1)  # threads that decode pictures


class Picture(NamedTuple):
    """A picture that was read, without its pixels."""

    key: str  # the sample's key, or the file's path below the folder
    shard: str | None  # the tar's name; None for a file
    caption: str  # "" without one


class Part(NamedTuple):
    """What one file of the result is made from."""

    name: str  # of that file, without suffix
    shard: Path | None  # a tar, or …
    files: list[str]  # … pictures by their path below the folder


Answer = Callable[
    [list[Picture], Tensor], list[dict[str, Any]]
]  # with pixels, uint8 [B, 3, S, S] → a row for each picture


def load(config: PicturesConfig) -> tuple[CLIPS, ClipsTokenizer, ModelFiles]:
    """The config's model on its device, its tokenizer, and the files that they come from."""
    name = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    files = formats.locate(config.model)
    model, tokenizer = formats.load_model(files, config.image_size)
    try:
        return model.eval().requires_grad_(False).to(name), tokenizer, files
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"device {config.device!r} cannot be used ({reason}); write auto, cpu or cuda") from None


def autocast(config: PicturesConfig, model: CLIPS) -> contextlib.AbstractContextManager[Any]:
    """The config's precision on the model's device."""
    if config.precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(model.logit_scale.device.type, torch.bfloat16)


def go_over(
    stage: str,
    config: PicturesConfig,
    caption: str | None,
    image_size: int,
    model: ModelFiles,
    answer: Answer,
    write: Callable[[Path, list[dict[str, Any]]], None],
    suffix: str,
) -> Path:
    """Write `answer`'s rows of every part as `out/NAME.suffix`, then `skipped.jsonl` and the manifest.

    Args:
        caption: extension or json.FIELD of the caption that a picture is read with; None: without.
        image_size: pixels that pictures are squashed to.
        model: whose hashes the manifest records.
        write: called with a temporary path and a part's rows, of which there may be none.

    Returns:
        `config.out`. An interrupted run goes on; a finished one of the same model, pictures and settings is left as it is.

    Raises:
        InputError: if there is no picture, none can be read, or `out` holds something else.
    """
    parts = list_parts(config.source, config.image)
    settings = {key: value for key, value in to_dict(config).items() if key not in NOT_IN_THE_RESULT}
    inputs = {**model.hashes(), "pictures": _fingerprint(config.source, parts)}
    if is_finished(config.out, stage, settings, inputs):
        (config.out / JOURNAL).unlink(missing_ok=True)  # a kill may have come between manifest and unlink
        print(f"{config.out} already holds this result")
        return config.out
    journal = _open_journal(config.out, {"stage": stage, "settings": settings, "inputs": inputs})
    done = {row["part"]: row for row in journal.rows()[1:] if (config.out / f"{row['part']}{suffix}").is_file()}
    total = sum(len(part.files) for part in parts) or None  # shards are counted as they are read
    seen = sum(row["pictures"] + len(row["bad"]) for row in done.values())
    with (
        ThreadPoolExecutor(config.workers) as pool,
        tqdm(total=total, initial=seen, unit="picture", desc=stage) as bar,
    ):
        for number, part in enumerate(parts, start=1):
            if part.name in done:
                continue
            bar.set_description_str(f"{stage} {number}/{len(parts)}")
            rows: list[dict[str, Any]] = []
            bad: list[dict[str, str]] = []
            extension = caption.partition(".")[0] if caption else None
            samples = _samples(part, config.source, extension, bad)
            for pictures, pixels in _batches(samples, config, caption, image_size, pool, bad):
                rows += answer(pictures, pixels)
                bar.update(len(pictures))
            bar.update(len(bad))
            target = config.out / f"{part.name}{suffix}"
            temporary = target.with_name(f".{target.name}.tmp")
            write(temporary, rows)
            os.replace(temporary, target)
            done[part.name] = {"part": part.name, "pictures": len(rows), "bad": bad}
            journal.log(**done[part.name])
    skipped = [item for part in parts for item in done[part.name]["bad"]]
    count = sum(row["pictures"] for row in done.values())
    if not count:
        raise InputError(f"{config.source}: none of its {len(skipped)} pictures can be read; the first: {skipped[0]}")
    write_bytes(config.out / "skipped.jsonl", json_lines(skipped))
    outputs = {"model": config.model, "source": str(config.source), "pictures": count, "bad": len(skipped)}
    write_manifest(config.out, stage, settings, inputs, outputs)
    journal.path.unlink()
    listed = f", {len(skipped)} bad ones listed in skipped.jsonl" if skipped else ""
    print(f"{config.out}: {count} pictures in {len(parts)} files{listed}")
    return config.out


def json_lines(rows: Iterable[dict[str, Any]]) -> bytes:
    """One JSON object a line."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def list_parts(source: Path, extensions: list[str]) -> list[Part]:
    """The parts of shards, or of a folder of pictures; a folder with a *.tar in it holds shards."""
    if source.is_dir() and not any(source.glob("*.tar")):
        suffixes = {f".{extension}" for extension in extensions}
        files = sorted(
            path.relative_to(source).as_posix() for path in source.rglob("*") if path.suffix.lower() in suffixes
        )
        if not files:
            raise InputError(f"{source}: holds neither a *.tar nor a picture ({', '.join(extensions)})")
        starts = range(0, len(files), FILES_PER_PART)
        return [Part(f"part-{i:05d}", None, files[start : start + FILES_PER_PART]) for i, start in enumerate(starts)]
    return [Part(f"{i:05d}-{path.stem}", path, []) for i, path in enumerate(map(Path, find_shards(source)))]


def _samples(part: Part, source: Path, caption: str | None, bad: list[dict[str, str]]) -> Iterator[dict[str, Any]]:
    """The part's samples as `Shards` has them; a file's sample is the file, and its caption's file of the same stem.

    What a shard lost by being cut off goes into `bad`; its samples before that place are good.
    """
    if part.shard is not None:
        tar = Tar(part.shard, str(part.shard))
        yield from (tar[i] for i in range(len(tar)))
        if tar.fault is not None:
            bad.append({"key": "", "shard": tar.name, "problem": f"{tar.name}: {tar.fault[0]} ({tar.fault[1]})"})
        return
    for name in part.files:
        path = source / name
        sample: dict[str, Any] = {"__key__": name, "__shard__": str(source)}
        for file in (path, *([path.with_suffix(f".{caption}")] if caption is not None else [])):
            with contextlib.suppress(FileNotFoundError):
                sample[file.suffix[1:].lower()] = file.read_bytes()
        yield sample


def _batches(
    samples: Iterable[dict[str, Any]],
    config: PicturesConfig,
    caption: str | None,
    image_size: int,
    pool: ThreadPoolExecutor,
    bad: list[dict[str, str]],
) -> Iterator[tuple[list[Picture], Tensor]]:
    """Batches of the pictures that can be read, decoded ahead by the pool; the others go into `bad`."""
    ahead: collections.deque[Future[tuple[Picture, np.ndarray] | dict[str, str]]] = collections.deque()
    pictures: list[Picture] = []
    pixels: list[np.ndarray] = []

    def take() -> Iterator[tuple[list[Picture], Tensor]]:
        result = ahead.popleft().result()
        if isinstance(result, dict):
            bad.append(result)
            return
        pictures.append(result[0])
        pixels.append(result[1])
        if len(pictures) == config.batch_size:
            yield list(pictures), torch.from_numpy(np.stack(pixels))
            pictures.clear()
            pixels.clear()

    for sample in samples:
        ahead.append(pool.submit(_decode, sample, config.image, caption, image_size))
        if len(ahead) > 2 * config.batch_size:
            yield from take()
    while ahead:
        yield from take()
    if pictures:
        yield pictures, torch.from_numpy(np.stack(pixels))


def _decode(
    sample: dict[str, Any], extensions: list[str], caption: str | None, image_size: int
) -> tuple[Picture, np.ndarray] | dict[str, str]:
    """A picture with its pixels, uint8 [3, S, S]; or what is wrong with it."""
    key, shard = sample["__key__"], Path(sample["__shard__"])
    name = shard.name if shard.suffix == ".tar" else None
    try:
        text = read_caption(sample, caption, optional=True) if caption is not None else ""
        return Picture(key, name, text), to_pixels(read_image(sample, extensions), image_size)
    except InputError as error:
        return {"key": key, "shard": str(shard), "problem": str(error)}


def _open_journal(out: Path, run: dict[str, Any]) -> MetricsLog:
    """The journal of this run, as an interrupted one left it or new; its first row says which run it belongs to."""
    journal = MetricsLog(out / JOURNAL)
    if journal.path.exists():
        journal.cut_after(0)  # rows have no step: this drops only a last line that a kill cut off
        rows = journal.rows()
        if rows:
            difference = first_difference(rows[0], run)
            if difference is None:
                return journal
            raise InputError(
                f"{out} holds an unfinished other result ({difference}); choose another folder or delete it"
            )
    elif any(out.iterdir()):
        raise InputError(f"{out}: is there already and holds something else; choose another folder")
    journal.log(**run)
    return journal


def _fingerprint(source: Path, parts: list[Part]) -> str:
    """Hash of all names and sizes: enough to notice other pictures, without reading terabytes."""
    digest = hashlib.sha256()
    for part in parts:
        for path in [part.shard] if part.shard is not None else [source / name for name in part.files]:
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
    return digest.hexdigest()
