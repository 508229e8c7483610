"""Your own pictures and captions → shards for pretraining and for held-out retrieval.

Two passes. The first reads every file once, captions and the hash of each picture: it costs little and settles what
needs the whole collection, above all what is held out. The second decodes, resizes and writes. A sample depends on
nothing but files and settings, so any number of worker processes gives the same bytes, and an interrupted build goes on
after its last whole shard.
"""

import hashlib
import io
import json
import os
import re
import shutil
import statistics
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple, TypeVar

from PIL import Image, ImageOps
from pydantic import Field
from pydantic.dataclasses import dataclass
from tqdm import tqdm

from clips_core.config import FORBID, to_dict
from clips_core.errors import InputError
from clips_core.folders import MetricsLog, is_finished, write_bytes, write_manifest
from clips_core.images import MAX_PIXELS, open_image
from clips_core.listings import csv_rows, is_inside
from clips_core.processes import ordered_map
from clips_core.shards import write_shard
from clips_core.tokenizer import RESERVED, train_vocab

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
JOURNAL = "progress.jsonl"  # which shards are whole; there while a build is unfinished
NOT_IN_THE_RESULT = ("source", "out", "workers", "max_bad_share")  # settings that do not change the shards

Out = TypeVar("Out")


@dataclass(config=FORBID)
class BuildConfig:
    """What to read, and how to store it."""

    source: Path  # folder of pictures, each beside a .txt of the same stem; or a listing, .csv or .jsonl
    out: Path  # folder for the shards
    caption_line: int = Field(default=1, ge=1)  # which line of the .txt is the caption
    held_out: float = Field(
        default=0.1, ge=0, lt=1
    )  # share of the pictures whose caption and bytes are unique, for retrieval
    resize: Literal["squash", "shortest", "longest", "keep"] = (
        "squash"  # squash: size × size; shortest, longest: that side
    )
    size: int = Field(default=224, ge=1)  # pixels; shortest and longest only shrink, keep has no use for it
    format: Literal["png", "jpg"] = "png"
    jpg_quality: int = Field(default=90, ge=1, le=95)
    per_shard: int = Field(default=1000, ge=1)  # samples
    vocab_size: int = Field(
        default=30_522, ge=0
    )  # most entries of the vocab.txt made from the training captions; 0: make none
    max_bad_share: float = Field(default=0.05, ge=0, le=1)  # more bad samples than this share stop the build
    workers: int = Field(default_factory=lambda: os.cpu_count() or 1, ge=1)  # processes; the result is the same for any

    def __post_init__(self) -> None:
        if 0 < self.vocab_size <= len(RESERVED):
            raise ValueError(
                f"vocab_size {self.vocab_size} leaves no room for words after {len(RESERVED)} reserved entries"
            )


class Listed(NamedTuple):
    """A picture that the source names. Its caption is None where it stands in the .txt beside the picture."""

    path: str  # relative to the source's folder, with /
    caption: str | None
    synthetic: str  # synthetic caption, "" without one


class Sample(NamedTuple):
    """A picture with a good caption; whether the picture can be decoded is seen in the second pass."""

    path: str
    caption: str
    synthetic: str
    sha256: str  # of the picture file


class Skipped(NamedTuple):
    """A picture that is left out, and why."""

    path: str
    cause: str
    detail: str


class _Build(NamedTuple):
    """What the second pass works on."""

    config: BuildConfig
    folder: Path  # that the pictures' paths are relative to
    listed: int  # pictures that the source names
    skipped: list[Skipped]  # grows
    journal: MetricsLog


def build_shards(config: BuildConfig) -> Path:
    """Write `out/pretrain/`, `out/retrieval/` (both `shard-%06d.tar`), `vocab.txt`, `skipped.jsonl` and the manifest.

    A sample is `KEY.png` (or `.jpg`), `KEY.txt` (the caption) and `KEY.json`: `{"source": path, "re_caption": synthetic
    caption}`, the latter where there is one. A retrieval picture shares neither its bytes nor its caption with another.

    Returns:
        `config.out`. An interrupted build goes on; a finished one of the same source and settings is left as it is.

    Raises:
        InputError: if the source is missing, holds no usable picture or has a bad line, if more than `max_bad_share` of
            its samples are bad (they are in `out/skipped.jsonl`), or if `out` holds something else.
    """
    folder, listed, captions_alone = _list_source(config)
    results = ordered_map(config.workers, _examine, (folder, config.caption_line), listed)
    examined = list(_progress("reading", results, len(listed)))
    samples = [item for item in examined if isinstance(item, Sample)]
    skipped = [item for item in examined if isinstance(item, Skipped)]

    settings = {key: value for key, value in to_dict(config).items() if key not in NOT_IN_THE_RESULT}
    inputs = {"pictures and captions": _fingerprint(examined)}
    if is_finished(config.out, "build", settings, inputs):
        (config.out / JOURNAL).unlink(missing_ok=True)  # a kill may have come between manifest and unlink
        print(f"{config.out} already holds this build")
        return config.out
    journal = _open_journal(config.out, {"settings": settings, **inputs})
    build = _Build(config, folder, len(listed), skipped, journal)
    _stop_if_too_many_bad(build)
    pretrain, retrieval = split(samples, config.held_out)
    counts = {
        "pretrain": _write_part("pretrain", pretrain, build),
        "retrieval": _write_part("retrieval", retrieval, build),
    }
    if not counts["pretrain"]:
        raise InputError(f"{config.source}: none of its {len(listed)} pictures is left to train on")

    bad = {item.path for item in skipped}
    pretrain = [sample for sample in pretrain if sample.path not in bad]
    if config.vocab_size:
        texts = (text for sample in pretrain for text in (sample.caption, sample.synthetic) if text)
        train_vocab(texts, config.out / "vocab.txt", config.vocab_size)
    _write_skipped(skipped, config.out)
    words = sorted(len(sample.caption.split()) for sample in pretrain)
    outputs = {
        "source": str(config.source),
        "listed": len(listed),
        "captions_without_picture": captions_alone,
        **counts,
        "skipped": dict(sorted(Counter(item.cause for item in skipped).items())),
        "synthetic_captions": sum(bool(sample.synthetic) for sample in pretrain),
        "words_per_caption": {"median": statistics.median(words), "longest": words[-1]},
    }
    write_manifest(config.out, "build", settings, inputs, outputs)
    journal.path.unlink()
    print(_summary(outputs, config))
    return config.out


# --- the source -----------------------------------------------------------------------------------------------------


def _list_source(config: BuildConfig) -> tuple[Path, list[Listed], int]:
    """The folder that paths are relative to, the pictures by path, and how many .txt files have no picture beside."""
    source = config.source
    if source.is_dir():
        listed, captions_alone = _list_folder(source)
        folder = source
    elif not source.exists():
        raise InputError(f"{source}: no such file or folder")
    elif source.suffix.lower() in (".csv", ".jsonl"):
        listed, captions_alone = _read_listing(source), 0
        folder = source.parent
    else:
        raise InputError(f"{source}: give a folder, or a listing that ends in .csv or .jsonl")
    if not listed:
        kinds = ", ".join(kind[1:] for kind in PICTURES)
        raise InputError(f"{source}: no picture in it ({kinds})" if source.is_dir() else f"{source}: lists no picture")
    return folder, sorted(listed), captions_alone


def _list_folder(folder: Path) -> tuple[list[Listed], int]:
    """Every picture below `folder`; hidden files, and links to other folders, are left alone."""
    listed, captions_alone = [], 0
    for place, _, names in os.walk(folder):
        paths = [Path(place, name) for name in names if not name.startswith(".")]
        pictures = [path for path in paths if path.suffix.lower() in PICTURES]
        listed += [Listed(path.relative_to(folder).as_posix(), None, "") for path in pictures]
        stems = {path.stem for path in pictures}
        captions_alone += sum(path.suffix == ".txt" and path.stem not in stems for path in paths)
    return listed, captions_alone


def _read_listing(listing: Path) -> list[Listed]:
    """Rows with `image` and `caption`, perhaps `synthetic_caption`; paths are relative to the listing's folder.

    A picture may stand in several rows: each is a sample. Bytes that are not UTF-8 come through as lone surrogates, and
    so spoil one sample, not the listing.
    """
    listed: list[Listed] = []
    with open(listing, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        is_csv = listing.suffix.lower() == ".csv"
        rows = csv_rows(listing, file, required=("image", "caption")) if is_csv else _jsonl_rows(listing, file)
        for number, row in rows:
            where = f"{listing}, line {number}"
            image, caption, synthetic = (row.get(key) for key in ("image", "caption", "synthetic_caption"))
            if not isinstance(image, str) or not image:
                raise InputError(f"{where}: no image")
            if not all(value is None or isinstance(value, str) for value in (caption, synthetic)):
                raise InputError(f"{where}: a caption must be a text")
            if not is_inside(image):
                raise InputError(f"{where}: image {image!r} must be relative to the listing's folder, and inside it")
            listed.append(Listed(str(PurePosixPath(image)), caption or "", synthetic or ""))
    return listed


def _jsonl_rows(listing: Path, file: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{listing}, line {number}: not JSON ({error.msg})") from None
        if not isinstance(row, dict):
            raise InputError(f'{listing}, line {number}: not an object like {{"image": …, "caption": …}}')
        yield number, row


# --- first pass: captions and hashes --------------------------------------------------------------------------------


def _examine(where: tuple[Path, int], item: Listed) -> Sample | Skipped:
    """Everything that can be said of a picture without decoding it. `where`: folder, line of the caption."""
    folder, caption_line = where
    path = folder / item.path
    if not _is_text(item.path):
        return Skipped(item.path, "file name is not UTF-8", "rename it")
    caption, synthetic = item.caption, item.synthetic
    if caption is None:
        beside = path.with_suffix(".txt")
        try:
            lines = beside.read_bytes().decode("utf-8-sig", errors="surrogateescape").splitlines()
        except FileNotFoundError:
            return Skipped(item.path, "no caption file", f"{beside.name} is missing")
        except OSError as error:
            return Skipped(item.path, "caption file cannot be read", str(error.strerror))
        caption = lines[caption_line - 1] if len(lines) >= caption_line else ""
    if not _is_text(caption + synthetic):
        return Skipped(item.path, "caption is not UTF-8", ascii(caption[:80]))
    caption, synthetic = " ".join(caption.split()), " ".join(synthetic.split())
    if not caption:
        return Skipped(item.path, "empty caption", "")
    try:
        with open(path, "rb") as file:
            return Sample(item.path, caption, synthetic, hashlib.file_digest(file, "sha256").hexdigest())
    except OSError as error:
        return Skipped(item.path, "picture cannot be read", str(error.strerror))


def _is_text(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def split(samples: list[Sample], held_out: float) -> tuple[list[Sample], list[Sample]]:
    """Samples to train on, and those held out: a share of the ones that share neither bytes nor caption with another.

    Captions of the same words are the same: case and punctuation do not tell two pictures apart.

    By a hash of the path, so that a picture stays on its side when others come and go. Pictures with a twin always
    train: held out, they would be half seen or could not be told apart.
    """
    pictures = Counter(sample.sha256 for sample in samples)
    captions = Counter(_words(sample.caption) for sample in samples)
    parts: tuple[list[Sample], list[Sample]] = ([], [])
    for sample in samples:
        alone = pictures[sample.sha256] == captions[_words(sample.caption)] == 1
        parts[alone and _unit_hash(sample.path) < held_out].append(sample)
    return parts


def _words(caption: str) -> str:
    return " ".join(re.findall(r"\w+", caption.casefold()))


def _unit_hash(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6]) / 2**48


# --- second pass: decode, resize, write -----------------------------------------------------------------------------


def _write_part(name: str, samples: list[Sample], build: _Build) -> int:
    """Write the shards of one part that the journal does not hold yet. Returns how many samples all its shards hold."""
    config, skipped = build.config, build.skipped
    if samples:
        (config.out / name).mkdir(parents=True, exist_ok=True)
    for leftover in (config.out / name).glob(".*.tmp"):  # of a kill
        leftover.unlink()
    rows = [row for row in build.journal.rows() if row.get("part") == name]  # one per shard
    skipped += [Skipped(*values) for row in rows for values in row["skipped"]]
    examined = rows[-1]["examined"] if rows else 0
    written, shards, logged = sum(row["samples"] for row in rows), len(rows), len(skipped)
    pending: list[dict[str, Any]] = []
    left = list(enumerate(samples))[examined:]
    results = ordered_map(config.workers, _prepare, (build.folder, config), left)
    for result in _progress(name, results, len(samples), examined):
        examined += 1
        if isinstance(result, Skipped):
            skipped.append(result)
            _stop_if_too_many_bad(build)
        else:
            pending.append(result)
        if len(pending) == config.per_shard or examined == len(samples):
            if pending:
                write_shard(pending, config.out / name / f"shard-{shards:06d}.tar")
            build.journal.log(part=name, examined=examined, samples=len(pending), skipped=skipped[logged:])
            written, shards, logged = written + len(pending), shards + 1, len(skipped)
            pending = []
    return written


def _prepare(where: tuple[Path, BuildConfig], numbered: tuple[int, Sample]) -> dict[str, Any] | Skipped:
    """Decode, resize and encode one picture: a sample for a shard."""
    folder, config = where
    number, sample = numbered
    try:
        data = (folder / sample.path).read_bytes()
    except OSError as error:
        return Skipped(sample.path, "picture cannot be read", str(error.strerror))
    if hashlib.sha256(data).hexdigest() != sample.sha256:
        raise InputError(f"{folder / sample.path}: changed while the build was running; run it again")
    try:
        picture = open_image(data, sample.path)
    except InputError as error:
        cause = _what_is_wrong(data)
        return Skipped(sample.path, cause, "" if cause == "not a picture" else str(error))
    picture = resized(ImageOps.exif_transpose(picture), config.resize, config.size)
    description = {"source": sample.path} | ({"re_caption": sample.synthetic} if sample.synthetic else {})
    return {
        "__key__": f"{number:09d}",
        config.format: _encode(picture, config.format, config.jpg_quality),
        "txt": sample.caption,
        "json": description,
    }


def resized(picture: Image.Image, how: str, size: int) -> Image.Image:
    """Squash to size × size, or bring the shortest or longest side down to `size`, or keep; bilinear, as towers do."""
    if how == "keep":
        return picture
    if how == "squash":
        target = (size, size)
    else:
        side = min(picture.size) if how == "shortest" else max(picture.size)
        scale = min(1.0, size / side)
        target = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture if target == picture.size else picture.resize(target, Image.Resampling.BILINEAR)


def _encode(picture: Image.Image, kind: str, jpg_quality: int) -> bytes:
    picture.info = {}  # no EXIF, no colour profile: what a tower sees is the pixels
    buffer = io.BytesIO()
    if kind == "png":
        picture.save(buffer, "PNG")
    else:
        picture.save(buffer, "JPEG", quality=jpg_quality)
    return buffer.getvalue()


def _what_is_wrong(data: bytes) -> str:
    """The kind of fault of a picture that could not be opened, from its header."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as image:
                return "too many pixels" if image.width * image.height > MAX_PIXELS else "damaged picture"
    except Image.DecompressionBombError:
        return "too many pixels"
    except Exception:  # PIL's readers raise nearly anything
        return "not a picture"


# --- bookkeeping ----------------------------------------------------------------------------------------------------


def _open_journal(out: Path, build: dict[str, Any]) -> MetricsLog:
    """The journal of this build: as an interrupted run left it, or empty over a folder without shards.

    Its first row says which build it belongs to. Leftovers of another, unfinished build are removed; anything else in
    `out` is refused.
    """
    journal = MetricsLog(out / JOURNAL)
    if journal.path.exists():
        journal.cut_after(0)  # rows have no step: this drops only a last line that a kill cut off
        rows = journal.rows()
        shards = {name: sorted((out / name).glob("shard-*.tar")) for name in ("pretrain", "retrieval")}
        written = Counter(row["part"] for row in rows if row.get("samples"))
        if rows[:1] == [build] and all(len(shards[name]) >= count for name, count in written.items()):
            return journal
        for name in shards:
            shutil.rmtree(out / name, ignore_errors=True)
        journal.path.unlink()
    elif out.exists() and (not out.is_dir() or os.listdir(out)):
        raise InputError(f"{out}: is there already and holds something else; choose another folder")
    journal.log(**build)
    return journal


def _fingerprint(examined: Iterable[Sample | Skipped]) -> str:
    """Hash of everything that the first pass has found."""
    digest = hashlib.sha256()
    for item in examined:
        digest.update(json.dumps(item).encode() + b"\n")
    return digest.hexdigest()


def _stop_if_too_many_bad(build: _Build) -> None:
    config, skipped = build.config, build.skipped
    if len(skipped) <= config.max_bad_share * build.listed:
        return
    _write_skipped(skipped, config.out)
    causes = ", ".join(f"{count} × {cause}" for cause, count in Counter(item.cause for item in skipped).most_common())
    raise InputError(
        f"{config.source}: {len(skipped)} of {build.listed} samples are bad ({causes}), more than "
        f"max_bad_share={config.max_bad_share} allows; each is named in {config.out / 'skipped.jsonl'}"
    )


def _write_skipped(skipped: list[Skipped], out: Path) -> None:
    lines = [json.dumps(item._asdict()) for item in sorted(skipped)]  # as ASCII: a path need not be UTF-8
    write_bytes(out / "skipped.jsonl", "".join(f"{line}\n" for line in lines).encode())


def _summary(outputs: dict[str, Any], config: BuildConfig) -> str:
    causes = ", ".join(f"{count} × {cause}" for cause, count in outputs["skipped"].items())
    text = f"{config.out}: {outputs['pretrain']} pictures to train on, {outputs['retrieval']} held out"
    text += f"; {sum(outputs['skipped'].values())} of {outputs['listed']} skipped" + (f" ({causes})" if causes else "")
    if outputs["captions_without_picture"]:
        text += f"; {outputs['captions_without_picture']} captions have no picture beside them"
    return text


def _progress(name: str, results: Iterator[Out], total: int, done: int = 0) -> Iterator[Out]:
    return iter(tqdm(results, desc=name, total=total, initial=done, unit="picture", mininterval=0.5))
