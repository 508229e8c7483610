"""Conversations looked through before a run: the records, their pictures' files, their lengths, and a repaired file.

It reads with training's own rules (`records.faults`, `Encoder`, `open_image`), so that what it finds is what training would stop
at. Imports torch only to count tokens. Memory grows with the number of records and pictures by some 200 bytes each, not with
the file.

What has been looked at stays in OUT/.check, in small files that appear whole: a kill costs the parts that are under way, and a
check that is run again, after fetching pictures, say, or to write the repaired file, looks only at pictures that changed.
"""

import dataclasses
import functools
import hashlib
import io
import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image
from pydantic import Field
from pydantic.dataclasses import dataclass
from tqdm import tqdm

from clips_core.config import FORBID, load_config, to_dict
from clips_core.errors import BadSample, InputError
from clips_core.folders import (
    first_difference,
    read_json,
    replacing,
    sha256_file,
    write_bytes,
    write_json,
    write_manifest,
)
from clips_core.images import FORMATS, open_image
from clips_core.processes import ordered_map
from llava_bridge.records import (
    IMAGE_MARK,
    Fault,
    Record,
    faults,
    image_names,
    is_jsonl,
    read_records,
    to_conversation,
    with_turns_cut,
)
from llava_bridge.templates import read_template, shipped_templates

REPORT, FINDINGS, DROPPED, WORK = "report.json", "findings.jsonl", "dropped.jsonl", ".check"
SLICE = 1000  # records of one part of the work
PICTURES = 256  # of one part of the work
# The same picture under another name: OCR-VQA's downloads, say, are .gif and .png where LLaVA's file says .jpg.
SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".JPG", ".JPEG", ".PNG", ".GIF")
CONTENT = {
    ".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".gif": "GIF", ".webp": "WEBP", ".bmp": "BMP", ".tif": "TIFF", ".tiff": "TIFF"
}  # fmt: skip
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
LAYOUTS = Path(__file__).parent / "layouts"
KEEP, CHANGE, DROP = range(3)

In = TypeVar("In")


@dataclass(config=FORBID)
class ConversationCheckConfig:
    """What to look through."""

    json: Path  # a LLaVA file, .json or .jsonl
    images: Path  # the folder that "image" is relative to
    out: Path  # gets report.json, findings.jsonl, manifest.json; with apply also the repaired file and dropped.jsonl
    layout: str | None = None  # mix665k, or a .yaml like it: which sources the pictures come from, and how many
    llm: str | None = None  # smollm2, or a folder with a tokenizer: counts tokens; null: lengths are not looked at
    template: str | None = None  # plain (stage 1), vicuna_v1, llama3 or chatml; null: the tokenizer's own
    system_prompt: str | None = None  # what the template says first; null: the template's own
    image_tokens: int = Field(default=576, ge=1)  # of one picture
    max_length: int = Field(default=2048, ge=2)  # tokens of a sample, image tokens included
    apply: bool = False  # write the repaired file
    max_dropped_share: float = Field(default=0.01, ge=0, le=1)  # more unusable records than this share: an error
    workers: int = Field(default_factory=lambda: os.cpu_count() or 1, ge=1)  # processes; the result is the same for any


@dataclass(config=FORBID)
class PictureSource:
    """One of the data sets that a mixture's pictures come from. null: not known."""

    name: str
    folders: dict[str, int | None]  # below the folder of pictures, and the number of files in each
    records: int | None  # that show one of its pictures
    origin: str  # where to get it


@dataclass(config=FORBID)
class Layout:
    """A published mixture, as it should be on the disk."""

    name: str
    records: int | None
    text_only: int | None
    sources: list[PictureSource]


class _Row(NamedTuple):
    """What is known of one record, its pictures' files aside."""

    element: int
    line: int
    byte: int
    id: str | None  # as JSON
    pictures: list[str] | None  # None: it is no record
    tokens: int | None
    faults: list[Fault]


class _Picture(NamedTuple):
    """What is known of one picture's file."""

    name: str
    size: int  # bytes; -1: no such file
    modified: int  # nanoseconds
    fault: Fault | None
    other_name: str  # under which it is there


_Bad = dict[str, tuple[Fault, str]]  # name → what is wrong with the file, and its name elsewhere, if any


def check_conversations(config: ConversationCheckConfig) -> Path:
    """Write the report, the findings and the manifest, print a summary; with `apply`, write the repaired file too.

    Returns:
        `config.out`.

    Raises:
        InputError: if a file or folder is missing, the JSON is cut off or damaged (a .jsonl may have bad lines), `out` holds
            something else, or, when the report is written, if more than `max_dropped_share` of the records would have to be
            left out.
    """
    # -------------------------------------------------------------------------------------------------- inputs
    layout = None if config.layout is None else _read_layout(config.layout)
    if not config.images.is_dir():
        raise InputError(f"{config.images}: no such folder of pictures")
    if not config.json.is_file():
        raise InputError(f"{config.json}: no such file")
    repaired = config.out / f"conversations{'.jsonl' if is_jsonl(config.json) else '.json'}"
    _check_out(config.out)
    if config.json.resolve().is_relative_to(config.out.resolve()):
        raise InputError(f"{config.json} lies in out={config.out}: choose another folder")
    digest = sha256_file(config.json)
    work = config.out / WORK
    _open_work(work, {"json": digest, "settings": _settings(config), "images": str(config.images.resolve())})

    # -------------------------------------------------------------------------------------------------- look
    records = _look_at_records(config, work)
    names = sorted({name for row in _rows(records) for name in row.pictures or ()})
    pictures = _look_at_pictures(config, work, names)
    bad = {p.name: (p.fault, p.other_name) for path in pictures for p in _pictures_of(read_json(path)) if p.fault}

    # -------------------------------------------------------------------------------------------------- report, repair
    for name in (DROPPED, "conversations.json", "conversations.jsonl", "manifest.json"):  # of an earlier check
        (config.out / name).unlink(missing_ok=True)
    decisions, report = _report(config, records, bad, layout)
    report["distinct_pictures"] = len(names)
    write_json(config.out / REPORT, report)
    outputs = dict(report)
    too_many = report["left_out"] / max(report["records"], 1) > config.max_dropped_share
    if config.apply and not too_many:
        outputs["repaired"] = _write_repaired(config, decisions, bad, repaired)
    settings = {key: value for key, value in to_dict(config).items() if key not in ("out", "workers")}
    write_manifest(config.out, "check_conversations", settings, {"data": digest}, outputs)
    print(_summary(config, report, outputs.get("repaired")))
    if too_many:
        missing = [s["name"] for s in report["sources"] if s["missing_folders"]]
        raise InputError(
            f"{report['left_out']} of {report['records']} records cannot be used, more than "
            f"max_dropped_share={config.max_dropped_share} allows"
            + (f"; the folders of {', '.join(missing)} are missing" if missing else "")
            + f"; {config.out / FINDINGS} names each" + ("; nothing was repaired" if config.apply else "")
        )  # fmt: skip
    return config.out


def _check_out(out: Path) -> None:
    ours = {REPORT, FINDINGS, DROPPED, "manifest.json", "conversations.json", "conversations.jsonl"}
    if out.exists() and not (out.is_dir() and all(p.name in ours or p.name[0] == "." for p in out.iterdir())):
        raise InputError(f"{out}: is there already and holds something else; choose another folder")


def _settings(config: ConversationCheckConfig) -> dict[str, Any]:
    """What a record's row depends on, beside the record."""
    if config.llm is None:
        if config.template is not None or config.system_prompt is not None:
            raise InputError("template and system_prompt say nothing without a tokenizer: set llm too")
        return {}
    keys = ("llm", "template", "system_prompt", "image_tokens", "max_length")
    words = _encoder(config.llm, config.template, config.system_prompt, config.image_tokens).processor
    fingerprint = hashlib.sha256(
        f"{words.tokenizer.backend_tokenizer.to_str()}{words.chat_template}".encode()
    ).hexdigest()
    return {**{key: value for key, value in to_dict(config).items() if key in keys}, "tokenizer": fingerprint}


def _open_work(work: Path, job: dict[str, Any]) -> None:
    """The folder of intermediate files: as an earlier check of the same file and settings left it, or new."""
    if (work / "job.json").exists() and first_difference(read_json(work / "job.json"), job) is None:
        return
    shutil.rmtree(work, ignore_errors=True)
    write_json(work / "job.json", job)


# --------------------------------------------------------------------------------------------------------- the records


def _look_at_records(config: ConversationCheckConfig, work: Path) -> list[Path]:
    """A file of rows for each slice of records, in order."""
    slices = work / "slices.json"
    if not slices.exists():
        write_json(slices, _slices(config.json))
    parts = [(work / f"records-{number:06d}.json", tuple(start)) for number, start in enumerate(read_json(slices))]
    missing = [part for part in parts if not part[0].exists()]
    _run(config.workers, _look_at_slice, config, missing, len(parts), "records")
    return [path for path, _ in parts]


def _slices(file: Path) -> list[tuple[int, int, int]]:
    """Number, line and byte of every `SLICE`th record."""
    starts = []
    with tqdm(total=file.stat().st_size, desc="reading", unit="B", unit_scale=True) as bar:
        for record in read_records(file):
            if (record.element - 1) % SLICE == 0:
                starts.append((record.element, record.line, record.byte))
                bar.update(record.byte - bar.n)
        bar.update(bar.total - bar.n)
    if not starts:
        raise InputError(f"{file}: must be a list of conversations, and not empty")
    return starts


def _look_at_slice(config: ConversationCheckConfig, part: tuple[Path, tuple[int, int, int]]) -> None:
    path, start = part
    rows = [_look_at_record(config, r) for r in itertools.islice(read_records(config.json, start), SLICE)]
    write_bytes(path, json.dumps(rows).encode())


def _look_at_record(config: ConversationCheckConfig, record: Record) -> _Row:
    value = record.value
    found = [Fault("not JSON", record.fault, "leave out")] if record.fault else faults(value)
    identity = json.dumps(value["id"]) if isinstance(value, dict) and "id" in value else None
    at = (record.element, record.line, record.byte, identity)
    pictures = image_names(value) if isinstance(value, dict) else None
    if any(fault.repair == "leave out" for fault in found):
        return _Row(*at, pictures, None, found)
    if found:
        value = with_turns_cut(value)
    tokens = None
    if config.llm is not None:
        tokens, more = _lengths(config, record._replace(value=value))
        found = found + more
    return _Row(*at, pictures, tokens, found)


def _lengths(config: ConversationCheckConfig, record: Record) -> tuple[int | None, list[Fault]]:
    """Tokens of a sound record as training will see it, and what it would not like about them."""
    assert config.llm is not None
    whole = _encoder(config.llm, config.template, config.system_prompt, config.image_tokens)
    conversation = to_conversation(record, config.json, config.images)
    specials = [token for token in whole.processor.tokenizer.all_special_tokens if token != IMAGE_MARK]
    texts = [message["content"] for message in conversation.messages]
    inside = sorted({token for token in specials if any(token in text for text in texts)})
    found = (
        [Fault("special token in the words", f"{', '.join(inside)} would end or begin a turn", "none")]
        if inside
        else []
    )
    tokens = None
    try:
        tokens = len(whole.plain(conversation) if config.template == "plain" else whole.chat(conversation))
        if tokens > config.max_length:
            cut = dataclasses.replace(whole, max_length=config.max_length)
            _ = cut.plain(conversation) if config.template == "plain" else cut.chat(conversation)
            detail = f"{tokens} tokens: {tokens - config.max_length} are cut at max_length {config.max_length}"
            found.append(Fault("longer than max_length", detail, "none"))
    except BadSample as error:
        found.append(Fault(error.cause, str(error).removeprefix(f"{conversation.where}: "), "leave out"))
    return tokens, found


@functools.cache
def _encoder(llm: str, template: str | None, system_prompt: str | None, image_tokens: int) -> Any:
    """An `Encoder` without an end, made from a tokenizer alone: there may be no MLLM yet."""
    from types import SimpleNamespace

    from transformers import AddedToken, AutoTokenizer

    from llava_bridge.conversations import Encoder
    from llava_bridge.llm import llm_folder
    from llava_bridge.mllm import chat_template

    folder = llm_folder(llm, weights=False)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"language model {folder}: no tokenizer ({' '.join(str(error).split())})") from None
    if not tokenizer.is_fast:
        raise InputError(f"language model {folder}: its tokenizer does not tell where in the text a token stands")
    tokenizer.add_tokens([AddedToken(IMAGE_MARK, special=True, normalized=False)], special_tokens=True)
    text = tokenizer.chat_template if template in (None, "plain") else read_template(str(template))
    if text is None and template is None:
        names = ", ".join(["plain", *shipped_templates()])
        raise InputError(f"language model {folder}: its tokenizer has no chat template; set template to one of {names}")
    image = tokenizer.convert_tokens_to_ids(IMAGE_MARK)
    words = SimpleNamespace(
        tokenizer=tokenizer, chat_template=text and chat_template(text, system_prompt), image_token_id=image
    )
    return Encoder(words, image_tokens, max_length=2**31)


def _rows(paths: list[Path]) -> Iterator[_Row]:
    for path in paths:
        for row in itertools.starmap(_Row, read_json(path)):
            yield row._replace(faults=[Fault(*fault) for fault in row.faults])


# -------------------------------------------------------------------------------------------------------- the pictures


def _look_at_pictures(config: ConversationCheckConfig, work: Path, names: list[str]) -> list[Path]:
    """A file for each part of the pictures. Every picture's file is looked up, but decoded only if it is not as before."""
    parts = [
        (work / f"pictures-{number:06d}.json", names[start : start + PICTURES])
        for number, start in enumerate(range(0, len(names), PICTURES))
    ]
    _run(config.workers, _look_at_part, config.images, parts, len(parts), "pictures")
    return [path for path, _ in parts]


def _look_at_part(images: Path, part: tuple[Path, list[str]]) -> None:
    path, names = part
    known = {picture.name: picture for picture in _pictures_of(read_json(path))} if path.exists() else {}
    write_bytes(path, json.dumps([_look_at_picture(images, name, known.get(name)) for name in names]).encode())


def _pictures_of(rows: list[Any]) -> Iterator[_Picture]:
    for name, size, modified, fault, other_name in rows:
        yield _Picture(name, size, modified, None if fault is None else Fault(*fault), other_name)


def _look_at_picture(images: Path, name: str, known: _Picture | None) -> _Picture:
    stat = _stat(images / name)
    if stat is not None:
        size, modified = stat
        if known is not None and (known.size, known.modified) == stat:
            return known
        return _Picture(name, size, modified, _fault_of_file(images, name), "")
    path = PurePosixPath(name)
    others = [str(path.with_suffix(suffix)) for suffix in SUFFIXES] if path.name else []
    other = next((other for other in others if other != name and _stat(images / other) is not None), None)
    if other is None:
        return _Picture(name, -1, 0, Fault("missing picture", f"{images / name} does not exist", "leave out"), "")
    fault = _fault_of_file(images, other)
    if fault is not None and fault.repair == "leave out":
        return _Picture(name, -1, 0, fault, "")
    return _Picture(name, -1, 0, Fault("other extension", f"{name} is there as {other}", "rename"), other)


def _stat(path: Path) -> tuple[int, int] | None:
    try:
        stat = os.stat(path)
    except (OSError, ValueError):
        return None
    return (stat.st_size, stat.st_mtime_ns) if path.is_file() else None


def _fault_of_file(images: Path, name: str) -> Fault | None:
    try:
        data = (images / name).read_bytes()
        open_image(data, name, at_least=(1, 1))  # every byte is read, a JPEG's pixels are not all made
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            content = str(image.format)
    except BadSample as error:
        return Fault(error.cause, str(error), "leave out")
    except OSError as error:
        return Fault("unreadable file", f"{name}: {error.strerror or error}", "leave out")
    content = "JPEG" if content == "MPO" else content  # a JPEG with another after it
    if CONTENT.get(PurePosixPath(name).suffix.lower()) == content:
        return None
    detail = f"{name} holds {content}: training reads it, tools that go by the name may not"
    return Fault("content differs from extension", detail, "none")


# ----------------------------------------------------------------------------------------------------------- the report


def _report(
    config: ConversationCheckConfig, records: list[Path], bad: _Bad, layout: Layout | None
) -> tuple[np.ndarray, dict[str, Any]]:
    """What becomes of each record, uint8 [records], and the report; writes the findings on the way."""
    twice = _ids_seen_twice(records)
    decisions: list[int] = []
    kinds: Counter[str] = Counter()
    fatal: Counter[str] = Counter()
    other: Counter[str] = Counter()
    lengths: list[int] = []
    sources = _Sources(layout)
    with replacing(config.out / FINDINGS) as file:
        for row in _rows(records):
            found = list(row.faults)
            pictures = row.pictures or []
            found += [bad[name][0] for name in dict.fromkeys(pictures) if name in bad]
            first = twice.get(_digest(row.id)) if row.id is not None else None
            if first is not None and first != row.element:
                found.append(Fault("id occurs twice", f"record {first} has the id too", "none"))
            repairs = {fault.repair for fault in found}
            decision = DROP if "leave out" in repairs else CHANGE if repairs & {"rename", "cut turns"} else KEEP
            decisions.append(decision)
            kinds[_kind(row)] += 1
            lengths += [] if row.tokens is None else [row.tokens]
            sources.count(
                pictures, {name for name in pictures if name in bad and bad[name][0].cause == "missing picture"}
            )
            for fault in found:
                (fatal if fault.repair == "leave out" else other)[fault.cause] += 1
                file.write(_finding(row, fault))
    counts = Counter(decisions)
    return np.array(decisions, np.uint8), {
        "records": len(decisions),
        "usable": counts[KEEP] + counts[CHANGE],
        "repairable": counts[CHANGE],
        "left_out": counts[DROP],
        "kinds": dict(sorted(kinds.items())),
        "leave_out": dict(sorted(fatal.items())),
        "other_findings": dict(sorted(other.items())),
        "tokens": _distribution(lengths),
        "sources": sources.report(config.images),
        "layout": None if layout is None else sources.totals(len(decisions), kinds["text only"]),
    }


def _kind(row: _Row) -> str:
    if row.pictures is None:
        return "no record"
    return ("text only", "one picture", "several pictures")[min(len(row.pictures), 2)]


def _finding(row: _Row, fault: Fault) -> bytes:
    place = {
        "element": row.element,
        "line": row.line,
        "byte": row.byte,
        "id": None if row.id is None else json.loads(row.id),
    }
    return json.dumps({**place, **fault._asdict()}).encode() + b"\n"


def _digest(identity: str) -> int:
    return int.from_bytes(hashlib.blake2b(identity.encode(), digest_size=8).digest(), "little")


def _ids_seen_twice(records: list[Path]) -> dict[int, int]:
    """Digest of each id that several records have → the first of them."""
    pair = np.dtype([("digest", np.uint64), ("element", np.int64)])
    seen = np.fromiter(((_digest(row.id), row.element) for row in _rows(records) if row.id is not None), pair)
    digests, elements = seen["digest"], seen["element"]
    values, first, counts = np.unique(digests, return_index=True, return_counts=True)
    return {int(v): int(elements[i]) for v, i, n in zip(values, first, counts, strict=True) if n > 1}


def _distribution(values: list[int]) -> dict[str, Any]:
    if not values:
        return {"n": 0}
    quantiles = np.quantile(values, QUANTILES, method="inverted_cdf").tolist()
    named = {f"p{q * 100:g}": int(value) for q, value in zip(QUANTILES, quantiles, strict=True)}
    return {"n": len(values), "mean": round(float(np.mean(values)), 2), "min": min(values), **named, "max": max(values)}


class _Sources:
    """Which of a layout's sources the records' pictures come from."""

    def __init__(self, layout: Layout | None):
        self.layout = layout
        self.folders = {f"{f.rstrip('/')}/": s.name for s in (layout.sources if layout else []) for f in s.folders}
        self.records: Counter[str | None] = Counter()
        self.missing: Counter[str | None] = Counter()

    def count(self, pictures: list[str], missing: set[str]) -> None:
        """Count one record."""
        if self.folders:
            named = {name: self._source(name) for name in pictures}
            self.records.update(set(named.values()))
            self.missing.update({named[name] for name in missing})

    def _source(self, name: str) -> str | None:
        return next((source for folder, source in self.folders.items() if name.startswith(folder)), None)

    def report(self, images: Path) -> list[dict[str, Any]]:
        return [
            {
                "name": source.name,
                "origin": source.origin,
                "records": self.records[source.name],
                "expected_records": source.records,
                "records_without_picture": self.missing[source.name],
                "missing_folders": [folder for folder in source.folders if not (images / folder).is_dir()],
                "files": {folder: _count_files(images / folder) for folder in source.folders},
                "expected_files": source.folders,
            }
            for source in (self.layout.sources if self.layout else [])
        ]

    def totals(self, records: int, text_only: int) -> dict[str, Any]:
        assert self.layout is not None
        return {
            "name": self.layout.name,
            "records": records,
            "expected_records": self.layout.records,
            "text_only": text_only,
            "expected_text_only": self.layout.text_only,
            "records_of_other_folders": self.records[None],
        }


def _count_files(folder: Path) -> int:
    if not folder.is_dir():
        return 0
    with os.scandir(folder) as entries:
        return sum(not entry.is_dir() for entry in entries)


def _read_layout(name: str) -> Layout:
    shipped = sorted(path.stem for path in LAYOUTS.glob("*.yaml"))
    path = Path(name) if Path(name).suffix in (".yaml", ".yml") else LAYOUTS / f"{name}.yaml"
    if not path.is_file():
        raise InputError(f"no layout {name!r}: give a .yaml file or one of {', '.join(shipped)}")
    return load_config(Layout, path)


def _summary(config: ConversationCheckConfig, report: dict[str, Any], repaired: dict[str, Any] | None) -> str:
    records = report["records"]
    kinds = ", ".join(f"{count} {kind}" for kind, count in report["kinds"].items())
    lines = [f"{config.out}: {report['usable']} of {records} records can be used ({kinds})"]
    lines += [f"  {n:>12} {n / records:7.2%}  {cause}: to be left out" for cause, n in report["leave_out"].items()]
    lines += [f"  {n:>12} {n / records:7.2%}  {cause}" for cause, n in report["other_findings"].items()]
    if report["tokens"]["n"]:
        t = report["tokens"]
        lines.append(f"  tokens: {t['p50']} in the median, 95 % at most {t['p95']}, longest {t['max']}")
    total = report["layout"]
    if total is not None:
        lines.append(
            f"  {total['name']}: {records} records ({_of(total['expected_records'])}), {total['text_only']} text only "
            f"({_of(total['expected_text_only'])}), {total['records_of_other_folders']} with pictures of other folders"
        )
    for source in report["sources"]:
        files = ", ".join(f"{f} {n} files ({_of(source['expected_files'][f])})" for f, n in source["files"].items())
        lines.append(
            f"    {source['name']}: {source['records']} records ({_of(source['expected_records'])}), "
            f"{source['records_without_picture']} of them without their picture; {files}"
        )
        if source["missing_folders"]:
            lines.append(f"      {', '.join(source['missing_folders'])} is missing: get it from {source['origin']}")
    if repaired is not None:
        lines.append(f"  {repaired['file']}: {repaired['records']} records, SHA-256 {repaired['sha256']}")
    elif not config.apply and (report["repairable"] or report["left_out"]):
        lines.append(
            f"  apply=true writes a file with {report['repairable']} repaired and {report['left_out']} left out"
        )
    return "\n".join(lines)


def _of(expected: int | None) -> str:
    return "number not known" if expected is None else f"of {expected}"


# ------------------------------------------------------------------------------------------------------------ the repair


def _write_repaired(config: ConversationCheckConfig, decisions: np.ndarray, bad: _Bad, path: Path) -> dict[str, Any]:
    """Write the file that training takes, one record a line, and the list of those that it lacks."""
    lines = is_jsonl(config.json)
    written = 0
    with replacing(path) as file, replacing(config.out / DROPPED) as dropped:
        file.write(b"" if lines else b"[")
        records = zip(read_records(config.json), decisions.tolist(), strict=True)
        for record, decision in tqdm(records, "writing", len(decisions), unit="record"):
            if decision == DROP:
                identity = record.value.get("id") if isinstance(record.value, dict) else None
                row = {"element": record.element, "line": record.line, "byte": record.byte, "id": identity}
                dropped.write(json.dumps(row).encode() + b"\n")
                continue
            value = _repaired(record.value, bad) if decision == CHANGE else record.value
            file.write((b"" if lines else b",\n" if written else b"\n") + json.dumps(value).encode())
            file.write(b"\n" if lines else b"")
            written += 1
        file.write(b"" if lines else b"\n]\n")
    return {
        "file": path.name,
        "sha256": sha256_file(path),
        "records": written,
        "left_out": int((decisions == DROP).sum()),
    }


def _repaired(value: dict[str, Any], bad: _Bad) -> dict[str, Any]:
    def name(old: str) -> str:
        return (bad[old][1] or old) if old in bad else old

    value = with_turns_cut(value)
    image = value.get("image")
    if isinstance(image, str):
        return {**value, "image": name(image)}
    return {**value, "image": [name(old) for old in image]} if image else value


# ------------------------------------------------------------------------------------------------------------ the work


def _run(
    workers: int, function: Callable[[Any, In], None], shared: Any, parts: list[In], total: int, name: str
) -> None:
    results = ordered_map(workers, function, shared, parts)
    for _ in tqdm(results, name, total=total, initial=total - len(parts), unit="part", mininterval=0.5):
        pass
