"""Pictures with classes or captions, from files of this machine: listed and checked first, read one by one later."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clips_core.errors import InputError
from clips_core.folders import read_json
from clips_core.listings import is_inside
from clips_core.shards import TarIndex, find_shards, scan_tar
from clips_core.zero_shot import class_folders, read_captions
from eval_suites import prompts
from eval_suites.prompts import Template
from eval_suites.towers.config import CaptionSet, ClassSet

EXTENSIONS = ("jpg", "jpeg", "png", "webp")  # of a tar's pictures


@dataclass(frozen=True)
class Pictures:
    """Pictures in files or tars, not read yet."""

    where: str
    ids: list[str]  # below the folder, or TAR/KEY
    sizes: list[int]  # bytes
    read: Callable[[int], tuple[bytes, str]]  # a picture's bytes, and what an error calls it

    def __len__(self) -> int:
        return len(self.ids)

    def fingerprint(self, first: int = 0, last: int | None = None) -> str:
        """Hash of the names and sizes of a slice: enough to notice other pictures, without reading them."""
        listing = list(zip(self.ids[first:last], self.sizes[first:last], strict=True))
        return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


@dataclass(frozen=True)
class Labelled:
    """Pictures and the numbers of their classes."""

    pictures: Pictures
    labels: Tensor  # int64 [N]
    folders: list[str] | None  # the classes' folders, in the order of the numbers; None: they come from tars

    def fingerprint(self) -> str:
        """Hash of the pictures' names and sizes, and of their classes."""
        labels = ",".join(map(str, self.labels.tolist()))
        return hashlib.sha256(f"{self.pictures.fingerprint()} {labels}".encode()).hexdigest()


@dataclass(frozen=True)
class Classification:
    """A set to classify."""

    name: str
    tasks: list[str]
    test: Labelled
    train: Labelled | None
    classes: list[str]  # each once: folder names, or names in words
    spoken: list[str]  # what prompts say; [] where no task needs them
    templates: list[Template]


@dataclass(frozen=True)
class Captioned:
    """A set for retrieval."""

    name: str
    pictures: Pictures
    captions: list[str]  # [C]
    owner: Tensor  # int64 [C]: each caption's picture

    def fingerprint(self) -> str:
        """Hash of the pictures' names and sizes, and of their captions."""
        content = json.dumps([self.pictures.fingerprint(), self.captions, self.owner.tolist()])
        return hashlib.sha256(content.encode()).hexdigest()


def read_class_set(name: str, config: ClassSet, data: Path) -> Classification:
    """The pictures of a set and what its classes are called.

    Raises:
        InputError: naming the file: no picture, another number of them than is known, a class that one of train and test lacks,
            a class without a name, a tar that is damaged or holds a sample without picture or number.
    """
    test = _labelled(str(data / config.test))
    train = _labelled(str(data / config.train)) if config.train is not None else None
    _check_count(f"classes.{name}.test_count", test.pictures, config.test_count)
    if train is not None:
        _check_count(f"classes.{name}.train_count", train.pictures, config.train_count)
    if train is not None:
        _check_same_classes(train, test)
    zero_shot = "zero_shot" in config.tasks
    beside = _folder_of(test.pictures.where)
    templates = prompts.templates(config.templates, beside, data) if zero_shot else []
    if zero_shot or config.names is not None:
        spoken = prompts.class_names(config.names, test.folders, beside, data)
    elif test.folders is not None:
        spoken = [folder.replace("_", " ") for folder in test.folders]
    else:
        parts = [test.labels, *([train.labels] if train is not None else [])]
        spoken = [f"class {i}" for i in range(1 + max(int(labels.max()) for labels in parts))]
    for part in (test, train):
        if part is not None and part.folders is None:
            _check_numbers(part, len(spoken))
    classes = test.folders or (spoken if len(set(spoken)) == len(spoken) else _numbered(spoken))
    return Classification(name, list(config.tasks), test, train, classes, spoken, templates)


def read_caption_set(name: str, config: CaptionSet, data: Path) -> Captioned:
    """The pictures of a set and their captions.

    Raises:
        InputError: naming the file: a picture that is missing or has no caption, another number of them than is known, a JSON
            that is not Karpathy's, a damaged tar.
    """
    if config.captions.endswith(".json"):
        assert config.images is not None
        pictures, captions = _karpathy(data / config.captions, data / config.images, config.split)
    else:
        pictures, captions = _captioned_tars(str(data / config.captions), config.caption)
    _check_count(f"captions.{name}.count", pictures, config.count)
    kept = [own[: config.per_image] for own in captions]
    owner = torch.tensor([i for i, own in enumerate(kept) for _ in own])
    return Captioned(name, pictures, [caption for own in kept for caption in own], owner)


def _check_count(key: str, pictures: Pictures, known: int | None) -> None:
    if known is not None and len(pictures) != known:
        raise InputError(
            f"{pictures.where}: has {len(pictures):,} pictures, but {known:,} are published; complete it, or set {key}=null to "
            "take what is there"
        )


# ------------------------------------------------------------------------------------------------------------ classes


def _labelled(path: str) -> Labelled:
    if not os.path.isdir(path) or any(Path(path).glob("*.tar")):
        return _labelled_tars(path)
    folder = Path(path)
    by_class = class_folders(folder)
    files = [file.relative_to(folder).as_posix() for own in by_class.values() for file in own]
    labels = torch.tensor([label for label, own in enumerate(by_class.values()) for _ in own])
    return Labelled(_files(folder, files), labels, list(by_class))


def _labelled_tars(pattern: str) -> Labelled:
    members, numbers = _Members(pattern), []
    for tar, key, files in members.samples():
        members.add(tar, key, files)
        if "cls" not in files:
            raise InputError(f"{tar}, key {key!r}: no {key}.cls with the number of its class")
        text = members.read_at(tar, *files["cls"])
        try:
            number = int(text)
        except ValueError:
            number = -1
        if number < 0:
            raise InputError(f"{tar}, key {key!r}: its cls is {text[:20]!r}, but must be a class's number, from 0 on")
        numbers.append(number)
    return Labelled(members.pictures(), torch.tensor(numbers), None)


def _check_same_classes(train: Labelled, test: Labelled) -> None:
    if (train.folders is None) != (test.folders is None):
        raise InputError(f"{train.pictures.where} and {test.pictures.where}: one has class folders, the other tars")
    odd = sorted(set(train.folders or []) ^ set(test.folders or []))
    if odd:
        lacking = test if odd[0] in (train.folders or []) else train
        raise InputError(f"{lacking.pictures.where}: has no class {odd[0]!r}, which the other of train and test has")


def _check_numbers(part: Labelled, classes: int) -> None:
    worst = int(part.labels.argmax())
    if part.labels[worst] >= classes:
        raise InputError(
            f"{part.pictures.where}: {part.pictures.ids[worst]!r} is of class {int(part.labels[worst])}, but the {classes} "
            f"names are for the numbers 0 to {classes - 1}"
        )


def _numbered(names: Sequence[str]) -> list[str]:
    return [f"{number} {name}" for number, name in enumerate(names)]


# ----------------------------------------------------------------------------------------------------------- captions


def _karpathy(path: Path, images: Path, split: str) -> tuple[Pictures, list[list[str]]]:
    """Pictures of a split and all their captions, from the JSON of Karpathy's splits.

    It is `{"images": [{"filename": …, "filepath": …, "split": …, "sentences": [{"raw": …}, …]}, …]}`; only MSCOCO's has `filepath`.
    """
    content = read_json(path)
    rows = content.get("images") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path}: holds no list under 'images'; Karpathy's dataset_coco.json or its like is needed")
    splits = sorted({str(row.get("split")) for row in rows})
    rows = [row for row in rows if row.get("split") == split]
    if not rows:
        raise InputError(f"{path}: no picture of split {split!r} (splits found: {', '.join(splits) or 'none'})")
    files, captions = [], []
    for row in rows:
        name = row.get("filename")
        if not isinstance(name, str) or not name:
            raise InputError(f"{path}: a picture of split {split!r} has no 'filename': {json.dumps(row)[:80]}")
        file = f"{row['filepath']}/{name}" if row.get("filepath") else name
        if not is_inside(file):
            raise InputError(f"{path}: {file!r} must be relative to the folder of the pictures, and inside it")
        sentences = row.get("sentences")
        own = [s.get("raw") for s in sentences if isinstance(s, dict)] if isinstance(sentences, list) else []
        texts = [text.strip() for text in own if isinstance(text, str) and text.strip()]
        if not texts:
            raise InputError(f"{path}: {file!r} has no caption under 'sentences', 'raw'")
        files.append(file)
        captions.append(texts)
    # Some have the pictures without the folder that `filepath` names around them.
    flat = [file.rpartition("/")[2] for file in files]
    if not (images / files[0]).is_file() and (images / flat[0]).is_file():
        files = flat
    return _files(images, files), captions


def _captioned_tars(pattern: str, names: Sequence[str]) -> tuple[Pictures, list[list[str]]]:
    members, captions = _Members(pattern), []
    wanted = {name.partition(".")[0] for name in names} | set(names)
    for tar, key, files in members.samples():
        members.add(tar, key, files)
        sample: dict[str, Any] = {"__key__": key, "__shard__": str(tar)}
        sample |= {name: members.read_at(tar, *place) for name, place in files.items() if name in wanted}
        captions.append([text.strip() for text in read_captions(sample, names)])
    return members.pictures(), captions


# -------------------------------------------------------------------------------------------------------------- files


def _files(folder: Path, files: list[str]) -> Pictures:
    """Pictures by their paths below a folder; one error for all that are missing."""
    sizes, missing = [], []
    for file in files:
        try:
            sizes.append((folder / file).stat().st_size)
        except OSError:
            missing.append(file)
    if missing:
        raise InputError(f"{folder}: {len(missing)} of {len(files)} pictures are missing, for example {missing[0]}")

    def read(index: int) -> tuple[bytes, str]:
        path = folder / files[index]
        try:
            return path.read_bytes(), str(path)
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error})") from None

    return Pictures(str(folder), files, sizes, read)


class _Members:
    """The pictures of some tars, by where their bytes lie: no picture is read to find them."""

    def __init__(self, pattern: str):
        self.pattern = pattern
        self.paths = find_shards(pattern)
        self.tars: list[Path] = []  # [N], as are
        self.keys: list[str] = []
        self.offsets: list[int] = []
        self.sizes: list[int] = []

    def samples(self) -> Iterator[tuple[Path, str, dict[str, tuple[int, int]]]]:
        """Tar and key of each sample, and offset and size of its files by extension."""
        for path in self.paths:
            index = _scan(path)
            if index.fault is not None:
                raise InputError(f"{path}: {index.fault[0]} ({index.fault[1]}); fetch or build this tar again")
            for i, key in enumerate(index.keys):
                entries = range(index.first[i], index.first[i + 1])
                places = {
                    index.extensions[index.extension[e]]: (int(index.offset[e]), int(index.size[e])) for e in entries
                }
                yield path, key, places

    def add(self, tar: Path, key: str, files: dict[str, tuple[int, int]]) -> None:
        """Take up the picture of a sample."""
        extension = next((name for name in EXTENSIONS if name in files), None)
        if extension is None:
            raise InputError(f"{tar}, key {key!r}: no picture (looked for {', '.join(EXTENSIONS)})")
        self.tars.append(tar)
        self.keys.append(key)
        self.offsets.append(files[extension][0])
        self.sizes.append(files[extension][1])

    def read_at(self, tar: Path, offset: int, size: int) -> bytes:
        try:
            with open(tar, "rb") as file:
                return os.pread(file.fileno(), size, offset)
        except OSError as error:
            raise InputError(f"{tar}: cannot be read ({error})") from None

    def pictures(self) -> Pictures:
        """All that were taken up."""
        if not self.keys:
            raise InputError(f"{self.pattern}: the tars hold no sample")

        def read(index: int) -> tuple[bytes, str]:
            tar = self.tars[index]
            data = self.read_at(tar, self.offsets[index], self.sizes[index])
            return data, f"{tar}, key {self.keys[index]!r}"

        ids = [f"{tar.name}/{key}" for tar, key in zip(self.tars, self.keys, strict=True)]
        return Pictures(self.pattern, ids, self.sizes, read)


def _scan(path: Path) -> TarIndex:
    with open(path, "rb") as file:
        return scan_tar(lambda offset, length: os.pread(file.fileno(), length, offset), path.stat().st_size)


def _folder_of(where: str) -> Path:
    """The folder that a folder, a glob pattern or a tar stands for."""
    return Path(where) if os.path.isdir(where) else Path(where).parent


def prompts_fingerprint(texts: Sequence[str]) -> str:
    """Hash of a set's prompts."""
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()
